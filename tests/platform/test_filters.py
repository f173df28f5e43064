"""Filters: what matches, what is refused and how, and that equal ones are one."""

from __future__ import annotations

import datetime as dt
import json
import pickle
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mixer_platform.filters import MOST_CHARACTERS, Filter, FilterError, parse_filter

NOON = dt.datetime(2026, 11, 26, 12)
TABLE = pa.table(
    {
        "id": [1, 2, 3, 4],
        "item_id": ["a", "b", "c", "d"],
        "title": ["Red shoe", "Blue shoe", None, "rød sko"],
        "brand": pa.array(["x", "y", "x", None]).dictionary_encode(),
        "price": pa.array([0.1, 2.5, None, float("nan")], pa.float32()),
        "cost": pa.array([Decimal("1.10"), Decimal("2.50"), None, Decimal("3.00")]),
        "stock": pa.array([0, 3, 2**60 + 1, None], pa.int64()),
        "on_sale": [True, False, None, True],
        "tags": [["new", "red"], [], None, ["red", None]],
        "sizes": [[36, 37], [40], [], None],
        "added": pa.array([dt.date(2026, 1, 1), dt.date(2026, 2, 1), None, dt.date(1969, 1, 1)]),
        "seen": pa.array([NOON, NOON + dt.timedelta(hours=1), None, NOON], pa.timestamp("ns", "Europe/Rome")),
        "nothing": pa.nulls(4),
        "shape": [{"a": 1}, None, None, None],
    }
)


def found(raw: Any, table: pa.Table = TABLE) -> str:
    mask = parse_filter(raw, TABLE.schema).mask(table)
    assert mask.dtype == bool
    return "".join(table.filter(pa.array(mask))["item_id"].to_pylist())


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ({}, "abcd"),
        ({"title": "Red shoe"}, "a"),
        ({"title": {"gte": "R", "lt": "S"}}, "a"),
        ({"title": ["rød sko", "Blue shoe"]}, "bd"),
        ({"brand": "x"}, "ac"),
        ({"brand": ["x", "y", "z"]}, "abc"),
        ({"price": 0.1}, "a"),
        ({"price": {"gte": 0.1, "lte": 2.5}}, "ab"),
        ({"price": {"gt": 0.1}}, "b"),
        ({"price": {"lt": 1e300}}, "ab"),
        ({"price": {"lt": 2**62}}, "ab"),
        ({"cost": 1.1}, "a"),
        ({"cost": {"gte": 2.5}}, "bd"),
        ({"stock": [0, 3.0, 2.5]}, "ab"),
        ({"stock": 2**60}, ""),
        ({"stock": 2**60 + 1}, "c"),
        ({"stock": {"gt": 2.5}}, "bc"),
        ({"stock": {"lt": 1e300}}, "abc"),
        ({"stock": 1e300}, ""),
        ({"on_sale": True}, "ad"),
        ({"on_sale": [True, False]}, "abd"),
        ({"tags": "red"}, "ad"),
        ({"tags": ["new", "old"]}, "a"),
        ({"sizes": {"gt": 36, "lt": 40}}, "a"),
        ({"added": "2026-02-01"}, "b"),
        ({"added": {"gte": "2026-01-01", "lt": "2026-01-02T00:00:01"}}, "a"),
        ({"seen": {"gt": "2026-11-26T12:00:00Z"}}, "b"),
        ({"seen": "2026-11-26T13:00:00+01:00"}, "ad"),
        ({"nothing": "x"}, ""),
        ({"nothing": {"gt": 1}}, ""),
        ({"brand": "x", "price": {"lte": 1}}, "a"),
        ({"brand": "x", "on_sale": False}, ""),
    ],
)
def test_what_matches(raw: dict[str, Any], wanted: str) -> None:
    assert found(raw) == wanted
    assert found(json.dumps(raw)) == wanted
    rows = TABLE.slice(1)  # as Arrow keeps a part: with an offset
    assert found(raw, rows) == wanted.replace("a", "")
    assert found(raw, pa.concat_tables([rows, TABLE])) == wanted.replace("a", "") + wanted


@pytest.mark.parametrize("stored", [pa.int8(), pa.uint16(), pa.uint64(), pa.int64(), pa.float16(), pa.float64()])
def test_numbers_of_every_width(stored: pa.DataType) -> None:
    table = pa.table({"n": pa.array([1, 5, None], pa.float64()).cast(stored)})
    assert parse_filter({"n": [5, -1]}, table.schema).mask(table).tolist() == [False, True, False]
    assert parse_filter({"n": {"gt": -0.5, "lt": 1.5}}, table.schema).mask(table).tolist() == [True, False, False]


@pytest.mark.parametrize("stored", [pa.string(), pa.large_string(), pa.string_view(), pa.large_list(pa.string())])
def test_texts_however_they_are_stored(stored: pa.DataType) -> None:
    values = [["a"], ["b"], None] if pa.types.is_large_list(stored) else ["a", "b", None]
    table = pa.table({"t": pa.array(values, stored)})
    assert parse_filter({"t": "b"}, table.schema).mask(table).tolist() == [False, True, False]
    assert parse_filter({"t": {"lte": "a"}}, table.schema).mask(table).tolist() == [True, False, False]


