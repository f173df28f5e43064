"""The published index as its readers see it: a manifest, and shards that are searched and merged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from mixer_platform import versions
from mixer_platform.errors import StorageError, VersionError
from mixer_platform.item_ids import probes
from mixer_platform.storage import Storage

KIND = "index"
CURRENT = f"{KIND}/CURRENT"
MISSING = -1  # FAISS pads short results with this id
_LEAST = np.float32(np.finfo(np.float32).min)  # and with this score


class SegmentEntry(BaseModel):
    """One segment of a shard: its files lie in the folder of the index version that wrote them.

    `NAME.faiss` holds vectors by id, `NAME.arrow` the display columns of the same ids in the same order;
    `NAME.gone.arrow`, where there is one, the ids that this segment's update deleted.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    name: str
    rows: int
    files: dict[str, str]  # names and their sha256


class ShardEntry(BaseModel):
    """One shard in the manifest: a base and the updates since, oldest first. `count` items of them are alive."""

    model_config = ConfigDict(frozen=True)

    name: str
    count: int
    segments: list[SegmentEntry]


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
    recall_at_10: float  # of the last build: updates keep their vectors as they are
    recall_queries: int
    why: str = ""  # this kind of index
    bytes_per_vector: float = 0
    queries_per_second: float = 0  # one thread, all shards
    latency_ms: float = 0  # one query in the slowest shard


def current_version(storage: Storage) -> str:
    """Return the index version being served. Raises StorageError when none was ever published."""
    if storage.tag(CURRENT) is None:
        raise StorageError(f"{storage.uri}/{CURRENT}: no index is published; run jobs/index.py first")
    return storage.read(CURRENT).decode().strip()


def read_manifest(storage: Storage, version: str = "current") -> IndexManifest:
    """Return the manifest of an index version; "current" is the one that CURRENT names. Raises StorageError."""
    wanted = current_version(storage) if version == "current" else version
    try:
        return IndexManifest.model_validate(versions.require(storage, KIND, wanted))
    except ValidationError as error:
        address = f"{storage.uri}/{KIND}/{wanted}/{versions.MANIFEST}"
        raise StorageError(f"{address}: not of a form that is read here; run jobs/index.py build") from error


def check_model(manifest: IndexManifest, model: str) -> None:
    """Raise VersionError unless `model` is the version whose embeddings the index holds."""
    if model != manifest.model:
        raise VersionError(
            f"index {manifest.version} was built by model {manifest.model}, not by {model}: "
            f"run jobs/index.py with index.model={model} first"
        )


class Segment:
    """Vectors and display rows in one order; rows that a later segment replaced or deleted are hidden."""

    def __init__(self, folder: str | Path, entry: SegmentEntry, search: Mapping[str, int], mapped: bool) -> None:
        """Load and check it from a local folder. Raises StorageError naming the file that is not as published."""
        for name, digest in entry.files.items():
            path = Path(folder) / name
            if not path.exists():
                raise StorageError(f"{path}: missing; publish the index again")
            if sha256(path) != digest:
                raise StorageError(f"{path}: not the bytes that were published; copy or publish the index again")
        path = Path(folder) / f"{entry.name}.faiss"
        self._owner = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        self._index = faiss.downcast_index(self._owner.index)
        self._settings = search
        self.rows = _mapped_table(Path(folder) / f"{entry.name}.arrow")
        self.ids: np.ndarray = self.rows["id"].to_numpy()
        if not np.array_equal(faiss.vector_to_array(self._owner.id_map), self.ids):
            raise StorageError(f"{path}: its ids are not those of {entry.name}.arrow; publish the index again")
        gone = f"{entry.name}.gone.arrow"
        self._gone = _mapped_table(Path(folder) / gone)["id"].to_numpy() if gone in entry.files else self.ids[:0]
        self.alive = np.ones(len(self.ids), bool)
        self._selector: faiss.IDSelector | None = None

    @property
    def replaces(self) -> np.ndarray:
        """The ids that earlier segments no longer show."""
        return np.concatenate([self.ids, self._gone])

    def hide(self, ids: np.ndarray) -> None:
        """Find none of these ids any more."""
        rows = self.rows_of(ids)
        self.alive[rows[rows != MISSING]] = False
        if not self.alive.all():
            self._bits = np.packbits(self.alive, bitorder="little")
            self._selector = faiss.IDSelectorBitmap(self._bits)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and ids as `Shard.search` does."""
        # FAISS knows rows by number below the layer of ids, and only there can it be told which ones to pass over.
        scores, rows = self._index.search(
            queries, k, params=search_parameters(self._index, self._settings, self._selector)
        )
        ids = self.ids[rows] if len(self.ids) else rows
        return np.where(rows < 0, _LEAST, scores), np.where(rows < 0, MISSING, ids)

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id, int64 [n], MISSING where it is not found here."""
        if not len(self.ids):
            return np.full(len(ids), MISSING)
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where((self.ids[rows] == ids) & self.alive[rows], rows, MISSING)

    def vector(self, row: int) -> np.ndarray:
        """Return the vector of a row as the index knows it, float32 [dim]."""
        return self._index.reconstruct(row)


