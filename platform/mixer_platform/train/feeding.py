"""The batches of a stage, made before they are asked for: in a thread of the worker, or by Ray Data's actors."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from safetensors.torch import load, save

from mixer.sampling import EpochPlan, plan_epoch
from mixer.training import Batch
from mixer_platform.ahead import ahead
from mixer_platform.patience import patiently
from mixer_platform.train.features import FeatureSamples
from mixer_platform.train.pictures import PictureSamples

Samples = FeatureSamples | PictureSamples
_MOST_BLOCKS = 4096
_PATIENCE_S = 600  # for CPUs for the decoders


@dataclass(frozen=True)
class Schedule:
    """What one worker learns from in each epoch of a stage; whoever works it out gets the same.

    samples: how many there are. rows: those that are learned from. views, dropout (of texts, of pictures), chance: as
    `plan_epoch` takes them. batch_size: over all workers.
    """

    samples: int
    rows: np.ndarray
    views: int
    seed: int
    dropout: tuple[float, float]
    chance: np.ndarray | None
    batch_size: int
    world: int
    rank: int

    def epoch(self, number: int) -> tuple[EpochPlan, list[np.ndarray]]:
        """Return the plan of an epoch and the samples of each of this worker's batches."""
        plan = plan_epoch(self.samples, self.views, number, self.seed, *self.dropout, self.chance)
        plan = replace(plan, order=plan.order[np.isin(plan.order, self.rows)])
        return plan, plan.batches(self.batch_size, self.world, self.rank)

    def parts(self, epochs: range, done: int) -> Iterator[tuple[np.ndarray, EpochPlan]]:
        """Yield the samples of each batch of these epochs, and its epoch's plan, without the first `done`."""
        for epoch in epochs:
            plan, batches = self.epoch(epoch)
            for part in batches[done if epoch == epochs.start else 0 :]:
                yield part, plan


def batches_of(samples: Samples, schedule: Schedule, epochs: range, done: int, decoders: int = 0) -> Iterator[Batch]:
    """Yield this worker's batches of these epochs, without the first `done`; the next is made while one is used.

    With `decoders`, so many Ray Data actors decode and augment pictures, wherever the cluster has a CPU for them; where
    it has none for ten minutes, Ray's GetTimeoutError.
    """
    if decoders and isinstance(samples, PictureSamples):
        return _made_by_actors(samples, schedule, epochs, done, decoders)
    return _made_here(samples, schedule.parts(epochs, done))


def _made_here(samples: Samples, parts: Iterator[tuple[np.ndarray, EpochPlan]]) -> Iterator[Batch]:
    with ThreadPoolExecutor(1) as threads:
        yield from ahead(threads, lambda part: samples.batch(*part), parts)


def _made_by_actors(
    samples: PictureSamples, schedule: Schedule, epochs: range, done: int, decoders: int
) -> Iterator[Batch]:
    sizes = [len(schedule.epoch(epoch)[1]) for epoch in epochs]
    places = [{"epoch": epoch, "batch": n} for epoch, size in zip(epochs, sizes, strict=True) for n in range(size)]
    if not places[done:]:
        return
    blocks = min(len(places) - done, _MOST_BLOCKS)
    dataset = ray.data.from_items(places[done:], override_num_blocks=blocks).map_batches(
        BatchMaker,
        fn_constructor_args=(samples.source, schedule),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=decoders),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.wait_for_min_actors_s = _PATIENCE_S
    dataset.context.enable_progress_bars = False
    made = dataset.iter_batches(batch_size=1, batch_format="pyarrow")
    for (part, _), row in zip(schedule.parts(epochs, done), made, strict=True):
        yield samples.with_targets(part, load(row["tensors"][0].as_py()))


class BatchMaker:
    """A Ray Data actor: the place of a batch in, its tensors out, as safetensors writes them."""

    def __init__(self, source: tuple[Any, ...], schedule: Schedule) -> None:
        """`source` is that of the worker's `PictureSamples`."""
        self._samples, self._schedule, self._epoch = patiently(PictureSamples)(*source), schedule, -1

    def __call__(self, places: pa.Table) -> pa.Table:
        epoch, batch = places["epoch"][0].as_py(), places["batch"][0].as_py()
        if epoch != self._epoch:
            self._epoch, (self._plan, self._parts) = epoch, self._schedule.epoch(epoch)
        tensors = self._samples.tensors(self._parts[batch], self._plan)
        return pa.table({"tensors": pa.array([save(tensors)], pa.large_binary())})
