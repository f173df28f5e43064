"""Clicks simulated from known truths; fast table code against loops that anyone can read."""

from __future__ import annotations

import collections
import math

import numpy as np
import pyarrow as pa
import pytest

from mixer.clicks import (
    COUNTS,
    Behaviour,
    ClickModel,
    clicks_and_views,
    evidence,
    examination,
    fit_click_model,
    pair_statistics,
)

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


def drawn_pairs(count: int, share: float, seed: int = 0, dwell: bool = True, bought: bool = True) -> tuple:
    """Return pair statistics drawn from WANTED and UNWANTED, and which pairs are wanted."""
    rng = np.random.default_rng(seed)
    wanted = rng.random(count) < share
    rows = collections.defaultdict(list)
    for pair, is_wanted in enumerate(wanted):
        behaviour = WANTED if is_wanted else UNWANTED
        looks = rng.uniform(1, 30)
        clicks = rng.binomial(int(looks), behaviour.rate)
        times = rng.normal(behaviour.dwell_mean, behaviour.dwell_deviation, clicks if dwell else 0)
        values = (f"q{pair}", f"i{pair}", looks, clicks, rng.binomial(clicks, behaviour.bought) if bought else 0)
        for name, value in zip(("query_id", "item_id", "looks", "clicks", "purchases"), values, strict=True):
            rows[name].append(value)
        for name, value in (("dwells", len(times)), ("log_dwell", times.sum()), ("log_dwell_squared", times @ times)):
            rows[name].append(float(value))
    return pa.table(dict(rows)), wanted


def test_em_recovers_the_examination_curve_where_click_rates_do_not() -> None:
    rng = np.random.default_rng(0)
    counts = simulated(rng.choice([0.05, 0.6], (30, 20), p=[0.8, 0.2]), views=400)
    clicks, views = clicks_and_views(counts)
    at = counts["position"].to_numpy()
    rates = np.bincount(at, clicks) / np.bincount(at, views)
    found = examination(counts, rounds=300)
    assert np.abs(found - EXAMINATION).max() < 0.06
    assert np.abs(rates / rates[0] - EXAMINATION).max() > 0.15, "the simulation has no position bias to recover"


def naive_examination(rows: list[tuple], rounds: int) -> list[float]:
    positions = 1 + max(row[2] for row in rows)
    pairs = sorted({row[:2] for row in rows})
    examined = [1 - 0.7 * k / (positions - 1) for k in range(positions)]
    attractive = dict.fromkeys(pairs, 0.1)
    for _ in range(rounds):
        looked = [0.0] * positions
        seen = [1e-9] * positions
        wanted = dict.fromkeys(pairs, 0.2)
        shown = dict.fromkeys(pairs, 2.0)
        for query, item, at, impressions, clicks in rows:
            views, chance, sight = max(impressions, clicks), attractive[query, item], examined[at]
            missed = (views - clicks) / (1 - chance * sight)
            looked[at] += clicks + missed * sight * (1 - chance)
            seen[at] += views
            wanted[query, item] += clicks + missed * chance * (1 - sight)
            shown[query, item] += views
        examined = [a / b for a, b in zip(looked, seen, strict=True)]
        examined = [min(max(value / max(examined), 1e-6), 1.0) for value in examined]
        attractive = {pair: min(wanted[pair] / shown[pair], 1.0) for pair in pairs}
    return examined


@pytest.mark.parametrize("seed", range(5))
def test_em_equals_the_naive_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for query, item, at in np.ndindex(6, 5, 4):
        impressions = int(rng.integers(0, 9))
        if impressions:
            rows.append((f"q{query}", f"i{item}", at, impressions, int(rng.binomial(impressions, 0.2))))
    np.testing.assert_allclose(examination(counts_of(rows), 20), naive_examination(rows, 20), atol=1e-6)


def test_statistics_are_summed_over_positions() -> None:
    rows = [("p", "i", 0, 10, 2, 1, 2, 18.0, 162.0), ("p", "i", 2, 4, 1, 0, 0, 0.0, 0.0), ("p", "j", 1, 0, 3)]
    found = pair_statistics(counts_of(rows), np.array([1.0, 0.5, 0.25])).to_pylist()
    rest = {"clicks": 3, "purchases": 1, "dwells": 2, "log_dwell": 18.0, "log_dwell_squared": 162.0}
    assert found[0] == {"query_id": "p", "item_id": "i", "looks": 11.0, **rest}
    assert (found[1]["looks"], found[1]["clicks"]) == (1.5, 3), "a click is a view too, also if its impression was lost"


