"""How well a photo finds its item: Mixer beside what people use today, and without each of its parts.

    .venv/bin/python benchmarks/quality.py --data FOLDER [--seeds 3] [--fine-tune 8] [--rows mixer mixer_finetuned]

The same cached features of the frozen encoder, the same towers, photos and number of steps for every method, in one
process; the fine-tuned model comes from the product's train job. Prints tables (means over seeds, and 95 % bootstrap
intervals) and, as its last line, one JSON object. FOLDER holds `items`, `queries`, `logs` and `val`.

Intervals draw photos again: they tell of other photos of the same things. Those "over things" draw things, with all
photos of each: they tell of other things, and are wider where `val` has many photos of few.

"New listings" are a third of all items, three times over, that are taken out of the logs, before these are organised,
and not learned from: each photo of one has to find it, its other right items taken out of the gallery.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from learning import (
    Bench,
    Classification,
    Concatenated,
    NoMemory,
    OneTransformation,
    Reversed,
    arcface,
    clicked_class,
    infonce,
    pairs_of_classes,
    shared_evidence,
    triplet,
    without_text,
)
from torch import Tensor

from mixer.embedder import ImageFeatures, ItemEmbedder, QueryEmbedder, item_text
from mixer.images import UnreadableImage, decode
from mixer.metrics import hit_at_k, macro, relevance
from mixer.sampling import EpochPlan
from mixer.targets import Targets
from mixer.towers import Towers
from mixer.training import FrozenTower
from mixer_platform import versions
from mixer_platform.cli import connect
from mixer_platform.config import RunConfig, load_config
from mixer_platform.errors import MissingError
from mixer_platform.evaluate.job import find_truth
from mixer_platform.inputs import IMAGE, find_input, read_input, unmarked
from mixer_platform.prepare import rows
from mixer_platform.prepare.job import prepare
from mixer_platform.schema import ITEMS, LOGS
from mixer_platform.storage import open_storage, read_uri
from mixer_platform.train.features import FeatureSamples, cache_features
from mixer_platform.train.job import train
from mixer_platform.train.labels import in_training_order, read_labels
from mixer_platform.train.stages import multiplies_in_bf16, read_encoders

CONFIG = Path(__file__).parents[1] / "jobs/configs/local.yaml"
KS = (1, 5, 10)
FOLDS = 3
Method = Callable[[Bench, int], Towers]


def prepare_bench(data: str, workspace: str, path: Path = CONFIG) -> Bench:
    """Run the product's prepare job and cache features; read the truth."""
    config = load_config(path, [f"data={data}", f"workspace={workspace}"])
    storage = open_storage(workspace)
    prepared = prepare(config)
    features = cache_features(storage, prepared["version"], config.model, config.train)
    widths, _ = read_encoders(config.model, config.train.fine_tune)
    samples = FeatureSamples(storage, features, widths, config.train.views, config.model.max_tokens)
    encoder = ImageFeatures(versions.fetch(storage, f"features/{features}/encoders", workspace), threads=2)
    photos, relevant = read_truth(config, lambda picture: encoder(encoder.preprocess(picture)[None]).mean(axis=1)[0])
    bench = Bench(config, samples, prepared["classes"], widths, photos, relevant, np.zeros((0, 3), np.int64))
    return replace(bench, clicks=clicked_pairs(bench))


def read_truth(config: RunConfig, embed: Callable[[Any], np.ndarray]) -> tuple[Tensor, list[set[str]]]:
    """Return the embedded photos, [photos, width], and the items that are right for each."""
    asked, relevant = [], []
    for row in read_input(find_truth(config)).iter_rows():
        try:
            asked.append(embed(decode(read_uri(row[IMAGE]))))
        except UnreadableImage:
            continue
        relevant.append(set(row["relevant_item_ids"]))
    return torch.from_numpy(np.array(asked)), relevant


def read_logs(data: str) -> pa.Table:
    """Return the log rows, marked as `inputs.mark_rows` does."""
    batches = read_input(find_input(data, LOGS)).iter_batches(batch_size=None, batch_format="pyarrow")
    return pa.concat_tables(batches).combine_chunks()


def write_marketplace(data: str, folder: Path, logs: pa.Table) -> str:
    """Write a marketplace that has everything of `data`, linked, but other logs; return its folder."""
    folder.mkdir(parents=True)
    for path in Path(data).absolute().iterdir():
        if not path.name.startswith("logs"):
            (folder / path.name).symlink_to(path)
    pq.write_table(unmarked(logs), folder / "logs.parquet")
    return str(folder)


