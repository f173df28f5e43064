"""Pictures decoded and augmented as they are needed: what a trained encoder learns from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from mixer.images import ImagePreprocess, UnreadableImage, augment, decode
from mixer.sampling import EpochPlan
from mixer.tokenizer import Tokenizer
from mixer.training import Batch
from mixer_platform.errors import InputError
from mixer_platform.patience import patiently
from mixer_platform.storage import open_storage, read_uri
from mixer_platform.train.labels import in_training_order, read_labels

LEAST_THREADS = 4  # also of a worker with one CPU: while one waits for the storage, others decode


def read_picture(uri: str) -> Image.Image:
    """Return the decoded picture of a sample. Raises InputError if it broke since prepare read it, StorageError if the
    storage does not answer for minutes."""
    try:
        return decode(patiently(read_uri)(uri))
    except UnreadableImage as error:
        raise InputError(f"{uri}: {error}; prepare could still read it, put the whole picture back") from error


class PictureSamples:
    """The samples of a run by their pictures, photos first; gives batches to a `WholeModel`."""

    def __init__(
        self, uri: str, version: str, preprocess: ImagePreprocess, tokenizer: Tokenizer, seed: int, threads: int = 0
    ) -> None:
        """`uri` is the workspace's, `version` that of samples/. At least four threads read and decode."""
        self.source, storage = (uri, version, preprocess, tokenizer, seed), open_storage(uri)
        rows = pq.read_table(storage.path(f"samples/{version}/train"), filesystem=storage.filesystem)
        rows = in_training_order(rows)
        self.photos = rows.filter(pc.equal(rows["kind"], "query"))["image"].to_pylist()
        self.labels, self.targets = read_labels(rows)
        self._images, self._texts = rows["image"].to_pylist(), rows["text"].to_pylist()
        self._preprocess, self._tokenizer = preprocess, tokenizer
        self.views = np.iinfo(np.int32).max  # as many as are asked for
        self._seed, self._threads = seed, ThreadPoolExecutor(max(LEAST_THREADS, threads))

    def batch(self, rows: np.ndarray, plan: EpochPlan) -> Batch:
        """Return the batch of these samples: view 0 is the picture as it is, any other number an augmented one."""
        return self.with_targets(rows, self.tensors(rows, plan))

    def with_targets(self, rows: np.ndarray, tensors: dict[str, Tensor]) -> Batch:
        """Return the batch of these samples, given what `tensors` made of them, here or elsewhere."""
        order = torch.from_numpy(np.concatenate(self._parted(rows)))
        return Batch(**tensors, targets=self.targets[order])

    def tensors(self, rows: np.ndarray, plan: EpochPlan) -> dict[str, Tensor]:
        """Return all of a batch but the targets."""
        queries, items = self._parted(rows)
        pixels = self._pixels(np.concatenate([queries, items]), plan)
        token_ids, token_mask = self._tokenizer([self._texts[row] for row in items] or [None])
        token_ids, token_mask = token_ids[: len(items)], token_mask[: len(items)]
        has_image = np.array([self._images[row] is not None for row in items], bool)
        has_text = token_mask.any(axis=1)
        token_mask[plan.drop_text[items] & has_image] = 0
        return {
            "photos": pixels[: len(queries)],
            "pictures": pixels[len(queries) :],
            "has_image": torch.from_numpy(has_image & ~(plan.drop_image[items] & has_text)),
            "tokens": torch.from_numpy(token_ids),
            "token_mask": torch.from_numpy(token_mask),
        }

    def _parted(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return photos and items apart."""
        return rows[rows < len(self.photos)], rows[rows >= len(self.photos)]

    def _pixels(self, rows: np.ndarray, plan: EpochPlan) -> Tensor:
        size = self._preprocess.size
        pixels = list(self._threads.map(lambda row: self._decoded(row, plan), rows.tolist()))
        return torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, size, size, 3, dtype=torch.uint8)

    def _decoded(self, row: int, plan: EpochPlan) -> np.ndarray:
        if self._images[row] is None:
            return np.zeros((self._preprocess.size, self._preprocess.size, 3), np.uint8)
        picture = read_picture(self._images[row])
        if plan.view[row]:
            picture = augment(picture, np.random.default_rng([self._seed, row, int(plan.view[row])]))
        return self._preprocess(picture)
