"""What a run gained over an earlier one, photo by photo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixer_platform import versions
from mixer_platform.errors import InputError
from mixer_platform.storage import Storage


def compare(storage: Storage, kind: str, report: dict[str, Any], asked: pa.Table, against: str) -> dict[str, Any]:
    """Return what recall@1 gained over an earlier report, with a 95 % bootstrap interval over photos.

    Raises InputError if that one's gallery or truth is another: its figures then do not compare.
    """
    before = versions.read_json(storage, f"{kind}/{against}.json")
    for part in ("gallery", "truth"):
        if before.get(part) != report[part]:
            measured = f"evaluate.against: {kind}/{against} was measured on another {part}"
            raise InputError(f"{measured}; evaluate that run again on this one")
    earlier = pq.read_table(pa.BufferReader(storage.read(f"{kind}/{against}.parquet")))
    gained = _first_hits(asked) - _first_hits(earlier)
    drawn = np.random.default_rng(0).integers(len(gained), size=(2000, len(gained)))
    low, high = np.percentile(gained[drawn].mean(axis=1), [2.5, 97.5])
    return {"version": against, "r1_gain": round(gained.mean(), 4), "interval": [round(low, 4), round(high, 4)]}


def _first_hits(asked: pa.Table) -> np.ndarray:
    return np.array([bool(hits and hits[0]) for hits in asked["hits"].to_pylist()], float)
