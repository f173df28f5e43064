"""Counts that are measured, not derived: what came in is used or in quarantine, or the job fails."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset
from ray.data import Dataset

from mixer_platform.errors import MixerError
from mixer_platform.inputs import REASON
from mixer_platform.prepare import rows
from mixer_platform.schema import ITEMS, LOGS, QUERIES
from mixer_platform.storage import Storage

_KINDS = {ITEMS.name: "item", QUERIES.name: "query"}


def rows_used(logs: Dataset, storage: Storage, folder: str) -> dict[str, int]:
    """Count the samples that were written, and the log rows that were learned from."""
    written = pyarrow.dataset.dataset(storage.path(f"{folder}/train"), filesystem=storage.filesystem)
    used = {name: written.count_rows(filter=pc.field("kind") == kind) for name, kind in _KINDS.items()}
    return used | {LOGS.name: logs.map_batches(rows.sound, batch_format="pyarrow").count()}


def balanced(
    data: str, rows_in: dict[str, int], rows_out: dict[str, int], reasons: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Return rows_in, rows_out and the reasons of each table. Raises MixerError if a table's rows do not add up."""
    for name, quarantined in reasons.items():
        found = rows_out[name] + sum(quarantined.values())
        if found != rows_in[name]:
            raise MixerError(
                f"{data}/{name}: {rows_in[name]} rows were read, but {found} are used or in quarantine; "
                "nothing is published: run prepare again, and report it if the numbers stay"
            )
    return {
        name: {"rows_in": rows_in[name], "rows_out": rows_out[name], "quarantined": quarantined}
        for name, quarantined in reasons.items()
    }


def most_frequent(logs: Dataset) -> str:
    """Say why log rows are not used, the three most frequent reasons first."""
    counts = {row[REASON]: row["count()"] for row in logs.groupby(REASON).count().take_all() if row[REASON]}
    told = [f"{counts[reason]} × {reason}" for reason in sorted(counts, key=counts.__getitem__, reverse=True)[:3]]
    return "; ".join(told) or "every row is sound, but none is a click"
