"""What each Ray Train worker runs: epochs of global batches, a checkpoint after each, and on from the last one."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from mixer.config import ModelConfig
from mixer.encoders import TextEncoder, image_encoder
from mixer.metrics import hit_at_k
from mixer.sampling import EpochPlan, plan_epoch
from mixer.softmax import ShardedMarginSoftmax, class_range, fixed_scale, gather_rows
from mixer.towers import MixerModel, Towers
from mixer.training import FrozenTower, WholeModel
from mixer_platform.config import TrainConfig
from mixer_platform.storage import open_storage
from mixer_platform.train.checkpoints import Checkpoints
from mixer_platform.train.engine import HybridTrainer
from mixer_platform.train.features import FeatureSamples
from mixer_platform.train.pictures import PictureSamples


def train_worker(job: dict[str, Any]) -> None:
    """Train one run to its last epoch. `job` holds workspace, run, samples, features (or None), classes, model, train.

    Every worker calls this at once; what differs is only its rank.
    """
    config = TrainConfig.model_validate(job["train"])
    architecture = ModelConfig.model_validate(job["model"])
    storage = open_storage(job["workspace"])
    checkpoints = Checkpoints(storage, job["run"])
    world, rank = dist.get_world_size(), dist.get_rank()
    device = ray.train.torch.get_device()
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    torch.manual_seed(config.seed)  # the same towers on every worker

    samples: FeatureSamples | PictureSamples
    tower: FrozenTower | WholeModel
    if job["features"]:
        widths = tuple(job["widths"])
        samples = FeatureSamples(storage, job["features"], widths, config.views, architecture.max_tokens)
        tower = FrozenTower(Towers(architecture, *widths))
        if config.neighbours:
            samples.doubt(config.neighbours)
        tower.towers.fit_features(samples.pooled(tower.towers))
    else:
        model = MixerModel(architecture)
        samples = PictureSamples(storage, job["samples"], model, config.seed)
        tower = WholeModel(model)
        model.towers.fit_features(samples.pooled(model, 256))
    scale = config.scale or fixed_scale(job["classes"])
    head = ShardedMarginSoftmax(architecture.dim, job["classes"], config.margin, scale).to(device)
    head.reset(config.seed)

    rows, held_out = split_holdout(len(samples.photos), len(samples.labels), config.holdout, config.seed)
    steps_per_epoch = -(-len(rows) // config.batch_size)
    trainer = HybridTrainer(tower.to(device), head, config, config.epochs * steps_per_epoch)
    start, history = 0, []
    if state := checkpoints.latest():
        start, history = state["epoch"] + 1, state["history"]
        trainer.load_tower_state(checkpoints.read_towers(state["epoch"]), state["step"])
        trainer.load_head_state(checkpoints.read_classes(state["epoch"], head.owned), state["step"])

    for epoch in range(start, config.epochs):
        began = time.monotonic()
        plan = plan_epoch(
            len(samples.labels), config.views, epoch, config.seed, config.text_dropout, config.image_dropout
        )
        plan = EpochPlan(plan.order[np.isin(plan.order, rows)], plan.view, plan.drop_text, plan.drop_image)
        losses = [
            trainer.step(samples.batch(part, plan).to(device)) for part in plan.batches(config.batch_size, world, rank)
        ]
        metrics = {"epoch": epoch, "loss": float(np.mean(losses))}
        if len(held_out) and ((epoch + 1) % config.recall_every == 0 or epoch + 1 == config.epochs):
            metrics["held_out_r1"] = held_out_recall(trainer, samples, held_out, config.batch_size, device)
        metrics["seconds"] = round(time.monotonic() - began, 2)
        history = [*history, metrics]
        towers = trainer.tower_state()
        if rank == 0:
            checkpoints.clear(epoch)
        dist.barrier()
        checkpoints.write_classes(epoch, head.owned, trainer.head_state())
        if rank == 0:
            checkpoints.write_towers(epoch, towers)
        dist.barrier()  # nothing is visible before everybody has written
        if rank == 0:
            checkpoints.publish(epoch, {"step": trainer.step_count, "world": world, "history": history})
        ray.train.report(metrics)


def split_holdout(photos: int, samples: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to learn from and the photos held out to follow recall; photos are the first rows."""
    held_out = np.random.default_rng(seed).permutation(photos)[: int(share * photos)]
    return np.setdiff1d(np.arange(samples), held_out), np.sort(held_out)


@torch.no_grad()
def held_out_recall(
    trainer: HybridTrainer,
    samples: FeatureSamples | PictureSamples,
    held_out: np.ndarray,
    batch_size: int,
    device: torch.device,
) -> float:
    """Return how often the item nearest to a held-out photo has the photo's (weak) label.

    Every worker embeds its share and gets the same answer.
    """
    total = len(samples.labels)
    plain = EpochPlan(np.arange(total), *(np.zeros(total, kind) for kind in (int, bool, bool)))

    def embedded(rows: np.ndarray) -> torch.Tensor:
        shares = [class_range(len(rows), trainer.head.world, rank) for rank in range(trainer.head.world)]
        mine = shares[trainer.head.rank]
        parts = [rows[start : min(start + batch_size, mine.stop)] for start in range(mine.start, mine.stop, batch_size)]
        embeddings = [trainer.engine(samples.batch(part, plain).to(device)).float() for part in parts or [rows[:0]]]
        return gather_rows(torch.cat(embeddings), [len(share) for share in shares], trainer.head.group).cpu()

    items = np.arange(len(samples.photos), total)
    nearest = (embedded(held_out) @ embedded(items).T).argmax(dim=1).numpy()
    right = samples.labels[items].numpy()[nearest] == samples.labels[held_out].numpy()
    return round(float(hit_at_k(right[:, None], 1).mean()), 4)


def encoder_widths(architecture: ModelConfig) -> tuple[int, int]:
    """Return the width of a patch and of a token of the encoders that `architecture` names. Raises EncoderError."""
    text = TextEncoder(architecture.text_encoder, architecture.max_tokens)
    image = image_encoder(architecture.image_encoder)
    image.train_from(architecture.train_from_block)
    return image.width, text.width
