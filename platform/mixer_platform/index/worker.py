"""A Ray Data actor that embeds the items of one partition after the other and writes their parts."""

from __future__ import annotations

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixer.embedder import ITEM_GRAPH, SETTINGS, TOKENIZER, Device, DeviceError, ItemEmbedder, item_text
from mixer.images import ImagePreprocess, UnreadableImage, decode
from mixer_platform import versions
from mixer_platform.ahead import ahead
from mixer_platform.errors import ConfigError, InputError, MissingError
from mixer_platform.index.embeddings import (
    DELETED,
    LEFT_OUT,
    REPLACES,
    STATE,
    TEXT_ONLY,
    WHOLE,
    Chain,
    embedding_column,
    part_key,
    read_rows,
    vectors,
    write_part,
)
from mixer_platform.inputs import IMAGE, REASON, in_one_order, unmarked
from mixer_platform.item_ids import assign_ids, span
from mixer_platform.storage import open_storage, read_uri

PARTITION = "__partition"
DELETED_ROW = "__deleted"
COUNTS = (
    "items",
    "embedded",
    "reused",
    "replaced",
    "deleted",
    "unknown",
    "repeated",
    "broken",
    "without_picture",
    "left_out",
)
_READERS = 4  # threads that read and decode pictures while the graph runs


class Job(NamedTuple):
    """What a worker must know: where it writes, and which embeddings are there already."""

    uri: str
    version: str
    model: str
    partitions: int
    known: Chain
    batch_size: int
    device: Device


class Content(NamedTuple):
    """What an item would be embedded from; `pixels` are missing where its embedding is known already."""

    pixels: np.ndarray | None
    text: str | None
    fingerprint: str
    state: str


class Known(NamedTuple):
    """What is on disk of a partition's items: their ids, whether one is found or was left out, and by fingerprint the
    row that holds an embedding."""

    ids: dict[str, int]
    found: set[str]
    left_out: set[str]
    rows: dict[str, int]
    states: list[str]


