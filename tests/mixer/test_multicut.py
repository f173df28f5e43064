"""Clusters of graphs whose right answer is known, and against trying every partition."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from mixer.multicut import greedy_multicut

Edges = list[tuple[str, str, float]]


def value(clusters: list[list[str]], edges: Edges, default: float) -> float:
    """Return the log-odds of all pairs that are together."""
    odds = {frozenset(edge[:2]): edge[2] for edge in edges}
    pairs = (frozenset(pair) for cluster in clusters for pair in itertools.combinations(cluster, 2))
    return sum(odds.get(pair, 0.0) + default for pair in pairs)


def partitions(nodes: list[str]) -> Iterator[list[list[str]]]:
    if not nodes:
        yield []
        return
    for rest in partitions(nodes[1:]):
        yield [[nodes[0]], *rest]
        for place, cluster in enumerate(rest):
            yield [*rest[:place], [nodes[0], *cluster], *rest[place + 1 :]]


def test_one_strong_edge_does_not_chain_two_things() -> None:
    one, other = ["a", "b", "c"], ["x", "y", "z"]
    edges = [(left, right, 9.0) for group in (one, other) for left, right in itertools.combinations(group, 2)]
    edges.append(("c", "x", 8.0))
    assert greedy_multicut([*one, *other], edges, default=-3.0, largest=9) == [one, other]
    assert greedy_multicut([*one, *other], edges, default=0.0, largest=9) == [[*one, *other]]


def test_evidence_adds_up_over_the_pairs_of_two_clusters() -> None:
    edges = [("a", "b", 9.0), ("x", "y", 9.0), ("a", "x", 1.5), ("b", "x", 1.5), ("a", "y", 1.5), ("b", "y", 1.5)]
    assert greedy_multicut("abxy", edges, default=-1.0, largest=9) == [["a", "b", "x", "y"]]
    assert greedy_multicut("abxy", edges, default=-2.0, largest=9) == [["a", "b"], ["x", "y"]]


def test_no_cluster_grows_beyond_the_largest() -> None:
    nodes = [f"{n:02}" for n in range(10)]
    edges = [(left, right, 1.0) for left, right in itertools.combinations(nodes, 2)]
    for largest in (1, 3, 4, 10):
        clusters = greedy_multicut(nodes, edges, 0.0, largest)
        assert max(map(len, clusters)) <= largest
        assert sorted(node for cluster in clusters for node in cluster) == nodes
    assert len(greedy_multicut(nodes, edges, 0.0, 10)) == 1


def test_nodes_without_edges_stay_alone() -> None:
    assert greedy_multicut(["b", "a"], [], -1.0, 9) == [["a"], ["b"]]
    assert greedy_multicut([], [], -1.0, 9) == []


def test_it_is_close_to_the_best_of_all_partitions() -> None:
    shares = [share_of_the_best(np.random.default_rng(seed)) for seed in range(20)]
    assert min(shares) > 0.7
    assert np.mean(shares) > 0.95


def share_of_the_best(rng: np.random.Generator) -> float:
    """Return what the greedy clusters of a random graph are worth, relative to the best partition."""
    nodes = list("abcdefg")
    truth = rng.integers(0, 3, len(nodes))
    edges = []
    for left, right in itertools.combinations(range(len(nodes)), 2):
        if rng.random() < 0.8:
            odds = rng.normal(3 if truth[left] == truth[right] else -2, 2)
            edges.append((nodes[left], nodes[right], float(odds)))
    found = greedy_multicut(nodes, edges, -0.5, 9)
    best = max(value(clusters, edges, -0.5) for clusters in partitions(nodes))
    return value(found, edges, -0.5) / best


def test_neither_the_order_nor_the_side_of_edges_matters() -> None:
    rng = np.random.default_rng(3)
    nodes = [f"{n:02}" for n in range(30)]
    edges = [(a, b, float(rng.normal(0, 2))) for a, b in itertools.combinations(nodes, 2) if rng.random() < 0.3]
    expected = greedy_multicut(nodes, edges, -0.2, 9)
    for _ in range(3):
        shuffled = [edges[place] for place in rng.permutation(len(edges))]
        turned = [(b, a, odds) if rng.random() < 0.5 else (a, b, odds) for a, b, odds in shuffled]
        assert greedy_multicut(reversed(nodes), turned, -0.2, 9) == expected


def test_no_two_clusters_would_gain_by_joining() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1500):
        nodes, default = [f"{n:02}" for n in range(rng.integers(4, 12))], -float(rng.random())
        edges = [(left, right, float(rng.normal(1, 2))) for left, right in itertools.combinations(nodes, 2)]
        clusters = greedy_multicut(nodes, edges, default, len(nodes))
        for one, other in itertools.combinations(clusters, 2):
            apart = value([one, other], edges, default)
            assert value([one + other], edges, default) - apart < 1e-9
