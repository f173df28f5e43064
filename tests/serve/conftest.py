"""A tiny workspace: a real ONNX query graph that averages pixels, and real FAISS shards."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import TensorProto, helper
from PIL import Image
from ray import serve as ray_serve

from mixer.embedder import QUERY_GRAPH, SETTINGS, QueryEmbedder
from mixer.fast_faiss import faiss
from mixer.images import decode
from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.gallery import CURRENT, KIND, ShardEntry, publish_current
from mixer_platform.index.embeddings import embedding_column
from mixer_platform.index.segments import new_index, write_segment
from mixer_platform.item_ids import assign_ids
from mixer_platform.serve import job
from mixer_platform.storage import open_storage

SIZE, DIM, ITEMS, SHARDS = 16, 48, 60, 3
MODEL, INDEX = "model-a", "index-a"
COLOURS = ["red", "green", "blue", None]
ODD_ID = "shop/no. 7?"  # an item id that a path must carry


@dataclass(frozen=True)
class Workspace:
    """What the test made and what a search of it must find."""

    config: RunConfig
    item_ids: list[str]
    embeddings: np.ndarray

    @property
    def root(self) -> Path:
        return Path(self.config.workspace)

    @property
    def model_folder(self) -> Path:
        return self.root / "models" / MODEL

    def exact(self, query: np.ndarray, k: int) -> list[str]:
        """Return the k nearest items of all, by one matrix product; equal scores by smaller id."""
        order = np.lexsort((assign_ids(self.item_ids, {}), -(self.embeddings @ query)))[:k]
        return [self.item_ids[row] for row in order]

    def embed(self, photo: bytes) -> np.ndarray:
        embedder = QueryEmbedder(self.model_folder)
        return embedder(embedder.preprocess(decode(photo))[np.newaxis])[0]


def make_photo(seed: int, size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    """Return a picture of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(file, kind)
    return file.getvalue()


def write_model(folder: Path, dim: int = DIM, negative: bool = False) -> None:
    """Save a query graph: mean colours of 4 x 4 blocks, about 0, of length 1; or the negative of that.

    A query of one and an index of the other find what is least alike.
    """
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["grey", "floats"] if negative else ["floats", "grey"], ["centred"]),
        helper.make_node("Transpose", ["centred"], ["channels"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["channels"], ["blocks"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["blocks"], ["flat"]),
        helper.make_node("LpNormalization", ["flat"], ["embeddings"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "query",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["n", DIM])],
        [helper.make_tensor("grey", TensorProto.FLOAT, [1], [127.5])],
    )
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / QUERY_GRAPH))
    settings = {"preprocess": {"size": SIZE, "resize": SIZE}, "dim": dim, "max_tokens": 8}
    (folder / SETTINGS).write_text(json.dumps(settings))


def write_shard(folder: Path, name: str, ids: np.ndarray, item_ids: list[str], embeddings: np.ndarray) -> dict:
    """Write one shard of the index version whose folder it is, and return its entry in the manifest."""
    hashed = assign_ids([item_ids[i] for i in ids], {})
    order = np.argsort(hashed)
    ids = ids[order]
    table = pa.table(
        {
            "id": hashed[order],
            "item_id": [item_ids[i] for i in ids],
            "title": [None if i == 1 else f"Item {i}" for i in ids],
            "description": [f"The item number {i}" if i % 2 else None for i in ids],
            "image": [f"images/{i}.jpg" for i in ids],
            "colour": [COLOURS[i % 4] for i in ids],
            "price": pa.array([float("nan") if i == 2 else i / 2 for i in ids], pa.float64()),
        }
    )
    table = table.append_column("embedding", embedding_column(embeddings[ids]))
    entry, _ = write_segment(folder, folder.name, name, faiss.serialize_index(new_index("Flat", DIM)), [table])
    return ShardEntry(name=name, count=len(ids), segments=[entry]).model_dump()


def publish_version(
    root: Path, model: str = MODEL, index: str = INDEX, shards: int = SHARDS, negative: bool = False
) -> tuple[list[str], np.ndarray]:
    """Publish a model and an index of ITEMS items, not yet as the current one; items 3 and 4 have equal embeddings."""
    storage = open_storage(str(root))
    write_model(root / "models" / model, negative=negative)
    versions.publish(storage, "models", model, {"metrics": {}})
    item_ids = [ODD_ID if i == 7 else f"item-{i:03}" for i in range(ITEMS)]
    embedder = QueryEmbedder(root / "models" / model)
    embeddings = embedder(np.stack([embedder.preprocess(decode(make_photo(i))) for i in range(ITEMS)]))
    embeddings[4] = embeddings[3]
    folder = root / KIND / index
    folder.mkdir(parents=True)
    content = {
        "model": model,
        "embeddings": "embeddings-a",
        "dim": DIM,
        "metric": "inner_product",
        "factory": "Flat",
        "search": {},
        "shards": [
            write_shard(folder, f"shard-{n:05}", np.arange(n, ITEMS, shards), item_ids, embeddings)
            for n in range(shards)
        ],
        "items": ITEMS,
        "recall_at_10": 1.0,
        "recall_queries": 0,
    }
    versions.publish(storage, KIND, index, content)
    return item_ids, embeddings


def serve_version(root: Path, index: str) -> None:
    """Make an index version the current one."""
    storage = open_storage(str(root))
    publish_current(storage, index, replaces=storage.tag(CURRENT))


def make_workspace(root: Path, **serve: object) -> Workspace:
    """Publish a model and an index, and make it the current one."""
    item_ids, embeddings = publish_version(root)
    serve_version(root, INDEX)
    (root / "images").mkdir()
    for i in range(ITEMS):
        (root / f"images/{i}.jpg").write_bytes(make_photo(i))
    config = RunConfig.model_validate({"data": str(root), "workspace": str(root), "serve": {"keys": False, **serve}})
    return Workspace(config, item_ids, embeddings)


@pytest.fixture(scope="session")
def photo() -> Callable[..., bytes]:
    return make_photo


@pytest.fixture
def fresh_workspace(tmp_path: Path) -> Workspace:
    """One that a test may break."""
    return make_workspace(tmp_path / "workspace", port=0, follow_s=0.1)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Nobody writes to it."""
    return make_workspace(
        tmp_path_factory.mktemp("workspace"), port=0, max_k=50, max_photos=4, max_body_mb=1, follow_s=0.1
    )


@pytest.fixture(scope="session")
def report(ray_cluster: None, workspace: Workspace) -> Iterator[dict[str, Any]]:
    """The job's report of a service over HTTP; who replaces it brings it back."""
    report = job.serve(workspace.config)
    yield report
    job.stop()
    assert not ray_serve.status().applications
