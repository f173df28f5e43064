"""What the platform costs: an epoch of the product's trainer beside a bare loop over the same model and batches.

    .venv/bin/python benchmarks/training.py --data FOLDER [--epochs 12] [--turns 2]

The bare loop has the same towers, classifier, optimizers and number of threads in one process that keeps what it frees,
as the trainer's workers do, and its batches wait in memory; the trainer is the train job with one worker: Ray Train,
DeepSpeed, batches made anew, a checkpoint an epoch. Seconds are the median of the epochs but the first. Fine-tuning
takes minutes an epoch, in which machines drift, so the two take turns: the bare loop over pictures decoded before, the
trainer's second of two epochs, for its first makes the model, and so on; each of the trainer's is compared with the
mean of the bare ones before and after it. The same trainer with two workers of one thread tells what a second one
brings. Prints a table and, as its last line, one JSON object. FOLDER as in quality.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from learning import Bench, shared_evidence
from quality import CONFIG, prepare_bench
from torch import nn

from mixer.row_adam import RowAdam
from mixer.sampling import plan_epoch
from mixer.softmax import ShardedMarginSoftmax, fixed_scale
from mixer.towers import MixerModel, Towers
from mixer.training import Batch, FrozenTower, WholeModel
from mixer_platform import versions
from mixer_platform.cli import connect
from mixer_platform.config import TrainConfig, load_config
from mixer_platform.storage import open_storage
from mixer_platform.train.job import KEEP_FREED_MEMORY, train
from mixer_platform.train.pictures import PictureSamples


def trained(bench: Bench, workers: int, epochs: int, fine_tune: int, precision: str) -> list[float]:
    """Run the train job; return the seconds of each epoch."""
    overrides = {
        "train.epochs": epochs + workers,  # or the run before would be taken for this one
        "train.fine_tune.epochs": fine_tune,
        "train.precision": precision,
        "train.workers": workers,
        "train.cpus_per_worker": 0.5,  # of what Ray gives out; a worker has one thread
        "train.holdout": 0,
    }
    paths = [f"data={bench.config.data}", f"workspace={bench.config.workspace}"]
    report = train(load_config(CONFIG, paths + [f"{key}={value}" for key, value in overrides.items()]))
    return [entry["seconds"] for entry in report["history"]]


def bare_epoch(tower: nn.Module, head: ShardedMarginSoftmax, config: TrainConfig, batches: list[Batch]) -> float:
    """Return the seconds of an epoch without anything around it."""
    optimizer = torch.optim.AdamW(tower.parameters(), lr=config.tower_lr, weight_decay=config.weight_decay)
    weight = config.branch_weight
    began = time.perf_counter()
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            embeddings = tower(batch, branches=weight > 0)
        head(embeddings.float(), batch.targets_by_branch(weight) if weight else batch.targets).backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
    return time.perf_counter() - began


def new_head(bench: Bench, config: TrainConfig) -> ShardedMarginSoftmax:
    scale = config.scale or fixed_scale(bench.classes)
    head = ShardedMarginSoftmax(bench.config.model.dim, bench.classes, config.margin, scale, precision=config.precision)
    head.reset(0)
    head.optimizer = RowAdam(head.weight, config.classifier_lr, config.weight_decay)
    return head


def frozen_seconds(bench: Bench, epochs: int) -> float:
    """Return the median epoch of the bare loop over cached features."""
    config = bench.config.train
    bench.samples.targets = shared_evidence(bench)
    towers = Towers(bench.config.model, *bench.widths)
    towers.initialise(bench.samples.pooled(towers))
    tower, head, seconds = FrozenTower(towers), new_head(bench, config), []
    for epoch in range(epochs):
        plan = plan_epoch(len(bench.everything), config.views, epoch, 0, config.text_dropout, config.image_dropout)
        batches = [bench.samples.batch(part, plan) for part in plan.batches(config.batch_size, 1, 0)]
        seconds.append(bare_epoch(tower, head, config, batches))
    return statistics.median(seconds[1:])


def bare_fine_tuning(bench: Bench) -> Callable[[], float]:
    """Return an epoch of the bare loop over pictures decoded before, with the image encoder's last blocks."""
    tuning = bench.config.train.fine_tune
    config = bench.config.train.model_copy(update={"precision": "bf16", "batch_size": tuning.batch_size})
    model = MixerModel(bench.config.model)
    model.image_encoder.train_from(tuning.from_block)
    storage = open_storage(bench.config.workspace)
    version = versions.require(storage, "samples", "latest")["version"]
    preprocess, tokenizer = model.image_encoder.preprocess, model.text_encoder.tokenizer
    pictures = PictureSamples(bench.config.workspace, version, preprocess, tokenizer, 0)
    pictures.targets = bench.samples.targets
    plan = plan_epoch(len(pictures.labels), pictures.views, 0, 0, config.text_dropout, config.image_dropout)
    batches = [pictures.batch(part, plan) for part in plan.batches(config.batch_size, 1, 0)]
    epoch = partial(bare_epoch, WholeModel(model), new_head(bench, config), config)
    epoch(batches[:3])  # the trainer's first steps are not counted either
    return partial(epoch, batches)


def fine_tuning_in_turns(bench: Bench, epochs: int, turns: int) -> dict[str, float]:
    """Return the mean seconds of an epoch and the mean ratio of the trainer's to the bare ones around it."""
    bare_epoch_again = bare_fine_tuning(bench)
    bare, trainer = [bare_epoch_again()], []
    for turn in range(turns):
        trainer.append(trained(bench, 1, epochs + turn, 2, "bf16")[-1])
        bare.append(bare_epoch_again())
        print(f"turn {turn}: bare {bare[-2]:.1f} s, trainer {trainer[-1]:.1f} s, bare {bare[-1]:.1f} s", flush=True)
    ratios = [mine / statistics.mean(around) for mine, around in zip(trainer, pairwise(bare), strict=True)]
    return {
        "tuned_bare": statistics.mean(bare),
        "tuned_trainer": statistics.mean(trainer),
        "trainer_over_bare_fine_tuning": statistics.mean(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--turns", type=int, default=2, help="of fine-tuning; 0: leave it out")
    parser.add_argument("--workspace", help="where samples and features go; default: a temporary folder")
    arguments = parser.parse_args()
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})
    torch.set_num_threads(1)
    connect()
    with tempfile.TemporaryDirectory() as scratch:
        bench = prepare_bench(os.path.abspath(arguments.data), os.path.abspath(arguments.workspace or scratch))
        found = {"frozen_bare": frozen_seconds(bench, arguments.epochs)}
        for workers, name in ((1, "frozen_trainer"), (2, "frozen_trainer_2")):
            seconds = trained(bench, workers, arguments.epochs, 0, "fp32")
            found[name] = statistics.median(seconds[1:])
        tuning = fine_tuning_in_turns(bench, arguments.epochs, arguments.turns) if arguments.turns else {}
    ratios = {"trainer_over_bare": found["frozen_trainer"] / found["frozen_bare"]}
    ratios["speedup_2_workers"] = found["frozen_trainer"] / found["frozen_trainer_2"]
    found |= tuning
    for name, value in found.items():
        unit = "" if "over" in name else f"s an epoch of {len(bench.everything):,} samples"
        print(f"{name:30}{value:10.2f} {unit}")
    report: dict[str, Any] = {name: round(value, 3) for name, value in {**found, **ratios}.items()}
    report |= {"commit": versions.commit(os.path.dirname(__file__))}
    print(json.dumps({**report, "machine": f"{os.cpu_count()} cores, {platform.machine()}"}))


if __name__ == "__main__":
    main()
