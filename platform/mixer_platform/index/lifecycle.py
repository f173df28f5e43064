"""Which index version is served, and which may go: publish, roll back, verify, describe, collect garbage. No Ray."""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.errors import StorageError, VersionError
from mixer_platform.gallery import (
    CURRENT,
    KIND,
    IndexManifest,
    Shard,
    current_version,
    publish_current,
    read_manifest,
    segment_folders,
)
from mixer_platform.index import embeddings
from mixer_platform.storage import Storage, open_storage

PUBLICATIONS = "publications"  # what was served when: <milliseconds>-<version>.json


def swap(storage: Storage, version: str, tag: str | None) -> None:
    """Serve `version` from now on, if CURRENT's tag is still `tag`. Raises ConflictError.

    What it replaces is written down before, so that a rollback finds it; if the swap then fails, the record says
    something of a version that is not served, which nobody asks.
    """
    before = current_version(storage) if tag else None
    if before != version:
        _record(storage, version, before)
        publish_current(storage, version, replaces=tag)


def publish(config: RunConfig) -> dict[str, Any]:
    """Serve the version `index.version`, once every file of it is found to be as it was built."""
    storage = open_storage(config.workspace)
    tag = storage.tag(CURRENT)
    manifest = _verified(storage, config.index.version)
    before = current_version(storage) if tag else None
    swap(storage, manifest.version, tag)
    return {"version": manifest.version, "replaced": before, "items": manifest.items}


def rollback(config: RunConfig) -> dict[str, Any]:
    """Serve the version again that was served before the current one; done twice, the one before that."""
    storage = open_storage(config.workspace)
    tag = storage.tag(CURRENT)
    current = current_version(storage)
    before = _served_before(storage, current)
    if before is None:
        raise StorageError(f"{storage.uri}/{CURRENT}: nothing was served before {current}; there is no way back")
    manifest = _verified(storage, before)
    _record(storage, before, _served_before(storage, before))
    publish_current(storage, before, replaces=tag)
    return {"version": before, "replaced": current, "items": manifest.items}


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
        "served": [entry["version"] for entry in _publications(storage)],
    }


def gc(config: RunConfig) -> dict[str, Any]:
    """Delete index versions that are neither served, nor among the last `index.keep` served, nor used by one of them,
    and embeddings that none of them is made of. What is younger than `index.grace_hours` may be in the making, and
    stays.
    """
    storage = open_storage(config.workspace)
    oldest = time.time() - 3600 * config.index.grace_hours
    served = list(dict.fromkeys(entry["version"] for entry in _publications(storage)))[: config.index.keep]
    young = [name for name in storage.folders(KIND) if _modified(storage, KIND, name) >= oldest]
    kept = {name for name in {current_version(storage), *served, *young} if versions.manifest(storage, KIND, name)}
    manifests = [read_manifest(storage, name) for name in sorted(kept)]
    used = {part.version for manifest in manifests for shard in manifest.shards for part in shard.segments}
    below = {each["version"] for manifest in manifests for each in embeddings.chain_of(storage, manifest.embeddings)}
    report: dict[str, Any] = {"kept": sorted(kept), "deleted": []}
    for kind, needed in ((KIND, kept | used), (embeddings.KIND, below)):
        for name in storage.folders(kind):
            if name not in needed and _modified(storage, kind, name) < oldest:
                storage.delete(f"{kind}/{name}")  # manifest.json comes before part-* and shard-*
                report["deleted"].append(f"{kind}/{name}")
    return report


def updated_share(manifest: IndexManifest) -> float:
    """Return which share of an index's vectors are updates or no longer found."""
    rows = sum(part.rows for shard in manifest.shards for part in shard.segments)
    added = sum(part.rows for shard in manifest.shards for part in shard.segments[1:])
    return (added + rows - manifest.items) / rows if rows else 0.0


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
    for shard in manifest.shards:
        with tempfile.TemporaryDirectory() as scratch:
            Shard(segment_folders(storage, shard, scratch), shard, manifest.search, mapped=True)
    if manifest.items != (found := sum(shard.count for shard in manifest.shards)):
        raise StorageError(f"index {manifest.version}: holds {found} items, not {manifest.items}; build it again")
    return manifest


def _modified(storage: Storage, kind: str, name: str) -> float:
    return storage.modified(f"{kind}/{name}") or time.time()  # an empty folder is nobody's


def _record(storage: Storage, version: str, replaces: str | None) -> None:
    now = time.time_ns() // 1_000_000
    content = {"version": version, "replaces": replaces, "published_ms": now}
    storage.write(f"{PUBLICATIONS}/{now:015d}-{version}.json", versions.to_json(content))


def _publications(storage: Storage) -> list[dict[str, Any]]:
    """Return the records, the newest first."""
    return [json.loads(storage.read(key)) for key in sorted(storage.list(PUBLICATIONS), reverse=True)]


def _served_before(storage: Storage, version: str) -> str | None:
    return next((entry["replaces"] for entry in _publications(storage) if entry["version"] == version), None)
