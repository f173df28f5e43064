"""Which classes a step of the sampled softmax draws beside those that its samples name."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified(population: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` different numbers below `population`, ascending, int64; each with chance count / population.

    One of each of `count` strata, which a random turn moves along: time follows `count`, and nothing is drawn twice.
    """
    edges = torch.arange(count + 1) * population // count
    places = edges[:-1] + (torch.rand(count, generator=generator, dtype=torch.float64) * edges.diff()).long()
    turned = places + torch.randint(population, (1,), generator=generator)
    return torch.cat([turned[turned >= population] - population, turned[turned < population]])


def merged(ascending: Tensor, more: Tensor) -> Tensor:
    """Return the numbers of either, int64, each once and ascending, as both arguments are; in linear time."""
    where = torch.searchsorted(ascending, more)
    new = ascending[where.clamp_max(len(ascending) - 1)] != more
    places = where[new] + torch.arange(int(new.sum()), device=more.device)
    either = ascending.new_empty(len(ascending) + len(places))
    old = torch.ones(len(either), dtype=torch.bool, device=more.device)
    old[places] = False
    either[places], either[old] = more[new], ascending
    return either
