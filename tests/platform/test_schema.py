"""The input contract over plain Arrow tables."""

from __future__ import annotations

import pyarrow as pa
import pytest

from mixer_platform.errors import InputError
from mixer_platform.index.embeddings import STATE
from mixer_platform.inputs import RAW, REASON
from mixer_platform.schema import (
    ITEMS,
    LOGS,
    QUERIES,
    RESERVED,
    TRUTH,
    broken_rows,
    check_schema,
    common_attributes,
    conform,
)


def log_rows(**columns: list) -> pa.Table:
    """Return sound rows of the logs, as many as the columns given have, with these columns in place of theirs."""
    count = len(next(iter(columns.values())))
    plain = {"event_id": "e", "timestamp_ms": 5, "session_id": "s", "query_id": "q", "item_id": "i", "position": 0}
    plain |= {"event": "click"}
    return pa.table({**{name: [value] * count for name, value in plain.items()}, **columns})


def reasons_of(table: pa.Table) -> list[str | None]:
    return broken_rows(conform(table, LOGS), LOGS).to_pylist()


def test_a_missing_required_column_is_named() -> None:
    with pytest.raises(InputError) as error:
        check_schema(QUERIES.columns.remove(1), QUERIES, "d/queries.parquet")
    wanted = "column image is missing; queries needs query_id (string), image (string)"
    assert str(error.value) == f"d/queries.parquet: {wanted}"


def test_a_missing_optional_column_is_null() -> None:
    found = pa.table({"item_id": ["a"]})
    check_schema(found.schema, ITEMS, "d/items.parquet")
    row = {"item_id": "a", "title": None, "description": None, "image": None}
    assert conform(found, ITEMS).to_pylist() == [row]
    assert conform(found, ITEMS).schema == ITEMS.columns


@pytest.mark.parametrize(
    ("table", "column", "kind"),
    [
        (LOGS, "timestamp_ms", pa.string()),
        (LOGS, "timestamp_ms", pa.timestamp("ms")),
        (LOGS, "item_id", pa.int64()),
        (LOGS, "position", pa.bool_()),
        (ITEMS, "title", pa.list_(pa.string())),
        (TRUTH, "relevant_item_ids", pa.string()),
        (TRUTH, "relevant_item_ids", pa.list_(pa.int64())),
    ],
)
def test_a_mistyped_column_is_named(table, column, kind) -> None:  # type: ignore[no-untyped-def]
    index = table.columns.get_field_index(column)
    with pytest.raises(InputError, match=rf"^f.parquet: column {column} is .*, expected .*; cast it and try again$"):
        check_schema(table.columns.set(index, pa.field(column, kind)), table, "f.parquet")


@pytest.mark.parametrize(
    ("column", "array"),
    [
        ("query_id", pa.array(["a", "b"], pa.large_string())),
        ("query_id", pa.array(["a", "b"]).dictionary_encode()),
        ("timestamp_ms", pa.array([3.0, 4.0])),
        ("timestamp_ms", pa.array([3, 4], pa.uint32())),
        ("position", pa.array([3, 4], pa.int64())),
        ("position", pa.array([3.0, 4.0], pa.float32())),
        ("position", pa.array([3, 4], pa.int8())),
        ("position", pa.array([3, 4], pa.uint64())),
        ("dwell_ms", pa.nulls(2)),
    ],
)
def test_kindred_types_are_taken_without_loss(column: str, array: pa.Array) -> None:
    table = log_rows(**{column: array})
    check_schema(table.schema, LOGS, "f")
    conformed = conform(table, LOGS)
    assert conformed.schema == LOGS.columns
    assert conformed[column].to_pylist() == array.to_pylist()
    assert broken_rows(conformed, LOGS).to_pylist() == [None, None]


def test_numbers_that_do_not_fit_are_missing_not_wrapped() -> None:
    high = [2**31, -(2**31) - 1, 2**62, -(2**63)]
    assert reasons_of(log_rows(position=high)) == ["position is missing"] * 4
    floats = pa.array([1.0, float("nan"), float("inf"), 1e30, None])
    assert reasons_of(log_rows(timestamp_ms=floats)) == [None] + ["timestamp_ms is missing"] * 4


