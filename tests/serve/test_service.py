"""What the service does when parts of it are slow, full or gone; and merging against the naive way."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.testclient import TestClient

from mixer_platform.attributes import merged_schema
from mixer_platform.config import RunConfig
from mixer_platform.gallery import MISSING, merge_top_k
from mixer_platform.serve import api
from mixer_platform.serve.engine import Engine, read_items
from mixer_platform.serve.errors import unavailable
from mixer_platform.serve.keys import KeyRing, make_key
from mixer_platform.serve.parts import ATTEMPTS, Deployed, Found, SentRows
from mixer_platform.serve.service import SearchService
from mixer_platform.serve.swap import Swapper

DIM = 4
ONE_COLUMN = pa.schema([("id", pa.int64()), ("item_id", pa.string())])


def found(rng: np.random.Generator, ids: np.ndarray, queries: int, k: int) -> Found:
    """Search a shard of random scores, many of them equal."""
    all_scores = rng.integers(0, 5, (queries, len(ids))).astype(np.float32)
    order = np.lexsort((np.broadcast_to(ids, all_scores.shape), -all_scores), axis=1)[:, :k]
    best, best_ids = np.take_along_axis(all_scores, order, axis=1), ids[order]
    if len(ids) < k:  # as FAISS pads
        best = np.pad(best, ((0, 0), (0, k - len(ids))), constant_values=np.finfo(np.float32).min)
        best_ids = np.pad(best_ids, ((0, 0), (0, k - len(ids))), constant_values=MISSING)
    rows = np.unique(best_ids[best_ids != MISSING])
    return Found(best, best_ids, SentRows(pa.table({"id": rows, "item_id": [str(row) for row in rows]})))


@pytest.mark.parametrize("k", [1, 4, 9, 40])
def test_merge_equals_sorting_everything(k: int):
    rng = np.random.default_rng(k)
    parts = [found(rng, np.arange(n, 23, 3), queries=6, k=k) for n in range(3)]
    scores, ids = merge_top_k([(part.scores, part.ids) for part in parts], k)
    wanted = ids[ids != MISSING]
    assert read_items(parts, wanted, ONE_COLUMN) == [{"item_id": str(identity)} for identity in wanted.tolist()]
    for query in range(6):
        pairs = [
            (-score, item)
            for part in parts
            for score, item in zip(part.scores[query].tolist(), part.ids[query].tolist(), strict=True)
            if item != MISSING
        ]
        merged = [
            (-score, item)
            for score, item in zip(scores[query].tolist(), ids[query].tolist(), strict=True)
            if item != MISSING
        ]
        assert merged == sorted(pairs)[:k]


def test_shards_of_different_columns_merge():
    tables = [
        pa.table({"id": [2], "item_id": ["two"], "size": [1], "year": [2001]}),
        pa.table({"id": [1], "item_id": ["one"], "x": ["y"], "year": ["about 1950"]}),
    ]
    parts = [Found(np.ones((1, 1), np.float32), table["id"].to_numpy()[None], SentRows(table)) for table in tables]
    assert read_items(parts, np.array([1, 2]), merged_schema([table.schema for table in tables])) == [
        {"item_id": "one", "size": None, "x": "y", "year": "about 1950"},
        {"item_id": "two", "size": 1, "x": None, "year": "2001"},
    ]


class FakeHandle:
    """A deployment whose methods are answered by functions, in turn; the last one stays."""

    def __init__(self, *answers: Callable[..., Any]) -> None:
        self.calls: list[str] = []
        self.cancelled = 0
        self._answers = answers

    @property
    def ask(self) -> Any:
        def remote(method: str, *arguments: Any, expires: float) -> Any:
            answer = self._answers[min(len(self.calls), len(self._answers) - 1)]
            self.calls.append(method)
            return _Response(self, lambda: answer(*arguments))

        return SimpleNamespace(remote=remote)


class _Response:
    def __init__(self, handle: FakeHandle, answer: Callable[[], Any]) -> None:
        self._handle, self._answer = handle, answer

    def __await__(self) -> Any:
        async def respond() -> Any:
            answer = self._answer()
            if isinstance(answer, Exception):
                raise answer
            return await answer if asyncio.iscoroutine(answer) else answer

        return respond().__await__()

    def cancel(self) -> None:
        self._handle.cancelled += 1


def encode(photos: list[bytes] | None = None) -> Any:
    return True if photos is None else (np.ones((len(photos), DIM), np.float32), [None] * len(photos))


def shard(item: int) -> Callable[..., Any]:
    """Return what answers as a shard that holds one item."""

    def answer(*arguments: Any) -> Any:
        if len(arguments) != 3:  # ready, or vector
            return True if not arguments else np.ones(DIM, np.float32)
        rows = pa.table({"id": [item], "item_id": [f"item-{item}"]})
        queries = len(arguments[0])
        return Found(np.ones((queries, 1), np.float32), np.full((queries, 1), item), SentRows(rows))

    return answer


def full(*_: Any) -> Exception:
    return BackPressureError(9, 8)


def gone(*_: Any) -> Exception:
    return RayActorError()


def hangs(*_: Any) -> Any:
    return asyncio.sleep(60)


def client_of(encoder: FakeHandle, *shards: FakeHandle, ring: KeyRing | None = None, **serve: Any) -> TestClient:
    config = RunConfig.model_validate({"data": "", "workspace": "", "serve": {"follow_s": 0, "keys": False, **serve}})
    index: Any = SimpleNamespace(version="index-a", model="model-a", dim=DIM, items=9, shards=shards)
    handles: Any = {f"shard-{number}": handle for number, handle in enumerate(shards)}
    engine = Engine(index, Deployed(encoder, handles), degrade=config.serve.lost_shard == "degrade")  # type: ignore[arg-type]
    engine.schema = ONE_COLUMN
    service = SearchService(Swapper(engine, lambda: "index-a", None, lambda model: None), config.serve)  # type: ignore[arg-type]
    return TestClient(api.create_api(service, config, ring), raise_server_exceptions=False)


def search(client: TestClient, **headers: str) -> Any:
    return client.post("/v1/search", files={"photo": b"x"}, headers=headers)


@pytest.mark.parametrize(
    ("answer", "code", "message", "calls"),
    [
        (full, "saturated", "QueryEncoder has too many requests waiting; try again", 1),
        (gone, "unavailable", "QueryEncoder is not available just now; try again", ATTEMPTS),
    ],
)
def test_a_full_or_missing_encoder_is_503_with_retry_after(answer: Any, code: str, message: str, calls: int):
    encoder = FakeHandle(answer)
    reply = search(client_of(encoder, FakeHandle(shard(1))))
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    error = reply.json()["error"]
    assert (error["code"], error["message"]) == (code, message)
    assert len(encoder.calls) == calls


def test_a_call_whose_replica_died_is_answered_by_another():
    encoder, first = FakeHandle(gone, gone, encode), FakeHandle(gone, shard(1))
    reply = search(client_of(encoder, first, FakeHandle(shard(2))))
    assert reply.status_code == 200, reply.text
    assert reply.json()["degraded"] is False
    assert (encoder.calls, first.calls) == (["encode"] * 3, ["search"] * 2)


def test_a_part_that_hangs_is_503_when_time_is_up_and_its_request_is_cancelled():
    encoder = FakeHandle(hangs)
    began = time.monotonic()
    reply = search(client_of(encoder, FakeHandle(shard(1))), **{"x-request-timeout-ms": "50"})
    assert reply.status_code == 503
    assert time.monotonic() - began < 30
    assert encoder.cancelled == 1


def test_a_bug_is_500_without_its_trace():
    reply = search(client_of(FakeHandle(lambda *_: RuntimeError("secret")), FakeHandle(shard(1))))
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal"
    assert "secret" not in reply.text


@pytest.mark.parametrize("lost", [gone, hangs])
def test_without_a_shard_the_reply_is_degraded_and_names_it(lost: Any):
    client = client_of(FakeHandle(encode), FakeHandle(shard(1)), FakeHandle(lost))
    reply = search(client, **{"x-request-timeout-ms": "200"}).json()
    assert [item["id"] for item in reply["items"]] == ["item-1"]
    assert (reply["degraded"], reply["missing_shards"]) == (True, ["shard-1"])


def test_without_a_shard_by_the_other_policy_or_without_any_it_is_503():
    strict = client_of(FakeHandle(encode), FakeHandle(shard(1)), FakeHandle(gone), lost_shard="fail")
    empty = client_of(FakeHandle(encode), FakeHandle(gone))
    for client, name in ((strict, "shard-1"), (empty, "shard-0")):
        reply = search(client)
        assert reply.status_code == 503
        assert reply.json()["error"]["message"] == f"{name} is not available just now; try again"


def test_an_item_that_no_shard_knows_may_be_in_a_lost_one():
    client = client_of(FakeHandle(encode), FakeHandle(lambda *_: None), FakeHandle(gone))
    reply = client.get("/v1/items/thing/similar")
    assert (reply.status_code, reply.json()["error"]["message"]) == (503, "shard-1 cannot be asked just now; try again")


def test_what_a_deployment_refuses_keeps_its_sentence():
    encoder = FakeHandle(lambda *_: unavailable("busy", code="saturated"))
    reply = search(client_of(encoder, FakeHandle(shard(1))))
    assert (reply.status_code, reply.json()["error"]["code"], reply.json()["error"]["message"]) == (
        503,
        "saturated",
        "busy",
    )


def test_readiness_names_what_is_missing_and_health_does_not_care(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api, "PROBE_S", 0.05)
    client = client_of(FakeHandle(encode), FakeHandle(shard(1)), FakeHandle(gone), FakeHandle(hangs))
    reply = client.get("/readyz")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["message"] == "not ready: shard-1, shard-2"
    assert client.get("/healthz").status_code == 200
    assert client_of(FakeHandle(encode), FakeHandle(shard(1))).get("/readyz").status_code == 200


def test_a_key_is_revoked_even_where_the_version_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "KEYS_S", 0.01)
    (leaked, first), (lasting, second) = make_key("a"), make_key("b")
    path = tmp_path / "keys.json"

    def write(*ring: Any) -> None:
        staged = tmp_path / "staged"
        staged.write_text(json.dumps([entry.model_dump(exclude_none=True) for entry in ring]))
        staged.rename(path)

    def status(client: TestClient, key: str) -> int:
        return client.get("/v1/attributes", headers={"Authorization": f"Bearer {key}"}).status_code

    write(first, second)
    with client_of(FakeHandle(), ring=(first, second), keys=True, keys_file=str(path), follow_s=0) as client:
        assert status(client, leaked) != 401
        write(second)
        until = time.monotonic() + 20
        while status(client, leaked) != 401:
            assert time.monotonic() < until, "the file is not followed"
        assert status(client, lasting) != 401