def relabelled(bench: Bench, data: str) -> Bench:
    """Return the bench of other logs that speak of the same photos, or of fewer, whose features are known already."""
    config = bench.config.model_copy(update={"data": data})
    storage = open_storage(config.workspace)
    prepared = prepare(config)
    labelled = pq.read_table(storage.path(f"samples/{prepared['version']}/train"), filesystem=storage.filesystem)
    labelled = in_training_order(labelled)
    place = {key: row for row, key in enumerate(bench.samples.ids)}
    ids = labelled["sample_id"].to_pylist()
    at = torch.tensor([place[key] for key in ids])
    photos, items = at[at < bench.photos], at[at >= bench.photos] - bench.photos
    samples = object.__new__(FeatureSamples)
    samples.__dict__ |= bench.samples.__dict__
    samples.ids, samples.photos = ids, bench.samples.photos[photos]
    samples.labels, samples.targets = read_labels(labelled)
    for name in ("pictures", "has_image", "tokens", "token_mask"):
        setattr(samples, name, getattr(bench.samples, name)[items])
    other = replace(bench, config=config, samples=samples, classes=prepared["classes"])
    return replace(other, clicks=clicked_pairs(other))


def sound_logs(config: RunConfig) -> pa.Table:
    """Return the log rows that the product counts: no repeats, no robots."""
    logs = rows.mark_repeats(read_logs(config.data), "event_id")
    return rows.sound(rows.mark_robots(logs, config.prepare.labeling.robot_clicks))


def clicked_pairs(bench: Bench) -> np.ndarray:
    """Return photo row, item row and clicks of the clicked pairs that are samples, int64 [pairs, 3]."""
    logs = sound_logs(bench.config)
    clicks = logs.filter(pc.equal(logs["event"], "click"))
    counted = clicks.group_by(["query_id", "item_id"]).aggregate([([], "count_all")])
    photo = {key: row for row, key in enumerate(bench.samples.ids[: bench.photos])}
    item = {key: row for row, key in enumerate(bench.item_ids)}
    pairs = zip(*(column.to_pylist() for column in counted.columns), strict=True)
    # Sorted, for Ray Data reads in any order and methods draw from them, or take the last of equally clicked ones.
    return np.array(sorted((photo[q], item[i], n) for q, i, n in pairs if q in photo and i in item))


# Measuring ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cosines(bench: Bench, towers: Towers, text: bool = True, picture: bool = True) -> Tensor:
    """Return the cosines of all photos and items, [photos, items]; an item of which nothing is shown has -2."""
    total = len(bench.everything)
    plain = EpochPlan(bench.everything, np.zeros(total, int), np.zeros(total, bool), np.zeros(total, bool))
    batch = without_text(bench.samples.batch(np.arange(bench.photos, total), plain), text)
    if not picture:
        batch = replace(batch, has_image=torch.zeros_like(batch.has_image))
    nothing = ~(batch.has_image | batch.token_mask.any(dim=1))
    return (towers.query(bench.asked) @ FrozenTower(towers)(batch).T).masked_fill(nothing, -2)


def untrained_cosines(bench: Bench) -> Tensor:
    """The bare encoder's features, centred: what a shop has before it learns."""
    with_image = bench.samples.has_image
    items = bench.samples.pictures[:, 0].float().mean(dim=1)
    centre = items[with_image].mean(dim=0)
    gallery = F.normalize(items - centre, dim=1) * with_image[:, None]
    return F.normalize(bench.asked - centre, dim=1) @ gallery.T


def hits_of(item_ids: list[str], relevant: list[set[str]], cosines: Tensor) -> np.ndarray:
    """Return bool [photos, 10]: whether the item found at each rank is right."""
    best = cosines.topk(max(KS), dim=1).indices.tolist()
    return relevance([[item_ids[row] for row in rows] for rows in best], relevant)


def without_listings(bench: Bench, folder: Path) -> list[tuple[Bench, np.ndarray]]:
    """Return, for each fold, the bench of logs that do not know a part of the items, and which these are, bool
    [items]."""
    logs, folds = sound_logs(bench.config), []  # without its clicks on some items a robot would pass for a person
    shuffled = np.random.default_rng(0).permutation(len(bench.item_ids))
    for fold in range(FOLDS):
        new = np.isin(np.arange(len(bench.item_ids)), shuffled[fold::FOLDS])
        names = pa.array([item for item, is_new in zip(bench.item_ids, new, strict=True) if is_new], pa.string())
        known = logs.filter(pc.invert(pc.fill_null(pc.is_in(logs["item_id"], names), False)))
        folds.append((relabelled(bench, write_marketplace(bench.config.data, folder / f"fold-{fold}", known)), new))
    return folds


