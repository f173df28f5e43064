"""Which kind of index fulfils a wish, and with which search settings: tried on a sample, judged on every shard."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mixer.fast_faiss import faiss
from mixer.metrics import recall_of_neighbours
from mixer_platform.gallery import MISSING, merge_top_k
from mixer_platform.index.gpu import GPU
from mixer_platform.index.segments import bytes_per_vector, new_index, reason_of, trained_template
from mixer_platform.segment import search_parameters

K = 10  # recall is measured at
NEAREST = 100  # that are known exactly: those that are as near as the K-th count as it
_AS_NEAR = 1e-6  # of a cosine
EXACT_UP_TO = 20_000  # items of a shard: exact search takes less than a millisecond
PILOT = 50_000  # vectors on which kinds are compared
_PER_LIST = 64  # training vectors a list
_ONE_BY_ONE = 32  # queries of which the latency is measured
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


def candidates(items: int, dim: int, each_may_take: float | None = None) -> list[str]:
    """Return the kinds of index, as FAISS factory strings, that are worth trying for a shard of `items` vectors.

    Only those of which a vector takes no more than so many bytes. Kinds without vectors to re-rank by, which lose
    recall and are slow to train, are tried only if no other kind is small enough.
    """
    if items <= EXACT_UP_TO:
        return _affordable(["Flat"], dim, each_may_take) or _affordable(["SQ8", "SQ4"], dim, each_may_take)
    lists = f"IVF{number_of_lists(items)}"
    kinds = ["HNSW32", "HNSW32,SQ8", "HNSW16,SQ8", f"{lists},Flat", f"{lists},SQ8", f"{lists},SQ4"]
    codes = [f"PQ{dim // divisor}x4fs" for divisor in (2, 4) if dim % divisor == 0 and (dim // divisor) % 2 == 0]
    kinds += [f"{lists},{code},Refine({kept})" for code in ("RaBitQ", *codes) for kept in ("SQ8", "SQ4")]
    short = [f"OPQ{size},{lists},PQ{size}x8" for size in (dim // 4, dim // 8, dim // 16) if size and dim % size == 0]
    return _affordable(kinds, dim, each_may_take) or _affordable(short, dim, each_may_take)


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
    return max(_PER_LIST * ivf.nlist if ivf else 0, 64 if index.is_trained else 16_384)


def pilot(
    kind: str, sample: np.ndarray, queries: np.ndarray, exact: Neighbours, items: int, recall: float
) -> tuple[float, float]:
    """Build a kind of the sample [n, dim] and ask the queries, whose `exact` neighbours there are known.

    Returns by how much its recall falls short of the wished one, 0 if it does not, and the seconds a query that it
    would take of `items` vectors: time grows as the kind's work does, with n for a scan, with √n for lists, with log n
    for a graph.
    """
    growth = max(1.0, items / len(sample))
    small = kind.replace(f"IVF{number_of_lists(items)}", f"IVF{number_of_lists(len(sample))}")
    wanted = training_size(small, sample.shape[1])
    index = faiss.deserialize_index(trained_template(small, sample.shape[1], sample[:wanted]))
    index.add_with_ids(sample, np.arange(len(sample)))
    measured = measure([sweep(index, queries, right_of(exact), recall)], [exact])
    best = pick(measured, recall)
    work = math.sqrt(growth) if "IVF" in kind else 1 + math.log10(growth) if "HNSW" in kind else growth
    return (0.0, best.seconds * work) if best else (recall - max(each.recall for each in measured), 0.0)


def sweep(index: faiss.IndexIDMap, queries: np.ndarray, exact: np.ndarray, wished: float) -> list[Trial]:
    """Search one shard with ever more work, until its own recall against `exact` ids, `right_of` them, is well above
    the wished one or rises no more; and once between the two steps of which only the second reaches the wished one."""
    enough = wished + (1 - wished) / 2
    trials = []
    for ladder in _ladders(faiss.downcast_index(index.index)):
        before, reached = -1.0, 0
        for step, settings in enumerate(ladder):
            trials.append(_try(index, queries, settings))
            recall = recall_of_neighbours(trials[-1].found[1], exact, K)
            if before < wished <= recall:
                reached = step
            if recall >= enough or recall < before + 1e-3:
                break
            before = recall
        below, above = ladder[max(reached - 1, 0)], ladder[reached]
        between = {name: (below[name] + above[name]) // 2 for name in above}
        if between != below:
            trials.append(_try(index, queries, between))
    return trials


def measure(shards: Sequence[Sequence[Trial]], exact: Sequence[Neighbours]) -> list[Measured]:
    """Merge what every shard tried, setting by setting: settings that one of them did not come to are left out."""
    truth = right_of(merge_top_k(exact, NEAREST))
    holding = [trials for trials, (scores, _) in zip(shards, exact, strict=True) if scores.shape[1]]
    # A shard without items is done with the cheapest settings.
    found = [{tuple(trial.settings.items()): trial for trial in trials} for trials in holding or shards]
    measured = []
    for settings in found[0]:
        trials = [shard[settings] for shard in found if settings in shard]
        if len(trials) == len(found):
            ids = merge_top_k([trial.found for trial in trials], K)[1]
            chosen_by, held_out = (recall_of_neighbours(ids[start::2], truth[start::2], K) for start in (0, 1))
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


def exact_top_k(
    queries: np.ndarray, vectors: np.ndarray, ids: np.ndarray, k: int, gpu: GPU | None = None
) -> Neighbours:
    """Return scores and ids, both [queries, min(k, n)], of the greatest inner products, best first."""
    k = min(k, len(vectors))
    if not k:
        return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    knn = gpu.knn if gpu else partial(faiss.knn, metric=faiss.METRIC_INNER_PRODUCT)
    scores, rows = knn(queries, vectors, k)
    return scores, ids[rows]


def right_of(exact: Neighbours) -> np.ndarray:
    """Return the ids, [queries, n], of the K nearest and of what is as near as the last of them: listings that show the
    same picture and say the same are all alike, and a search finds any of them. MISSING in the place of the others, and
    of all where more are alike than are known: then nothing can be told."""
    scores, ids = exact
    right = scores >= scores[:, :K][:, -1:] - _AS_NEAR
    told = right.sum(axis=1, keepdims=True) < NEAREST
    return np.where(right & told, ids, MISSING)


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


def _affordable(kinds: Sequence[str], dim: int, each_may_take: float | None) -> list[str]:
    if each_may_take is None:
        return list(kinds)
    return [kind for kind in kinds if bytes_per_vector(new_index(kind, dim)) <= each_may_take]
