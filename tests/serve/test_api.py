"""The HTTP API over real deployments, all in this process."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import numpy as np
import pytest
from ray import serve
from starlette.testclient import TestClient

from mixer_platform.gallery import calibration_key
from mixer_platform.serve.api import create_api
from mixer_platform.serve.engine import Engine
from mixer_platform.serve.errors import ApiError
from mixer_platform.serve.loading import calibrated, open_beside
from mixer_platform.serve.parts import Deployed, Part, QueryEncoder, ShardApart
from mixer_platform.serve.payload import BodyLimit
from mixer_platform.serve.service import SearchService
from mixer_platform.serve.swap import Swapper, check
from mixer_platform.storage import open_storage
from tests.serve.conftest import COLOURS

Photo = Callable[..., bytes]


@pytest.fixture(scope="module", params=["beside", "deployments"])
def client(workspace: Any, request: pytest.FixtureRequest) -> Iterator[TestClient]:
    """The service with its parts beside it, or behind the handles of deployments."""
    config, version = workspace.config, "index-a"
    engine = open_beside(config, version)
    if request.param == "deployments":
        index, settings = engine.index, config.serve

        def run(part: type, *arguments: Any) -> Any:
            return serve.run(serve.deployment(Part).bind(part, 2, *arguments), _local_testing_mode=True)

        encoder = run(QueryEncoder, config.workspace, index.model, settings)
        shards = {
            entry.name: run(ShardApart, config.workspace, entry, index.search, settings) for entry in index.shards
        }
        engine = Engine(index, Deployed(encoder, shards))
    swapper = Swapper(engine, lambda: version, None, calibrated(config))  # type: ignore[arg-type]
    service = SearchService(swapper, config.serve)
    asyncio.run(check(engine))
    with TestClient(create_api(service, config)) as client:
        yield client


def search(client: TestClient, photo: bytes, **fields: Any) -> Any:
    return client.post("/v1/search", files={"photo": ("photo.jpg", photo)}, data=fields)


def as_json(photo: bytes) -> str:
    return base64.b64encode(photo).decode()


def error_of(reply: Any, status: int, code: str) -> str:
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["error"]
    error = reply.json()["error"]
    assert error["code"] == code
    assert error["request_id"]
    assert "Traceback" not in reply.text
    assert "\n" not in error["message"]
    return error["message"]


def ids(reply: Any) -> list[str]:
    assert reply.status_code == 200, reply.text
    return [item["id"] for item in reply.json()["items"]]


@pytest.mark.parametrize("k", [1, 10, 50])
def test_search_over_shards_equals_exact_search_over_all(client: TestClient, workspace: Any, photo: Photo, k: int):
    for seed in (1, 3, 1000, 1001):
        query = photo(seed)
        reply = search(client, query, k=k)
        assert ids(reply) == workspace.exact(workspace.embed(query), k)
        scores = [item["score"] for item in reply.json()["items"]]
        expected = np.sort(workspace.embeddings @ workspace.embed(query))[::-1][:k]
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_k_in_the_query_string_is_told_where_it_goes(client: TestClient, photo: Photo) -> None:
    for path, name in (("/v1/search", "photo"), ("/v1/search/batch", "photos")):
        reply = client.post(f"{path}?k=2", files={name: ("photo.jpg", photo(1))})
        assert reply.status_code == 422
        said = "k is in the query string; send it as a field of the body, beside the photo"
        assert reply.json()["error"]["message"] == said


def test_a_reply_holds_items_versions_and_timings(client: TestClient, photo: Photo):
    reply = search(client, photo(5)).json()
    assert (reply["model"], reply["index"]) == ("model-a", "index-a")
    assert len(reply["items"]) == 10
    assert reply["items"][0] == {
        "id": "item-005",
        "title": "Item 5",
        "score": pytest.approx(1, abs=1e-3),
        "probability": None,
        "attributes": {"description": "The item number 5", "image": "images/5.jpg", "colour": "green", "price": 2.5},
    }
    timings = reply["timings_ms"]
    assert timings["encode"] > 0
    assert timings["search"] > 0
    assert timings["total"] >= timings["encode"] + timings["search"]
    assert (reply["next_offset"], reply["nothing_similar"], reply["degraded"]) == (10, False, False)


def test_null_columns_are_left_out_and_nan_is_null(client: TestClient, photo: Photo):
    assert search(client, photo(1), k=1).json()["items"][0]["title"] is None
    attributes = search(client, photo(2), k=1).json()["items"][0]["attributes"]
    assert attributes == {"image": "images/2.jpg", "colour": "blue", "price": None}


def test_json_and_multipart_give_the_same(client: TestClient, photo: Photo):
    query = photo(77, kind="PNG")
    reply = client.post("/v1/search", json={"image": as_json(query), "k": 7})
    assert ids(reply) == ids(search(client, query, k=7))
    assert len(ids(reply)) == 7


def test_concurrent_searches_do_not_mix(client: TestClient, workspace: Any, photo: Photo):
    queries = [photo(2000 + i) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda query: search(client, query, k=5), queries))
    for query, reply in zip(queries, replies, strict=True):
        assert ids(reply) == workspace.exact(workspace.embed(query), 5)


@pytest.mark.parametrize("form", ["multipart", "json"])
def test_a_batch_answers_each_photo_in_its_place(client: TestClient, workspace: Any, photo: Photo, form: str):
    photos = [photo(1), b"no picture", photo(2), photo(3)[:200]]
    if form == "json":
        reply = client.post("/v1/search/batch", json={"images": [as_json(each) for each in photos], "k": 3})
    else:
        reply = client.post("/v1/search/batch", files=[("photos", each) for each in photos], data={"k": 3})
    assert reply.status_code == 200, reply.text
    results = reply.json()["results"]
    for place in (0, 2):
        assert [item["id"] for item in results[place]["items"]] == workspace.exact(workspace.embed(photos[place]), 3)
    for place in (1, 3):
        assert results[place]["error"]["code"] == "unreadable_image"


def test_a_batch_of_broken_photos_is_answered(client: TestClient):
    reply = client.post("/v1/search/batch", json={"images": ["?", as_json(b"no picture")]})
    assert [result["error"]["message"] for result in reply.json()["results"]] == [
        "the photo cannot be used: not base64",
        "the photo cannot be used: not a JPEG, PNG or WebP picture",
    ]


@pytest.mark.parametrize("item", [0, 7, 11])
@pytest.mark.parametrize("k", [1, 10, 50])
def test_similar_items_leave_the_item_out(client: TestClient, workspace: Any, item: int, k: int):
    item_id = workspace.item_ids[item]
    reply = client.get(f"/v1/items/{item_id.replace('/', '%2F').replace('?', '%3F')}/similar", params={"k": k})
    expected = [each for each in workspace.exact(workspace.embeddings[item], k + 1) if each != item_id]
    assert ids(reply) == expected[:k]
    assert reply.json()["timings_ms"]["encode"] is None


def test_an_item_is_left_out_even_where_its_twin_comes_first(client: TestClient, workspace: Any):
    assert ids(client.get("/v1/items/item-004/similar", params={"k": 1})) == ["item-003"]
    assert ids(client.get("/v1/items/item-003/similar", params={"k": 1})) == ["item-004"]


def test_an_unknown_item_is_404(client: TestClient):
    message = error_of(client.get("/v1/items/nothing/similar"), 404, "unknown_item")
    assert message == "index index-a holds no item 'nothing'"


@pytest.mark.parametrize("k", [0, -1, 51])
def test_k_out_of_range(client: TestClient, photo: Photo, k: int):
    sentence = f"k is {k}; it must be from 1 to 50"
    assert error_of(search(client, photo(1), k=k), 422, "invalid_request") == sentence
    replies = [
        client.post("/v1/search", json={"image": as_json(photo(1)), "k": k}),
        client.post("/v1/search/batch", json={"images": [as_json(photo(1))], "k": k}),
        client.get("/v1/items/item-003/similar", params={"k": k}),
    ]
    assert [error_of(reply, 422, "invalid_request") for reply in replies] == [sentence] * 3


def test_k_that_is_no_number(client: TestClient, photo: Photo):
    expected = "k should be a valid integer, unable to parse string as an integer, found 'ten'"
    assert error_of(search(client, photo(1), k="ten"), 422, "invalid_request") == expected
    reply = client.get("/v1/items/item-003/similar", params={"k": "ten"})
    assert error_of(reply, 422, "invalid_request") == expected


def huge_png(side: int) -> bytes:
    """Return a valid PNG of side x side white pixels; a few kilobytes that would decode to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    line = b"\0" + b"\xff" * (side // 8)
    pixels = b"".join(rows.compress(line) for _ in range(side)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty", "not a JPEG, PNG or WebP picture"),
        ("text", "not a JPEG, PNG or WebP picture"),
        ("truncated", "broken picture: "),
        ("huge", "picture of 20000 x 20000 pixels; at most 40 million"),
    ],
)
def test_photos_that_cannot_be_used(client: TestClient, photo: Photo, name: str, reason: str):
    whole = photo(1, size=(200, 200))
    bodies = {"empty": b"", "text": b"<html>", "truncated": whole[: len(whole) // 2], "huge": huge_png(20_000)}
    for reply in (search(client, bodies[name]), client.post("/v1/search", json={"image": as_json(bodies[name])})):
        assert error_of(reply, 422, "unreadable_image").startswith(f"the photo cannot be used: {reason}")


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, "the body is not JSON: "),
        ({"json": [1]}, "the body should be an object, found [1]"),
        ({"json": {}}, "image is missing"),
        ({"json": {"image": 1}}, "image should be a valid string, found 1"),
        ({"json": {"image": "", "limit": 3}}, "limit is not a known field"),
        ({"json": {"image": "%"}}, "the photo cannot be used: not base64"),
        ({"files": {"picture": b"x"}}, "photo is missing"),
        ({"files": {"photo": b"x", "limit": (None, "3")}}, "limit is not a known field"),
        ({"files": {"photo": (None, "x")}}, "photo is text; send it as a file"),
        ({"files": [("photo", b"x"), ("photo", b"x")]}, "2 photos; a search takes one"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "the multipart body cannot be read: "),
    ],
)
def test_malformed_bodies(client: TestClient, request_: dict[str, Any], sentence: str):
    reply = client.post("/v1/search", **request_)
    code = "unreadable_image" if "base64" in sentence else "invalid_request"
    assert error_of(reply, 422, code).startswith(sentence)


