"""The input contract: which tables, columns and types a run reads. Pure Arrow, no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mixer_platform.errors import InputError

POSITIONS = 10_000  # on a result page
EVENTS = ("impression", "click", "add_to_cart", "purchase")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


# What a mistyped column may be and still be taken, losslessly, for the contract's type.
_FAMILIES = {
    pa.string(): (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary, pa.types.is_null),
    pa.int64(): (pa.types.is_integer, pa.types.is_floating, pa.types.is_null),
    pa.int32(): (pa.types.is_integer, pa.types.is_floating, pa.types.is_null),
    pa.list_(pa.string()): (lambda kind: _is_list(kind) and _is_text(kind.value_type), pa.types.is_null),
}


NO_COLUMNS = pa.schema([])


@dataclass(frozen=True)
class Table:
    """One input table: `NAME.parquet`, `NAME.jsonl[.gz]` or a folder `NAME/` of such files."""

    name: str
    required: pa.Schema
    optional: pa.Schema = NO_COLUMNS
    keep_others: bool = False

    @property
    def columns(self) -> pa.Schema:
        return pa.schema([*self.required, *self.optional])


ITEMS = Table(
    "items",
    required=pa.schema([("item_id", pa.string())]),
    optional=pa.schema([("title", pa.string()), ("description", pa.string()), ("image", pa.string())]),
    keep_others=True,  # attributes
)
QUERIES = Table("queries", required=pa.schema([("query_id", pa.string()), ("image", pa.string())]))
LOGS = Table(
    "logs",
    required=pa.schema(
        [
            ("event_id", pa.string()),
            ("timestamp_ms", pa.int64()),
            ("session_id", pa.string()),
            ("query_id", pa.string()),
            ("item_id", pa.string()),
            ("position", pa.int32()),
            ("event", pa.string()),
        ]
    ),
    optional=pa.schema([("dwell_ms", pa.int64())]),
)
DELETED = Table("deleted", required=pa.schema([("item_id", pa.string())]))
TRUTH = Table(
    "truth",
    required=pa.schema(
        [("query_id", pa.string()), ("image", pa.string()), ("relevant_item_ids", pa.list_(pa.string()))]
    ),
)


# What the contract puts beside an item's attributes; what a job marks rows with begins with OWN and is not kept.
RESERVED = frozenset({"id", "embedding", "fingerprint"})
OWN = "__"


def check_schema(found: pa.Schema, table: Table, source: str) -> None:
    """Raise InputError unless `found`, the schema of the file `source`, has the columns of `table`."""
    check_attributes(found.names, table, source)
    if twice := [name for name, count in Counter(found.names).items() if count > 1]:
        raise InputError(f"{source}: has {len(found.names)} columns, {twice[0]} twice or more; rename or drop one")
    for field in found:
        if _runs_python(field.type):
            raise InputError(
                f"{source}: column {field.name} is {field.type}; write it as plain values: reading it runs code"
            )
    for field in table.columns:
        index = found.get_field_index(field.name)
        if index < 0:
            if field in table.required:
                raise InputError(f"{source}: column {field.name} is missing; {table.name} needs {_spelled(table)}")
            continue
        actual = found.field(index).type
        if not any(fits(actual) for fits in _FAMILIES[field.type]):
            raise InputError(f"{source}: column {field.name} is {actual}, expected {field.type}; cast it and try again")


def check_attributes(names: Iterable[str], table: Table, source: str) -> None:
    """Raise InputError if an attribute of `table` has a name that the platform uses itself."""
    taken = sorted(name for name in names if name in RESERVED or name.startswith(OWN)) if table.keep_others else []
    if taken:
        raise InputError(
            f"{source}: column {taken[0]} has a name that is used inside; rename it, as in shop_{taken[0].strip('_')}"
        )


def common_attributes(found: Mapping[str, pa.Schema], table: Table) -> pa.Schema:
    """Return each attribute of `table` with a type that holds it in all files, whose schemas are `found` by source.

    Raises InputError where there is none, naming two of the files.
    """
    common: dict[str, pa.DataType] = {}
    before: dict[str, tuple[str, pa.DataType]] = {}
    for source, schema in found.items() if table.keep_others else ():
        for field in schema:
            if field.name in table.columns.names:
                continue
            kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            both = _common_type(common.get(field.name, kind), kind)
            if both is None:
                other, differs = before[field.name]
                raise InputError(
                    f"{source}: column {field.name} is {kind}, in {other} it is {differs}; cast one of them"
                )
            common[field.name] = both
            if not pa.types.is_null(kind):
                before[field.name] = source, kind
    return pa.schema(list(common.items()))


def _common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return a type to which both can be cast and lose nothing unnoticed, None if there is none."""
    both = (one, other)
    if one == other:
        return one
    if any(map(pa.types.is_struct, both)) and not any(map(pa.types.is_null, both)):
        return None  # Arrow would join their fields, and then not cast to them
    texts = all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in both)
    numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in both)
    if pa.uint64() in both and any(map(pa.types.is_signed_integer, both)):
        return None  # Arrow would wrap large ones
    try:
        options = "permissive" if texts or numbers else "default"
        return pa.unify_schemas([pa.schema([("", kind)]) for kind in both], promote_options=options).field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def conform(batch: pa.Table, table: Table, attributes: pa.Schema = NO_COLUMNS) -> pa.Table:
    """Return `batch` with exactly the contract's columns and types; optional ones that are missing become null.

    Attributes of items (`keep_others`) are kept, those of `attributes` with its types, in every batch. A number that
    does not fit its column becomes null, which `broken_rows` then names.
    """
    names = {name: batch[name] for name in batch.column_names} if table.keep_others else {}
    for field in attributes:
        found = names.get(field.name)
        try:
            names[field.name] = pa.nulls(batch.num_rows, field.type) if found is None else pc.cast(found, field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"{table.name}: column {field.name} is {field.type} in other files, and here {error}; cast it in all"
            ) from error
    for field in table.columns:
        if field.name in batch.column_names:
            names[field.name] = _cast(batch[field.name], field.type)
        else:
            names[field.name] = pa.nulls(batch.num_rows, field.type)
    ordered = [*table.columns.names, *(name for name in names if name not in table.columns.names)]
    return pa.table({name: names[name] for name in ordered})


