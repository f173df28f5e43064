"""Embeddings on disk: versions of partitions, each a range of ids, sorted by id. An update's version lies on a base.

`embeddings/<version>/part-NNNNN.parquet` has the columns id, item_id, the display columns, embedding
(fixed_size_list<f32>), fingerprint (of what was embedded) and `__state`; an update's also `__replaces`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mixer_platform import versions
from mixer_platform.ahead import ahead
from mixer_platform.errors import StorageError
from mixer_platform.item_ids import Span, overlapping, span
from mixer_platform.storage import Storage

KIND = "embeddings"
FORM = 2  # of what is written; parts of another form are not gone on from
STATE = "__state"
WHOLE, TEXT_ONLY, LEFT_OUT, DELETED = "whole", "text only", "left out", "deleted"
REPLACES = "__replaces"  # in an update: whether the item was found in the index below
OWN = ("id", "embedding", "fingerprint", STATE, REPLACES)  # the columns that are not the item's
_SUMMARY = b"mixer"

Chain = Sequence[dict[str, Any]]  # manifests of embeddings, the newest first


def chain_of(storage: Storage, version: str) -> Chain:
    """Return the manifests of a version and of what it lies on, the newest first. Raises StorageError, of which
    MissingError where one of them is not there."""
    chain = [versions.require(storage, KIND, version)]
    while base := chain[-1].get("base"):
        chain.append(versions.require(storage, KIND, base))
    return chain


def use(storage: Storage, chain: Chain) -> None:
    """Mark embeddings as in use now, so that they are young to whoever collects garbage."""
    for each in chain:
        versions.use(storage, KIND, each["version"])


def part_key(version: str, number: int) -> str:
    """Return the key of one partition."""
    return f"{KIND}/{version}/part-{number:05d}.parquet"


def write_part(storage: Storage, version: str, number: int, rows: pa.Table, summary: dict[str, Any]) -> None:
    """Write a partition, whole or not at all, with what there is to say of it."""
    rows = rows.sort_by("id").replace_schema_metadata({_SUMMARY: json.dumps(summary).encode()})
    sink = pa.BufferOutputStream()
    repeating = [_leaf(field) for field in rows.schema if field.name != "embedding"]
    pq.write_table(rows, sink, compression="none", use_dictionary=repeating, write_page_checksum=True)
    storage.write(part_key(version, number), sink.getvalue().to_pybytes())


def _leaf(field: pa.Field) -> str:
    """Return the path by which Parquet knows the values of a column or of its lists."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name


def read_summaries(storage: Storage, version: str) -> dict[int, dict[str, Any]]:
    """Return what was said of each partition that is there, by its number."""
    found = {}
    for key in sorted(storage.list(f"{KIND}/{version}")):
        if key.endswith(".parquet"):
            with _opened(storage, key) as file:
                metadata = file.schema_arrow.metadata
            found[int(key.rpartition("-")[2].removesuffix(".parquet"))] = json.loads(metadata[_SUMMARY])
    return found


def check_finished(storage: Storage, version: str, before: Collection[int], after: Collection[int]) -> None:
    """Raise StorageError if partitions that were there when a run began are not there at its end."""
    if lost := sorted(set(before) - set(after)):
        address = f"{storage.uri}/{part_key(version, lost[0])}"
        raise StorageError(f"{address}: was deleted while this run went on from it; run again")


