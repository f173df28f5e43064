"""Which index version is served, and which may go: publish, roll back, verify, describe, collect garbage. No Ray."""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mixer_platform import versions
from mixer_platform.ahead import ahead
from mixer_platform.config import RunConfig
from mixer_platform.errors import MissingError, StorageError, VersionError
from mixer_platform.gallery import (
    CURRENT,
    KIND,
    IndexManifest,
    Shard,
    ShardEntry,
    current_version,
    publish_current,
    read_manifest,
    segment_folders,
)
from mixer_platform.index import embeddings
from mixer_platform.item_ids import span
from mixer_platform.storage import Storage, open_storage

PUBLICATIONS = "publications"  # what was served when, each with what it followed: <milliseconds>-<version>.json
_DESCRIBED_BACK = 20  # publications
_SHARDS_AT_ONCE = 4  # that are checked: each may take its size on disk meanwhile
_log = logging.getLogger(__name__)


def swap(storage: Storage, version: str, tag: str | None) -> None:
    """Serve `version` from now on, if CURRENT's tag is still `tag`. Raises ConflictError.

    What it replaces is written down before, so that a rollback finds it.
    """
    before = current_version(storage) if tag else None
    if before != version:
        newest = _record_of(storage, before) if before else None
        _serve(storage, version, newest["name"] if newest else None, tag)


def publish(config: RunConfig) -> dict[str, Any]:
    """Serve the version `index.version`, once every file of it is found to be as it was built."""
    storage = open_storage(config.workspace)
    tag = storage.tag(CURRENT)
    use(storage, config.index.version)
    manifest = _verified(storage, config.index.version)
    before = current_version(storage) if tag else None
    swap(storage, manifest.version, tag)
    return {"version": manifest.version, "replaced": before, "items": manifest.items}


def rollback(config: RunConfig) -> dict[str, Any]:
    """Serve the version again that was served before the current one; done twice, the one before that."""
    storage = open_storage(config.workspace)
    tag = storage.tag(CURRENT)
    current = current_version(storage)
    history = list(islice(_history(storage), 2))
    if len(history) < 2:
        raise StorageError(f"{storage.uri}/{CURRENT}: nothing was served before {current}; there is no way back")
    use(storage, history[1]["version"])
    manifest = _verified(storage, history[1]["version"])
    _serve(storage, manifest.version, history[1]["follows"], tag)
    return {"version": manifest.version, "replaced": current, "items": manifest.items}


def verify(config: RunConfig) -> dict[str, Any]:
    """Load every shard of `index.version` and check it: bytes, ids, counts, and that its model made it.

    Raises StorageError or VersionError naming what is wrong.
    """
    manifest = _verified(open_storage(config.workspace), config.index.version)
    return {"version": manifest.version, "items": manifest.items, "shards": len(manifest.shards), "sound": True}


def describe(config: RunConfig) -> dict[str, Any]:
    """Return what `index.version` is made of, how much of it is updates, and what was served before."""
    storage = open_storage(config.workspace)
    manifest = read_manifest(storage, config.index.version)
    return {
        **manifest.model_dump(include=set(_DESCRIBED)),
        "current": current_version(storage),
        "updated_share": round(updated_share(manifest), 4),
        "shards": [
            {"name": shard.name, "count": shard.count, "segments": [part.rows for part in shard.segments]}
            for shard in manifest.shards
        ],
        "embeddings": [each["version"] for each in embeddings.chain_of(storage, manifest.embeddings)],
        "served": [entry["version"] for entry in islice(_history(storage), _DESCRIBED_BACK)],
    }


def unusable(config: RunConfig) -> dict[str, Any]:
    """Write the items of `index.version` without a usable picture, which are found by their text alone or, without
    one, left out, to `reports/<version>-unusable.parquet` (item_id, state); return how many there are."""
    storage = open_storage(config.workspace)
    manifest = read_manifest(storage, config.index.version)
    chain = embeddings.chain_of(storage, manifest.embeddings)
    states = pa.array([embeddings.TEXT_ONLY, embeddings.LEFT_OUT])
    schema = pa.schema([("item_id", pa.string()), ("state", pa.string())])
    sink, counts = pa.BufferOutputStream(), dict.fromkeys(states.to_pylist(), 0)
    with pq.ParquetWriter(sink, schema) as writer:
        for rows in embeddings.stream(storage, chain, span(0, 1), ["item_id", embeddings.STATE], every_state=True):
            listed = rows.filter(pc.is_in(rows[embeddings.STATE], states)).rename_columns(schema.names).cast(schema)
            if len(listed):
                writer.write_table(listed)
            for state in counts:
                counts[state] += pc.sum(pc.equal(listed["state"], state)).as_py() or 0
    key = f"reports/{manifest.version}-unusable.parquet"
    storage.write(key, sink.getvalue().to_pybytes())
    return {"version": manifest.version, **counts, "written": f"{storage.uri}/{key}"}


