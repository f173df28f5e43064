"""What is wrong with rows that only other rows can show. Pure functions over Arrow batches."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixer.images import UnreadableImage, decode
from mixer_platform.errors import MissingError
from mixer_platform.inputs import IMAGE, OTHERS, RAW, REASON, in_one_order, unmarked
from mixer_platform.rows import to_dicts
from mixer_platform.storage import read_uri

_FIRST = "__first"  # what rows of a key are sorted by
QUARANTINE = pa.schema([("table", pa.string()), ("reason", pa.string()), ("raw", pa.string())])


def mark_repeats(batch: pa.Table, key: str) -> pa.Table:
    """Mark all but one of the sound rows with the same `key`. All rows of a key must be in the batch.

    The one is the index's, and the same one in whatever order they come.
    """
    reasons = pc.fill_null(pc.cast(batch[REASON], pa.string()), "")  # sound rows first, so that one stays
    ordered = in_one_order(batch.append_column(_FIRST, reasons), [key, _FIRST]).drop_columns(_FIRST)
    codes = pc.dictionary_encode(ordered[key], null_encoding="encode").combine_chunks().indices.to_numpy()
    again = np.diff(codes, prepend=-1) == 0
    return mark(ordered, pa.array(again), f"{key} is repeated")


def mark_references(batch: pa.Table, key: str, state: str) -> pa.Table:
    """Mark sound rows by what a join said of the row that `key` names, and drop the column `state`.

    The reason tells the other row's reason too.
    `state` is null where nothing was found, empty where the row is sound, else the reason why it is not.
    """
    found = batch[state]
    batch = mark(batch, pc.is_null(found), f"{key} is unknown")
    because = pc.binary_join_element_wise(f"{key} is in quarantine", pc.cast(found, pa.string()), ": ")
    batch = mark(batch, pc.not_equal(found, ""), because)
    return batch.drop_columns(state)


def mark_others(batch: pa.Table, key: str, values: pa.Array, reason: str) -> pa.Table:
    """Mark sound rows whose `key` is not among `values`."""
    return mark(batch, pc.invert(pc.is_in(pc.cast(batch[key], values.type), values)), reason)


def mark_robots(batch: pa.Table, clicks: int) -> pa.Table:
    """Mark sound rows of sessions with at least `clicks` sound clicks. All rows of a session must be in the batch."""
    clicked = pc.and_(pc.is_null(batch[REASON]), pc.equal(batch["event"], "click"))
    codes = pc.dictionary_encode(batch["session_id"], null_encoding="encode").combine_chunks().indices.to_numpy()
    counts = np.bincount(codes, pc.fill_null(clicked, False).to_numpy())
    return mark(batch, pa.array(counts[codes] >= clicks), "session is a robot's")


def mark_pictures(batch: pa.Table, min_side: int) -> pa.Table:
    """Mark sound rows whose picture cannot be read or decoded; a null picture is no fault."""
    sound = pc.is_null(batch[REASON]).to_pylist()
    uris = [uri if ok else None for uri, ok in zip(batch[IMAGE].to_pylist(), sound, strict=True)]
    with ThreadPoolExecutor(8) as threads:  # pictures may be far away
        reasons = pa.array(threads.map(partial(_picture_fault, min_side=min_side), uris), pa.string())
    return _set_reason(batch, pc.coalesce(batch[REASON], reasons))


def mark(batch: pa.Table, bad: pa.Array | pa.ChunkedArray, reason: str | pa.ChunkedArray) -> pa.Table:
    """Give `reason`, or each its own, to the rows that are `bad` (null counts as not) and have none yet."""
    first = pc.and_(pc.is_null(batch[REASON]), pc.fill_null(bad, False))
    return _set_reason(batch, pc.if_else(first, reason, pc.cast(batch[REASON], pa.string())))


def quarantined(batch: pa.Table, table: str) -> pa.Table:
    """Return the marked rows as QUARANTINE; a row that came with no raw text is written from its columns."""
    bad = batch.filter(pc.is_valid(batch[REASON]))
    others = bad[OTHERS].to_pylist() if OTHERS in bad.column_names else [None] * len(bad)
    given = zip(bad[RAW].to_pylist(), to_dicts(unmarked(bad)), others, strict=True)
    raw = [text or json.dumps(row | json.loads(more or "{}"), default=str) for text, row, more in given]
    columns = [pa.array([table] * len(raw), pa.string()), pc.cast(bad[REASON], pa.string()), pa.array(raw, pa.string())]
    return pa.table(columns, schema=QUARANTINE)


def sound(batch: pa.Table) -> pa.Table:
    """Return the rows with no reason against them; their `image` is the picture's absolute URI."""
    batch = batch.filter(pc.is_null(batch[REASON]))
    if IMAGE in batch.column_names:
        batch = batch.set_column(batch.column_names.index("image"), "image", batch[IMAGE])
    return unmarked(batch)


def _set_reason(batch: pa.Table, reasons: pa.Array | pa.ChunkedArray) -> pa.Table:
    return batch.set_column(batch.column_names.index(REASON), REASON, reasons)


def _picture_fault(uri: str | None, min_side: int) -> str | None:
    if uri is None:
        return None
    try:
        decode(read_uri(uri), min_side)
    except MissingError as error:
        why = str(error).rpartition(": ")[2]  # without the address, so that equal faults are counted together
        return f"picture cannot be read: {why}"
    except UnreadableImage as error:
        return str(error)
    return None
