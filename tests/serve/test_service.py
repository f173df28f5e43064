"""What the service does when parts of it are slow, full or gone; and merging against the naive way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.testclient import TestClient

from mixer_platform.config import ServeConfig
from mixer_platform.gallery import MISSING
from mixer_platform.serve import service
from mixer_platform.serve.api import create_api
from mixer_platform.serve.service import Found, SearchService, merge


def found(rng: np.random.Generator, ids: np.ndarray, queries: int, k: int) -> Found:
    """Search a shard of random scores, many of them equal."""
    all_scores = rng.integers(0, 5, (queries, len(ids))).astype(np.float32)
    order = np.lexsort((np.broadcast_to(ids, all_scores.shape), -all_scores), axis=1)[:, :k]
    best, best_ids = np.take_along_axis(all_scores, order, axis=1), ids[order]
    if len(ids) < k:  # as FAISS pads
        best = np.pad(best, ((0, 0), (0, k - len(ids))), constant_values=np.finfo(np.float32).min)
        best_ids = np.pad(best_ids, ((0, 0), (0, k - len(ids))), constant_values=MISSING)
    return Found(best, best_ids, {int(i): {"item_id": str(i)} for i in ids})


@pytest.mark.parametrize("k", [1, 4, 9, 40])
def test_merge_equals_sorting_everything(k: int):
    rng = np.random.default_rng(k)
    parts = [found(rng, np.arange(n, 23, 3), queries=6, k=k) for n in range(3)]
    merged = merge(parts, k)
    for query in range(6):
        pairs = [
            (-score, item)
            for part in parts
            for score, item in zip(part.scores[query].tolist(), part.ids[query].tolist(), strict=True)
            if item != MISSING
        ]
        assert [(-item.score, int(item.id)) for item in merged[query]] == sorted(pairs)[:k]


class FakeHandle:
    """A deployment that answers every method in one way."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.cancelled = False
        self._answer = answer

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *_: self)

    def __await__(self) -> Any:
        async def respond() -> Any:
            answer = self._answer()
            if isinstance(answer, Exception):
                raise answer
            return await answer if asyncio.iscoroutine(answer) else answer

        return respond().__await__()

    def cancel(self) -> None:
        self.cancelled = True


def client_of(encoder: FakeHandle, **shards: FakeHandle) -> TestClient:
    index: Any = SimpleNamespace(version="index-a", model="model-a", dim=4)
    handles: Any = shards
    api = create_api(SearchService(index, encoder, handles), ServeConfig())  # type: ignore[arg-type]
    return TestClient(api, raise_server_exceptions=False)


READY = FakeHandle(lambda: True)
FULL = FakeHandle(lambda: BackPressureError(9, 8))
GONE = FakeHandle(lambda: RayActorError())


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "PROBE_TIMEOUT_S", 0.05)


@pytest.mark.parametrize(
    ("encoder", "code", "message"),
    [
        (FULL, "saturated", "QueryEncoder has too many requests waiting; try again"),
        (GONE, "unavailable", "QueryEncoder is not available just now; try again"),
    ],
)
def test_a_full_or_missing_part_is_503_with_retry_after(encoder: FakeHandle, code: str, message: str):
    reply = client_of(encoder).post("/v1/search", files={"photo": b"x"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    error = reply.json()["error"]
    assert (error["code"], error["message"]) == (code, message)


def test_a_part_that_hangs_is_503_and_its_request_is_cancelled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service, "ANSWER_TIMEOUT_S", 0.05)
    encoder = FakeHandle(lambda: asyncio.sleep(60))
    reply = client_of(encoder).post("/v1/search", files={"photo": b"x"})
    assert reply.status_code == 503
    assert reply.json()["error"]["message"] == "QueryEncoder did not answer within 0.05 s; try again"
    assert encoder.cancelled


def test_a_bug_is_500_without_its_trace():
    reply = client_of(FakeHandle(lambda: RuntimeError("secret"))).post("/v1/search", files={"photo": b"x"})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal"
    assert "secret" not in reply.text


def test_readiness_names_what_is_missing_and_health_does_not_care():
    slow = FakeHandle(lambda: asyncio.sleep(60))
    client = client_of(READY, **{"shard-00000": READY, "shard-00001": GONE, "shard-00002": slow})
    reply = client.get("/readyz")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["message"] == "not ready: shard-00001, shard-00002"
    assert client.get("/healthz").status_code == 200
    assert client_of(READY, shard=READY).get("/readyz").status_code == 200