@pytest.mark.parametrize("count", [0, 5])
def test_a_batch_has_one_to_max_photos(client: TestClient, photo: Photo, count: int):
    reply = client.post("/v1/search/batch", json={"images": [as_json(photo(1))] * count})
    assert error_of(reply, 422, "invalid_request") == f"{count} photos; a batch takes 1 to 4"


def test_a_body_of_another_type_is_415(client: TestClient, photo: Photo):
    kinds = "multipart/form-data, application/json"
    for path, known in (("/v1/search", f"{kinds}, image/jpeg, image/png, image/webp"), ("/v1/search/batch", kinds)):
        reply = client.post(path, content=photo(1), headers={"content-type": "image/gif"})
        message = error_of(reply, 415, "unsupported_media_type")
        assert message == f"content type 'image/gif'; send {known}"


def test_a_bare_picture_takes_its_options_from_the_query_string(client: TestClient, workspace: Any, photo: Photo):
    for kind in ("jpeg", "png", "webp"):
        query = photo(9, kind=kind.upper())
        reply = client.post("/v1/search?k=4&offset=2", content=query, headers={"content-type": f"image/{kind}"})
        assert ids(reply) == workspace.exact(workspace.embed(query), 6)[2:]
    reply = client.post("/v1/search?limit=4", content=photo(9), headers={"content-type": "image/jpeg"})
    assert error_of(reply, 422, "invalid_request") == "limit is not a known field"


