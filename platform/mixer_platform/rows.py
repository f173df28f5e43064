"""Rows of Arrow tables as Python values, as a page or a quarantine shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from mixer_platform.attributes import cast, with_schema

# Arrow's `take` is for many rows. For ten, as a query asks for them between two runs of an encoder that leaves no cache
# warm, it takes four times as long as value by value; for a thousand a quarter.
_FEW = 24


class RowReader:
    """Reads rows of a table as dicts."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._known: tuple[pa.Schema, pa.Schema, dict[str, Callable[[int], Any]]] | None = None  # of the last schema

    def read(self, numbers: Sequence[int], schema: pa.Schema) -> list[dict[str, Any]]:
        """Return rows with the columns of a `merged_schema`, without "id": None in those that the table lacks.

        A time that Python does not have, as in the year 10,000, is the number of its units since 1970, as text.
        """
        if self._known is None or self._known[0] is not schema:
            shown = pa.schema([field for field in schema if field.name != "id"])
            self._known = schema, shown, {field.name: _reader(self._table, field) for field in shown}
        _, shown, readers = self._known
        if len(numbers) > _FEW:
            try:
                return with_schema(self._table.take(pa.array(numbers)), shown).to_pylist()
            except (OverflowError, ValueError):
                pass
        return [{name: value(number) for name, value in readers.items()} for number in numbers]


def to_dicts(table: pa.Table) -> list[dict[str, Any]]:
    """Return rows as `to_pylist` does, but for times that Python does not have: see `RowReader.read`."""
    columns = [_values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError):
        return [_value(scalar) for scalar in column]


def _reader(table: pa.Table, field: pa.Field) -> Callable[[int], Any]:
    if field.name not in table.column_names:
        return lambda number: None
    column = table[field.name]
    if column.type != field.type:
        return lambda number: _value(cast(column.slice(number, 1), field.type)[0])
    values = column.chunk(0) if column.num_chunks == 1 else column
    return lambda number: _value(values[number])


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (OverflowError, ValueError):
        if isinstance(scalar, pa.ListScalar | pa.LargeListScalar):
            return [_value(each) for each in scalar.values]
        if isinstance(scalar, pa.StructScalar):
            return {name: _value(each) for name, each in scalar.items()}
        return str(scalar.value) if pa.types.is_temporal(scalar.type) else None