def broken_rows(batch: pa.Table, table: Table) -> pa.Array:
    """Return, row by row, why a conformed row breaks the contract (string), or null if it does not.

    Only what a row shows by itself: references and repetitions need the other rows.
    """
    reasons = pa.nulls(batch.num_rows, pa.string())
    for name in table.required.names:
        column = batch[name].combine_chunks()
        bad = pc.is_null(column)
        if pa.types.is_string(column.type):
            bad = pc.or_kleene(bad, pc.equal(column, ""))
        reasons = _because(reasons, bad, f"{name} is missing")
    if table.name == LOGS.name:
        known = pc.is_in(batch["event"], pa.array(EVENTS))
        reasons = _because(reasons, pc.invert(known), "event is unknown")
        reasons = _because(reasons, pc.less(batch["timestamp_ms"], 1), "timestamp_ms is not positive")
        reasons = _because(reasons, pc.less(batch["position"], 0), "position is negative")
        reasons = _because(reasons, pc.greater_equal(batch["position"], POSITIONS), f"position is {POSITIONS} or more")
    return reasons


def _because(reasons: pa.Array, bad: pa.Array | pa.ChunkedArray, reason: str) -> pa.Array:
    bad = bad.combine_chunks() if isinstance(bad, pa.ChunkedArray) else bad
    first = pc.and_(pc.is_null(reasons), pc.fill_null(bad, False))
    return pc.if_else(first, reason, reasons)


def _runs_python(kind: pa.DataType) -> bool:
    """Say whether a type is one that Python defines, at any depth: Ray's objects are pickles, which run when read."""
    if isinstance(kind, pa.ExtensionType):
        return True
    inner = [kind.value_type] if pa.types.is_dictionary(kind) else [kind.field(i).type for i in range(kind.num_fields)]
    return any(map(_runs_python, inner))


def _cast(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_integer(wanted) and not pa.types.is_null(column.type):
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.less(pc.abs(column), 2.0**63), pc.round(column), None)  # also what is no number
        column = pc.cast(column, pa.int64(), safe=False)
        if wanted == pa.int32():
            fits = pc.and_(pc.less(column, 2**31), pc.greater_equal(column, -(2**31)))
            column = pc.if_else(fits, column, None)
    return pc.cast(column, wanted, safe=False)


def _spelled(table: Table) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in table.required)