@pytest.mark.parametrize("form", ["multipart", "json", "query"])
def test_only_what_passes_a_filter_is_searched(client: TestClient, workspace: Any, photo: Photo, form: str):
    query, where = photo(21), {"colour": ["red", "blue"], "price": {"gte": 2, "lt": 20}}
    if form == "multipart":
        reply = search(client, query, k=50, filter=json.dumps(where))
    elif form == "json":
        reply = client.post("/v1/search", json={"image": as_json(query), "k": 50, "filter": where})
    else:
        options = {"k": "50", "filter": json.dumps(where)}
        reply = client.post("/v1/search", params=options, content=query, headers={"content-type": "image/jpeg"})
    passing = {workspace.item_ids[i] for i in range(4, 40, 2)}  # colours come by fours, prices by halves
    assert ids(reply) == [each for each in workspace.exact(workspace.embed(query), 60) if each in passing]
    assert reply.json()["next_offset"] is None
    assert len(ids(reply)) == 18


def test_filters_narrow_similar_items_and_batches(client: TestClient, workspace: Any, photo: Photo):
    where = json.dumps({"colour": "green"})
    similar = ids(client.get("/v1/items/item-005/similar", params={"k": 50, "filter": where}))
    green = [workspace.item_ids[i] for i in range(1, 60, 4)]
    assert similar == [
        each for each in workspace.exact(workspace.embeddings[5], 60) if each in green and each != "item-005"
    ]
    reply = client.post("/v1/search/batch", files=[("photos", photo(1)), ("photos", photo(2))], data={"filter": where})
    for result, query in zip(reply.json()["results"], (photo(1), photo(2)), strict=True):
        expected = [each for each in workspace.exact(workspace.embed(query), 60) if each in {*green, "item-005"}][:10]
        assert [item["id"] for item in result["items"]] == expected


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ({"color": "red"}, "color"),
        ({"price": {"near": 3}}, "price"),
        ([1], "filter should be an object, found [1]"),
        ("{", "filter should be a JSON object, found '{'"),
    ],
)
def test_a_filter_that_makes_no_sense_is_told(client: TestClient, photo: Photo, where: Any, sentence: str):
    message = error_of(
        client.post("/v1/search", json={"image": as_json(photo(1)), "filter": where}), 422, "invalid_request"
    )
    assert sentence in message


