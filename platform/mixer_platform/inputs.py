"""Read an input table with Ray Data, conformed to the contract, broken rows marked and never dropped."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from mixer_platform.errors import InputError, MixerError, StorageError
from mixer_platform.item_ids import hash_of
from mixer_platform.rows import to_dicts
from mixer_platform.schema import (
    NO_COLUMNS,
    Table,
    broken_rows,
    check_attributes,
    check_schema,
    common_attributes,
    conform,
)
from mixer_platform.storage import LocalStorage, Storage, file_tag, open_storage, resolve_uri

REASON = "__reason"  # why a row is not used, null if it is
RAW = "__raw"  # a row that is broken by itself, as JSON
IMAGE = "__image"  # the picture's absolute URI
OTHERS = "__others"  # the columns that the contract does not know, as JSON: only quarantine needs them
_LINES_TOGETHER = 8192
_LOOKED_AT = 1000  # files of a folder that has a table's name beside that table: millions of pictures may lie there
_ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")
_LIKE_A_TABLE = re.compile(
    r"\.(parquet|jsonl?|ndjson|csv|tsv|avro|orc|feather|arrow)(\.(gz|zst|bz2|snappy|lz4|br|xz|zip))?$", re.IGNORECASE
)
_APART = re.compile(r"/[._]")  # what Spark, Hive and Delta keep beside a table


@dataclass(frozen=True)
class InputFiles:
    """The files of one input table, their common ending, and tags that change when they do.

    attributes: those of Parquet files, with types that all files share.
    """

    table: Table
    storage: Storage
    tags: dict[str, str]
    ending: str
    attributes: pa.Schema = NO_COLUMNS

    @property
    def paths(self) -> list[str]:
        return [self.storage.path(key) for key in self.tags]

    @property
    def pictures_root(self) -> str:
        """What relative picture paths are relative to: the parent of the file or folder."""
        return self.storage.uri


def find_input(data: str, table: Table) -> InputFiles:
    """Find `data/NAME.parquet|.jsonl[.gz]` or the files of `data/NAME/`. Raises InputError if there are none."""
    storage = _open_data(data)
    return _checked(table, storage, _table_tags(storage, table), f"{data}/{table.name}")


def find_optional(data: str, table: Table) -> InputFiles | None:
    """Find an input that may be absent. Raises InputError if it is there and cannot be used."""
    storage = _open_data(data)
    tags = _table_tags(storage, table)
    return _checked(table, storage, tags, f"{data}/{table.name}") if tags else None


def find_file(path: str, table: Table) -> InputFiles:
    """Take one named file as the input `table`. Raises InputError if it is not there."""
    root, _, name = path.rpartition("/")
    if not name.endswith(_ENDINGS):
        raise InputError(f"{path}: not a file of a kind that is read; expected {', '.join(_ENDINGS)}")
    storage = _open_data(root or ".")
    tag = storage.tag(name)
    return _checked(table, storage, {name: tag} if tag else {}, path)


def pictures_tag(files: InputFiles) -> int:
    """Return a number that changes when a picture that the table names on this machine does.

    Pictures of tables that are elsewhere are what their URI names: asking for each would cost a request.
    """
    if not isinstance(files.storage, LocalStorage):
        return 0
    tags = read_input(files).map_batches(_sum_of_tags, batch_format="pyarrow", batch_size=None)
    return sum(row["tag"] for row in tags.take_all())


def _sum_of_tags(batch: pa.Table) -> pa.Table:
    """A sum, so that neither blocks nor their order matter."""
    total = 0
    for uri in batch[IMAGE].to_pylist() if batch.num_rows else ():
        try:
            tag = "elsewhere" if uri is None or uri.startswith("s3://") else file_tag(Path(uri))
        except (OSError, ValueError):
            tag = "missing"
        total += int.from_bytes(hashlib.sha256(f"{uri} {tag}".encode()).digest()[:4])
    return pa.table({"tag": [total]})


def read_input(files: InputFiles, share: float = 1.0) -> ray.data.Dataset:
    """Return the rows with the contract's columns plus REASON and RAW.

    IMAGE is beside the picture column `image`, where the table has one; OTHERS is there where no attributes are kept.
    Of less than all rows, a `share` is drawn by the hash of their first column, or of a line: the same ones each time.
    """
    to_table = None if files.ending == ".parquet" else partial(_parse_lines, table=files.table)
    mark = partial(
        mark_rows, table=files.table, root=files.pictures_root, to_table=to_table, attributes=files.attributes
    )
    rows = _read(files)
    if share < 1:
        key = files.table.columns.names[0] if files.ending == ".parquet" else "line"
        rows = rows.map_batches(partial(_drawn, key=key, share=share), batch_format="pyarrow", batch_size=None)
    return rows.map_batches(mark, batch_format="pyarrow", batch_size=None)


def _drawn(batch: pa.Table, key: str, share: float) -> pa.Table:
    hashes = [hash_of(str(value)) for value in batch[key].to_pylist()]
    return batch.filter(pa.array(np.array(hashes, np.int64) < share * 2**63))


def count_rows(files: InputFiles) -> int:
    """Return how many rows the files hold: by Parquet's footers, or by the lines that are not empty."""
    if files.ending == ".parquet":
        return sum(pq.read_metadata(path, filesystem=files.storage.filesystem).num_rows for path in files.paths)
    return _read(files).count()


