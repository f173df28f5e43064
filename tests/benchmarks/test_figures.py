"""What the published comparisons rest on: intervals, moved clicks, and what other methods learn from."""

from __future__ import annotations

import types

import numpy as np
import pyarrow as pa
import pytest
import torch
from choose import with_setting
from learning import most_clicked
from noise import with_moved_clicks
from quality import hits_of, interval, mean_known, things_of


def test_an_interval_over_photos_is_the_binomial_s() -> None:
    right = (np.arange(400) < 100).astype(float)
    low, high = interval(right)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.005)
    assert interval(np.concatenate([right, np.full(50, np.nan)])) == [low, high], "photos that were not asked"


def test_an_interval_over_things_knows_that_photos_of_one_are_alike() -> None:
    things = np.repeat(np.arange(100), 4)
    alike = np.repeat((np.arange(100) < 25).astype(float), 4)
    low, high = interval(alike, things)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 100)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.01)
    low, high = interval(np.tile([1.0, 0.0, 0.0, 0.0], 100), things)
    assert (low, high) == (0.25, 0.25), "each thing is found as often as the others"


def test_photos_of_the_same_items_show_the_same_thing() -> None:
    assert things_of([{"a", "b"}, {"c"}, {"b", "a"}, {"a"}]).tolist() == [0, 1, 0, 2]


def test_hits_are_by_rank_and_what_is_not_known_is_no_miss() -> None:
    items, cosines = [f"i{n}" for n in range(12)], torch.arange(12.0).flip(0)[None]
    assert hits_of(items, [{"i2", "i11"}], cosines)[0].tolist() == [False, False, True] + [False] * 7
    known = mean_known(np.array([[1.0, np.nan, np.nan], [0.0, 1.0, np.nan]]))
    assert known[:2].tolist() == [0.5, 1.0]
    assert np.isnan(known[2])


def page_logs(sessions: int) -> pa.Table:
    """Return logs of pages of three items, of which the first is clicked and bought."""
    rows = []
    for session in range(sessions):
        row = {"session_id": f"s{session}", "query_id": "q", "dwell_ms": None}
        rows += [row | {"item_id": item, "position": at, "event": "impression"} for at, item in enumerate("abc")]
        rows += [row | {"item_id": "a", "position": 0, "event": "click", "dwell_ms": 60_000}]
        rows += [row | {"item_id": "a", "position": 0, "event": "purchase"}]
    return pa.Table.from_pylist(rows)


def test_clicks_move_to_another_item_of_their_page_and_take_what_was_bought_along() -> None:
    logs, moved = with_moved_clicks(page_logs(500), 0.4, np.random.default_rng(0))
    rows = logs.to_pylist()
    clicks = [row for row in rows if row["event"] == "click"]
    elsewhere = [row for row in clicks if row["item_id"] != "a"]
    assert len(clicks) == 500
    assert len(elsewhere) / 500 == moved == pytest.approx(0.4, abs=0.06)
    assert {(row["item_id"], row["position"]) for row in elsewhere} == {("b", 1), ("c", 2)}
    assert all(row["dwell_ms"] == 60_000 for row in clicks if row["item_id"] == "a")
    assert np.median([row["dwell_ms"] for row in elsewhere]) < 10_000
    bought = {row["session_id"] for row in rows if row["event"] == "purchase"}
    assert bought == {row["session_id"] for row in clicks if row["item_id"] == "a"}
    assert sum(row["event"] == "impression" for row in rows) == 1500


def test_a_page_of_one_item_leaves_its_click() -> None:
    alone = page_logs(20).filter(pa.compute.equal(page_logs(20)["item_id"], "a"))
    logs, moved = with_moved_clicks(alone, 1.0, np.random.default_rng(0))
    assert moved == 0
    assert logs.num_rows == alone.num_rows


def test_a_photo_is_of_its_most_clicked_item() -> None:
    clicks = np.array([[0, 1, 5], [0, 2, 6], [1, 0, 1]])
    labels, weights = most_clicked(types.SimpleNamespace(clicks=clicks, photos=3, item_ids=["x", "y", "z"]))
    assert labels.tolist() == [2, 0, 0, 0, 1, 2]
    assert weights.tolist() == [1, 1, 0, 1, 1, 1]


def test_a_setting_that_makes_no_difference_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"train\.skew makes no difference here; these do: model\.dim, "):
        with_setting(types.SimpleNamespace(), "train.margin=0.1,train.skew=0.5")
