"""Features of a frozen encoder, computed once by Ray Data and cached in the workspace."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import ray.data
import torch
from torch import Tensor

from mixer.config import ModelConfig
from mixer.embedder import Device, DeviceError, ImageFeatures, TextFeatures
from mixer.encoders import digest
from mixer.export import export_encoders
from mixer.images import augment
from mixer.sampling import EpochPlan
from mixer.targets import concatenate, pool_evidence
from mixer.towers import Towers
from mixer.training import Batch
from mixer_platform import versions
from mixer_platform.ahead import ahead
from mixer_platform.config import TrainConfig
from mixer_platform.errors import ConfigError, TrainingError
from mixer_platform.storage import Storage, open_storage
from mixer_platform.train.labels import LABELS, in_training_order, read_labels
from mixer_platform.train.pictures import LEAST_THREADS, read_picture
from mixer_platform.train.start import starting_model

KIND = "features"
_BLOCK_ROWS, _BATCH_ROWS = 64, 32
_POOLED_ROWS = 1024
_AT_ONCE = 32  # pictures that a graph encodes, all views counted
_log = logging.getLogger(__name__)


def cache_features(storage: Storage, samples: str, model: ModelConfig, train: TrainConfig) -> str:
    """Compute `features/<version>/` for a samples version unless it is there, and return the version."""
    seed = train.seed if train.views > 1 else 0  # of what is augmented
    whole = starting_model(storage, train.start, model)
    encoders = [digest(encoder) for encoder in (whole.image_encoder, whole.text_encoder)]
    settings = [model.text_encoder, model.max_tokens, model.pooling, train.views, seed]
    fingerprint = versions.fingerprint(versions.fingerprint_of(samples), encoders, *settings)
    if done := versions.find(storage, KIND, fingerprint):
        _log.info("features %s are there already", done["version"])
        return done["version"]
    version = versions.new_version(fingerprint)
    folder = f"{KIND}/{version}"
    with tempfile.TemporaryDirectory() as scratch:
        export_encoders(whole, Path(scratch))
        versions.upload(storage, Path(scratch), f"{folder}/encoders")
    taken, there = train.workers * train.cpus_per_worker, ray.cluster_resources().get("CPU", 0)
    if taken > there - 1:
        _log.warning(
            "train.workers x train.cpus_per_worker are %g of the cluster's %g CPUs; Ray Data needs one more to feed "
            "them, and waits for it for ever if the cluster does not grow",
            taken,
            there,
        )
    rows = ray.data.read_parquet(storage.path(f"samples/{samples}/train"), filesystem=storage.filesystem)
    # Small blocks: an item costs many times a photo, and the actors shall end together.
    features = rows.repartition(target_num_rows_per_block=_BLOCK_ROWS).map_batches(
        FeatureWorker,
        fn_constructor_args=(storage.uri, f"{folder}/encoders", model.pooling, train),
        batch_format="pyarrow",
        batch_size=_BATCH_ROWS,
        num_cpus=train.cpus_per_worker,
        num_gpus=train.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(min_size=train.least_workers or train.workers, max_size=train.workers),
    )
    features.write_parquet(storage.path(f"{folder}/rows"), filesystem=storage.filesystem)
    versions.publish(storage, KIND, version, {"samples": samples, "views": train.views})
    return version


class FeatureWorker:
    """A Ray Data actor: samples in, float16 features of each augmented view out; on a GPU where workers have one."""

    def __init__(self, uri: str, encoders: str, pooling: str, train: TrainConfig) -> None:
        """Raises ConfigError if onnxruntime cannot use the GPU."""
        self.pooling, self.views, self.seed = pooling, train.views, train.seed
        threads = max(1, int(train.cpus_per_worker))
        device: Device = "cuda" if train.gpus_per_worker else "cpu"
        self.readers = ThreadPoolExecutor(max(LEAST_THREADS, threads))
        with tempfile.TemporaryDirectory() as scratch:
            folder = versions.fetch(open_storage(uri), encoders, scratch)
            try:
                self.images = ImageFeatures(folder, threads, device)
                self.texts = TextFeatures(folder, threads, device)
            except DeviceError as error:
                raise ConfigError(f"train.gpus_per_worker: {error}") from error

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        items = [row for row in rows if row["kind"] == "item"]
        tokens = iter(self._tokens([row["text"] for row in items]))
        columns: dict[str, Any] = {name: batch[name] for name in LABELS}
        columns["views"] = pa.array(self._encoded(rows), pa.binary())
        columns["tokens"] = pa.array([next(tokens) if row["kind"] == "item" else None for row in rows], pa.binary())
        return pa.table(columns)

    def _encoded(self, rows: list[dict[str, Any]]) -> Iterator[bytes | None]:
        """Yield photos as pooled float16 [views, width] and items as patches [views, patches, width]; the next pictures
        are read while some are encoded."""
        at_once = max(1, _AT_ONCE // self.views)
        pictures = ahead(self.readers, self._views, rows, 2 * at_once)
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            views = list(islice(pictures, len(part)))
            there = [each for each in views if each is not None]
            patches = iter(np.split(self.images(np.concatenate(there)), len(there)) if there else [])
            for row, each in zip(part, views, strict=True):
                yield None if each is None else self._stored(row["kind"], next(patches))

    def _views(self, row: dict[str, Any]) -> np.ndarray | None:
        """Return uint8 [views, size, size, 3]; the first view is the picture as it is."""
        if row["image"] is None:
            return None
        picture = read_picture(row["image"])
        told = hashlib.sha256(f"{self.seed}:{row['sample_id']}".encode()).digest()
        rng = np.random.default_rng(list(told[:8]))
        augmented = [picture, *(augment(picture, rng) for _ in range(self.views - 1))]
        return np.stack([self.images.preprocess(view) for view in augmented])

    def _stored(self, kind: str, patches: np.ndarray) -> bytes:
        if kind == "query":
            patches = patches.mean(axis=1) if self.pooling == "mean" else patches[:, 0]
        return patches.astype(np.float16).tobytes()

    def _tokens(self, texts: list[str | None]) -> list[bytes | None]:
        if not texts:
            return []
        encoded, mask = self.texts(texts)
        counts = mask.sum(axis=1)
        return [
            row[:count].astype(np.float16).tobytes() if count else None
            for row, count in zip(encoded, counts, strict=True)
        ]


def _mapped(*shape: int) -> Tensor:
    """Return zeros, float16, in a file that goes with them. Raises TrainingError where there is no room for it."""
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape, dtype=torch.float16)
    with tempfile.NamedTemporaryFile(prefix="mixer-features-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 2 * count)  # later a full disk would kill the process without a word
        except OSError as error:
            folder = os.path.dirname(file.name)
            raise TrainingError(
                f"{folder}: {error.strerror}, {2 * count / 1e9:.1f} GB of features do not fit; set TMPDIR to a folder "
                "with room, or lower train.views"
            ) from error
        return torch.from_file(file.name, shared=True, size=count, dtype=torch.float16).view(shape)


class FeatureSamples:
    """The cached samples of a run, photos first; gives batches to a `FrozenTower`.

    Features lie in files without a name, below TMPDIR, of which the system holds in memory what it has room for.
    """

    def __init__(self, storage: Storage, version: str, widths: tuple[int, int], views: int, max_tokens: int) -> None:
        image_width, text_width = widths
        self.views = views
        stored = pyarrow.dataset.dataset(storage.path(f"{KIND}/{version}/rows"), filesystem=storage.filesystem)
        keys = in_training_order(stored.to_table(columns=LABELS))
        self.ids = keys["sample_id"].to_pylist()
        self.labels, self.targets = read_labels(keys)
        places = {key: row for row, key in enumerate(zip(keys["kind"].to_pylist(), self.ids, strict=True))}
        count = sum(kind == "query" for kind, _ in places)
        items = len(places) - count
        self.photos = _mapped(count, views, image_width)
        pictures: Tensor | None = None
        self.has_image = torch.zeros(items, dtype=torch.bool)
        self.tokens = _mapped(items, max_tokens, text_width)
        self.token_mask = torch.zeros(items, max_tokens, dtype=torch.int64)
        # Patches are by far the largest: they go to their places batch by batch, so that they are held once.
        for batch in stored.to_batches(batch_size=64, batch_readahead=1, fragment_readahead=1):
            columns = [batch[name] for name in ("kind", "sample_id", "views", "tokens")]
            for kind, sample_id, seen, told in zip(*columns, strict=True):
                row = places[kind.as_py(), sample_id.as_py()]
                if kind.as_py() == "query":
                    self.photos[row] = _tensor(seen, (views, image_width))
                    continue
                if seen.is_valid:
                    picture = _tensor(seen, (views, -1, image_width))
                    if pictures is None:  # the first one tells how many patches there are
                        pictures = _mapped(items, *picture.shape)
                    pictures[row - count] = picture
                    self.has_image[row - count] = True
                if told.is_valid:
                    tokens = _tensor(told, (-1, text_width))
                    self.tokens[row - count, : len(tokens)] = tokens
                    self.token_mask[row - count, : len(tokens)] = 1
        missing = torch.zeros(items, views, 1, image_width, dtype=torch.float16)
        self.pictures = missing if pictures is None else pictures

    def pool_evidence(self, classes: int, neighbours: int, held_out: np.ndarray) -> None:
        """Let photos that look alike, but for those held out, share what the logs say of each."""
        photos = torch.from_numpy(np.setdiff1d(np.arange(len(self.photos)), held_out))
        rest = torch.from_numpy(np.setdiff1d(np.arange(len(self.labels)), photos.numpy()))
        pooled = pool_evidence(self.photos[photos, 0].float(), self.targets[photos], classes, neighbours)
        self.targets = concatenate([pooled, self.targets[rest]])[torch.cat([photos, rest]).argsort()]

    def pooled(self, towers: Towers) -> Tensor:
        """Return the first view of every sample with a picture, as `towers` pool it, [n, width]."""
        items = [towers.pool(some[:, 0].float()) for some in self.pictures.split(_POOLED_ROWS)]
        return torch.cat([self.photos[:, 0].float(), torch.cat(items)[self.has_image]])

    def batch(self, rows: np.ndarray, plan: EpochPlan) -> Batch:
        """Return the batch of these samples as the epoch's plan shows them."""
        count = len(self.photos)
        queries, items = rows[rows < count], rows[rows >= count]
        order = torch.from_numpy(np.concatenate([queries, items]))
        query_rows, item_rows = torch.from_numpy(queries), torch.from_numpy(items - count)
        mask = self.token_mask[item_rows].clone()
        has_text = mask.any(dim=1)
        has_image = self.has_image[item_rows]
        drop_text = torch.from_numpy(plan.drop_text[items]) & has_image
        drop_image = torch.from_numpy(plan.drop_image[items]) & has_text
        mask[drop_text] = 0
        return Batch(
            photos=self.photos[query_rows, torch.from_numpy(plan.view[queries])],
            pictures=self.pictures[item_rows, torch.from_numpy(plan.view[items])],
            has_image=has_image & ~drop_image,
            tokens=self.tokens[item_rows],
            token_mask=mask,
            targets=self.targets[order],
        )


def _tensor(value: pa.BinaryScalar, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(value.as_buffer(), np.float16).copy()).view(shape)
