"""Clicks simulated from known truths; fast table code against loops that anyone can read."""

from __future__ import annotations

import collections
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from mixer.labeling import (
    COUNTS,
    LabelingConfig,
    affinity,
    assign_queries,
    attraction,
    best_candidates,
    cluster_items,
    item_similarity,
    organise,
)

CONFIG = LabelingConfig()
# Louvain's resolution is relative to the whole graph: the default would part a handful of items into ones.
FEW_ITEMS = LabelingConfig(resolution=1.0)
CONVERGED = LabelingConfig(em_rounds=300)
EXAMINATION = 0.75 ** np.arange(8)

Rows = list[tuple]


def counts_of(rows: Rows) -> pa.Table:
    """Return COUNTS from (query, item, position, impressions, clicks, purchases)."""
    return pa.table(dict(zip(COUNTS.names, zip(*rows, strict=True), strict=True)), schema=COUNTS)


def pairs_of(rows: Rows) -> pa.Table:
    names = ("query_id", "item_id", "affinity")
    return pa.table(dict(zip(names, zip(*rows, strict=True), strict=True)))


def as_dict(table: pa.Table) -> dict:
    """Return {keys: last column}."""
    *keys, values = (column.to_pylist() for column in table.columns)
    return dict(zip(zip(*keys, strict=True), values, strict=True))


def groups(items: pa.Table) -> set[frozenset[str]]:
    """Return the classes as sets of items."""
    found = collections.defaultdict(set)
    for item, label in zip(items["item_id"].to_pylist(), items["class_id"].to_pylist(), strict=True):
        found[label].add(item)
    return {frozenset(members) for members in found.values()}


