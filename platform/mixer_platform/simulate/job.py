"""Make the demo's marketplace: drawings -> catalogue and photos -> logs, in the input contract that `prepare` reads."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixer_platform.errors import InputError
from mixer_platform.simulate.clicks import OTHER, RELATED, RIGHT, START_MS, WEEK_MS, Array, simulate_logs, zipf
from mixer_platform.simulate.config import SimulateConfig
from mixer_platform.simulate.emoji import Thing, fetch, load
from mixer_platform.simulate.faults import break_pictures
from mixer_platform.simulate.photos import catalog_picture, descriptor, photo, read_drawing

REPORT = "simulate.json"
STYLES = ("google", "openmoji")  # whose drawings people photograph


class Photos(NamedTuple):
    """Photos to take: thing index and style index [n], and the file of each, relative to the destination."""

    thing: Array
    style: Array
    image: list[str]


def simulate(config: SimulateConfig, destination: Path, cache: Path) -> dict[str, Any]:
    """Make the marketplace of `config` in the folder `destination`, with the downloads kept in the folder `cache`.

    Returns the report that is also written as `simulate.json`: config, counts and measured rates. A destination that
    already holds this very marketplace is left as it is. Raises InputError if it holds anything else, and DownloadError
    if the drawings cannot be had.
    """
    return made_already(config, destination) or build(load(fetch(cache)), config, destination)


def drawings_beside(destination: Path) -> Path:
    """Return the folder where the downloads for a marketplace are kept."""
    return destination.parent / "drawings"


def made_already(config: SimulateConfig, destination: Path) -> dict[str, Any] | None:
    """Return the report of `destination` if it was made from `config`, None if nothing is there, else raise."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    path = destination / REPORT
    if not path.exists():
        raise InputError(f"{destination}: holds data that simulate did not make; name another folder")
    report: dict[str, Any] = json.loads(path.read_text())
    if report.get("config") == config.model_dump(mode="json"):
        return report
    raise InputError(f"{destination}: holds data of another configuration; delete it or name another folder")


def build(things: Sequence[Thing], config: SimulateConfig, destination: Path) -> dict[str, Any]:
    """Make the marketplace from `things`; `destination` appears whole or not at all."""
    rng = np.random.default_rng([config.seed, 0])
    things = [things[index] for index in rng.permutation(len(things))[: config.max_things]]
    demand = rng.permutation(zipf(len(things), config.clicks.demand_ratio))
    listings = [_file("catalog", "webp", rng) for _ in things]
    broken = rng.choice(len(things), min(config.broken_pictures, len(things)), replace=False)
    # A new photo can only be found if the one listing that it shows has a picture.
    pictured = rng.permutation(np.setdiff1d(np.arange(len(things)), broken))
    if not len(pictured):
        raise InputError(
            f"{destination}: no item has a picture to ask for; make broken_pictures less than {len(things)}"
        )
    queries = _log_photos(len(things), config.photos_per_drawing, rng)
    val = _new_photos(pictured, config.val_photos, rng)
    item_ids = [f"item-{index:05d}" for index in range(len(things))]
    query_ids = [f"q-{index:06d}" for index in range(len(queries.image))]

    with _unfinished(destination) as folder:
        for name in ("catalog", "photos", "logs"):
            (folder / name).mkdir()
        items, styles = _draw(things, listings, queries, val, config, folder)
        spoiled = break_pictures([folder / listings[index] for index in broken])

        similarity = styles[queries.style, queries.thing] @ items.T
        grade = _grades(things, queries.thing)
        logs, measured = simulate_logs(
            query_ids, item_ids, similarity, grade, demand[queries.thing], config.clicks, config.seed
        )
        week = (logs["timestamp_ms"].to_numpy() - START_MS) // WEEK_MS
        for number in range(config.clicks.weeks):
            # Broken times go with the first week, and what outlasts the last one stays in it.
            part = logs.filter(pa.array(week.clip(0, config.clicks.weeks - 1) == number))
            pq.write_table(part, folder / "logs" / f"week-{number}.parquet")

        catalogue = _catalogue(things, item_ids, listings, config.without_description, rng)
        pq.write_table(catalogue, folder / "items.parquet")
        pq.write_table(pa.table({"query_id": query_ids, "image": queries.image}), folder / "queries.parquet")
        right = [item_ids[index] for index in queries.thing]
        pq.write_table(pa.table({"query_id": query_ids, "item_id": right}), folder / "truth.parquet")
        pq.write_table(_val_table(val, item_ids), folder / "val.parquet")
        report = {
            "config": config.model_dump(mode="json"),
            "items": len(things),
            "items_without_description": catalogue["description"].null_count,
            "queries": len(query_ids),
            "val": len(val.image),
            "broken_pictures": spoiled,
            "logs": measured,
        }
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