def test_each_broken_row_gets_its_first_reason() -> None:
    assert reasons_of(log_rows(event=["click", "impression", "add_to_cart", "purchase", "view", None, ""])) == [
        None, None, None, None, "event is unknown", "event is missing", "event is missing",
    ]  # fmt: skip
    assert reasons_of(log_rows(event_id=["", None, "x"])) == ["event_id is missing"] * 2 + [None]
    assert reasons_of(log_rows(timestamp_ms=[0, -1, 1])) == ["timestamp_ms is not positive"] * 2 + [None]
    assert reasons_of(log_rows(position=[-1, 0, None])) == ["position is negative", None, "position is missing"]
    assert reasons_of(log_rows(item_id=[None, "i"], event=["view", "click"])) == ["item_id is missing", None]
    assert reasons_of(log_rows(dwell_ms=pa.array([None, 3], pa.int64()))) == [None, None]


def test_attributes_of_items_stay_and_other_columns_of_logs_go() -> None:
    items = pa.table({"price": [1.5], "item_id": ["a"], "tags": [["x"]]})
    assert conform(items, ITEMS).to_pylist() == [
        {"item_id": "a", "title": None, "description": None, "image": None, "price": 1.5, "tags": ["x"]}
    ]
    assert conform(log_rows(event=["click"], extra=[1]), LOGS).schema == LOGS.columns


@pytest.mark.parametrize("name", [*sorted(RESERVED), REASON, RAW, STATE])
def test_an_attribute_with_a_name_used_inside_is_refused(name: str) -> None:
    found = pa.schema([("item_id", pa.string()), (name, pa.string())])
    with pytest.raises(InputError, match=rf"items.parquet: column {name} has a name .*; rename it, as in shop_"):
        check_schema(found, ITEMS, "items.parquet")


def test_a_position_that_no_page_has_is_broken() -> None:
    row = {"event_id": "e", "timestamp_ms": 5, "session_id": "s", "query_id": "q", "item_id": "i", "event": "click"}
    rows = [row | {"position": position} for position in (9_999, 10_000, 2_000_000_000)]
    batch = conform(pa.Table.from_pylist(rows), LOGS)
    assert broken_rows(batch, LOGS).to_pylist() == [None, *["position is 10000 or more"] * 2]


def attributes_of(*kinds: pa.DataType) -> pa.Schema:
    files = {f"part-{n}": pa.schema([("item_id", pa.string()), ("x", kind)]) for n, kind in enumerate(kinds)}
    return common_attributes(files, ITEMS)


@pytest.mark.parametrize(
    ("kinds", "common"),
    [
        ((pa.int32(), pa.int64()), pa.int64()),
        ((pa.int64(), pa.float64(), pa.null()), pa.float64()),
        ((pa.float32(), pa.float64()), pa.float64()),
        ((pa.null(), pa.dictionary(pa.int32(), pa.string()), pa.large_string()), pa.large_string()),
        ((pa.uint8(), pa.int16()), pa.int16()),
        ((pa.list_(pa.string()), pa.null()), pa.list_(pa.string())),
    ],
)
def test_attributes_of_kindred_types_have_one(kinds: tuple[pa.DataType, ...], common: pa.DataType) -> None:
    assert attributes_of(*kinds).field("x").type == common


@pytest.mark.parametrize(
    "kinds",
    [
        (pa.string(), pa.float64()),
        (pa.uint64(), pa.int64()),
        (pa.timestamp("us"), pa.timestamp("ns")),
        (pa.decimal128(12, 2), pa.float32()),
        (pa.int64(), pa.decimal128(10, 2)),
        (pa.string(), pa.binary()),
        (pa.struct([("a", pa.int64())]), pa.struct([("b", pa.int64())])),
        (pa.bool_(), pa.int64()),
    ],
)
def test_attributes_whose_values_would_change_are_refused(kinds: tuple[pa.DataType, ...]) -> None:
    with pytest.raises(InputError, match=r"^part-1: column x is .*, in part-0 it is .*; cast one of them$"):
        attributes_of(*kinds)


def test_a_number_that_the_common_type_cannot_hold_is_refused() -> None:
    batch = pa.table({"item_id": ["a"], "x": [2**53 + 1]})
    with pytest.raises(InputError, match=r"^items: column x is double in other files, and here .*9007199254740993"):
        conform(batch, ITEMS, pa.schema([("x", pa.float64())]))


def test_a_column_that_is_there_twice_is_named() -> None:
    twice = pa.schema([("item_id", pa.string()), ("price", pa.int64()), ("price", pa.int64())])
    with pytest.raises(InputError, match="f: has 3 columns, price twice or more; rename or drop one"):
        check_schema(twice, ITEMS, "f")
