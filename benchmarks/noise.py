"""How much wrong clicks cost: a marketplace with more and more of them.

    .venv/bin/python benchmarks/noise.py [--things 800] [--seeds 3] [--levels 0 0.2 0.4 0.6] [--rows ROW...]
    .venv/bin/python benchmarks/noise.py --data FOLDER [--wrong 0.42] [--seeds 3] [--levels 0.42 0.5 0.6]

The first simulates the project's own marketplace again and again: things, pictures, demand and the engine stay the
same, the share of people's clicks that are on wrong items changes. The second takes a marketplace as it is, of whose
clicks a share --wrong is known to be wrong, and moves clicks to another item that was seen on the same page, with the
dwell time of the simulator's wrong clicks and without what was bought after them, until the wished share is wrong.

The same methods as in quality.py learn from each set of logs, with its configuration. Prints a table with 95 %
bootstrap intervals, as quality.py has them, of R@1 and, over things, of how many more of the same photos Mixer finds;
and, as its last line, one JSON object. Where the simulator knows the truth, label quality is held against it: how many
photos are samples at all, how many of these have the class of the thing that they show as their likeliest, and how many
items share a class with another thing; and Mixer learns from the true classes of these photos too.
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
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from learning import Bench, Classification, arcface, infonce, shared_evidence
from quality import (
    Method,
    cosines,
    figures_of,
    hits_of,
    interval,
    prepare_bench,
    read_logs,
    things_of,
    write_marketplace,
)

from mixer.targets import Targets
from mixer_platform import versions
from mixer_platform.cli import connect
from mixer_platform.config import load_config
from mixer_platform.simulate.config import ClickConfig
from mixer_platform.simulate.job import drawings_beside, simulate

METHODS = ("mixer", "infonce", "arcface", "sampled", "true_classes")
PHOTOS = 6500  # new ones: four of each of all things
DEMO = Path(__file__).parents[1] / "jobs/configs/demo.yaml"


def marketplace(folder: Path, level: float, things: int | None) -> tuple[str, float]:
    """Simulate a marketplace; return its folder and the share of people's clicks that are on wrong items."""
    overrides = [f"simulate.clicks.click_noise={level}", f"simulate.max_things={things or 'null'}"]
    overrides.append(f"simulate.val_photos={PHOTOS}")
    config = load_config(DEMO, overrides)
    data = folder / f"noise-{level}"
    report = simulate(config.simulate, data, drawings_beside(data))
    return str(data), report["logs"]["clicks_on_wrong_items_by_people"]


def moved_clicks(data: str, folder: Path, share: float) -> tuple[str, float]:
    """Write the marketplace `data` once more, a share of its clicks moved; return the new folder and what was moved."""
    logs, moved = with_moved_clicks(read_logs(data), share, np.random.default_rng(0))
    return write_marketplace(data, folder, logs), moved


def with_moved_clicks(logs: pa.Table, share: float, rng: np.random.Generator) -> tuple[pa.Table, float]:
    """Move a share of the clicks to another item that the same session saw for the same photo, if there is one.

    Return the logs and the share that was moved.
    """
    pages = pc.binary_join_element_wise(logs["session_id"], logs["query_id"], " ")
    session = pc.dictionary_encode(pc.fill_null(pages, "")).combine_chunks().indices.to_numpy(zero_copy_only=False)
    item = pc.dictionary_encode(logs["item_id"]).combine_chunks().indices.to_numpy(zero_copy_only=False)
    event = np.array(logs["event"].to_pylist(), object)
    seen = np.flatnonzero(event == "impression")
    seen = seen[np.argsort(session[seen], kind="stable")]
    clicks = np.flatnonzero(event == "click")
    count = len(clicks)
    clicks = clicks[rng.random(len(clicks)) < share]
    first, last = (np.searchsorted(session[seen], session[clicks], side) for side in ("left", "right"))
    clicks, first, last = (part[last > first] for part in (clicks, first, last))
    place = (rng.random(len(first)) * (last - first)).astype(int)
    itself = item[seen[first + place]] == item[clicks]
    target = seen[first + np.where(itself, (place + 1) % (last - first), place)]
    clicks, target = (part[item[target] != item[clicks]] for part in (clicks, target))

    source = np.arange(len(logs))
    source[clicks] = target  # of item and position
    defaults = ClickConfig()
    dwell = np.array(logs["dwell_ms"].to_pylist(), float)
    dwell[clicks] = defaults.dwell_wrong_ms * np.exp(defaults.dwell_sigma * rng.standard_normal(len(clicks)))
    gone = set(zip(session[clicks].tolist(), item[clicks].tolist(), strict=True))
    later = np.isin(event, ["add_to_cart", "purchase"])
    kept = [not (late and pair in gone) for late, pair in zip(later, zip(session, item, strict=True), strict=True)]
    for name in ("item_id", "position"):
        logs = logs.set_column(logs.schema.get_field_index(name), name, logs[name].take(pa.array(source)))
    times = pa.array(dwell, pa.float64(), from_pandas=True)
    logs = logs.set_column(logs.schema.get_field_index("dwell_ms"), "dwell_ms", times)
    return logs.filter(pa.array(kept)), len(clicks) / count


