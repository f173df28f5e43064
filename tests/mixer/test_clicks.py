"""Clicks simulated from known truths; fast table code against loops that anyone can read."""

from __future__ import annotations

import collections
import math

import numpy as np
import pyarrow as pa
import pytest

from mixer.clicks import COUNTS, Behaviour, ClickModel, _some_photos, clicks_and_views, evidence, fit_click_model

EXAMINATION = 0.75 ** np.arange(8)
WANTED = Behaviour(rate=0.4, dwell_mean=9.2, dwell_deviation=0.8, bought=0.25)
UNWANTED = Behaviour(rate=0.05, dwell_mean=8.1, dwell_deviation=0.7, bought=0.03)


def counts_of(rows: list[tuple]) -> pa.Table:
    """Return COUNTS from rows of its columns; the last ones may be left out."""
    width = len(COUNTS)
    whole = [(*row, *(0,) * (width - len(row))) for row in rows]
    return pa.table(dict(zip(COUNTS.names, zip(*whole, strict=True), strict=True)), schema=COUNTS)


def simulated(attractive: np.ndarray, views: int, seed: int = 0) -> pa.Table:
    """Simulate an engine that shows attractive items on top most of the time, and shoppers of the position model."""
    rng = np.random.default_rng(seed)
    rows: list[tuple] = []
    for query, chances in enumerate(attractive):
        shown: collections.Counter = collections.Counter()
        clicked: collections.Counter = collections.Counter()
        for _ in range(views):
            page = np.argsort(-chances + rng.normal(0, 0.25, len(chances)))[: len(EXAMINATION)]
            clicks = rng.random(len(page)) < EXAMINATION[: len(page)] * chances[page]
            for position, item in enumerate(page):
                shown[item, position] += 1
                clicked[item, position] += int(clicks[position])
        rows += [(f"q{query}", f"i{item}", at, n, clicked[item, at]) for (item, at), n in sorted(shown.items())]
    return counts_of(rows)


def drawn_counts(count: int, share: float, seed: int = 0, dwell: bool = True, bought: bool = True) -> tuple:
    """Return counts of pairs at the first position drawn from WANTED and UNWANTED, and which pairs are wanted."""
    rng = np.random.default_rng(seed)
    wanted, rows = rng.random(count) < share, []
    for pair, is_wanted in enumerate(wanted):
        behaviour = WANTED if is_wanted else UNWANTED
        views = int(rng.integers(1, 30))
        clicks = rng.binomial(views, behaviour.rate)
        times = rng.normal(behaviour.dwell_mean, behaviour.dwell_deviation, clicks if dwell else 0)
        purchases = rng.binomial(clicks, behaviour.bought) if bought else 0
        rows.append(
            (f"q{pair:05}", "i", 0, views, clicks, 0, purchases, len(times), float(times.sum()), float(times @ times))
        )
    return counts_of(rows), wanted


def test_em_recovers_the_examination_curve_where_click_rates_do_not() -> None:
    rng = np.random.default_rng(0)
    counts = simulated(rng.choice([0.05, 0.6], (30, 20), p=[0.8, 0.2]), views=400)
    clicks, views = clicks_and_views(counts)
    at = counts["position"].to_numpy()
    rates = np.bincount(at, clicks) / np.bincount(at, views)
    found = fit_click_model(counts).examined
    assert np.abs(found - EXAMINATION).max() < 0.06
    assert np.abs(rates / rates[0] - EXAMINATION).max() > 0.15, "the simulation has no position bias to recover"


