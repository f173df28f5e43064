"""Which kind of index fulfils a wish, and with which search settings: tried on a sample, judged on every shard."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import faiss
import numpy as np

from mixer.metrics import recall_of_neighbours
from mixer_platform.gallery import MISSING, merge_top_k, search_parameters
from mixer_platform.index.segments import bytes_per_vector, new_index, reason_of, trained_template

K = 10  # recall is measured at
EXACT_UP_TO = 20_000  # items of a shard: exact search takes less than a millisecond
PILOT = 50_000  # vectors on which kinds are compared
_PER_LIST = 64  # training vectors a list
_ONE_BY_ONE = 32  # queries of which the latency is measured
_log = logging.getLogger(__name__)
_REFINED = (1, 2, 4, 8, 16, 32, 64)

Settings = dict[str, int]
Neighbours = tuple[np.ndarray, np.ndarray]  # scores and ids, each [queries, k]


class Trial(NamedTuple):
    """What a search of one shard with some settings found, in seconds a query: of many together, and one by one."""

    settings: Settings
    found: Neighbours
    seconds: float
    latency: float


class Measured(NamedTuple):
    """What settings reach over all shards, searched by one thread: recall of the queries they may be chosen by, and of
    the others."""

    settings: Settings
    recall: float
    recall_held_out: float
    seconds: float
    latency: float


def candidates(items: int, dim: int) -> list[str]:
    """Return the kinds of index, as FAISS factory strings, that are worth trying for a shard of `items` vectors."""
    if items <= EXACT_UP_TO:
        return ["Flat"]
    lists = f"IVF{number_of_lists(items)}"
    kinds = ["Flat", "HNSW32", "HNSW32,SQ8", "HNSW16,SQ8", f"{lists},Flat", f"{lists},SQ8", f"{lists},SQ4"]
    kinds += [f"{lists},{code},Refine({kept})" for code in ("RaBitQ", "RaBitQfs") for kept in ("SQ8", "SQ4")]
    for divisor in (2, 4, 8):
        if dim % divisor == 0 and (dim // divisor) % 2 == 0:
            short = f"PQ{dim // divisor}x4fs"
            kinds += [f"{lists},{short},Refine({kept})" for kept in ("SQfp16", "SQ8", "SQ4")]
    for size in (dim // 4, dim // 8, dim // 16):
        if size and dim % size == 0:
            kinds += [f"OPQ{size}_{dim},{lists},PQ{size}x8", f"OPQ{size}_{dim},{lists},PQ{size}x8,Refine(SQ4)"]
    return kinds


def number_of_lists(items: int) -> int:
    """Return a power of two near 4 √items, as FAISS' guidelines have it."""
    return 2 ** round(math.log2(4 * math.sqrt(max(items, 1))))


def training_size(factory: str, dim: int) -> int:
    """Return how many vectors an index of this kind wants to be trained on. Raises ValueError."""
    try:
        index = new_index(factory, dim)
    except RuntimeError as error:
        raise ValueError(f"FAISS refuses {factory!r}: {reason_of(error)}") from error
    ivf = faiss.try_extract_index_ivf(index)
    return max(_PER_LIST * ivf.nlist if ivf else 0, 0 if index.is_trained else 16_384)


def affordable(kinds: Sequence[str], items: int, dim: int, memory: int | None) -> list[str]:
    """Return the kinds of which `items` vectors fit into `memory` bytes, all if there is no limit."""
    if memory is None:
        return list(kinds)
    return [kind for kind in kinds if items * bytes_per_vector(new_index(kind, dim)) <= memory]


def rank(sample: np.ndarray, queries: np.ndarray, items: int, kinds: Sequence[str], recall: float) -> list[str]:
    """Return the kinds in the order in which a shard of `items` vectors should be tried, the fastest first.

    Each is built of the sample [n, dim] and asked the queries [m, dim]. Time grows from sample to shard as the kind's
    work does: with n for a scan, √n for lists, log n for a graph. Kinds that fall short of the wished recall already on
    the sample come last, the best of them first; the shards decide.
    """
    sample = np.ascontiguousarray(sample[:PILOT])
    growth = max(1.0, items / len(sample))
    numbers = np.arange(len(sample))
    exact = exact_top_k(queries, sample, numbers, K)
    order: list[tuple[float, float, str]] = []
    for kind in kinds:
        small = kind.replace(f"IVF{number_of_lists(items)}", f"IVF{number_of_lists(len(sample))}")
        index = faiss.deserialize_index(
            trained_template(small, sample.shape[1], sample[: training_size(small, sample.shape[1])])
        )
        index.add_with_ids(sample, numbers)
        measured = measure([sweep(index, queries, exact[1], recall)], [exact])
        best = pick(measured, recall)
        work = math.sqrt(growth) if "IVF" in kind else 1 + math.log10(growth) if "HNSW" in kind else growth
        short = 0.0 if best else recall - max(each.recall for each in measured)
        order.append((short, best.seconds * work if best else 0.0, kind))
        _log.info("%-40s %s", kind, f"{1e6 * best.seconds:8.0f} us a query on the sample" if best else "falls short")
    return [kind for *_, kind in sorted(order)]


