"""The index job: embeddings of every item, shards built in parallel, recall measured, one publish."""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import ray
import ray.data

from mixer.embedder import QUERY_GRAPH, SETTINGS, QueryEmbedder
from mixer.images import UnreadableImage, decode
from mixer.metrics import recall_of_neighbours
from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.errors import InputError, StorageError
from mixer_platform.gallery import CURRENT, KIND, ShardEntry, merge_top_k, publish_current
from mixer_platform.index.embed import LEFT_OUT, STATE, TEXT_ONLY, ItemWorker
from mixer_platform.index.shards import (
    exact_top_k,
    factory_for,
    shard_of,
    trained_template,
    training_size,
    write_shard,
)
from mixer_platform.inputs import IMAGE, REASON, InputFiles, find_input, pictures_tag, read_input
from mixer_platform.schema import ITEMS, QUERIES
from mixer_platform.storage import Storage, open_storage, read_uri

EMBEDDINGS = "embeddings"
RECALL_K = 10
_SHARD = "__shard"
_NOT_SHOWN = ["embedding", "fingerprint", STATE, _SHARD]
_log = logging.getLogger(__name__)


def build(config: RunConfig) -> dict[str, Any]:
    """Embed all items with a model version, build `index/<version>/`, make it CURRENT and return its manifest.

    What is there already is not made again. Raises InputError, StorageError, and ConflictError if another index was
    published meanwhile.
    """
    started = time.monotonic()
    storage = open_storage(config.workspace)
    current = storage.tag(CURRENT)
    model = versions.require(storage, "models", config.index.model)["version"]
    items = find_input(config.data, ITEMS)
    embeddings = embed_items(storage, items, model, config)
    settings = config.index.model_dump(exclude={"model", "embedders", "batch_size"})
    fingerprint = versions.fingerprint(versions.fingerprint_of(embeddings["version"]), settings)
    manifest = versions.find(storage, KIND, fingerprint)
    if manifest is None:
        version = versions.new_version(fingerprint)
        manifest = _build_shards(storage, version, embeddings, config)
        manifest = {**manifest, "seconds": round(time.monotonic() - started, 2)}
        manifest = versions.publish(storage, KIND, version, manifest)
    else:
        version = manifest["version"]
        _log.info("index %s is there already", version)
        manifest = {**manifest, "reused": True}
    if current is None or storage.read(CURRENT).decode().strip() != version:
        publish_current(storage, version, replaces=current)
    return manifest


def embed_items(storage: Storage, items: InputFiles, model: str, config: RunConfig) -> dict[str, Any]:
    """Write `embeddings/<version>/` unless it is there; return its manifest."""
    # The model's version, not its fingerprint: trained again it is the same up to rounding only.
    fingerprint = versions.fingerprint(items.storage.uri, items.tags, pictures_tag(items), model)
    if done := versions.find(storage, EMBEDDINGS, fingerprint):
        _log.info("embeddings %s are there already", done["version"])
        return done
    version = versions.new_version(fingerprint)
    folder = f"{EMBEDDINGS}/{version}"
    rows = read_input(items).repartition(config.prepare.partitions, keys=["item_id"])
    rows = rows.map_batches(_first_of_each, batch_format="pyarrow", batch_size=None)
    # One batch a block: the embedders then end together.
    embedded = rows.repartition(target_num_rows_per_block=config.index.batch_size).map_batches(
        ItemWorker,
        fn_constructor_args=(storage.uri, model),
        batch_format="pyarrow",
        batch_size=config.index.batch_size,
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=config.index.embedders),
    )
    embedded.write_parquet(storage.path(folder), filesystem=storage.filesystem)
    states = _embeddings(storage, version).to_table(columns=["item_id", STATE])
    listed = {
        state: sorted(states.filter(pc.equal(states[STATE], state))["item_id"].to_pylist())
        for state in (TEXT_ONLY, LEFT_OUT)
    }
    count = len(states) - len(listed[LEFT_OUT])
    if not count:
        raise InputError(f"{items.storage.uri}/items: no item has a usable picture or a text; nothing to index")
    content = {"model": model, "items": count, "without_picture": listed[TEXT_ONLY], "left_out": listed[LEFT_OUT]}
    return versions.publish(storage, EMBEDDINGS, version, content)


def _first_of_each(batch: pa.Table) -> pa.Table:
    """Keep one row of each item_id; prepare's quarantine names the repeated ones."""
    keyed = pa.table({"key": batch["item_id"], "reason": pc.fill_null(pc.cast(batch[REASON], pa.string()), "")})
    batch = batch.take(pc.sort_indices(keyed, [("key", "ascending"), ("reason", "ascending")]))  # sound rows first
    codes = pc.dictionary_encode(batch["item_id"], null_encoding="encode").combine_chunks().indices.to_numpy()
    return batch.filter(pa.array(np.diff(codes, prepend=-1) != 0))


