"""Replicas get a version's files from S3 once a machine, and only those that they need; what they do is in threads."""

from __future__ import annotations

import asyncio
import pickle
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from mixer_platform import versions
from mixer_platform.serve.parts import Beside, Found, Part, fetch
from mixer_platform.storage import S3Storage, open_storage


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Storage]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = S3Storage(f"s3://{tmp_path.name.replace('_', '-')}/work", check=False)  # moto's servers share buckets
    storage.client.create_bucket(Bucket=storage.bucket)
    yield storage
    server.stop()


def publish(storage: S3Storage, content: bytes) -> None:
    for name in ("query.onnx", "item.onnx"):
        storage.write(f"models/a/{name}", content)
    versions.publish(storage, "models", "a", {})


def test_only_what_is_needed_is_copied_by_all_replicas_at_once(bucket: S3Storage):
    publish(bucket, b"graph")
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch(bucket.uri, "models/a", ("query.onnx",)), range(8)))
    (folder,) = folders
    assert [path.name for path in folder.iterdir()] == ["query.onnx"]
    assert (folder / "query.onnx").read_bytes() == b"graph"


def test_a_version_made_anew_under_its_old_name_is_fetched_anew(bucket: S3Storage):
    publish(bucket, b"old")
    fetch(bucket.uri, "models/a", ("query.onnx",))
    bucket.delete("models")
    publish(bucket, b"new")
    assert (fetch(bucket.uri, "models/a", ("query.onnx",)) / "query.onnx").read_bytes() == b"new"


def test_files_of_a_folder_are_read_where_they_are(tmp_path: Path):
    assert fetch(str(tmp_path), "models/a", ()) == Path(open_storage(str(tmp_path)).path("models/a"))


class Meeting:
    """A part both of whose methods end only when both are asked at a time."""

    def __init__(self, people: int) -> None:
        self._all = threading.Barrier(people, timeout=20)

    def encode(self, photos: list[bytes], expires: float) -> str:
        self._all.wait()
        return "encoded"

    def search(self, word: str, expires: float) -> str:
        self._all.wait()
        return word


def test_a_deployed_part_works_in_as_many_threads_as_it_has():
    async def ask() -> list[Any]:
        part = Part(Meeting, 2, 2)
        return await asyncio.gather(*(part.ask("search", word, expires=0) for word in ("a", "b")))

    assert asyncio.run(ask()) == ["a", "b"]


def test_an_item_is_looked_up_while_every_batch_is_in_work():
    meeting: Any = Meeting(3)
    parts = Beside(meeting, {"shard": meeting}, threads=2)

    async def batch() -> Any:
        return await parts.encode([], 0)

    async def look_up() -> Any:
        return await parts.ask("search", "found", expires=0)

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(parts.run(batch), parts.run(batch), parts.run(look_up))

    assert asyncio.run(all_at_once()) == ["encoded", "encoded", ["found"]]


def test_work_that_would_wait_in_a_thread_fails_instead():
    with pytest.raises(RuntimeError, match="it waits, in a thread in which nothing would wake it"):
        asyncio.run(Beside(Any, {}, threads=1).run(asyncio.sleep, 0))  # type: ignore[arg-type]


def test_what_a_shard_found_travels():
    rows = pa.table({"id": [3, 4, 5], "title": ["a", None, "c"], "tags": [["x"], [], ["y", "z"]]})
    found = Found(np.ones((2, 1), np.float32), np.array([[4], [5]]), rows.slice(1).append_column("none", pa.nulls(2)))
    scores, ids, table = pickle.loads(pickle.dumps(found))
    assert (scores.tolist(), ids.tolist()) == ([[1], [1]], [[4], [5]])
    assert table == found.rows
    assert Found(scores, ids, table[:0]).__reduce__()[1][2].size < found.__reduce__()[1][2].size