def simulated(attractive: np.ndarray, views: int, seed: int = 0) -> pa.Table:
    """Simulate an engine that shows attractive items on top most of the time, and shoppers of the position model."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    for query, chances in enumerate(attractive):
        shown = collections.Counter()
        clicked = collections.Counter()
        for _ in range(views):
            page = np.argsort(-chances + rng.normal(0, 0.25, len(chances)))[: len(EXAMINATION)]
            clicks = rng.random(len(page)) < EXAMINATION[: len(page)] * chances[page]
            for position, item in enumerate(page):
                shown[item, position] += 1
                clicked[item, position] += int(clicks[position])
        rows += [(f"q{query}", f"i{item}", at, n, clicked[item, at], 0) for (item, at), n in shown.items()]
    return counts_of(rows)


@pytest.fixture(scope="module")
def clicks() -> tuple[np.ndarray, pa.Table]:
    attractive = np.random.default_rng(1).uniform(0.05, 0.9, (12, 12))
    return attractive, simulated(attractive, views=1500)


def test_em_recovers_the_examination_curve_where_click_rates_do_not(clicks) -> None:
    _, counts = clicks
    _, examined = attraction(counts, CONVERGED)
    assert examined == pytest.approx(EXAMINATION, abs=0.02)

    by_position = counts.group_by("position").aggregate([("clicks", "sum"), ("impressions", "sum")]).sort_by("position")
    rate = by_position["clicks_sum"].to_numpy() / by_position["impressions_sum"].to_numpy()
    assert abs(rate / rate[0] - EXAMINATION).max() > 0.06  # the engine's order makes the bias look worse than it is


def test_em_recovers_attraction(clicks) -> None:
    attractive, counts = clicks
    pairs, _ = attraction(counts, CONVERGED)
    shown = counts.group_by(["query_id", "item_id"]).aggregate([("impressions", "sum")])
    often = {keys for keys, views in as_dict(shown).items() if views > 300}
    assert len(often) > 80
    for (query, item), found in as_dict(pairs.select(["query_id", "item_id", "attraction"])).items():
        if (query, item) in often:
            assert found == pytest.approx(attractive[int(query[1:]), int(item[1:])], abs=0.12)


def naive_em(rows: Rows, config: LabelingConfig) -> tuple[dict, list[float]]:
    positions = max(row[2] for row in rows) + 1
    prior = config.prior_clicks / config.prior_views
    examined = [1.0 - 0.7 * at / (positions - 1) for at in range(positions)]
    attractive = {row[:2]: prior for row in rows}
    for _ in range(config.em_rounds):
        looked, seen = [0.0] * positions, [0.0] * positions
        liked = dict.fromkeys(attractive, config.prior_clicks)
        shown = dict.fromkeys(attractive, config.prior_views)
        for query, item, at, impressions, clicked, _ in rows:
            views, pair = max(impressions, clicked), (query, item)
            e, a = examined[at], attractive[pair]
            looked[at] += clicked + (views - clicked) * e * (1 - a) / (1 - e * a)
            liked[pair] += clicked + (views - clicked) * a * (1 - e) / (1 - e * a)
            seen[at] += views
            shown[pair] += views
        examined = [a / b if b else 0.0 for a, b in zip(looked, seen, strict=True)]
        examined = [max(value / max(examined), 1e-6) for value in examined]
        attractive = {pair: min(liked[pair] / shown[pair], 1.0) for pair in liked}
    return attractive, examined


def random_rows(seed: int, queries: int = 6, items: int = 5, positions: int = 4) -> Rows:
    rng = np.random.default_rng(seed)
    keys = itertools.product(range(queries), range(items), range(positions))
    kept = [key for key in keys if rng.random() < 0.6 and key[2] != 2]  # nothing was ever shown third
    return [
        (f"q{q}", f"i{i}", at, int(rng.integers(0, 9)), int(rng.integers(0, 4)), int(rng.integers(0, 2)))
        for q, i, at in kept
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_em_equals_the_naive_one(seed: int) -> None:
    rows = random_rows(seed)  # clicks exceed impressions in some: an impression may be lost
    config = LabelingConfig(em_rounds=7)
    pairs, examined = attraction(counts_of(rows), config)
    expected, expected_examined = naive_em(rows, config)
    assert as_dict(pairs.select(["query_id", "item_id", "attraction"])) == pytest.approx(expected)
    assert examined == pytest.approx(expected_examined)
    purchases = collections.Counter()
    for query, item, *_, bought in rows:
        purchases[query, item] += bought
    assert as_dict(pairs.select(["query_id", "item_id", "purchases"])) == purchases


def test_few_views_say_little() -> None:
    pairs, _ = attraction(counts_of([("q", "once", 0, 1, 1, 0), ("q", "often", 0, 100, 90, 0)]), CONFIG)
    found = as_dict(pairs.select(["query_id", "item_id", "attraction"]))
    assert found["q", "often"] > 0.85
    assert CONFIG.prior_clicks / CONFIG.prior_views < found["q", "once"] < 0.5


def test_affinity_is_what_exceeds_the_prior_and_purchases_add() -> None:
    config = LabelingConfig(prior_clicks=0.2, prior_views=2.0, purchase_bonus=0.5)
    pairs = pa.table(
        {
            "query_id": ["q"] * 5,
            "item_id": list("abcde"),
            "attraction": [0.3, 0.1, 0.05, 0.05, 0.3],
            "purchases": [0.0, 0.0, 0.0, 1.0, 3.0],
        }
    )
    found = as_dict(affinity(pairs, config))
    # below the prior nothing is left, unless it was bought: then the bonus, and half of it more each time
    expected = {("q", "a"): 0.2, ("q", "d"): 0.5, ("q", "e"): 0.2 + 0.5 * (1 + 1 / 2 + 1 / 4)}
    assert found == pytest.approx(expected)


def random_pairs(seed: int, queries: int = 30, items: int = 12) -> Rows:
    rng = np.random.default_rng(seed)
    keys = itertools.product(range(queries), range(items))
    return [(f"q{q}", f"i{i:02}", float(rng.choice([0.25, 0.5, 0.75]))) for q, i in keys if rng.random() < 0.4]


def test_candidates_are_the_best_of_each_query_and_ties_fall_by_item() -> None:
    rows = random_pairs(2)
    found = best_candidates(pairs_of(rows), 3)
    by_query = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: (row[0], -row[2], row[1])):
        by_query[row[0]].append(row)
    assert list(as_dict(found).items()) == [((q, i), a) for group in by_query.values() for q, i, a in group[:3]]


@pytest.mark.parametrize(("minimum", "support"), [(0.35, 0.0), (0.2, 2.0)])
def test_item_similarity_equals_the_naive_one(minimum: float, support: float) -> None:
    rows = random_pairs(3)
    lengths = collections.Counter()
    for query, _, value in rows:
        lengths[query] += value**2
    votes = collections.defaultdict(dict)
    for query, item, value in rows:
        votes[item][query] = value / lengths[query] ** 0.5
    expected = {}
    for left, right in itertools.combinations(sorted(votes), 2):
        dot = sum(votes[left][query] * votes[right].get(query, 0.0) for query in votes[left])
        norms = [(sum(value**2 for value in votes[item].values()) + support) ** 0.5 for item in (left, right)]
        if (cosine := dot / (norms[0] * norms[1])) >= minimum:
            expected[left, right] = cosine
    assert 5 < len(expected) < 60
    assert as_dict(item_similarity(pairs_of(rows), minimum, support)) == pytest.approx(expected)


def test_a_photo_has_one_vote_however_often_it_is_seen() -> None:
    rows = [("q1", "a", 0.5), ("q1", "b", 0.5), ("q2", "a", 0.5)]
    louder = [(query, item, value * (1000 if query == "q1" else 1)) for query, item, value in rows]
    assert as_dict(item_similarity(pairs_of(louder), 0)) == pytest.approx(as_dict(item_similarity(pairs_of(rows), 0)))


def test_items_are_not_alike_because_one_photos_clicks_hit_both() -> None:
    few = [("q0", "a", 0.5), ("q0", "b", 0.5)]
    many = [(f"p{photo}", item, 0.5) for photo in range(20) for item in "cd"]
    found = as_dict(item_similarity(pairs_of(few + many), 0.0, support=2.0))
    assert found["a", "b"] == pytest.approx(0.5 / 2.5)
    assert found["c", "d"] == pytest.approx(10 / 12)


def test_similarity_is_the_same_to_the_bit_however_threads_sum() -> None:
    rng = np.random.default_rng(5)
    names = {"query_id": rng.integers(0, 30_000, 200_000), "item_id": rng.integers(0, 15, 200_000)}
    pairs = pa.table({name: [f"{name[0]}{number:05}" for number in numbers] for name, numbers in names.items()})
    pairs = pairs.append_column("affinity", pa.array(rng.random(len(pairs)))).group_by(["query_id", "item_id"])
    pairs = pairs.aggregate([("affinity", "max")]).rename_columns(["query_id", "item_id", "affinity"])
    order = [("left", "ascending"), ("right", "ascending")]
    first = item_similarity(pairs, 0.0).sort_by(order)
    assert len(first) == 15 * 14 / 2
    again = item_similarity(pairs.take(rng.permutation(len(pairs))), 0.0).sort_by(order)
    assert again["similarity"].to_pylist() == first["similarity"].to_pylist()


@pytest.mark.parametrize("minimum", [0.0, 0.6])
def test_assign_queries_equals_the_naive_one(minimum: float) -> None:
    rows = random_pairs(4)
    class_of = {f"i{i:02}": i % 4 for i in range(11)}  # i11 is no item any more: it has no class
    items = pa.table({"item_id": list(class_of), "class_id": list(class_of.values())})
    sums = collections.defaultdict(collections.Counter)
    for query, item, value in rows:
        if item in class_of:
            sums[query][class_of[item]] += value
    expected = {}
    for query, found in sums.items():
        label = min(found, key=lambda key: (-found[key], key))
        if (share := found[label] / found.total()) >= minimum:
            expected[query] = (label, share)
    found = assign_queries(pairs_of(rows), items, minimum)
    assert found.schema.types == [pa.string(), pa.int64(), pa.float32()]
    assert found["query_id"].to_pylist() == sorted(expected)
    assert found["class_id"].to_pylist() == [expected[query][0] for query in sorted(expected)]
    assert found["confidence"].to_pylist() == pytest.approx([expected[query][1] for query in sorted(expected)])
    assert (len(found) < len(sums)) == (minimum > 0)


def two_products(noise: int = 0) -> Rows:
    """Twenty photos of apples click the four apples, twenty of milk the milks; `noise` photos also click across."""
    rows: Rows = []
    for photo, (product, other) in enumerate([("apple", "milk"), ("milk", "apple")] * 20):
        for listing in range(4):
            rows.append((f"q{photo:02}", f"{product}{listing}", listing, 20, 12, 0))
            rows.append((f"q{photo:02}", f"{other}{listing}", listing + 4, 20, 0, 0))
        if photo < noise:
            rows.append((f"q{photo:02}", f"{other}{photo % 4}", 8, 20, 6, 0))
    return rows


ITEMS = [f"{product}{listing}" for product in ("apple", "milk") for listing in range(4)]
APPLES, MILKS = frozenset(ITEMS[:4]), frozenset(ITEMS[4:])


@pytest.mark.parametrize("noise", [0, 1, 8])
def test_two_products_are_two_classes_in_spite_of_wrong_clicks(noise: int) -> None:
    labels = organise(counts_of(two_products(noise)), pa.array(ITEMS), FEW_ITEMS)
    assert groups(labels.items) == {APPLES, MILKS}
    class_of = dict(zip(*(column.to_pylist() for column in labels.items.columns), strict=True))
    queries = labels.queries.to_pylist()
    assert len(queries) == 40
    for query in queries:
        number = int(query["query_id"][1:])
        assert query["class_id"] == class_of["milk0" if number % 2 else "apple0"]
        # a photo with a wrong click is less sure of its class
        assert query["confidence"] == pytest.approx(1.0) if number >= noise else 0.5 < query["confidence"] < 0.99


def test_one_edge_does_not_chain_two_products() -> None:
    inside = [(*pair, 0.9) for group in (APPLES, MILKS) for pair in itertools.combinations(sorted(group), 2)]
    edges = [*inside, ("apple0", "milk0", 0.5)]
    similarity = pa.table(dict(zip(("left", "right", "similarity"), zip(*edges, strict=True), strict=True)))
    found = cluster_items(similarity, pa.array(ITEMS), FEW_ITEMS)
    assert groups(found) == {APPLES, MILKS}  # connected components would be one


def test_classes_are_numbered_by_their_smallest_item_and_hold_only_known_items() -> None:
    edges = [("b", "z", 0.9), ("c", "gone", 0.9)]
    similarity = pa.table(dict(zip(("left", "right", "similarity"), zip(*edges, strict=True), strict=True)))
    found = cluster_items(similarity, pa.array(["z", "c", "b", "a"]), FEW_ITEMS)
    assert found.to_pylist() == [
        {"item_id": "a", "class_id": 0},
        {"item_id": "b", "class_id": 1},
        {"item_id": "z", "class_id": 1},
        {"item_id": "c", "class_id": 2},
    ]


def test_an_item_that_nobody_clicked_is_a_class_of_its_own() -> None:
    labels = organise(counts_of(two_products()), pa.array([*ITEMS, "new", "also new"]), FEW_ITEMS)
    assert groups(labels.items) == {APPLES, MILKS, frozenset(["new"]), frozenset(["also new"])}


def test_photos_below_the_least_confidence_are_left_out() -> None:
    config = LabelingConfig(resolution=1.0, min_confidence=0.99)
    labels = organise(counts_of(two_products(8)), pa.array(ITEMS), config)
    assert labels.queries["query_id"].to_pylist() == [f"q{photo:02}" for photo in range(8, 40)]


@pytest.mark.parametrize("item_ids", [[], ["b", "a"]])
def test_without_logs_every_item_is_a_class(item_ids: list[str]) -> None:
    labels = organise(COUNTS.empty_table(), pa.array(item_ids, pa.string()), CONFIG)
    assert labels.items["item_id"].to_pylist() == sorted(item_ids)
    assert labels.items["class_id"].to_pylist() == list(range(len(item_ids)))
    assert labels.queries.num_rows == 0
    assert len(labels.examination) == 0


def test_without_clicks_no_photo_has_a_class() -> None:
    labels = organise(counts_of([("q", "a", 0, 5, 0, 0), ("q", "b", 1, 5, 0, 0)]), pa.array(["a", "b"]), CONFIG)
    assert groups(labels.items) == {frozenset("a"), frozenset("b")}
    assert labels.queries.num_rows == 0


def test_the_order_of_rows_and_columns_does_not_matter_to_the_last_bit() -> None:
    counts = simulated(np.random.default_rng(2).uniform(0, 0.5, (30, 20)), views=20)
    item_ids = pa.array([f"i{item}" for item in range(20)])
    first = organise(counts, item_ids, CONFIG)
    for seed in range(3):
        shuffled = counts.take(np.random.default_rng(seed).permutation(len(counts))).select(COUNTS.names[::-1])
        again = organise(shuffled, item_ids.take(pa.array(np.arange(20)[::-1])), CONFIG)
        assert again.items.equals(first.items)
        assert again.queries.equals(first.queries)
        assert np.array_equal(again.examination, first.examination)


def test_classes_do_not_depend_on_pythons_hash_seed() -> None:
    program = """
import itertools, pyarrow as pa
from mixer.labeling import LabelingConfig, cluster_items
edges = [(f"i{a:02}", f"i{b:02}", 0.3 + 0.1 * (a * b % 5))
         for a, b in itertools.combinations(range(40), 2) if (a * 7 + b * 3) % 9 == 0]
table = pa.table(dict(zip(("left", "right", "similarity"), zip(*edges))))
print(cluster_items(table, pa.array([f"i{a:02}" for a in range(40)]), LabelingConfig())["class_id"].to_pylist())
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
    for wrong in ({"min_similarity": 1.5}, {"em_round": 3}, {"prior_views": 0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            LabelingConfig(**wrong)
