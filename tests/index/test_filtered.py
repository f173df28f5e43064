"""Filters inside the search: what comes back is what a brute-force search of the rows that pass would find."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mixer.fast_faiss import faiss
from mixer_platform import segment as segments
from mixer_platform.attributes import merge_attributes
from mixer_platform.filters import Filter, parse_filter
from mixer_platform.gallery import MISSING, Shard
from mixer_platform.index.choose import exact_top_k
from mixer_platform.index.segments import trained_template, write_delta
from mixer_platform.item_ids import assign_ids
from tests.index.test_segments import DIM, deletions, load, rows, unit, write

ITEMS = 3000
KINDS = ["Flat", "IVF32,Flat", "IVF32,SQ8", "IVF32,PQ8x4fs,Refine(SQ8)", "HNSW16", "HNSW16,SQ8", "OPQ4_16,IVF32,PQ4x4"]
LEAST = {"nprobe": 1, "efSearch": 16, "k_factor": 1}  # work: what they find is then filtered hardest
BRANDS = np.array(["large", "small", "tiny"])


def shop(item_ids: list[str], vectors: np.ndarray, version: int = 0, replaces: bool | None = None) -> pa.Table:
    """Return rows with attributes that follow from the item: one item in 20 is small, one in 500 tiny."""
    table = rows(item_ids, vectors, version, replaces)
    numbers = np.array([int(each.partition("-")[2]) for each in table["item_id"].to_pylist()], int)
    brand = BRANDS[np.where(numbers % 500 == 1, 2, np.where(numbers % 20 == 0, 1, 0))]
    for name, values in (("price", pa.array(numbers / 2)), ("brand", pa.array(brand, pa.string()))):
        table = table.add_column(3, name, values)
    return table


class Truth:
    """A shard with an update on it, and the vectors of all that is in it."""

    def __init__(self, folder: Path, factory: str, search: dict[str, int]) -> None:
        rng = np.random.default_rng(7)
        names, vectors, changed = [f"item-{n}" for n in range(ITEMS)], unit(rng, ITEMS), unit(rng, 300)
        base = write(folder, "a", trained_template(factory, DIM, vectors), shop(names, vectors))
        (folder / "b").mkdir()
        parts = [shop(names[:300], changed, 1, True), deletions(names[300:600])]
        changes = pa.concat_tables(parts, promote_options="default").sort_by("id")
        delta, growth = write_delta(folder / "b", "b", "shard-00000", DIM, [changes])
        self.shard: Shard = load(folder, [base, delta], ITEMS + growth, search)
        living = [*range(300), *range(600, ITEMS)]
        self.ids = assign_ids([names[n] for n in living], {})
        self.vectors = self.shard.vectors(self.ids)  # as the index knows them
        self.table = self.shard.rows(self.ids)
        self.queries = unit(rng, 12)

    def search(self, k: int, where: Filter) -> tuple[np.ndarray, np.ndarray]:
        passing = where.mask(self.table)
        return exact_top_k(self.queries, self.vectors[passing], self.ids[passing], k)


@pytest.fixture(scope="module", params=KINDS)
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(tmp_path_factory.mktemp("index"), request.param, LEAST)


@pytest.mark.parametrize(
    ("raw", "exact"),
    [
        ({"brand": "tiny"}, True),  # taken out
        ({"brand": ["small", "tiny"], "price": {"lt": 900}}, False),
        ({"brand": "large"}, False),
        ({"price": {"gte": 1400}}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("k", [1, 10, 500])
def test_a_filtered_search_finds_what_passes(truth: Truth, raw: dict, exact: bool, k: int) -> None:
    where = parse_filter(raw, truth.shard.schema)
    wanted_scores, wanted = truth.search(k, where)
    scores, ids = truth.shard.search(truth.queries, k, where)
    full = min(k, int(where.mask(truth.table).sum()))
    assert ids.shape == (12, k)
    assert ((ids != MISSING).sum(axis=1) == full).all()
    assert np.isin(ids[:, :full], truth.ids[where.mask(truth.table)]).all()
    assert (np.diff(scores[:, :full], axis=1) <= 0).all()
    assert all(len(set(row)) == full for row in ids[:, :full].tolist())
    if exact:
        np.testing.assert_array_equal(ids[:, :full], wanted)
        np.testing.assert_allclose(scores[:, :full], wanted_scores, atol=1e-5)


@pytest.mark.parametrize("raw", [{"brand": "tiny"}, {"brand": "small"}, {"brand": "large"}, {"price": {"gte": 1400}}])
@pytest.mark.parametrize("factory", ["Flat", "IVF32,Flat", "HNSW32", "IVF32,PQ8x4fs,Refine(SQ8)"])
def test_with_enough_work_nothing_is_overlooked(tmp_path: Path, factory: str, raw: dict) -> None:
    truth = Truth(tmp_path, factory, {"nprobe": 32, "efSearch": 3000, "k_factor": 64})
    where = parse_filter(raw, truth.shard.schema)
    wanted = truth.search(10, where)[1]
    found = truth.shard.search(truth.queries, 10, where)[1]
    shared = [len(np.intersect1d(a, b)) for a, b in zip(found, wanted, strict=True)]
    assert np.mean(shared) >= 0.99 * wanted.shape[1]


def test_bitmaps_are_kept_within_bounds_and_shared_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Truth(tmp_path, "Flat", {})
    monkeypatch.setattr(segments, "_CACHED_BYTES", 5000)
    filters = [parse_filter({"price": {"lt": n}}, truth.shard.schema) for n in range(1, 1500, 150)] * 3
    wanted = [truth.search(5, where)[1] for where in filters]

    def search(where: Filter) -> np.ndarray:
        return truth.shard.search(truth.queries, 5, where)[1]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(search, filters))
    for got, right in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got[:, : right.shape[1]], right)
    for segment in truth.shard.segments:
        kept = segment._filtered
        assert 0 < len(kept) < 5
        assert segment._filtered_bytes == sum(segments._size(*each) for each in kept.items()) <= 5000


def test_pages_do_not_depend_on_how_deep_they_were_searched(tmp_path: Path) -> None:
    """Equal scores are in the order of ids, so that the second page begins where the first ends."""
    same = np.repeat(unit(np.random.default_rng(1), 2), 40, axis=0)
    table = rows([f"item-{n}" for n in range(80)], same)
    shard = load(tmp_path, [write(tmp_path, "v", trained_template("Flat", DIM, same), table)], 80, {})
    whole = shard.search(same[:1], 80)[1]
    np.testing.assert_array_equal(whole[0, :40], np.sort(whole[0, :40]))
    for k in (1, 7, 39, 41, 79):
        np.testing.assert_array_equal(shard.search(same[:1], k)[1], whole[:, :k])


def test_rows_and_vectors_come_in_the_order_asked(tmp_path: Path) -> None:
    truth = Truth(tmp_path, "Flat", {})
    asked = truth.ids[[5, 299, 5, 300, 2000]]
    gone = assign_ids(["item-300", "nobody"], {})
    table = truth.shard.rows(np.concatenate([gone, asked]))
    assert table["item_id"].to_pylist() == ["item-5", "item-299", "item-5", "item-600", "item-2300"]
    assert table["id"].to_pylist() == asked.tolist()
    assert table["title"].to_pylist() == ["item-5 1", "item-299 1", "item-5 1", "item-600 0", "item-2300 0"]
    vectors = truth.shard.vectors(np.concatenate([gone, asked]))
    assert vectors.shape == (7, DIM)
    assert not vectors[:2].any()
    np.testing.assert_array_equal(vectors[2], vectors[4])
    np.testing.assert_array_equal(vectors[2], truth.shard.vector("item-5"))
    assert truth.shard.items(gone) == [{}, {}]
    assert truth.shard.rows(gone).schema == truth.shard.schema


def test_segments_that_differ_in_columns_are_one_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, update = rows(["a", "b"], unit(rng, 2)), rows(["c", "d"], unit(rng, 2), replaces=False)
    for name, values in (("price", [1, 2]), ("brand", pa.nulls(2)), ("size", [1, None]), ("old", ["x", None])):
        base = base.append_column(name, pa.array(values) if isinstance(values, list) else values)
    for name, values in (("price", [2.5, None]), ("brand", ["y", "y"]), ("size", ["S", None]), ("new", [True, None])):
        update = update.append_column(name, pa.array(values))
    first = write(tmp_path, "a", trained_template("Flat", DIM, unit(rng, 9)), base)
    (tmp_path / "b").mkdir()
    second, _ = write_delta(tmp_path / "b", "b", "shard-00000", DIM, [update])
    shard = load(tmp_path, [first, second], 4, {})
    table = shard.rows(assign_ids(list("acbd"), {})).drop_columns(["id", "title"])
    assert table.to_pydict() == {
        "item_id": ["a", "c", "b", "d"],
        "price": [1, 2.5, 2, None],
        "brand": [None, "y", None, "y"],
        "size": ["1", "S", None, None],
        "old": ["x", None, None, None],
        "new": [None, True, None, None],
    }
    found = shard.search(unit(rng, 1), 4, parse_filter({"price": {"gte": 2}}, shard.schema))[1]
    assert sorted(item["item_id"] for item in shard.items(found[0][found[0] != MISSING])) == ["b", "c"]
    said = {each["name"]: each for each in merge_attributes([shard.attributes()])}
    assert list(said) == ["title", "price", "brand", "size", "old", "new"]
    assert said["price"] == {"name": "price", "kind": "number", "values": None, "min": 1, "max": 2.5}
    assert said["brand"] == {"name": "brand", "kind": "text", "values": ["y"], "min": None, "max": None}
    assert said["size"]["kind"] == "text"
    assert said["new"] == {"name": "new", "kind": "boolean", "values": None, "min": None, "max": None}


def test_attributes_are_those_of_what_is_found(tmp_path: Path) -> None:
    truth = Truth(tmp_path, "Flat", {})
    said = {each["name"]: each for each in merge_attributes([truth.shard.attributes()] * 2)}
    assert said["title"] == {"name": "title", "kind": "text", "values": None, "min": None, "max": None}
    assert said["brand"]["values"] == ["large", "small", "tiny"]
    assert (said["price"]["min"], said["price"]["max"]) == (0, (ITEMS - 1) / 2)
    counted = {each.name: each for each in truth.shard.attributes()}["brand"]
    living = truth.table["brand"].to_pylist()
    assert counted.texts == {brand: living.count(brand) for brand in BRANDS.tolist()}


def test_what_faiss_keeps_of_a_selector_lives_as_long_as_it(tmp_path: Path) -> None:
    passing = segments.Passing.of(np.arange(100) % 3 == 0)
    index = faiss.IndexFlatIP(DIM)
    index.add(unit(np.random.default_rng(0), 100))
    found = index.search(unit(np.random.default_rng(1), 1), 100, params=faiss.SearchParameters(sel=passing.selector))[1]
    assert set(found[0].tolist()) == {*range(0, 100, 3), MISSING}
    assert passing.rows().tolist() == list(range(0, 100, 3))
