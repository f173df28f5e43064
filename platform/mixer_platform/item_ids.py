"""Ids of items: 63-bit hashes of item_id. Shards and partitions are ranges of ids, so every row has one order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

_IDS = 2**63
_PROBES = 8

Span = tuple[int, int]  # the first and the last id of a range


def probes(item_id: str) -> list[int]:
    """Return the ids that an item may have, the likeliest first: its hash, and what lies beside it."""
    return [hash_of(item_id) ^ step for step in range(_PROBES)]


def hash_of(text: str) -> int:
    """Return the 63-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def assign_ids(item_ids: Sequence[str], known: Mapping[str, int]) -> np.ndarray:
    """Return an int64 id for each of these distinct items; `known` ones keep theirs, and no id is given twice.

    Raises ValueError if more items share one hash than there are places beside it.
    """
    taken = set(known.values())
    ids = np.zeros(len(item_ids), np.int64)
    for row in sorted(range(len(item_ids)), key=item_ids.__getitem__):
        item_id = item_ids[row]
        if item_id in known:
            ids[row] = known[item_id]
            continue
        free = next((identity for identity in probes(item_id) if identity not in taken), None)
        if free is None:
            raise ValueError(f"item {item_id!r}: {_PROBES} other items have its hash; rename one of them")
        taken.add(free)
        ids[row] = free
    return ids


def span(number: int, parts: int) -> Span:
    """Return the range of ids of part `number` of `parts` equal ones."""
    return -(-number * _IDS // parts), -(-(number + 1) * _IDS // parts) - 1


def part_of(identity: int, parts: int) -> int:
    """Return which of `parts` ranges holds an id."""
    return identity * parts // _IDS


def overlapping(wanted: Span, parts: int) -> range:
    """Return which of `parts` ranges have ids in common with `wanted`, in order."""
    first, last = wanted
    return range(part_of(first, parts), part_of(last, parts) + 1)
