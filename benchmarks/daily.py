"""What it is worth to go on from yesterday's model (train.start) as items come and classes change.

    .venv/bin/python benchmarks/daily.py --data FOLDER [--seeds 3] [--epochs 1,5,15]

A model learns from the first 70 % of the logs and 80 % of the items of FOLDER (Parquet, as in quality.py). Then all of
it is prepared anew, and each number of epochs is trained twice: from an untrained model, and going on. Both are asked
the photos of val over all items. Prints a table (means over seeds, 95 % bootstrap intervals over photos) and, as its
last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from quality import CONFIG, interval, published_hits, read_logs

from mixer_platform import versions
from mixer_platform.cli import connect
from mixer_platform.config import RunConfig, load_config
from mixer_platform.inputs import unmarked
from mixer_platform.prepare.job import prepare
from mixer_platform.train.job import train

LOGGED, LISTED = 0.7, 0.8  # shares of what there is in all that the earlier model learns from


def write_first_days(data: Path, folder: Path) -> None:
    """Write what there was of the logs and items before; everything else is linked."""
    folder.mkdir()
    items, logs = pq.read_table(data / "items.parquet"), unmarked(read_logs(str(data)))
    for path in data.iterdir():
        if path.name != "items.parquet" and not path.name.startswith("logs"):
            (folder / path.name).symlink_to(path)
    listed = items.take(pa.array(np.sort(np.random.default_rng(0).permutation(len(items))[: int(LISTED * len(items))])))
    times = logs["timestamp_ms"].to_numpy()
    early = pc.less_equal(logs["timestamp_ms"], int(np.quantile(times, LOGGED)))
    known = pc.is_in(logs["item_id"], listed["item_id"].combine_chunks())
    pq.write_table(listed, folder / "items.parquet")
    pq.write_table(logs.filter(pc.and_(early, known)), folder / "logs.parquet")


def configured(data: Path, workspace: Path, seed: int, *overrides: str) -> RunConfig:
    settings = [f"data={data}", f"workspace={workspace}", f"train.seed={seed}", "train.holdout=0", *overrides]
    return load_config(CONFIG, settings)


def compare(data: Path, workspace: Path, seeds: int, epochs: list[int]) -> dict[str, Any]:
    """Return hits [seeds, photos] and seconds by how it was trained, and how many classes went on."""
    hits: dict[str, list[np.ndarray]] = {}
    seconds: dict[str, list[float]] = {}
    kept, classes = [], []
    item_ids = pq.read_table(data / "items.parquet")["item_id"].to_pylist()
    before = workspace / "before"
    write_first_days(data, before)
    earlier, everything = (prepare(configured(each, workspace, 0))["version"] for each in (before, data))
    for seed in range(seeds):
        first = train(configured(before, workspace, seed, f"train.samples={earlier}"))

        def learned(name: str, *overrides: str, seed: int = seed) -> dict[str, Any]:
            config = configured(data, workspace, seed, f"train.samples={everything}", *overrides)
            model = train(config)
            hits.setdefault(name, []).append(published_hits(config, model["version"], item_ids)[:, 0])
            seconds.setdefault(name, []).append(model["seconds"] - model["seconds_features"])
            return model

        for count in epochs:
            learned(f"untrained_{count}", f"train.epochs={count}")
            went_on = learned(f"going_on_{count}", f"train.epochs={count}", f"train.start={first['version']}")
        kept.append(went_on["kept_classes"])
        classes.append(went_on["classes"])
        hits.setdefault("before", []).append(
            published_hits(configured(data, workspace, seed), first["version"], item_ids)[:, 0]
        )
    figures: dict[str, Any] = {"kept_classes": float(np.mean(kept)), "classes": float(np.mean(classes))}
    for name, runs in hits.items():
        right = np.mean(runs, axis=0)
        figures[name] = {"r1": round(float(right.mean()), 4), "r1_interval": interval(right)}
        if name in seconds:
            figures[name]["seconds"] = round(float(np.mean(seconds[name])), 1)
    return figures


def show(label: str, figures: dict[str, Any]) -> None:
    low, high = figures["r1_interval"]
    print(f"{label:40}{figures['r1']:7.3f}{f'{low:.3f} to {high:.3f}':>18}{figures.get('seconds', 0):8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with items, queries, logs and val")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", default="1,5,15", metavar="N,N")
    arguments = parser.parse_args()
    epochs = [int(count) for count in arguments.epochs.split(",")]
    connect()
    with tempfile.TemporaryDirectory() as scratch:
        figures = compare(arguments.data.resolve(), Path(scratch), arguments.seeds, epochs)
    print(f"\n{figures['kept_classes']:.0f} of {figures['classes']:.0f} classes go on")
    print(f"{'':40}{'R@1':>7}{'95 %':>18}{'s':>8}")
    show("the earlier model", figures["before"])
    for count in epochs:
        show(f"{count} epochs, from an untrained model", figures[f"untrained_{count}"])
        show(f"{count} epochs, going on", figures[f"going_on_{count}"])
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    commit = versions.commit(os.path.dirname(__file__))
    print(json.dumps({**figures, "seeds": arguments.seeds, "commit": commit, "machine": machine}))


if __name__ == "__main__":
    main()
