"""Rows as a page shows them: the same whether few are asked for or many."""

from __future__ import annotations

import datetime

import pyarrow as pa
import pytest

from mixer_platform.attributes import merged_schema, with_schema
from mixer_platform.rows import _FEW, RowReader

TABLE = pa.table(
    {
        "id": pa.array(range(100)),
        "item_id": [f"item-{n}" for n in range(100)],
        "price": pa.array([n if n % 7 else None for n in range(100)], pa.int32()),
        "tags": [[str(n)] * (n % 3) for n in range(100)],
        "listed": pa.array([datetime.datetime(2026, 1, 1)] * 100, pa.timestamp("us")),
    }
)
OTHER = pa.table({"id": [1], "item_id": ["x"], "price": [1.5], "brand": ["b"], "listed": ["long ago"]})


@pytest.mark.parametrize("count", [0, 1, _FEW, _FEW + 1, 80])
@pytest.mark.parametrize("other", [TABLE, OTHER])
@pytest.mark.parametrize("chunks", [1, 3])
def test_rows_are_those_of_the_table(count: int, other: pa.Table, chunks: int) -> None:
    table = pa.concat_tables([TABLE.slice(40 * part, 40) for part in range(chunks)]) if chunks > 1 else TABLE
    schema = merged_schema([TABLE.schema, other.schema])
    numbers = [(37 * n) % 100 for n in range(count)]
    expected = with_schema(table, schema).drop_columns("id").take(pa.array(numbers, pa.int64())).to_pylist()
    reader = RowReader(table)
    assert reader.read(numbers, schema) == expected
    assert (
        reader.read(numbers, TABLE.schema) == table.drop_columns("id").take(pa.array(numbers, pa.int64())).to_pylist()
    )
    assert reader.read(numbers, schema) == expected


@pytest.mark.parametrize("count", [2, 2 * _FEW])
@pytest.mark.parametrize(
    ("kind", "late", "first"),
    [
        (pa.timestamp("us"), 2**60, datetime.datetime(1970, 1, 1)),
        (pa.timestamp("us", "UTC"), 2**60, datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)),
        (pa.date32(), 3_000_000, datetime.date(1970, 1, 1)),
        (pa.date64(), 3_000_000 * 86_400_000, datetime.date(1970, 1, 1)),
        (pa.duration("s"), 2**60, datetime.timedelta(0)),
    ],
)
def test_a_time_that_python_does_not_have_costs_no_other_row(
    count: int, kind: pa.DataType, late: int, first: object
) -> None:
    units = pa.int32() if kind == pa.date32() else pa.int64()
    times = pa.array([late if n == 1 else 0 for n in range(count)], units).view(kind)
    table = pa.table({"id": range(count), "item_id": ["i"] * count, "listed": times})
    found = RowReader(table).read(range(count), table.schema)
    assert found[1] == {"item_id": "i", "listed": str(late)}
    assert found[0]["listed"] == first


def test_a_number_stays_one_in_a_wider_column() -> None:
    table = pa.table({"id": [0], "size": pa.array([2**53 + 1])})
    schema = merged_schema([table.schema, pa.schema([("size", pa.float64())])])
    assert RowReader(table).read([0], schema) == [{"size": float(2**53)}]
