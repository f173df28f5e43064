"""Run every stage as its own job, ask the service real questions, and show what came of it."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mixer_platform.cli import fail
from mixer_platform.config import load_config
from mixer_platform.demo.cluster import ROOT, LocalCluster, processes
from mixer_platform.demo.memory import PeakMemory
from mixer_platform.errors import ConfigError, MixerError
from mixer_platform.evaluate.contact_sheet import Found, draw_sheet
from mixer_platform.evaluate.job import find_truth
from mixer_platform.serve.client import Client, MixerHttpError
from mixer_platform.serve.schemas import Item, SearchReply
from mixer_platform.simulate.emoji import fetch
from mixer_platform.simulate.job import drawings_beside
from mixer_platform.storage import read_uri, resolve_uri

CONFIG, CONFIG_OF_YOUR_OWN = "jobs/configs/demo.yaml", "jobs/configs/local.yaml"
_SHOWN_ROWS, _SHOWN_ITEMS = 8, 5


def main(description: str | None) -> None:
    """Parse the command line and run the demo; its last line is one JSON object. Exit status 1 if a stage fails."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", help="a folder with items, queries, logs and val; default: the emoji marketplace")
    parser.add_argument("--workspace", help="where everything derived goes; default: workspace/NAME")
    parser.add_argument("--setup-seconds", type=float, default=0.0, help="what the set-up before this took")
    parser.add_argument("--queries", type=int, default=100, help="photos to ask the service")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave the contexts, and with them end Ray
    try:
        print(json.dumps(demo(arguments)), flush=True)
    except MixerError as error:
        fail(error)


