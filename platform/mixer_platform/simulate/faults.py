"""What real data has and a demo must not hide: broken and repeated rows, unusable pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# The name of the fault -> the column that it spoils and the value that is left there.
ROW_FAULTS: dict[str, tuple[str, str | int | None]] = {
    "unknown event": ("event", "clik"),
    "timestamp -1": ("timestamp_ms", -1),
    "negative position": ("position", -1),
    "missing query_id": ("query_id", None),
    "unknown item_id": ("item_id", "item-withdrawn"),
    "unknown query_id": ("query_id", "q-withdrawn"),
}
REPEATED = "repeated event_id"


def break_rows(logs: pa.Table, rate: float, rng: np.random.Generator) -> tuple[pa.Table, dict[str, int]]:
    """Spoil or repeat a share `rate` of the rows, each fault equally often. Returns the logs and counts by fault.

    No row has two faults. Repeated rows are exact copies at the end, as from a client that sent a batch twice.
    """
    kinds = len(ROW_FAULTS) + 1
    each = round(rate * logs.num_rows / kinds)
    chosen = rng.permutation(logs.num_rows)[: each * kinds].reshape(kinds, each)
    for rows, (column, value) in zip(chosen, ROW_FAULTS.values(), strict=False):
        spoiled = np.zeros(logs.num_rows, bool)
        spoiled[rows] = True
        field = logs.schema.field(column)
        values = pc.if_else(spoiled, pa.scalar(value, field.type), logs[column])
        logs = logs.set_column(logs.schema.get_field_index(column), field, values)
    logs = pa.concat_tables([logs, logs.take(np.sort(chosen[-1]))])
    return logs, dict.fromkeys((*ROW_FAULTS, REPEATED), each)


def break_pictures(paths: Sequence[Path]) -> dict[str, int]:
    """Make the pictures at `paths` unusable in turn: missing, truncated, not an image. Returns counts by fault."""
    counts = dict.fromkeys(("missing", "truncated", "not an image"), 0)
    for path, fault in zip(paths, list(counts) * len(paths), strict=False):
        if fault == "missing":
            path.unlink()
        elif fault == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.write_text("<html><body>404: picture not found</body></html>\n")
        counts[fault] += 1
    return counts
