"""Metrics against loops, and against figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mixer.metrics import hit_at_k, macro, ndcg_at_k, recall_of_neighbours, relevance

Ranked = list[list[str]]
Relevant = list[set[str]]


def random_case(seed: int) -> tuple[Ranked, Relevant]:
    rng = np.random.default_rng(seed)
    items = [f"i{n}" for n in range(15)]
    ranked = [list(rng.permutation(items)[: rng.integers(0, 9)]) for _ in range(40)]
    relevant = [set(rng.choice(items, rng.integers(0, 6), replace=False)) for _ in range(40)]
    return ranked, relevant


def naive_ndcg(items: list[str], wanted: set[str], k: int) -> float:
    gained = sum(1 / math.log2(rank + 1) for rank, item in enumerate(items[:k], start=1) if item in wanted)
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(wanted), k) + 1))
    return gained / best if best else 0.0


@pytest.mark.parametrize("k", [1, 3, 5, 8, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_the_naive_ones(seed: int, k: int) -> None:
    ranked, relevant = random_case(seed)
    hits = relevance(ranked, relevant)
    pairs = list(zip(ranked, relevant, strict=True))
    assert hit_at_k(hits, k).tolist() == [float(bool(wanted & set(items[:k]))) for items, wanted in pairs]
    expected = [naive_ndcg(items, wanted, k) for items, wanted in pairs]
    assert ndcg_at_k(hits, relevant, k) == pytest.approx(expected)
    assert 0 < np.mean(expected) < 1


def test_ndcg_by_hand() -> None:
    relevant = [{"a", "b"}]
    hits = relevance([["x", "a", "y", "b"]], relevant)
    best = 1 + 1 / math.log2(3)
    assert ndcg_at_k(hits, relevant, 4) == pytest.approx([(1 / math.log2(3) + 1 / math.log2(5)) / best])
    assert ndcg_at_k(hits, relevant, 3) == pytest.approx([1 / math.log2(3) / best])
    assert ndcg_at_k(hits, relevant, 1) == pytest.approx([0.0])


def test_short_lists_are_padded_with_misses() -> None:
    assert relevance([["a"], [], ["x", "a"]], [{"a"}] * 3).tolist() == [[1, 0], [0, 0], [0, 1]]


def test_no_queries_and_no_results() -> None:
    assert hit_at_k(relevance([], []), 5).tolist() == []
    assert ndcg_at_k(relevance([[]], [{"a"}]), [{"a"}], 5).tolist() == [0.0]
    assert macro(np.zeros(0), []) == 0.0


def test_lists_of_different_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="argument"):
        relevance([["a"]], [])


def test_macro_gives_every_class_one_vote() -> None:
    relevant = [{"a", "b"}] * 8 + [{"b", "a"}] + [{"c"}]
    values = np.array([1.0] * 9 + [0.0])
    assert values.mean() == pytest.approx(0.9)
    assert macro(values, relevant) == pytest.approx(0.5)
    assert macro(np.array([1.0, 0.5, 0.0]), [{"a"}, {"a"}, {"b"}]) == pytest.approx((0.75 + 0) / 2)


def test_any_of_those_that_are_as_near_will_do() -> None:
    exact = np.array([[4, 5, 6, 7, -1], [1, -1, -1, -1, -1]])
    assert recall_of_neighbours(np.array([[7, 6], [1, -1]]), exact, 2) == 1.0
    assert recall_of_neighbours(np.array([[7, 9], [-1, 2]]), exact, 2) == pytest.approx(0.25)


def test_recall_of_neighbours_counts_each_exact_one() -> None:
    exact = np.array([[1, 2, 3], [4, 5, 6]])
    assert recall_of_neighbours(exact[:, ::-1], exact) == 1.0
    assert recall_of_neighbours(np.array([[1, 9, 3], [-1, -1, -1]]), exact) == pytest.approx(2 / 6)
    assert recall_of_neighbours(np.zeros((0, 3), int), np.zeros((0, 3), int)) == 1.0
    with pytest.raises(ValueError, match="argument"):
        recall_of_neighbours(exact[:1], exact)
