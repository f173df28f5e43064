"""The embedding job: items stream through actors that embed what is not embedded yet, a partition at a time."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from mixer_platform import versions
from mixer_platform.config import IndexConfig
from mixer_platform.errors import ConflictError, InputError
from mixer_platform.index.embeddings import FORM, KIND, Chain, check_finished, display_schema, read_summaries
from mixer_platform.index.worker import COUNTS, DELETED_ROW, PARTITION, ItemWorker, Job
from mixer_platform.inputs import IMAGE, REASON, InputFiles, count_rows, pictures_tag, read_input
from mixer_platform.item_ids import part_of, probes
from mixer_platform.storage import Storage

_MOST_PARTITIONS = 4096
_MOST_BLOCKS = 256  # of the shuffle; an actor takes one at a time
_log = logging.getLogger(__name__)


class Changes(NamedTuple):
    """What an update brings: whole rows of new and changed items, and item_ids to delete; either may be absent."""

    items: InputFiles | None
    deleted: InputFiles | None


def embed_items(storage: Storage, items: InputFiles, model: str, known: Chain, config: IndexConfig) -> dict[str, Any]:
    """Write `embeddings/<version>/` of a whole catalogue unless it is there; return its manifest.

    `known` embeddings are taken again where an item's content is the same. Raises InputError.
    """
    partitions = partitions_for(count_rows(items), config.partition_items)
    # The model's version, not its fingerprint: trained again it is the same up to rounding only.
    version = versions.fingerprint(FORM, items.storage.uri, items.tags, pictures_tag(items), model, partitions)
    job = Job(storage.uri, version, model, partitions, known, config.batch_size, config.embedder_device)
    manifest = _embed(storage, job, read_input(items), {"base": None}, config)
    if not manifest["items"]:
        raise InputError(f"{items.storage.uri}/items: no item has a usable picture or a text; nothing to index")
    return manifest


def embed_changes(storage: Storage, changes: Changes, base: Chain, config: IndexConfig) -> dict[str, Any]:
    """Write what changes in the embeddings `base` as a version that lies on it; return its manifest.

    If the base was changed by the same last, it is returned itself.
    Raises InputError for a column that the base does not have, and for an item that is both changed and deleted.
    """
    tags = [(files.storage.uri, files.tags) for files in changes if files is not None]
    content = versions.fingerprint(FORM, tags, pictures_tag(changes.items) if changes.items else 0)
    if base[0].get("changes") == content:
        return base[0]
    schema = display_schema(storage, base)
    parts = []
    if changes.items is not None:
        conform = partial(_conform, schema=schema, source=f"{changes.items.storage.uri}/items")
        parts.append(read_input(changes.items).map_batches(conform, batch_format="pyarrow", batch_size=None))
    if changes.deleted is not None:
        name = partial(_deletions, schema=schema)
        parts.append(read_input(changes.deleted).map_batches(name, batch_format="pyarrow", batch_size=None))
    rows = parts[0].union(*parts[1:]) if parts[1:] else parts[0]
    version, below = versions.fingerprint(base[0]["version"], content), base[0]["version"]
    model, partitions = base[0]["model"], base[0]["partitions"]
    job = Job(storage.uri, version, model, partitions, base, config.batch_size, config.embedder_device)
    return _embed(storage, job, rows, {"base": below, "changes": content}, config)


def partitions_for(items: int, items_each: int) -> int:
    """Return a power of two, so that partitions of two catalogues are the same or halves of each other."""
    partitions = 4
    while partitions * items_each < items and partitions < _MOST_PARTITIONS:
        partitions *= 2
    return partitions


def _embed(
    storage: Storage, job: Job, rows: ray.data.Dataset, lies_on: dict[str, Any], config: IndexConfig
) -> dict[str, Any]:
    if done := versions.manifest(storage, KIND, job.version):
        _log.info("embeddings %s are there already", job.version)
        versions.use(storage, KIND, job.version)
        return done
    # The folder has no run in its name: what a killed run finished is not done again, and of two runs at once either
    # writes the same rows.
    versions.use(storage, KIND, job.version)
    finished = frozenset(read_summaries(storage, job.version))
    if finished:
        _log.info("embeddings %s: %d of %d partitions are there already", job.version, len(finished), job.partitions)
    number = partial(_number, partitions=job.partitions, finished=finished)
    numbered = rows.map_batches(number, batch_format="pyarrow", batch_size=None)
    embedded = numbered.groupby(PARTITION, num_partitions=min(job.partitions, _MOST_BLOCKS)).map_groups(
        ItemWorker,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        num_cpus=0.5,
        num_gpus=config.embedder_gpus or None,
        compute=ray.data.ActorPoolStrategy(size=config.embedders),
    )
    embedded.materialize()
    summaries = read_summaries(storage, job.version)
    check_finished(storage, job.version, finished, summaries)
    content = {
        "model": job.model,
        **lies_on,
        "partitions": job.partitions,
        "parts": sorted(summaries),
        **{name: sum(part[name] for part in summaries.values()) for name in COUNTS},
    }
    try:
        return versions.publish(storage, KIND, job.version, content)
    except ConflictError:  # another run of the same was faster
        return versions.require(storage, KIND, job.version)


def _number(batch: pa.Table, partitions: int, finished: frozenset[int]) -> pa.Table:
    """Add each row's partition, by the hash of its item_id; leave out what is finished."""
    numbers = [part_of(probes(item_id or "")[0], partitions) for item_id in batch["item_id"].to_pylist()]
    batch = batch.append_column(PARTITION, pa.array(numbers, pa.int32()))
    return batch.filter(pa.array([number not in finished for number in numbers], pa.bool_())) if finished else batch


def _conform(batch: pa.Table, schema: pa.Schema, source: str) -> pa.Table:
    """Give changed items the columns of the catalogue below. Raises InputError naming the one that does not fit."""
    columns = {}
    for field in schema:
        found = batch[field.name] if field.name in batch.column_names else pa.nulls(len(batch), field.type)
        try:
            columns[field.name] = found.cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"{source}: column {field.name} is {found.type}, {field.type} in the index; cast it and try again"
            ) from error
    new = set(batch.column_names) - set(schema.names)
    unknown = sorted(name for name in new if not name.startswith("__"))
    if unknown:
        raise InputError(
            f"{source}: column {unknown[0]} is not in the index; leave it out, or add it to the whole catalogue and "
            "run jobs/index.py build"
        )
    if "image" in columns:  # where it is, for services look below the catalogue's folder
        columns["image"] = batch[IMAGE].cast(schema.field("image").type)
    deleted = pa.array([False] * len(batch), pa.bool_())
    return pa.table({**columns, IMAGE: batch[IMAGE], REASON: batch[REASON], DELETED_ROW: deleted})


def _deletions(batch: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return item_ids to delete as rows of items that have nothing else."""
    columns = {field.name: pa.nulls(len(batch), field.type) for field in schema}
    columns["item_id"] = pc.cast(batch["item_id"], schema.field("item_id").type)
    more = {IMAGE: pa.nulls(len(batch), pa.string()), REASON: batch[REASON]}
    return pa.table({**columns, **more, DELETED_ROW: pa.array([True] * len(batch), pa.bool_())})