def _build_shards(storage: Storage, version: str, embeddings: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    model, wish = embeddings["model"], config.index
    dim = versions.require(storage, "models", model)["dim"]
    factory = factory_for(embeddings["items"], wish.factory)
    try:
        template = trained_template(factory, dim, _sample(storage, embeddings["version"], training_size(factory)))
    except ValueError as error:
        raise InputError(f"index.factory: {error}") from error
    search = {"nprobe": wish.nprobe} if factory.startswith("IVF") else {}
    queries = _recall_queries(storage, model, config)
    work = partial(
        _build_shard,
        uri=storage.uri,
        version=version,
        template=template,
        search=search,
        queries=queries,
        shards=wish.shards,
    )
    rows = ray.data.read_parquet(storage.path(f"{EMBEDDINGS}/{embeddings['version']}"), filesystem=storage.filesystem)
    numbered = rows.map_batches(partial(_number_shards, shards=wish.shards), batch_format="pyarrow")
    built = numbered.groupby(_SHARD, num_partitions=wish.shards).map_groups(work, batch_format="pyarrow")
    results = sorted(built.take_all(), key=lambda row: row["entry"])
    entries = [ShardEntry.model_validate_json(row["entry"]) for row in results]
    found = merge_top_k([_neighbours(row, "found", len(queries)) for row in results], RECALL_K)[1]
    exact = merge_top_k([_neighbours(row, "exact", len(queries)) for row in results], RECALL_K)[1]
    return {
        "model": model,
        "embeddings": embeddings["version"],
        "dim": dim,
        "metric": "inner_product",
        "factory": factory,
        "search": search,
        "shards": [entry.model_dump() for entry in entries],
        "items": embeddings["items"],
        "without_picture": embeddings["without_picture"],
        "left_out": embeddings["left_out"],
        "recall_at_10": round(recall_of_neighbours(found, exact), 4),
        "recall_queries": len(queries),
    }


def _number_shards(batch: pa.Table, shards: int) -> pa.Table:
    batch = batch.filter(pc.not_equal(batch[STATE], LEFT_OUT))
    numbers = [shard_of(item_id, shards) for item_id in batch["item_id"].to_pylist()]
    return batch.append_column(_SHARD, pa.array(numbers, pa.int32()))


def _build_shard(
    group: pa.Table,
    uri: str,
    version: str,
    template: np.ndarray,
    search: dict[str, int],
    queries: np.ndarray,
    shards: int,
) -> pa.Table:
    """Build, write and try one shard; the recall queries' neighbours, found and exact, travel back with its entry."""
    faiss.omp_set_num_threads(1)
    number = group[_SHARD][0].as_py()
    vectors = _vectors(group["embedding"])
    with tempfile.TemporaryDirectory() as scratch:
        rows = group.drop_columns(_NOT_SHOWN)
        entry, index, ids = write_shard(Path(scratch), number, template, vectors, rows, shards)
        versions.upload(open_storage(uri), Path(scratch), f"{KIND}/{version}")
    if search:
        faiss.ParameterSpace().set_index_parameters(index, ",".join(f"{k}={v}" for k, v in search.items()))
    neighbours = {"found": index.search(queries, RECALL_K), "exact": exact_top_k(queries, vectors, ids, RECALL_K)}
    columns = {"entry": pa.array([entry.model_dump_json()])}
    for name, (scores, identities) in neighbours.items():
        columns[f"{name}_scores"] = pa.array([scores.astype(np.float32).tobytes()])
        columns[f"{name}_ids"] = pa.array([identities.astype(np.int64).tobytes()])
    return pa.table(columns)


def _neighbours(row: dict[str, Any], name: str, queries: int) -> tuple[np.ndarray, np.ndarray]:
    scores = np.frombuffer(row[f"{name}_scores"], np.float32).reshape(queries, -1)
    return scores, np.frombuffer(row[f"{name}_ids"], np.int64).reshape(queries, -1)


def _vectors(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(column.flatten()).reshape(len(column), -1)


def _embeddings(storage: Storage, version: str) -> pyarrow.dataset.Dataset:
    return pyarrow.dataset.dataset(
        storage.path(f"{EMBEDDINGS}/{version}"),
        filesystem=storage.filesystem,
        format="parquet",
        exclude_invalid_files=True,
    )


def _sample(storage: Storage, version: str, size: int) -> np.ndarray:
    """Return up to `size` embeddings, evenly spread over all, float32 [n, dim]."""
    dataset = _embeddings(storage, version)
    step = max(1, dataset.count_rows() // size)
    seen, parts = 0, []
    for batch in dataset.to_batches(columns=["embedding"]):
        picked = np.arange(-seen % step, len(batch), step)
        seen += len(batch)
        parts.append(_vectors(batch.column("embedding").take(pa.array(picked))))
    return np.concatenate(parts)[:size]


def _recall_queries(storage: Storage, model: str, config: RunConfig) -> np.ndarray:
    """Embed some of the shop's query photos, float32 [n, dim]: recall is measured on what people will ask."""
    with tempfile.TemporaryDirectory() as scratch:
        names = (QUERY_GRAPH, SETTINGS)
        embedder = QueryEmbedder(versions.fetch(storage, f"models/{model}", scratch, names))
    pixels: list[np.ndarray] = []
    rows = read_input(find_input(config.data, QUERIES)).iter_rows()
    for row in itertools.islice(rows, 4 * config.index.recall_queries):
        if len(pixels) == config.index.recall_queries:
            break
        try:
            if row[REASON] is None:
                pixels.append(embedder.preprocess(decode(read_uri(row[IMAGE]))))
        except (UnreadableImage, StorageError):
            continue
    if not pixels:
        raise InputError(f"{config.data}/queries: no usable photo; recall is measured on the shop's query photos")
    return np.concatenate([embedder(np.stack(pixels[start : start + 32])) for start in range(0, len(pixels), 32)])
