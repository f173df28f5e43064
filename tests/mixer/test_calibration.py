"""Calibration: what was drawn is found again, few pairs make no certainty, and folds do not see themselves."""

from __future__ import annotations

import numpy as np
import pytest

from mixer.calibration import (
    Calibration,
    expected_calibration_error,
    fit_calibration,
    held_out_probabilities,
    reliability,
)


def drawn(rng: np.random.Generator, truth: Calibration, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    scores = rng.uniform(-0.2, 1, pairs)
    return scores, rng.random(pairs) < truth.probability(scores)


def test_what_was_drawn_is_found_again() -> None:
    truth = Calibration(slope=12, intercept=-8)
    found = fit_calibration(*drawn(np.random.default_rng(0), truth, 50_000))
    assert found.slope == pytest.approx(12, rel=0.03)
    assert found.intercept == pytest.approx(-8, rel=0.03)
    np.testing.assert_allclose(found.probability(np.array([8 / 12, 1])), [0.5, 0.982], atol=0.01)


def test_the_fit_is_where_the_gradient_is_nothing() -> None:
    rng = np.random.default_rng(1)
    scores, right = drawn(rng, Calibration(5, -2), 200)
    found = fit_calibration(scores, right)
    targets = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
    wrong = found.probability(scores) - targets
    np.testing.assert_allclose([wrong.sum(), wrong @ scores], 0, atol=1e-6)


def test_separable_scores_make_no_certainty() -> None:
    scores = np.array([0.1, 0.2, 0.8, 0.9])
    found = fit_calibration(scores, scores > 0.5)
    assert np.isfinite([found.slope, found.intercept]).all()
    probabilities = found.probability(scores)
    assert (probabilities[:2] < 0.3).all()
    assert (probabilities[2:] > 0.7).all()
    assert probabilities.max() < 0.9


@pytest.mark.parametrize(
    ("scores", "right", "wanted"),
    [
        ([0.5] * 8, [True] * 2 + [False] * 6, 3 / 10),  # nothing to tell them apart by
        ([0.1, 0.2, 0.8, 0.9], [True, True, False, False], 1 / 2),  # a score that speaks against itself
        ([0.1, 0.5, 0.9], [False] * 3, 1 / 5),
        ([], [], 1 / 2),
    ],
)
def test_a_score_that_says_nothing_is_worth_the_share_of_right_ones(scores: list, right: list, wanted: float) -> None:
    found = fit_calibration(np.array(scores), np.array(right, bool))
    np.testing.assert_allclose(found.probability(np.array([0.1, 0.5, 0.9])), wanted, atol=0.06)


def test_probabilities_rise_with_the_score_and_stay_within_bounds() -> None:
    probabilities = Calibration(1000, -500).probability(np.array([[-1, 0.4], [0.5, 1]], np.float32))
    assert probabilities.shape == (2, 2)
    np.testing.assert_allclose(probabilities, [[0, 0], [0.5, 1]], atol=1e-12)


def test_reliability_by_hand() -> None:
    probabilities, right = np.array([0.05, 0.06, 0.55, 0.95, 1]), np.array([False, True, True, True, True])
    assert reliability(probabilities, right) == [
        (pytest.approx(0.055), 0.5, 2),
        (pytest.approx(0.55), 1, 1),
        (pytest.approx(0.975), 1, 2),
    ]
    assert expected_calibration_error(probabilities, right) == pytest.approx((2 * 0.445 + 0.45 + 2 * 0.025) / 5)
    assert expected_calibration_error(np.zeros(0), np.zeros(0, bool)) == 0


def test_a_photo_is_judged_by_the_others() -> None:
    rng = np.random.default_rng(2)
    scores, right = drawn(rng, Calibration(12, -8), 5000)
    photos = np.array([f"q{n // 10}" for n in range(5000)])
    probabilities = held_out_probabilities(scores, right, photos)
    assert expected_calibration_error(probabilities, right) < 0.02
    mine = photos == "q7"
    changed = right.copy()
    changed[mine] = ~changed[mine]
    np.testing.assert_array_equal(held_out_probabilities(scores, changed, photos)[mine], probabilities[mine])
    assert (held_out_probabilities(scores, changed, photos)[~mine] != probabilities[~mine]).any()


def test_one_photo_alone_is_judged_by_nothing() -> None:
    said = held_out_probabilities(np.array([0.1, 0.9]), np.array([False, True]), np.array(["q", "q"]))
    np.testing.assert_allclose(said, 0.5)
