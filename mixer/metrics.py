"""Retrieval metrics over ranked lists. A query counts as found at k if any relevant item is among its first k."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def relevance(ranked: Sequence[Sequence[str]], relevant: Sequence[set[str]]) -> np.ndarray:
    """Return bool [queries, k]: whether the item at each rank is relevant. Short lists are padded with False."""
    width = max((len(items) for items in ranked), default=0)
    hits = np.zeros((len(ranked), width), bool)
    for row, (items, wanted) in enumerate(zip(ranked, relevant, strict=True)):
        hits[row, : len(items)] = [item in wanted for item in items]
    return hits


def hit_at_k(hits: np.ndarray, k: int) -> np.ndarray:
    """Return float [queries]: 1 where any of the first k is relevant (the recall@k of instance retrieval)."""
    return hits[:, :k].any(axis=1).astype(float)


def ndcg_at_k(hits: np.ndarray, relevant: Sequence[set[str]], k: int) -> np.ndarray:
    """Return float [queries]: discounted gain over the best order's, relevance binary (Järvelin & Kekäläinen 2002)."""
    discounts = 1 / np.log2(np.arange(2, k + 2))
    gained = (hits[:, :k] * discounts[: hits.shape[1]]).sum(axis=1)
    ideal = np.array([discounts[: min(len(wanted), k)].sum() for wanted in relevant])
    return np.divide(gained, ideal, out=np.zeros_like(gained), where=ideal > 0)


def macro(values: np.ndarray, relevant: Sequence[set[str]]) -> float:
    """Return the mean over classes of the mean within a class; queries with the same relevant items are a class."""
    classes: dict[frozenset[str], list[float]] = {}
    for value, wanted in zip(values, relevant, strict=True):
        classes.setdefault(frozenset(wanted), []).append(float(value))
    return float(np.mean([np.mean(group) for group in classes.values()])) if classes else 0.0


def recall_of_neighbours(found: np.ndarray, exact: np.ndarray, k: int | None = None) -> float:
    """Return the share of the exact neighbours that an approximate search found, as ids [queries, ...]; below 0: none.

    Of more than `k` exact ones, some of which are as near as others, any k will do.
    """
    shares = []
    for mine, right in zip(found, exact, strict=True):
        right = right[right >= 0]
        wanted = len(right) if k is None else min(k, len(right))
        shares.append(min(len(np.intersect1d(mine, right)), wanted) / wanted if wanted else 1.0)
    return float(np.mean(shares)) if shares else 1.0