def test_attributes_say_what_filters_may_name(client: TestClient):
    attributes = {each["name"]: each for each in client.get("/v1/attributes").json()["attributes"]}
    assert set(attributes) == {"title", "description", "image", "colour", "price"}
    assert attributes["colour"] == {
        "name": "colour",
        "kind": "text",
        "values": ["blue", "green", "red"],
        "min": None,
        "max": None,
    }
    assert (attributes["price"]["kind"], attributes["price"]["min"], attributes["price"]["max"]) == ("number", 0, 29.5)


def test_one_result_of_each_value_or_each_look(client: TestClient, workspace: Any, photo: Photo):
    query = photo(3)
    ranked = workspace.exact(workspace.embed(query), 51)  # max_k, and one to know whether there is more
    colours = {item: COLOURS[i % 4] for i, item in enumerate(workspace.item_ids)}
    expected, seen = [], set()
    for item in ranked:
        if colours[item] is None or colours[item] not in seen:
            expected.append(item)
            seen.add(colours[item])
    assert ids(search(client, query, k=18, group_by="colour")) == expected
    assert ids(search(client, query, k=5, offset=5, group_by="colour")) == expected[5:10]
    alike = ids(search(client, query, k=50, group_by="look"))
    assert len({"item-003", "item-004"} & set(alike)) == 1
    assert alike == [item for item in ranked if item in alike]
    names = "title, description, image, colour, price"
    message = error_of(search(client, query, group_by="size"), 422, "invalid_request")
    assert message == f"group_by is 'size'; it must be look or one of {names}"


def test_nothing_similar_enough_is_an_answer(client: TestClient, workspace: Any, photo: Photo):
    key = calibration_key("model-a")
    storage = open_storage(workspace.config.workspace)
    message = error_of(search(client, photo(5), min_probability=0.5), 422, "invalid_request")
    assert message == "min_probability: this model's scores are not calibrated; run jobs/evaluate.py"
    try:
        storage.write(key, json.dumps({"slope": 20, "intercept": -15}).encode())
        while not client.get("/v1/status").json()["calibrated"]:
            pass
        reply = search(client, photo(5), min_probability=0.9).json()
        assert [item["id"] for item in reply["items"]] == ["item-005"]
        (item,) = reply["items"]
        assert item["probability"] == pytest.approx(1 / (1 + np.exp(15 - 20 * item["score"])), abs=1e-6)
        assert (reply["next_offset"], reply["nothing_similar"]) == (None, False)
        nothing = search(client, photo(5), min_probability=1).json()
        assert (nothing["items"], nothing["nothing_similar"]) == ([], True)
    finally:
        storage.delete("calibration")
        while client.get("/v1/status").json()["calibrated"]:
            pass


def test_pages_follow_one_another_to_the_end(client: TestClient, workspace: Any, photo: Photo):
    query, found, offset = photo(12), [], 0
    while offset is not None:
        reply = search(client, query, k=20, offset=offset)
        found += ids(reply)
        offset = reply.json()["next_offset"]
        if offset == 40:  # max_k is 50
            break
    assert found == workspace.exact(workspace.embed(query), 40)
    beyond = error_of(search(client, query, k=20, offset=40), 422, "invalid_request")
    assert beyond == "offset 40 and k 20 reach beyond 50 items; ask for less"


