"""Classes drawn beside those that samples name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mixer.negatives import NearestClasses, merged, stratified
from mixer.softmax import class_range


@pytest.mark.parametrize(("population", "count"), [(10, 1), (10, 3), (10, 7), (10, 10), (1000, 10), (1, 1)])
def test_every_number_has_the_same_chance(population: int, count: int) -> None:
    times, seen = 3000, torch.zeros(population)
    for seed in range(times):
        drawn = stratified(range(population), population, count, seed)
        assert drawn.dtype == torch.int64
        assert len(drawn) == count
        assert (drawn.diff() > 0).all()  # ascending, so none is drawn twice
        seen[drawn] += 1
    chance = count / population
    assert ((seen / times - chance).abs() <= 5 * (chance * (1 - chance) / times) ** 0.5).all()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("population", "count"), [(10, 1), (10, 7), (1000, 10), (1000, 333), (5, 5), (2, 1)])
def test_whoever_draws_with_a_seed_draws_the_same(population: int, count: int, seed: int) -> None:
    alone = stratified(range(population), population, count, seed)
    for world in (2, 3, 7):
        owned = [class_range(population, world, rank) for rank in range(world)]
        assert torch.equal(torch.cat([stratified(part, population, count, seed) for part in owned]), alone)
    assert population < 100 or not torch.equal(alone, stratified(range(population), population, count, seed + 1))


def test_a_worker_of_many_draws_in_no_time_what_others_own() -> None:
    owned = range(10**8, 10**8 + 1000)
    drawn = stratified(owned, 10**9, 10**8, 0)
    assert ((drawn >= owned.start) & (drawn < owned.stop)).all()
    assert 99 <= len(drawn) <= 101


@pytest.mark.parametrize("seed", range(20))
def test_merging_equals_sorting_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randint(30, (size,), generator=generator).unique() for size in (1 + seed, 3 * seed % 11))
    assert torch.equal(merged(one, other), torch.cat([one, other]).unique())


def test_nothing_merges_with_anything() -> None:
    nothing, some = torch.zeros(0, dtype=torch.int64), torch.tensor([2, 5])
    assert torch.equal(merged(nothing, some), some)
    assert torch.equal(merged(some, nothing), some)


@pytest.mark.parametrize(("classes", "dim", "found"), [(300, 64, 1.0), (25_000, 64, 0.7), (25_000, 33, 0.7)])
def test_the_nearest_classes_are_found(classes: int, dim: int, found: float) -> None:
    """They lie in groups, as things that look alike do."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(classes // 20, dim, generator=generator).repeat_interleave(20, 0)
    directions = groups + 0.9 * torch.randn(classes // 20 * 20, dim, generator=generator)
    weight = directions * (0.1 + torch.rand(len(directions), 1, generator=generator))
    queries = F.normalize(weight[:20] + 0.01, dim=1)
    nearest = NearestClasses(3, 10)
    nearest.refresh(0, lambda: weight)
    expected = (queries @ F.normalize(weight, dim=1).T).topk(3).indices.unique()
    near = nearest.near(queries)
    assert (near.diff() > 0).all()
    assert torch.isin(expected, near).float().mean() >= found
    assert len(nearest.near(queries[:0])) == 0


def test_an_index_is_asked_one_period_after_it_was_begun() -> None:
    query, asked, nearest = torch.tensor([[1.0, 0.0]]), [], NearestClasses(1, 4)
    for step in range(13):
        weight = torch.eye(2).roll(step // 4, dims=0)  # class 0 is the nearest, then class 1, then class 0 ..
        nearest.refresh(step, lambda weight=weight: weight)  # type: ignore[misc]
        asked.append(int(nearest.near(query)))
    assert asked == [0] * 4 + [0] * 4 + [1] * 4 + [0]


def test_a_worker_without_classes_has_none_near() -> None:
    nearest = NearestClasses(3, 10)
    nearest.refresh(0, lambda: torch.zeros(0, 4))
    assert len(nearest.near(torch.ones(2, 4))) == 0
