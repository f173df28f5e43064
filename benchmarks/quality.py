"""How well a photo finds its item: Mixer beside what people use today, and without each of its parts.

    .venv/bin/python benchmarks/quality.py --data FOLDER [--seeds 3]

One process; the same cached features of the frozen encoder, the same towers, the same photos and the same number of
steps for every method. Prints a table (means over seeds, for R@1 a 95 % bootstrap interval over photos) and, as its
last line, one JSON object. FOLDER holds `items`, `queries`, `logs` and `val`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from mixer.embedder import ImageFeatures
from mixer.images import UnreadableImage, decode
from mixer.metrics import hit_at_k, macro, relevance
from mixer.sampling import EpochPlan, learning_rate_factor, plan_epoch
from mixer.softmax import ShardedMarginSoftmax, fixed_scale
from mixer.targets import Targets, concatenate, from_belief, pool_evidence
from mixer.towers import Towers
from mixer.training import Batch, FrozenTower
from mixer_platform import versions
from mixer_platform.cli import connect
from mixer_platform.config import RunConfig, load_config
from mixer_platform.evaluate.job import find_truth
from mixer_platform.inputs import IMAGE, REASON, find_input, read_input
from mixer_platform.prepare.job import prepare
from mixer_platform.schema import LOGS
from mixer_platform.storage import open_storage, read_uri
from mixer_platform.train.features import FeatureSamples, cache_features
from mixer_platform.train.stages import encoder_widths

CONFIG = Path(__file__).parents[1] / "jobs/configs/local.yaml"
KS = (1, 5, 10)
TEMPERATURE = 0.07  # of InfoNCE


@dataclass
class Bench:
    """Features of samples and of the photos that are asked, and what is right for each of these."""

    config: RunConfig
    samples: FeatureSamples
    classes: int
    widths: tuple[int, int]
    asked: Tensor
    relevant: list[set[str]]
    clicks: pa.Table

    @property
    def photos(self) -> int:
        return len(self.samples.photos)

    @property
    def item_ids(self) -> list[str]:
        return self.samples.ids[self.photos :]


def prepare_bench(data: str, workspace: str) -> Bench:
    """Run the product's prepare job and cache features; read the truth."""
    config = load_config(CONFIG, [f"data={data}", f"workspace={workspace}"])
    storage = open_storage(workspace)
    prepared = prepare(config)
    features = cache_features(storage, prepared["version"], config.model, config.train)
    widths = encoder_widths(config.model, config.train.fine_tune)
    samples = FeatureSamples(storage, features, widths, config.train.views, config.model.max_tokens)
    encoder = ImageFeatures(versions.fetch(storage, f"features/{features}/encoders", workspace), threads=2)
    asked, relevant = [], []
    for row in read_input(find_truth(config)).iter_rows():
        try:
            pixels = encoder.preprocess(decode(read_uri(row[IMAGE])))
        except UnreadableImage:
            continue
        asked.append(encoder(pixels[None]).mean(axis=1)[0])
        relevant.append(set(row["relevant_item_ids"]))
    logs = read_input(find_input(data, LOGS)).iter_batches(batch_size=None, batch_format="pyarrow")
    clicks = [
        batch.filter(pc.and_(pc.is_null(batch[REASON]), pc.equal(batch["event"], "click"))).select(
            ["query_id", "item_id"]
        )
        for batch in logs
    ]
    counted = pa.concat_tables(clicks).group_by(["query_id", "item_id"]).aggregate([([], "count_all")])
    return Bench(config, samples, prepared["classes"], widths, torch.from_numpy(np.array(asked)), relevant, counted)


def pairs_of_clicks(bench: Bench) -> np.ndarray:
    """Return photo row, item row and clicks of the clicked pairs that are samples, int64 [pairs, 3]."""
    photo = {key: row for row, key in enumerate(bench.samples.ids[: bench.photos])}
    item = {key: row for row, key in enumerate(bench.item_ids)}
    rows = zip(*(column.to_pylist() for column in bench.clicks.columns), strict=True)
    return np.array([(photo[q], item[i], n) for q, i, n in rows if q in photo and i in item])


def new_towers(bench: Bench, seed: int, shared: bool = False) -> Towers:
    """Return untrained towers; `shared`: one transformation for photos and items."""
    torch.manual_seed(seed)
    towers = Towers(bench.config.model, *bench.widths)
    towers.fit_features(bench.samples.pooled(towers))
    if shared:
        towers.item_transform = towers.query_transform
    return towers


def steps_of(bench: Bench, seed: int, order: Callable[[np.random.Generator], np.ndarray]) -> Any:
    """Yield each step's rows and plan, and the factor of its learning rates, for the configured epochs."""
    train = bench.config.train
    total = len(bench.samples.labels)
    steps, step = train.epochs * math.ceil(total / train.batch_size), 0
    for epoch in range(train.epochs):
        plan = plan_epoch(total, train.views, epoch, seed, train.text_dropout, train.image_dropout)
        rows = order(np.random.default_rng([seed, epoch]))
        for start in range(0, total, train.batch_size):
            yield rows[start : start + train.batch_size], plan, learning_rate_factor(step, steps, train.warmup)
            step += 1


