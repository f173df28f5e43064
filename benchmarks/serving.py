"""What serving costs: a service over HTTP beside a bare process, at rest, at load, too much of it, and as parts change.

    .venv/bin/python benchmarks/serving.py --data FOLDER [--workspace FOLDER] [--only PART,PART] [key=value]

FOLDER as in quality.py. Photos are sent as JPEGs; what is no JPEG is encoded at its size first. The catalogue, and
--vectors vectors drawn like its embeddings, are served by `jobs/serve.py` on a Ray cluster of its own, with shards
beside the encoder and as deployments (in larger batches), one replica of each; key=value overrides its
configuration. Parts:

bound       decode, encoder and shards in one bare process (bound.py), its settings chosen while nothing else runs;
            measured before and after everything, and in turn with `one` and `saturation`, as machines are noisy; the
            service is stopped (SIGSTOP) meanwhile
one         latencies of one client
saturation  the most queries a second in closed loop, by how many clients; CPU-milliseconds a query
rates       latencies at 50 % and 90 % of that, at fixed rates; at 50 % at random moments too; the middle of three tries
overload    twice that: what came back, and how soon
swap        another model's index is published, and the first again, at 30 % load
memory      growth over --minutes at half load
kill        two replicas of each part, of which one is killed (SIGKILL) at 30 % load, part after part
clip        clip-retrieval's backend and this service asked by vectors, not photos

Figures of the layout `deployments` end in `_deployments`. Prints tables and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
from clip_backend import backend, environment, write_index
from load import Replies, at_rate, closed_loop, running
from quality import CONFIG
from serving_inputs import Inputs, prepare_inputs, serve_index, write_photos

from mixer_platform import versions
from mixer_platform.demo.cluster import LocalCluster, processes
from mixer_platform.gallery import read_manifest
from mixer_platform.loopback import open_url
from mixer_platform.serve.job import free_port
from mixer_platform.storage import open_storage

PARTS = ("bound", "one", "saturation", "rates", "overload", "swap", "memory", "kill", "clip")
ON_MANY = ("bound", "one", "saturation", "rates", "clip")  # what the number of items changes
LAYOUTS = {
    "beside": [],
    "deployments": ["serve.max_batch=8", "serve.max_queued=24"],  # a hop costs the same for more photos
}
GALLERIES = ("catalogue", "vectors")
CLIENTS = (4, 8, 16, 32)
ROUNDS, TRIES = 8, 3
LONGEST_STOP = 4.0  # seconds; Ray believes processes dead that do not answer for ten
CHANGED_AT = 0.3  # of saturation: on few cores, what starts takes as much CPU time as what answers
SWAP_S, REPLACED_S = 240, 120  # what a swap, or a new replica, may take
REPLICA = "ray::ServeReplica:"
SERVICE = (REPLICA, "ray::ServeController", "ray::HAProxy", "ray::Proxy", "haproxy")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Service:
    """One that answers, and the processes that are its own: Ray's daemons too."""

    url: str
    mark: str

    @property
    def search(self) -> str:
        return f"{self.url}/v1/search?k=10"

    def serves(self, index: str) -> bool:
        """Return whether an index version answers; what fails here is counted by the load."""
        try:
            with open_url(f"{self.url}/v1/status", 30) as reply:
                return json.load(reply)["index"] == index
        except OSError:
            return False

    def processes(self, names: tuple[str, ...] = ("",)) -> dict[int, psutil.Process]:
        """Return the processes whose command begins with one of `names`, by id."""
        found = {}
        for number in processes(self.mark):
            try:
                process = psutil.Process(number)
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if command.startswith(names) or os.path.basename(command.split(" ")[0]) in names:
                found[number] = process
        return found

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop all processes as long as the context lasts, for Ray's take CPU time when nobody asks."""
        found = self.processes().values()
        try:
            for process in found:
                with suppress(psutil.Error):
                    process.suspend()
            yield
        finally:
            for process in found:
                with suppress(psutil.Error):
                    process.resume()

    def cpu(self) -> dict[tuple[str, int], float]:
        """Return the CPU seconds of every process, by what it is, HAProxy, a replica's part or Ray, and its id."""
        found = {}
        for number, process in self.processes().items():
            with suppress(psutil.Error):
                times, command = process.cpu_times(), " ".join(process.cmdline())
                kind = part_of(command) or ("haproxy" if process.name() == "haproxy" else "ray")
                found[kind, number] = times.user + times.system
        return found

    def memory(self, names: tuple[str, ...] = ("",)) -> float:
        """Return the resident MB of the processes, what they share counted in each."""
        total = 0
        for process in self.processes(names).values():
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        return total / 1e6