def _read(files: InputFiles) -> ray.data.Dataset:
    keys = [{"key": key} for key in files.tags]
    read = partial(read_parquet if files.ending == ".parquet" else read_lines, storage=files.storage)
    return ray.data.from_items(keys, override_num_blocks=len(keys)).map_batches(
        read, batch_format="pyarrow", batch_size=1
    )


def read_parquet(keys: pa.Table, storage: Storage) -> Iterator[pa.Table]:
    """Yield the rows of Parquet files.

    Raises InputError for a file that is broken behind its footer, StorageError for one that cannot be read.
    """
    for key in keys["key"].to_pylist():
        try:
            with pq.ParquetFile(storage.path(key), filesystem=storage.filesystem, pre_buffer=True) as file:
                for batch in file.iter_batches():
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(f"{storage.uri}/{key}", "Parquet file", error) from error


def read_lines(keys: pa.Table, storage: Storage) -> Iterator[pa.Table]:
    """Yield the lines of text files, binary and without empty ones.

    Raises InputError for a file that is cut off, StorageError for one that cannot be read.
    """
    for key in keys["key"].to_pylist():
        try:
            with storage.filesystem.open_input_stream(storage.path(key)) as stream:  # unpacks .gz
                lines = (line.rstrip(b"\r\n") for line in io.BufferedReader(stream) if line.strip())
                while some := list(itertools.islice(lines, _LINES_TOGETHER)):
                    yield pa.table({"line": pa.array(some, pa.binary())})
        except OSError as error:
            raise _unreadable(f"{storage.uri}/{key}", "file", error) from error


def mark_rows(  # type: ignore[no-untyped-def]
    batch: pa.Table, table: Table, root: str, to_table=None, attributes: pa.Schema = NO_COLUMNS
) -> pa.Table:
    """Conform a batch and say of each row why it is broken, keeping the row as it came (pure)."""
    lines = None
    if to_table is not None:
        batch, lines = to_table(batch)
    sound = conform(batch, table, attributes)
    reasons = broken_rows(sound, table)
    if lines is not None:
        reasons = pc.coalesce(lines[REASON], reasons)
    raw = [
        (lines[RAW][row].as_py() if lines is not None else _row_as_json(batch, row)) if reason else None
        for row, reason in enumerate(reasons.to_pylist())
    ]
    if "image" in sound.column_names:
        uris = [resolve_uri(uri, root) if uri else None for uri in sound["image"].to_pylist()]
        sound = sound.append_column(IMAGE, pa.array(uris, pa.string()))
    if not table.keep_others:
        sound = sound.append_column(OTHERS, _others(batch, table) if lines is None else lines[OTHERS])
    return sound.append_column(REASON, reasons).append_column(RAW, pa.array(raw, pa.string()))


def _row_as_json(batch: pa.Table, row: int) -> str:
    return json.dumps(to_dicts(batch.slice(row, 1))[0], default=str)


def unmarked(batch: pa.Table) -> pa.Table:
    """Return the rows without the columns that were put beside the table's own."""
    return batch.drop_columns([name for name in (REASON, RAW, IMAGE, OTHERS) if name in batch.column_names])


