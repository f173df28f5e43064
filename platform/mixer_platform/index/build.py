"""Build an index version of embeddings: choose a kind, train it once, build the shards in parallel, measure them."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray

from mixer.fast_faiss import use_threads
from mixer_platform import versions
from mixer_platform.config import IndexConfig
from mixer_platform.errors import ConfigError, WishError
from mixer_platform.gallery import KIND, SegmentEntry, ShardEntry, merge_top_k
from mixer_platform.index.choose import (
    NEAREST,
    PILOT,
    Measured,
    Neighbours,
    Trial,
    candidates,
    exact_top_k,
    measure,
    pick,
    pilot,
    right_of,
    sweep,
    training_size,
)
from mixer_platform.index.embeddings import Chain, living, sample_of, stream, vectors
from mixer_platform.index.gpu import GPU, gpu_errors, require_gpu
from mixer_platform.index.segments import (
    bytes_per_vector,
    has_lists,
    new_index,
    reason_of,
    trained_template,
    write_segment,
)
from mixer_platform.item_ids import span
from mixer_platform.storage import Storage, open_storage

_MOST_THREADS = 16  # of the one task that trains
_PATIENCE_S = 600  # for a GPU: an autoscaler may have to fetch it
_MOST_TRIED = 3  # kinds of index that are built whole before giving up
_log = logging.getLogger(__name__)


class _Built(NamedTuple):
    entry: SegmentEntry
    trials: list[Trial]
    exact: Neighbours


def build_shards(
    storage: Storage, version: str, chain: Chain, dim: int, queries: np.ndarray, config: IndexConfig
) -> dict[str, Any]:
    """Write all shards of `index/<version>/` and return what its manifest says of them.

    `queries` float32 [n, dim] are what people ask: recall is measured on them against exact search. Raises ConfigError
    for a kind of index that FAISS does not make or a GPU that is not there, WishError if no kind is as good as
    wished; nothing is published then.
    """
    items = living(chain)
    each = -(-items // config.shards)
    started = time.monotonic()
    kinds, why = _kinds(storage, chain, items, each, dim, queries, config)
    chosen_in = time.monotonic() - started
    shared = ray.put(queries)
    best = 0.0
    for factory in kinds[:_MOST_TRIED]:
        gpus = _gpus(factory, dim, config)
        template = _trained(storage, chain, factory, dim, gpus)
        work = (storage.uri, version, chain, template, shared, config.shards, config.recall_at_10)
        build = _task(_build_shard, gpus)
        built = ray.get([build.remote(number, *work) for number in range(config.shards)])
        measured = measure([part.trials for part in built], [part.exact for part in built])
        found = pick(measured, config.recall_at_10, config.latency_ms)
        if found:
            entries = [ShardEntry(name=part.entry.name, count=part.entry.rows, segments=[part.entry]) for part in built]
            content = _content(factory, why, found, entries, items, dim, len(queries))
            return {**content, "seconds_choosing": round(chosen_in, 2)}
        best = max(best, *(min(each.recall, each.recall_held_out) for each in measured))
        _log.info("%s falls short of what is wished: recall@10 is %.4f at most", factory, best)
    raise WishError(_falls_short(best, config))


def _trained(storage: Storage, chain: Chain, factory: str, dim: int, gpus: float) -> ray.ObjectRef:
    try:
        wanted = training_size(factory, dim)
        template = _task(_train, gpus).remote(storage.uri, chain, factory, dim, wanted, _threads(gpus))
        ray.get(template)  # here, to know what FAISS says of it
    except ValueError as error:  # Ray's errors are of the kind that they wrap
        reason = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        if isinstance(reason, pa.ArrowInvalid):
            raise
        raise ConfigError(f"index.factory: {reason}") from error
    return template


def _content(
    factory: str, why: str, found: Measured, entries: list[ShardEntry], items: int, dim: int, queries: int
) -> dict[str, Any]:
    return {
        "dim": dim,
        "metric": "inner_product",
        "factory": factory,
        "why": why,
        "search": found.settings,
        "shards": [entry.model_dump() for entry in entries],
        "items": items,
        "recall_at_10": round(found.recall_held_out, 4),
        "recall_queries": queries,
        "bytes_per_vector": round(bytes_per_vector(new_index(factory, dim)), 1),
        "queries_per_second": round(1 / found.seconds, 1),  # one thread, all shards
        "latency_ms": round(1e3 * found.latency, 3),  # one query in the slowest shard
    }


def _kinds(
    storage: Storage, chain: Chain, items: int, each: int, dim: int, queries: np.ndarray, config: IndexConfig
) -> tuple[list[str], str]:
    """Return the kinds of index to try, in order, and why these."""
    if config.factory != "auto":
        try:
            wanted = items * bytes_per_vector(new_index(config.factory, dim))
        except RuntimeError as error:
            raise ConfigError(f"index.factory: FAISS refuses {config.factory!r}: {reason_of(error)}") from error
        if config.memory is not None and wanted > config.memory:
            raise WishError(
                f"index.factory: {config.factory} of {items} items takes {wanted:.0f} bytes, and index.memory allows "
                f"{config.memory}; allow more or name a smaller kind; nothing was published"
            )
        return [config.factory], "index.factory names it"
    allowed = None if config.memory is None else config.memory / items
    kinds = candidates(each, dim, allowed)
    if not kinds:
        enough = next(2**power for power in range(32) if candidates(each, dim, 2**power))
        raise WishError(
            f"index.memory: no kind of index fits {items} items into {config.memory} bytes; "
            f"allow {math.ceil(items * enough / 1000)}K; nothing was published"
        )
    if len(kinds) == 1:
        return kinds, f"exact search of {each} items a shard is fast enough" if kinds == ["Flat"] else "no other fits"
    sample = sample_of(storage, chain, dim, PILOT)
    exact = exact_top_k(queries, sample, np.arange(len(sample)), NEAREST)
    shared = [ray.put(part) for part in (sample, queries, exact)]
    tried = ray.get([_pilot.remote(kind, *shared, each, config.recall_at_10) for kind in kinds])
    for kind, (short, seconds) in zip(kinds, tried, strict=True):
        _log.info("%-40s %s", kind, f"falls short by {short:.3f}" if short else f"{1e6 * seconds:.0f} us a query")
    order = [kind for _, kind in sorted(zip(tried, kinds, strict=True))]
    return order, f"the fastest of {len(kinds)} kinds on a sample at recall@10 >= {config.recall_at_10}"


def _falls_short(best: float, config: IndexConfig) -> str:
    wish = f"recall@10 is {best:.4f} at most, and index.recall_at_10={config.recall_at_10} is wished"
    if best >= config.recall_at_10:
        wish = f"no search takes less than index.latency_ms={config.latency_ms} at recall@10 >= {config.recall_at_10}"
    return f"index: {wish}; allow more memory or time, name another index.factory, or wish less; nothing was published"


def _threads(gpus: float) -> int:
    """Return how many threads the training may have: CPUs of a node that are idle now, for shards wait for it anyway.

    The task asks Ray for one CPU only: if it asked for a whole node, whoever holds a part of it could make it wait.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max(node.get("CPU", 1) for node in nodes if node.get("GPU") or not gpus)
    return int(max(1, min(most, ray.available_resources().get("CPU", 1), _MOST_THREADS)))


