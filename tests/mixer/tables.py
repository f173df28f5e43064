"""Small Arrow tables for tests of what logs say."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

Rows = list[tuple]


def table_of(names: str, rows: Rows) -> pa.Table:
    return pa.table(dict(zip(names.split(), zip(*rows, strict=True), strict=True)))


def items_of(ids: list[str], titles: list[str | None] | None = None) -> pa.Table:
    columns = {"item_id": pa.array(ids, pa.string()), "title": pa.array(titles or [None] * len(ids), pa.string())}
    return pa.table(columns)


def as_dict(table: pa.Table) -> dict:
    """Return {keys: last column}."""
    *keys, values = (column.to_pylist() for column in table.columns)
    return dict(zip(zip(*keys, strict=True), values, strict=True))


def random_pairs(seed: int, queries: int = 30, items: int = 12) -> Rows:
    rng = np.random.default_rng(seed)
    shown = [(q, i) for q in range(queries) for i in range(items) if rng.random() < 0.4]
    return [(f"q{q:02}", f"i{i:02}", float(rng.normal(0, 3))) for q, i in shown]