def test_a_column_that_is_missing_or_of_another_kind_matches_nowhere() -> None:
    filters = [
        parse_filter(raw, TABLE.schema) for raw in ({"price": 1}, {"brand": "x"}, {"seen": {"gt": "2026-01-01"}})
    ]
    for column in (
        {},
        {"price": ["1"], "brand": [1], "seen": [True]},
        {each: pa.nulls(1) for each in TABLE.schema.names},
    ):
        table = pa.table({"item_id": ["a"], **column})
        assert [each.mask(table).tolist() for each in filters] == [[False]] * 3
    assert filters[0].mask(TABLE.slice(0, 0)).tolist() == []


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ([], "filter: expected an object of attributes, found a list"),
        ("{", 'filter: not a JSON object: "{"'),
        ("[" * 50_000, "filter: not a JSON object: "),
        (" " * (MOST_CHARACTERS + 1), f"filter: {MOST_CHARACTERS + 1} characters; {MOST_CHARACTERS} at most"),
        ({"brnd": "x"}, 'filter: no attribute "brnd"; did you mean brand?'),
        ({"item_id": "a"}, 'filter: no attribute "item_id"; '),
        ({"zzz" * 1000: "x"}, 'filter: no attribute "zzz'),
        ({1: "x"}, "filter: no attribute 1; expected one of title, brand, "),
        ({"price": "cheap"}, 'filter.price: expected a number, found "cheap"'),
        ({"price": True}, "filter.price: expected a number, found true"),
        ({"price": None}, "filter.price: expected a number, found null"),
        ({"price": float("nan")}, "filter.price: expected a number, found nan"),
        ({"stock": 2**63}, "filter.stock: expected a number, found 9223372036854775808"),
        ({"brand": 3}, "filter.brand: expected a text, found 3"),
        ({"brand": ["x", ["y"]]}, "filter.brand: expected a text, found a list"),
        ({"brand": "\ud800"}, 'filter.brand: expected a text, found "\\ud800"'),
        ({"brand": []}, "filter.brand: an empty list matches nothing; name a value or leave it out"),
        ({"brand": ["x"] * 1001}, "filter.brand: 1001 values; 1000 at most"),
        ({"on_sale": "yes"}, 'filter.on_sale: expected true or false, found "yes"'),
        ({"on_sale": {"gte": False}}, "filter.on_sale: a boolean has no range; say true or false"),
        ({"price": {}}, "filter.price: a range has gte, gt, lte, lt, found an empty object"),
        ({"price": {"min": 1}}, 'filter.price: a range has gte, gt, lte, lt, found "min"'),
        ({"price": {"gte": [1]}}, "filter.price.gte: expected a number, found a list"),
        ({"price": {"gte": {"gte": 1}}}, "filter.price.gte: expected a number, found an object"),
        ({"seen": "yesterday"}, 'filter.seen: expected an ISO date or time, found "yesterday"'),
        ({"seen": "0001-01-01T00:00:00+23:00"}, "filter.seen: expected an ISO date or time, found "),
        ({"shape": "round"}, "filter.shape: struct<a: int64> is not filtered by; leave it out"),
        ({"nothing": [None]}, "filter.nothing: expected a text, a number or a boolean, found null"),
        ({f"a{n}": 1 for n in range(17)}, "filter: 17 conditions; 16 at most"),
        (
            {"brand": [str(n) for n in range(600)], "title": [str(n) for n in range(600)]},
            "filter: 1200 values; 1000 at",
        ),
        ({"brand": "x" * MOST_CHARACTERS}, f"filter: {MOST_CHARACTERS + 14} characters; {MOST_CHARACTERS} at most"),
    ],
)
def test_what_is_refused_says_why_in_one_sentence(raw: Any, sentence: str) -> None:
    with pytest.raises(FilterError) as error:
        parse_filter(raw, TABLE.schema)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_equal_filters_are_one_and_travel() -> None:
    first = parse_filter({"price": {"lt": 3.0, "gte": 1}, "brand": ["y", "x", "y"]}, TABLE.schema)
    second = parse_filter('{"brand": ["x", "y"], "price": {"gte": 1.0, "lt": 3}}', TABLE.schema)
    assert first == second
    assert len({first, second}) == 1
    assert first.text == '{"brand":["x","y"],"price":{"gte":1,"lt":3}}'
    assert pickle.loads(pickle.dumps(first)) == Filter(first.text)
    np.testing.assert_array_equal(Filter(first.text).mask(TABLE), [False, True, False, False])
    assert parse_filter({"brand": "x"}, TABLE.schema) == parse_filter({"brand": ["x"]}, TABLE.schema)
    assert not parse_filter({}, TABLE.schema)
    assert first