def new_listing_hits(
    bench: Bench, new: np.ndarray, method: Classification, seed: int, shown: list[dict[str, bool]]
) -> np.ndarray:
    """Return whether each photo found a listing of those that are `new` at once; nan where it has none.

    That is [len(shown), photos], for what is shown of the items.
    """
    right, fresh = torch.tensor([[i in items for i in bench.item_ids] for items in bench.relevant]), torch.tensor(new)
    towers = method(bench, seed, without=bench.photos + np.flatnonzero(new))
    asked = (right & fresh).any(dim=1).numpy()
    found = np.full((len(shown), len(bench.relevant)), np.nan)
    for row, parts in enumerate(shown):
        first = cosines(bench, towers, **parts).masked_fill(right & ~fresh, -2).argmax(dim=1)
        found[row, asked] = (right & fresh)[torch.arange(len(first)), first].numpy()[asked]
    return found


def mean_known(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis of what is known; nan where nothing is."""
    known = ~np.isnan(values)
    return np.where(known.any(axis=0), np.nansum(values, axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)


def interval(right: np.ndarray, things: np.ndarray | None = None) -> list[float]:
    """Return the 95 % bootstrap interval of the mean over photos; nan are photos that were not asked.

    Photos are drawn, or, if `things` are given, what each shows, things with all their photos.
    """
    asked = ~np.isnan(right)
    things = np.arange(len(right)) if things is None else things
    _, groups = np.unique(things[asked], return_inverse=True)
    count, total = np.bincount(groups), np.bincount(groups, right[asked])
    drawn = np.random.default_rng(0).integers(len(count), size=(2000, len(count)))
    means = total[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    return np.percentile(means, [2.5, 97.5]).round(4).tolist()


def things_of(relevant: list[set[str]]) -> np.ndarray:
    """Return a number for what each photo shows, [photos]: photos for which the same items are right show the same."""
    numbers: dict[frozenset[str], int] = {}
    return np.array([numbers.setdefault(frozenset(items), len(numbers)) for items in relevant])


def figures_of(bench: Bench, runs: list[np.ndarray], seconds: float) -> dict[str, Any]:
    """Return means over seeds, the interval of R@1 over resampled photos, and R@1 by how much a thing is wanted."""
    figures: dict[str, Any] = {f"r{k}": float(np.mean([hit_at_k(hits, k).mean() for hits in runs])) for k in KS}
    figures["macro_r1"] = float(np.mean([macro(hit_at_k(hits, 1), bench.relevant) for hits in runs]))
    right = np.mean([hits[:, 0] for hits in runs], axis=0)
    for name, part in by_demand(bench).items():
        figures[f"{name}_r1"] = float(right[part].mean())
    rounded = {name: round(value, 4) for name, value in figures.items()}
    rounded |= {"r1_interval": interval(right), "r1_interval_things": interval(right, things_of(bench.relevant))}
    rounded["r1_seeds"] = [round(float(hits[:, 0].mean()), 4) for hits in runs]
    return {**rounded, "seconds": round(seconds, 1)}


def by_demand(bench: Bench) -> dict[str, np.ndarray]:
    """Return which photos show head, mid and tail things: thirds of the photos by the clicks on their right items."""
    clicks = np.bincount(bench.clicks[:, 1], weights=bench.clicks[:, 2], minlength=len(bench.item_ids))
    of = dict(zip(bench.item_ids, clicks, strict=True))
    demand = np.array([sum(of.get(item, 0) for item in items) for items in bench.relevant])
    parts = np.array_split(np.argsort(-demand, kind="stable"), 3)
    return dict(zip(("head", "mid", "tail"), parts, strict=True))


def fine_tuned(bench: Bench, seed: int, epochs: int) -> tuple[np.ndarray, float]:
    """Train with the product's job, encoder and all; return hits and the seconds of the whole training."""
    precision = "bf16" if multiplies_in_bf16(torch.device("cpu")) else "fp32"
    overrides = [f"train.fine_tune.epochs={epochs}", f"train.seed={seed}", "train.holdout=0"]
    overrides.append(f"train.precision={precision}")
    config = load_config(CONFIG, [f"data={bench.config.data}", f"workspace={bench.config.workspace}", *overrides])
    model = train(config)
    return published_hits(config, model["version"], bench.item_ids), model["seconds"]


def published_hits(config: RunConfig, model: str, item_ids: list[str]) -> np.ndarray:
    """Return the hits of a published model, asked by its graphs over these items."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = versions.fetch(open_storage(config.workspace), f"models/{model}", scratch)
        queries, items = QueryEmbedder(folder, threads=2), ItemEmbedder(folder, threads=2)
        photos, relevant = read_truth(config, lambda picture: queries(queries.preprocess(picture)[None])[0])
        gallery = {}
        for row in read_input(find_input(config.data, ITEMS)).iter_rows():
            text = item_text(row.get("title"), row.get("description"))
            try:
                pixels = items.preprocess(decode(read_uri(row[IMAGE]))) if row[IMAGE] else None
            except (UnreadableImage, MissingError):
                pixels = None
            if row["item_id"] in item_ids:
                gallery[row["item_id"]] = items([pixels], [text])[0]
    embedded = torch.from_numpy(np.stack([gallery[item] for item in item_ids]))
    return hits_of(item_ids, relevant, photos @ embedded.T)


def shuffled_titles(bench: Bench, seed: int) -> Bench:
    """Return the bench with each item's text given to another."""
    samples = object.__new__(FeatureSamples)
    samples.__dict__ |= bench.samples.__dict__
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(bench.item_ids)))
    samples.tokens, samples.token_mask = samples.tokens[order], samples.token_mask[order]
    return replace(bench, samples=samples)


