"""The prepare job: Ray Data moves the rows, `rows` and `mixer.labeling` think."""

from __future__ import annotations

import collections
import logging
import time
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from ray.data import Dataset
from ray.data.aggregate import Sum

from mixer.clicks import COUNTS
from mixer.embedder import item_text
from mixer.labeling import Labels, organise, with_lost_clicks
from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.errors import InputError
from mixer_platform.inputs import REASON, count_rows, find_input, pictures_tag, read_input
from mixer_platform.prepare import rows
from mixer_platform.prepare.counts import balanced, most_frequent, rows_used
from mixer_platform.schema import ITEMS, LOGS, QUERIES
from mixer_platform.storage import Storage, open_storage

KIND = "samples"
SAMPLES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("kind", pa.string()),
        ("image", pa.string()),
        ("text", pa.string()),
        ("class_id", pa.int64()),
        ("weight", pa.float32()),
        ("candidates", pa.list_(pa.int64())),  # of photos: classes that the logs speak of
        ("evidence", pa.list_(pa.float32())),  # nats for each of them, see mixer.labeling.Labels
        ("unseen", pa.float32()),  # nats of every other class
    ]
)
_FORM = 4  # of what labels say; samples of another form are not taken again
_REPORTED = 50  # positions, of thousands that logs may have
_log = logging.getLogger(__name__)


def prepare(config: RunConfig) -> dict[str, Any]:
    """Write `samples/<version>/` from the input tables and return its report; a version there already is kept.

    Raises InputError for input that cannot be used, StorageError for a workspace that cannot, MixerError if rows are
    lost on the way.
    """
    started = time.monotonic()
    storage = open_storage(config.workspace)
    inputs = {table: find_input(config.data, table) for table in (ITEMS, QUERIES, LOGS)}
    fingerprint = versions.fingerprint(
        _FORM,
        [config.data, [files.tags for files in inputs.values()]],
        [pictures_tag(inputs[table]) for table in (ITEMS, QUERIES)],
        config.prepare.model_dump(exclude={"partitions"}),
    )
    if done := versions.find(storage, KIND, fingerprint):
        _log.info("samples %s are there already", done["version"])
        return {**done, "reused": True}
    version = versions.new_version(fingerprint)
    folder = f"{KIND}/{version}"
    rows_in = {table.name: count_rows(files) for table, files in inputs.items()}
    for name, count in rows_in.items():
        if not count:
            raise InputError(f"{config.data}/{name}: no rows; prepare learns from what people clicked")
    ray.data.DataContext.get_current().default_hash_shuffle_parallelism = config.prepare.partitions

    items = _checked(read_input(inputs[ITEMS]), "item_id", config)
    queries = _checked(read_input(inputs[QUERIES]), "query_id", config)
    logs = _marked_logs(read_input(inputs[LOGS]), queries, items, config)
    labels = organise_logs(logs, items, config)
    unlabelled = partial(rows.mark_others, key="query_id", values=labels.queries["query_id"].combine_chunks())
    queries = queries.map_batches(partial(unlabelled, reason="no usable click says what it shows"), **_ARROW)
    reasons = _write_quarantine({"items": items, "queries": queries, "logs": logs}, storage, folder)
    _write_samples(items, queries, labels, storage, folder)
    tables = balanced(config.data, rows_in, rows_used(logs, storage, folder), reasons)
    classes = _classes(labels)
    storage.write(f"{folder}/classes.parquet", _parquet(classes))

    report = {
        "tables": tables,
        "classes": len(classes),
        "samples": {"items": tables["items"]["rows_out"], "queries": tables["queries"]["rows_out"]},
        "examination": [round(float(value), 4) for value in labels.model.examined[:_REPORTED]],
        "standing": [round(float(value), 4) for value in labels.model.standing[:_REPORTED]],
        "mean_confidence": round(float(pc.mean(labels.queries["confidence"]).as_py() or 0), 4),
        "seconds": round(time.monotonic() - started, 2),
    }
    storage.write(f"{folder}/report.json", versions.to_json(report))
    return versions.publish(storage, KIND, version, report)


_ARROW: dict[str, Any] = {"batch_format": "pyarrow", "zero_copy_batch": True}


