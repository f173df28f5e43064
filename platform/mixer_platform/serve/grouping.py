"""One result a product: of ranked candidates the best of each group stays. Pure numpy."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

LOOK = "look"  # as an attribute's name would be, what `group_by` says for near-identical listings
_SPARE = 2  # candidates a wanted result that are searched first
_LEAST = 50


def first_of_each(values: Sequence[Any]) -> np.ndarray:
    """Return the places, int64 in rank order, of the first candidate of each value of an attribute.

    A candidate without a value is like no other, so that every one of them stays.
    """
    seen: set[Hashable] = set()
    places = []
    for place, value in enumerate(values):
        key = _key(value)
        if key is None or key not in seen:
            seen.add(key)
            places.append(place)
    return np.array(places, np.int64)


def first_of_each_look(vectors: np.ndarray, least_cosine: float) -> np.ndarray:
    """Return the places, int64 in rank order, of the candidates that look like none that stays before them.

    Greedy in rank order over vectors float32 [n, dim]: a deeper search adds to what stays, and takes nothing away.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    alike = unit @ unit.T >= least_cosine
    hidden = np.zeros(len(vectors), bool)
    places = []
    for place in range(len(vectors)):
        if not hidden[place]:
            places.append(place)
            hidden |= alike[place]
    return np.array(places, np.int64)


def depths(wanted: int, most: int) -> Iterator[int]:
    """Yield how many candidates to search for until `wanted` groups are found: twice as many each time, `most` at most.

    The caller stops once it has enough, or once a search gives back fewer candidates than it asked for.
    """
    depth = min(most, max(_SPARE * wanted, _LEAST))
    while depth < most:
        yield depth
        depth = min(most, 2 * depth)
    yield most


def _key(value: Any) -> Hashable | None:
    """Return what is equal for equal values; lists and structs too, and 1 is not true."""
    return None if value is None else (type(value).__name__, repr(value))
