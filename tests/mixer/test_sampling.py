"""Any number of workers sees the same epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mixer.sampling import learning_rate_factor, plan_epoch


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [0, 1, 23, 32])
def test_any_world_sees_each_sample_once_in_the_same_global_batches(samples: int, world: int) -> None:
    plan = plan_epoch(samples, views=3, epoch=1, seed=5)
    parts = [plan.batches(8, world, rank) for rank in range(world)]
    steps = -(-samples // 8)
    assert [len(part) for part in parts] == [steps] * world  # all take each step, even with nothing to bring
    joined = [np.concatenate([part[step] for part in parts]) for step in range(steps)]
    alone = plan.batches(8, 1, 0)
    assert all(np.array_equal(a, b) for a, b in zip(joined, alone, strict=True))
    assert sorted(np.concatenate([np.zeros(0, int), *joined])) == list(range(samples))
    for step in range(steps):
        sizes = [len(part[step]) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    def drawn(epoch: int, seed: int) -> list[list]:
        plan = plan_epoch(50, 4, epoch, seed, text_dropout=0.5, image_dropout=0.5)
        return [array.tolist() for array in (plan.order, plan.view, plan.drop_text, plan.drop_image)]

    np.random.seed(0)
    first = drawn(2, 7)
    np.random.seed(1)
    assert drawn(2, 7) == first
    for one, other in itertools.combinations((first, drawn(3, 7), drawn(2, 8)), 2):
        assert all(a != b for a, b in zip(one, other, strict=True))


def test_views_are_even_and_what_is_dropped_is_never_both() -> None:
    plan = plan_epoch(20_000, views=4, epoch=0, seed=0, text_dropout=0.3, image_dropout=0.2)
    assert np.bincount(plan.view) == pytest.approx(np.full(4, 5_000), rel=0.05)
    assert not (plan.drop_text & plan.drop_image).any()
    assert plan.drop_text.mean() == pytest.approx(0.3, abs=0.02)
    assert plan.drop_image.mean() == pytest.approx(0.2 * 0.7, abs=0.02)


def test_nothing_is_dropped_unless_asked() -> None:
    plan = plan_epoch(100, views=1, epoch=0, seed=0)
    assert not plan.view.any()
    assert not plan.drop_text.any()
    assert not plan.drop_image.any()


def test_the_learning_rate_rises_and_falls() -> None:
    factors = np.array([learning_rate_factor(step, 100, warmup=0.1) for step in range(101)])
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 10 * 0.5 * (1 + np.cos(np.pi * np.arange(10) / 100)))
    assert factors[10:] == pytest.approx(0.5 * (1 + np.cos(np.pi * np.arange(10, 101) / 100)))
    assert (np.diff(factors[:9]) > 0).all()
    assert (np.diff(factors[10:]) < 0).all()
    assert factors[0] > 0
    assert factors[100] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.5), (0, 0.1)])
def test_the_learning_rate_of_very_short_runs(steps: int, warmup: float) -> None:
    assert learning_rate_factor(0, steps, warmup) == pytest.approx(1.0)