def read_rows(
    storage: Storage, chain: Chain, wanted: Span, columns: Sequence[str] | None = None, every_state: bool = False
) -> pa.Table | None:
    """Return the rows with ids in a range, sorted by id; of an item that was updated the newest one.

    Only what is found in an index, unless `every_state`. None if there are none.
    """
    needed = None if columns is None else list(dict.fromkeys([*columns, "id", STATE]))
    seen = np.zeros(0, np.int64)
    layers = []
    for manifest in chain:
        there = set(manifest["parts"])
        for number in overlapping(wanted, manifest["partitions"]):
            if number not in there:
                continue
            rows = _read_part(storage, manifest["version"], number, needed)
            ids = rows["id"].to_numpy()
            fresh = (ids >= wanted[0]) & (ids <= wanted[1]) & ~np.isin(ids, seen)
            layers.append(rows if fresh.all() else rows.filter(pa.array(fresh)))
        if layers and manifest is not chain[-1]:
            seen = np.concatenate([rows["id"].to_numpy() for rows in layers])
    if not layers:
        return None
    rows = pa.concat_tables(layers, promote_options="default")
    if len(chain) > 1:
        rows = rows.sort_by("id")
    if not every_state:
        found = pc.is_in(rows[STATE], pa.array([WHOLE, TEXT_ONLY]))
        rows = rows if pc.all(found).as_py() else rows.filter(found)
    return rows if columns is None else rows.select(list(columns))


def stream(
    storage: Storage,
    chain: Chain,
    wanted: Span,
    columns: Sequence[str] | None = None,
    every_state: bool = False,
    readers: int = 1,
) -> Iterator[pa.Table]:
    """Yield what `read_rows` returns, partition by partition, in order of id, while `readers` threads read the next."""
    parts = max(manifest["partitions"] for manifest in chain)

    def read(number: int) -> pa.Table | None:
        first, last = span(number, parts)
        return read_rows(storage, chain, (max(first, wanted[0]), min(last, wanted[1])), columns, every_state)

    with ThreadPoolExecutor(readers) as threads:
        for rows in ahead(threads, read, overlapping(wanted, parts), readers + 1):
            if rows is not None and len(rows):
                yield rows


def living(chain: Chain) -> int:
    """Return how many items the embeddings hold."""
    changes = chain[:-1]
    return chain[-1]["items"] + sum(each["items"] - each["replaced"] - each["deleted"] for each in changes)


def sample_of(storage: Storage, chain: Chain, dim: int, size: int, readers: int = 1) -> np.ndarray:
    """Return about `size` embeddings, never more, float32 [n, dim]. Ids are hashes: the lowest are a fair sample."""
    there = living(chain)
    share = (size + 6 * math.sqrt(size)) / max(1, there)  # six deviations of how many ids lie below
    last = int(share * 2**63) if share < 1 else 2**63 - 1
    # Filled as it is read: to touch new memory takes longer than to read a part.
    sample, filled = np.empty((min(size, there), dim), np.float32), 0
    for rows in stream(storage, chain, (0, last), ["embedding"], readers=readers):
        part = vectors(rows["embedding"])[: len(sample) - filled]
        sample[filled : filled + len(part)] = part
        filled += len(part)
        if filled == len(sample):
            break
    return sample[:filled]


def display_schema(storage: Storage, chain: Chain) -> pa.Schema:
    """Return the columns of the items themselves."""
    oldest = chain[-1]
    with _opened(storage, part_key(oldest["version"], oldest["parts"][0])) as file:
        return pa.schema([field for field in file.schema_arrow if field.name not in OWN])


def vectors(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return a column of embeddings as float32 [n, dim]."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column, pa.ChunkedArray):  # too large for one
        return np.concatenate([vectors(chunk) for chunk in column.chunks])
    return np.asarray(column.flatten(), np.float32).reshape(len(column), column.type.list_size)


def embedding_column(embedded: np.ndarray) -> pa.Array:
    """Return float32 [n, dim] as a column."""
    flat = pa.array(np.ascontiguousarray(embedded, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, embedded.shape[1])


def _read_part(storage: Storage, version: str, number: int, columns: list[str] | None) -> pa.Table:
    with _opened(storage, part_key(version, number)) as file:
        return file.read(columns).replace_schema_metadata()


@contextmanager
def _opened(storage: Storage, key: str) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(storage.path(key), filesystem=storage.filesystem, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        damaged = isinstance(error, pa.ArrowInvalid) or "checksum" in reason
        mend = "delete that version's folder and build again" if damaged else "run again once the storage answers"
        raise StorageError(f"{storage.uri}/{key}: cannot be read ({reason}); {mend}") from error
