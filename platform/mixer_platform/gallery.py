"""The published index as its readers see it: a manifest, and shards that are searched and merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from mixer.calibration import Calibration
from mixer.fast_faiss import faiss
from mixer_platform import versions
from mixer_platform.attributes import Attribute, attributes_of, combined, merged_schema, with_schema
from mixer_platform.errors import MissingError, StorageError, VersionError
from mixer_platform.filters import Filter
from mixer_platform.item_ids import probes
from mixer_platform.segment import MISSING, Segment, SegmentEntry, best_of
from mixer_platform.storage import Storage

KIND = "index"
CURRENT = f"{KIND}/CURRENT"


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
    """Return the manifest of an index version; "current" is the one that CURRENT names. Raises StorageError, of
    which MissingError for one that is not there or of a form that is not read here."""
    wanted = current_version(storage) if version == "current" else version
    try:
        return IndexManifest.model_validate(versions.require(storage, KIND, wanted))
    except ValidationError as error:
        address = f"{storage.uri}/{KIND}/{wanted}/{versions.MANIFEST}"
        raise MissingError(f"{address}: not of a form that is read here; run jobs/index.py build") from error


def check_model(manifest: IndexManifest, model: str) -> None:
    """Raise VersionError unless `model` is the version whose embeddings the index holds."""
    if model != manifest.model:
        raise VersionError(
            f"index {manifest.version} was built by model {manifest.model}, not by {model}: "
            f"run jobs/index.py with index.model={model} first"
        )


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
        self.dim = self.segments[0].dim
        self.count = sum(int(segment.alive.sum()) for segment in self.segments)
        if self.count != entry.count:
            raise StorageError(f"{self.name}: holds {self.count} items, not {entry.count}; publish the index again")

    @cached_property
    def schema(self) -> pa.Schema:
        """The display columns, "id" among them, as they are in all segments together."""
        return merged_schema([segment.rows.schema for segment in self.segments])

    def search(self, queries: np.ndarray, k: int, where: Filter | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores float32 and ids int64, both [n, k], best first, equal scores by smaller id.

        Only what `where` lets pass is searched, and k of it are found wherever there are so many; else ids are MISSING.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        found = [segment.search(queries, k, where) for segment in self.segments]
        return found[0] if len(found) == 1 else merge_top_k(found, k)

    def rows(self, ids: np.ndarray) -> pa.Table:
        """Return the display columns, "id" among them, of those ids that are in this shard, in their order."""
        places, parts = [], []
        for segment, place, rows in self._located(ids):
            taken = segment.rows.take(pa.array(rows))
            places.append(place)
            parts.append(taken if len(self.segments) == 1 else with_schema(taken, self.schema))
        if not parts:
            return self.schema.empty_table()
        if len(parts) == 1:  # most shards have one segment, and every query comes by here
            return parts[0]
        return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(places))))

    def items(self, ids: np.ndarray, schema: pa.Schema | None = None) -> list[dict[str, Any]]:
        """Return the display columns of ids in their order, without "id"; an empty dict where an id is not here.

        `schema`: of other shards too, default: of this one.
        """
        items: list[dict[str, Any]] = [{}] * len(ids)
        for segment, places, rows in self._located(ids):
            found = segment.items(rows, self.schema if schema is None else schema)
            for place, item in zip(places.tolist(), found, strict=True):
                items[place] = item
        return items

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the embeddings of ids, float32 [n, dim], as well as the index gives them back; 0 where an id is not
        here."""
        vectors = np.zeros((len(ids), self.dim), np.float32)
        for segment, place, rows in self._located(ids):
            vectors[place] = segment.vectors(rows)
        return vectors

    @cached_property
    def _attributes(self) -> list[Attribute]:
        return combined([attributes_of(part.rows.filter(pa.array(part.alive))) for part in self.segments])

    def attributes(self) -> list[Attribute]:
        """Return what the attributes of everything found here say, for `merge_attributes`. Counted once."""
        return self._attributes

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
        for segment, _, rows in self._located(np.array(probes(item_id))):
            for row in rows.tolist():
                if segment.rows["item_id"][row].as_py() == item_id:
                    return segment.vectors(np.array([row]))[0]
        return None

    def _located(self, ids: np.ndarray) -> Iterator[tuple[Segment, np.ndarray, np.ndarray]]:
        """Yield each segment that holds some of these ids, the places of those among `ids`, and their rows."""
        for segment in self.segments:
            rows = segment.rows_of(np.asarray(ids))
            places = np.flatnonzero(rows != MISSING)
            if len(places):
                yield segment, places, rows[places]


def merge_top_k(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge the (scores, ids) of several shards, each [n, k'], into the k best: equal scores by smaller id.

    The result equals a search of one index that holds all of them.
    """
    scores = np.concatenate([part[0] for part in found], axis=1)
    ids = np.concatenate([part[1] for part in found], axis=1)
    return best_of(scores, ids, k)


def segment_folders(storage: Storage, shard: ShardEntry, scratch: str | Path) -> dict[str, str | Path]:
    """Return local folders of a shard's files by the version of their segments, copied to `scratch` if need be."""
    return {
        part.version: versions.fetch(storage, f"{KIND}/{part.version}", scratch, part.files) for part in shard.segments
    }


def calibration_key(model: str) -> str:
    """Return where what a model's scores are worth is kept: beside its version, for a later evaluation may know better,
    and whatever index it is that the model built."""
    return f"calibration/{model}.json"


def read_calibration(storage: Storage, model: str) -> Calibration | None:
    """Return what the scores of a model's embeddings are worth, None if no evaluation said it. Raises StorageError."""
    key = calibration_key(model)
    if storage.tag(key) is None:
        return None
    try:
        content = versions.read_json(storage, key)
        return Calibration(float(content["slope"]), float(content["intercept"]))
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{storage.uri}/{key}: not a calibration; delete it and run jobs/evaluate.py") from error


def publish_current(storage: Storage, version: str, replaces: str | None) -> None:
    """Make `version` the one served, if CURRENT's tag is still `replaces`. Raises ConflictError."""
    storage.publish(CURRENT, (version + "\n").encode(), replaces)