def true_classes(bench: Bench, data: str) -> torch.Tensor:
    """Return the class of what each sample shows, [n]; -1 where no item of it is a sample."""
    truth = pq.read_table(Path(data) / "truth.parquet")
    right = dict(zip(truth["query_id"].to_pylist(), truth["item_id"].to_pylist(), strict=True))
    listed = bench.samples.labels[bench.photos :]
    class_of = dict(zip(bench.item_ids, listed.tolist(), strict=True))
    shown = [class_of.get(right[photo], -1) for photo in bench.samples.ids[: bench.photos]]
    return torch.cat([torch.tensor(shown), listed])


def label_quality(bench: Bench, true: torch.Tensor, photos: int) -> dict[str, float]:
    """Return shares: of `photos`, those that are samples, of these those of the right class; items in a class with
    another."""
    correct = bench.samples.labels[: bench.photos] == true[: bench.photos]
    listed = bench.samples.labels[bench.photos :]
    together = torch.bincount(listed)[listed] > 1
    shares = {"coverage": bench.photos / photos, "purity": correct.float().mean(), "merged": together.float().mean()}
    return {name: round(float(share), 4) for name, share in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a marketplace; default: the project's own, simulated")
    parser.add_argument("--wrong", type=float, default=0.42, help="share of its clicks that are wrong as they are")
    parser.add_argument("--levels", type=float, nargs="+", metavar="SHARE", help="of the clicks that shall be wrong")
    parser.add_argument("--things", type=int, help="default: all")
    parser.add_argument("--rows", nargs="*", choices=METHODS[1:], default=METHODS[1:], help="beside Mixer's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workspace", help="where marketplaces and samples go; default: a temporary folder")
    arguments = parser.parse_args()
    if arguments.data and arguments.levels and min(arguments.levels) < arguments.wrong:
        parser.error(f"--levels: clicks are only moved to wrong items, so none is below --wrong {arguments.wrong}")
    arguments.levels = arguments.levels or ([arguments.wrong, 0.5, 0.6] if arguments.data else [0.0, 0.2, 0.4, 0.6])
    torch.set_num_threads(os.cpu_count() or 1)
    connect()
    with tempfile.TemporaryDirectory() as scratch:
        levels = sweep(Path(arguments.workspace or scratch).resolve(), arguments)
    report: dict[str, Any] = {
        "levels": levels,
        "seeds": arguments.seeds,
        "commit": versions.commit(os.path.dirname(__file__)),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    print(json.dumps(report))


def sweep(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a row for each level and method; return the figures of each level."""
    heads = ("R@1", "95 %", "over things", "Mixer ahead by", "wrong clicks", "coverage", "purity", "merged")
    print(f"{'':10}{'':14}" + "".join(f"{head:>17}" for head in heads))
    levels: list[dict[str, Any]] = []
    for level in arguments.levels:
        if arguments.data:
            moved = (level - arguments.wrong) / (1 - arguments.wrong)
            data, moved = moved_clicks(arguments.data, folder / f"moved-{level}", moved)
            wrong = arguments.wrong + (1 - arguments.wrong) * moved  # a moved click may still, rarely, be right
        else:
            data, wrong = marketplace(folder, level, arguments.things)
        bench = prepare_bench(data, str(folder / f"workspace-{level}"))
        mixer = Classification(shared_evidence(bench), bench.classes)
        sampled = replace(mixer, rate=0.1)
        methods: dict[str, Method] = {"mixer": mixer, "infonce": infonce, "arcface": arcface, "sampled": sampled}
        figures: dict[str, Any] = {"level": level, "wrong_clicks": round(wrong, 4)}
        if not arguments.data:
            true = true_classes(bench, data)
            figures |= label_quality(bench, true, len(pq.read_table(Path(data) / "queries.parquet")))
            certain = Targets.certain(true.clamp_min(0), (true >= 0).float())
            methods["true_classes"] = replace(mixer, targets=certain)
        right: dict[str, np.ndarray] = {}  # of each photo, the share of seeds
        for name in [name for name in methods if name in ("mixer", *arguments.rows)]:
            towers = [methods[name](bench, seed) for seed in range(arguments.seeds)]
            runs = [hits_of(bench.item_ids, bench.relevant, cosines(bench, each)) for each in towers]
            figures[name] = figures_of(bench, runs, 0.0)
            right[name] = np.mean([hits[:, 0] for hits in runs], axis=0)
            ahead = right["mixer"] - right[name]
            surely = interval(ahead, things_of(bench.relevant))
            figures[name] |= {"mixer_ahead": round(float(ahead.mean()), 4), "mixer_ahead_interval_things": surely}
            intervals = [figures[name][key] for key in ("r1_interval", "r1_interval_things")]
            row = [f"{figures[name]['r1']:.3f}", *(f"{low:.3f} to {high:.3f}" for low, high in intervals)]
            row.append(f"{surely[0]:+.3f} to {surely[1]:+.3f}")
            row += [f"{figures[key]:.3f}" for key in ("wrong_clicks", "coverage", "purity", "merged") if key in figures]
            print(f"{level:<10}{name:14}" + "".join(f"{cell:>17}" for cell in row), flush=True)
        levels.append(figures)
    return levels


if __name__ == "__main__":
    main()