# The tables ---------------------------------------------------------------------------------------------------------


def compare(bench: Bench, seeds: int, epochs: int, rows: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Print the first table, row by row: every method on items that the logs know, or those in `rows`. Return its
    figures."""
    shared, classes, size = shared_evidence(bench), bench.classes, len(bench.item_ids)
    mixer = Classification(shared, classes)
    methods: dict[str, tuple[str, Method]] = {
        "infonce": ("InfoNCE on clicked pairs", infonce),
        "triplet": ("triplet loss on clicked pairs", triplet),
        "arcface": ("ArcFace, class = most clicked item", arcface),
        "mixer": ("Mixer", mixer),
        "no_denoising": (
            "  a photo's class is that of its most clicked item",
            replace(mixer, targets=clicked_class(bench)),
        ),
        "likeliest": (
            "  certain of the likeliest class",
            replace(mixer, targets=Targets.certain(bench.samples.labels)),
        ),
        "alone": ("  photos share no evidence", replace(mixer, targets=bench.samples.targets)),
        "two_rounds": ("  two rounds", replace(mixer, rounds=2)),
        "pairs": ("  pairs instead of classes", partial(infonce, pairs=pairs_of_classes(bench))),
        "one_transformation": ("  one transformation for both", replace(mixer, make=OneTransformation)),
        "as_learned": ("  the transformations as learned", replace(mixer, interpolation=1.0)),
        "no_text": ("  no text", replace(mixer, text=False)),
        "bf16": ("  the softmax multiplies in bf16", replace(mixer, precision="bf16")),
    }
    known = [*methods, "mixer_finetuned", "new_listings"]
    if unknown := set(rows or ()) - set(known):
        raise SystemExit(f"--rows: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    results = {"zero_shot": figures_of(bench, [hits_of(bench.item_ids, bench.relevant, untrained_cosines(bench))], 0.0)}
    print(f"\n{size} items that the logs know, {len(bench.relevant)} photos")
    print(
        f"{'':52}{'R@1':>7}{'95 %':>16}{'over things':>16}"
        + "".join(f"{name:>8}" for name in ("R@5", "R@10", "macro", "head", "mid", "tail", "s"))
    )
    show("no training", results["zero_shot"])
    for name, (label, method) in methods.items():
        if rows and name not in rows:
            continue
        runs, began = [], time.monotonic()
        for seed in range(seeds):
            runs.append(
                hits_of(bench.item_ids, bench.relevant, cosines(bench, method(bench, seed), text=name != "no_text"))
            )
        results[name] = figures_of(bench, runs, (time.monotonic() - began) / seeds)
        show(label, results[name])
    if epochs and (not rows or "mixer_finetuned" in rows):
        tuned = [fine_tuned(bench, seed, epochs) for seed in range(seeds)]
        results["mixer_finetuned"] = figures_of(
            bench, [hits for hits, _ in tuned], float(np.mean([s for _, s in tuned]))
        )
        show(f"Mixer, encoder fine-tuned for {epochs} epochs", results["mixer_finetuned"])
    return results


def show(label: str, figures: dict[str, Any]) -> None:
    intervals = [figures[key] for key in ("r1_interval", "r1_interval_things")]
    row = "".join(f"{f'{low:.3f} to {high:.3f}':>16}" for low, high in intervals)
    row += "".join(f"{figures[key]:8.3f}" for key in ("r5", "r10", "macro_r1", "head_r1", "mid_r1", "tail_r1"))
    print(f"{label:52}{figures['r1']:7.3f}{row}{figures['seconds']:8.1f}", flush=True)


def compare_on_new_listings(bench: Bench, folder: Path, seeds: int) -> dict[str, dict[str, Any]]:
    """Print the second table: what the text is worth for items that nobody has clicked yet. Return its figures."""
    both: list[tuple[str, dict[str, bool]]] = [("", {})]
    rows: dict[str, tuple[dict[str, Any], list[tuple[str, dict[str, bool]]]]] = {
        "Mixer": ({}, [*both, (", shown without pictures", {"picture": False})]),
        "  picture only": ({"text": False}, [("", {"text": False})]),
        "  the transformations as learned": ({"interpolation": 1.0}, both),
        "  shuffled titles": ({}, both),
        "  branches do not learn by themselves": ({"branch_weight": 0.0}, both),
        "  no concept memory": ({"make": NoMemory}, both),
        "  concatenated text": ({"make": Concatenated}, both),
        "  query and value reversed": ({"make": Reversed}, both),
    }
    folds = without_listings(bench, folder)
    things = things_of(bench.relevant)
    print(f"\nNew listings, {FOLDS} folds{'':34}{'R@1':>7}{'95 %':>16}{'over picture only':>28}{'over things':>20}")
    found: dict[str, np.ndarray] = {}
    for label, (changes, shown) in rows.items():
        runs = []
        for seed in range(seeds):
            for known, new in folds:
                method = Classification(shared_evidence(known), known.classes, **changes)
                told = shuffled_titles(known, seed) if "shuffled" in label else known
                runs.append(new_listing_hits(told, new, method, seed, [part for _, part in shown]))
        right = mean_known(np.array(runs))
        found |= {label + addition: hits for (addition, _), hits in zip(shown, right, strict=True)}
    results: dict[str, dict[str, Any]] = {}
    for label, right in found.items():
        gain, name = right - found["  picture only"], label.strip().lower().replace(",", "").replace(" ", "_")
        results[name] = {
            "r1": round(float(np.nanmean(right)), 4),
            "r1_interval": interval(right),
            "gain": round(float(np.nanmean(gain)), 4),
            "gain_interval": interval(gain),
            "gain_interval_things": interval(gain, things),
        }
        (low, high), (least, most) = results[name]["r1_interval"], results[name]["gain_interval"]
        beside = f"{results[name]['gain']:+.3f} ({least:+.3f} to {most:+.3f})"
        least, most = results[name]["gain_interval_things"]
        row = f"{f'{low:.3f} to {high:.3f}':>16}{beside:>28}{f'{least:+.3f} to {most:+.3f}':>20}"
        print(f"{label:52}{results[name]['r1']:7.3f}{row}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with items, queries, logs and val")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fine-tune", type=int, default=8, metavar="EPOCHS", help="0: leave that row out")
    parser.add_argument("--rows", nargs="+", help="these, by their keys in the JSON object, and no others")
    parser.add_argument("--workspace", help="where samples and features go; default: a temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    connect()
    with tempfile.TemporaryDirectory() as scratch:
        bench = prepare_bench(str(Path(arguments.data).resolve()), arguments.workspace or scratch)
        results = compare(bench, arguments.seeds, arguments.fine_tune, arguments.rows)
        left_out = arguments.rows and "new_listings" not in arguments.rows
        new = {} if left_out else compare_on_new_listings(bench, Path(scratch), arguments.seeds)
    report: dict[str, Any] = {
        **results,
        "new_listings": new,
        "photos": len(bench.relevant),
        "items": len(bench.item_ids),
        "classes": bench.classes,
        "seeds": arguments.seeds,
        "commit": versions.commit(os.path.dirname(__file__)),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
