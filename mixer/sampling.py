"""What an epoch is made of. Drawn from the seed and the epoch alone, so any number of workers sees the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixer.softmax import class_range


@dataclass(frozen=True)
class EpochPlan:
    """One pass over n samples.

    order: [n], each sample once, or as often as its class deserves. view: which augmented view of each sample, [n].
    drop_text, drop_image: bool [n], what is hidden from the model where the sample is an item (never both).
    """

    order: np.ndarray
    view: np.ndarray
    drop_text: np.ndarray
    drop_image: np.ndarray

    def batches(self, size: int, world: int, rank: int) -> list[np.ndarray]:
        """Return one rank's part of each global batch of `size` samples; parts differ by at most one, some empty."""
        parts = []
        for start in range(0, len(self.order), size):
            batch = self.order[start : start + size]
            share = class_range(len(batch), world, rank)
            parts.append(batch[share.start : share.stop])
        return parts


def plan_epoch(
    samples: int,
    views: int,
    epoch: int,
    seed: int,
    text_dropout: float = 0.0,
    image_dropout: float = 0.0,
    chance: np.ndarray | None = None,
) -> EpochPlan:
    """Draw the plan of one epoch, with each sample once, or n * `chance` [n] times, rounded up or down at random."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(samples)
    if chance is not None:
        # Systematic: draws are evenly spaced on the sum of chances, so no sample's number varies by more than one.
        places = (rng.random() + np.arange(samples)) / samples
        order = rng.permutation(order[np.searchsorted(chance[order].cumsum(), places).clip(max=samples - 1)])
    view = rng.integers(views, size=samples)
    drop_text = rng.random(samples) < text_dropout
    drop_image = (rng.random(samples) < image_dropout) & ~drop_text
    return EpochPlan(order, view, drop_text, drop_image)


def class_chances(labels: np.ndarray, alpha: float) -> np.ndarray | None:
    """Return the chance of each sample, [n], if a class of m samples is drawn with p ~ m^alpha; None: as they come.

    1 is the logs' own skew, 0 every class alike, 0.5 between (Mahajan et al., ECCV 2018, arXiv 1805.00932).
    """
    if alpha == 1:
        return None
    sizes = np.bincount(labels)[labels].astype(float)
    return sizes ** (alpha - 1) / (sizes ** (alpha - 1)).sum()


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Return what learning rates are multiplied by at `step` of `steps`: a linear rise, then a cosine to zero."""
    rising = min(1.0, (step + 1) / max(1.0, warmup * steps))
    return rising * 0.5 * (1 + float(np.cos(np.pi * step / max(1, steps))))
