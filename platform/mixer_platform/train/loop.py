"""What each Ray Train worker runs: rounds of epochs of global batches, a checkpoint after each, on from the last."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mixer.config import ModelConfig
from mixer.encoders import TextEncoder, image_encoder
from mixer.metrics import hit_at_k
from mixer.sampling import EpochPlan, plan_epoch
from mixer.softmax import ShardedMarginSoftmax, class_range, fixed_scale, gather_rows
from mixer.targets import Targets, concatenate, from_belief
from mixer.towers import MixerModel, Towers
from mixer.training import FrozenTower, WholeModel
from mixer_platform.config import TrainConfig
from mixer_platform.storage import open_storage
from mixer_platform.train.checkpoints import Checkpoints
from mixer_platform.train.engine import HybridTrainer
from mixer_platform.train.features import FeatureSamples
from mixer_platform.train.pictures import PictureSamples

Samples = FeatureSamples | PictureSamples


def train_worker(job: dict[str, Any]) -> None:
    """Train one run to its last epoch. `job` holds workspace, run, samples, features (or None), classes, model, train.

    Every worker calls this at once; what differs is only its rank.
    """
    config = TrainConfig.model_validate(job["train"])
    checkpoints = Checkpoints(open_storage(job["workspace"]), job["run"])
    world, rank = dist.get_world_size(), dist.get_rank()
    device = ray.train.torch.get_device()
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())

    samples = read_samples(job, config)
    start, history = 0, []
    state = checkpoints.latest()
    if state:
        start, history = state["epoch"] + 1, state["history"]
    rows, held_out = split_holdout(samples.targets, len(samples.photos), job["classes"], config.holdout, config.seed)
    steps = config.epochs * -(-len(rows) // config.batch_size)
    current = max(start - 1, 0) // config.epochs  # the round of the last epoch that was trained, if any
    if current:
        samples.targets = checkpoints.read_targets(current)
    trainer = new_trainer(job, config, samples, steps, device)
    if state:
        trainer.load_tower_state(checkpoints.read_towers(state["epoch"]), state["step"])
        trainer.load_head_state(checkpoints.read_classes(state["epoch"], trainer.head.owned), state["step"])

    for epoch in range(start, config.rounds * config.epochs):
        began = time.monotonic()
        if epoch // config.epochs > current:
            current = epoch // config.epochs
            samples.targets = relabelled(trainer, samples, config, device)
            if rank == 0:
                checkpoints.write_targets(current, samples.targets)
            trainer = new_trainer(job, config, samples, steps, device)
        plan = plan_epoch(
            len(samples.labels), config.views, epoch, config.seed, config.text_dropout, config.image_dropout
        )
        plan = EpochPlan(plan.order[np.isin(plan.order, rows)], plan.view, plan.drop_text, plan.drop_image)
        losses = [
            trainer.step(samples.batch(part, plan).to(device)) for part in plan.batches(config.batch_size, world, rank)
        ]
        metrics = {"epoch": epoch, "loss": float(np.mean(losses))}
        if len(held_out) and ((epoch + 1) % config.recall_every == 0 or (epoch + 1) % config.epochs == 0):
            metrics["held_out_r1"] = held_out_recall(trainer, samples, held_out, config.batch_size, device)
        metrics["seconds"] = round(time.monotonic() - began, 2)
        history = [*history, metrics]
        towers = trainer.tower_state()
        if rank == 0:
            checkpoints.clear(epoch)
        dist.barrier()
        checkpoints.write_classes(epoch, trainer.head.owned, trainer.head_state())
        if rank == 0:
            checkpoints.write_towers(epoch, towers)
        dist.barrier()  # nothing is visible before everybody has written
        if rank == 0:
            checkpoints.publish(epoch, {"step": trainer.step_count, "world": world, "history": history})
        ray.train.report(metrics)


def read_samples(job: dict[str, Any], config: TrainConfig) -> Samples:
    """Return the samples of a run, as cached features if the encoder is frozen, else as pictures."""
    architecture = ModelConfig.model_validate(job["model"])
    storage = open_storage(job["workspace"])
    if not job["features"]:
        return PictureSamples(storage, job["samples"], MixerModel(architecture), config.seed)
    samples = FeatureSamples(storage, job["features"], tuple(job["widths"]), config.views, architecture.max_tokens)
    if config.neighbours:
        samples.pool_evidence(job["classes"], config.neighbours)
    return samples


def new_trainer(
    job: dict[str, Any], config: TrainConfig, samples: Samples, steps: int, device: torch.device
) -> HybridTrainer:
    """Return a trainer of an untrained model, the same on every worker."""
    architecture = ModelConfig.model_validate(job["model"])
    torch.manual_seed(config.seed)
    tower: FrozenTower | WholeModel
    if isinstance(samples, FeatureSamples):
        tower = FrozenTower(Towers(architecture, *job["widths"]))
        tower.towers.fit_features(samples.pooled(tower.towers))
    else:
        tower = WholeModel(MixerModel(architecture))
        tower.model.towers.fit_features(samples.pooled(tower.model, 256))
    scale = config.scale or fixed_scale(job["classes"])
    head = ShardedMarginSoftmax(architecture.dim, job["classes"], config.margin, scale).to(device)
    head.reset(config.seed)
    return HybridTrainer(tower.to(device), head, config, steps)


def split_holdout(
    targets: Targets, photos: int, classes: int, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to learn from and the photos held out to follow recall; photos are the first rows.

    Held out are photos of whose class the logs are surest, of a random half: recall is to tell of the model.
    """
    drawn = np.random.default_rng(seed).permutation(photos)[: photos // 2]
    sure = targets[torch.from_numpy(drawn)].confidence(classes).numpy()
    held_out = drawn[np.argsort(-sure, kind="stable")][: int(share * photos)]
    return np.setdiff1d(np.arange(len(targets)), held_out), np.sort(held_out)


def relabelled(trainer: HybridTrainer, samples: Samples, config: TrainConfig, device: torch.device) -> Targets:
    """Return the targets of the next round: for each photo, what its evidence and the trained model say together.

    A photo is seen in all its cached views. Every worker embeds its share and gets the same answer.
    """
    head, count = trainer.head, len(samples.photos)
    photos, items = np.arange(count), torch.arange(count, len(samples.labels))
    views = config.views if isinstance(samples, FeatureSamples) else 1
    seen = [embedded(trainer, samples, photos, view, config.batch_size, device) for view in range(views)]
    embeddings = F.normalize(torch.stack(seen).mean(dim=0), dim=1)
    classes, belief = [], []
    for start in range(0, count, config.batch_size):
        part = photos[start : start + config.batch_size]
        share = class_range(len(part), head.world, head.rank)
        mine = torch.from_numpy(part[share.start : share.stop])
        found = head.likeliest(embeddings[mine].to(device), samples.targets[mine].to(device), config.candidates)
        classes.append(found[0].cpu())
        belief.append(found[1].cpu())
    weights = samples.targets.weights[:count]
    believed = from_belief(torch.cat(classes), torch.cat(belief), config.least_belief, weights)
    return concatenate([believed, samples.targets[items]])


@torch.no_grad()
def held_out_recall(
    trainer: HybridTrainer, samples: Samples, held_out: np.ndarray, batch_size: int, device: torch.device
) -> float:
    """Return how often the item nearest to a held-out photo has the photo's (weak) label."""
    items = np.arange(len(samples.photos), len(samples.labels))
    queries, gallery = (embedded(trainer, samples, rows, 0, batch_size, device) for rows in (held_out, items))
    nearest = (queries @ gallery.T).argmax(dim=1).numpy()
    right = samples.labels[items].numpy()[nearest] == samples.labels[held_out].numpy()
    return round(float(hit_at_k(right[:, None], 1).mean()), 4)


@torch.no_grad()
def embedded(
    trainer: HybridTrainer, samples: Samples, rows: np.ndarray, view: int, batch_size: int, device: torch.device
) -> torch.Tensor:
    """Return the embeddings of some samples' view, [rows, dim], on every worker; each embeds its share."""
    total, head = len(samples.labels), trainer.head
    plan = EpochPlan(np.arange(total), np.full(total, view), np.zeros(total, bool), np.zeros(total, bool))
    shares = [class_range(len(rows), head.world, rank) for rank in range(head.world)]
    mine = shares[head.rank]
    parts = [rows[start : min(start + batch_size, mine.stop)] for start in range(mine.start, mine.stop, batch_size)]
    embeddings = [trainer.engine(samples.batch(part, plan).to(device)).float() for part in parts or [rows[:0]]]
    return gather_rows(torch.cat(embeddings), [len(share) for share in shares], head.group).cpu()


def encoder_widths(architecture: ModelConfig) -> tuple[int, int]:
    """Return the width of a patch and of a token of the encoders that `architecture` names. Raises EncoderError."""
    text = TextEncoder(architecture.text_encoder, architecture.max_tokens)
    image = image_encoder(architecture.image_encoder)
    image.train_from(architecture.train_from_block)
    return image.width, text.width
