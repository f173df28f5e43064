"""What attributes say: kinds, frequent texts, ends; parts and shards taken together."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal

import pyarrow as pa
import pytest

from mixer_platform.attributes import attributes_of, combined, merge_attributes, merged_schema, with_schema

TABLE = pa.table(
    {
        "id": [1, 2, 3, 4],
        "item_id": ["a", "b", "c", "d"],
        "title": ["Shoe", "Shoe", "Hat", None],
        "brand": ["x", "y", "y", None],
        "color": pa.array(["red", "red", "blue", ""]).dictionary_encode(),
        "tags": [["new", "red"], ["red"], [], None],
        "sizes": [[36, 37], [40], None, None],
        "price": pa.array([2.5, float("nan"), float("inf"), -1], pa.float32()),
        "cost": [Decimal("1.50"), None, None, Decimal("3.25")],
        "on_sale": [True, None, False, None],
        "added": [dt.date(2026, 1, 2), None, dt.date(2025, 1, 2), None],
        "seen": pa.array([0, None, 1_500_000, None], pa.timestamp("us", "Asia/Tokyo")),
        "empty": pa.array([None] * 4, pa.float64()),
        "nothing": pa.nulls(4),
        "shape": [{"a": 1}] * 4,
    }
)


def test_each_kind_says_its_own() -> None:
    said = merge_attributes([attributes_of(TABLE)])
    assert json.loads(json.dumps(said)) == said
    assert [tuple(each.values()) for each in said] == [
        ("title", "text", None, None, None),
        ("brand", "text", ["y", "x"], None, None),
        ("color", "text", ["red", "blue"], None, None),
        ("tags", "text", ["red", "new"], None, None),
        ("sizes", "number", None, 36, 40),
        ("price", "number", None, -1, 2.5),
        ("cost", "number", None, 1.5, 3.25),
        ("on_sale", "boolean", None, None, None),
        ("added", "text", None, "2025-01-02T00:00:00", "2026-01-02T00:00:00"),
        ("seen", "text", None, "1970-01-01T00:00:00", "1970-01-01T00:00:01.500000"),
        ("empty", "number", None, None, None),
    ]


def test_shards_are_added_up() -> None:
    one = pa.table({"brand": ["x", "y", "y"], "n": [1, 2, 3], "new": [1, 1, 1], "late": pa.nulls(3)})
    two = pa.table({"brand": ["x", "x", "x"], "n": [9.5, None, 0], "late": ["z", "z", None], "new": ["a", "b", "b"]})
    said = {each["name"]: each for each in merge_attributes([attributes_of(each) for each in (one, two)])}
    assert list(said) == ["brand", "n", "new", "late"]
    assert said["brand"]["values"] == ["x", "y"]
    assert (said["n"]["min"], said["n"]["max"]) == (0, 9.5)
    assert (said["new"]["kind"], said["new"]["values"], said["new"]["min"]) == ("text", ["b", "a"], None)
    assert said["late"]["values"] == ["z"]
    assert merge_attributes([]) == []


def test_only_what_is_frequent_and_short_is_kept() -> None:
    texts = [f"v{n:05}" for n in range(3000) for _ in range(3000 - n if n < 30 else 1)] + ["long" * 100] * 5000
    table = pa.table({"brand": texts})
    (found,) = attributes_of(table)
    assert found.texts is not None
    assert len(found.texts) == 1000
    (said,) = merge_attributes([combined([[found], [found]])])
    assert said["values"] == [f"v{n:05}" for n in range(20)]


@pytest.mark.parametrize("columns", [{}, {"brand": pa.array([], pa.string()), "n": pa.array([], pa.int64())}])
def test_no_rows_say_nothing(columns: dict[str, pa.Array]) -> None:
    said = merge_attributes([attributes_of(pa.table(columns))])
    assert [(each["values"], each["min"]) for each in said] == [([], None), (None, None)][: len(columns)]


def test_one_schema_for_tables_that_differ() -> None:
    tables = [
        pa.table({"a": pa.array([1], pa.int32()), "b": [["x"]], "c": pa.nulls(1)}),
        pa.table({"a": [2.5], "b": ["y"], "d": [True]}),
        pa.table({"c": [dt.date(2026, 1, 1)]}),
    ]
    schema = merged_schema([table.schema for table in tables])
    assert schema == pa.schema([("a", pa.float64()), ("b", pa.string()), ("c", pa.date32()), ("d", pa.bool_())])
    whole = pa.concat_tables([with_schema(table, schema) for table in tables])
    assert whole["a"].to_pylist() == [1, 2.5, None]
    assert whole["b"].to_pylist() == ["['x']", "y", None]
    assert whole["d"].to_pylist() == [None, True, None]
