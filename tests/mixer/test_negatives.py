"""Classes drawn beside those that samples name."""

from __future__ import annotations

import pytest
import torch

from mixer.negatives import merged, stratified


@pytest.mark.parametrize(("population", "count"), [(10, 1), (10, 3), (10, 7), (10, 10), (1000, 10), (1, 1)])
def test_every_number_has_the_same_chance(population: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    times, seen = 3000, torch.zeros(population)
    for _ in range(times):
        drawn = stratified(population, count, generator)
        assert drawn.dtype == torch.int64
        assert len(drawn) == count
        assert (drawn.diff() > 0).all()  # ascending, so none is drawn twice
        seen[drawn] += 1
    chance = count / population
    assert ((seen / times - chance).abs() <= 5 * (chance * (1 - chance) / times) ** 0.5).all()


def test_a_seed_draws_the_same() -> None:
    first, again = (stratified(100, 9, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, stratified(100, 9, torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("seed", range(20))
def test_merging_equals_sorting_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randint(30, (size,), generator=generator).unique() for size in (1 + seed, 3 * seed % 11))
    assert torch.equal(merged(one, other), torch.cat([one, other]).unique())
