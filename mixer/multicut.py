"""Cluster a graph whose edges speak for and against being together; the number of clusters is found, not given."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def greedy_multicut(
    nodes: Iterable[str], edges: Iterable[tuple[str, str, float]], default: float, largest: int
) -> list[list[str]]:
    """Return clusters of the nodes, each sorted, in the order of their first node.

    Greedy additive edge contraction (Keuper et al., "Efficient decomposition of image and mesh graphs by lifted
    multicuts", ICCV 2015): again and again the two clusters are joined whose pairs together gain most, while that is
    more than nothing. One wrong edge cannot chain two things together: the pairs it does not hold speak against it.

    Args:
        edges: (left, right, log-odds that both are the same thing), each pair once.
        default: what every pair adds to its log-odds, and all that a pair without an edge has; at most 0.
        largest: clusters hold at most as many nodes.
    """
    members = {node: [node] for node in sorted(nodes)}
    around: dict[str, dict[str, float]] = {node: {} for node in members}
    for left, right, odds in edges:
        around[left][right] = around[right][left] = odds

    def gain(left: str, right: str) -> float:
        return around[left][right] + default * (len(members[left]) * len(members[right]))

    heap = [(-gain(left, right), left, right) for left in around for right in around[left] if left < right]
    heap = [entry for entry in heap if entry[0] < 0]
    heapq.heapify(heap)
    while heap:
        loss, left, right = heapq.heappop(heap)
        if left not in members or right not in members:
            continue
        if -loss != gain(left, right) or len(members[left]) + len(members[right]) > largest:
            continue  # stale: one of them has grown since, and was pushed again
        if len(around[left]) < len(around[right]):
            left, right = right, left
        members[left] += members.pop(right)
        for other, odds in around.pop(right).items():
            del around[other][right]
            if other != left:
                around[left][other] = around[other][left] = around[left].get(other, 0.0) + odds
        for other in around[left]:
            if (now := gain(left, other)) > 0:
                heapq.heappush(heap, (-now, min(left, other), max(left, other)))
    return sorted(sorted(cluster) for cluster in members.values())