def in_one_order(batch: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Sort by `keys`, and rows that are equal in them by what else they say, whatever order they came in."""
    said = [name for name in ("title", "description", IMAGE) if name in batch.column_names]
    more = sorted(name for name in set(batch.column_names).difference(said, keys) if not name.startswith("__"))
    more = [name for name in more if _has_order(batch.schema.field(name).type)]
    return batch.sort_by([(name, "ascending") for name in (*keys, *said, *more)])


def _has_order(kind: pa.DataType) -> bool:
    numbers = pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind)
    times = pa.types.is_temporal(kind) and not pa.types.is_interval(kind)
    return numbers or times or pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _others(batch: pa.Table, table: Table) -> pa.Array:
    unknown = [name for name in batch.column_names if name not in table.columns.names]
    if not unknown:
        return pa.nulls(batch.num_rows, pa.string())
    return pa.array([json.dumps(row, default=str) for row in to_dicts(batch.select(unknown))], pa.string())


def _parse_lines(batch: pa.Table, table: Table) -> tuple[pa.Table, pa.Table]:
    """Parse JSON lines into columns; return them beside the lines as they came and what is wrong with each."""
    lines = batch["line"].to_pylist()
    rows = [_json_object(line) for line in lines]
    raw = [line.decode(errors="backslashreplace") for line in lines]
    reasons = [None if row is not None else "not a JSON object" for row in rows]
    names = dict.fromkeys(table.columns.names)
    if table.keep_others:
        names |= dict.fromkeys(name for row in rows for name in row or ())
    check_attributes(names, table, table.name)
    columns = {}
    for name in names:
        values = [(row or {}).get(name) for row in rows]
        if name not in table.columns.names:  # an attribute: one type over all rows and files
            texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
            columns[name] = pa.array(texts, pa.string())
            continue
        wanted = table.columns.field(name).type
        fitting = [value is None or _fits(value, wanted) for value in values]
        reasons = [
            reason if reason or fits else f"{name} is not of type {wanted}"
            for reason, fits in zip(reasons, fitting, strict=True)
        ]
        columns[name] = _json_column(
            [value if fits else None for value, fits in zip(values, fitting, strict=True)], wanted
        )
    unknown = [{name: value for name, value in (row or {}).items() if name not in names} for row in rows]
    others = [json.dumps(more) if more else None for more in unknown]
    kept = {REASON: reasons, RAW: raw, OTHERS: others}
    return pa.table(columns), pa.table({name: pa.array(texts, pa.string()) for name, texts in kept.items()})


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # of bytes it would take surrogates
        if b"\\ud" in line.lower():  # half a surrogate pair parses, but is no text
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # nested a thousand deep
        return None
    return row if isinstance(row, dict) else None


def _json_column(values: list[Any], wanted: pa.DataType) -> pa.Array:
    if not pa.types.is_integer(wanted):
        return pa.array(values, wanted)
    if any(isinstance(value, float) for value in values):
        return pa.array([value if value is None else float(value) for value in values], pa.float64())
    return pa.array(values, pa.int64())


def _fits(value: Any, wanted: pa.DataType) -> bool:
    if pa.types.is_string(wanted):
        return isinstance(value, str)
    if pa.types.is_list(wanted):
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _table_tags(storage: Storage, table: Table) -> dict[str, str]:
    """Return the tags of a table's files, none if there are none.

    Raises InputError for parts of it in a folder that are not of a form that is read, and where there is a file too: of
    the folder beside one, only the first files are looked at.
    """
    names = [f"{table.name}{ending}" for ending in _ENDINGS]
    single = {name: tag for name in names if (tag := storage.tag(name)) is not None}
    listed = storage.list(table.name, _LOOKED_AT if single else None)
    listed = {key: tag for key, tag in listed.items() if not _APART.search(key)}
    inside = {key: tag for key, tag in listed.items() if key.endswith(_ENDINGS)}
    if single and inside:
        raise InputError(f"{storage.uri}: holds both {next(iter(single))} and {next(iter(inside))}; keep one of them")
    for key in listed if inside else ():
        if key not in inside and _LIKE_A_TABLE.search(key):
            raise InputError(
                f"{storage.uri}/{key}: would not be read; make it one of {', '.join(_ENDINGS)}, or take it away"
            )
    return single or inside


def _open_data(data: str) -> Storage:
    storage = open_storage(data)
    if isinstance(storage, LocalStorage) and not storage.root.is_dir():
        raise InputError(f"{data}: no such folder; data= names the folder that holds items, queries and logs")
    return storage


def _checked(table: Table, storage: Storage, tags: dict[str, str], address: str) -> InputFiles:
    endings = sorted({next(end for end in reversed(_ENDINGS) if key.endswith(end)) for key in tags})
    if not endings:
        raise InputError(f"{address}: not found; expected {table.name}.parquet, .jsonl, .jsonl.gz or a folder of such")
    if len(endings) > 1:
        raise InputError(f"{address}: mixes {' and '.join(endings)}; keep one kind of file a table")
    if endings[0] != ".parquet":
        return InputFiles(table, storage, tags, endings[0])
    footers = {f"{storage.uri}/{key}": _footer(storage, key, table) for key in tags}
    return InputFiles(table, storage, tags, endings[0], common_attributes(footers, table))


def _footer(storage: Storage, key: str, table: Table) -> pa.Schema:
    """Read and check the schema of one file, so that a broken one is named before any work starts."""
    source = f"{storage.uri}/{key}"
    try:
        footer = pq.read_schema(storage.path(key), filesystem=storage.filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(source, "Parquet file", error) from error
    check_schema(footer, table, source)
    return footer


def _unreadable(source: str, kind: str, error: Exception) -> MixerError:
    """Return what is wrong: the storage, which Arrow tells by a number or by AWS' name for it, or else the file."""
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    if "AWS Error" in str(error) or getattr(error, "errno", None):
        return StorageError(f"{source}: cannot be read ({reason})")
    return InputError(f"{source}: not a whole {kind} ({reason}); write it again")
