"""The published index as its readers see it: a manifest, and shards that are searched and merged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from mixer_platform import versions
from mixer_platform.errors import StorageError, VersionError
from mixer_platform.storage import Storage

KIND = "index"
CURRENT = f"{KIND}/CURRENT"
MISSING = -1  # FAISS pads short results with this id


class ShardEntry(BaseModel):
    """One shard in the manifest; `files` are names and their sha256."""

    model_config = ConfigDict(frozen=True)

    name: str
    count: int
    files: dict[str, str]


class IndexManifest(BaseModel):
    """What `index/<version>/manifest.json` says."""

    model_config = ConfigDict(frozen=True)

    version: str
    created_ms: int
    model: str
    embeddings: str
    dim: int
    metric: str
    factory: str
    search: dict[str, int]
    shards: list[ShardEntry]
    items: int
    without_picture: list[str]
    left_out: list[str]
    recall_at_10: float
    recall_queries: int


def current_version(storage: Storage) -> str:
    """Return the index version being served. Raises StorageError when none was ever published."""
    if storage.tag(CURRENT) is None:
        raise StorageError(f"{storage.uri}/{CURRENT}: no index is published; run jobs/index.py first")
    return storage.read(CURRENT).decode().strip()


def read_manifest(storage: Storage, version: str = "current") -> IndexManifest:
    """Return the manifest of an index version; "current" is the one that CURRENT names. Raises StorageError."""
    wanted = current_version(storage) if version == "current" else version
    return IndexManifest.model_validate(versions.require(storage, KIND, wanted))


def check_model(manifest: IndexManifest, model: str) -> None:
    """Raise VersionError unless `model` is the version whose embeddings the index holds."""
    if model != manifest.model:
        raise VersionError(
            f"index {manifest.version} was built by model {manifest.model}, not by {model}: "
            f"run jobs/index.py with index.model={model} first"
        )


class Shard:
    """One shard, loaded: a FAISS index over int64 ids and an Arrow table of the same ids, in order."""

    def __init__(self, folder: str | Path, entry: ShardEntry, search: dict[str, int], threads: int = 1) -> None:
        """Load and check a shard from a local folder. Raises StorageError naming the file that is not as published."""
        self.name = entry.name
        faiss.omp_set_num_threads(threads)
        for name, digest in entry.files.items():
            path = Path(folder) / name
            if not path.exists():
                raise StorageError(f"{path}: missing; publish the index again")
            if sha256(path) != digest:
                raise StorageError(f"{path}: not the bytes that were published; copy or publish the index again")
        self.index = faiss.read_index(str(Path(folder) / f"{entry.name}.faiss"))
        if search:
            faiss.ParameterSpace().set_index_parameters(self.index, ",".join(f"{k}={v}" for k, v in search.items()))
        with pa.memory_map(str(Path(folder) / f"{entry.name}.arrow")) as source:
            self.rows = pa.ipc.open_file(source).read_all()
        self._ids = self.rows["id"].to_numpy()
        self._row_of = {item_id: row for row, item_id in enumerate(self.rows["item_id"].to_pylist())}

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores float32 and ids int64, both [n, k], best first; ids are MISSING where there are fewer items."""
        scores, ids = self.index.search(np.ascontiguousarray(queries, np.float32), k)
        return scores, ids

    def items(self, ids: np.ndarray) -> list[dict[str, Any]]:
        """Return the display columns of ids of this shard, in their order."""
        rows = np.searchsorted(self._ids, ids)
        return self.rows.take(pa.array(rows)).drop_columns("id").to_pylist()

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Return bool, which of these ids are in this shard."""
        return np.isin(ids, self._ids)

    def vector(self, item_id: str) -> np.ndarray | None:
        """Return the embedding of an item, float32 [dim], or None if it is not in this shard."""
        row = self._row_of.get(item_id)
        return None if row is None else self.index.reconstruct(int(self._ids[row]))


def merge_top_k(found: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge the (scores, ids) of several shards, each [n, k'], into the k best: equal scores by smaller id.

    The result equals a search of one index that holds all of them.
    """
    scores = np.concatenate([part[0] for part in found], axis=1)
    ids = np.concatenate([part[1] for part in found], axis=1)
    scores = np.where(ids == MISSING, -np.inf, scores)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def sha256(path: str | Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_current(storage: Storage, version: str, replaces: str | None) -> None:
    """Make `version` the one served, if CURRENT's tag is still `replaces`. Raises ConflictError."""
    storage.publish(CURRENT, (version + "\n").encode(), replaces)


def manifest_json(manifest: IndexManifest) -> dict[str, Any]:
    """Return the manifest as plain JSON values."""
    return json.loads(manifest.model_dump_json())