@contextmanager
def _unfinished(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that takes its place at the end, and goes away if anything fails."""
    folder = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _file(folder: str, suffix: str, rng: np.random.Generator) -> str:
    """A name that tells nothing of what is in the picture."""
    return f"{folder}/{rng.bytes(8).hex()}.{suffix}"


def _log_photos(things: int, each: int, rng: np.random.Generator) -> Photos:
    thing, style, _ = np.indices((things, len(STYLES), each)).reshape(3, -1)
    order = rng.permutation(len(thing))  # so that a query's number tells nothing either
    return Photos(thing[order], style[order], [_file("photos", "jpg", rng) for _ in order])


def _new_photos(things: Array, photos: int, rng: np.random.Generator) -> Photos:
    turn, place = np.divmod(np.arange(photos), len(things))
    style = (place + turn) % len(STYLES)  # another one each time that a thing has its turn
    return Photos(things[place], style, [_file("photos", "jpg", rng) for _ in range(photos)])


def _draw(
    things: Sequence[Thing], listings: Sequence[str], queries: Photos, val: Photos, config: SimulateConfig, folder: Path
) -> tuple[Array, Array]:
    """Save every picture. Returns the descriptors of the items [things, d] and of the styles [styles, things, d]."""
    takes: dict[tuple[int, int], list[tuple[str, list[int]]]] = {}
    for stream, photos in enumerate((queries, val), start=2):
        for number, (thing, style, image) in enumerate(zip(*photos, strict=True)):
            # Each photo has a seed of its own: the pool may then take them in any order.
            takes.setdefault((int(thing), int(style)), []).append((image, [config.seed, stream, number]))

    def draw(index: int) -> list[Array]:
        thing = things[index]
        listed = read_drawing(thing.twitter)
        catalog_picture(listed, config.item_size).save(folder / listings[index], quality=90, method=2)
        descriptors = [descriptor(listed)]
        for style, name in enumerate(STYLES):
            drawing = read_drawing(getattr(thing, name))
            descriptors.append(descriptor(drawing))
            for image, seed in takes.get((index, style), ()):
                photo(drawing, config.photo_size, np.random.default_rng(seed)).save(folder / image, quality=85)
        return descriptors

    # Threads: Pillow lets go of the interpreter while it works.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        descriptors = np.array(list(pool.map(draw, range(len(things)))))
    return descriptors[:, 0], descriptors[:, 1:].swapaxes(0, 1)


def _grades(things: Sequence[Thing], asked: Array) -> Array:
    """Grade of every item for queries that show the things `asked`: int8 [queries, items]."""
    _, subgroup = np.unique([thing.subgroup for thing in things], return_inverse=True)
    grade = np.where(subgroup[asked][:, None] == subgroup, np.int8(RELATED), np.int8(OTHER))
    grade[np.arange(len(asked)), asked] = RIGHT
    return grade


def _catalogue(
    things: Sequence[Thing], item_ids: list[str], listings: list[str], without: float, rng: np.random.Generator
) -> pa.Table:
    terse = rng.random(len(things)) < without
    phrases = [", ".join(thing.tags) or None for thing in things]
    return pa.table(
        {
            "item_id": item_ids,
            "title": [thing.label for thing in things],
            "description": pa.array(phrases, pa.string(), mask=terse),
            "group": [thing.group for thing in things],
            "subgroup": [thing.subgroup for thing in things],
            "image": listings,
        }
    )


def _val_table(val: Photos, item_ids: list[str]) -> pa.Table:
    return pa.table(
        {
            "query_id": [f"v-{number:05d}" for number in range(len(val.image))],
            "image": val.image,
            "relevant_item_ids": pa.array([[item_ids[thing]] for thing in val.thing], pa.list_(pa.string())),
        }
    )
