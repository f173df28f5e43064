"""What the attributes of an index are and say: one schema of its parts, and a summary of each. Pure Arrow, no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mixer_platform.filters import EPOCH, NO_ATTRIBUTES, Kind, comparable, elements, kind_of

MOST_SHOWN = 20  # texts of an attribute
_KEPT = 1000  # of a shard, so that what is frequent in all of them is among these
_LONGEST = 100  # characters of a text that is one of a few
_FREE = frozenset({"title", "description", "image"})  # texts of the input contract that every item has its own of
_SAID = {"text": "text", "number": "number", "boolean": "boolean", "time": "text"}


class Attribute(NamedTuple):
    """One attribute of some items: how often each of its most frequent texts, and its least and greatest value.

    Times are ISO texts; `texts` is None for what is no text, or a text of its own for every item.
    """

    name: str
    kind: Kind
    texts: dict[str, int] | None
    least: float | str | None
    greatest: float | str | None


def attributes_of(table: pa.Table) -> list[Attribute]:
    """Summarise each column that can be filtered by, in order."""
    found = []
    for field in table.schema:
        kind = None if field.name in NO_ATTRIBUTES else kind_of(field.type)
        if kind is not None:
            found.append(_summary(field.name, kind, table[field.name]))
    return found


def combined(parts: Iterable[Sequence[Attribute]]) -> list[Attribute]:
    """Return the summary of parts of an index taken together. What some hold as another kind is text."""
    by_name: dict[str, list[Attribute]] = {}
    for attribute in (attribute for part in parts for attribute in part):
        by_name.setdefault(attribute.name, []).append(attribute)
    return [_combined(name, each) for name, each in by_name.items()]


def merge_attributes(shards: Sequence[Sequence[Attribute]]) -> list[dict[str, Any]]:
    """Return what `GET /v1/attributes` says, given what each shard says: name, kind, values, min and max.

    `values` are up to 20 texts, the most frequent first. Attributes that are null everywhere are left out.
    """
    return [
        {
            "name": each.name,
            "kind": _SAID[each.kind],
            "values": None if each.texts is None else list(_most_frequent(Counter(each.texts), MOST_SHOWN)),
            "min": each.least,
            "max": each.greatest,
        }
        for each in combined(shards)
        if each.kind != "nothing"
    ]


def merged_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return one schema for all: numbers as wide as the widest; what some hold as another kind is text."""
    names = dict.fromkeys(name for schema in schemas for name in schema.names)
    return pa.schema([_merged([schema.field(name) for schema in schemas if name in schema.names]) for name in names])


def with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns of `merged_schema`: those that it lacks are null."""
    columns = [
        cast(table[field.name], field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Return a column as the kind that `merged_schema` says."""
    try:
        return column.cast(kind, safe=pa.types.is_string(kind))  # a long integer loses digits as a number of 64 bits
    except pa.ArrowException:
        return pa.chunked_array([[None if value is None else str(value) for value in column.to_pylist()]], pa.string())


def _summary(name: str, kind: Kind, column: pa.ChunkedArray) -> Attribute:
    chunks = [elements(chunk)[0] if pa.types.is_nested(chunk.type) else chunk for chunk in column.chunks]
    values = pa.chunked_array([comparable(chunk) for chunk in chunks] or [pa.array([], pa.null())])
    if kind == "text":
        return Attribute(name, kind, None if name in _FREE else _counted(values), None, None)
    if kind not in ("number", "time") or values.null_count == len(values):
        return Attribute(name, kind, None, None, None)
    if pa.types.is_floating(values.type):
        values = values.filter(pc.is_finite(values))
    ends = pc.min_max(values).as_py()
    least, greatest = (_shown(ends[end], kind) for end in ("min", "max"))
    return Attribute(name, kind, None, least, greatest)


def _counted(values: pa.ChunkedArray) -> dict[str, int]:
    counted = pc.value_counts(values.drop_null()).sort(order="descending", by="counts")
    counts = {each["values"]: each["counts"] for each in counted[: 2 * _KEPT].to_pylist()}
    return _most_frequent(Counter({text: n for text, n in counts.items() if 0 < len(text) <= _LONGEST}), _KEPT)


def _most_frequent(counts: Counter[str], most: int) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:most])


def _combined(name: str, parts: Sequence[Attribute]) -> Attribute:
    some = [part for part in parts if part.kind != "nothing"]
    kinds = {part.kind for part in some}
    if len(kinds) > 1:
        return Attribute(name, "text", _added(some), None, None)
    ends = [end for part in some for end in (part.least, part.greatest) if end is not None]
    least, greatest = (min(ends), max(ends)) if ends else (None, None)
    return Attribute(name, some[0].kind if some else "nothing", _added(some), least, greatest)


def _added(parts: Sequence[Attribute]) -> dict[str, int] | None:
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.texts or {})
    return _most_frequent(counts, _KEPT) if any(part.texts is not None for part in parts) else None


def _shown(end: Any, kind: Kind) -> Any:
    if end is None or kind != "time":
        return end
    try:
        return (EPOCH + timedelta(microseconds=end)).isoformat()
    except OverflowError:  # a year that no ISO text names
        return None


def _merged(fields: Sequence[pa.Field]) -> pa.Field:
    try:
        return pa.unify_schemas([pa.schema([field]) for field in fields], promote_options="permissive").field(0)
    except pa.ArrowException:
        return pa.field(fields[0].name, pa.string())