def test_a_few_pages_a_photo_are_enough_to_tell_looking_from_the_engines_order() -> None:
    """An engine that shows the same page each time, the wanted item most often on top, and shoppers who say no more
    than clicks."""
    rng = np.random.default_rng(0)
    rows, wanted = [], []
    for query in range(4000):
        right = min(rng.geometric(0.5) - 1, 7)
        views = int(rng.integers(1, 8))
        for place in range(8):
            chance = EXAMINATION[place] * (0.6 if place == right else 0.1)
            rows.append((f"q{query:04}", f"i{place}", place, views, int(rng.binomial(views, chance))))
            wanted.append(place == right)
    counts, truth = counts_of(rows), np.reshape(wanted, (-1, 8))
    model = fit_click_model(counts)
    assert np.abs(model.examined - EXAMINATION).max() < 0.1
    assert (model.wanted.rate, model.unwanted.rate) == pytest.approx((0.6, 0.1), rel=0.1)
    placed = np.log(truth.mean(0) / truth.sum()) - np.log((~truth).mean(0) / (~truth).sum())
    np.testing.assert_allclose(model.standing[:4], placed[:4], atol=0.3)
    pairs = evidence(counts, model)
    clicks = np.reshape(pairs["evidence"], (-1, 8))
    both = clicks + np.reshape(pairs["standing"], (-1, 8))
    right, by_clicks = ((each.argmax(1) == truth.argmax(1)).mean() for each in (both, clicks))
    assert right > by_clicks + 0.02
    found = 1 / (1 + np.exp(-(both + np.log(model.share / (1 - model.share)))))
    assert found.sum(1).mean() == pytest.approx(1.0, abs=0.15), "one of a page's items is wanted"


def naive_em(rows: list[tuple], rounds: int) -> tuple[float, float, list[float], list[float], float]:
    """Return the rates of wanted and unwanted items, examined, standing and share; no dwell, no purchases."""
    positions = 1 + max(row[2] for row in rows)
    pairs = sorted({row[:2] for row in rows})
    seen = {pair: sum(max(row[3:]) for row in rows if row[:2] == pair) for pair in pairs}
    mean = {pair: sum(row[2] * max(row[3:]) for row in rows if row[:2] == pair) / seen[pair] for pair in pairs}
    place = {pair: math.floor(value + 0.5) for pair, value in mean.items()}
    shown = [sum(max(row[3:]) for row in rows if row[2] == at) for at in range(positions)]
    guess = examined = [max((1 + at) ** -0.5, 0.1) for at in range(positions)]
    clicked = sum(row[4] for row in rows)
    looked = sum(row[4] + (max(row[3:]) - row[4]) * examined[row[2]] for row in rows)
    rate = (clicked + 1) / (looked + 20)
    yes, no, share, standing = min(4 * rate, 0.95), rate / 2, 0.05, [0.0] * positions
    for _ in range(rounds):
        odds = {pair: standing[place[pair]] + math.log(share / (1 - share)) for pair in pairs}
        for query, item, at, impressions, clicks in rows:
            missed = max(impressions, clicks) - clicks
            for each, sign in ((yes, 1), (no, -1)):
                odds[query, item] += sign * (clicks * math.log(each) + missed * math.log(1 - examined[at] * each))
        wanted = {pair: 1 / (1 + math.exp(-value)) for pair, value in odds.items()}
        share = sum(wanted.values()) / len(pairs)
        looks, clicks_on, looks_on = [0.0] * positions, [8.0, 1.0], [20.0, 20.0]
        for query, item, at, impressions, clicks in rows:
            chance = wanted[query, item]
            for kind, (rate, weight) in enumerate(((yes, chance), (no, 1 - chance))):
                missed = max(impressions, clicks) - clicks
                some = weight * (clicks + missed * examined[at] * (1 - rate) / (1 - examined[at] * rate))
                looks[at] += some
                looks_on[kind] += some
                clicks_on[kind] += weight * clicks
        yes, no = (min(max(a / b, 1e-4), 0.95) for a, b in zip(clicks_on, looks_on, strict=True))
        looks = [(a + 20 * b) / (c + 20) for a, b, c in zip(looks, guess, shown, strict=True)]
        examined = [a / max(looks) for a in looks]
        for at in range(positions):
            here = [wanted[pair] for pair in pairs if place[pair] == at]
            found, rest = sum(here) + 20 * share, len(here) - sum(here) + 20 * (1 - share)
            standing[at] = math.log(found / rest) - math.log(share / (1 - share))
    return yes, no, examined, standing, share


