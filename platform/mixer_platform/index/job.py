"""The index job: embed the catalogue, build shards or change them, measure, and publish by one swap."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mixer.embedder import QUERY_GRAPH, SETTINGS, QueryEmbedder
from mixer.images import UnreadableImage, decode
from mixer_platform import versions
from mixer_platform.cli import mixer_error_in
from mixer_platform.config import RunConfig
from mixer_platform.errors import ConflictError, InputError, MissingError, StorageError
from mixer_platform.gallery import CURRENT, KIND, IndexManifest, check_model, read_manifest
from mixer_platform.index import embeddings
from mixer_platform.index.build import build_shards
from mixer_platform.index.embed import Changes, embed_changes, embed_items
from mixer_platform.index.embeddings import Chain, chain_of
from mixer_platform.index.lifecycle import sound, swap, updated_share
from mixer_platform.index.update import consolidate, write_deltas
from mixer_platform.index.worker import COUNTS
from mixer_platform.inputs import IMAGE, REASON, count_rows, find_input, find_optional, read_input
from mixer_platform.item_ids import hash_of
from mixer_platform.schema import DELETED, ITEMS, QUERIES
from mixer_platform.storage import Storage, open_storage, read_uri

_SHAPE = {"shards", "factory", "recall_at_10", "memory", "latency_ms", "recall_queries"}
_MOST_UPDATES = 8  # that a search passes through; more are compacted
_FORM = 3  # of what is written; versions of another form are not taken again
_log = logging.getLogger(__name__)


def build(config: RunConfig) -> dict[str, Any]:
    """Embed all items with a model version, build `index/<version>/`, make it CURRENT and return its manifest.

    What is there already is not made again. Raises InputError, StorageError, WishError if no index is as good as
    wished, and ConflictError if another index was published meanwhile.
    """
    storage = open_storage(config.workspace)
    tag = storage.tag(CURRENT)
    model = versions.require(storage, "models", config.index.model)["version"]
    items = find_input(config.data, ITEMS)
    made = embed_items(storage, items, model, _known(storage), config.index)
    return _build(storage, chain_of(storage, made["version"]), tag, config)


def update(config: RunConfig) -> dict[str, Any]:
    """Change the index being served by `index.changes`: a folder with `items`, new or changed, and `deleted`.

    Writes a small segment a shard and publishes. Compacts then if more than `index.compact_above` of the index are
    updates. Raises as `build` does.
    """
    started = time.monotonic()
    storage = open_storage(config.workspace)
    tag = storage.tag(CURRENT)
    index = read_manifest(storage)
    if config.index.model != "latest":
        check_model(index, config.index.model)
    base = chain_of(storage, index.embeddings)
    made = embed_changes(storage, _changes(config), base, config.index)
    if made["version"] == base[0]["version"]:
        _log.info("index %s holds these changes already", index.version)
        return _compacted_if_due({**versions.require(storage, KIND, index.version), "reused": True}, config)
    if index.items + made["items"] - made["replaced"] - made["deleted"] <= 0:
        raise InputError(f"{config.index.changes}: nothing would be left in the index; it stays as it is")
    fingerprint = versions.fingerprint(_FORM, index.version, made["version"])

    def content(version: str) -> dict[str, Any]:
        counts = {name: made[name] for name in COUNTS if name not in ("items", "repeated")}
        return {**write_deltas(storage, version, index, made), "changes": counts}

    manifest = _publish(storage, fingerprint, content, tag, started)
    return _compacted_if_due(manifest, config)


def _compacted_if_due(manifest: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Compact an index that updates have made slow; return its manifest, or that of what was compacted."""
    index = IndexManifest.model_validate(manifest)
    updates = max(len(shard.segments) for shard in index.shards) - 1
    if updates <= _MOST_UPDATES and updated_share(index) <= config.index.compact_above:
        return manifest
    _log.info("%d updates, %.3f of the index: compacting", updates, updated_share(index))
    try:
        compacted = compact(config)
    except Exception as error:
        cause = mixer_error_in(error)
        if cause is None or isinstance(cause, ConflictError):  # another index is served by now
            raise
        sentence = f"the update is served as {index.version}, but cannot be compacted: {cause}"
        raise type(cause)(sentence) from error
    return {**compacted, "changes": manifest.get("changes"), "updated": index.version}


