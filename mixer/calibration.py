"""What a cosine is worth: the probability that a found item is the product that a photo shows. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_STEPS = 100
_SIZES = tuple(0.5**power for power in range(34))  # of a step, until it makes things better
_STILL = 1e-9
_RIDGE = 1e-12  # equal scores have no slope


@dataclass(frozen=True)
class Calibration:
    """P(same product | score) = 1 / (1 + exp(-(slope * score + intercept))); it never falls with the score."""

    slope: float
    intercept: float

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """Return probabilities, float64 of the shape of `scores`."""
        return _sigmoid(self.slope * np.asarray(scores, float) + self.intercept)


def fit_calibration(scores: np.ndarray, right: np.ndarray) -> Calibration:
    """Fit scores [n] to bool [n], whether each is of the same product (Platt 1999, by Newton as in Lin et al. 2007).

    Targets are drawn in from 0 and 1 as if one more of either had been seen, so that few pairs make no certainty.
    """
    found = int(right.sum())
    targets = np.where(right, (found + 1) / (found + 2), 1 / (len(right) - found + 2))
    inputs = np.stack([np.asarray(scores, float), np.ones(len(scores))], axis=1)
    prior = np.log((found + 1) / (len(right) - found + 1))
    weights = np.array([0.0, prior])
    for _ in range(_STEPS):
        probabilities = _sigmoid(inputs @ weights)
        gradient = inputs.T @ (probabilities - targets)
        curvature = inputs.T @ (inputs * (probabilities * (1 - probabilities))[:, np.newaxis])
        step = np.linalg.solve(curvature + _RIDGE * np.eye(2), gradient)
        loss, gain = _loss(inputs @ weights, targets), gradient @ step
        tried = (weights - size * step for size in _SIZES)
        better = (
            each
            for size, each in zip(_SIZES, tried, strict=True)
            if _loss(inputs @ each, targets) <= loss - 1e-4 * size * gain
        )
        before, weights = weights, next(better, weights)
        if np.abs(weights - before).max() < _STILL:
            break
    slope, intercept = weights.tolist()
    return Calibration(slope, intercept) if slope > 0 else Calibration(0.0, float(prior))


def held_out_probabilities(
    scores: np.ndarray, right: np.ndarray, photos: np.ndarray, folds: int = 5, seed: int = 0
) -> np.ndarray:
    """Return the probability [n] that each pair is given by a fit of the other folds; a photo's pairs are in one fold.

    `photos` [n] says whose pair it is.
    """
    names, of = np.unique(photos, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(names))[of] % folds
    probabilities = np.zeros(len(scores))
    for number in np.unique(fold):
        mine = fold == number
        probabilities[mine] = fit_calibration(scores[~mine], right[~mine]).probability(scores[mine])
    return probabilities


def reliability(probabilities: np.ndarray, right: np.ndarray, bins: int = 10) -> list[tuple[float, float, int]]:
    """Return for each bin of equal width that is not empty: mean probability, share that is right, and pairs."""
    number = np.minimum((probabilities * bins).astype(int), bins - 1)
    members = [number == each for each in np.unique(number)]
    return [(float(probabilities[each].mean()), float(right[each].mean()), int(each.sum())) for each in members]


def expected_calibration_error(probabilities: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Return the mean distance of probability and share over `reliability`'s bins, weighted by their pairs."""
    said = reliability(probabilities, right, bins)
    return sum(pairs * abs(mean - share) for mean, share, pairs in said) / max(1, len(right))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))


def _loss(logits: np.ndarray, targets: np.ndarray) -> float:
    return float((np.logaddexp(0, logits) - targets * logits).sum())
