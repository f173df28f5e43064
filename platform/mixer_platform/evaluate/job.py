"""The evaluate job: the published index, asked with photos whose answers are known."""

from __future__ import annotations

import collections
import logging
import os
import platform
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from mixer.config import ModelConfig
from mixer.embedder import item_text
from mixer.images import UnreadableImage, decode
from mixer.metrics import hit_at_k, macro, ndcg_at_k, relevance
from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.errors import ConflictError, InputError, StorageError
from mixer_platform.evaluate.calibrate import DEPTH, calibrate, keep_calibration
from mixer_platform.evaluate.compare import check_comparable, compare
from mixer_platform.evaluate.concepts import Fired, concepts_of, draw_concepts
from mixer_platform.evaluate.contact_sheet import Found, draw_sheet
from mixer_platform.evaluate.embed import ITEM, PHOTO, PhotoWorker, export_untrained, picture_rows
from mixer_platform.gallery import MISSING, IndexManifest, Shard, merge_top_k, read_manifest, segment_folders
from mixer_platform.inputs import REASON, InputFiles, find_file, find_input, pictures_tag, read_input
from mixer_platform.schema import ITEMS, TRUTH, Table
from mixer_platform.storage import Storage, open_storage, read_uri, resolve_uri

KIND = "reports"
_NDCG_K = 10
_SCORES = 2**24  # of photos and items that are in memory at a time
_log = logging.getLogger(__name__)
_FORM = "calibrated"  # of reports: one that an older version wrote says less, and is written anew


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Ask the published index every truth photo; write `reports/<version>.json` and pictures; return the report.

    What its model's scores are worth becomes `calibration/<model>.json`. The untrained encoder answers the same photos
    over the same gallery, where the catalogue has all of it: features pooled, centred, cosine. Raises InputError for a
    truth that cannot be used, StorageError when no index or not its model is there.
    """
    started = time.monotonic()
    storage = open_storage(config.workspace)
    index = read_manifest(storage)
    model = versions.require(storage, "models", index.model)
    truth = find_truth(config)
    gallery = versions.fingerprint_of(index.version)
    catalogue = find_input(config.data, ITEMS) if config.evaluate.baseline else None
    sources = [(each.storage.uri, each.tags, pictures_tag(each)) for each in (truth, catalogue) if each]
    version = versions.fingerprint(_FORM, gallery, sources, config.evaluate.model_dump())
    if storage.tag(f"{KIND}/{version}.json"):
        report = versions.read_json(storage, f"{KIND}/{version}.json")
        keep_calibration(storage, report)
        return {**report, "reused": True}

    shards = open_shards(storage, index)
    gallery_ids = {item for shard in shards for item in shard.item_ids()}
    # Whatever model embedded it, and before what takes long.
    measured = {"gallery": versions.fingerprint(sorted(gallery_ids))}
    if config.evaluate.against:
        check_comparable(storage, KIND, measured, config.evaluate.against)
    architecture = ModelConfig.model_validate(versions.read_json(storage, f"models/{index.model}/config.json"))
    encoder = export_untrained(storage, architecture) if config.evaluate.baseline else None
    photos, items = _pictures(truth, catalogue, storage, index.model, encoder, architecture, config)
    asked, unusable = photos.filter(pc.is_valid(photos["query"])), why_unusable(photos)
    place = f"{truth.storage.uri}/{', '.join(truth.tags)}"
    told = "; ".join(f"{count} × {why}" for why, count in unusable.items())
    if not len(asked):
        raise InputError(f"{place}: no photo can be used ({told}); nothing to evaluate")
    if unusable:
        _log.warning("%s: %d photos cannot be used: %s", place, len(photos) - len(asked), told)
    relevant = [set(ids) for ids in asked["relevant_item_ids"].to_pylist()]
    depth = max(*config.evaluate.ks, _NDCG_K, DEPTH)
    results = search_shards(shards, _vectors(asked["query"]), depth)
    ranked = [[item["item_id"] for _, item in found] for found in results]
    asked = asked.append_column("hits", pa.array(relevance(ranked, relevant).tolist(), pa.list_(pa.bool_())))
    report = {
        **measure(ranked, relevant, config.evaluate.ks),
        "calibration": calibrate(results, relevant),
        "queries": len(asked),
        "unusable_photos": len(photos) - len(asked),
        "why_unusable": unusable,
        "items": index.items,
        "index": index.version,
        "model": index.model,
        "samples": model["samples"],
        **measured,
        "truth": versions.fingerprint(asked.select(["id", "relevant_item_ids"]).to_pylist()),
    }
    if config.evaluate.against:
        report["against"] = compare(storage, KIND, report, asked, config.evaluate.against)
    items = shared_gallery(items, gallery_ids) if encoder else None
    if items and items["untrained"].null_count < len(items):
        ranked = untrained_ranking(asked, items, depth)
        report["untrained"] = measure(ranked, relevant, config.evaluate.ks)
    report |= {
        "version": version,
        "created_ms": int(1000 * time.time()),
        "command": " ".join(sys.argv),
        "commit": versions.commit(os.path.dirname(__file__)),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "seed": config.evaluate.seed,
        "seconds": round(time.monotonic() - started, 2),
    }
    files = {"parquet": photo_table(asked), "png": _sheet(asked, results, relevant, config)}
    files["concepts.png"] = draw_concepts(_fired(storage, index.model, results, config))
    report = publish_report(storage, report, files)
    keep_calibration(storage, report)
    return report


def publish_report(storage: Storage, report: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """Write a report's files, by their endings, and return it, or the equal one that another run published."""
    address = f"{KIND}/{report['version']}"
    files = {**files, "json": versions.to_json(report)}  # what shows the others comes last
    for ending, content in files.items():
        with suppress(ConflictError):
            storage.publish(f"{address}.{ending}", content, replaces=None)
    return versions.read_json(storage, f"{address}.json")