def _together(table: Dataset, key: str, config: RunConfig) -> Dataset:
    """Bring all rows of a key into one block; partitions must stay below a block's size (128 MB)."""
    return table.repartition(config.prepare.partitions, keys=[key])


def _checked(table: Dataset, key: str, config: RunConfig) -> Dataset:
    """Mark repeated keys and unusable pictures."""
    unique = _together(table, key, config).map_batches(partial(rows.mark_repeats, key=key), **_ARROW, batch_size=None)
    pictures = partial(rows.mark_pictures, min_side=config.prepare.min_side)
    return unique.map_batches(pictures, **_ARROW, batch_size=64).materialize()


def _marked_logs(logs: Dataset, queries: Dataset, items: Dataset, config: RunConfig) -> Dataset:
    """Mark repeated events, robots' sessions, and rows whose query or item is unknown or in quarantine."""
    logs = _together(logs, "session_id", config)  # a repeated event repeats its session too
    logs = logs.map_batches(partial(rows.mark_repeats, key="event_id"), **_ARROW, batch_size=None)
    robots = partial(rows.mark_robots, clicks=config.prepare.labeling.robot_clicks)
    logs = logs.map_batches(robots, **_ARROW, batch_size=None)
    for key, table in (("query_id", queries), ("item_id", items)):
        state = f"{key}_state"
        states = table.map_batches(partial(_states, key=key, state=state), **_ARROW, batch_size=None)
        logs = logs.join(states, "left_outer", config.prepare.partitions, on=(key,))
        logs = logs.map_batches(partial(rows.mark_references, key=key, state=state), **_ARROW)
    return logs.materialize()


def _states(batch: pa.Table, key: str, state: str) -> pa.Table:
    """Return each key once, with an empty state if a row of it is sound, else with a reason why none is.

    All rows of a key must be in the batch.
    """
    states = pa.table({key: batch[key], state: pc.fill_null(pc.cast(batch[REASON], pa.string()), "")})
    states = states.filter(pc.and_(pc.is_valid(states[key]), pc.not_equal(states[state], f"{key} is repeated")))
    return states.group_by(key).aggregate([(state, "min")]).rename_columns([key, state])


def organise_logs(logs: Dataset, items: Dataset, config: RunConfig) -> Labels:
    """Count what the sound log rows say of each query, item and position, and organise it into classes."""
    counted = logs.map_batches(count_events, **_ARROW, batch_size=None)
    keys = ["query_id", "item_id", "position"]
    sums = counted.groupby(keys).aggregate(*(Sum(name, alias_name=name) for name in COUNTS.names[len(keys) :]))
    counts = _collect(sums, COUNTS)
    if not pc.sum(with_lost_clicks(counts)["clicks"]).as_py():
        raise InputError(f"{config.data}/logs: no usable click, mend the logs ({most_frequent(logs)})")
    titles = [batch.cast(_TITLES) for batch in _batches(items.map_batches(_titles, **_ARROW))]
    return organise(counts, pa.concat_tables(titles), config.prepare.labeling)


_TITLES = pa.schema([("item_id", pa.string()), ("title", pa.string())])


def _titles(batch: pa.Table) -> pa.Table:
    return rows.sound(batch).select(_TITLES.names)


def count_events(batch: pa.Table) -> pa.Table:
    """Return COUNTS of the sound rows of a batch of logs; of pairs and positions that are in others too, a part."""
    batch = rows.sound(batch)
    clicked = pc.equal(batch["event"], "click")
    timed = pc.and_(clicked, pc.fill_null(pc.greater(batch["dwell_ms"], 0), False))
    log_dwell = pc.if_else(timed, pc.ln(pc.if_else(timed, pc.cast(batch["dwell_ms"], pa.float64()), 1.0)), 0.0)
    keys = ["query_id", "item_id", "position"]
    measures = {
        "impressions": pc.equal(batch["event"], "impression"),
        "clicks": clicked,
        "carts": pc.equal(batch["event"], "add_to_cart"),
        "purchases": pc.equal(batch["event"], "purchase"),
        "dwells": timed,
        "log_dwell": log_dwell,
        "log_dwell_squared": pc.power(log_dwell, 2),
    }
    table = pa.table({**{key: batch[key] for key in keys}, **measures}).cast(COUNTS)
    return table.group_by(keys).aggregate([(name, "sum") for name in measures]).rename_columns(COUNTS.names)


