"""Ids are stable, distinct, and their ranges cover everything once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mixer_platform import item_ids
from mixer_platform.item_ids import assign_ids, overlapping, part_of, probes, span


def test_an_id_does_not_depend_on_the_others() -> None:
    alone = assign_ids(["a"], {})[0]
    assert alone == assign_ids(["b", "a"], {})[1] == probes("a")[0]
    assert 0 <= alone < 2**63


def test_items_of_one_hash_part_and_keep_what_they_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_ids, "probes", lambda item_id: [40 ^ step for step in range(8)])
    ids = assign_ids(["b", "a", "c"], {})
    assert ids.tolist() == [41, 40, 42], "the first in order of item_id has its hash"
    assert assign_ids(["A", "c", "b"], {"c": 42, "b": 41}).tolist() == [40, 42, 41]
    with pytest.raises(ValueError, match="item 'i': 8 other items have its hash; rename one of them"):
        assign_ids(list("abcdefghi"), {})


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16, 1000])
def test_ranges_cover_every_id_once(parts: int) -> None:
    spans = [span(number, parts) for number in range(parts)]
    assert (spans[0][0], spans[-1][1]) == (0, 2**63 - 1)
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(spans))
    for number, (first, last) in enumerate(spans):
        assert part_of(first, parts) == part_of(last, parts) == number


def test_overlapping_ranges_are_those_that_share_an_id() -> None:
    rng = np.random.default_rng(0)
    for parts in (1, 3, 8):
        for _ in range(50):
            first, last = sorted(int(each) for each in rng.integers(0, 2**63, 2))
            shared = [n for n in range(parts) if span(n, parts)[0] <= last and span(n, parts)[1] >= first]
            assert list(overlapping((first, last), parts)) == shared