def sweep(index: faiss.IndexIDMap, queries: np.ndarray, exact: np.ndarray, wished: float) -> list[Trial]:
    """Search one shard with ever more work, until its own recall against `exact` ids [queries, k] is well above the
    wished one or rises no more."""
    enough = wished + (1 - wished) / 2
    trials = []
    for ladder in _ladders(faiss.downcast_index(index.index)):
        before = -1.0
        for settings in ladder:
            trials.append(_try(index, queries, settings))
            recall = recall_of_neighbours(trials[-1].found[1], exact)
            if recall >= enough or recall < before + 1e-3:
                break
            before = recall
    return trials


def measure(shards: Sequence[Sequence[Trial]], exact: Sequence[Neighbours]) -> list[Measured]:
    """Merge what every shard tried, setting by setting: settings that one of them did not come to are left out."""
    truth = merge_top_k(exact, K)[1]
    found = [{tuple(trial.settings.items()): trial for trial in trials} for trials in shards]
    measured = []
    for settings in found[0]:
        trials = [shard[settings] for shard in found if settings in shard]
        if len(trials) == len(found):
            ids = merge_top_k([trial.found for trial in trials], K)[1]
            chosen_by, held_out = (recall_of_neighbours(ids[start::2], truth[start::2]) for start in (0, 1))
            seconds, latency = sum(trial.seconds for trial in trials), max(trial.latency for trial in trials)
            measured.append(Measured(dict(settings), chosen_by, held_out, seconds, latency))
    return measured


def pick(measured: Sequence[Measured], recall: float, latency_ms: float | None = None) -> Measured | None:
    """Return the fastest settings that reach the wished recall, also on the queries they are not chosen by."""
    for each in sorted(measured, key=lambda each: each.seconds):
        fast = latency_ms is None or 1e3 * each.latency <= latency_ms
        if fast and each.recall >= recall and each.recall_held_out >= recall:
            return each
    return None


def exact_top_k(queries: np.ndarray, vectors: np.ndarray, ids: np.ndarray, k: int) -> Neighbours:
    """Return scores and ids, both [queries, min(k, n)], of the greatest inner products, best first."""
    k = min(k, len(vectors))
    if not k:
        return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    scores, rows = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, ids[rows]


def _ladders(index: faiss.Index) -> Iterator[list[Settings]]:
    """Yield lists of settings of an index, each from cheap to dear."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf:
        probes = [{"nprobe": 2**power} for power in range(ivf.nlist.bit_length()) if 2**power <= max(1, ivf.nlist // 2)]
    elif isinstance(index, faiss.IndexHNSW):
        probes = [{"efSearch": 2**power} for power in range(4, 11)]
    else:
        probes = [{}]
    if isinstance(index, faiss.IndexRefine):
        for factor in _REFINED:
            yield [{**each, "k_factor": factor} for each in probes]
    else:
        yield probes


def _try(index: faiss.IndexIDMap, queries: np.ndarray, settings: Settings) -> Trial:
    inner = faiss.downcast_index(index.index)
    parameters = search_parameters(inner, settings)
    started = time.perf_counter()
    scores, rows = inner.search(queries, K, params=parameters)
    seconds = (time.perf_counter() - started) / len(queries)
    alone = []
    for query in queries[:_ONE_BY_ONE]:
        started = time.perf_counter()
        inner.search(query[np.newaxis], K, params=parameters)
        alone.append(time.perf_counter() - started)
    ids = faiss.vector_to_array(index.id_map)
    ids = ids[rows] if len(ids) else rows
    return Trial(settings, (scores, np.where(rows < 0, MISSING, ids)), seconds, statistics.median(alone))
