"""One result a product: by a value, by looks, and how many candidates are enough."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from mixer_platform.serve.grouping import depths, first_of_each, first_of_each_look


def test_the_first_of_each_value_stays_and_nulls_are_like_nothing() -> None:
    assert first_of_each(["a", "b", "a", None, "c", None, "b"]).tolist() == [0, 1, 3, 4, 5]
    assert first_of_each([1, True, 1.0, [1], [1], [2], {"a": 1}, {"a": 1}]).tolist() == [0, 1, 2, 3, 5, 6]
    assert first_of_each([]).tolist() == []


def test_near_identical_listings_are_one_whatever_their_length() -> None:
    rng = np.random.default_rng(0)
    products = np.linalg.qr(rng.standard_normal((8, 8)))[0][:4]
    shown = [0, 1, 0, 2, 1, 0, 3, 3]
    vectors = (products[shown] + rng.standard_normal((8, 8)) * 0.01).astype(np.float32)
    vectors *= rng.uniform(0.5, 2, (8, 1)).astype(np.float32)
    assert first_of_each_look(vectors, 0.95).tolist() == [0, 1, 3, 6]
    assert first_of_each_look(vectors, 1.1).tolist() == list(range(8))
    assert first_of_each_look(vectors[:0], 0.95).tolist() == []
    assert first_of_each_look(np.zeros((2, 8), np.float32), 0.95).tolist() == [0, 1]


def test_what_is_hidden_hides_nothing() -> None:
    """A chain of looks: the third is like the second, but the second is hidden by the first."""
    angles = np.array([0, 0.2, 0.4])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert first_of_each_look(vectors, np.cos(0.25)).tolist() == [0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_a_deeper_search_only_adds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((300, 3)).astype(np.float32)
    whole = first_of_each_look(vectors, 0.9).tolist()
    for depth in (1, 10, 100):
        assert first_of_each_look(vectors[:depth], 0.9).tolist() == [place for place in whole if place < depth]


@pytest.mark.parametrize(
    ("wanted", "most", "searched"),
    [
        (10, 1000, [32, 64, 128, 256, 512, 1000]),
        (17, 100, [64, 100]),
        (400, 1000, [1000]),
        (1000, 1000, [1000]),
        (1, 20, [20]),
    ],
)
def test_searches_are_twice_as_deep_each_time_within_the_bound(wanted: int, most: int, searched: list[int]) -> None:
    assert list(islice(depths(wanted, most), 20)) == searched


def test_pages_come_from_the_same_search() -> None:
    assert [next(depths(offset + 10, 1000, spare=1)) for offset in range(0, 60, 10)] == [32, 32, 32, 64, 64, 64]