@pytest.mark.parametrize("seed", range(5))
def test_em_equals_the_naive_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixer.clicks._EM_ROUNDS", 12)
    rng = np.random.default_rng(seed)
    rows = []
    for query, item in np.ndindex(12, 5):
        for at in range(4):
            impressions = int(rng.integers(0, 9))
            if impressions:
                rate = 0.5 if item == query % 5 else 0.1
                rows.append((f"q{query:02}", f"i{item}", at, impressions, int(rng.binomial(impressions, rate))))
    model = fit_click_model(counts_of(rows))
    yes, no, examined, standing, share = naive_em(rows, 12)
    assert yes > no
    assert (model.wanted.rate, model.unwanted.rate, model.share) == pytest.approx((yes, no, share), rel=1e-6)
    np.testing.assert_allclose(model.examined, examined, atol=1e-6)
    np.testing.assert_allclose(model.standing, standing, atol=1e-6)
    assert any(standing)


def test_without_impressions_clicks_on_the_rest_are_looks() -> None:
    rows = [("p", "i", 0, 0, 8), ("p", "i", 1, 0, 1), ("p", "j", 0, 0, 1), ("q", "j", 0, 0, 4)]
    found = evidence(counts_of(rows), MODEL)
    assert found["clicks"].to_pylist() == [9, 1, 4]
    click, look = math.log(WANTED.rate / UNWANTED.rate), math.log((1 - WANTED.rate) / (1 - UNWANTED.rate))
    bought = math.log((1 - WANTED.bought) / (1 - UNWANTED.bought))
    expected = [9 * (click + bought) + look, click + bought + 9 * look, 4 * (click + bought)]
    assert found["evidence"].to_pylist() == pytest.approx(expected)
    rng = np.random.default_rng(0)
    many = [
        (f"q{q:03}", f"i{i}", 0, 0, int(rng.poisson(12 if i == q % 4 else 1.5))) for q in range(200) for i in range(4)
    ]
    counts = counts_of(many)
    model = fit_click_model(counts)
    assert model.standing.tolist() == pytest.approx([0.0], abs=1e-9), "who logs no impressions knows no order"
    found = evidence(counts, model)["evidence"].to_numpy().reshape(200, 4)
    assert (found.argmax(axis=1) == np.arange(200) % 4).mean() > 0.97
    assert (found.max(axis=1) > 3).mean() > 0.9


MODEL = ClickModel(WANTED, UNWANTED, 0.1, examined=np.array([1.0, 0.5, 0.25]), standing=np.array([1.5, 0.0, -2.0]))


def test_evidence_by_hand() -> None:
    rows = [("p", "i", 0, 3, 1, 1, 2, 1, 9.0, 81.0), ("p", "i", 1, 2, 1, 1), ("p", "j", 1, 0, 3), ("q", "i", 2, 10, 0)]
    found = evidence(counts_of(rows), MODEL).to_pylist()

    def log_likelihood(behaviour: Behaviour) -> float:
        clicks = 2 * math.log(behaviour.rate) + 2 * math.log(1 - behaviour.rate) + math.log(1 - behaviour.rate / 2)
        off = (9.0 - behaviour.dwell_mean) / behaviour.dwell_deviation
        return clicks - math.log(behaviour.dwell_deviation) - off**2 / 2 + 2 * math.log(behaviour.bought)

    assert [(row["query_id"], row["item_id"], row["clicks"]) for row in found] == [
        ("p", "i", 2), ("p", "j", 3), ("q", "i", 0)
    ]  # fmt: skip
    assert found[0]["evidence"] == pytest.approx(log_likelihood(WANTED) - log_likelihood(UNWANTED), rel=1e-9)
    clicks = 3 * math.log(0.4 * 0.75 / 0.05 / 0.97)  # a click is a view too, also if its impression was lost
    assert found[1]["evidence"] == pytest.approx(clicks, rel=1e-9)
    assert found[2]["evidence"] == pytest.approx(10 * math.log(0.9 / 0.9875)), "looks without a click speak against"
    assert [row["standing"] for row in found] == [1.5, 0.0, -2.0], "at the mean of the positions, here 0.4, 1 and 2"


