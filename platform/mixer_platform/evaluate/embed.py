"""A Ray Data actor that sees pictures as the trained model and as the untrained encoder do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from mixer.config import ModelConfig
from mixer.embedder import QUERY_GRAPH, SETTINGS, ImageFeatures, QueryEmbedder
from mixer.images import UnreadableImage, decode
from mixer_platform import versions
from mixer_platform.errors import MissingError
from mixer_platform.inputs import IMAGE, REASON
from mixer_platform.storage import Storage, open_storage, read_uri

PHOTO, ITEM = "photo", "item"
_ROWS = pa.schema(
    [
        ("kind", pa.string()),
        ("id", pa.string()),
        ("image", pa.string()),
        ("relevant_item_ids", pa.list_(pa.string())),
        (REASON, pa.string()),
    ]
)


def picture_rows(batch: pa.Table, kind: str) -> pa.Table:
    """Return the rows of the truth, or the sound ones of the items, in the columns that both have for `PhotoWorker`.

    A broken row of the truth keeps its reason and loses its picture: it counts as a photo that cannot be used.
    """
    if kind == ITEM:
        batch = batch.filter(pc.is_null(batch[REASON]))
    relevant = batch["relevant_item_ids"] if kind == PHOTO else pa.nulls(len(batch), pa.list_(pa.string()))
    empty = pc.fill_null(pc.equal(pc.list_value_length(relevant), 0), False)
    reasons = pc.if_else(empty, "relevant_item_ids is empty", batch[REASON].cast(pa.string()))
    pictures = pc.if_else(pc.is_null(reasons), batch[IMAGE], None)
    columns = [pa.array([kind] * len(batch), pa.string()), batch[0], pictures, relevant, reasons]
    return pa.table(columns, names=_ROWS.names).cast(_ROWS)


class PhotoWorker:
    """`picture_rows` in; the same rows with `query` (a photo as the model embeds it) and `untrained` (pooled features
    of the bare encoder, if its folder is given) out, null where the picture cannot be used."""

    def __init__(self, uri: str, model: str, encoder: str | None, pooling: str) -> None:
        storage = open_storage(uri)
        self.pooling = pooling
        with tempfile.TemporaryDirectory() as scratch:
            names = (QUERY_GRAPH, SETTINGS)
            self.model = QueryEmbedder(versions.fetch(storage, f"models/{model}", scratch, names))
            self.encoder = ImageFeatures(versions.fetch(storage, encoder, scratch)) if encoder else None
        self.threads = ThreadPoolExecutor(4)

    def __call__(self, batch: pa.Table) -> pa.Table:
        pictures = list(self.threads.map(_picture, batch["image"].to_pylist()))
        photos = [
            picture if kind == PHOTO else None
            for kind, picture in zip(batch["kind"].to_pylist(), pictures, strict=True)
        ]
        batch = batch.append_column("query", _seen(self.model, photos))
        if self.encoder:
            batch = batch.append_column("untrained", _seen(self.encoder, pictures, self._pooled))
        return batch

    def _pooled(self, output: np.ndarray) -> np.ndarray:
        return output.mean(axis=1) if self.pooling == "mean" else output[:, 0]


def _seen(
    network: QueryEmbedder | ImageFeatures,
    pictures: Sequence[Image.Image | None],
    pooled: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> pa.Array:
    """Return a vector for each picture, null for None."""
    vectors: list[np.ndarray | None] = [None] * len(pictures)
    rows = [row for row, picture in enumerate(pictures) if picture is not None]
    if rows:
        pixels = np.stack([network.preprocess(picture) for picture in pictures if picture is not None])
        for row, vector in zip(rows, pooled(network(pixels)), strict=True):
            vectors[row] = vector
    return pa.array(vectors, pa.list_(pa.float32()))


def export_untrained(storage: Storage, architecture: ModelConfig) -> str:
    """Write the graph of the bare image encoder into the workspace unless it is there; return its folder's key."""
    from mixer.encoders import digest, image_encoder  # here, not at the top: the actors of this module need no torch
    from mixer.export import export_image_encoder

    encoder = image_encoder(architecture.image_encoder)
    fingerprint = versions.fingerprint(digest(encoder))
    if done := versions.find(storage, "encoders", fingerprint):
        return f"encoders/{done['version']}"
    version = versions.new_version(fingerprint)
    with tempfile.TemporaryDirectory() as scratch:
        export_image_encoder(encoder, Path(scratch))
        versions.upload(storage, Path(scratch), f"encoders/{version}")
    versions.publish(storage, "encoders", version, {"image_encoder": architecture.image_encoder})
    return f"encoders/{version}"


def _picture(uri: str | None) -> Image.Image | None:
    try:
        return None if uri is None else decode(read_uri(uri))
    except (MissingError, UnreadableImage):
        return None
