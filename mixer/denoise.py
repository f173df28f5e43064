"""Doubt labels that the picture speaks against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbour_agreement(
    features: Tensor, labels: Tensor, weights: Tensor, neighbours: int, temperature: float = 0.125, chunk: int = 4096
) -> Tensor:
    """Return, for each photo, how little its visual neighbours contradict its label, [n] in 0 to 1.

    Wrong clicks are made by chance or by the engine, looks are not: a label is doubted as far as near photos agree on
    another one. Neighbours that agree on nothing, as those of a class of two photos do, contradict nothing.

    Args:
        features: [n, width], of the untrained encoder.
        labels: int64 [n].
        weights: [n], how much each neighbour's label counts.
        neighbours: how many neighbours are asked; their say falls with exp(cosine / temperature).
        chunk: rows compared at once; memory is chunk x n, time n x n.
    """
    unit = F.normalize(features - features.mean(dim=0), dim=1)
    agreement = []
    for start in range(0, len(unit), chunk):
        cosines = unit[start : start + chunk] @ unit.T
        rows = torch.arange(len(cosines))
        cosines[rows, rows + start] = -torch.inf
        nearest, index = cosines.topk(min(neighbours, len(unit) - 1), dim=1)
        votes = (nearest / temperature).exp() * weights[index]
        votes = votes / votes.sum(dim=1, keepdim=True).clamp_min(1e-12)
        named = labels[index]
        own = named == labels[start : start + chunk, None]
        shares = (votes[:, None, :] * (named[:, None, :] == named[:, :, None])).sum(dim=2)
        strongest_other = shares.masked_fill(own, 0).amax(dim=1) if shares.shape[1] else shares.new_zeros(len(rows))
        agreement.append((1 + (votes * own).sum(dim=1) - strongest_other).clamp(0, 1))
    return torch.cat(agreement) if agreement else torch.zeros(0)
