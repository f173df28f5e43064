"""Any number of workers sees the same epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mixer.sampling import class_chances, learning_rate_factor, plan_epoch


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


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_a_class_is_drawn_by_a_power_of_its_size(alpha: float) -> None:
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    chance = class_chances(labels, alpha)
    assert chance is not None
    assert chance.sum() == pytest.approx(1)
    wanted = np.array([900.0, 90, 10]) ** alpha
    assert np.bincount(labels, weights=chance) == pytest.approx(wanted / wanted.sum())
    plans = [plan_epoch(1000, 1, epoch, 0, chance=chance) for epoch in range(30)]
    for plan in plans:
        drawn = np.bincount(plan.order, minlength=1000)
        assert drawn.sum() == 1000
        assert np.abs(drawn - 1000 * chance).max() < 1  # rounded up or down, no more
    drawn = np.bincount(labels[np.concatenate([plan.order for plan in plans])])
    assert drawn / drawn.sum() == pytest.approx(wanted / wanted.sum(), abs=0.01)
    assert len(np.unique(np.concatenate([plan.order for plan in plans]))) > 950  # a head's samples take turns


def test_as_they_come_is_each_sample_once() -> None:
    assert class_chances(np.array([0, 0, 1]), 1.0) is None


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
