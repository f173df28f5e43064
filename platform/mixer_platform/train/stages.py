"""The stages of a run: rounds over cached features of the frozen encoder, then fine-tuning over pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mixer.config import ModelConfig
from mixer.encoders import TextEncoder, digest, image_encoder
from mixer.sampling import EpochPlan
from mixer.softmax import ShardedMarginSoftmax, class_range, fixed_scale, gather_rows
from mixer.targets import Targets, concatenate, from_belief
from mixer.towers import MixerModel, Towers
from mixer.training import FrozenTower, WholeModel
from mixer_platform.config import FineTuneConfig, TrainConfig
from mixer_platform.errors import ConfigError
from mixer_platform.patience import patiently
from mixer_platform.storage import open_storage
from mixer_platform.train.checkpoints import Checkpoints
from mixer_platform.train.engine import HybridTrainer
from mixer_platform.train.features import FeatureSamples
from mixer_platform.train.feeding import Samples
from mixer_platform.train.pictures import PictureSamples
from mixer_platform.train.start import NEW, read_rows, starting_model, sums_by_class

_GATHERED = 65_536  # embeddings


def stages_of(config: TrainConfig) -> list[TrainConfig]:
    """Return the settings of each stage: the rounds over cached features, then fine-tuning, if there is any."""
    tuning = config.fine_tune
    rates = {"tower_lr": tuning.tower_lr, "classifier_lr": tuning.classifier_lr}
    tuned = config.model_copy(update={"epochs": tuning.epochs, "batch_size": tuning.batch_size, **rates})
    return [config] * config.rounds + [tuned] * (tuning.epochs > 0)


def stage_of(config: TrainConfig, epoch: int) -> int:
    """Return which of `stages_of` an epoch belongs to; the last may have any number of epochs."""
    return min(epoch // config.epochs, len(stages_of(config)) - 1)


def read_samples(job: dict[str, Any], config: TrainConfig, stage: int) -> tuple[Samples, np.ndarray, np.ndarray]:
    """Return the samples of a run as its stage learns from them, with the targets of the logs, and `split_holdout` of
    them: as pictures where it fine-tunes, else as cached features of the frozen encoder.

    In the first stage photos share their evidence; those that are held out lend nobody theirs, and have that of nobody.
    """
    samples: Samples
    if stage == config.rounds:
        samples = read_pictures(job)
    else:
        architecture = ModelConfig.model_validate(job["model"])
        storage, widths = patiently(open_storage)(job["workspace"]), tuple(job["widths"])
        samples = patiently(FeatureSamples)(storage, job["features"], widths, config.views, architecture.max_tokens)
    split = split_holdout(samples.targets, len(samples.photos), job["classes"], config.holdout, config.seed)
    if isinstance(samples, FeatureSamples) and config.neighbours and not stage:
        samples.pool_evidence(job["classes"], config.neighbours, split[1])
    return samples, *split


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


def read_pictures(job: dict[str, Any]) -> PictureSamples:
    """Return the samples of a run as pictures, with the targets of the logs."""
    architecture = ModelConfig.model_validate(job["model"])
    config, model = TrainConfig.model_validate(job["train"]), MixerModel(architecture)
    preprocess, tokenizer = model.image_encoder.preprocess, model.text_encoder.tokenizer
    source = (job["workspace"], job["samples"], preprocess, tokenizer, config.seed)
    return patiently(PictureSamples)(*source, threads=int(config.cpus_per_worker))


def next_stage(
    job: dict[str, Any], stage: int, samples: Samples, rows: np.ndarray, trainer: HybridTrainer, device: torch.device
) -> tuple[Samples, HybridTrainer]:
    """Return what a stage but the first learns from, `rows` of the samples, and its trainer, given those of the stage
    before.

    A round begins with the model that the run started from and with the targets that the trained one believes;
    fine-tuning goes on with the model and the targets that it finds.
    """
    config = TrainConfig.model_validate(job["train"])
    settings = stages_of(config)[stage]
    if stage == config.rounds:
        pictures = read_pictures(job)
        pictures.targets = samples.targets
        return pictures, new_trainer(job, settings, pictures, len(rows), device, trainer)
    samples.targets = relabelled(trainer, samples, config, device)
    trainer.release()
    trainer = new_trainer(job, settings, samples, len(rows), device)
    start_classes(job, trainer, samples, rows, device)
    return samples, trainer


def multiplies_in_bf16(device: torch.device) -> bool:
    """Say whether bf16 saves time on a device; a CPU that does not know it takes ten times as long as in fp32."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def new_trainer(
    job: dict[str, Any],
    config: TrainConfig,
    samples: Samples,
    rows: int,
    device: torch.device,
    before: HybridTrainer | None = None,
) -> HybridTrainer:
    """Return a trainer of a stage over `rows` samples, the same on every worker.

    The model is the one that the run starts from, or what the trainer `before`, which this ends, has made of it.
    """
    architecture, storage = ModelConfig.model_validate(job["model"]), patiently(open_storage)(job["workspace"])
    torch.manual_seed(config.seed)
    tower: FrozenTower | WholeModel
    if isinstance(samples, PictureSamples):
        model = patiently(starting_model)(storage, config.start, architecture)
        model.image_encoder.train_from(config.fine_tune.from_block)
        if config.fine_tune.checkpoint_activations:
            model.image_encoder.checkpoint_activations()
        tower = WholeModel(model)
    elif config.start:
        tower = FrozenTower(patiently(starting_model)(storage, config.start, architecture).towers)
    else:
        tower = FrozenTower(Towers(architecture, *job["widths"]))
        tower.towers.initialise(samples.pooled(tower.towers))
    weight = None
    if before is not None:
        unknown = tower.load_state_dict(before.trained_state(), strict=False).unexpected_keys
        assert not unknown, unknown  # what it lacks was not trained
        weight = before.release()
    scale = config.scale or fixed_scale(job["classes"])
    head = ShardedMarginSoftmax(
        architecture.dim,
        job["classes"],
        config.margin,
        scale,
        rate=config.class_rate,
        unbiased=config.class_rate_unbiased,
        nearest=config.nearest_classes,
        nearest_every=config.nearest_every,
        precision=config.precision,
    ).to(device)
    head.reset(config.seed)
    if weight is not None:
        head.weight.copy_(weight)
        del weight  # before moments are made
    return HybridTrainer(tower.to(device), head, config, config.epochs * -(-rows // config.batch_size))


@torch.no_grad()
def start_classes(
    job: dict[str, Any], trainer: HybridTrainer, samples: Samples, rows: np.ndarray, device: torch.device
) -> None:
    """Give the classes that are kept their rows of the model that the run starts from, if it does from one, and the new
    ones the mean of their samples among `rows`, as that model embeds them. A collective call."""
    config, head, storage = trainer.config, trainer.head, patiently(open_storage)(job["workspace"])
    if not config.start:
        return
    kept = Checkpoints(storage, job["run"]).read_kept()
    owned = slice(head.owned.start, head.owned.stop)
    weight = patiently(read_rows)(storage, str(config.start), kept[owned])
    new = np.flatnonzero(kept == NEW)
    mine = new[(new >= owned.start) & (new < owned.stop)]
    theirs = rows[np.isin(samples.labels[rows].numpy(), new)]
    sums = torch.zeros(len(mine), weight.shape[1])
    for start in range(0, len(theirs), _GATHERED):  # every worker sees all of them, so not at once
        part = theirs[start : start + _GATHERED]
        embeddings = embedded(trainer, samples, part, 0, config.batch_size, device)
        sums += sums_by_class(embeddings, samples.labels[part], mine)
    weight[mine - owned.start] = F.normalize(sums, dim=1)
    head.weight.copy_(weight)


def relabelled(trainer: HybridTrainer, samples: Samples, config: TrainConfig, device: torch.device) -> Targets:
    """Return the targets of the next round: for each photo, what its evidence and the trained model say together.

    A photo is seen in `views` views. Every worker embeds its share and gets the same answer.
    """
    head, count = trainer.head, len(samples.photos)
    photos, items = np.arange(count), torch.arange(count, len(samples.labels))
    seen = [embedded(trainer, samples, photos, view, config.batch_size, device) for view in range(config.views)]
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
    believed = from_belief(torch.cat(classes), torch.cat(belief), config.least_belief, weights, head.classes)
    return concatenate([believed, samples.targets[items]])


@torch.no_grad()
def embedded(
    trainer: HybridTrainer, samples: Samples, rows: np.ndarray, view: int, batch_size: int, device: torch.device
) -> torch.Tensor:
    """Return the embeddings of some samples' view, [rows, dim], on every worker; each embeds its share."""
    total, head = len(samples.labels), trainer.head
    plan = EpochPlan(np.arange(total), np.full(total, view), np.zeros(total, bool), np.zeros(total, bool))
    shares = [class_range(len(rows), head.world, rank) for rank in range(head.world)]
    mine = rows[shares[head.rank].start : shares[head.rank].stop]
    share = -(-batch_size // head.world)  # no more at a time than a step has
    size = min(share, trainer.config.micro_batch or share)
    # Every worker asks as often as the one with most: with ZeRO 3, embedding is a collective call.
    parts = [mine[start : start + size] for start in range(0, max(1, *map(len, shares)), size)]
    embeddings = [trainer.engine(samples.batch(part, plan).to(device)).float() for part in parts]
    return gather_rows(torch.cat(embeddings), [len(share) for share in shares], head.group).cpu()


def read_encoders(architecture: ModelConfig, tuning: FineTuneConfig) -> tuple[tuple[int, int], list[str]]:
    """Return the width of a patch and of a token of the encoders that `architecture` names, and digests of both.

    Raises EncoderError, and ConfigError if the encoder lacks the block that fine-tuning begins at.
    """
    text = TextEncoder(architecture.text_encoder, architecture.max_tokens)
    image = image_encoder(architecture.image_encoder)
    if tuning.epochs and tuning.from_block >= len(image.blocks):
        has = f"the image encoder has blocks 0 to {len(image.blocks) - 1}"
        raise ConfigError(f"train.fine_tune.from_block {tuning.from_block}: {has}")
    return (image.width, text.width), [digest(image), digest(text)]
