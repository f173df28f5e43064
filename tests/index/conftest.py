"""A shop with pictures and a model of tiny encoders, and what a search of its index must find."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixer.config import ModelConfig
from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.gallery import Shard, merge_top_k, read_manifest, segment_folders
from mixer_platform.index.embeddings import chain_of, read_rows, vectors
from mixer_platform.storage import open_storage, resolve_uri

ITEMS = 60
Rows = list[dict[str, Any]]


class Shop:
    """Items, queries and a workspace with a model; `rows` is the catalogue as it should be."""

    def __init__(self, folder: Path, model: Path, **index: Any) -> None:
        self.data, self.workspace = folder / "data", folder / "workspace"
        self.data.mkdir(parents=True)
        (self.workspace / "models").mkdir(parents=True)
        (self.workspace / "models/model-a").symlink_to(model)
        self.rows: Rows = [self.item(number) for number in range(ITEMS)]
        self.rows[3]["image"] = None
        self.rows[4]["image"] = "pictures/nowhere.png"
        self.rows[5] |= {"image": None, "title": None}
        queries = [{"query_id": str(n), "image": self.picture(f"q{n}", 100 + n)} for n in range(12)]
        pq.write_table(pa.Table.from_pylist(queries), self.data / "queries.parquet")
        self.write_items(self.rows)
        settings = {"shards": 3, "partition_items": 10, "recall_queries": 12, **index}
        tree = {"data": str(self.data), "workspace": str(self.workspace), "index": settings}
        self.config = RunConfig.model_validate(tree)
        self.storage = open_storage(str(self.workspace))

    def picture(self, name: str, seed: int) -> str:
        path = self.data / f"pictures/{name}.png"
        path.parent.mkdir(exist_ok=True)
        blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(blocks).resize((40, 36), Image.Resampling.NEAREST).save(path)
        return f"pictures/{name}.png"

    def item(self, number: int, seed: int | None = None) -> dict[str, Any]:
        seed = number if seed is None else seed
        title = ["red thing", "green thing", "blue, round"][seed % 3]
        picture = self.picture(f"i{number}-{seed}", seed)
        return {"item_id": f"i{number}", "title": title, "image": picture, "price": seed / 2}

    def write_items(self, rows: Rows) -> None:
        pq.write_table(pa.Table.from_pylist(rows), self.data / "items.parquet")

    def changes(self, name: str, items: Rows = (), deleted: list[str] = ()) -> RunConfig:  # type: ignore[assignment]
        """Write changes beside the catalogue's pictures; return the configuration that names them."""
        folder = self.data.parent / name
        folder.mkdir()
        (folder / "pictures").symlink_to(self.data / "pictures")
        if items:
            schema = pq.read_schema(self.data / "items.parquet")
            pq.write_table(pa.Table.from_pylist(items, schema), folder / "items.parquet")
        if deleted:
            pq.write_table(pa.table({"item_id": list(deleted)}), folder / "deleted.parquet")
        return self.with_index(changes=str(folder))

    def with_index(self, **settings: Any) -> RunConfig:
        tree = self.config.model_dump()
        return RunConfig.model_validate({**tree, "index": {**tree["index"], **settings}})

    def shards(self, version: str = "current") -> list[Shard]:
        index = read_manifest(self.storage, version)
        with tempfile.TemporaryDirectory() as scratch:
            return [Shard(segment_folders(self.storage, entry, scratch), entry, index.search) for entry in index.shards]

    def search(self, queries: np.ndarray, k: int, version: str = "current") -> list[list[tuple[str, float]]]:
        """Return item_ids and scores, best first."""
        shards = self.shards(version)
        scores, ids = merge_top_k([shard.search(queries, k) for shard in shards], k)
        names: dict[int, str] = {}
        for shard in shards:
            mine = np.unique(ids[shard.holds(ids)])
            names |= {i: row["item_id"] for i, row in zip(mine.tolist(), shard.items(mine), strict=True)}
        return [
            [(names[i], s) for i, s in zip(*row, strict=True) if i in names] for row in zip(ids, scores, strict=True)
        ]

    def shown(self) -> dict[str, dict[str, Any]]:
        """Return the display columns of everything that is found, by item_id; `image` is the file that is shown."""
        parts = [(shard, segment) for shard in self.shards() for segment in shard.segments]
        rows = [row for shard, segment in parts for row in shard.items(segment.ids[segment.alive])]
        assert len(rows) == len({row["item_id"] for row in rows})
        for row in rows:
            row["image"] = row["image"] and str(Path(resolve_uri(row["image"], str(self.data))).resolve())
        return {row["item_id"]: row for row in rows}

    def embedded(self) -> dict[str, np.ndarray]:
        """Return the embeddings by item_id that the served index is made of."""
        chain = chain_of(self.storage, read_manifest(self.storage).embeddings)
        rows = read_rows(self.storage, chain, (0, 2**63 - 1))
        assert rows is not None
        assert rows["id"].to_pylist() == sorted(rows["id"].to_pylist())
        return dict(zip(rows["item_id"].to_pylist(), vectors(rows["embedding"]), strict=True))


@pytest.fixture(scope="session")
def model_folder(architecture: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from mixer.export import export_model
    from mixer.towers import MixerModel

    torch.manual_seed(5)
    model, folder = MixerModel(architecture).eval(), tmp_path_factory.mktemp("models")
    model.save_pretrained(folder)
    export_model(model, folder)
    (folder / "manifest.json").write_bytes(
        versions.to_json({"version": "model-a", "created_ms": 1, "dim": architecture.dim})
    )
    return folder


@pytest.fixture
def shop(tmp_path: Path, model_folder: Path) -> Shop:
    return Shop(tmp_path, model_folder)