def test_what_is_put_into_the_cart_and_then_bought_is_one_click_s() -> None:
    rows = [("p", "i", 0, 5, 5, 1, 1), ("q", "i", 0, 5, 5, 0, 1), ("r", "i", 0, 5, 5, 1, 0), ("s", "i", 0, 5, 5, 2, 1)]
    found = evidence(counts_of(rows), MODEL)["evidence"].to_pylist()
    assert found[0] == found[1] == found[2]
    bought = math.log(WANTED.bought / UNWANTED.bought) - math.log((1 - WANTED.bought) / (1 - UNWANTED.bought))
    assert found[3] - found[0] == pytest.approx(bought)


def test_both_behaviours_are_recovered() -> None:
    counts, wanted = drawn_counts(8000, share=0.1)
    model = fit_click_model(counts)
    assert model.share == pytest.approx(0.1, abs=0.02)
    for found, true in ((model.wanted, WANTED), (model.unwanted, UNWANTED)):
        assert found.rate == pytest.approx(true.rate, rel=0.1)
        assert found.dwell_mean == pytest.approx(true.dwell_mean, abs=0.1)
        assert found.dwell_deviation == pytest.approx(true.dwell_deviation, abs=0.1)
        assert found.bought == pytest.approx(true.bought, abs=0.03)
    said = evidence(counts, model)["evidence"].to_numpy()
    assert ((said > 0) == wanted)[np.abs(said) > 3].mean() > 0.97


@pytest.mark.parametrize(("dwell", "bought"), [(False, True), (True, False), (False, False)])
def test_what_the_logs_do_not_hold_says_nothing(dwell: bool, bought: bool) -> None:
    counts, _ = drawn_counts(4000, share=0.15, seed=1, dwell=dwell, bought=bought)
    model = fit_click_model(counts)
    assert model.wanted.rate == pytest.approx(WANTED.rate, rel=0.15)
    assert model.standing.tolist() == pytest.approx([0.0], abs=1e-9), "all stand at the same place"
    if not dwell:
        assert model.wanted.dwell_mean == pytest.approx(model.unwanted.dwell_mean)
    if not bought:
        assert model.wanted.bought == model.unwanted.bought


@pytest.mark.parametrize("impressions", [3, 0])
def test_the_model_of_some_photos_serves_all(impressions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a position, or impressions at all, occur in photos that it was not fitted to."""
    rows = [(f"q{photo:03}", "i", photo % 3, impressions, photo % 2) for photo in range(300)]
    rows += [(f"x{photo:03}", f"i{photo}", 9, 1, 0) for photo in range(2)]
    counts = counts_of(rows)
    monkeypatch.setattr("mixer.clicks._MOST_ROWS", 100)
    assert 90 < len(_some_photos(counts)) < 110
    model = fit_click_model(counts)
    assert len(model.examined) == len(model.standing) == 10
    assert np.isfinite(evidence(counts, model)["evidence"].to_numpy()).all()


def test_a_row_far_down_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    counts = simulated(rng.choice([0.05, 0.6], (30, 20), p=[0.8, 0.2]), views=400)
    far = counts_of([("r", "i", 5000, 1, 0)])
    plain, model = fit_click_model(counts), fit_click_model(pa.concat_tables([counts.sort_by(ORDER), far]))
    np.testing.assert_allclose(model.examined[:8], plain.examined, atol=0.02)
    assert abs(model.standing[5000]) < 0.1, "one pair says nothing of its place"


ORDER = [("query_id", "ascending"), ("item_id", "ascending"), ("position", "ascending")]


def test_a_purchase_is_placed_where_it_was_made() -> None:
    counts = counts_of([("p", "i", 2, 0, 0, 1), ("q", "i", 0, 5, 1)])
    assert evidence(counts, MODEL)["standing"].to_pylist() == [-2.0, 1.5]


@pytest.mark.parametrize("clicks", [0, 3])
def test_hardly_any_logs_are_no_crash(clicks: int) -> None:
    counts = counts_of([("p", "i", 7, 5, clicks)])
    found = evidence(counts, fit_click_model(counts))
    assert np.isfinite(found["evidence"].to_numpy()).all()
    assert np.isfinite(found["standing"].to_numpy()).all()
    empty = counts.slice(0, 0)
    model = fit_click_model(empty)
    assert len(model.examined) == 0
    assert len(evidence(empty, model)) == 0
