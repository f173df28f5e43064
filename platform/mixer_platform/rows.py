"""Rows of Arrow tables as a page shows them: a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from mixer_platform.attributes import cast


class RowReader:
    """Reads rows of a table, value by value.

    Arrow's `take` is for many rows: for ten of them, as a query asks for them between two runs of an encoder that
    leaves no cache warm, it takes four times as long.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._readers: tuple[pa.Schema, dict[str, Callable[[int], Any]]] = (pa.schema([]), {})  # of the last schema

    def read(self, number: int, schema: pa.Schema) -> dict[str, Any]:
        """Return a row with the columns of a `merged_schema`, without "id": None in those that the table lacks."""
        known, readers = self._readers
        if known is not schema:
            readers = {field.name: _reader(self._table, field) for field in schema if field.name != "id"}
            self._readers = schema, readers
        return {name: value(number) for name, value in readers.items()}


def _reader(table: pa.Table, field: pa.Field) -> Callable[[int], Any]:
    if field.name not in table.column_names:
        return lambda number: None
    column = table[field.name]
    if column.type != field.type:
        return lambda number: cast(column.slice(number, 1), field.type)[0].as_py()
    values = column.chunk(0) if column.num_chunks == 1 else column
    return lambda number: values[number].as_py()
