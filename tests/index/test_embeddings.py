"""Embeddings on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixer_platform.errors import StorageError
from mixer_platform.index import embeddings
from mixer_platform.index.embeddings import STATE, WHOLE, embedding_column, part_key, sample_of, stream, write_part
from mixer_platform.item_ids import span
from mixer_platform.storage import Storage, open_storage

PARTITIONS = 4


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def write(storage: Storage, rows_each: int = 3) -> list[dict]:
    """Write embeddings of a few items with tags; return their chain."""
    for number in range(PARTITIONS):
        first, _ = span(number, PARTITIONS)
        ids = first + np.arange(rows_each)
        columns = {"id": ids, "item_id": [str(each) for each in ids], "tags": [["red", "new"]] * rows_each}
        rows = pa.table({**columns, STATE: [WHOLE] * rows_each})
        vectors = np.arange(rows_each * 8, dtype=np.float32).reshape(rows_each, 8) + number
        write_part(storage, "v", number, rows.append_column("embedding", embedding_column(vectors)), {})
    return [{"version": "v", "partitions": PARTITIONS, "parts": list(range(PARTITIONS)), "items": 4 * rows_each}]


def test_what_repeats_has_a_dictionary_and_vectors_have_none(storage: Storage) -> None:
    write(storage)
    group = pq.read_metadata(storage.path(part_key("v", 0))).row_group(0)
    columns = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
    assert "RLE_DICTIONARY" in columns["tags.list.element"].encodings
    assert "RLE_DICTIONARY" in columns["item_id"].encodings
    assert "RLE_DICTIONARY" not in columns["embedding.list.element"].encodings


def test_a_stream_yields_partitions_in_order_of_id(storage: Storage) -> None:
    found = list(stream(storage, write(storage), span(0, 1), ["id", "embedding"]))
    assert [len(rows) for rows in found] == [3] * PARTITIONS
    ids = pa.concat_tables(found)["id"].to_numpy()
    assert (np.diff(ids) > 0).all()
    assert [embeddings.vectors(rows["embedding"])[0, 0] for rows in found] == [0, 1, 2, 3]


def test_a_damaged_partition_is_named_after_those_before_it(storage: Storage) -> None:
    chain = write(storage)
    Path(storage.path(part_key("v", 2))).write_bytes(b"PAR1")
    found = stream(storage, chain, span(0, 1))
    assert [len(next(found)), len(next(found))] == [3, 3]
    with pytest.raises(StorageError, match="part-00002"):
        next(found)


@pytest.mark.parametrize("size", [1, 4, 12, 50])
def test_a_sample_is_of_the_lowest_ids_and_no_larger_than_all(storage: Storage, size: int) -> None:
    chain = write(storage)
    everything = [embeddings.vectors(rows["embedding"]) for rows in stream(storage, chain, span(0, 1))]
    sample = sample_of(storage, chain, 8, size, readers=2)
    assert sample.dtype == np.float32
    np.testing.assert_array_equal(sample, np.concatenate(everything)[:size])


def test_a_sample_reads_only_the_partitions_that_it_needs(storage: Storage) -> None:
    chain = write(storage, rows_each=3000)
    Path(storage.path(part_key("v", 3))).unlink()
    assert len(sample_of(storage, chain, 8, 3000)) == 3000
