"""What is known of classes: dense and sparse say the same, and photos that look alike share what is known of each."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixer.targets import PADDING, Targets, concatenate, from_belief, pool_evidence


def random_targets(n: int, width: int = 3, classes: int = 6, seed: int = 0) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    named = torch.rand(n, classes, generator=generator).argsort(dim=1)[:, :width]
    named[torch.rand(n, width, generator=generator) < 0.3] = PADDING
    evidence = torch.randn(n, width, generator=generator) * 3
    return Targets(named, evidence, torch.zeros(n), torch.ones(n))


def as_dicts(targets: Targets) -> list[dict[int, float]]:
    rows = zip(targets.classes.tolist(), targets.evidence.tolist(), strict=True)
    return [{label: value for label, value in zip(*row, strict=True) if label != PADDING} for row in rows]


@pytest.mark.parametrize("owned", [range(6), range(2, 4), range(3, 3)])
def test_over_gives_the_evidence_of_each_class(owned: range) -> None:
    targets = random_targets(20)
    targets.others[:] = torch.arange(20) * 0.1
    dense = targets.over(owned)
    assert dense.shape == (20, len(owned))
    for row, known in enumerate(as_dicts(targets)):
        expected = [known.get(label, row * 0.1) for label in owned]
        assert dense[row].tolist() == pytest.approx(expected)


def test_certain_targets_leave_no_other_class() -> None:
    targets = Targets.certain(torch.tensor([2, 0]), width=3)
    assert targets.over(range(3)).tolist() == [[-math.inf, -math.inf, 0], [0, -math.inf, -math.inf]]
    assert targets.confidence(3).tolist() == [1.0, 1.0]


def test_confidence_is_that_of_the_likeliest_class() -> None:
    targets = random_targets(20)
    expected = targets.over(range(6)).softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(targets.confidence(6), expected)


def test_joined_targets_stay_what_they_are() -> None:
    parts = [random_targets(4, width=3), Targets.certain(torch.tensor([5, 1])), random_targets(2, width=1, seed=1)]
    joined = concatenate(parts)
    assert joined.classes.shape == (8, 3)
    expected = torch.cat([part.over(range(6)) for part in parts])
    torch.testing.assert_close(joined.over(range(6)), expected)
    rows = torch.tensor([5, 0])
    torch.testing.assert_close(joined[rows].over(range(6)), expected[rows])


@pytest.mark.parametrize("total", [5, 10_000_000])
def test_a_belief_in_a_class_is_the_same_however_many_others_there_are(total: int) -> None:
    classes, belief = torch.tensor([[4, 0]]), torch.tensor([[-0.01, -40.0]])
    targets = from_belief(classes, belief, -6.0, torch.ones(1), total)
    least = -6 - math.log(total - 2)
    assert targets.over(range(5))[0].tolist() == pytest.approx([least, least, least, least, -0.01])
    assert float(targets.confidence(total)) == pytest.approx(0.99, abs=0.01)


def naive_pooled(features: Tensor, targets: Targets, neighbours: int, strength: float) -> list[list[float]]:
    """Return the evidence of each of six classes."""
    unit = F.normalize(features - features.mean(dim=0), dim=1)
    known, dense, rows = as_dicts(targets), targets.over(range(6)), range(len(targets))
    sure = dense.softmax(dim=1).amax(dim=1) > 0.9
    best = [max(values, key=lambda label: values[label], default=-1) for values in known]
    weights = []
    for a in rows:
        cosines = {b: float(unit[a] @ unit[b]) for b in rows if b != a}
        nearest = sorted(cosines, key=lambda b: -cosines[b])[:neighbours]
        weights.append({b: math.exp((cosines[b] - 1) / 0.125) for b in nearest})
    pairs = [(a, b, weight) for a in rows for b, weight in weights[a].items() if sure[a] and sure[b]]
    trust = sum(w for a, b, w in pairs if best[a] == best[b]) / (1 + sum(w for _, _, w in pairs))
    pooled = [values[:] for values in dense.tolist()]
    for a in rows:
        for b, weight in weights[a].items():
            for label, value in known[b].items():
                pooled[a][label] += trust * strength * weight * min(max(value, -5), 8)
    return pooled


@pytest.mark.parametrize("neighbours", [1, 7, 39, 100])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_pooled_evidence_equals_the_naive_one(neighbours: int, chunk: int) -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 4
    targets = random_targets(40, width=6)
    targets.evidence *= 2
    targets.others -= 1.5
    found = pool_evidence(features, targets, 6, neighbours, strength=30.0, chunk=chunk)
    expected = torch.tensor(naive_pooled(features, targets, neighbours, 30.0))
    torch.testing.assert_close(found.over(range(6)), expected, rtol=1e-3, atol=1e-3)
    if neighbours > 1:
        assert (found.over(range(6)) - targets.over(range(6))).abs().max() > 0.1, "nothing was shared"


def test_only_the_strongest_are_kept() -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    wide = random_targets(40, width=6)
    wide.classes[:, 3:] = PADDING  # room for what neighbours name
    narrow = Targets(wide.classes[:, :3], wide.evidence[:, :3], wide.others, wide.weights)
    every, few = (as_dicts(pool_evidence(features, targets, 6, 5, strength=30.0)) for targets in (wide, narrow))
    assert max(map(len, every)) > 3
    for kept, known in zip(few, every, strict=True):
        strongest = sorted(known, key=lambda label: (known[label] <= 0, -abs(known[label])))[:3]
        assert set(kept) == set(strongest)


def test_photos_that_look_alike_and_are_not_are_not_trusted() -> None:
    features = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    targets = Targets(torch.arange(60)[:, None], torch.full((60, 1), 9.0), torch.zeros(60), torch.ones(60))
    wide = concatenate([targets, Targets.certain(torch.tensor([0]), width=9)])[torch.arange(60)]
    before, after = (known.over(range(60)) for known in (wide, pool_evidence(features, wide, 60, 5)))
    torch.testing.assert_close(after, before)


def test_many_weak_clicks_on_one_thing_decide_together() -> None:
    """Photos of five things; each has faint evidence, in a third of the cases for a wrong thing."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(300) % 5
    features = torch.eye(5)[truth] * 3 + torch.randn(300, 5, generator=generator) * 0.4
    wrong = torch.rand(300, generator=generator) < 0.33
    seen = torch.where(wrong, (truth + 1 + torch.arange(300) % 3) % 5, truth)
    evidence = torch.where(torch.arange(300) % 4 == 0, 6.0, 1.5)  # some have many clicks, and then not wrong ones
    seen = torch.where(evidence > 2, truth, seen)
    targets = Targets(seen[:, None], evidence[:, None], torch.zeros(300), torch.ones(300))
    wide = concatenate([targets, Targets.certain(torch.tensor([0]), width=5)])[torch.arange(300)]
    pooled = pool_evidence(features, wide, 5, 20)
    right = pooled.over(range(5)).argmax(dim=1) == truth
    assert right.float().mean() > 0.98 > 0.8 > (seen == truth).float().mean()


@pytest.mark.parametrize("n", [0, 1])
def test_photos_without_neighbours_keep_what_they_have(n: int) -> None:
    found = pool_evidence(torch.ones(n, 3), random_targets(n), 6, 5)
    assert as_dicts(found) == as_dicts(random_targets(n))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_is_packed_comes_out_bit_by_bit(count: int) -> None:
    classes = torch.tensor([[PADDING, 2**40 + 1, 2**52]]).repeat(count, 1)
    targets = Targets(classes, torch.randn(count, 3), torch.full((count,), -torch.inf), torch.rand(count))
    found = Targets.unpacked(targets.packed())
    for name in ("classes", "evidence", "others", "weights"):
        assert torch.equal(getattr(found, name), getattr(targets, name))