class Shard:
    """One shard, loaded: its segments are searched as one index over int64 ids."""

    def __init__(
        self,
        folders: Mapping[str, str | Path],
        entry: ShardEntry,
        search: Mapping[str, int],
        threads: int = 1,
        mapped: bool = False,
    ) -> None:
        """Load and check a shard; `folders` are local ones by the version of their segments.

        `mapped` leaves vectors on disk until they are asked for. Raises StorageError naming the file that is not as
        published.
        """
        self.name = entry.name
        faiss.omp_set_num_threads(threads)
        self.segments = [Segment(folders[part.version], part, search, mapped) for part in entry.segments]
        for age, segment in enumerate(self.segments):
            later = [each.replaces for each in self.segments[age + 1 :]]
            if later:
                segment.hide(np.concatenate(later))
        self.count = sum(int(segment.alive.sum()) for segment in self.segments)
        if self.count != entry.count:
            raise StorageError(f"{self.name}: holds {self.count} items, not {entry.count}; publish the index again")

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores float32 and ids int64, both [n, k], best first; ids are MISSING where there are fewer items."""
        queries = np.ascontiguousarray(queries, np.float32)
        found = [segment.search(queries, k) for segment in self.segments]
        return found[0] if len(found) == 1 else merge_top_k(found, k)

    def items(self, ids: np.ndarray) -> list[dict[str, Any]]:
        """Return the display columns of ids of this shard, in their order."""
        rows: list[dict[str, Any]] = [{}] * len(ids)
        for segment in self.segments:
            found = segment.rows_of(ids)
            places = np.flatnonzero(found != MISSING)
            taken = segment.rows.take(pa.array(found[places])).drop_columns("id").to_pylist()
            for place, item in zip(places.tolist(), taken, strict=True):
                rows[place] = item
        return rows

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Return bool, which of these ids are in this shard."""
        flat = np.asarray(ids).reshape(-1)
        found = [segment.rows_of(flat) != MISSING for segment in self.segments]
        return np.any(found, axis=0).reshape(np.shape(ids))

    def item_ids(self) -> list[str]:
        """Return the item_id of everything that is found here."""
        found = [segment.rows["item_id"].filter(pa.array(segment.alive)) for segment in self.segments]
        return [item_id for part in found for item_id in part.to_pylist()]

    def vector(self, item_id: str) -> np.ndarray | None:
        """Return the embedding of an item, float32 [dim], or None if it is not in this shard.

        An index that compresses gives it back as well as it can.
        """
        ids = np.array(probes(item_id))
        for segment in self.segments:
            for row in segment.rows_of(ids).tolist():
                if row != MISSING and segment.rows["item_id"][row].as_py() == item_id:
                    return segment.vector(row)
        return None


def search_parameters(
    index: faiss.Index, settings: Mapping[str, int], selector: faiss.IDSelector | None = None
) -> faiss.SearchParameters:
    """Return how to search an index of any kind: the settings that it understands, over what `selector` lets pass."""
    kind = faiss.downcast_index(index)
    chosen = {"sel": selector} if selector is not None else {}
    if isinstance(kind, faiss.IndexRefine):
        base = search_parameters(kind.base_index, settings, selector)
        return faiss.IndexRefineSearchParameters(k_factor=settings.get("k_factor", 1), base_index_params=base)
    if isinstance(kind, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=search_parameters(kind.index, settings, selector))
    if isinstance(kind, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=settings.get("nprobe", 1), **chosen)
    if isinstance(kind, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=settings.get("efSearch", 16), **chosen)
    return faiss.SearchParameters(**chosen)


def merge_top_k(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge the (scores, ids) of several shards, each [n, k'], into the k best: equal scores by smaller id.

    The result equals a search of one index that holds all of them.
    """
    scores = np.concatenate([part[0] for part in found], axis=1)
    ids = np.concatenate([part[1] for part in found], axis=1)
    scores = np.where(ids == MISSING, -np.inf, scores)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def segment_folders(storage: Storage, shard: ShardEntry, scratch: str | Path) -> dict[str, str | Path]:
    """Return local folders of a shard's files by the version of their segments, copied to `scratch` if need be."""
    return {
        part.version: versions.fetch(storage, f"{KIND}/{part.version}", scratch, part.files) for part in shard.segments
    }


def sha256(path: str | Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_current(storage: Storage, version: str, replaces: str | None) -> None:
    """Make `version` the one served, if CURRENT's tag is still `replaces`. Raises ConflictError."""
    storage.publish(CURRENT, (version + "\n").encode(), replaces)


def _mapped_table(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