def _gpus(factory: str, dim: int, config: IndexConfig) -> float:
    """Return the share of a GPU for the tasks that build an index: none for one without lists, of which a GPU would
    make nothing. Raises ConfigError if the cluster has none to give."""
    if not config.builder_gpus or not has_lists(factory, dim):
        return 0
    looked = _task(require_gpu, config.builder_gpus).remote()
    try:
        ray.get(looked, timeout=_PATIENCE_S)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(looked)
        raise ConfigError(
            f"index.builder_gpus: the Ray cluster had no GPU to give in {_PATIENCE_S} s; add one, or take 0"
        ) from error
    return config.builder_gpus


def _task(function: Callable[..., Any], gpus: float) -> Any:
    """Return a Ray task of one CPU and a share of a GPU.

    Not by `options`: only of what is given here does Ray know that its process must end with the task. A process keeps
    the GPU that it began with, and memory of it.
    """
    return ray.remote(num_cpus=1, num_gpus=gpus)(function)


@ray.remote(num_cpus=1)
def _pilot(
    kind: str, sample: np.ndarray, queries: np.ndarray, exact: Neighbours, items: int, recall: float
) -> tuple[float, float]:
    use_threads(1)
    return pilot(kind, sample, queries, exact, items, recall)


def _train(uri: str, chain: Chain, factory: str, dim: int, wanted: int, threads: int) -> np.ndarray:
    use_threads(threads)
    with gpu_errors():
        gpu = GPU.of_task()
        return trained_template(factory, dim, sample_of(open_storage(uri), chain, dim, wanted, threads), gpu)


def _build_shard(
    number: int,
    uri: str,
    version: str,
    chain: Chain,
    template: np.ndarray,
    queries: np.ndarray,
    shards: int,
    recall: float,
) -> _Built:
    """Build, write and try one shard; what it found and should have found travels back with its entry."""
    use_threads(1)
    storage, name = open_storage(uri), f"shard-{number:05d}"
    exact: list[Neighbours] = [
        exact_top_k(queries, np.zeros((0, queries.shape[1]), np.float32), np.zeros(0, np.int64), NEAREST)
    ]

    def parts():  # type: ignore[no-untyped-def]
        for rows in stream(storage, chain, span(number, shards)):
            exact.append(exact_top_k(queries, vectors(rows["embedding"]), rows["id"].to_numpy(), NEAREST, gpu))
            yield rows

    with tempfile.TemporaryDirectory() as scratch, gpu_errors():
        gpu = GPU.of_task()
        entry, index = write_segment(Path(scratch), version, name, template, parts(), gpu=gpu)
        versions.upload(storage, Path(scratch), f"{KIND}/{version}")
    best = merge_top_k(exact, NEAREST)
    return _Built(entry, sweep(index, queries, right_of(best), recall), best)
