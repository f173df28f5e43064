"""A Ray Data actor that turns items into embeddings."""

from __future__ import annotations

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mixer.embedder import ITEM_GRAPH, SETTINGS, TOKENIZER, ItemEmbedder, item_text
from mixer.images import UnreadableImage, decode
from mixer_platform import versions
from mixer_platform.errors import MissingError
from mixer_platform.inputs import IMAGE, REASON, unmarked
from mixer_platform.storage import open_storage, read_uri

STATE = "__state"
WHOLE, TEXT_ONLY, LEFT_OUT = "whole", "text only", "left out"


class ItemWorker:
    """Items in; the same rows with `embedding`, `fingerprint` and `state` out."""

    def __init__(self, uri: str, model: str) -> None:
        self.model = model
        with tempfile.TemporaryDirectory() as scratch:
            names = (ITEM_GRAPH, SETTINGS, TOKENIZER)
            self.embedder = ItemEmbedder(versions.fetch(open_storage(uri), f"models/{model}", scratch, names))
        self.threads = ThreadPoolExecutor(4)

    def __call__(self, batch: pa.Table) -> pa.Table:
        batch = batch.filter(pc.is_null(batch[REASON]))
        titles, descriptions = batch["title"].to_pylist(), batch["description"].to_pylist()
        texts = [item_text(title, description) for title, description in zip(titles, descriptions, strict=True)]
        data = list(self.threads.map(_picture, batch[IMAGE].to_pylist()))
        pictures = [_decoded(picture) for picture in data]
        states, prints = [], []
        for text, raw, picture in zip(texts, data, pictures, strict=True):
            states.append(WHOLE if picture is not None else TEXT_ONLY if text else LEFT_OUT)
            prints.append(content_fingerprint(raw, text, self.model))
        embedded: Any = self.embedder(pictures, texts) if len(batch) else []
        vectors = pa.array([list(vector) for vector in embedded], pa.list_(pa.float32(), self.embedder.dim))
        batch = unmarked(batch).append_column("embedding", vectors)
        batch = batch.append_column("fingerprint", pa.array(prints, pa.string()))
        return batch.append_column(STATE, pa.array(states, pa.string()))


def content_fingerprint(picture: bytes | None, text: str | None, model: str) -> str:
    """Return what changes when an item would be embedded to something else: its picture, its text or the model."""
    digest = hashlib.sha256(model.encode())
    for part in (picture or b"", (text or "").encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:32]


def _picture(uri: str | None) -> bytes | None:
    try:
        return None if uri is None else read_uri(uri)
    except MissingError:
        return None


def _decoded(data: bytes | None):  # type: ignore[no-untyped-def]
    try:
        return None if data is None else decode(data)
    except UnreadableImage:
        return None
