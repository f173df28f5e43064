"""Another version comes in beside the one that answers, whole or not at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from mixer_platform.serve.api import create_api
from mixer_platform.serve.engine import Query
from mixer_platform.serve.loading import calibrated, open_beside, wished
from mixer_platform.serve.service import SearchService
from mixer_platform.serve.swap import Swapper, check
from tests.serve.conftest import publish_version, serve_version

Photo = Callable[..., bytes]


@pytest.fixture
def swapper(fresh_workspace: Any) -> Swapper:
    config = fresh_workspace.config
    engine = open_beside(config, "index-a")
    asyncio.run(check(engine))

    async def load(version: str) -> Any:
        return await asyncio.to_thread(open_beside, config, version)

    return Swapper(engine, wished(config), load, calibrated(config))


@pytest.fixture
def client(fresh_workspace: Any, swapper: Swapper) -> Iterator[TestClient]:
    """It follows CURRENT ten times a second."""
    with TestClient(create_api(SearchService(swapper, fresh_workspace.config.serve), fresh_workspace.config)) as client:
        yield client


def ask(client: TestClient, photo: bytes) -> dict[str, Any]:
    reply = client.post("/v1/search", files={"photo": photo}, data={"k": 5})
    assert reply.status_code == 200, reply.text
    return reply.json()


def ask_until(client: TestClient, photo: bytes, index: str) -> list[dict[str, Any]]:
    """Ask until this version answers; return all the replies."""
    replies = [ask(client, photo)]
    while replies[-1]["index"] != index:
        assert len(replies) < 3000
        replies.append(ask(client, photo))
    return replies


def test_encoder_and_index_change_together_and_back_again(client: TestClient, fresh_workspace: Any, photo: Photo):
    query = photo(5)
    expected = fresh_workspace.exact(fresh_workspace.embed(query), 5)
    publish_version(fresh_workspace.root, "model-b", "index-b", shards=2, negative=True)
    assert ask(client, query)["index"] == "index-a"
    for version, model in (("index-b", "model-b"), ("index-a", "model-a")):
        serve_version(fresh_workspace.root, version)
        replies = ask_until(client, query, version)
        # The photos' encoder of one and the index of the other would find the least alike.
        assert all([item["id"] for item in reply["items"]] == expected for reply in replies)
        assert {(reply["index"], reply["model"]) for reply in replies} <= {
            ("index-a", "model-a"),
            ("index-b", "model-b"),
        }
        status = client.get("/v1/status").json()
        assert (status["index"], status["model"], status["loading"]) == (version, model, None)
        assert status["last_swap"]["version"] == version
        assert status["last_swap"]["error"] is None
        assert status["last_swap"]["seconds"] > 0


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        ("shard-00001.faiss", "shard-00001.faiss: not the bytes that were published"),
        ("manifest", "index-b: no such published version"),
    ],
)
def test_a_version_that_cannot_be_served_leaves_the_one_before(
    client: TestClient, fresh_workspace: Any, photo: Photo, break_it: str, sentence: str
):
    if break_it != "manifest":
        publish_version(fresh_workspace.root, "model-b", "index-b", negative=True)
        path = fresh_workspace.root / "index/index-b" / break_it
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    serve_version(fresh_workspace.root, "index-b")
    while (status := client.get("/v1/status").json())["last_swap"] is None:
        assert ask(client, photo(1))["index"] == "index-a"
    assert sentence in status["last_swap"]["error"]
    assert (status["index"], status["last_swap"]["replaces"]) == ("index-a", "index-a")
    if break_it == "manifest":  # it comes late, as on storage that is read before it is consistent
        publish_version(fresh_workspace.root, "model-b", "index-b", negative=True)
        ask_until(client, photo(1), "index-b")


def test_a_named_version_does_not_follow_current(fresh_workspace: Any):
    serve = fresh_workspace.config.serve.model_copy(update={"index": "index-a"})
    config = fresh_workspace.config.model_copy(update={"serve": serve})
    serve_version(fresh_workspace.root, "index-b")
    assert wished(config)() == "index-a"
    assert wished(fresh_workspace.config)() == "index-b"


def test_whatever_fails_is_told_and_followed_on(fresh_workspace: Any):
    config, calls = fresh_workspace.config, 0

    async def load(version: str) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("no memory left")
        return await asyncio.to_thread(open_beside, config, version)

    publish_version(fresh_workspace.root, "model-b", "index-b", negative=True)
    swapper = Swapper(open_beside(config, "index-a"), wished(config), load, calibrated(config))
    serve_version(fresh_workspace.root, "index-b")
    asyncio.run(swapper.look())
    assert swapper.engine.index.version == "index-a"
    assert swapper.last_swap is not None
    assert swapper.last_swap.error == "no memory left"
    asyncio.run(swapper.look())
    assert swapper.engine.index.version == "index-b"


def test_what_was_asked_of_one_version_is_answered_by_it(fresh_workspace: Any, swapper: Swapper, photo: Photo):
    publish_version(fresh_workspace.root, "model-b", "index-b", negative=True)
    first, other = swapper.engine, open_beside(fresh_workspace.config, "index-b")
    asyncio.run(check(other))
    service = SearchService(swapper, fresh_workspace.config.serve)
    swapper.engine = other  # while these waited
    expires = time.time() + 60
    queries = [Query(photo(5), None, 3, None, expires, engine) for engine in (first, other, first)]
    rankings = asyncio.run(service._answer(queries))
    assert [ranking.engine for ranking in rankings] == [first, other, first]
    expected = fresh_workspace.exact(fresh_workspace.embed(photo(5)), 3)
    assert all([item["item_id"] for item in ranking.items] == expected for ranking in rankings)


def test_an_unreadable_current_changes_nothing(fresh_workspace: Any, swapper: Swapper):
    (fresh_workspace.root / "index/CURRENT").unlink()
    asyncio.run(swapper.look())
    assert swapper.engine.index.version == "index-a"
    assert swapper.last_swap is None
