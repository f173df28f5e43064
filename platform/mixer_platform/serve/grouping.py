"""One result a product: of ranked candidates the best of each group stays. Pure numpy."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

LOOK = "look"  # as an attribute's name would be, what `group_by` says for near-identical listings
_LEAST = 32  # candidates


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


def depths(wanted: int, most: int, spare: int = 2) -> Iterator[int]:
    """Yield how many candidates to search for until `wanted` results are found: twice as many each time, up to `most`.

    The caller stops once it has enough, or once a search gives back fewer candidates than it asked for. `spare` is how
    many candidates a result are searched first; 1 where nothing is grouped. Depths are powers of two, so that pages
    come from the same search, and an index that is not exact neither repeats nor skips an item between them.
    """
    depth = max(_LEAST, 1 << (spare * wanted - 1).bit_length())
    while depth < most:
        yield depth
        depth *= 2
    yield most


def _key(value: Any) -> Hashable | None:
    """Return what is equal for equal values; lists and structs too, and 1 is not true."""
    return None if value is None else (type(value).__name__, repr(value))
