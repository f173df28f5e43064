"""Time and memory of a step of the class-sharded softmax, beside a dense one and torch's own cross-entropy.

    .venv/bin/python benchmarks/softmax.py [--classes 100000 1000000 10000000] [--rates 1 0.1 0.01]
    .venv/bin/python benchmarks/softmax.py --device cuda --batch 4096

A step is a batch of unit embeddings with random labels: forward, backward and the optimizer's step on the classes.
Every case runs in processes of its own; seconds are the median of its steps, memory is the peak of a worker (VmHWM), or
on a GPU of what torch allocated there. On a GPU there is one worker.
The dense reference samples and learns as Partial FC's published code does: the greatest of random numbers over all
classes are drawn, gradient, momentum and weight decay touch every class. Where classes x dim do not fit into it, it is
left out. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

from mixer.row_adam import RowAdam
from mixer.softmax import ShardedMarginSoftmax, fixed_scale
from mixer.targets import Targets
from mixer_platform import versions

MARGIN, LR, DECAY = 0.3, 1e-2, 1e-4
CHUNK = 8192  # classes whose logits exist at once
DENSE_MOST = 3e8  # numbers in the weight of a reference: it holds three such tensors and more
Step = Callable[[int, Tensor, Tensor], None]  # its number, embeddings [samples, dim] and labels [samples]


@dataclass(frozen=True)
class Case:
    """One row of the table; `threads` are those of each worker."""

    method: str
    classes: int
    dim: int
    rate: float
    workers: int = 1
    threads: int = 2
    device: str = "cpu"
    batch: int = 128


def mixer(case: Case, precision: Any) -> Step:
    """The product's softmax and optimizer."""
    head = ShardedMarginSoftmax(
        case.dim,
        case.classes,
        MARGIN,
        fixed_scale(case.classes),
        rate=case.rate,
        precision=precision,
        chunk=CHUNK,
    ).to(case.device)
    head.weight.normal_(0, 0.01)
    head.optimizer = RowAdam(head.weight, LR, DECAY)

    def step(number: int, embeddings: Tensor, labels: Tensor) -> None:
        head.begin_step(0, number)
        head(embeddings, Targets.certain(labels)).backward()

    return step