def _write_samples(items: Dataset, queries: Dataset, labels: Labels, storage: Storage, folder: str) -> None:
    """Give photos and items their classes and write them: equal samples."""
    parts = [
        table.map_batches(partial(_sample_rows, kind=kind, known=known), **_ARROW)
        for kind, table, known in (("query", queries, labels.queries), ("item", items, labels.items))
    ]
    samples = parts[0].union(parts[1])
    samples.write_parquet(storage.path(f"{folder}/train"), filesystem=storage.filesystem)


def _sample_rows(batch: pa.Table, kind: str, known: pa.Table) -> pa.Table:
    """Return the SAMPLES of the sound rows of photos or items whose class is known, as `Labels` has it."""
    batch = rows.sound(batch)
    place = pc.index_in(pc.cast(batch[f"{kind}_id"], pa.string()), known[f"{kind}_id"].combine_chunks())
    batch, known = batch.filter(pc.is_valid(place)), known.take(place.drop_null())
    texts: list[str | None] = [None] * len(batch)
    if kind == "item":
        pairs = zip(batch["title"].to_pylist(), batch["description"].to_pylist(), strict=True)
        texts = [item_text(title, description) for title, description in pairs]
    columns = {
        "sample_id": batch[f"{kind}_id"],
        "kind": pa.array([kind] * len(batch), pa.string()),
        "image": batch["image"],
        "text": pa.array(texts, pa.string()),
        "class_id": known["class_id"],
        "weight": pa.array([1.0] * len(batch), pa.float32()),
    }
    for name in ("candidates", "evidence", "unseen"):
        columns[name] = known[name] if kind == "query" else pa.nulls(len(batch), SAMPLES.field(name).type)
    return pa.table(columns).cast(SAMPLES)


def _classes(labels: Labels) -> pa.Table:
    """Return class_id, size (samples) and item_ids."""
    photos = collections.Counter(labels.queries["class_id"].to_pylist())
    items = labels.items.group_by("class_id").aggregate([("item_id", "list")]).sort_by("class_id")
    members = items["item_id_list"].to_pylist()
    sizes = [
        len(item_ids) + photos[label] for label, item_ids in zip(items["class_id"].to_pylist(), members, strict=True)
    ]
    return pa.table({"class_id": items["class_id"], "size": pa.array(sizes, pa.int64()), "item_ids": members})


def _write_quarantine(tables: dict[str, Dataset], storage: Storage, folder: str) -> dict[str, dict[str, int]]:
    """Write the marked rows of all tables; return the count of each reason for each table."""
    marked = [
        table.map_batches(partial(rows.quarantined, table=name), **_ARROW, batch_size=None)
        for name, table in tables.items()
    ]
    bad = marked[0].union(*marked[1:]).materialize()
    if bad.count():
        bad.write_parquet(storage.path(f"{folder}/quarantine"), filesystem=storage.filesystem)
    reasons: collections.Counter[tuple[str, str]] = collections.Counter()
    for batch in _batches(bad.map_batches(_count_reasons, **_ARROW)):
        for owner, reason, count in zip(*batch.to_pydict().values(), strict=True):
            reasons[owner, reason] += count
    ordered = sorted(reasons.items())
    return {name: {reason: count for (owner, reason), count in ordered if owner == name} for name in tables}


def _count_reasons(batch: pa.Table) -> pa.Table:
    counts = batch.group_by(["table", "reason"]).aggregate([([], "count_all")])
    return counts.select(["table", "reason", "count_all"])


def _batches(table: Dataset) -> list[pa.Table]:
    """Return the blocks of a dataset that hold rows, as Arrow."""
    return [batch for batch in table.iter_batches(batch_size=None, batch_format="pyarrow") if batch.num_columns]


def _collect(table: Dataset, schema: pa.Schema) -> pa.Table:
    """Bring a table that is known to fit the driver, such as counts a pair, as Arrow of this schema."""
    batches = [batch.select(schema.names).cast(schema) for batch in _batches(table)]
    return pa.concat_tables(batches) if batches else schema.empty_table()


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()
