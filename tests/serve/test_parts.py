"""What a batch asks is done in threads, and what a shard found travels between processes."""

from __future__ import annotations

import asyncio
import pickle
import threading
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest

from mixer_platform.config import ServeConfig
from mixer_platform.errors import ConfigError
from mixer_platform.serve.parts import Beside, Found, Part, QueryEncoder, SentRows
from tests.serve.conftest import MODEL, Workspace


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
    sent = SentRows(rows.slice(1).append_column("none", pa.nulls(2)))
    scores, ids, received = pickle.loads(pickle.dumps(Found(np.ones((2, 1), np.float32), np.array([[4], [5]]), sent)))
    assert (scores.tolist(), ids.tolist()) == ([[1], [1]], [[4], [5]])
    assert received.table == sent.table
    assert received.items(np.array([5, 3, 4]), sent.table.schema) == [
        {"title": "c", "tags": ["y", "z"], "none": None},
        {},
        {"title": None, "tags": [], "none": None},
    ]
    assert len(pickle.dumps(SentRows(rows[:0]))) < len(pickle.dumps(sent))  # not what lies around them


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="onnxruntime knows CUDA")
def test_an_encoder_without_its_device_names_the_key(workspace: Workspace):
    config = ServeConfig(encoder_device="cuda", encoder_gpus=0.5)
    with pytest.raises(
        ConfigError, match=r"^serve\.encoder_device: this onnxruntime is not made for cuda; install the "
    ):
        QueryEncoder(workspace.config.workspace, MODEL, config)
