"""Which classes a step of the sampled softmax draws beside those that its samples name."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_FLAT = 20_000  # classes that are searched one by one
_PER_LIST, _ITERATIONS, _PROBED = 64, 10, 64  # classes that a list is clustered from, how often, lists of a search
_AT_ONCE = 4  # numbers that Philox makes before its counter goes on


def stratified(owned: range, population: int, count: int, seed: int) -> Tensor:
    """Draw `count` different numbers below `population`, each with chance count / population; return those that are
    `owned`, ascending, int64.

    One of each of `count` strata, which a random turn moves along: nothing is drawn twice, and time follows what is
    returned. Whoever draws with a seed draws the same, whatever part of it is theirs.
    """
    turn = int(np.random.default_rng(seed).integers(population))
    first, last = owned.start - turn, owned.stop - turn
    pieces = [(max(first, 0), last), (first + population, min(last, 0) + population)]  # the turn may cut them in two
    drawn = [_drawn(start, stop, population, count, seed) for start, stop in reversed(pieces) if start < stop]
    turned = np.concatenate([np.zeros(0, np.int64), *drawn]) + turn
    return torch.from_numpy(turned % population)


def _drawn(start: int, stop: int, population: int, count: int, seed: int) -> np.ndarray:
    """Return what is drawn from `start` on and below `stop`, of one number of each stratum."""
    first, last = ((place + 1) * count - 1 for place in (start, stop - 1))
    first, last = first // population, last // population + 1  # strata
    edges = np.arange(first, last + 1) * population // count
    bits = np.random.Philox(seed)
    bits.advance(first // _AT_ONCE)
    chances = np.random.Generator(bits).random(last - first + first % _AT_ONCE)[first % _AT_ONCE :]
    places = edges[:-1] + (chances * np.diff(edges)).astype(np.int64)
    return places[(places >= start) & (places < stop)]


def merged(ascending: Tensor, more: Tensor) -> Tensor:
    """Return the numbers of either, int64, each once and ascending, as both arguments are; in linear time."""
    if not len(ascending):
        return more
    where = torch.searchsorted(ascending, more)
    new = ascending[where.clamp_max(len(ascending) - 1)] != more
    places = where[new] + torch.arange(int(new.sum()), device=more.device)
    either = ascending.new_empty(len(ascending) + len(places))
    old = torch.ones(len(either), dtype=torch.bool, device=more.device)
    old[places] = False
    either[places], either[old] = more[new], ascending
    return either


class NearestClasses:
    """Finds the classes of one worker that samples are most easily taken for.

    The index of the classes' weights is built beside the training: the one that was begun at a step is asked from
    `every` steps later on, whenever it was ready, so a run can be repeated.
    """

    def __init__(self, count: int, every: int) -> None:
        self.count, self.every = count, every
        import mixer.fast_faiss  # noqa: F401 - before other threads are at work: it sets a variable

        self._pool = ThreadPoolExecutor(1)
        self._index: Any = None
        self._next: Future | None = None

    def refresh(self, step: int, weight: Callable[[], Tensor]) -> None:
        """At every so many steps begin an index of `weight`, [owned, dim], which is only asked for then."""
        if self._index is None:
            self._index = class_index(_directions(weight()))
        elif step % self.every == 0:
            if self._next is not None:
                self._index = self._next.result()
            self._next = self._pool.submit(class_index, _directions(weight()))

    def near(self, embeddings: Tensor) -> Tensor:
        """Return the `count` classes nearest to each of the embeddings [n, dim], int64, each once and ascending."""
        if not len(embeddings) or not self._index.ntotal:
            return torch.zeros(0, dtype=torch.int64, device=embeddings.device)
        queries = embeddings.detach().float().cpu().contiguous().numpy()
        _, found = self._index.search(queries, min(self.count, self._index.ntotal))
        classes = torch.from_numpy(found).flatten().unique()
        return classes[classes >= 0].to(embeddings.device)


def _directions(weight: Tensor) -> np.ndarray:
    return F.normalize(weight.float(), dim=1).cpu().contiguous().numpy()


def class_index(directions: np.ndarray) -> Any:
    """Return a FAISS index of the directions of classes, float32 [classes, dim]; from 20,000 on an approximate one.

    A search then looks at 4-bit codes of the square root of the classes times 64, and what is built of n classes takes
    n to the 1.5: what is found need not be the very nearest, and a step must not wait for it.
    """
    from mixer.fast_faiss import faiss  # here: only who asks for neighbours needs it

    count, dim = directions.shape
    if count < _FLAT:
        index = faiss.IndexFlatIP(dim)
    else:
        lists, codes = math.isqrt(count), f"PQ{dim // 2}x4fs" if dim % 2 == 0 else "SQ8"
        index = faiss.index_factory(dim, f"IVF{lists},{codes}", faiss.METRIC_INNER_PRODUCT)
        index.cp.niter = _ITERATIONS
        index.train(directions[:: max(1, count // (_PER_LIST * lists))])
        index.nprobe = min(lists, _PROBED)
    index.add(directions)
    return index
