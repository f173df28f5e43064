"""What is known of samples' classes: an item is of its class, a photo has evidence for and against some."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1
_MOST_AGAINST, _MOST_FOR = -5.0, 8.0  # nats that one neighbour's evidence may count before its weight
_SURE = 0.9  # confidence from which photos show how far looking alike means being alike


@dataclass
class Targets:
    """Evidence, in nats, of n samples: ln P(what was observed | the sample is of this class), up to a constant.

    classes: int64 [n, k], PADDING where a sample has fewer. evidence: [n, k]. others: [n], the evidence of every class
    that is not named; -inf where the class is certain. weights: [n], how much each sample counts.
    """

    classes: Tensor
    evidence: Tensor
    others: Tensor
    weights: Tensor

    @classmethod
    def certain(cls, labels: Tensor, weights: Tensor | None = None, width: int = 1) -> Targets:
        """Return the targets of samples that are of their class for sure; `width` is k."""
        classes = F.pad(labels[:, None], (0, width - 1), value=PADDING)
        ones = torch.ones_like(labels, dtype=torch.float32)
        evidence = torch.zeros_like(classes, dtype=torch.float32)
        return cls(classes, evidence, -torch.inf * ones, ones if weights is None else weights)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, rows: Tensor) -> Targets:
        return Targets(self.classes[rows], self.evidence[rows], self.others[rows], self.weights[rows])

    def to(self, device: torch.device) -> Targets:
        """Return the targets on `device`."""
        parts = (self.classes, self.evidence, self.others, self.weights)
        return Targets(*(part.to(device, non_blocking=True) for part in parts))

    def packed(self) -> Tensor:
        """Return all of it as one float32 tensor, [n, 3k + 2], bit by bit; it travels in one piece."""
        ids = self.classes.contiguous().view(torch.float32)
        return torch.cat([ids, self.evidence, self.others[:, None], self.weights[:, None]], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Targets:
        """Return what `packed` packed."""
        width = (packed.shape[1] - 2) // 3
        ids = packed.new_empty(len(packed), 2 * width).copy_(packed[:, : 2 * width])
        return cls(ids.view(torch.int64), packed[:, 2 * width : -2], packed[:, -2], packed[:, -1])

    def confidence(self, total: int) -> Tensor:
        """Return the probability of the likeliest class, if each of `total` classes is as likely before, [n]."""
        named = self.evidence.masked_fill(self.classes == PADDING, -torch.inf)
        unnamed = total - (self.classes != PADDING).sum(dim=1)
        rest = self.others + unnamed.clamp_min(0).log()
        whole = torch.cat([named, rest[:, None]], dim=1).logsumexp(dim=1)
        return (torch.maximum(named.amax(dim=1), self.others.where(unnamed > 0, -torch.inf)) - whole).exp()

    def over(self, owned: range) -> Tensor:
        """Return the evidence of the classes `owned`, [n, len(owned)]."""
        dense = self.others[:, None].repeat(1, len(owned))
        rows, places = ((self.classes >= owned.start) & (self.classes < owned.stop)).nonzero(as_tuple=True)
        dense[rows, self.classes[rows, places] - owned.start] = self.evidence[rows, places]
        return dense


def concatenate(parts: list[Targets]) -> Targets:
    """Join targets of any k into one, padded to the widest."""
    width = max(part.classes.shape[1] for part in parts)
    wide = [width - part.classes.shape[1] for part in parts]
    return Targets(
        torch.cat([F.pad(part.classes, (0, more), value=PADDING) for part, more in zip(parts, wide, strict=True)]),
        torch.cat([F.pad(part.evidence, (0, more)) for part, more in zip(parts, wide, strict=True)]),
        torch.cat([part.others for part in parts]),
        torch.cat([part.weights for part in parts]),
    )


def pool_evidence(
    features: Tensor,
    targets: Targets,
    classes: int,
    neighbours: int,
    strength: float = 3.0,
    temperature: float = 0.125,
    chunk: int = 1024,
) -> Targets:
    """Add to each photo's evidence that of the photos which look like it.

    Wrong clicks are made by chance or by the engine, looks are not: what a few clicks leave open, the clicks on a dozen
    photos of the same thing decide. Each neighbour counts trust * strength * exp((cosine - 1) / temperature); trust is
    the share of neighbours, so weighted, that are of one class where both are sure of theirs.

    Args:
        features: [n, width], of the untrained encoder.
        targets: of n photos; the result keeps their k strongest classes.
        classes: number of all classes.
        neighbours: how many are asked.
        chunk: rows compared at once; memory is chunk x n, time n x n.
    """
    count, width = targets.classes.shape
    neighbours = min(neighbours, count - 1)
    if neighbours < 1:
        return targets
    unit = F.normalize(features - features.mean(dim=0), dim=1)
    found = [_nearest(unit, start, chunk, neighbours) for start in range(0, count, chunk)]
    nearest, index = (torch.cat(parts) for parts in zip(*found, strict=True))
    weight = ((nearest - 1) / temperature).exp()
    weight = strength * _trust(targets, classes, index, weight) * weight
    said = targets.evidence.clamp(_MOST_AGAINST, _MOST_FOR)
    kept, total = [], []
    for start in range(0, count, chunk):
        own = slice(start, start + chunk)
        named = torch.cat([targets.classes[own], targets.classes[index[own]].flatten(1)], dim=1)
        above = targets.evidence[own] - targets.others[own, None]  # over a class that nobody names
        values = torch.cat([above, (weight[own, :, None] * said[index[own]]).flatten(1)], dim=1)
        parts = _strongest(named, values, width)
        kept.append(parts[0])
        total.append(parts[1])
    return Targets(torch.cat(kept), torch.cat(total) + targets.others[:, None], targets.others, targets.weights)


def _nearest(unit: Tensor, start: int, chunk: int, count: int) -> tuple[Tensor, Tensor]:
    """Return cosines and rows of the nearest others of some rows, best first."""
    cosines = unit[start : start + chunk] @ unit.T
    rows = torch.arange(len(cosines))
    cosines[rows, rows + start] = -torch.inf
    best = cosines.topk(count, dim=1)
    return best.values, best.indices


def _trust(targets: Targets, classes: int, index: Tensor, weight: Tensor) -> float:
    """Return how often a neighbour is of the same class, weighted, where both are sure; one that is not is imagined."""
    named = targets.evidence.masked_fill(targets.classes == PADDING, -torch.inf)
    labels = targets.classes.gather(1, named.argmax(dim=1, keepdim=True)).squeeze(1)
    sure = targets.confidence(classes) > _SURE
    counted = weight * (sure[:, None] & sure[index])
    return float((counted * (labels[:, None] == labels[index])).sum() / (counted.sum() + 1))


def from_belief(classes: Tensor, belief: Tensor, rest: float, weights: Tensor, total: int) -> Targets:
    """Return the targets that a belief makes: ln P(class), [n, k], of the likeliest of `total` classes.

    `rest` is ln of what all others are believed together, each as much, however many there are; no class is less.
    """
    least = rest - math.log(max(1, total - classes.shape[1]))
    return Targets(classes, belief.clamp_min(least), torch.full((len(belief),), least), weights)


def _strongest(classes: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Sum the values of equal classes in each row; return `width` classes and their sums: first those of which it is
    positive, then those of which it is not, the greatest magnitude first."""
    classes, order = classes.sort(dim=1, stable=True)
    values = values.gather(1, order)
    begins = F.pad(classes.diff(dim=1) != 0, (1, 0), value=True)
    place = begins.cumsum(dim=1) - 1
    sums = torch.zeros_like(values).scatter_add_(1, place, values)
    names = torch.full_like(classes, PADDING).scatter_(1, place, classes)
    sums[names == PADDING] = 0
    strength = sums.abs()
    strongest = (strength + (sums > 0) * (strength.amax() + 1)).topk(width, dim=1).indices
    return names.gather(1, strongest), sums.gather(1, strongest)
