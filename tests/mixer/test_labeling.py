"""Classes from simulated clicks; fast table code against loops that anyone can read."""

from __future__ import annotations

import collections
import json
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from mixer.clicks import COUNTS
from mixer.labeling import (
    LabelingConfig,
    cluster_items,
    odds_unseen,
    organise,
    photo_evidence,
    with_lost_clicks,
)
from tests.mixer.tables import Rows, items_of, random_pairs, table_of

CONFIG = LabelingConfig()


def counts_of(rows: Rows) -> pa.Table:
    """Return COUNTS from rows of its columns; the last ones may be left out."""
    width = len(COUNTS)
    whole = [(*row, *(0,) * (width - len(row))) for row in rows]
    return pa.table(dict(zip(COUNTS.names, zip(*whole, strict=True), strict=True)), schema=COUNTS)


def groups(items: pa.Table) -> set[frozenset[str]]:
    """Return the classes as sets of items."""
    found = collections.defaultdict(set)
    for item, label in zip(items["item_id"].to_pylist(), items["class_id"].to_pylist(), strict=True):
        found[label].add(item)
    return {frozenset(members) for members in found.values()}


def test_photo_evidence_equals_the_naive_one() -> None:
    rows, classes = random_pairs(2), {f"i{item:02}": item // 3 for item in range(12)}
    items = pa.table({"item_id": list(classes), "class_id": pa.array(classes.values(), pa.int64())})
    places = np.random.default_rng(3).normal(size=len(rows))
    placed: dict = collections.defaultdict(list)
    sums: dict = collections.defaultdict(lambda: collections.defaultdict(float))
    for (query, item, value), place in zip(rows, places, strict=True):
        sums[query][classes[item]] += value
        placed[query, classes[item]].append(place)
    for (query, label), values in placed.items():
        sums[query][label] += np.mean(values)
    rows = [(*row, place) for row, place in zip(rows, places, strict=True)]
    found = {
        row["query_id"]: row
        for row in photo_evidence(table_of("query_id item_id evidence standing", rows), items, 2).to_pylist()
    }
    assert set(found) == set(sums)
    for query, row in found.items():
        values = sums[query]
        assert row["class_id"] == max(values, key=lambda label: values[label])
        odds = [math.exp(values.get(label, row["unseen"])) for label in range(4)]
        assert row["confidence"] == pytest.approx(odds[row["class_id"]] / sum(odds), rel=1e-4)
        above = {label: value - row["unseen"] for label, value in values.items()}
        strongest = sorted(values, key=lambda label: (above[label] <= 0, -abs(above[label])))[:2]
        assert row["candidates"] == strongest
        assert row["evidence"] == pytest.approx([values[label] for label in strongest], rel=1e-5)


def test_what_was_clicked_is_kept_however_much_was_passed_over() -> None:
    items = pa.table({"item_id": [f"i{n:02}" for n in range(60)], "class_id": pa.array(range(60), pa.int64())})
    rows = [("p", f"i{n:02}", 4.0 if n == 7 else -6.0, 0.0) for n in range(40)]
    (row,) = photo_evidence(table_of("query_id item_id evidence standing", rows), items, 8).to_pylist()
    assert row["class_id"] == row["candidates"][0] == 7
    assert row["evidence"][0] == 4


def test_what_was_bought_was_clicked_whether_or_not_that_is_logged() -> None:
    def counts(clicks: int, carts: int, purchases: int) -> pa.Table:
        row = {"query_id": "p", "item_id": "i", "position": 0, "impressions": 3, "clicks": clicks, "dwells": 0}
        row |= {"carts": carts, "purchases": purchases, "log_dwell": 0.0, "log_dwell_squared": 0.0}
        return pa.Table.from_pylist([row], COUNTS)

    for clicks, *bought, found in ((0, 0, 0, 0), (0, 0, 2, 2), (0, 1, 1, 1), (0, 2, 1, 2), (1, 1, 1, 1), (5, 0, 2, 5)):
        assert with_lost_clicks(counts(clicks, *bought)).to_pylist() == counts(found, *bought).to_pylist()


def test_evidence_of_any_size_is_no_crash() -> None:
    items = pa.table({"item_id": ["i", "j"], "class_id": pa.array([0, 1], pa.int64())})
    rows = [("p", "i", 2000.0, 0.0), ("p", "j", -2000.0, 0.0), ("q", "i", -2000.0, 0.0)]
    pairs = table_of("query_id item_id evidence standing", rows)
    sure, unsure = photo_evidence(pairs, items, 9).to_pylist()
    assert (sure["query_id"], sure["class_id"], sure["confidence"]) == ("p", 0, 1.0)
    assert (unsure["query_id"], unsure["confidence"]) == ("q", 0.0)
    assert unsure["unseen"] <= 0


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_how_often_the_thing_is_shown_is_estimated(share: float) -> None:
    """Each of 5,000 photos is shown 10 of 100 classes; where its own is among them, clicks say so."""
    rng = np.random.default_rng(0)
    among = rng.random(5000) < share
    evidence = rng.normal(-4, 1, (5000, 10))
    evidence[among, 0] = rng.normal(9, 1, among.sum())
    unseen = odds_unseen(np.logaddexp.reduce(evidence, axis=1), np.full(5000, 10), 100)
    assert unseen == pytest.approx(min(math.log((1 - share) / 90) - math.log(share / 10), 0), abs=0.25)
    assert len(odds_unseen(np.zeros(0), np.zeros(0), 0)) == 0


def two_products(noise: int = 0) -> Rows:
    """Twenty photos of apples click the four apples, twenty of milk the milks; `noise` photos also click across."""
    rows: Rows = []
    for photo, (product, other) in enumerate([("apple", "milk"), ("milk", "apple")] * 20):
        for listing in range(4):
            rows.append((f"q{photo:02}", f"{product}{listing}", listing, 20, 12))
            rows.append(
                (f"q{photo:02}", f"{other}{listing}", listing + 4, 20, int(photo < noise and listing == photo % 4))
            )
    return rows


ITEMS = [f"{product}{listing}" for product in ("apple", "milk") for listing in range(4)]
APPLES, MILKS = frozenset(ITEMS[:4]), frozenset(ITEMS[4:])


@pytest.mark.parametrize("noise", [0, 1, 8])
def test_two_products_are_two_classes_in_spite_of_wrong_clicks(noise: int) -> None:
    labels = organise(counts_of(two_products(noise)), items_of(ITEMS), CONFIG)
    assert groups(labels.items) == {APPLES, MILKS}
    class_of = dict(zip(*(column.to_pylist() for column in labels.items.columns), strict=True))
    queries = labels.queries.to_pylist()
    assert len(queries) == 40
    for query in queries:
        assert query["class_id"] == class_of["milk0" if int(query["query_id"][1:]) % 2 else "apple0"]
        assert query["confidence"] > 0.99


def test_titles_join_what_nobody_clicked() -> None:
    """Behaviour shows that listings of equal titles are one thing; a new listing has nothing but its title."""
    new = items_of([*ITEMS, "new", "other"], [*["green apple"] * 4, *["fresh milk"] * 4, "green apple", "blue cheese"])
    labels = organise(counts_of(two_products()), new, CONFIG)
    assert groups(labels.items) == {APPLES | {"new"}, MILKS, frozenset(["other"])}
    labels = organise(counts_of(two_products()), new, LabelingConfig(titles=False))
    assert groups(labels.items) == {APPLES, MILKS, frozenset(["new"]), frozenset(["other"])}


def test_titles_that_mislead_join_nothing() -> None:
    titles = ["green apple", "fresh milk"] * 4  # each title on both things
    labels = organise(counts_of(two_products()), items_of(ITEMS, titles), CONFIG)
    assert groups(labels.items) == {APPLES, MILKS}


def test_classes_hold_at_most_the_largest() -> None:
    labels = organise(counts_of(two_products()), items_of(ITEMS), LabelingConfig(largest_class=3))
    assert {len(members) for members in groups(labels.items)} <= {1, 2, 3}


def test_classes_are_numbered_by_their_smallest_item_and_hold_only_known_items() -> None:
    behaviour = table_of("left right evidence", [("b", "z", 9.0), ("c", "gone", 9.0)])
    nothing = table_of("left right similarity", [("b", "z", 0.0)]).slice(0, 0)
    found = cluster_items(behaviour, nothing, pa.chunked_array([["z", "c", "b", "a"]]), CONFIG)
    assert found.to_pylist() == [
        {"item_id": "a", "class_id": 0},
        {"item_id": "b", "class_id": 1},
        {"item_id": "z", "class_id": 1},
        {"item_id": "c", "class_id": 2},
    ]


@pytest.mark.parametrize("item_ids", [[], ["b", "a"]])
def test_without_logs_every_item_is_a_class(item_ids: list[str]) -> None:
    labels = organise(COUNTS.empty_table(), items_of(item_ids), CONFIG)
    assert labels.items["item_id"].to_pylist() == sorted(item_ids)
    assert labels.items["class_id"].to_pylist() == list(range(len(item_ids)))
    assert labels.queries.num_rows == 0
    assert len(labels.model.examined) == 0


def test_without_clicks_no_photo_has_a_class() -> None:
    labels = organise(counts_of([("q", "a", 0, 5, 0), ("q", "b", 1, 5, 0)]), items_of(["a", "b"]), CONFIG)
    assert groups(labels.items) == {frozenset("a"), frozenset("b")}
    assert labels.queries.num_rows == 0


def random_counts(seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows = []
    for query, item, at in np.ndindex(30, 20, 3):
        if rng.random() < 0.3:
            views = int(rng.integers(1, 20))
            clicks = int(rng.binomial(views, 0.5 if query % 5 == item % 5 else 0.05))
            times = rng.normal(9, 1, clicks)
            rows.append((f"q{query}", f"i{item}", at, views, clicks, 0, clicks, times.sum(), times @ times))
    return counts_of(rows)


def test_the_order_of_rows_and_columns_does_not_matter_to_the_last_bit() -> None:
    counts = random_counts(2)
    items = items_of([f"i{item}" for item in range(20)], [f"thing {item % 7}" for item in range(20)])
    first = organise(counts, items, CONFIG)
    assert len(first.queries) > 20
    for seed in range(3):
        shuffled = counts.take(np.random.default_rng(seed).permutation(len(counts))).select(COUNTS.names[::-1])
        again = organise(shuffled, items.take(pa.array(np.arange(20)[::-1])), CONFIG)
        assert again.items.equals(first.items)
        assert again.queries.equals(first.queries)
        assert np.array_equal(again.model.examined, first.model.examined)
        assert np.array_equal(again.model.standing, first.model.standing)
        assert (again.model.wanted, again.model.unwanted) == (first.model.wanted, first.model.unwanted)


def test_classes_do_not_depend_on_pythons_hash_seed() -> None:
    program = """
import itertools, pyarrow as pa
from mixer.labeling import LabelingConfig, cluster_items
edges = [(f"i{a:02}", f"i{b:02}", 4.0 + a * b % 5)
         for a, b in itertools.combinations(range(40), 2) if (a * 7 + b * 3) % 9 == 0]
table = pa.table(dict(zip(("left", "right", "evidence"), zip(*edges))))
none = table.rename_columns(["left", "right", "similarity"]).slice(0, 0)
items = pa.chunked_array([[f"i{a:02}" for a in range(40)]])
print(cluster_items(table, none, items, LabelingConfig())["class_id"].to_pylist())
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    printed = [run.communicate(timeout=60)[0] for run in runs]
    assert printed[0] == printed[1]
    assert len(set(json.loads(printed[0]))) > 2


def test_unknown_and_impossible_settings_are_refused() -> None:
    for wrong in ({"trust": 0}, {"em_round": 3}, {"candidates": 0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            LabelingConfig(**wrong)