def test_without_impressions_clicks_on_the_rest_are_looks() -> None:
    rows = [("p", "i", 0, 0, 8), ("p", "i", 1, 0, 1), ("p", "j", 0, 0, 1), ("q", "j", 0, 0, 4)]
    pairs = pair_statistics(counts_of(rows), np.ones(2))
    assert pairs["looks"].to_pylist() == [10.0, 10.0, 4.0]
    rng = np.random.default_rng(0)
    many = [
        (f"q{q:03}", f"i{i}", 0, 0, int(rng.poisson(12 if i == q % 4 else 1.5))) for q in range(200) for i in range(4)
    ]
    pairs = pair_statistics(counts_of(many), np.ones(1))
    found = evidence(pairs, fit_click_model(pairs)).reshape(200, 4)
    assert (found.argmax(axis=1) == np.arange(200) % 4).mean() > 0.97
    assert (found.max(axis=1) > 3).mean() > 0.9


def test_evidence_by_hand() -> None:
    model = ClickModel(WANTED, UNWANTED, share=0.1)
    pairs = pa.table(
        {"query_id": ["p"], "item_id": ["i"], "looks": [5.0], "clicks": [2.0], "purchases": [3.0], "dwells": [1.0],
         "log_dwell": [9.0], "log_dwell_squared": [81.0]}
    )  # fmt: skip

    def log_likelihood(behaviour: Behaviour) -> float:
        clicks = 2 * math.log(behaviour.rate) + 3 * math.log(1 - behaviour.rate)
        off = (9.0 - behaviour.dwell_mean) / behaviour.dwell_deviation
        return clicks - math.log(behaviour.dwell_deviation) - off**2 / 2 + 2 * math.log(behaviour.bought)

    expected = log_likelihood(WANTED) - log_likelihood(UNWANTED)
    assert evidence(pairs, model) == pytest.approx([expected], rel=1e-9)


def test_looks_without_a_click_speak_against() -> None:
    columns = {"looks": [10.0], "clicks": [0.0], "purchases": [0.0]}
    columns |= {"dwells": [0.0], "log_dwell": [0.0], "log_dwell_squared": [0.0]}
    pairs = pa.table({"query_id": ["p"], "item_id": ["i"], **columns})
    assert evidence(pairs, ClickModel(WANTED, UNWANTED, 0.1)) == pytest.approx([10 * math.log(0.6 / 0.95)])


def test_both_behaviours_are_recovered() -> None:
    pairs, wanted = drawn_pairs(8000, share=0.1)
    model = fit_click_model(pairs)
    assert model.share == pytest.approx(0.1, abs=0.02)
    for found, true in ((model.wanted, WANTED), (model.unwanted, UNWANTED)):
        assert found.rate == pytest.approx(true.rate, rel=0.1)
        assert found.dwell_mean == pytest.approx(true.dwell_mean, abs=0.1)
        assert found.dwell_deviation == pytest.approx(true.dwell_deviation, abs=0.1)
        assert found.bought == pytest.approx(true.bought, abs=0.03)
    sure = np.abs(evidence(pairs, model)) > 3
    assert ((evidence(pairs, model) > 0) == wanted)[sure].mean() > 0.97


@pytest.mark.parametrize(("dwell", "bought"), [(False, True), (True, False), (False, False)])
def test_what_the_logs_do_not_hold_says_nothing(dwell: bool, bought: bool) -> None:
    pairs, _ = drawn_pairs(4000, share=0.15, seed=1, dwell=dwell, bought=bought)
    model = fit_click_model(pairs)
    assert model.wanted.rate == pytest.approx(WANTED.rate, rel=0.15)
    if not dwell:
        assert model.wanted.dwell_mean == pytest.approx(model.unwanted.dwell_mean)
    if not bought:
        assert model.wanted.bought == model.unwanted.bought


@pytest.mark.parametrize("clicks", [0, 3])
def test_hardly_any_logs_are_no_crash(clicks: int) -> None:
    pairs = pair_statistics(counts_of([("p", "i", 0, 5, clicks)]), np.ones(1))
    assert np.isfinite(evidence(pairs, fit_click_model(pairs))).all()
    empty = counts_of([("p", "i", 0, 1, 0)]).slice(0, 0)
    assert len(examination(empty)) == 0
    fit_click_model(pair_statistics(empty, examination(empty)))