class Bound:
    """The bare process: it loads once, and works when it is asked."""

    def __init__(self, workspace: Path, index: str, photos: Path, seconds: float) -> None:
        command = [sys.executable, str(Path(__file__).with_name("bound.py")), "--workspace", str(workspace)]
        command += ["--index", index, "--photos", str(photos), "--seconds", str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.settings: dict[str, list[int]] = self._read()

    def ask(self, what: str, seconds: float) -> float:
        """Return queries a second ("many"), or the median milliseconds of one at a time ("one")."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {seconds}\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("bound.py failed")
        return json.loads(line)


@dataclass
class Bench:
    """What is measured, with what, and for how long."""

    data: Path
    workspace: Path
    photos: Path
    index: str
    seconds: float
    minutes: float
    requests: int
    overrides: list[str]
    bound: Bound | None = None

    def in_turn(self, what: str, service: Service, measure: Callable[[], float]) -> tuple[list[float], list[float]]:
        """Return ROUNDS measurements, and the bound's before, between and after them, if it is asked at all."""
        own, bare = list[float](), list[float]()
        for turn in range(ROUNDS + 1):
            if self.bound:
                with service.stopped():
                    bare.append(self.bound.ask(what, min(LONGEST_STOP, self.seconds / 3)))
                time.sleep(0.5)
            if turn < ROUNDS:
                own.append(measure())
        return own, bare

    @contextmanager
    def service(self, layout: str, replicas: int, current: bool) -> Iterator[Service]:
        """Serve on a cluster that lives as long as the context; `current`: whatever index is published, as it changes.

        It has answered for a while when the context begins.
        """
        ports = ["serve.port=0", "serve.keep_up=false", "serve.keys=false"]
        for part in ("ingress", "encoder", "shard"):
            ports += [f"serve.{part}.min_replicas={replicas}", f"serve.{part}.max_replicas={replicas}"]
        index = "current" if current else self.index
        asked = [f"data={self.data}", f"workspace={self.workspace}", f"serve.layout={layout}", f"serve.index={index}"]
        with LocalCluster(self.workspace / "logs") as cluster:
            report = cluster.submit(
                "serve", ["--config", str(CONFIG), *asked, *ports, *LAYOUTS[layout], *self.overrides]
            )
            service = Service(report["url"], cluster.mark)
            closed_loop(service.search, self.photos, 8, max(2, self.seconds / 2))
            yield service


def show(label: str, **figures: Any) -> None:
    shown = "".join(
        f"  {name} {value:.1f}" if isinstance(value, float) else f"  {name} {value}" for name, value in figures.items()
    )
    print(f"{label:60}{shown}", flush=True)


# Parts ---------------------------------------------------------------------------------------------------------------


def one(bench: Bench, service: Service) -> Figures:
    """Measure one client in turn with the bound."""
    rounds: list[dict[str, float]] = []

    def p50() -> float:
        rounds.append(closed_loop(service.search, bench.photos, 1, bench.seconds / 3))
        return rounds[-1]["p50"]

    own, bare = bench.in_turn("one", service, p50)
    best = min(rounds, key=lambda each: each["p50"])
    show("one client", **{name: best[name] for name in ("p50", "p90", "p99")}, each=rounded(own), bound=rounded(bare))
    figures: Figures = {f"one_{name}_ms": best[name] for name in ("p50", "p90", "p99")}
    if bare:
        over = [mine - (bare[n] + bare[n + 1]) / 2 for n, mine in enumerate(own)]
        figures |= {"p50_overhead_ms": statistics.median(over), "p50_overhead_ms_each": over, "one_bound_ms": bare}
    return {**figures, "one_lost": sum(each["lost"] for each in rounds)}


def saturation(bench: Bench, service: Service) -> Figures:
    """Find the number of clients that gets the most answers; measure with it, in turn with the bound, and the CPU
    time of it."""
    tried = {}
    for clients in CLIENTS:
        found = closed_loop(service.search, bench.photos, clients, max(1, bench.seconds / 3))
        tried[clients] = found["qps"]
        show(f"{clients} clients", **{name: found[name] for name in ("qps", "p50", "p99", "refused", "lost")})
    best = max(tried, key=lambda clients: tried[clients])
    cpu: list[Figures] = []

    def qps() -> float:
        before = service.cpu()
        found = closed_loop(service.search, bench.photos, best, bench.seconds / 3)
        used = spent(before, service.cpu())
        cpu.append({kind: 1000 * seconds / found["requests"] for kind, seconds in used.items()})
        return found["qps"]

    own, bare = bench.in_turn("many", service, qps)
    with running(service.search, bench.photos, clients=best) as load:
        time.sleep(bench.seconds)
    latencies = load.replies.quantiles()
    show(f"saturation, {best} clients", qps=max(own), each=rounded(own), bound=rounded(bare), **latencies)
    figures: Figures = {"saturation_qps": statistics.median(own), "saturation_clients": best}
    if bare:
        ratios = [mine / ((bare[n] + bare[n + 1]) / 2) for n, mine in enumerate(own)]
        figures |= {"throughput_ratio": statistics.median(ratios), "throughput_ratio_each": ratios}
        figures |= {"saturation_bound_qps": bare}
    return {
        **figures,
        "saturation_qps_each": own,
        "saturation_p99_ms": latencies["p99"],
        "cpu_ms_per_query": statistics.median(sum(each.values()) for each in cpu),
        "cpu_ms_by_part": {kind: statistics.median(each.get(kind, 0) for each in cpu) for kind in cpu[-1]},
        "idle_cpu": idle_cpu(service, bench.seconds / 3),
    }


def idle_cpu(service: Service, seconds: float) -> float:
    """Return the share of the machine that a service takes which nobody asks."""
    time.sleep(1)
    before = service.cpu()
    time.sleep(seconds)
    return spent(before, service.cpu()).total() / seconds / (os.cpu_count() or 1)


def spent(before: dict[tuple[str, int], float], after: dict[tuple[str, int], float]) -> Counter[str]:
    """Return CPU seconds by what took them."""
    total: Counter[str] = Counter()
    for (kind, number), seconds in after.items():
        total[kind] += seconds - before.get((kind, number), seconds)  # type: ignore[assignment]
    return total


def rates(bench: Bench, service: Service, most: float) -> Figures:
    figures: Figures = {}
    for name, share, poisson in (("half", 0.5, False), ("half_random", 0.5, True), ("ninety", 0.9, False)):
        tried = [at_rate(service.search, bench.photos, share * most, bench.seconds, poisson) for _ in range(TRIES)]
        replies = sorted(tried, key=lambda each: each.quantiles()["p99"])[TRIES // 2]
        figures |= {f"{name}_{key}_ms": value for key, value in replies.quantiles().items()}
        show(f"{share:.0%} of saturation{', at random moments' * poisson}", **told(replies))
    return {
        **figures,
        "p99_over_p50_at_half": figures["half_p99_ms"] / figures["half_p50_ms"],
        "p99_over_p50_at_half_random": figures["half_random_p99_ms"] / figures["half_random_p50_ms"],
    }


def overload(bench: Bench, service: Service, most: float, saturated_p99: float) -> Figures:
    replies = at_rate(service.search, bench.photos, 2 * most, bench.seconds)
    refused = replies.ms[replies.status == 503]
    accepted = int((replies.status == 200).sum())
    soon = statistics.median(refused.tolist()) if len(refused) else None
    show("200 % of saturation", **told(replies), refused_p50=soon)
    return {
        "overload_p99_ms": replies.quantiles()["p99"],
        "overload_p99_ratio": replies.quantiles()["p99"] / saturated_p99,
        "overload_statuses": replies.statuses,
        "overload_other_errors": replies.failed - len(refused),
        "overload_accepted_share": accepted / len(replies.status),
        "overload_refused_p50_ms": soon,
    }


def swap(bench: Bench, service: Service, most: float, inputs: Inputs) -> Figures:
    """Publish another model's index and then the first again, under load."""
    rate = CHANGED_AT * most
    with running(service.search, bench.photos, rate=rate) as load:
        time.sleep(1)
        took = []
        for index in (inputs.other, inputs.index):
            began = time.monotonic()
            serve_index(bench.data, bench.workspace, index)
            until(partial(service.serves, index), SWAP_S)
            took.append(time.monotonic() - began)
            time.sleep(2)
        until(lambda: load.elapsed() * rate > 1.05 * bench.requests, float("inf"))
    replies, pairs = load.replies, inputs.pairs(bench.workspace)
    said = [version for version, status in zip(replies.version, replies.status, strict=True) if status == 200]
    wrong, seen = sum(version not in pairs for version in said), len(pairs & set(said))
    show("swap, and back", **told(replies), seconds=rounded(took), wrong=wrong, versions=seen)
    return {
        "swap_failed": replies.failed + wrong,
        "swap_wrong_pairs": wrong,
        "swap_statuses": replies.statuses,
        "swap_requests": len(replies.status),
        "swap_versions": seen,
        "swap_seconds": took,
        "swap_p99_ms": replies.quantiles()["p99"],
    }


def memory(bench: Bench, service: Service, most: float) -> Figures:
    """Watch resident memory at half load, once it has been at it for a while."""
    seen: list[tuple[float, float, float]] = []
    warm, until_s = 60 * min(2, bench.minutes / 4), 60 * bench.minutes
    with running(service.search, bench.photos, rate=most / 2) as load:
        time.sleep(warm)
        while load.elapsed() < warm + until_s:
            seen.append((load.elapsed(), service.memory(SERVICE), service.memory()))
            time.sleep(max(1, until_s / 200))
    edge = max(1, len(seen) // 10)
    growth = [
        statistics.median(row[column] for row in seen[-edge:]) - statistics.median(row[column] for row in seen[:edge])
        for column in (1, 2)
    ]
    scaled = [each * 10 / bench.minutes for each in growth]
    show(
        f"memory, {bench.minutes:g} minutes at half load",
        growth_mb=growth[0],
        with_ray_mb=growth[1],
        of=seen[-1][1],
        failed=load.replies.failed,
    )
    return {
        "rss_growth_mb_10min": scaled[0],
        "rss_growth_mb_10min_with_ray": scaled[1],
        "rss_mb": seen[-1][1],
        "rss_minutes": bench.minutes,
        "rss_failed": load.replies.failed,
    }


def kill(bench: Bench, service: Service, most: float) -> Figures:
    """Kill a replica of each part, one part after the other."""
    figures: Figures = {"kill_failed": 0, "kill_requests": 0, "kill_parts": {}}
    for part in replicas(service):
        replies, seconds = kill_one(bench, service, part, CHANGED_AT * most)
        show(f"kill -9 of one of two {part}", **told(replies), replaced_s=seconds)
        figures["kill_failed"] += replies.failed
        figures["kill_requests"] += len(replies.status)
        figures["kill_parts"][part] = {"statuses": replies.statuses, "degraded": replies.degraded, "seconds": seconds}
    return figures


def kill_one(bench: Bench, service: Service, part: str, rate: float) -> tuple[Replies, float]:
    """Kill a replica of a part under load; return the replies, and the seconds until another was in its place."""

    def loaded(requests: float) -> None:
        until(lambda: load.elapsed() * rate > requests, float("inf"))

    with running(service.search, bench.photos, rate=rate) as load:
        loaded(bench.requests / 4)
        before = replicas(service)[part]
        os.kill(before[0], signal.SIGKILL)
        killed = load.elapsed()
        until(lambda: len({*replicas(service).get(part, [])} - {before[0]}) >= len(before), REPLACED_S)
        seconds = load.elapsed() - killed
        time.sleep(5)  # it starts, and is told to who asks
        loaded(1.05 * bench.requests)
    return load.replies, seconds


def replicas(service: Service) -> dict[str, list[int]]:
    """Return the processes of the replicas by part; of shards those of the first."""
    found: dict[str, list[int]] = {}
    for number, process in service.processes((REPLICA,)).items():
        with suppress(psutil.Error):
            found.setdefault(part_of(" ".join(process.cmdline())), []).append(number)
    shards = sorted(name for name in found if name.startswith("shard"))
    return {name: found[name] for name in ("Ingress", "QueryEncoder", *shards[:1]) if name in found}


def part_of(command: str) -> str:
    """Return which deployment the process of a replica belongs to, nothing for another process."""
    found = re.match(rf"{REPLICA}[^:]+:([^:. ]+)", command)
    return found[1] if found else ""


def clip(bench: Bench, service: Service) -> Figures:
    """Ask clip-retrieval's backend for what is near vectors, and this service for what is near items: it looks their
    vectors up, and is not sent them."""
    folder = bench.workspace / "clip" / bench.index
    try:
        python = environment(bench.workspace / "clip/environment")
    except (subprocess.CalledProcessError, OSError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        print(f"clip-retrieval does not install: {reason}")
        return {"clip_reason": reason}
    asked = write_index(bench.workspace, bench.index, folder)
    own = folder / "items"
    own.mkdir(exist_ok=True)
    (own / "names").write_text("".join(f"/v1/items/{quote(item)}/similar?k=10\n" for item in asked))
    figures = by_vector(bench, service.url, own, "vector")
    try:
        with backend(python, folder, free_port("127.0.0.1", 0), bench.workspace / "logs/clip.log") as url:
            figures |= by_vector(bench, url, folder / "queries", "clip")
    except RuntimeError as error:
        print(f"clip-retrieval: {error}")
        return {**figures, "clip_reason": str(error)}
    return {**figures, "clip_qps_ratio": figures["vector_qps"] / figures["clip_qps"]}


def by_vector(bench: Bench, url: str, queries: Path, name: str) -> Figures:
    alone = closed_loop(url, queries, 1, bench.seconds / 2)
    found = [closed_loop(url, queries, clients, bench.seconds / 2) for clients in (8, 16)]
    best = max(found, key=lambda each: each["qps"])
    label = "clip-retrieval's backend, by vector" if name == "clip" else "items like an item"
    show(label, qps=best["qps"], p50_of_one=alone["p50"], refused=best["refused"], lost=best["lost"])
    return {f"{name}_qps": best["qps"], f"{name}_p50_ms": alone["p50"]}


def told(replies: Replies) -> Figures:
    late = round(float(sorted(replies.late_ms)[int(0.99 * len(replies.late_ms))]), 1) if len(replies.late_ms) else None
    more: Figures = {"degraded": replies.degraded} if replies.degraded else {}
    if replies.untouched:
        more["untouched"] = replies.untouched
    return {**replies.quantiles(), "statuses": replies.statuses, **more, "generator_late_p99": late}


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition, but not for ever: what did not come about shows in the figures."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


# Runs ----------------------------------------------------------------------------------------------------------------


def measure(bench: Bench, layout: str, parts: set[str], inputs: Inputs | None) -> Figures:
    """Measure the parts of one layout; with `inputs` those too that publish."""
    figures: Figures = {}
    probed = parts & {"rates", "overload", "swap", "memory", "kill"}
    if parts - {"bound", "kill"}:
        with bench.service(layout, 1, current=inputs is not None) as service:
            if "one" in parts:
                figures |= one(bench, service)
            if "saturation" in parts or probed:
                figures |= saturation(bench, service)
            most = figures.get("saturation_qps", 0.0)
            if "rates" in parts:
                figures |= rates(bench, service, most)
            if "overload" in parts:
                figures |= overload(bench, service, most, figures["saturation_p99_ms"])
            if "swap" in parts and inputs:
                figures |= swap(bench, service, most, inputs)
            if "clip" in parts and layout == "beside":
                figures |= clip(bench, service)
            if "memory" in parts:
                figures |= memory(bench, service, most)
    if "kill" in parts:
        most = figures.get("saturation_qps", 0.0)
        with bench.service(layout, 2, current=inputs is not None) as service:
            most = most or saturation(bench, service)["saturation_qps"]
            figures |= kill(bench, service, most)
    return figures


def compare(bench: Bench, layouts: list[str], parts: set[str], inputs: Inputs | None) -> Figures:
    """Measure layouts, and the bare process before and after them."""
    figures: Figures = {}
    try:
        if "bound" in parts:
            bench.bound = Bound(bench.workspace, bench.index, bench.photos, max(0.3, bench.seconds / 10))
            figures |= {"bound_settings": bench.bound.settings, "bound_qps": [], "bound_p50_ms": []}
            ask_alone(bench, bench.bound, figures)
        for layout in layouts:
            print(f"\n{layout}: index {bench.index}")
            suffix = "" if layout == "beside" else f"_{layout}"
            found = measure(bench, layout, parts, inputs)
            figures |= {f"{name}{suffix}": value for name, value in found.items()}
        if bench.bound:
            ask_alone(bench, bench.bound, figures)
    finally:
        if bench.bound:
            bench.bound.end()
    return figures


def ask_alone(bench: Bench, bound: Bound, figures: Figures) -> None:
    """Add what the bare process does while nothing else runs."""
    figures["bound_qps"] += [bound.ask("many", bench.seconds / 3) for _ in range(2)]
    figures["bound_p50_ms"] += [bound.ask("one", bench.seconds / 3) for _ in range(2)]
    (workers, threads, batch), _ = bound.settings.values()
    label = f"bound: {workers} workers, {threads} threads, batches of {batch}"
    show(label, qps=max(figures["bound_qps"][-2:]), p50=min(figures["bound_p50_ms"][-2:]))


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def some_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return what reads names with commas between them."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(known)}")
        return names

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workspace", type=Path, default=Path("workspace/serving"), help="keeps what was made")
    parser.add_argument("--only", type=some_of(PARTS), default=PARTS, metavar="PART,PART", help="default: all")
    parser.add_argument("--layouts", type=some_of(tuple(LAYOUTS)), default=[*LAYOUTS], metavar=",".join(LAYOUTS))
    parser.add_argument("--galleries", type=some_of(GALLERIES), default=GALLERIES, metavar=",".join(GALLERIES))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10, help="of one measurement")
    parser.add_argument("--minutes", type=float, default=10, help="for which memory is watched")
    parser.add_argument("--requests", type=int, default=2000, help="at least, while versions swap and replicas die")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as serve.max_batch=16")
    arguments = parser.parse_intermixed_args()
    parts = set(arguments.only)
    os.environ.setdefault("RAY_worker_niceness", "0")  # as cluster/kuberay/service.yaml has it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave the contexts, and with them end what was started
    data, workspace = arguments.data.resolve(), arguments.workspace.resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    photos = workspace / "photos-jpeg"
    count, size = write_photos(data, photos)
    inputs = prepare_inputs(data, workspace, arguments.vectors if "vectors" in arguments.galleries else 0)
    commit, machine = versions.commit(os.path.dirname(__file__)), f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"{machine}, commit {commit}; {count} photos, JPEGs of {size / 1000:.0f} kB on average")
    settings = (arguments.seconds, arguments.minutes, arguments.requests, arguments.overrides)
    figures: Figures = {}
    if "catalogue" in arguments.galleries:
        figures = compare(Bench(data, workspace, photos, inputs.index, *settings), arguments.layouts, parts, inputs)
    if "vectors" in arguments.galleries and inputs.many and (few := parts & set(ON_MANY)):
        bench = Bench(data, workspace, photos, inputs.many, *settings)
        figures["million"] = compare(bench, arguments.layouts, few, None)
        items = read_manifest(open_storage(str(workspace)), inputs.many)
        figures["million"] |= {"items": items.items, "factory": items.factory, "search": items.search}
    report = {**figures, "photos": count, "photo_kb": size / 1000, "parts": sorted(parts), "seconds": arguments.seconds}
    print(json.dumps(rounded({**report, "commit": commit, "machine": machine})))


if __name__ == "__main__":
    main()
