"""Whatever becomes of a request, it is counted and written down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from mixer_platform.serve.api import create_api
from mixer_platform.serve.keys import make_key
from mixer_platform.serve.loading import calibrated, open_beside
from mixer_platform.serve.metrics import Metrics
from mixer_platform.serve.service import SearchService
from mixer_platform.serve.swap import Swapper, check
from mixer_platform.serve.watch import Watch

Photo = Callable[..., bytes]
KEY, ENTRY = make_key("shop", requests_per_second=0.001, burst=4)


@pytest.fixture(scope="module")
def service(workspace: Any) -> SearchService:
    engine = open_beside(workspace.config, "index-a")
    asyncio.run(check(engine))
    swapper = Swapper(engine, lambda: "index-a", None, calibrated(workspace.config))  # type: ignore[arg-type]
    return SearchService(swapper, workspace.config.serve)


@pytest.fixture
def client(workspace: Any, service: SearchService, caplog: pytest.LogCaptureFixture) -> Iterator[TestClient]:
    caplog.set_level(logging.INFO, "mixer_platform.serve.logs")
    with TestClient(create_api(service, workspace.config), raise_server_exceptions=False) as client:
        yield client


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return what the lines of requests say, beside what every line has."""
    usual = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
    lines = [record for record in caplog.records if record.name == "mixer_platform.serve.logs"]
    return [{name: value for name, value in vars(line).items() if name not in usual} for line in lines]


def test_a_search_is_told_with_its_parts(client: TestClient, photo: Photo, caplog: pytest.LogCaptureFixture):
    asked = {"photo": photo(1)}
    assert client.post("/v1/search", files=asked, data={"k": 3}, headers={"x-request-id": "mine"}).status_code == 200
    (line,) = told(caplog)
    assert 0 < line.pop("encode_ms") + line.pop("search_ms") + line.pop("wait_ms") < line.pop("total_ms")
    assert line == {
        "status": 200,
        "request_id": "mine",
        "method": "POST",
        "route": "/v1/search",
        "k": 3,
        "queries": 1,
        "index": "index-a",
        "model": "model-a",
    }
    assert caplog.messages == ["POST /v1/search 200"]


def test_a_batch_and_a_similar_item_are_told_too(client: TestClient, photo: Photo, caplog: pytest.LogCaptureFixture):
    client.post("/v1/search/batch", files=[("photos", photo(1)), ("photos", b"x"), ("photos", photo(2))])
    client.get("/v1/items/item-001/similar", params={"k": 2})
    batch, similar = told(caplog)
    assert (batch["route"], batch["queries"], batch["k"]) == ("/v1/search/batch", 2, 10)
    assert (similar["route"], similar["queries"], similar["k"]) == ("/v1/items/{item_id:path}/similar", 1, 2)
    assert "encode_ms" in batch
    assert "encode_ms" not in similar


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "route"),
    [
        ("/v1/search", b"x", 422, "unreadable_image", "/v1/search"),
        ("/v1/search", bytes(1_500_000), 413, "body_too_large", "/v1/search"),
        ("/v1/nowhere", b"", 404, "not_found", "none"),
    ],
)
def test_what_is_refused_is_told_with_the_reason(
    client: TestClient, caplog: pytest.LogCaptureFixture, path: str, body: bytes, status: int, code: str, route: str
):
    assert client.post(path, files={"photo": body}).status_code == status
    (line,) = told(caplog)
    assert (line["status"], line["code"], line["route"]) == (status, code, route)


def test_a_full_queue_and_a_failure_of_the_server_are_told(
    client: TestClient, service: SearchService, photo: Photo, caplog: pytest.LogCaptureFixture
):
    full, service.batcher._max_queued = service.batcher._max_queued, 0
    assert client.post("/v1/search", files={"photo": photo(1)}).status_code == 503
    service.batcher._max_queued = full
    process, service.batcher._process = service.batcher._process, None  # type: ignore[assignment]
    assert client.post("/v1/search", files={"photo": photo(1)}).status_code == 500
    service.batcher._process = process
    saturated, failed = told(caplog)
    assert (saturated["status"], saturated["code"]) == (503, "saturated")
    assert (failed["status"], failed["route"]) == (500, "/v1/search")


def test_who_has_no_key_or_asks_too_often_is_told_and_who_asks(
    workspace: Any, service: SearchService, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "mixer_platform.serve.logs")
    with TestClient(create_api(service, workspace.config, (ENTRY,))) as client:
        assert client.get("/v1/status").status_code == 401
        statuses = [client.get("/v1/status", headers={"x-api-key": KEY}).status_code for _ in range(5)]
    assert statuses == [200] * 4 + [429]
    lines = told(caplog)
    assert [line["status"] for line in lines] == [401, *statuses]
    assert [line.get("client") for line in lines] == [None, *["shop"] * 4, None]
    assert KEY not in caplog.text


def test_probes_are_told_only_when_they_fail(client: TestClient, caplog: pytest.LogCaptureFixture):
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
    assert told(caplog) == []


def test_a_share_of_answers_is_told_and_every_error(
    workspace: Any, service: SearchService, photo: Photo, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "mixer_platform.serve.logs")
    none = workspace.config.serve.model_copy(update={"log_share": 0})
    with TestClient(create_api(service, workspace.config.model_copy(update={"serve": none}))) as client:
        assert client.post("/v1/search", files={"photo": photo(1)}).status_code == 200
        assert client.post("/v1/search", files={"photo": b"x"}).status_code == 422
    assert [line["status"] for line in told(caplog)] == [422]


def test_a_client_that_went_away_is_told(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "mixer_platform.serve.logs")

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    async def nothing(*message: Message) -> Any:
        return {}

    async def leave() -> None:
        scope = {"type": "http", "method": "GET", "path": "/v1/status", "headers": []}
        asking = asyncio.create_task(Watch(slow, Metrics())(scope, nothing, nothing))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()

    asyncio.run(leave())
    assert [line["status"] for line in told(caplog)] == [499]
