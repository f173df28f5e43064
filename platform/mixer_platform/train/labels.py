"""What samples say of their classes, as tensors."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mixer.targets import PADDING, Targets, concatenate

LABELS = ["sample_id", "kind", "class_id", "weight", "candidates", "evidence", "unseen"]


def in_training_order(rows: pa.Table) -> pa.Table:
    """Sort samples: photos first, each kind by id."""
    return rows.sort_by([("kind", "descending"), ("sample_id", "ascending")])


def read_labels(rows: pa.Table) -> tuple[Tensor, Targets]:
    """Return the likeliest class, int64 [n], and the targets of samples that are `in_training_order`."""
    labels = torch.from_numpy(rows["class_id"].to_numpy().copy())
    weights = torch.from_numpy(rows["weight"].to_numpy().copy())
    photos = sum(kind == "query" for kind in rows["kind"].to_pylist())
    classes, evidence = (_padded(rows[name].slice(0, photos), fill) for name, fill in _FILLS.items())
    unseen = torch.from_numpy(rows["unseen"].slice(0, photos).to_numpy().astype(np.float32))
    uncertain = Targets(classes.long(), evidence.float(), unseen, weights[:photos])
    return labels, concatenate([uncertain, Targets.certain(labels[photos:], weights[photos:])])


_FILLS = {"candidates": PADDING, "evidence": 0}


def _padded(lists: pa.ChunkedArray, fill: int) -> Tensor:
    """Return lists of numbers as one tensor [n, longest]."""
    whole = lists.combine_chunks()
    lengths = whole.value_lengths().to_numpy(zero_copy_only=False)
    padded = np.full((len(whole), max(lengths.max(initial=0), 1)), fill, np.float64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = whole.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(padded)