def optimise(
    bench: Bench,
    towers: Towers,
    head: torch.nn.Module | None,
    steps: Any,
    loss_of: Callable[[np.ndarray, EpochPlan], Tensor],
) -> None:
    """AdamW on towers and classifier with the product's rates and clipping."""
    train = bench.config.train
    groups = [(towers, train.tower_lr)] + ([(head, train.classifier_lr)] if head is not None else [])
    optimizers = [
        (torch.optim.AdamW(set(module.parameters()), lr=rate, weight_decay=train.weight_decay), rate)
        for module, rate in groups
    ]
    for rows, plan, factor in steps:
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
        loss_of(rows, plan).backward()
        torch.nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()


def classify(
    bench: Bench, seed: int, targets: Targets, classes: int, rounds: int = 1, shared: bool = False, text: bool = True
) -> tuple[Towers, bool]:
    """Train by classification, as the product does, from the start in each round; `text` False: items have none."""
    towers, head = one_round(bench, seed, targets, classes, shared, text)
    for round_ in range(1, rounds):
        targets = believed(bench, towers, head, targets)
        towers, head = one_round(bench, seed + 100 * round_, targets, classes, shared, text)
    return towers, text


def one_round(
    bench: Bench, seed: int, targets: Targets, classes: int, shared: bool, text: bool
) -> tuple[Towers, ShardedMarginSoftmax]:
    train, total = bench.config.train, len(bench.samples.labels)
    towers = new_towers(bench, seed, shared)
    tower = FrozenTower(towers)
    head = ShardedMarginSoftmax(bench.config.model.dim, classes, train.margin, train.scale or fixed_scale(classes))
    head.reset(seed)

    def loss_of(rows: np.ndarray, plan: EpochPlan) -> Tensor:
        photos_first = np.concatenate([rows[rows < bench.photos], rows[rows >= bench.photos]])
        return head(tower(without_text(bench.samples.batch(rows, plan), text)), targets[torch.from_numpy(photos_first)])

    optimise(bench, towers, head, steps_of(bench, seed, lambda rng: rng.permutation(total)), loss_of)
    return towers, head


@torch.no_grad()
def believed(bench: Bench, towers: Towers, head: ShardedMarginSoftmax, targets: Targets) -> Targets:
    """Return what the evidence and a trained model say together, which the next round learns from."""
    train = bench.config.train
    photos, items = torch.arange(bench.photos), torch.arange(bench.photos, len(bench.samples.labels))
    views = [towers.query(bench.samples.photos[:, view].float()) for view in range(train.views)]
    found = head.likeliest(F.normalize(torch.stack(views).mean(dim=0), dim=1), targets[photos], train.candidates)
    return concatenate([from_belief(*found, train.least_belief, targets.weights[photos]), targets[items]])


def contrast(bench: Bench, seed: int) -> tuple[Towers, bool]:
    """InfoNCE on clicked pairs, drawn as often as they were clicked, with the other items of the batch as negatives."""
    pairs = pairs_of_clicks(bench)
    chance = pairs[:, 2] / pairs[:, 2].sum()
    towers = new_towers(bench, seed)
    tower = FrozenTower(towers)
    total = len(bench.samples.labels)

    def loss_of(rows: np.ndarray, plan: EpochPlan) -> Tensor:
        chosen = pairs[rows]
        photos, items = (tower(bench.samples.batch(part, plan)) for part in (chosen[:, 0], chosen[:, 1] + bench.photos))
        logits = photos @ items.T / TEMPERATURE
        same = torch.from_numpy(chosen[:, 1][:, None] == chosen[:, 1][None])
        logits = logits.masked_fill(same & ~torch.eye(len(rows), dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(rows)))

    optimise(bench, towers, None, steps_of(bench, seed, lambda rng: rng.choice(len(pairs), total, p=chance)), loss_of)
    return towers, True


def most_clicked(bench: Bench) -> tuple[Targets, int]:
    """Return the targets where each item is a class and each photo is of the class of its most clicked item."""
    pairs = pairs_of_clicks(bench)
    pairs = pairs[np.argsort(pairs[:, 2], kind="stable")]  # the last one written stays
    items = len(bench.item_ids)
    labels = torch.zeros(bench.photos, dtype=torch.int64)
    labels[pairs[:, 0]] = torch.from_numpy(pairs[:, 1])
    weights = torch.zeros(bench.photos)
    weights[pairs[:, 0]] = 1
    return Targets.certain(torch.cat([labels, torch.arange(items)]), torch.cat([weights, torch.ones(items)])), items


def shared_evidence(bench: Bench) -> Targets:
    """Return the product's targets after photos that look alike have shared theirs."""
    photos, items = torch.arange(bench.photos), torch.arange(bench.photos, len(bench.samples.labels))
    features = bench.samples.photos[:, 0].float()
    pooled = pool_evidence(features, bench.samples.targets[photos], bench.classes, bench.config.train.neighbours)
    return concatenate([pooled, bench.samples.targets[items]])


def likeliest_only(bench: Bench) -> Targets:
    """Return the targets in which each photo is certain of its likeliest class."""
    return Targets.certain(bench.samples.labels)


