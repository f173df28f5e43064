"""What each Ray Train worker runs: the epochs of every stage, with checkpoints, on from the last one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from mixer.metrics import hit_at_k
from mixer.sampling import class_chances
from mixer.training import Batch
from mixer_platform.config import TrainConfig
from mixer_platform.errors import DivergedError
from mixer_platform.patience import patiently
from mixer_platform.storage import open_storage
from mixer_platform.train.checkpoints import Checkpoints, name_of
from mixer_platform.train.engine import HybridTrainer
from mixer_platform.train.feeding import Samples, Schedule, batches_of
from mixer_platform.train.stages import (
    embedded,
    multiplies_in_bf16,
    new_trainer,
    next_stage,
    read_samples,
    stage_of,
    stages_of,
    start_classes,
)

_SCORES = 2**26  # of photos and items that are in memory at a time
_log = logging.getLogger(__name__)


def train_worker(job: dict[str, Any]) -> str | None:
    """Train one run to its last epoch, or return why it cannot be: what fails is started again, which would not help.

    `job` holds workspace, run, samples, features, classes, model, train. Every worker calls this at once; what differs
    is only its rank.
    """
    try:
        _learn(job)
    except DivergedError as error:
        return error.sentence
    return None


def _learn(job: dict[str, Any]) -> None:
    config = TrainConfig.model_validate(job["train"])
    checkpoints = Checkpoints(patiently(open_storage)(job["workspace"]), job["run"])
    rank = dist.get_rank()
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))

    state = newest(checkpoints, rank)
    start, history = state["epoch"], state["history"]
    stages = stages_of(config)
    stage = stage_of(config, start if state["batches"] else max(start - 1, 0))  # of what was trained last, if anything
    samples, rows, held_out = read_samples(job, config, stage)
    if stage:
        samples.targets = checkpoints.read_targets(stage)
    if rank == 0 and config.precision == "bf16" and not multiplies_in_bf16(device):
        _log.warning("train.precision=bf16: this CPU does not multiply in it and takes many times as long; set fp32")
    trainer = new_trainer(job, stages[stage], samples, len(rows), device)
    if "name" in state:
        trainer.load_tower_state(checkpoints.read_towers(state["name"]), state["step"])
        trainer.load_head_state(checkpoints.read_classes(state["name"], trainer.head.owned), state["step"])
    else:
        start_classes(job, trainer, samples, rows, device)

    feed: Iterator[Batch] | None = None
    last = config.rounds * config.epochs + config.fine_tune.epochs
    ended = time.monotonic()
    for epoch in range(start, last):
        if stage_of(config, epoch) > stage:
            stage = stage_of(config, epoch)
            samples, trainer = next_stage(job, stage, samples, rows, trainer, device)
            feed = None
            if rank == 0:
                checkpoints.write_targets(stage, samples.targets)
        done, total = (state["batches"], state["total_loss"]) if epoch == start and state["batches"] else (0, 0.0)
        size = stages[stage].batch_size
        if feed is None:
            schedule = schedule_of(config, samples, rows, size)
            ahead = range(epoch, next((e for e in range(epoch, last) if stage_of(config, e) > stage), last))
            feed = batches_of(samples, schedule, ahead, done, config.fine_tune.decoders)
        batches = len(schedule.epoch(epoch)[1])
        trainer.watch.start()
        for number, batch in enumerate(islice(feed, batches - done), done + 1):
            trainer.watch.lap("data")
            total += trainer.step(batch.to(device))
            if config.checkpoint_steps and number % config.checkpoint_steps == 0 and number < batches:
                place = {"epoch": epoch, "batches": number, "total_loss": total, "history": history}
                write_checkpoint(checkpoints, name_of(epoch, number), trainer, place)
            trainer.watch.start()
        metrics = {"epoch": epoch, "loss": total / batches, **trainer.watch.shares()}
        ends = epoch + 1 == last or stage_of(config, epoch + 1) > stage
        if len(held_out) and (ends or (epoch + 1) % config.recall_every == 0):
            metrics["held_out_r1"] = held_out_recall(trainer, samples, held_out, size, device)
        began, ended = ended, time.monotonic()
        metrics["seconds"] = round(ended - began, 2)  # with the checkpoint of the epoch before
        history = [*history, metrics]
        write_checkpoint(checkpoints, name_of(epoch), trainer, {"epoch": epoch + 1, "batches": 0, "history": history})
        ray.train.report(metrics)


def schedule_of(config: TrainConfig, samples: Samples, rows: np.ndarray, batch_size: int) -> Schedule:
    """Return what this worker learns from in a stage over `rows` of the samples."""
    return Schedule(
        samples=len(samples.labels),
        rows=rows,
        views=samples.views,
        seed=config.seed,
        dropout=(config.text_dropout, config.image_dropout),
        chance=class_chances(samples.labels.numpy(), config.skew),
        batch_size=batch_size,
        world=dist.get_world_size(),
        rank=dist.get_rank(),
    )


def newest(checkpoints: Checkpoints, rank: int) -> dict[str, Any]:
    """Return where the run goes on; one worker looks, so that all go on from the same."""
    found = [checkpoints.latest() if rank == 0 else None]
    dist.broadcast_object_list(found)
    return found[0] or {"epoch": 0, "batches": 0, "history": []}


def write_checkpoint(checkpoints: Checkpoints, name: str, trainer: HybridTrainer, place: dict[str, Any]) -> None:
    """Write a checkpoint that goes on at `place`; every worker calls this and writes its classes."""
    head, towers = trainer.head, trainer.tower_state()
    if head.rank == 0:
        checkpoints.clear(name)
    dist.barrier()
    checkpoints.write_classes(name, head.owned, trainer.head_state())
    if head.rank == 0:
        checkpoints.write_towers(name, towers)
    dist.barrier()  # nothing is visible before everybody has written
    if head.rank == 0:
        checkpoints.publish(name, {"step": trainer.step_count, "world": head.world, **place})


@torch.no_grad()
def held_out_recall(
    trainer: HybridTrainer, samples: Samples, held_out: np.ndarray, batch_size: int, device: torch.device
) -> float:
    """Return how often the item nearest to a held-out photo has the photo's (weak) label."""
    items = np.arange(len(samples.photos), len(samples.labels))
    queries, gallery = (embedded(trainer, samples, rows, 0, batch_size, device) for rows in (held_out, items))
    at_once = max(1, _SCORES // max(1, len(gallery)))
    nearest = torch.cat([(part @ gallery.T).argmax(dim=1) for part in queries.split(at_once)]).numpy()
    right = samples.labels[items].numpy()[nearest] == samples.labels[held_out].numpy()
    return round(float(hit_at_k(right[:, None], 1).mean()), 4)
