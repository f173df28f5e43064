"""Conditions on items' attributes: read from a request, evaluated on display columns. Pure Arrow, no Ray."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MOST_CONDITIONS = 16
MOST_VALUES = 1000
MOST_CHARACTERS = 65_536  # of a whole filter
NO_ATTRIBUTES = frozenset({"id", "item_id"})

Kind = Literal["text", "number", "boolean", "time", "nothing"]
_COMPARE = {"gte": pc.greater_equal, "gt": pc.greater, "lte": pc.less_equal, "lt": pc.less}
_SPELLED = {"text": "a text", "number": "a number", "boolean": "true or false", "time": "an ISO date or time"}
EPOCH = datetime(1970, 1, 1)
_SHOWN = 40  # characters of what was sent, and names of attributes, that an error repeats


class FilterError(ValueError):
    """A filter that cannot be evaluated; the message is one sentence."""


@dataclass(frozen=True)
class Filter:
    """Conditions that must all hold. `text` is their canonical JSON: equal filters have equal texts.

    An attribute has one of the values in its list, or lies in its range; a list has an element that does. Nulls never
    match. Times compare in UTC.
    """

    text: str

    def __bool__(self) -> bool:
        return self.text != "{}"

    def mask(self, table: pa.Table) -> np.ndarray:
        """Return bool [rows]: which rows match. A column that is missing, or of another kind, matches nowhere."""
        passing = np.ones(len(table), bool)
        for name, wanted in json.loads(self.text).items():
            if name not in table.column_names:
                return np.zeros(len(table), bool)
            masks = [_matches(chunk, wanted) for chunk in table[name].chunks]
            passing &= np.concatenate([*masks, np.zeros(0, bool)])
        return passing


def parse_filter(raw: object, schema: pa.Schema) -> Filter:
    """Read a filter, a JSON object or its text, for items with the attributes of `schema`. Raises FilterError.

    {"brand": ["x", "y"], "price": {"gte": 1, "lt": 20}, "on_sale": true}: a list is any of; ranges are for what has an
    order, so not for booleans.
    """
    conditions = _read_json(raw) if isinstance(raw, str) else raw
    if not isinstance(conditions, dict):
        raise FilterError(f"filter: expected an object of attributes, found {_shown(conditions)}")
    if len(conditions) > MOST_CONDITIONS:
        raise FilterError(f"filter: {len(conditions)} conditions; {MOST_CONDITIONS} at most")
    read = {name: _condition(name, wanted, schema) for name, wanted in conditions.items()}
    if (values := sum(len(wanted) for wanted in read.values())) > MOST_VALUES:
        raise FilterError(f"filter: {values} values; {MOST_VALUES} at most")
    text = json.dumps(read, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if len(text) > MOST_CHARACTERS:
        raise FilterError(f"filter: {len(text)} characters; {MOST_CHARACTERS} at most")
    return Filter(text)


def kind_of(kind: pa.DataType) -> Kind | None:
    """Return as what values of an Arrow type are compared, those of its elements if it is a list; None if not."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return None if pa.types.is_nested(kind.value_type) else kind_of(kind.value_type)
    if pa.types.is_dictionary(kind):
        return kind_of(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "time"
    return "nothing" if pa.types.is_null(kind) else None


def comparable(array: pa.Array) -> pa.Array:
    """Return an array that is no list as texts, int64, floats, booleans, or microseconds since 1970 (int64)."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string_view(array.type):
        return array.cast(pa.large_string())
    if pa.types.is_decimal(array.type) or pa.types.is_uint64(array.type):
        return array.cast(pa.float64(), safe=False)
    if pa.types.is_float16(array.type):
        return array.cast(pa.float32())
    if pa.types.is_integer(array.type):
        return array.cast(pa.int64())
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        zone = getattr(array.type, "tz", None)
        return array.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64())
    return array


def elements(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Return the elements of an array of lists, and the row of each."""
    return array.flatten(), np.repeat(np.arange(len(array)), pc.list_value_length(array).fill_null(0))


def _matches(array: pa.Array, wanted: list[Any] | dict[str, Any]) -> np.ndarray:
    """Return bool [rows] for one condition."""
    kind = kind_of(array.type)
    if kind is None or kind == "nothing":
        return np.zeros(len(array), bool)
    if pa.types.is_nested(array.type):
        flat, rows = elements(array)
        found = np.zeros(len(array), bool)
        found[rows[_matches(flat, wanted)]] = True
        return found
    array = comparable(array)
    if isinstance(wanted, list):
        values = [value for each in wanted if (value := _as_stored(each, kind, array.type)) is not None]
        whole = [value for value in values if not (isinstance(value, float) and pa.types.is_integer(array.type))]
        holds = pc.is_in(array, value_set=pa.array(whole, array.type))
    else:
        holds = pa.array(np.ones(len(array), bool))
        for name, bound in wanted.items():
            value = _as_stored(bound, kind, array.type)
            if value is None:
                return np.zeros(len(array), bool)
            beside = array  # Arrow compares integers with parts of one only if they fit into a float
            if isinstance(value, float) and pa.types.is_integer(array.type):
                beside = array.cast(pa.float64(), safe=False)
            holds = pc.and_kleene(holds, _COMPARE[name](beside, pa.scalar(value, beside.type)))
    return holds.fill_null(False).to_numpy(zero_copy_only=False)


def _as_stored(value: Any, kind: Kind, stored: pa.DataType) -> Any:
    """Return a filter's value as `comparable` has it, None if it is of another kind."""
    try:
        value = _read_value(value, kind)
    except ValueError:
        return None
    if kind == "time":
        return (datetime.fromisoformat(value) - EPOCH) // timedelta(microseconds=1)
    return float(value) if pa.types.is_floating(stored) else value


def _read_json(text: str) -> Any:
    if len(text) > MOST_CHARACTERS:
        raise FilterError(f"filter: {len(text)} characters; {MOST_CHARACTERS} at most")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise FilterError(f"filter: not a JSON object: {_shown(text)}") from None


def _condition(name: object, wanted: object, schema: pa.Schema) -> list[Any] | dict[str, Any]:
    """Return the values, or the bounds, of an attribute in canonical form."""
    known = [each for each in schema.names if each not in NO_ATTRIBUTES]
    if name not in known:
        near = difflib.get_close_matches(str(name)[:_SHOWN], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known[:_SHOWN])}"
        raise FilterError(f"filter: no attribute {_shown(name)}; {hint}")
    place, stored = f"filter.{name}", schema.field(name).type
    kind = kind_of(stored)
    if kind is None:
        raise FilterError(f"{place}: {stored} is not filtered by; leave it out")
    if isinstance(wanted, dict):
        return _range(place, wanted, kind)
    values = wanted if isinstance(wanted, list) else [wanted]
    if not values:
        raise FilterError(f"{place}: an empty list matches nothing; name a value or leave it out")
    if len(values) > MOST_VALUES:
        raise FilterError(f"{place}: {len(values)} values; {MOST_VALUES} at most")
    read = {_value(place, value, kind) for value in values}
    return sorted(read, key=str if kind == "nothing" else None)