def test_a_request_that_has_no_time_is_503_at_once(client: TestClient, photo: Photo):
    headers = {"x-request-timeout-ms": "0"}
    reply = client.post("/v1/search", files={"photo": photo(1)}, headers=headers)
    assert error_of(reply, 503, "deadline_exceeded") == "no answer within the time that the request allowed; try again"
    assert reply.headers["retry-after"] == "1"
    reply = client.get("/v1/items/item-003/similar", headers={"x-request-timeout-ms": "soon"})
    expected = "x-request-timeout-ms is 'soon'; send a number of milliseconds"
    assert error_of(reply, 422, "invalid_request") == expected


def test_an_item_is_shown(client: TestClient):
    assert client.get("/v1/items/item-005").json() == {
        "id": "item-005",
        "title": "Item 5",
        "attributes": {"description": "The item number 5", "image": "images/5.jpg", "colour": "green", "price": 2.5},
    }
    assert error_of(client.get("/v1/items/nothing"), 404, "unknown_item") == "index index-a holds no item 'nothing'"


def test_the_status_says_what_answers(client: TestClient):
    assert client.get("/v1/status").json() == {
        "model": "model-a",
        "index": "index-a",
        "items": 60,
        "shards": 3,
        "calibrated": False,
        "max_k": 50,
        "waiting": 0,
        "loading": None,
        "last_swap": None,
    }


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_above_the_limit_is_413(client: TestClient, announced: bool):
    content = bytes(1_000_001) if announced else iter([bytes(100_000)] * 11)
    reply = client.post("/v1/search", content=content, headers={"content-type": "application/json"})
    assert error_of(reply, 413, "body_too_large") == "the body is above 1 MB; send less"


@pytest.mark.parametrize(("headers", "messages"), [([], 11), ([(b"content-length", b"9999")], 0)])
def test_a_body_is_not_read_beyond_the_limit(headers: list[tuple[bytes, bytes]], messages: int):
    received = 0

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += 1
        return {"type": "http.request", "body": bytes(100), "more_body": True}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            await receive()

    with pytest.raises(ApiError, match="the body is above"):
        asyncio.run(BodyLimit(app, 1000)({"type": "http", "headers": headers}, receive, receive))  # type: ignore[arg-type]
    assert received == messages


def test_unknown_routes_and_methods_have_the_same_shape(client: TestClient):
    assert error_of(client.get("/v2"), 404, "not_found") == "GET /v2: not found"
    assert error_of(client.get("/v1/search"), 405, "method_not_allowed") == "GET /v1/search: method not allowed"


def test_health_and_readiness(client: TestClient):
    for path in ("/healthz", "/readyz"):
        assert (client.get(path).status_code, client.get(path).json()) == (200, {"status": "ok"})


def test_openapi_describes_replies_and_both_kinds_of_body(client: TestClient, photo: Photo):
    page = client.get("/openapi.json").json()
    assert client.get("/docs").status_code == 200
    assert set(page["paths"]) == {
        "/v1/search",
        "/v1/search/batch",
        "/v1/items/{item_id}/similar",
        "/v1/items/{item_id}",
        "/v1/items/{item_id}/image",
        "/v1/attributes",
        "/v1/status",
        "/healthz",
        "/readyz",
    }
    operation = page["paths"]["/v1/search"]["post"]
    content = operation["requestBody"]["content"]
    assert {"multipart/form-data", "application/json", "image/jpeg"} < set(content)
    assert content["application/json"]["schema"]["properties"]["k"]["maximum"] == 50
    jsonschema.validate({"image": as_json(photo(1)), "k": 3}, content["application/json"]["schema"])
    assert set(operation["responses"]) == {"200", "413", "415", "422", "503"}

    def check(status: str, reply: Any, path: str) -> None:
        (operation,) = page["paths"][path].values()
        schema = operation["responses"][status]["content"]["application/json"]["schema"]
        jsonschema.validate(reply.json(), {**schema, "components": page["components"]})

    images = [as_json(photo(1)), "?"]
    check("200", search(client, photo(1)), "/v1/search")
    check("422", search(client, b"x"), "/v1/search")
    check("200", client.post("/v1/search/batch", json={"images": images}), "/v1/search/batch")
    check("200", client.get("/v1/items/item-003/similar"), "/v1/items/{item_id}/similar")
    check("404", client.get("/v1/items/nothing/similar"), "/v1/items/{item_id}/similar")
