"""A handmade samples version to learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixer_platform import versions
from mixer_platform.prepare.job import SAMPLES
from mixer_platform.storage import open_storage


def make_workspace(parent: Path) -> Path:
    """Make a workspace with samples/v1: three classes of one colour each, four photos and two items a class."""
    folder = parent / "workspace"
    rng = np.random.default_rng(0)
    rows = []
    for label, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        for n in range(6):
            kind = "query" if n < 4 else "item"
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (40, 48, 3)), 0, 255).astype(np.uint8)
            path = parent / f"{kind}-{label}-{n}.png"
            Image.fromarray(pixels).save(path)
            text = None if kind == "query" else f"{['red', 'green', 'blue'][label]} round thing"
            row = {"sample_id": path.stem, "kind": kind, "image": str(path), "text": text, "class_id": label}
            row["weight"] = 0.5 + 0.1 * n if kind == "query" else 1.0
            if kind == "query":
                row |= {"candidates": [label, (label + 1) % 3][: 1 + n % 2], "evidence": [5.0, -1.0][: 1 + n % 2]}
                row["unseen"] = -0.5
            rows.append(row)
    rows[4]["image"] = None
    rows[11]["text"] = None
    (folder / "samples/v1/train").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows[:7], SAMPLES), folder / "samples/v1/train/0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[7:], SAMPLES), folder / "samples/v1/train/1.parquet")
    versions.publish(open_storage(str(folder)), "samples", "v1", {"classes": 3})
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace of `make_workspace`."""
    return make_workspace(tmp_path)


@pytest.fixture(scope="module")
def other_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another, for the whole of a module."""
    return make_workspace(tmp_path_factory.mktemp("other"))
