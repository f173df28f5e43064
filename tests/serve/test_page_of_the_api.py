"""The service does what its OpenAPI page says and refuses what the page does not allow: requests made from the page."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.openapi import from_url
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from mixer_platform.serve.payload import PICTURES
from tests.serve.servers import service

SEARCHES = ["POST /v1/search", "POST /v1/search/batch", "GET /v1/items/{item_id}/similar"]
OTHERS = [
    *("GET /v1/items/{item_id}/image", "GET /v1/items/{item_id}", "GET /v1/attributes", "GET /v1/status"),
    *("GET /healthz", "GET /readyz"),
]
EXAMPLES = [15, pytest.param(150, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def page(workspace: Any) -> Iterator[Any]:
    with service(workspace) as url:
        yield from_url(f"{url}/openapi.json")


def test_every_operation_of_the_page_is_tried(page: Any) -> None:
    assert sorted(each.ok().label for each in page.get_all_operations()) == sorted(SEARCHES + OTHERS)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("label", SEARCHES + OTHERS)
def test_whatever_the_page_allows_is_answered_as_it_says(page: Any, label: str, examples: int) -> None:
    """With a sentence, where a photo is none, or an attribute is none of these items'."""
    _try(page, label, GenerationMode.POSITIVE, examples, lambda case: _call(case, positive_data_acceptance))


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("label", SEARCHES)
def test_what_the_page_does_not_allow_is_refused(page: Any, label: str, examples: int) -> None:
    def refused(case: Case) -> None:
        reply = case.call()
        # Any bytes are a file, so a batch answers with an error in the place of each.
        if reply.status_code != 200 or not all("error" in result for result in reply.json().get("results", [{}])):
            case.validate_response(reply)

    _try(page, label, GenerationMode.NEGATIVE, examples, refused)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("label", SEARCHES)
def test_searches_for_a_photo_are_answered(page: Any, photo: Any, label: str, examples: int) -> None:
    picture = photo(1000)

    def search(case: Case) -> None:
        _send(case, picture)
        reply = _call(case, negative_data_rejection)  # which takes the bytes of a file for no string
        assert reply.status_code == (404 if label.startswith("GET") else 200)

    _try(page, label, GenerationMode.POSITIVE, examples, search)


def _try(page: Any, label: str, mode: GenerationMode, examples: int, call: Callable[[Case], Any]) -> None:
    def once(case: Case) -> None:
        call(case)

    (operation,) = (each.ok() for each in page.get_all_operations() if each.ok().label == label)
    quiet = settings(database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    settings(quiet, max_examples=examples)(given(case=operation.as_strategy(generation_mode=mode))(once))()


def _call(case: Case, *excluded: Any) -> Any:
    reply = case.call_and_validate(excluded_checks=list(excluded))
    assert reply.status_code < 500
    return reply


def _send(case: Case, picture: bytes) -> None:
    """Put a picture in the place of each photo, and leave out what depends on the items."""
    text = base64.b64encode(picture).decode()
    photos = {"photo": picture, "photos": [picture] * 2, "image": text, "images": [text] * 2}
    if case.media_type in PICTURES:
        case.body = picture
    elif isinstance(case.body, dict):
        case.body = _plain(case.body) | {name: photos[name] for name in photos.keys() & case.body.keys()}
    with_body = case.method == "POST" and case.media_type not in PICTURES
    case.query = {} if with_body else _plain(case.query or {})


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: int(options[name]) % 25 + (name == "k") for name in {"k", "offset"} & options.keys()}