class ItemWorker:
    """One partition's rows in; its part written, its number out."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.storage = open_storage(job.uri)
        with tempfile.TemporaryDirectory() as scratch:
            names = (ITEM_GRAPH, SETTINGS, TOKENIZER)
            folder = versions.fetch(self.storage, f"models/{job.model}", scratch, names)
            try:
                self.embedder = ItemEmbedder(folder, device=job.device)
            except DeviceError as error:
                raise ConfigError(f"index.embedder_device: {error}") from error
        self.threads = ThreadPoolExecutor(_READERS)

    def __call__(self, rows: pa.Table) -> pa.Table:
        numbers = rows[PARTITION].slice(0, 1)
        if len(rows):
            self._write(numbers[0].as_py(), rows)
        return pa.table({PARTITION: numbers})

    def _write(self, number: int, rows: pa.Table) -> None:
        if self.storage.tag(part_key(self.job.version, number)):
            return  # by an actor that died before it could say so, or by another run of the same
        update = DELETED_ROW in rows.column_names
        known = self._known(number)
        summary: dict[str, Any] = dict.fromkeys(COUNTS, 0)
        sound = rows.filter(pc.is_null(rows[REASON]))
        summary["broken"] = len(rows) - len(sound)
        rows = first_of_each(sound)
        summary["repeated"] = len(sound) - len(rows)
        deleted: list[str] = []
        if update:
            check_apart(rows)
            deleted = rows.filter(rows[DELETED_ROW])["item_id"].to_pylist()
            rows = rows.filter(pc.invert(rows[DELETED_ROW])).drop_columns(DELETED_ROW)
        item_ids = rows["item_id"].to_pylist()
        try:
            ids = assign_ids(item_ids, known.ids)
        except ValueError as error:
            raise InputError(f"items: {error}") from error
        embedded, prints, states, summary["reused"] = self._embed(number, rows, known)
        table = unmarked(rows).drop_columns(PARTITION).add_column(0, "id", pa.array(ids))
        table = table.append_column("embedding", embedding_column(embedded))
        table = table.append_column("fingerprint", pa.array(prints, pa.string()))
        table = table.append_column(STATE, pa.array(states, pa.string()))
        if update:
            replaces = [item_id in known.found for item_id in item_ids]
            table = table.append_column(REPLACES, pa.array(replaces, pa.bool_()))
            gone = [item_id for item_id in deleted if item_id in known.found or item_id in known.left_out]
            found = [item_id in known.found for item_id in gone]
            table = pa.concat_tables([table, _gone(gone, found, known.ids, table.schema)])
            summary |= {"replaced": sum(replaces), "deleted": sum(found), "unknown": len(deleted) - sum(found)}
        summary |= {"without_picture": states.count(TEXT_ONLY), "left_out": states.count(LEFT_OUT)}
        summary["items"] = len(item_ids) - summary["left_out"]
        summary["embedded"] = summary["items"] - summary["reused"]
        write_part(self.storage, self.job.version, number, table, summary)

    def _known(self, number: int) -> Known:
        wanted, columns = span(number, self.job.partitions), ["item_id", "id", "fingerprint", STATE]
        rows = read_rows(self.storage, self.job.known, wanted, columns, every_state=True) if self.job.known else None
        if rows is None:
            return Known({}, set(), set(), {}, [])
        item_ids, states = rows["item_id"].to_pylist(), rows[STATE].to_pylist()
        found = {item for item, state in zip(item_ids, states, strict=True) if state in (WHOLE, TEXT_ONLY)}
        left_out = {item for item, state in zip(item_ids, states, strict=True) if state == LEFT_OUT}
        prints = {each: row for row, each in enumerate(rows["fingerprint"].to_pylist()) if each}
        return Known(dict(zip(item_ids, rows["id"].to_pylist(), strict=True)), found, left_out, prints, states)

    def _embed(self, number: int, rows: pa.Table, known: Known) -> tuple[np.ndarray, list[str], list[str], int]:
        """Return embeddings [n, dim], fingerprints and states, and how many embeddings were known already."""
        embedded = np.zeros((len(rows), self.embedder.dim), np.float32)
        prints: list[str] = []
        states: list[str] = []
        again: dict[int, int] = {}
        uris, titles, descriptions = (rows[name].to_pylist() for name in (IMAGE, "title", "description"))
        texts = [item_text(*each) for each in zip(titles, descriptions, strict=True)]
        read = partial(read_content, model=self.job.model, known=known, preprocess=self.embedder.preprocess)
        contents = ahead(self.threads, read, zip(uris, texts, strict=True), 2 * self.job.batch_size)
        while batch := list(islice(contents, self.job.batch_size)):
            start = len(prints)
            prints += [content.fingerprint for content in batch]
            states += [content.state for content in batch]
            again |= {
                start + place: known.rows[each.fingerprint]
                for place, each in enumerate(batch)
                if each.fingerprint in known.rows
            }
            fresh = [place for place, each in enumerate(batch) if start + place not in again and each.state != LEFT_OUT]
            if fresh:
                pixels, words = [batch[place].pixels for place in fresh], [batch[place].text for place in fresh]
                embedded[[start + place for place in fresh]] = self.embedder(pixels, words)
        if again:
            wanted = span(number, self.job.partitions)
            before = read_rows(self.storage, self.job.known, wanted, ["embedding"], every_state=True)
            assert before is not None, "fingerprints were read from it"
            embedded[list(again)] = vectors(before["embedding"].take(pa.array(list(again.values()))))
        return embedded, prints, states, sum(states[row] != LEFT_OUT for row in again)


def read_content(item: tuple[str | None, str | None], model: str, known: Known, preprocess: ImagePreprocess) -> Content:
    """Read an item's picture, given its URI and the item's text, and decode it unless its embedding is known."""
    uri, text = item
    try:
        data = None if uri is None else read_uri(uri)
    except MissingError:
        data = None
    fingerprint = content_fingerprint(data, text, model)
    if fingerprint in known.rows:
        return Content(None, text, fingerprint, known.states[known.rows[fingerprint]])
    try:
        pixels = None if data is None else preprocess(decode(data))
    except UnreadableImage:
        pixels = None
    return Content(pixels, text, fingerprint, WHOLE if pixels is not None else TEXT_ONLY if text else LEFT_OUT)


def content_fingerprint(picture: bytes | None, text: str | None, model: str) -> str:
    """Return what changes when an item would be embedded to something else: its picture, its text or the model."""
    digest = hashlib.sha256(model.encode())
    for part in (picture or b"", (text or "").encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:32]


def first_of_each(rows: pa.Table) -> pa.Table:
    """Keep one row of each item_id, the same one whatever the order; prepare's quarantine names the others."""
    rows = in_one_order(rows, [name for name in ("item_id", DELETED_ROW) if name in rows.column_names])
    names = [rows["item_id"], rows[DELETED_ROW]] if DELETED_ROW in rows.column_names else [rows["item_id"]]
    codes = [pc.dictionary_encode(column).combine_chunks().indices.to_numpy() for column in names]
    changes = [np.diff(code, prepend=-1) != 0 for code in codes]
    return rows.filter(pa.array(np.any(changes, axis=0)))


def check_apart(rows: pa.Table) -> None:
    """Raise InputError if an item is both changed and deleted."""
    counts = pc.value_counts(rows["item_id"])
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise InputError(f"item {twice[0]['values'].as_py()!r} is both in items and in deleted; keep one of them")


def _gone(item_ids: list[str], found: list[bool], ids: dict[str, int], schema: pa.Schema) -> pa.Table:
    """Return rows that hide these items, given whether each is found in the index below."""
    columns: dict[str, Any] = {field.name: pa.nulls(len(item_ids), field.type) for field in schema}
    dim = schema.field("embedding").type.list_size
    columns["id"] = pa.array([ids[item_id] for item_id in item_ids], pa.int64())
    columns["item_id"] = pa.array(item_ids, schema.field("item_id").type)
    columns["embedding"] = embedding_column(np.zeros((len(item_ids), dim), np.float32))
    columns[STATE] = pa.array([DELETED] * len(item_ids), pa.string())
    columns[REPLACES] = pa.array(found, pa.bool_())
    return pa.table(columns, schema=schema)