def demo(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run simulate (without data of your own), prepare, train, index, evaluate and serve; return the figures."""
    name = Path(arguments.data).resolve().name if arguments.data else "emoji"
    workspace = Path(arguments.workspace or ROOT / "workspace" / name).resolve()
    data = Path(arguments.data).resolve() if arguments.data else workspace / "data"
    source = CONFIG_OF_YOUR_OWN if arguments.data else CONFIG
    for override in arguments.overrides:
        if override.startswith(("data=", "workspace=")):
            raise ConfigError(f"{override}: the demo takes a folder as --{override.replace('=', ' ', 1)}")
    config = load_config(ROOT / source, [f"data={data}", f"workspace={workspace}", *arguments.overrides])
    setup_seconds = arguments.setup_seconds
    if arguments.data:
        find_truth(config)  # better missed now than after the training
    else:
        began = time.monotonic()
        fetch(drawings_beside(data))
        setup_seconds += time.monotonic() - began

    common = ["--config", source, f"data={data}", f"workspace={workspace}"]
    started = time.monotonic()
    reports: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    cluster = LocalCluster(workspace / "logs")
    with PeakMemory(partial(processes, cluster.mark)) as memory:
        with cluster:
            seconds["start Ray"] = time.monotonic() - started
            stages = ["prepare", "train", "index", "evaluate", "serve"]
            more = {"serve": ["serve.port=0", "serve.keep_up=false"]}
            for stage in stages if arguments.data else ["simulate", *stages]:
                began = time.monotonic()
                reports[stage] = cluster.submit(stage, [*common, *more.get(stage, []), *arguments.overrides])
                # What is newest in a workspace need not be what this run made or found.
                if stage == "prepare":
                    more["train"] = [f"train.samples={reports[stage]['version']}"]
                elif stage == "train":
                    more["index"] = [f"index.model={reports[stage]['version']}"]
                seconds[stage] = time.monotonic() - began
            began = time.monotonic()
            questions = read_questions(workspace, reports["evaluate"]["version"], arguments.queries)
            questions, replies, latencies = ask(reports["serve"]["url"], questions)
            seconds["query"] = time.monotonic() - began
        job_seconds = time.monotonic() - started
    sheet = workspace / "contact_sheet.png"
    shown = drawn(len(questions), _SHOWN_ROWS)
    rows = sheet_rows([questions[row] for row in shown], [replies[row] for row in shown], data)
    sheet.write_bytes(draw_sheet(rows))

    trained, p50 = reports["evaluate"], float(np.median(latencies))
    print(table(trained, config.evaluate.ks, seconds, reports, p50, len(questions)))
    print(f"\ncontact sheet: {sheet}")
    print(f"keep it up:    {command_to_serve(source, data, workspace)}\n")
    return {
        "untrained_r1": trained.get("untrained", {}).get("r1"),
        **{f"trained_r{k}": trained[f"r{k}"] for k in config.evaluate.ks},
        "seconds": round(job_seconds, 1),
        "setup_seconds": round(setup_seconds, 1),
        "peak_gib": round(memory.gib, 2),
        "query_p50_ms": round(p50, 1),
        "queries": trained["queries"],
        "items": trained["items"],
        "workspace": str(workspace),
    }


def read_questions(workspace: Path, report: str, count: int) -> list[dict[str, Any]]:
    """Return some of the photos that an evaluation asked, drawn at random, the same each time."""
    rows = pq.read_table(workspace / "reports" / f"{report}.parquet").to_pylist()
    return [rows[row] for row in drawn(len(rows), count)]


def drawn(total: int, count: int) -> list[int]:
    """Draw up to `count` of `total` rows; in order, but at no regular distance, which may be that of something else."""
    return sorted(np.random.default_rng(0).permutation(total)[:count].tolist())


def ask(url: str, questions: Sequence[dict]) -> tuple[list[dict], list[SearchReply], list[float]]:
    """Search for every photo over HTTP, one after the other; return the questions that were answered, the replies and
    the milliseconds of each. Raises MixerError where none was."""
    answered, replies, latencies = [], [], []
    with Client(url, timeout_s=60) as client:
        for question in [questions[0], *questions]:  # the first warms up
            photo = read_uri(question["image"])
            began = time.perf_counter()
            try:
                reply = client.search(photo, k=_SHOWN_ITEMS)
            except MixerHttpError as error:  # evaluate takes larger ones, for example
                print(f"{question['image']}: not answered: {error}", flush=True)
                continue
            latencies.append(1000 * (time.perf_counter() - began))
            answered.append(question)
            replies.append(reply)
    warm = int(bool(answered) and answered[0] is questions[0])
    if not replies[warm:]:
        raise MixerError(f"{url}: no photo of {len(questions)} was answered, for the reasons above")
    return answered[warm:], replies[warm:], latencies[warm:]


def sheet_rows(questions: Sequence[dict], replies: Sequence[SearchReply], data: Path) -> list[tuple[str, list[Found]]]:
    """Return the rows of the contact sheet: what the service replied, judged by what is known."""

    def picture(item: Item) -> str | None:
        image = item.attributes.get("image")
        return resolve_uri(image, str(data)) if image else None

    rows = []
    for question, reply in zip(questions, replies, strict=True):
        relevant = set(question["relevant_item_ids"])
        found = [Found(picture(item), item.title or item.id, item.score, item.id in relevant) for item in reply.items]
        rows.append((question["image"], found))
    return rows


def table(
    trained: dict[str, Any],
    ks: Sequence[int],
    seconds: dict[str, float],
    reports: dict[str, dict],
    p50: float,
    queries: int,
) -> str:
    """Return the demo's one table: quality, seconds a stage, latency."""
    untrained = trained.get("untrained", {})  # an evaluation without it, or a catalogue without pictures, has none
    lines = ["", f"{'':24}{'untrained':>12}{'trained':>12}"]
    for k in ks:
        before = f"{untrained[f'r{k}']:.3f}" if untrained else "-"
        lines.append(f"{f'R@{k}':24}{before:>12}{trained[f'r{k}']:12.3f}")
    lines += [f"{'photos / items':24}{trained['queries']:12,}{trained['items']:12,}", ""]
    for stage, spent in seconds.items():
        reused = "   (was there already)" if reports.get(stage, {}).get("reused") else ""
        lines.append(f"{stage:24}{spent:10.1f} s{reused}")
    lines.append(f"{'a query, p50 of ' + str(queries):24}{p50:9.1f} ms")
    return "\n".join(lines)


def command_to_serve(config: str, data: Path, workspace: Path) -> str:
    """Return the command that serves the demo's index until it is interrupted."""
    python = Path(sys.executable)
    shown = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    return f"{shown} jobs/serve.py --config {config} data={data} workspace={workspace}"