def find_truth(config: RunConfig) -> InputFiles:
    """Return the truth: the file `truth=` names, else `val` beside the input tables."""
    if config.truth:
        return find_file(config.truth, TRUTH)
    return find_input(config.data, Table("val", TRUTH.required))


def open_shards(storage: Storage, index: IndexManifest) -> list[Shard]:
    """Return the shards of a published index, their vectors on disk. Raises StorageError if a file is not as published.

    Copies of files that are elsewhere lie below TMPDIR, nameless, while their shard is in use.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return [
            Shard(segment_folders(storage, entry, scratch), entry, index.search, os.cpu_count() or 1, mapped=True)
            for entry in index.shards
        ]


def search_shards(shards: list[Shard], queries: np.ndarray, k: int) -> list[list[tuple[float, dict[str, Any]]]]:
    """Return the k best items of each query, best first: their scores and display columns."""
    scores, ids = merge_top_k([shard.search(queries, k) for shard in shards], k)
    shown: dict[int, dict[str, Any]] = {}
    for shard in shards:
        mine = np.unique(ids[shard.holds(ids)])
        shown |= dict(zip(mine.tolist(), shard.items(mine), strict=True))
    return [
        [(score, shown[identity]) for score, identity in zip(*row, strict=True) if identity != MISSING]
        for row in zip(scores.tolist(), ids.tolist(), strict=True)
    ]


def shared_gallery(items: pa.Table, gallery_ids: set[str]) -> pa.Table | None:
    """Return the rows of a catalogue, by `id`, that an index has; None where an update brought it others."""
    if missing := gallery_ids.difference(items["id"].to_pylist()):
        _log.warning("%d items of the index are not in the catalogue: no untrained baseline; add them", len(missing))
        return None
    return items.filter(pc.is_in(items["id"], pa.array(gallery_ids, pa.string())))


def why_unusable(photos: pa.Table) -> dict[str, int]:
    """Return how many photos cannot be used for each reason, the most frequent first."""
    bad = photos.filter(pc.is_null(photos["query"]))
    return dict(collections.Counter(pc.fill_null(bad[REASON], "picture cannot be read").to_pylist()).most_common())


def measure(ranked: list[list[str]], relevant: list[set[str]], ks: tuple[int, ...]) -> dict[str, float]:
    """Return r1, r5, ... (share of queries with a relevant item among the first k), macro_r1 and ndcg_10."""
    hits = relevance(ranked, relevant)
    figures = {f"r{k}": float(hit_at_k(hits, k).mean()) for k in ks}
    figures["macro_r1"] = macro(hit_at_k(hits, 1), relevant)
    figures[f"ndcg_{_NDCG_K}"] = float(ndcg_at_k(hits, relevant, _NDCG_K).mean())
    return {name: round(value, 4) for name, value in figures.items()}


def _pictures(
    truth: InputFiles,
    catalogue: InputFiles | None,
    storage: Storage,
    model: str,
    encoder: str | None,
    architecture: ModelConfig,
    config: RunConfig,
) -> tuple[pa.Table, pa.Table]:
    """Return the photos and the sound items of the catalogue, if there is one, embedded, in order of their ids."""
    rows = read_input(truth).map_batches(partial(picture_rows, kind=PHOTO), batch_format="pyarrow")
    if catalogue:
        items = read_input(catalogue)
        rows = rows.union(items.map_batches(partial(picture_rows, kind=ITEM), batch_format="pyarrow"))
    rows = rows.repartition(target_num_rows_per_block=config.index.batch_size).map_batches(
        PhotoWorker,
        fn_constructor_args=(storage.uri, model, encoder, architecture.pooling),
        batch_format="pyarrow",
        batch_size=config.index.batch_size,
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=config.index.embedders),
    )
    parts = [part for part in rows.iter_batches(batch_size=None, batch_format="pyarrow") if part.num_columns]
    if not parts:
        raise InputError(f"{truth.storage.uri}/{', '.join(truth.tags)}: no rows")
    whole = pa.concat_tables(parts).sort_by("id")
    photos, items = (whole.filter(pc.equal(whole["kind"], kind)) for kind in (PHOTO, ITEM))
    return photos, items


def untrained_ranking(asked: pa.Table, items: pa.Table, depth: int) -> list[list[str]]:
    items = items.filter(pc.is_valid(items["untrained"]))
    gallery, photos = _vectors(items["untrained"]), _vectors(asked["untrained"])
    centre = gallery.mean(axis=0)
    gallery, photos = (_unit(features - centre) for features in (gallery, photos))
    item_ids = np.array(items["id"].to_pylist())
    ranked: list[list[str]] = []
    at_once = max(1, _SCORES // len(gallery))
    for start in range(0, len(photos), at_once):
        scores = photos[start : start + at_once] @ gallery.T
        ranked += item_ids[np.argsort(-scores, axis=1, kind="stable")[:, :depth]].tolist()
    return ranked


def _sheet(asked: pa.Table, results: list, relevant: list[set[str]], config: RunConfig) -> bytes:
    rng = np.random.default_rng(config.evaluate.seed)
    chosen = np.sort(rng.permutation(len(asked))[: config.evaluate.contact_sheet])
    photos, root = asked["image"].to_pylist(), open_storage(config.data).uri
    return draw_sheet([(photos[row], found_items(results[row][:5], relevant[row], root)) for row in chosen.tolist()])


def _fired(storage: Storage, model: str, results: list, config: RunConfig) -> list[Fired]:
    """Return what the concepts of some found items do, of the first that have a picture and a text."""
    from mixer.towers import MixerModel  # here, not at the top: the actors of this package need no torch

    fired: list[Fired] = []
    if not config.evaluate.concept_items:
        return fired
    root = open_storage(config.data).uri
    with tempfile.TemporaryDirectory() as scratch:
        trained = MixerModel.from_pretrained(versions.fetch(storage, f"models/{model}", scratch))
    for item in {item["item_id"]: item for found in results for _, item in found[:1]}.values():
        if len(fired) == config.evaluate.concept_items:
            break
        text = item_text(item.get("title"), item.get("description"))
        if text and item.get("image"):
            with suppress(StorageError, UnreadableImage):
                fired.append(concepts_of(trained, decode(read_uri(resolve_uri(item["image"], root))), text))
    return fired


def found_items(items: list[tuple[float, dict[str, Any]]], relevant: set[str], root: str) -> list[Found]:
    """Return what a contact sheet shows of search results, given what is right and where the items' pictures are."""
    return [
        Found(
            resolve_uri(image, root) if (image := item.get("image")) else None,
            item.get("title") or item["item_id"],
            score,
            item["item_id"] in relevant,
        )
        for score, item in items
    ]


def photo_table(asked: pa.Table) -> bytes:
    """Return the photos that were asked as Parquet: query_id, image, relevant_item_ids, and the hits by rank."""
    sink = pa.BufferOutputStream()
    table = asked.select(["id", "image", "relevant_item_ids", "hits"])
    pq.write_table(table.rename_columns([*TRUTH.required.names, "hits"]), sink)
    return sink.getvalue().to_pybytes()


def _vectors(column: pa.ChunkedArray) -> np.ndarray:
    column = column.combine_chunks()
    return np.asarray(column.flatten(), np.float32).reshape(len(column), -1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