def gc(config: RunConfig) -> dict[str, Any]:
    """Delete index versions that are neither served, nor among the last `index.keep` served, nor used by one of them,
    and embeddings that none of them is made of. What is younger than `index.grace_hours` may be in the making, and
    stays.
    """
    storage = open_storage(config.workspace)
    oldest = time.time() - 3600 * config.index.grace_hours
    current = [current_version(storage)] if storage.tag(CURRENT) else []  # kept even if nothing was written of it
    served = list(islice(_each_once([*current], _history(storage)), config.index.keep))
    young = [name for name in storage.folders(KIND) if _modified(storage, KIND, name) >= oldest]
    kept, used, below = set(), set(), set()
    for name in dict.fromkeys([*served, *young]):
        if not versions.manifest(storage, KIND, name):
            continue
        try:
            manifest = read_manifest(storage, name)
            below |= {each["version"] for each in embeddings.chain_of(storage, manifest.embeddings)}
        except MissingError:  # a storage that does not answer ends it: what would be needed is not known
            if name in current:
                raise
            continue
        kept.add(name)
        used |= {part.version for shard in manifest.shards for part in shard.segments}
    report: dict[str, Any] = {"kept": sorted(kept), "deleted": []}
    for kind, needed in ((KIND, kept | used), (embeddings.KIND, below)):
        for name in storage.folders(kind):
            if name not in needed and _modified(storage, kind, name) < oldest and not _is_current(storage, name):
                storage.delete(f"{kind}/{name}")  # manifest.json comes before part-* and shard-*
                report["deleted"].append(f"{kind}/{name}")
    return report


def use(storage: Storage, version: str) -> None:
    """Mark all that an index version is made of as in use now, so that it is young to whoever collects garbage.

    Raises StorageError.
    """
    manifest = read_manifest(storage, version)
    segments = {part.version for shard in manifest.shards for part in shard.segments}
    for name in sorted({manifest.version} | segments):
        versions.use(storage, KIND, name)
    embeddings.use(storage, embeddings.chain_of(storage, manifest.embeddings))


def sound(storage: Storage, version: str) -> bool:
    """Return whether a published version is still as it was built; log what is wrong."""
    try:
        use(storage, version)
        _verified(storage, version)
    except (StorageError, VersionError) as error:
        _log.warning("index %s is not what was published: %s", version, error)
        return False
    return True


def updated_share(manifest: IndexManifest) -> float:
    """Return which share of an index's vectors are updates or, if that is more, no longer found: one that changed is
    both."""
    rows = sum(part.rows for shard in manifest.shards for part in shard.segments)
    added = sum(part.rows for shard in manifest.shards for part in shard.segments[1:])
    return max(added, rows - manifest.items) / rows if rows else 0.0


_DESCRIBED = (
    "version",
    "created_ms",
    "model",
    "dim",
    "factory",
    "why",
    "search",
    "items",
    "recall_at_10",
    "recall_queries",
    "bytes_per_vector",
    "queries_per_second",
    "latency_ms",
)


def _verified(storage: Storage, version: str) -> IndexManifest:
    manifest = read_manifest(storage, version)
    versions.require(storage, "models", manifest.model)
    made_by = {each["model"] for each in embeddings.chain_of(storage, manifest.embeddings)}
    if made_by != {manifest.model}:
        raise VersionError(
            f"index {manifest.version} says it was built by model {manifest.model}, its embeddings "
            f"{manifest.embeddings} by {', '.join(sorted(made_by))}: run jobs/index.py build"
        )

    def load(shard: ShardEntry) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            Shard(segment_folders(storage, shard, scratch), shard, manifest.search, mapped=True)

    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as threads:
        for _ in ahead(threads, load, manifest.shards, _SHARDS_AT_ONCE):
            pass
    if manifest.items != (found := sum(shard.count for shard in manifest.shards)):
        raise StorageError(f"index {manifest.version}: holds {found} items, not {manifest.items}; build it again")
    return manifest


def _modified(storage: Storage, kind: str, name: str) -> float:
    return storage.modified(f"{kind}/{name}") or time.time()  # an empty folder is nobody's


def _is_current(storage: Storage, version: str) -> bool:
    return storage.tag(CURRENT) is not None and current_version(storage) == version


def _serve(storage: Storage, version: str, follows: str | None, tag: str | None) -> None:
    """Write down that `version` is served after the publication named `follows`, and swap CURRENT."""
    now = time.time_ns() // 1_000_000
    name = f"{now:015d}-{version}.json"
    record = {"name": name, "version": version, "follows": follows, "published_ms": now}
    storage.write(f"{PUBLICATIONS}/{name}", versions.to_json(record))
    publish_current(storage, version, replaces=tag)


def _record_of(storage: Storage, version: str) -> dict[str, Any] | None:
    """Return the newest publication of a version: while it is CURRENT, the one that made it so."""
    names = [key for key in storage.list(PUBLICATIONS) if key.endswith(f"-{version}.json")]
    return json.loads(storage.read(max(names))) if names else None


def _history(storage: Storage) -> Iterator[dict[str, Any]]:
    """Yield the publications from the current one back, a request for each. What failed to be served is followed by
    none."""
    record = _record_of(storage, current_version(storage)) if storage.tag(CURRENT) else None
    while record:
        yield record
        try:
            record = record["follows"] and versions.read_json(storage, f"{PUBLICATIONS}/{record['follows']}")
        except MissingError:
            return


def _each_once(first: list[str], history: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Yield the versions `first` and then those of the history, each once."""
    seen = set()
    for version in itertools.chain(first, (entry["version"] for entry in history)):
        if version not in seen:
            seen.add(version)
            yield version
