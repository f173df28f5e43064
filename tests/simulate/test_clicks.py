"""The click model: what is configured is what is measured, and the same seed gives the same rows."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pydantic import ValidationError

from mixer.clicks import COUNTS, fit_click_model
from mixer_platform.inputs import REASON
from mixer_platform.prepare.job import count_events
from mixer_platform.schema import EVENTS, LOGS
from mixer_platform.simulate.clicks import OTHER, RELATED, RIGHT, Pool, browse, retrieve, simulate_logs, zipf
from mixer_platform.simulate.config import ClickConfig
from mixer_platform.simulate.faults import REPEATED, ROW_FAULTS

ITEMS, PER_ITEM = 60, 5
QUERIES = ITEMS * PER_ITEM
QUERY_IDS = [f"q-{index:04d}" for index in range(QUERIES)]
ITEM_IDS = [f"item-{index:03d}" for index in range(ITEMS)]
THING = np.repeat(np.arange(ITEMS), PER_ITEM)


@pytest.fixture(scope="module")
def catalogue():
    """Similarity and grades of 300 queries and 60 items in families of six."""
    similarity = np.random.default_rng(0).standard_normal((QUERIES, ITEMS))
    grade = np.where(THING[:, None] // 6 == np.arange(ITEMS) // 6, RELATED, OTHER)
    grade[np.arange(QUERIES), THING] = RIGHT
    return similarity + grade, grade


def draw(catalogue, seed=0, **changed):
    config = ClickConfig(**{"sessions_per_query": 20, **changed})
    return simulate_logs(QUERY_IDS, ITEM_IDS, *catalogue, np.ones(QUERIES), config, seed)


def clicks_on_wrong_items(logs):
    clicks = logs.filter(pc.equal(logs["event"], "click")).to_pylist()
    truth = dict(zip(QUERY_IDS, THING, strict=True))
    return np.mean([row["item_id"] != ITEM_IDS[truth[row["query_id"]]] for row in clicks])


def test_the_same_seed_gives_the_same_rows(catalogue):
    logs, report = draw(catalogue, seed=3)
    again, same_report = draw(catalogue, seed=3)
    assert logs.equals(again)
    assert report == same_report
    assert not logs.equals(draw(catalogue, seed=4)[0])


def test_columns_and_types_are_the_contract_s(catalogue):
    logs, report = draw(catalogue)
    assert logs.schema.equals(LOGS.columns)
    assert report["events"] == logs.num_rows
    assert set(logs["event"].to_pylist()) == {*EVENTS, "clik"}


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.36, 0.6])
def test_click_noise_is_the_share_of_clicks_on_wrong_items(catalogue, noise):
    logs, report = draw(catalogue, click_noise=noise, bot_share=0, fault_rate=0)
    assert clicks_on_wrong_items(logs) == pytest.approx(noise, abs=0.03)
    assert report["clicks_on_wrong_items_by_people"] == pytest.approx(clicks_on_wrong_items(logs), abs=1e-4)
    assert max(report["click_chance"].values()) == 0.8


def test_bots_click_whatever_they_see(catalogue):
    _, calm = draw(catalogue, bot_share=0)
    logs, report = draw(catalogue, bot_share=0.01, bot_pages=2, bot_click=0.5, fault_rate=0)
    assert calm["clicks_of_bots"] == 0
    assert report["clicks_of_bots"] == pytest.approx(60 * 2 * 12 * 0.5, rel=0.1)
    assert report["clicks_on_wrong_items"] > report["clicks_on_wrong_items_by_people"]
    busy = Counter(logs.filter(pc.equal(logs["event"], "click"))["session_id"].to_pylist()).most_common(60)
    assert min(clicks for _, clicks in busy) > 5


def test_demand_follows_zipf_and_every_photo_was_used():
    demand = zipf(1000, 50.0)
    assert demand.sum() == pytest.approx(1)
    assert demand[0] / demand[-1] == pytest.approx(50)
    assert np.log(demand[99] / demand[9]) == pytest.approx(np.log(demand[9] / demand[0]))
    pool = Pool(np.zeros((1000, 1), int), np.zeros((1000, 1)), np.full((1000, 1), RIGHT))
    pages, _ = browse(pool, demand, ClickConfig(sessions_per_query=30, page_size=1), np.random.default_rng(0))
    asked = np.bincount(pages.query)
    assert asked.min() >= 1
    assert asked[:10].sum() / asked[-10:].sum() == pytest.approx(demand[:10].sum() / demand[-10:].sum(), rel=0.15)


def test_examination_falls_with_position():
    pool = Pool(np.tile(np.arange(6), (100, 1)), np.zeros((100, 6)), np.full((100, 6), RIGHT))
    config = ClickConfig(
        sessions_per_query=400, page_size=6, scroll=1, examination_exponent=1, click_probability=0.9, bot_share=0
    )
    pages, _ = browse(pool, np.ones(100), config, np.random.default_rng(0))
    assert pages.seen.all()
    np.testing.assert_allclose(pages.clicked.mean(0), 0.9 / np.arange(1, 7), rtol=0.05)


def test_only_items_on_screen_are_logged():
    pool = Pool(np.tile(np.arange(6), (100, 1)), np.zeros((100, 6)), np.full((100, 6), RIGHT))
    config = ClickConfig(sessions_per_query=200, page_size=6, screen_size=2, scroll=0.5, bot_share=0)
    pages, _ = browse(pool, np.ones(100), config, np.random.default_rng(0))
    np.testing.assert_allclose(pages.seen.mean(0), [1, 1, 0.5, 0.5, 0.25, 0.25], atol=0.02)
    assert not (pages.clicked & ~pages.seen).any()


def test_engine_reaches_right_items_as_often_and_as_high_as_configured(catalogue):
    similarity, grade = (np.tile(part, (20, 1)) for part in catalogue)
    config = ClickConfig(engine_recall=0.8, engine_precision=0.5)
    pool = retrieve(similarity, grade, config, np.random.default_rng(0))
    known = ((pool.grade == RIGHT) & np.isfinite(pool.score)).any(1)
    rank = (pool.grade == RIGHT).argmax(1)[known]
    assert known.mean() == pytest.approx(0.8, abs=0.02)
    assert (rank == 0).mean() == pytest.approx(0.5, abs=0.03)
    assert (rank == 1).mean() == pytest.approx(0.25, abs=0.03)
    assert (np.diff(pool.score) <= 0)[np.isfinite(pool.score[:, 1:])].all()


def test_a_query_may_have_several_right_items_and_a_catalogue_fewer_than_a_page(catalogue):
    similarity, grade = (part[:, :7] for part in catalogue)
    grade = np.where(np.arange(7) < 3, RIGHT, OTHER) + 0 * grade
    logs, report = simulate_logs(QUERY_IDS, ITEM_IDS[:7], similarity, grade, np.ones(QUERIES), ClickConfig(), 0)
    assert pc.max(logs["position"]).as_py() < 7
    assert report["clicks_on_wrong_items_by_people"] == pytest.approx(0.36, abs=0.05)


def test_right_clicks_are_bought_more_and_looked_at_longer(catalogue):
    logs, _ = draw(catalogue, click_noise=0.5, bot_share=0, fault_rate=0)
    table = logs.to_pandas()
    table["right"] = table["item_id"] == table["query_id"].map(
        dict(zip(QUERY_IDS, (ITEM_IDS[t] for t in THING), strict=True))
    )
    clicks = table[table["event"] == "click"]
    dwell = clicks.groupby("right")["dwell_ms"].median()
    assert dwell[True] == pytest.approx(9000, rel=0.1)
    assert dwell[False] == pytest.approx(3500, rel=0.1)
    assert table[table["event"] == "purchase"]["right"].mean() > 0.7 > clicks["right"].mean()
    assert table[table["event"] != "click"]["dwell_ms"].isna().all()
    assert table["timestamp_ms"].is_monotonic_increasing


def test_rows_are_broken_as_configured(catalogue):
    logs, report = draw(catalogue, fault_rate=0.07)
    clean, _ = draw(catalogue, fault_rate=0)
    each = round(0.07 * clean.num_rows / 7)
    assert report["broken_rows"] == dict.fromkeys((*ROW_FAULTS, REPEATED), each)
    table = logs.to_pandas()
    assert (table["event"] == "clik").sum() == each
    assert (table["timestamp_ms"] == -1).sum() == each
    assert (table["position"] < 0).sum() == each
    assert table["query_id"].isna().sum() == each
    assert (~table["item_id"].isin(ITEM_IDS)).sum() == each
    assert (~table["query_id"].isin(QUERY_IDS)).sum() == 2 * each  # missing ones are unknown too
    assert table["event_id"].duplicated().sum() == each
    assert logs.num_rows == clean.num_rows + each


def test_config_refuses_unknown_keys_and_a_pool_smaller_than_a_page():
    with pytest.raises(ValidationError, match="clicknoise"):
        ClickConfig(clicknoise=0.1)
    with pytest.raises(ValidationError, match="at least page_size, 12"):
        ClickConfig(pool_size=5)


@pytest.mark.parametrize("noise", [0.2, 0.36, 0.6])
def test_the_click_model_finds_how_this_marketplace_acts(noise):
    """Of logs whose pages hardly change from one session to the next: five for a photo."""
    rng = np.random.default_rng(1)
    similarity = rng.standard_normal((3000, ITEMS))
    right = rng.integers(ITEMS, size=3000)
    grade = np.full((3000, ITEMS), OTHER)
    grade[np.arange(3000), right] = RIGHT
    config = ClickConfig(click_noise=noise, bot_share=0, fault_rate=0)
    queries = [f"q-{index:04d}" for index in range(3000)]
    logs, report = simulate_logs(queries, ITEM_IDS, similarity + 2 * (grade == RIGHT), grade, np.ones(3000), config, 0)
    counts = count_events(logs.append_column(REASON, pa.nulls(len(logs), pa.string())))
    model = fit_click_model(counts.sort_by([(key, "ascending") for key in COUNTS.names[:3]]))
    examination = (1.0 + np.arange(12)) ** -config.examination_exponent
    np.testing.assert_allclose(model.examined[:6], examination[:6], atol=0.06)
    assert model.wanted.rate == pytest.approx(report["click_chance"]["right"], rel=0.1)
    assert model.unwanted.rate == pytest.approx(report["click_chance"]["other"], rel=0.2)
    assert np.exp(model.wanted.dwell_mean) == pytest.approx(config.dwell_right_ms, rel=0.1)
    assert np.exp(model.unwanted.dwell_mean) == pytest.approx(config.dwell_wrong_ms, rel=0.1)
    assert (np.diff(model.standing[:5]) < 0).all()
