"""Small changes without a rebuild: a delta segment a shard; and compaction, which folds them in."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mixer_platform import versions
from mixer_platform.errors import ConflictError
from mixer_platform.gallery import KIND, IndexManifest, ShardEntry
from mixer_platform.index import embeddings
from mixer_platform.index.embeddings import (
    DELETED,
    LEFT_OUT,
    REPLACES,
    STATE,
    TEXT_ONLY,
    WHOLE,
    Chain,
    read_rows,
    write_part,
)
from mixer_platform.index.segments import write_delta
from mixer_platform.index.worker import COUNTS
from mixer_platform.item_ids import span
from mixer_platform.storage import Storage, open_storage


def write_deltas(storage: Storage, version: str, index: IndexManifest, changes: dict[str, Any]) -> dict[str, Any]:
    """Write the segments of `index/<version>/` that change `index` by the embeddings `changes`; return what its
    manifest says."""
    shards = len(index.shards)
    numbered = enumerate(index.shards)
    work = [
        _write_delta.remote(number, storage.uri, version, shards, entry, changes, index.dim)
        for number, entry in numbered
    ]
    entries = ray.get(work)
    content = index.model_dump(exclude={"version", "created_ms", "embeddings", "shards", "items"})
    return {
        **content,
        "embeddings": changes["version"],
        "shards": [entry.model_dump() for entry in entries],
        "items": sum(entry.count for entry in entries),
    }


def consolidate(storage: Storage, chain: Chain) -> dict[str, Any]:
    """Write the newest rows of a chain of embeddings as a version that lies on none; return its manifest."""
    version = versions.fingerprint("consolidated", embeddings.FORM, chain[0]["version"])
    if done := versions.manifest(storage, embeddings.KIND, version):
        return done
    partitions = chain[0]["partitions"]
    versions.use(storage, embeddings.KIND, version)
    there = set(embeddings.read_summaries(storage, version))
    ray.get(
        [
            _consolidate.remote(number, storage.uri, version, chain, partitions)
            for number in range(partitions)
            if number not in there
        ]
    )
    summaries = embeddings.read_summaries(storage, version)
    embeddings.check_finished(storage, version, there, summaries)
    content = {
        "model": chain[0]["model"],
        "base": None,
        "changes": chain[0]["changes"],
        "partitions": partitions,
        "parts": sorted(summaries),
        **{name: sum(part[name] for part in summaries.values()) for name in COUNTS},
    }
    try:
        return versions.publish(storage, embeddings.KIND, version, content)
    except ConflictError:  # another run of the same was faster
        return versions.require(storage, embeddings.KIND, version)


@ray.remote(num_cpus=1)
def _write_delta(
    number: int, uri: str, version: str, shards: int, entry: ShardEntry, changes: dict[str, Any], dim: int
) -> ShardEntry:
    storage = open_storage(uri)
    # Only the changes: what lies below them is in the segments before.
    rows = read_rows(storage, [changes], span(number, shards), every_state=True)
    if rows is not None:  # what is not found, now or before, changes nothing
        rows = rows.filter(pc.or_(pc.is_in(rows[STATE], pa.array([WHOLE, TEXT_ONLY])), rows[REPLACES]))
    if rows is None or not len(rows):
        return entry
    with tempfile.TemporaryDirectory() as scratch:
        segment, growth = write_delta(Path(scratch), version, entry.name, dim, [rows])
        versions.upload(storage, Path(scratch), f"{KIND}/{version}")
    return ShardEntry(name=entry.name, count=entry.count + growth, segments=[*entry.segments, segment])


@ray.remote(num_cpus=1)
def _consolidate(number: int, uri: str, version: str, chain: Chain, partitions: int) -> None:
    storage = open_storage(uri)
    rows = read_rows(storage, chain, span(number, partitions), every_state=True)
    rows = None if rows is None else rows.filter(pc.not_equal(rows[STATE], DELETED))
    if rows is None or not len(rows):
        return
    rows = rows.drop_columns([REPLACES]) if REPLACES in rows.column_names else rows
    summary: dict[str, Any] = dict.fromkeys(COUNTS, 0)
    states = rows[STATE].to_pylist()
    summary |= {"without_picture": states.count(TEXT_ONLY), "left_out": states.count(LEFT_OUT)}
    summary["items"] = summary["reused"] = len(rows) - summary["left_out"]
    write_part(storage, version, number, rows, summary)
