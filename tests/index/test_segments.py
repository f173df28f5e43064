"""Segments and shards: together they are one index, whatever kind it is and whatever was changed since."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mixer.fast_faiss import faiss
from mixer.metrics import recall_of_neighbours
from mixer_platform.errors import StorageError
from mixer_platform.gallery import MISSING, SegmentEntry, Shard, ShardEntry, merge_top_k
from mixer_platform.index.choose import exact_top_k, sweep
from mixer_platform.index.embeddings import DELETED, REPLACES, STATE, WHOLE, embedding_column
from mixer_platform.index.segments import (
    bytes_per_vector,
    new_index,
    trained_template,
    write_delta,
    write_segment,
)
from mixer_platform.item_ids import assign_ids, part_of

DIM = 16
KINDS = ["Flat", "SQ8", "HNSW16", "HNSW16,SQ8", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ8x4fs,Refine(SQ8)"]
KINDS += ["IVF4,RaBitQ,Refine(SQ8)", "IVF4,RaBitQfs,Refine(SQ4)", "OPQ4_16,IVF4,PQ4x4", "IVF4,SQ4"]
WIDE = {"nprobe": 4, "efSearch": 400, "k_factor": 64}


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows(item_ids: list[str], vectors: np.ndarray, version: int = 0, replaces: bool | None = None) -> pa.Table:
    """Return rows of embeddings as the embedding job writes them, in order of id."""
    titles, states = [f"{each} {version}" for each in item_ids], [WHOLE] * len(item_ids)
    columns = {"item_id": item_ids, "title": titles, STATE: states}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    table = table.add_column(0, "id", pa.array(assign_ids(item_ids, {})))
    table = table.append_column("embedding", embedding_column(vectors))
    if replaces is not None:
        table = table.append_column(REPLACES, pa.array([replaces] * len(item_ids), pa.bool_()))
    return table.sort_by("id")


def deletions(item_ids: list[str], found: bool = True) -> pa.Table:
    table = rows(item_ids, np.zeros((len(item_ids), DIM), np.float32), replaces=found)
    place = table.column_names.index(STATE)
    return table.set_column(place, STATE, pa.array([DELETED] * len(item_ids), pa.string()))


def load(folder: Path, segments: list[SegmentEntry], count: int, search: dict[str, int], mapped: bool = False) -> Shard:
    entry = ShardEntry(name="shard-00000", count=count, segments=segments)
    return Shard({part.version: folder / part.version for part in segments}, entry, search, mapped=mapped)


def write(folder: Path, version: str, template: np.ndarray, table: pa.Table, name: str = "shard-00000") -> SegmentEntry:
    (folder / version).mkdir(exist_ok=True)
    return write_segment(folder / version, version, name, template, [table])[0]


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_the_union_of_shards_returns_what_one_index_would(tmp_path: Path, factory: str) -> None:
    rng = np.random.default_rng(0)
    vectors, queries, shards = unit(rng, 400), unit(rng, 20), 3
    table = rows([f"item-{number}" for number in range(400)], vectors)
    ids = table["id"].to_numpy()
    template = trained_template(factory, DIM, vectors)
    found = []
    for number in range(shards):
        mine = pa.array([part_of(int(each), shards) == number for each in ids])
        part = write(tmp_path, "v", template, table.filter(mine), f"shard-{number:05d}")
        shard = load(tmp_path, [part], part.rows, WIDE)
        assert shard.item_ids() == table.filter(mine)["item_id"].to_pylist()
        found.append(shard.search(queries, 10))
    scores, best = merge_top_k(found, 10)
    in_order = np.stack([np.asarray(each) for each in table["embedding"].to_pylist()]).astype(np.float32)
    wanted_scores, wanted = exact_top_k(queries, in_order, ids, 10)
    np.testing.assert_array_equal(best, wanted)
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("factory", KINDS)
def test_every_kind_hides_what_was_replaced_or_deleted(tmp_path: Path, factory: str, mapped: bool) -> None:
    rng = np.random.default_rng(1)
    names, old, new = [f"item-{number}" for number in range(300)], unit(rng, 300), unit(rng, 40)
    base = write(tmp_path, "a", trained_template(factory, DIM, old), rows(names, old))
    shard = load(tmp_path, [base], 300, WIDE, mapped)
    np.testing.assert_allclose(
        shard.vector("item-7"), old[7], atol=0.6 if "PQ" in factory or "RaBitQ" in factory else 0.1
    )
    (tmp_path / "b").mkdir()
    changed = pa.concat_tables(
        [
            rows(names[:30], new[:30], 1, replaces=True),
            rows([f"new-{number}" for number in range(10)], new[30:], 1, replaces=False),
            deletions(names[30:60]),
        ]
    ).sort_by("id")
    delta, growth = write_delta(tmp_path / "b", "b", "shard-00000", DIM, [changed])
    assert growth == 10 - 30
    shard = load(tmp_path, [base, delta], 280, WIDE, mapped)
    living = [*names[:30], *(f"new-{number}" for number in range(10)), *names[60:]]
    assert sorted(shard.item_ids()) == sorted(living)
    scores, ids = shard.search(unit(rng, 15), 280)
    for row in ids:
        found = [item["item_id"] for item in shard.items(row[row != MISSING])]
        assert set(found) <= set(living)
        assert len(found) == len(set(found))
        assert len(found) > 250 or "RaBitQ" in factory or "HNSW" in factory
    assert (np.diff(scores, axis=1) <= 1e-6).all()
    assert shard.items(assign_ids(["item-3", "item-100"], {})) == [
        {"item_id": "item-3", "title": "item-3 1"},
        {"item_id": "item-100", "title": "item-100 0"},
    ]
    np.testing.assert_allclose(shard.vector("item-3"), new[3], atol=1e-6)
    assert shard.vector("item-40") is None
    assert shard.vector("nobody") is None


def test_random_changes_and_compactions_find_what_a_fresh_build_would(tmp_path: Path) -> None:
    """10,000 random additions, changes and deletions in random batches, compacted now and then."""
    rng = np.random.default_rng(2)
    template = trained_template("Flat", DIM, unit(rng, 64))
    truth: dict[str, np.ndarray] = {}
    segments: list[SegmentEntry] = []
    operations = version = 0
    while operations < 10_000:
        version += 1
        size = int(rng.integers(1, 400))
        touched = sorted({f"item-{number}" for number in rng.integers(0, 1500, size)})  # sets differ from run to run
        gone = sorted(item for item in touched if rng.random() < 0.4 and item in truth)
        kept = sorted(set(touched) - set(gone))
        vectors = unit(rng, len(kept))
        folder = tmp_path / f"v{version}"
        folder.mkdir()
        fresh, old = [item for item in kept if item not in truth], [item for item in kept if item in truth]
        by_item = dict(zip(kept, vectors, strict=True))
        stacked = [np.stack([by_item[item] for item in part]) if part else np.zeros((0, DIM)) for part in (fresh, old)]
        parts = [rows(fresh, stacked[0], version, False), rows(old, stacked[1], version, True), deletions(gone)]
        entry, _ = write_delta(folder, f"v{version}", "shard-00000", DIM, [pa.concat_tables(parts).sort_by("id")])
        segments.append(entry)
        truth |= by_item
        for item in gone:
            del truth[item]
        operations += len(touched)
        if rng.random() < 0.15:  # compaction
            names = list(truth)
            whole = rows(names, np.stack([truth[item] for item in names]), version)
            segments = [write(tmp_path, f"c{version}", template, whole)]
        if rng.random() < 0.3 or operations >= 10_000:
            shard = load(tmp_path, segments, len(truth), {})
            names = sorted(truth, key=lambda item: assign_ids([item], {})[0])
            queries, whole = unit(rng, 8), np.stack([truth[item] for item in names])
            wanted, _ = exact_top_k(queries, whole, np.array(names), 10)
            scores, ids = shard.search(queries, 10)
            found = [[item["item_id"] for item in shard.items(row)] for row in ids]
            assert all(len(set(row)) == 10 for row in found)
            # By their own scores, not by name: of two that differ in the last bit either may come first.
            theirs = [[query @ truth[item] for item in row] for query, row in zip(queries, found, strict=True)]
            np.testing.assert_allclose(theirs, wanted, atol=1e-6)
            np.testing.assert_allclose(scores, wanted, atol=1e-5)
    assert version > 30


def test_short_shards_are_padded_and_padding_never_wins() -> None:
    lone = (np.array([[0.5, -3e38]], np.float32), np.array([[7, MISSING]]))
    other = (np.array([[0.1, -0.2]], np.float32), np.array([[9, 8]]))
    scores, ids = merge_top_k([lone, other], 3)
    assert ids.tolist() == [[7, 9, 8]]
    assert scores[0, 0] == np.float32(0.5)


def test_an_empty_shard_finds_nothing(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(3), 64)
    (tmp_path / "v").mkdir()
    entry, index = write_segment(tmp_path / "v", "v", "shard-00000", trained_template("IVF4,SQ8", DIM, vectors), [])
    shard = load(tmp_path, [entry], 0, WIDE)
    assert shard.search(vectors[:2], 3)[1].tolist() == [[MISSING] * 3] * 2
    assert shard.vector("a") is None
    assert shard.items(np.array([], np.int64)) == []
    assert sweep(index, vectors[:4], np.zeros((4, 0), np.int64), 0.9)[0].found[1].tolist() == [[MISSING] * 10] * 4


def test_what_is_not_as_published_is_refused_by_name(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(4), 5)
    template = trained_template("Flat", DIM, vectors)
    entry = write(tmp_path, "v", template, rows(list("abcde"), vectors))
    with pytest.raises(StorageError, match="shard-00000: holds 5 items, not 6; publish the index again"):
        load(tmp_path, [entry], 6, {})
    for name in ("shard-00000.arrow", "shard-00000.faiss"):
        path = tmp_path / "v" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
        with pytest.raises(StorageError, match=rf"{name}: not the bytes that were published"):
            load(tmp_path, [entry], 5, {})
        path.unlink()
        with pytest.raises(StorageError, match=rf"{name}: missing"):
            load(tmp_path, [entry], 5, {})
        path.write_bytes(whole)
    other = write(tmp_path, "w", template, rows(list("abcdf"), vectors))
    (tmp_path / "w/shard-00000.arrow").write_bytes((tmp_path / "v/shard-00000.arrow").read_bytes())
    files = {**other.files, "shard-00000.arrow": entry.files["shard-00000.arrow"]}
    with pytest.raises(StorageError, match=r"shard-00000\.faiss: its ids are not those of shard-00000\.arrow"):
        load(tmp_path, [other.model_copy(update={"files": files})], 5, {})


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Nonsense", r"^FAISS refuses 'Nonsense': "),
        ("PQ4x4", r"^FAISS refuses 'PQ4x4': .*search params"),
        ("IVF4096,Flat", r"^FAISS refuses 'IVF4096,Flat': .*Number of training points \(300\) should be at least"),
        ("IVF4,PQ4x4fs", r"^FAISS refuses 'IVF4,PQ4x4fs': its rows cannot be read back; append ,RFlat$"),
    ],
)
def test_a_kind_that_faiss_refuses_is_one_clear_error(factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained_template(factory, DIM, unit(np.random.default_rng(5), 300))


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64,SQ8", "IVF64,PQ8x4fs,Refine(SQ8)", "OPQ8_16,IVF64,PQ8x4"])
def test_fewer_rounds_than_faiss_makes_find_lists_that_are_searched_as_well(factory: str) -> None:
    rng = np.random.default_rng(7)
    vectors = unit(rng, 200)[rng.integers(200, size=12_000)] + 0.2 * rng.standard_normal((12_000, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    sample, queries = vectors[: 64 * 64], vectors[-500:]
    exact = exact_top_k(queries, vectors, np.arange(len(vectors)), 10)[1]
    by_faiss, index = new_index(factory, DIM), faiss.deserialize_index(trained_template(factory, DIM, sample))
    by_faiss.train(sample)
    recalls = []
    for each in (by_faiss, index):
        each.add_with_ids(vectors, np.arange(len(vectors)))
        each_ivf = faiss.try_extract_index_ivf(each)
        each_ivf.nprobe = 4
        assert each_ivf.quantizer.ntotal == 64
        assert each_ivf.invlists.imbalance_factor() < 1.3
        recalls.append(recall_of_neighbours(each.search(queries, 10)[1], exact))
    assert recalls[1] > recalls[0] - 0.01


@pytest.mark.parametrize("factory", KINDS)
def test_a_vector_takes_the_memory_that_is_said(factory: str) -> None:
    vectors = unit(np.random.default_rng(6), 20_000)
    index = faiss.deserialize_index(trained_template(factory, DIM, vectors[:2000]))
    sizes = []
    for start in (0, 10_000):
        index.add_with_ids(vectors[start : start + 10_000], np.arange(start, start + 10_000))
        sizes.append(len(faiss.serialize_index(index)))
    assert (sizes[1] - sizes[0]) / 10_000 == pytest.approx(bytes_per_vector(new_index(factory, DIM)), rel=0.12)
