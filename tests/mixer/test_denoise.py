"""What visual neighbours say of labels, against loops and on labels of which some are wrong."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from torch import Tensor

from mixer.denoise import neighbour_agreement


def naive_agreement(features: Tensor, labels: Tensor, weights: Tensor, neighbours: int, temperature: float) -> Tensor:
    centred = features - features.mean(dim=0)
    out = []
    for a in range(len(centred)):
        cosines = {
            b: float(centred[a] @ centred[b] / (centred[a].norm() * centred[b].norm()))
            for b in range(len(centred))
            if b != a
        }
        nearest = sorted(cosines, key=lambda b: -cosines[b])[:neighbours]
        votes = {b: math.exp(cosines[b] / temperature) * float(weights[b]) for b in nearest}
        shares = collections.Counter()
        for b, vote in votes.items():
            shares[int(labels[b])] += vote / sum(votes.values())
        own = shares.pop(int(labels[a]), 0.0)
        out.append(min(1.0, 1.0 + own - max(shares.values(), default=0.0)))
    return torch.tensor(out)


def random_case(n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, 6, generator=generator) + 4
    return features, torch.randint(0, 4, (n,), generator=generator), torch.rand(n, generator=generator) + 0.1


@pytest.mark.parametrize("neighbours", [1, 7, 39, 100])
@pytest.mark.parametrize("temperature", [0.125, 0.5])
def test_agreement_equals_the_naive_one(neighbours: int, temperature: float) -> None:
    found = neighbour_agreement(*random_case(), neighbours, temperature)
    expected = naive_agreement(*random_case(), neighbours, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 40, 41])
def test_chunking_has_no_effect(chunk: int) -> None:
    expected = neighbour_agreement(*random_case(), 5)
    torch.testing.assert_close(neighbour_agreement(*random_case(), 5, chunk=chunk), expected)


def test_wrong_labels_get_less() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(200) % 5
    features = torch.eye(5)[truth] * 3 + torch.randn(200, 5, generator=generator) * 0.5
    wrong = torch.rand(200, generator=generator) < 0.3
    labels = torch.where(wrong, (truth + 1 + torch.arange(200) % 3) % 5, truth)
    agreement = neighbour_agreement(features, labels, torch.ones(200), 20)
    assert ((agreement >= 0) & (agreement <= 1)).all()
    assert agreement[~wrong].mean() > 2 * agreement[wrong].mean()
    assert agreement[~wrong].quantile(0.1) > agreement[wrong].quantile(0.9)


def test_neighbours_that_agree_on_nothing_contradict_nothing() -> None:
    """A class of two photos, amid photos of four others: as much as one other says, its second photo says too."""
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)) * 1e-3 + torch.eye(6, 4)
    scattered = neighbour_agreement(features, torch.tensor([0, 0, 1, 2, 3, 4]), torch.ones(6), 5, temperature=1e3)
    united = neighbour_agreement(features, torch.tensor([0, 0, 1, 1, 1, 1]), torch.ones(6), 5, temperature=1e3)
    assert scattered[:2] == pytest.approx([1.0, 1.0], abs=1e-2)
    assert united[:2] == pytest.approx([1 + 1 / 5 - 4 / 5] * 2, abs=1e-2)


def test_neighbours_count_by_their_weight() -> None:
    features = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.99, -0.1], [-1.0, 0.0], [-1.0, 0.1]])
    labels = torch.tensor([0, 0, 1, 2, 2])
    light, heavy = (neighbour_agreement(features, labels, torch.tensor([1, w, 1, 1, 1]), 2) for w in (0.01, 10.0))
    assert light[0] < 0.1
    assert heavy[0] == 1.0


@pytest.mark.parametrize("n", [0, 1])
def test_photos_without_neighbours_are_not_doubted(n: int) -> None:
    found = neighbour_agreement(torch.ones(n, 3), torch.zeros(n, dtype=torch.int64), torch.ones(n), 5)
    assert found.tolist() == [1.0] * n


def test_neighbours_without_weight_say_nothing() -> None:
    features, labels, _ = random_case()
    assert (neighbour_agreement(features, labels, torch.zeros(40), 5) == 1).all()