def compact(config: RunConfig) -> dict[str, Any]:
    """Fold all updates of the index being served into shards built anew, without embedding anything, and publish."""
    storage = open_storage(config.workspace)
    tag = storage.tag(CURRENT)
    index = read_manifest(storage)
    chain = chain_of(storage, index.embeddings)
    if len(chain) > 1:
        chain = [consolidate(storage, chain)]
    return _build(storage, chain, tag, config)


def _build(storage: Storage, chain: Chain, tag: str | None, config: RunConfig) -> dict[str, Any]:
    started = time.monotonic()
    made, settings = chain[0], config.index.model_dump(include=_SHAPE)
    dim = versions.require(storage, "models", made["model"])["dim"]

    embeddings.use(storage, chain)  # they may be of a run of long ago that published no index

    def content(version: str) -> dict[str, Any]:
        queries = recall_queries(storage, made["model"], config)
        built = build_shards(storage, version, chain, dim, queries, config.index)
        listed = {name: made[name] for name in ("model", "without_picture", "left_out")}
        return {**built, **listed, "embeddings": made["version"]}

    fingerprint = versions.fingerprint(_FORM, made["version"], settings)
    return _publish(storage, fingerprint, content, tag, started)


def _publish(
    storage: Storage, fingerprint: str, content: Callable[[str], dict[str, Any]], tag: str | None, started: float
) -> dict[str, Any]:
    """Make and publish an index version unless it is there, then serve it."""
    manifest = versions.find(storage, KIND, fingerprint)
    if manifest is not None:
        manifest = manifest if sound(storage, manifest["version"]) else None
    if manifest is None:
        version = versions.new_version(fingerprint)
        made = content(version)
        manifest = versions.publish(storage, KIND, version, {**made, "seconds": round(time.monotonic() - started, 2)})
    else:
        _log.info("index %s is there already", manifest["version"])
        manifest = {**manifest, "reused": True}
    swap(storage, manifest["version"], tag)
    return manifest


def _known(storage: Storage) -> Chain:
    """Return the embeddings that the index being served is made of, or else the newest ones; none if there are none."""
    found = [versions.manifest(storage, embeddings.KIND, name) for name in storage.folders(embeddings.KIND)]
    usable = {made["version"]: made for made in found if made and "partitions" in made}
    current = versions.manifest(storage, KIND, storage.read(CURRENT).decode().strip()) if storage.tag(CURRENT) else None
    wanted = current["embeddings"] if current else None
    newest = max(usable.values(), key=lambda made: made["created_ms"], default=None)
    chosen = usable.get(wanted, newest) if wanted else newest
    try:
        return chain_of(storage, chosen["version"]) if chosen else []
    except StorageError as error:  # a base is lost: everything is embedded anew
        _log.warning("%s", error)
        return []


def _changes(config: RunConfig) -> Changes:
    folder = config.index.changes
    if folder is None:
        raise InputError("index.changes: missing; name the folder that holds items (new or changed) and deleted")
    changes = Changes(find_optional(folder, ITEMS), find_optional(folder, DELETED))
    if not any(changes):
        raise InputError(f"{folder}: neither items nor deleted is there; write one of them as Parquet or JSONL")
    return changes


def recall_queries(storage: Storage, model: str, config: RunConfig) -> np.ndarray:
    """Embed some of the shop's query photos, drawn by hash, float32 [n, dim]: recall is measured on what
    people will ask."""
    with tempfile.TemporaryDirectory() as scratch:
        names = (QUERY_GRAPH, SETTINGS)
        embedder = QueryEmbedder(versions.fetch(storage, f"models/{model}", scratch, names))
    pixels: list[np.ndarray] = []
    files, wanted = find_input(config.data, QUERIES), config.index.recall_queries
    share = (4 * wanted + 32) / max(1, count_rows(files))  # more than are wanted: some are unusable
    drawn = read_input(files, share).take_all()
    for row in sorted(drawn, key=lambda row: hash_of(f"{row['query_id']} {row[IMAGE]}")):
        if len(pixels) == wanted:
            break
        try:
            if row[REASON] is None:
                pixels.append(embedder.preprocess(decode(read_uri(row[IMAGE]))))
        except (UnreadableImage, MissingError):
            continue
    if not pixels:
        raise InputError(f"{config.data}/queries: no usable photo; recall is measured on the shop's query photos")
    return np.concatenate([embedder(np.stack(pixels[start : start + 32])) for start in range(0, len(pixels), 32)])
