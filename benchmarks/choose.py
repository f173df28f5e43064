"""Which settings the logs themselves would choose: cross-validation over the photos that people asked with.

    .venv/bin/python benchmarks/choose.py --data FOLDER [--folds 3] [--seeds 1] [--settings train.margin=0.2 ...]

FOLDER as in quality.py; of `val` nothing is used to choose. A fold's photos are not learned from and lend nobody their
evidence. Those of whose class their own logs are sure then ask all items, and have found theirs if the first is of that
class. A setting is chosen over the configuration's if the 95 % bootstrap interval of what it finds more of the same
photos, drawn by class, is above 0; among several, the one that finds most. Prints a table, which says last what the
settings reach on `val`, and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning import Bench, Classification, shared_evidence
from quality import CONFIG, cosines, hits_of, interval, prepare_bench

from mixer.targets import Targets, concatenate, pool_evidence
from mixer_platform import versions
from mixer_platform.cli import connect
from mixer_platform.config import load_config

SURE = 0.9  # probability of its likeliest class from which a held-out photo judges
READ = (  # by the learning here, which begins from samples and features that are made once
    *(f"model.{name}" for name in ("dim", "concepts", "concept_dim", "heads")),
    *(f"train.{name}" for name in ("margin", "scale", "neighbours", "rounds", "candidates", "least_belief")),
    *(f"train.{name}" for name in ("interpolation", "branch_weight", "text_dropout", "image_dropout", "epochs")),
    *(f"train.{name}" for name in ("warmup", "batch_size", "tower_lr", "classifier_lr", "weight_decay")),
)
SETTINGS = (
    "train.margin=0.1",
    "train.margin=0.2",
    "train.margin=0.4",
    "train.scale=10",
    "train.scale=20",
    "train.neighbours=0",
    "train.neighbours=5",
    "train.neighbours=20",
    "train.rounds=2",
    "train.epochs=10",
    "train.epochs=40",
    "train.tower_lr=0.0005",
    "train.tower_lr=0.002",
    "train.classifier_lr=0.005",
    "train.classifier_lr=0.02",
    "train.weight_decay=0.01",
    "train.interpolation=0.6",
    "train.interpolation=1",
    "train.branch_weight=0",
    "train.branch_weight=0.3",
    "train.text_dropout=0",
    "train.text_dropout=0.4",
    "train.image_dropout=0",
)


def with_setting(bench: Bench, setting: str) -> Bench:
    """Return the bench with a setting changed, or several that a comma joins."""
    for key in (each.partition("=")[0] for each in setting.split(",")):
        if key not in READ:
            raise SystemExit(f"--settings: {key} makes no difference here; these do: {', '.join(READ)}")
    overrides = [f"data={bench.config.data}", f"workspace={bench.config.workspace}", *setting.split(",")]
    return replace(bench, config=load_config(CONFIG, overrides))


def evidence_without(bench: Bench, held_out: np.ndarray) -> Targets:
    """Return the targets of all samples; photos that are not held out have shared their evidence among themselves."""
    kept = torch.from_numpy(np.setdiff1d(np.arange(bench.photos), held_out))
    rest = torch.from_numpy(np.concatenate([held_out, np.arange(bench.photos, len(bench.everything))]))
    features, own = bench.samples.photos[kept, 0].float(), bench.samples.targets
    pooled = pool_evidence(features, own[kept], bench.classes, bench.config.train.neighbours)
    return concatenate([pooled, own[rest]])[torch.cat([kept, rest]).argsort()]


def found_in_logs(bench: Bench, folds: int, seed: int) -> np.ndarray:
    """Return whether each photo, held out, found an item of its class first, [photos]; nan where logs are not sure."""
    labels = bench.samples.labels
    sure = bench.samples.targets[torch.arange(bench.photos)].confidence(bench.classes).numpy() >= SURE
    found = np.full(bench.photos, np.nan)
    for held_out in np.array_split(np.random.default_rng(seed).permutation(bench.photos), folds):
        method = Classification(evidence_without(bench, held_out), bench.classes, rounds=bench.config.train.rounds)
        towers = method(bench, seed, without=held_out)
        judges = torch.from_numpy(held_out[sure[held_out]])
        asked = replace(bench, asked=bench.samples.photos[judges, 0].float())
        nearest = bench.photos + cosines(asked, towers).argmax(dim=1)
        found[judges] = (labels[nearest] == labels[judges]).numpy()
    return found


def found_on_val(bench: Bench, seed: int) -> float:
    towers = Classification(shared_evidence(bench), bench.classes, rounds=bench.config.train.rounds)(bench, seed)
    return float(hits_of(bench.item_ids, bench.relevant, cosines(bench, towers))[:, 0].mean())


def choose(bench: Bench, settings: list[str], folds: int, seeds: int) -> dict[str, Any]:
    """Print a row for each setting and return the figures, and the setting chosen; "" is the configuration."""
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'':52}{'R@1, held-out photos':>22}{'over the configuration':>32}{'val':>8}")
    base: np.ndarray | None = None
    for setting in ("", *settings):
        changed = with_setting(bench, setting) if setting else bench
        found = np.mean([found_in_logs(changed, folds, seed) for seed in range(seeds)], axis=0)
        base = found if base is None else base
        more = found - base
        rows[setting] = {
            "r1": round(float(np.nanmean(found)), 4),
            "more": round(float(np.nanmean(more)), 4),
            "more_interval": interval(more, bench.samples.labels[: bench.photos].numpy()),
            "val_r1": round(float(np.mean([found_on_val(changed, seed) for seed in range(seeds)])), 4),
        }
        row, (least, most) = rows[setting], rows[setting]["more_interval"]
        beside = f"{row['more']:+.4f} ({least:+.4f} to {most:+.4f})" if setting else ""
        print(f"{setting or 'as configured':52}{row['r1']:22.4f}{beside:>32}{row['val_r1']:8.3f}", flush=True)
    better = [setting for setting, row in rows.items() if row["more_interval"][0] > 0]
    judges = int((~np.isnan(base)).sum()) if base is not None else 0
    return {"chosen": max(better, key=lambda setting: rows[setting]["r1"], default=""), "judges": judges, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with items, queries, logs and val")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="KEY=VALUE[,KEY=VALUE]")
    parser.add_argument("--workspace", help="where samples and features go; default: a temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    connect()
    with tempfile.TemporaryDirectory() as scratch:
        bench = prepare_bench(str(Path(arguments.data).resolve()), arguments.workspace or scratch)
        report = choose(bench, arguments.settings, arguments.folds, arguments.seeds)
    print(f"chosen: {report['chosen'] or 'the configuration as it is'}")
    report |= {
        "photos": bench.photos,
        "commit": versions.commit(os.path.dirname(__file__)),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
