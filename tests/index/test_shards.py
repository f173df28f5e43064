"""Shards together are one index."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from mixer_platform.errors import StorageError
from mixer_platform.gallery import MISSING, Shard, merge_top_k
from mixer_platform.index import shards as sharding
from mixer_platform.index.job import _first_of_each
from mixer_platform.index.shards import (
    assign_ids,
    exact_top_k,
    factory_for,
    shard_of,
    trained_template,
    training_size,
    write_shard,
)
from mixer_platform.inputs import REASON

DIM = 16


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_the_union_of_shards_returns_what_one_index_would(tmp_path: Path, factory: str) -> None:
    rng = np.random.default_rng(0)
    vectors, queries, shards = unit(rng, 400), unit(rng, 20), 3
    item_ids = [f"item-{number}" for number in range(400)]
    template = trained_template(factory, DIM, vectors)
    search = {"nprobe": 4} if factory.startswith("IVF") else {}
    placed = np.array([shard_of(item_id, shards) for item_id in item_ids])
    found, id_of = [], {}
    for number in range(shards):
        rows = np.flatnonzero(placed == number)
        table = pa.table({"item_id": [item_ids[row] for row in rows], "title": [f"title {row}" for row in rows]})
        entry, _, ids = write_shard(tmp_path, number, template, vectors[rows], table, shards)
        id_of |= {item_ids[row]: identity for row, identity in zip(rows, ids, strict=True)}
        shard = Shard(tmp_path, entry, search)
        assert shard.rows["id"].to_pylist() == sorted(shard.rows["id"].to_pylist())
        first = item_ids[rows[0]]
        np.testing.assert_allclose(shard.vector(first), vectors[rows[0]], atol=1e-6)
        assert shard.vector("nobody") is None
        assert shard.items(np.array([id_of[first]])) == [{"item_id": first, "title": f"title {rows[0]}"}]
        found.append(shard.search(queries, 10))
    scores, ids = merge_top_k(found, 10)
    all_ids = np.array([id_of[item_id] for item_id in item_ids])
    assert len(set(all_ids)) == 400
    wanted_scores, wanted_ids = exact_top_k(queries, vectors, all_ids, 10)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-5)


def test_short_shards_are_padded_and_padding_never_wins() -> None:
    lone = (np.array([[0.5, -3e38]], np.float32), np.array([[7, MISSING]]))
    other = (np.array([[0.1, -0.2]], np.float32), np.array([[9, 8]]))
    scores, ids = merge_top_k([lone, other], 3)
    assert ids.tolist() == [[7, 9, 8]]
    assert scores[0, 0] == np.float32(0.5)


def test_ids_are_stable_and_colliding_items_part_within_their_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = assign_ids(["a"], 4)[0]
    assert alone == assign_ids(["b", "a"], 4)[1]
    monkeypatch.setattr(sharding, "_hash", lambda item_id: 42)
    ids = assign_ids(["b", "a", "c"], 4)
    assert len(set(ids.tolist())) == 3
    assert ids[1] == 42, "the first in order of item_id keeps its hash"
    assert set(ids % 4) == {42 % 4}


def test_a_flipped_byte_and_a_missing_file_are_refused_by_name(tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(1), 5)
    table = pa.table({"item_id": list("abcde")})
    entry, _, _ = write_shard(tmp_path, 0, trained_template("Flat", DIM, vectors), vectors, table, 1)
    path = tmp_path / "shard-00000.arrow"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StorageError, match=r"shard-00000\.arrow: not the bytes"):
        Shard(tmp_path, entry, {})
    path.unlink()
    with pytest.raises(StorageError, match=r"shard-00000\.arrow: missing"):
        Shard(tmp_path, entry, {})


def test_the_kind_of_index_follows_size_and_wish() -> None:
    assert factory_for(1_000, "auto") == "Flat"
    assert factory_for(1_000_000, "auto") == "IVF4000,Flat"
    assert factory_for(10, "IVF2,SQ8") == "IVF2,SQ8"
    assert training_size("IVF100,Flat") == 6400


def test_a_factory_that_faiss_refuses_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="FAISS refuses 'Nonsense'"):
        trained_template("Nonsense", DIM, np.zeros((10, DIM), np.float32))


def test_an_ivf_template_is_empty_and_trained() -> None:
    index = faiss.deserialize_index(trained_template("IVF4,Flat", DIM, unit(np.random.default_rng(2), 200)))
    assert index.is_trained
    assert index.ntotal == 0


def test_of_repeated_items_a_sound_one_stays() -> None:
    batch = pa.table({"item_id": ["a", "a", "b", "b"], REASON: [None, "title is broken", "x", "y"], "n": [0, 1, 2, 3]})
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        kept = _first_of_each(batch.take(order))
        assert kept.to_pylist() == [{"item_id": "a", REASON: None, "n": 0}, {"item_id": "b", REASON: "x", "n": 2}]
