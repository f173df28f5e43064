"""A Ray Data actor that sees pictures as the trained model and as the untrained encoder do."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from mixer.config import ModelConfig
from mixer.embedder import ImageFeatures, QueryEmbedder
from mixer.images import UnreadableImage, decode
from mixer_platform import versions
from mixer_platform.errors import StorageError
from mixer_platform.storage import Storage, open_storage, read_uri


class PhotoWorker:
    """Rows with `image` in; the same rows with `query` (the model's embedding, if a model is given) and `untrained`
    (pooled features of the bare encoder, if its folder is given) out, null where the picture cannot be used."""

    def __init__(self, uri: str, model: str | None, encoder: str | None, pooling: str) -> None:
        storage = open_storage(uri)
        self.pooling = pooling
        with tempfile.TemporaryDirectory() as scratch:
            self.model = QueryEmbedder(versions.fetch(storage, f"models/{model}", scratch)) if model else None
            self.encoder = ImageFeatures(versions.fetch(storage, encoder, scratch)) if encoder else None
        self.threads = ThreadPoolExecutor(4)

    def __call__(self, batch: pa.Table) -> pa.Table:
        pictures = list(self.threads.map(_picture, batch["image"].to_pylist()))
        seen = [row for row, picture in enumerate(pictures) if picture is not None]
        for name, network in (("query", self.model), ("untrained", self.encoder)):
            if network is None:
                continue
            vectors: list[list[float] | None] = [None] * len(pictures)
            if seen:
                pixels = np.stack([network.preprocess(pictures[row]) for row in seen])  # type: ignore[arg-type]
                for row, vector in zip(seen, self._pooled(network(pixels)), strict=True):
                    vectors[row] = vector.tolist()
            batch = batch.append_column(name, pa.array(vectors, pa.list_(pa.float32())))
        return batch

    def _pooled(self, output: np.ndarray) -> np.ndarray:
        if output.ndim == 2:
            return output
        return output.mean(axis=1) if self.pooling == "mean" else output[:, 0]


def export_untrained(storage: Storage, architecture: ModelConfig) -> str:
    """Write the graph of the bare image encoder into the workspace unless it is there; return its folder's key."""
    from mixer.encoders import image_encoder  # here, not at the top: the actors of this module need no torch
    from mixer.export import export_image_encoder

    version = versions.fingerprint(architecture.image_encoder)
    folder = f"encoders/{version}"
    if versions.manifest(storage, "encoders", version) is None:
        with tempfile.TemporaryDirectory() as scratch:
            export_image_encoder(image_encoder(architecture.image_encoder), Path(scratch))
            versions.upload(storage, Path(scratch), folder)
        versions.publish(storage, "encoders", version, {"image_encoder": architecture.image_encoder})
    return folder


def _picture(uri: str | None) -> Image.Image | None:
    try:
        return None if uri is None else decode(read_uri(uri))
    except (StorageError, UnreadableImage):
        return None