def _range(place: str, wanted: dict[Any, Any], kind: Kind) -> dict[str, Any]:
    if kind == "boolean":
        raise FilterError(f"{place}: a boolean has no range; say true or false")
    if not wanted or not wanted.keys() <= _COMPARE.keys():
        wrong = next((name for name in wanted if name not in _COMPARE), None)
        found = "an empty object" if wrong is None else _shown(wrong)
        raise FilterError(f"{place}: a range has {', '.join(_COMPARE)}, found {found}")
    return {name: _value(f"{place}.{name}", bound, kind) for name, bound in wanted.items()}


def _value(place: str, raw: object, kind: Kind) -> Any:
    try:
        return _read_value(raw, kind)
    except ValueError:
        expected = _SPELLED.get(kind, "a text, a number or a boolean")
        raise FilterError(f"{place}: expected {expected}, found {_shown(raw)}") from None


def _read_value(raw: object, kind: Kind) -> Any:
    """Return a value in canonical form: whole numbers as int, times in UTC. Raises ValueError if it is of another
    kind."""
    if isinstance(raw, bool):
        if kind in ("boolean", "nothing"):
            return raw
    elif isinstance(raw, int | float):
        if kind in ("number", "nothing"):
            return _number(raw)
    elif isinstance(raw, str):
        raw.encode()  # half a surrogate pair is no text
        if kind == "time":
            return _time(raw)
        if kind in ("text", "nothing"):
            return raw
    raise ValueError(kind)


def _number(raw: float) -> float:
    if not -(2**63) <= raw < 2**63:
        if isinstance(raw, int) or not math.isfinite(raw):
            raise ValueError("no number of 64 bits")
        return raw
    return int(raw) if raw == int(raw) else raw


def _time(raw: str) -> str:
    try:
        read = datetime.fromisoformat(raw)
        return (read.astimezone(UTC).replace(tzinfo=None) if read.tzinfo else read).isoformat()
    except OverflowError as error:
        raise ValueError(raw) from error


def _shown(raw: object) -> str:
    kind = {list: "a list", dict: "an object", type(None): "null"}.get(type(raw))
    text = kind or (json.dumps(raw) if isinstance(raw, bool | str) else str(raw)[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
