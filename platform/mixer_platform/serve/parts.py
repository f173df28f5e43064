"""What answers a query: `QueryEncoder` and `ShardSearch`, beside the one who asks or, as `ShardApart`, deployed."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from mixer.embedder import QUERY_GRAPH, SETTINGS, DeviceError, QueryEmbedder
from mixer.fast_faiss import faiss
from mixer.images import UnreadableImage, decode
from mixer_platform import gallery
from mixer_platform.config import ServeConfig
from mixer_platform.errors import ConfigError
from mixer_platform.filters import Filter
from mixer_platform.gallery import MISSING, Shard, ShardEntry
from mixer_platform.item_ids import probes
from mixer_platform.rows import RowReader
from mixer_platform.serve.copies import fetch
from mixer_platform.serve.errors import ApiError, late, unavailable
from mixer_platform.serve.tracing import trace_replica

MODELS = "models"
ENCODER = "QueryEncoder"
ATTEMPTS = 3  # of a call whose replica died: another one answers

T = TypeVar("T")

log = logging.getLogger(__name__)


class Items(Protocol):
    """Items whose display columns can be read."""

    def items(self, ids: np.ndarray, schema: pa.Schema) -> list[dict[str, Any]]:
        """Do as `Shard.items`."""


class Found(NamedTuple):
    """What a shard found for n queries: scores float32 and ids int64, both [n, k'], and where those items are read."""

    scores: np.ndarray
    ids: np.ndarray
    rows: Items


class SentRows:
    """Display columns below `id`, ascending, each id once, that go to another process."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def items(self, ids: np.ndarray, schema: pa.Schema) -> list[dict[str, Any]]:
        """Do as `Shard.items`."""
        numbers = {identity: number for number, identity in enumerate(self.table["id"].to_pylist())}
        here = [numbers[identity] for identity in ids.tolist() if identity in numbers]
        found = iter(RowReader(self.table).read(here, schema))
        return [next(found) if identity in numbers else {} for identity in ids.tolist()]

    def __reduce__(self) -> tuple[Callable[[pa.Buffer], SentRows], tuple[pa.Buffer]]:
        # Ray takes tables apart in Python, buffer by buffer: for few rows that takes longer than the search.
        with pa.BufferOutputStream() as sink, pa.ipc.new_stream(sink, self.table.schema) as stream:
            stream.write_table(self.table)
        return _received, (sink.getvalue(),)


def _received(rows: pa.Buffer) -> SentRows:
    return SentRows(pa.ipc.open_stream(rows).read_all())


class Parts(Protocol):
    """The encoder and the shards of an index version, wherever they run."""

    names: list[str]  # of the shards

    @property
    def batches(self) -> int:
        """How many may be in work at a time."""

    async def run(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        """Do work that asks these parts, in the place for it: `encode` and `ask` are called from nowhere else."""

    async def encode(self, photos: Sequence[bytes], expires: float) -> tuple[np.ndarray, list[str | None]]:
        """Do as `QueryEncoder.encode`. Raises ApiError."""

    async def ask(self, method: str, *arguments: Any, expires: float) -> list[Any]:
        """Return what the method of `ShardSearch` says in each shard, an ApiError in the place of one that cannot."""

    async def unready(self, expires: float) -> list[str]:
        """Return the names of those that do not answer."""


class QueryEncoder:
    """Photos to unit embeddings."""

    def __init__(self, workspace: str, model: str, config: ServeConfig) -> None:
        """Load the model's query graph. Raises StorageError, and ConfigError for a device that cannot be used."""
        trace_replica(config)
        self._copy = fetch(workspace, f"{MODELS}/{model}", (QUERY_GRAPH, SETTINGS))
        try:
            self._alone = QueryEmbedder(self._copy.folder, config.encoder_threads, config.encoder_device)
        except DeviceError as error:
            raise ConfigError(f"serve.encoder_device: {error}") from error
        self._beside_others = self._alone
        if config.encoder_device == "cpu":
            # Batches at a time share the cores among them; one alone has them all. Each has a session of its own.
            shared = max(1, config.encoder_threads // config.concurrent_batches)
            self._beside_others = QueryEmbedder(self._copy.folder, shared)
        else:
            # A GPU's kernels are chosen at the first batch of a size; TensorRT compiles for the least and the largest.
            size, step = self._alone.preprocess.size, max(1, config.max_batch - 1)
            for photos in range(1, config.max_batch + 1, step if config.encoder_device == "tensorrt" else 1):
                self._alone(np.zeros((photos, size, size, 3), np.uint8))
        self._running, self._lock = 0, threading.Lock()

    def encode(self, photos: Sequence[bytes], expires: float) -> tuple[np.ndarray, list[str | None]]:
        """Return the embeddings float32 [m, dim] of the readable photos, and for all n None or why it is not.

        Raises ApiError 503 if it begins after `expires` (Unix time).
        """
        if time.time() > expires:
            raise late()
        with self._session() as embedder:
            return self._encode(photos, embedder)

    def _encode(self, photos: Sequence[bytes], embedder: QueryEmbedder) -> tuple[np.ndarray, list[str | None]]:
        pixels: list[np.ndarray] = []
        reasons: list[str | None] = []
        for photo in photos:
            try:
                pixels.append(embedder.preprocess(decode(photo)))
                reasons.append(None)
            except UnreadableImage as error:
                reasons.append(str(error))
            except Exception:  # its batch holds other people's photos
                log.exception("a photo of %d bytes cannot be decoded", len(photo))
                reasons.append("it cannot be decoded")
        if not pixels:
            return np.empty((0, embedder.dim), np.float32), reasons
        return embedder(np.stack(pixels)), reasons

    @contextmanager
    def _session(self) -> Iterator[QueryEmbedder]:
        with self._lock:
            embedder = self._beside_others if self._running else self._alone
            self._running += 1
        try:
            yield embedder
        finally:
            with self._lock:
                self._running -= 1

    def ready(self, expires: float) -> bool:
        """Answer."""
        return True


class ShardSearch:
    """One shard of the index."""

    def __init__(self, workspace: str, entry: ShardEntry, search: Mapping[str, int], config: ServeConfig) -> None:
        """Load the shard. Raises StorageError naming the file that is not as published."""
        trace_replica(config)
        self._copies = {
            part.version: fetch(workspace, f"{gallery.KIND}/{part.version}", part.files) for part in entry.segments
        }
        folders = {version: copy.folder for version, copy in self._copies.items()}
        self._shard = Shard(folders, entry, search, mapped=config.mapped)

    def search(self, queries: np.ndarray, k: int, where: str | None, expires: float) -> Found:
        """Return the k nearest items of this shard to queries float32 [n, dim], of those that the filter lets pass.

        Raises ApiError 503 if it begins after `expires` (Unix time).
        """
        if time.time() > expires:
            raise late()
        faiss.omp_set_num_threads(1)  # of the calling thread: OpenMP keeps a number for each
        passing = Filter(where) if where else None
        scores, ids = self._shard.search(queries, max(1, min(k, self._shard.count)), passing)
        return Found(scores, ids, self._shard)

    def vector(self, item_id: str, expires: float) -> np.ndarray | None:
        """Return the embedding of an item, float32 [dim], or None if it is not in this shard."""
        return self._shard.vector(item_id)

    def vectors(self, ids: np.ndarray, expires: float) -> tuple[np.ndarray, np.ndarray]:
        """Return which of these ids are in this shard, and their embeddings float32 [m, dim]."""
        held = self._shard.holds(ids)
        return held, self._shard.vectors(ids[held])

    def item(self, item_id: str, expires: float) -> dict[str, Any] | None:
        """Return the display columns of an item, or None if it is not in this shard."""
        items = self._shard.items(np.array(probes(item_id)))
        return next((item for item in items if item.get("item_id") == item_id), None)

    def describe(self, expires: float) -> tuple[pa.Schema, list[Any]]:
        """Return the columns that a filter may name, and what they hold, as `Shard.attributes`."""
        return self._shard.schema, self._shard.attributes()

    def ready(self, expires: float) -> bool:
        """Answer."""
        return True


class ShardApart(ShardSearch):
    """A shard that other processes ask."""

    def search(self, queries: np.ndarray, k: int, where: str | None, expires: float) -> Found:
        """Do as `ShardSearch.search`; what is found brings its rows along."""
        found = super().search(queries, k, where, expires)
        return found._replace(rows=SentRows(self._shard.rows(np.unique(found.ids[found.ids != MISSING]))))


class Beside:
    """Parts in this process; all that a batch asks them is one hop to a thread."""

    def __init__(self, encoder: QueryEncoder, shards: Mapping[str, ShardSearch], threads: int) -> None:
        """`threads`: how many batches are in work at a time, and so how many large pictures are in memory."""
        self.names, self._threads = list(shards), threads
        self._encoder, self._shards = encoder, list(shards.values())
        self._workers = ThreadPoolExecutor(threads + 1, thread_name_prefix="parts")  # one looks items up meanwhile

    @property
    def batches(self) -> int:
        return self._threads

    async def run(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, lambda: _to_the_end(work(*arguments)))

    async def encode(self, photos: Sequence[bytes], expires: float) -> tuple[np.ndarray, list[str | None]]:
        return self._encoder.encode(photos, expires)

    async def ask(self, method: str, *arguments: Any, expires: float) -> list[Any]:
        return [getattr(shard, method)(*arguments, expires=expires) for shard in self._shards]

    async def unready(self, expires: float) -> list[str]:
        return []


class Part:
    """An encoder or a shard as a deployment, in threads of its own: Serve would start and end one for each call."""

    def __init__(self, part: type, threads: int, *arguments: Any) -> None:
        """Make the `part` of these arguments. Raises what it raises."""
        self._part = part(*arguments)
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="part")

    async def ask(self, method: str, *arguments: Any, expires: float) -> Any:
        """Return what the part's method says."""
        asked = partial(getattr(self._part, method), *arguments, expires=expires)
        return await asyncio.get_running_loop().run_in_executor(self._workers, asked)


class Deployed:
    """Parts that are deployments: calls go to any of their replicas, and to another one if that dies."""

    def __init__(
        self,
        encoder: DeploymentHandle,
        shards: Mapping[str, DeploymentHandle],
        batches: int = 1,
        encoders: Callable[[], int] = lambda: 1,
    ) -> None:
        """`batches`: how many an encoder has in work at a time; `encoders` says how many there are."""
        self.names = list(shards)
        self._encoder, self._shards, self._batches, self._encoders = encoder, shards, batches, encoders

    @property
    def batches(self) -> int:
        # As many as the encoders take: more would wait in front of them in small batches, not here in large ones.
        return self._batches * max(1, self._encoders())

    async def run(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        return await work(*arguments)

    async def encode(self, photos: Sequence[bytes], expires: float) -> tuple[np.ndarray, list[str | None]]:
        return await _call(ENCODER, self._encoder, "encode", photos, expires=expires)

    async def ask(self, method: str, *arguments: Any, expires: float) -> list[Any]:
        async def one(name: str, handle: DeploymentHandle) -> Any:
            try:
                return await _call(name, handle, method, *arguments, expires=expires)
            except ApiError as error:
                return error

        return await asyncio.gather(*(one(name, handle) for name, handle in self._shards.items()))

    async def unready(self, expires: float) -> list[str]:
        parts = {ENCODER: self._encoder, **self._shards}
        probes = (_call(name, handle, "ready", expires=expires) for name, handle in parts.items())
        answers = await asyncio.gather(*probes, return_exceptions=True)
        return [name for name, answer in zip(parts, answers, strict=True) if answer is not True]


def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing, and so needs no event loop."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("it waits, in a thread in which nothing would wake it")


async def _call(name: str, handle: DeploymentHandle, method: str, *arguments: Any, expires: float) -> Any:
    """Call a deployment, again where a replica dies. Raises ApiError: every way to be away becomes a 503."""
    for attempt in range(1, ATTEMPTS + 1):
        response = handle.ask.remote(method, *arguments, expires=expires)
        try:
            async with asyncio.timeout(expires - time.time()):
                return await response
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, ApiError) else error) from None
        except BackPressureError:
            raise unavailable(f"{name} has too many requests waiting; try again", code="saturated") from None
        except TimeoutError:
            response.cancel()
            raise unavailable(f"{name} did not answer in time; try again") from None
        except (RayError, RayServeException) as error:
            log.warning("%s, attempt %d: %r", name, attempt, error)
    raise unavailable(f"{name} is not available just now; try again")