def dense(case: Case, half: bool = False) -> Step:
    """Sampling and learning over all classes, in one process (arXiv 2203.15565); in bf16 by autocast, if `half`."""
    weight = torch.nn.Parameter(torch.randn(case.classes, case.dim, device=case.device) * 0.01)
    optimizer = torch.optim.SGD([weight], lr=LR, momentum=0.9, weight_decay=DECAY)
    scale = fixed_scale(case.classes)

    def step(number: int, embeddings: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        rows: Tensor = weight
        if case.rate < 1:
            chances = torch.rand(case.classes, device=case.device)
            chances[labels] = 2
            index = chances.topk(int(case.rate * case.classes)).indices.sort().values
            labels, rows = torch.searchsorted(index, labels), weight[index]
        with torch.autocast(case.device, torch.bfloat16, enabled=half):
            cosines = embeddings @ F.normalize(rows, dim=1).T
        cosines = cosines.float()
        cosines[torch.arange(case.batch), labels] -= MARGIN
        F.cross_entropy(scale * cosines, labels).backward()
        optimizer.step()

    return step


def cross_entropy(case: Case) -> Step:
    """torch.nn.functional.cross_entropy over all classes, without a margin and without normalised classes."""
    weight = torch.nn.Parameter(torch.randn(case.classes, case.dim, device=case.device) * 0.01)
    optimizer = torch.optim.SGD([weight], lr=LR, momentum=0.9, weight_decay=DECAY)

    def step(number: int, embeddings: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(embeddings @ weight.T, labels).backward()
        optimizer.step()

    return step


METHODS: dict[str, Callable[[Case], Step]] = {
    "mixer, bf16 products": lambda case: mixer(case, "bf16"),
    "mixer, fp32": lambda case: mixer(case, "fp32"),
    "dense, fp32": dense,
    "cross-entropy, fp32": cross_entropy,
    "dense, bf16 products": lambda case: dense(case, half=True),
}
MIXER, EXACT, DENSE, PLAIN, HALF = METHODS


def batch(case: Case, number: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return one worker's embeddings and labels of a step."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    embeddings = F.normalize(torch.randn(case.batch // case.workers, case.dim, generator=generator), dim=1)
    labels = torch.randint(case.classes, (len(embeddings),), generator=generator)
    return embeddings.to(case.device).requires_grad_(), labels.to(case.device)


def finish(case: Case) -> None:
    """Wait for what a GPU still has to do."""
    if case.device != "cpu":
        torch.cuda.synchronize()


def classifier_bytes(owned: float, rate: float, samples: float, dim: int) -> float:
    """Return the bytes of a worker that owns so many classes, beside Python and its libraries; see docs/scaling.md.

    `samples` are those of all workers.
    """
    drawn = 0 if rate == 1 else rate * owned + samples
    return owned * (8 * dim + 8) + 17 / 16 * drawn * (8 * dim + 40) + CHUNK * 12 * (samples + dim)


def status(name: str) -> int:
    """Return a size of this process in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def worker(rank: int, case: Case, folder: str) -> None:
    """Measure one worker's steps; the first one is not counted."""
    torch.set_num_threads(case.threads)
    if case.workers > 1:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=case.workers)
    before = status("VmRSS") if case.device == "cpu" else 0
    seconds: list[float] = []
    try:
        step = METHODS[case.method](case)
        while len(seconds) < 4 or (sum(seconds[1:]) < 2 and len(seconds) < 12):
            given = batch(case, len(seconds), rank)
            finish(case)
            began = time.perf_counter()
            step(len(seconds), *given)
            finish(case)
            seconds.append(time.perf_counter() - began)
            if case.workers > 1:  # all stop after the same step
                longest = torch.tensor(seconds[-1])
                dist.all_reduce(longest, dist.ReduceOp.MAX)
                seconds[-1] = float(longest)
    except torch.OutOfMemoryError:  # of a GPU; without one the process would be killed
        if case.workers > 1:  # others would wait for this one
            raise
        seconds = []
    peak = status("VmHWM") if case.device == "cpu" else torch.cuda.max_memory_allocated()
    found = {"seconds": statistics.median(seconds[1:]) if seconds else None, "peak": peak, "before": before}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    if case.workers > 1:
        dist.destroy_process_group()


def measure(case: Case) -> dict[str, float] | None:
    """Run one case in processes of its own; return seconds a step and the largest worker's memory in GB, None if a GPU
    has too little."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--case", json.dumps(asdict(case)), "--folder", folder], check=True)
        ranks = []
        for rank in range(case.workers):
            with open(f"{folder}/{rank}.json") as file:
                ranks.append(json.load(file))
    if any(found["seconds"] is None for found in ranks):
        return None
    largest = max(ranks, key=lambda found: found["peak"])
    expected = classifier_bytes(-(-case.classes // case.workers), case.rate, case.batch, case.dim)
    return {
        "seconds": ranks[0]["seconds"],
        "gb": largest["peak"] / 1e9,
        "over_formula": largest["peak"] / (largest["before"] + expected) if "mixer" in case.method else 0.0,
    }


def cases(classes: list[int], rates: list[float], gpu: bool) -> list[Case]:
    """Return the rows of the table, references beside what they are compared with."""
    rows = []
    for count in classes:
        dim = 256 if count <= 1_000_000 else 128
        for rate in rates:
            rows += [Case(MIXER, count, dim, rate), Case(EXACT, count, dim, rate)]
            if count * dim <= DENSE_MOST:
                rows += [Case(method, count, dim, rate) for method in ((DENSE, HALF) if gpu else (DENSE,))]
                if rate == 1:
                    rows.append(Case(PLAIN, count, dim, rate))
            if not gpu:
                rows += [Case(MIXER, count, dim, rate, 1, 1), Case(MIXER, count, dim, rate, 2, 1)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 0.1, 0.01])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=128, help="samples a step")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case = Case(**json.loads(arguments.case))
        torch.multiprocessing.spawn(worker, (case, arguments.folder), nprocs=case.workers)
        return
    heads = ("classes", "dim", "rate", "workers", "threads", "s a step", "samples/s", "GB a worker", "of formula")
    print(f"{'':22}" + "".join(f"{head:>12}" for head in heads))
    gpu = arguments.device != "cpu"
    where: dict[str, Any] = {"device": arguments.device, "batch": arguments.batch}
    wanted = cases(arguments.classes, arguments.rates, gpu)
    if 1_000_000 in arguments.classes and 10_000_000 in arguments.classes:  # the same dim and number of rows drawn
        wanted += [Case(MIXER, 1_000_000, 128, 0.1), Case(MIXER, 10_000_000, 128, 0.01)]
    measured = {case: show(replace(case, **where)) for case in dict.fromkeys(wanted)}
    found = {case: figures for case, figures in measured.items() if figures}
    report = {
        **ratios(found),
        "commit": versions.commit(os.path.dirname(__file__)),
        "machine": f"{machine(gpu)}, torch {torch.__version__}",
        "batch": arguments.batch,
    }
    print(json.dumps(report))


def machine(gpu: bool) -> str:
    return torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} cores, {platform.machine()}"


def show(case: Case) -> dict[str, float] | None:
    """Measure a case and print its row."""
    found = measure(case)
    cells = [f"{case.classes:,}", case.dim, f"{case.rate:g}", case.workers, case.threads]
    if found:
        cells += [f"{found['seconds']:.3f}", f"{case.batch / found['seconds']:.0f}", f"{found['gb']:.2f}"]
        cells += [f"{found['over_formula']:.2f}" if found["over_formula"] else ""]
    else:
        cells.append("no memory")
    print(f"{case.method:22}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    return found


def ratios(found: dict[Case, dict[str, float]]) -> dict[str, float]:
    """Return how the cases compare: speed and memory over the dense reference, workers, and classes."""
    report: dict[str, float] = {}

    def compare(name: str, what: str, over: Case, under: Case) -> None:
        if over in found and under in found:
            report[name] = round(found[over][what] / found[under][what], 3)

    for count, label in ((100_000, "100k"), (1_000_000, "1m")):
        for rate, suffix in ((1, "r1"), (0.1, "r01"), (0.01, "r001")):
            ours, exact, theirs = (Case(method, count, 256, rate) for method in (MIXER, EXACT, DENSE))
            compare(f"speedup_{label}_{suffix}", "seconds", theirs, ours)
            compare(f"speedup_{label}_{suffix}_fp32", "seconds", theirs, exact)
            compare(f"speedup_{label}_{suffix}_bf16", "seconds", Case(HALF, count, 256, rate), ours)
            compare(f"memory_ratio_{label}_{suffix}", "gb", ours, theirs)
        compare(f"speedup_{label}_cross_entropy", "seconds", Case(PLAIN, count, 256, 1), Case(MIXER, count, 256, 1))
    for rate, suffix in ((1, ""), (0.1, "_r01")):
        pair = (Case(MIXER, 1_000_000, 256, rate, workers, 1) for workers in (1, 2))
        compare(f"scaling_2_workers{suffix}", "seconds", *pair)
    same_rows = (Case(MIXER, 10_000_000, 128, 0.01), Case(MIXER, 1_000_000, 128, 0.1))
    compare("seconds_10m_over_1m_same_rows", "seconds", *same_rows)
    if same_rows[0] in found:
        report["memory_over_formula_10m"] = round(found[same_rows[0]]["over_formula"], 3)
    return report


if __name__ == "__main__":
    main()