def without_text(batch: Batch, text: bool) -> Batch:
    if not text:
        batch.token_mask = torch.zeros_like(batch.token_mask)
    return batch


@torch.no_grad()
def hits_of(bench: Bench, towers: Towers, text: bool) -> np.ndarray:
    """Return bool [photos, 10]: whether the item found at each rank is right."""
    total = len(bench.samples.labels)
    plain = EpochPlan(np.arange(total), np.zeros(total, int), np.zeros(total, bool), np.zeros(total, bool))
    batch = without_text(bench.samples.batch(np.arange(bench.photos, total), plain), text)
    return ranked_hits(bench, towers.query(bench.asked), FrozenTower(towers)(batch))


@torch.no_grad()
def untrained_hits(bench: Bench) -> np.ndarray:
    """The bare encoder's features, centred: what a shop has before it learns."""
    with_image = bench.samples.has_image
    items = bench.samples.pictures[:, 0].float().mean(dim=1)
    centre = items[with_image].mean(dim=0)
    gallery = F.normalize(items - centre, dim=1) * with_image[:, None]
    return ranked_hits(bench, F.normalize(bench.asked - centre, dim=1), gallery)


def ranked_hits(bench: Bench, photos: Tensor, items: Tensor) -> np.ndarray:
    best = (photos @ items.T).topk(max(KS), dim=1).indices.tolist()
    return relevance([[bench.item_ids[row] for row in rows] for rows in best], bench.relevant)


def figures_of(bench: Bench, runs: list[np.ndarray], seconds: float) -> dict[str, Any]:
    """Return the means over seeds, and the interval of R@1 over resampled photos."""
    figures: dict[str, Any] = {f"r{k}": float(np.mean([hit_at_k(hits, k).mean() for hits in runs])) for k in KS}
    figures["macro_r1"] = float(np.mean([macro(hit_at_k(hits, 1), bench.relevant) for hits in runs]))
    right = np.mean([hits[:, 0] for hits in runs], axis=0)
    drawn = np.random.default_rng(0).integers(len(right), size=(2000, len(right)))
    figures["r1_interval"] = np.percentile(right[drawn].mean(axis=1), [2.5, 97.5]).round(4).tolist()
    figures["r1_seeds"] = [round(float(hits[:, 0].mean()), 4) for hits in runs]
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()} | {
        "seconds": round(seconds, 1)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with items, queries, logs and val")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workspace", help="where samples and features go; default: a temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    connect()
    with tempfile.TemporaryDirectory() as scratch:
        bench = prepare_bench(str(Path(arguments.data).resolve()), arguments.workspace or scratch)
    shared, classes = shared_evidence(bench), bench.classes
    methods: dict[str, Callable[[int], tuple[Towers, bool]]] = {
        "infonce": lambda seed: contrast(bench, seed),
        "arcface": lambda seed: classify(bench, seed, *most_clicked(bench)),
        "mixer": lambda seed: classify(bench, seed, shared, classes, rounds=bench.config.train.rounds),
        "mixer_two_rounds": lambda seed: classify(bench, seed, shared, classes, rounds=2),
        "mixer_alone": lambda seed: classify(bench, seed, bench.samples.targets, classes),
        "mixer_certain": lambda seed: classify(bench, seed, likeliest_only(bench), classes),
        "mixer_one_transformation": lambda seed: classify(bench, seed, shared, classes, shared=True),
        "mixer_no_text": lambda seed: classify(bench, seed, shared, classes, text=False),
    }
    said = {
        "zero_shot": "no training",
        "infonce": "InfoNCE on clicked pairs",
        "arcface": "margin softmax, class = most clicked item",
        "mixer": "Mixer",
        "mixer_two_rounds": "  two rounds",
        "mixer_alone": "  photos share no evidence",
        "mixer_certain": "  certain of the likeliest class",
        "mixer_one_transformation": "  one transformation for both",
        "mixer_no_text": "  no text",
    }
    results = {"zero_shot": figures_of(bench, [untrained_hits(bench)], 0.0)}
    for name, method in methods.items():
        runs, began = [], time.monotonic()
        for seed in range(arguments.seeds):
            towers, text = method(seed)
            runs.append(hits_of(bench, towers, text))
        results[name] = figures_of(bench, runs, (time.monotonic() - began) / arguments.seeds)
    print(f"\n{'':44}{'R@1':>7}{'95 %':>16}{'R@5':>8}{'R@10':>8}{'macro':>8}{'s':>7}")
    for name, figures in results.items():
        low, high = figures["r1_interval"]
        row = "".join(f"{figures[key]:8.3f}" for key in ("r5", "r10", "macro_r1"))
        print(f"{said[name]:44}{figures['r1']:7.3f}{f'{low:.3f} to {high:.3f}':>16}{row}{figures['seconds']:7.1f}")
    report: dict[str, Any] = {
        **results,
        "photos": len(bench.relevant),
        "items": len(bench.item_ids),
        "classes": classes,
        "seeds": arguments.seeds,
        "commit": versions.commit(os.path.dirname(__file__)),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
