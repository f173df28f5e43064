"""A handmade samples version to learn from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixer.config import ModelConfig
from mixer_platform import versions
from mixer_platform.config import TrainConfig
from mixer_platform.prepare.job import SAMPLES
from mixer_platform.storage import open_storage
from mixer_platform.train.features import cache_features


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
    write_samples(folder, "v1", rows)
    return folder


def write_samples(workspace: Path, version: str, rows: list[dict[str, Any]]) -> None:
    """Publish rows like those of a samples version's train/ as two files, and the classes of their items."""
    folder = workspace / "samples" / version
    (folder / "train").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows[:7], SAMPLES), folder / "train/0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[7:], SAMPLES), folder / "train/1.parquet")
    members: dict[int, list[str]] = {}
    for row in rows:
        if row["kind"] == "item":
            members.setdefault(row["class_id"], []).append(row["sample_id"])
    classes = [{"class_id": label, "item_ids": members[label]} for label in sorted(members)]
    pq.write_table(pa.Table.from_pylist(classes), folder / "classes.parquet")
    versions.publish(open_storage(str(workspace)), "samples", version, {"classes": len(classes)})


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace of `make_workspace`."""
    return make_workspace(tmp_path)


@pytest.fixture(scope="session")
def with_features(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, architecture: ModelConfig) -> Path:
    """A workspace whose features are cached, in two views, which takes a third of a short run's time. To be copied."""
    folder = make_workspace(tmp_path_factory.mktemp("cached"))
    cache_features(open_storage(str(folder)), "v1", architecture, TrainConfig(views=2))
    return folder


@pytest.fixture
def cached(with_features: Path, tmp_path: Path) -> Path:
    """A copy of `with_features`."""
    return shutil.copytree(with_features, tmp_path / "workspace")
