"""What a run gained over an earlier one, photo by photo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixer_platform import versions
from mixer_platform.errors import InputError, MissingError
from mixer_platform.storage import Storage

_DRAWS = 2000


def check_comparable(storage: Storage, kind: str, report: dict[str, Any], against: str) -> None:
    """Raise InputError if an earlier report's gallery or truth, as far as this one's are known, is another: its figures
    then do not compare, or if it is not there."""
    try:
        before = versions.read_json(storage, f"{kind}/{against}.json")
    except MissingError as error:
        there = f"{storage.uri}/{kind}"
        raise InputError(f"evaluate.against: no report {against} in {there}; give the version of one") from error
    for part in ("gallery", "truth"):
        if part in report and before.get(part) != report[part]:
            measured = f"evaluate.against: {kind}/{against} was measured on another {part}"
            raise InputError(f"{measured}; evaluate that run again on this one")


def compare(storage: Storage, kind: str, report: dict[str, Any], asked: pa.Table, against: str) -> dict[str, Any]:
    """Return what recall@1 gained over an earlier report, with a 95 % bootstrap interval over photos.

    Raises as `check_comparable` does.
    """
    check_comparable(storage, kind, report, against)
    earlier = pq.read_table(pa.BufferReader(storage.read(f"{kind}/{against}.parquet")))
    gained = _first_hits(asked) - _first_hits(earlier)
    rng = np.random.default_rng(0)
    means = [gained[rng.integers(len(gained), size=len(gained))].mean() for _ in range(_DRAWS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"version": against, "r1_gain": round(gained.mean(), 4), "interval": [round(low, 4), round(high, 4)]}


def _first_hits(asked: pa.Table) -> np.ndarray:
    return np.array([bool(hits and hits[0]) for hits in asked["hits"].to_pylist()], float)
