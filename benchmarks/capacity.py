"""What a training run and a service need: memory, network, GPUs, hours and nodes, from the sizes of the problem.

    .venv/bin/python benchmarks/capacity.py --classes 100e6 --samples 10e9 --items 1e9 --queries 5000 --machine h100

Bytes follow the formulas of docs/scaling.md, which benchmarks/softmax.py holds against measured peaks. Seconds are
arithmetic and memory traffic over what a GPU is sold with, times the share of its own that the product's softmax
reaches on this machine, measured in the same run, times `--reach` of what is sold. Nothing here was measured on a GPU.
Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from softmax import CHUNK, classifier_bytes

from mixer.fast_faiss import faiss
from mixer.row_adam import RowAdam
from mixer.softmax import ShardedMarginSoftmax, fixed_scale
from mixer.targets import Targets
from mixer_platform import versions

NAMED = 8  # classes that a sample names, on average
SPARE = 0.85  # share of memory that is planned with
CODE = 64 + 8 + 8  # bytes a vector in an index: 128 codes of 4 bits, its id, and its share of lists
LISTS_VISITED = 1e-3  # share of an index's vectors that a query looks at


@dataclass(frozen=True)
class Machine:
    """One GPU as it is sold: bytes of memory, dense 16-bit operations, bytes a second of memory and of network."""

    memory: float
    operations: float
    bandwidth: float
    network: float


MACHINES = {
    "v100": Machine(32e9, 125e12, 0.9e12, 12.5e9),
    "a100": Machine(80e9, 312e12, 2.0e12, 25e9),
    "h100": Machine(80e9, 989e12, 3.35e12, 50e9),
}


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second, or a share of them."""

    operations: float
    bandwidth: float


@dataclass(frozen=True)
class Run:
    """What is trained. rate: share of the classes that a step draws. batch: samples a GPU brings to it. forward:
    operations of the towers' forward pass of a sample; activations: bytes of it that wait for the backward pass."""

    classes: float
    samples: float
    dim: int
    rate: float
    batch: int
    parameters: float
    forward: float
    activations: float

    def memory(self, workers: int) -> float:
        """Return the bytes of a worker: its classes, those drawn, a chunk of logits, and the towers."""
        classes = classifier_bytes(self.classes / workers, self.rate, self.batch * workers, self.dim)
        return classes + 16 * self.parameters + self.activations * self.batch

    def network(self, workers: int) -> float:
        """Return the bytes that a worker receives in a step; a ring passes what is summed twice."""
        whole = self.batch * workers
        gathered, summed = self.dim + 3 * NAMED + 2, self.dim + 1 + NAMED
        return 4 * (whole * gathered + 2 * whole * summed + 2 * self.parameters) if workers > 1 else 0.0

    def seconds(self, workers: int, machine: Machine, reach: float, share: Rates) -> dict[str, float]:
        """Return the seconds of a step, by part: of what a machine is sold with, `reach` is to be had; of that, the
        softmax gets its `share`."""
        drawn = self.rate * self.classes / workers
        arithmetic = products(self.batch * workers, drawn, self.dim) / (share.operations * machine.operations)
        copies = traffic(drawn, self.dim) / (share.bandwidth * machine.bandwidth)
        return {
            "softmax": (arithmetic + copies) / reach,
            "towers": 3 * self.forward * self.batch / machine.operations / reach,
            "network": self.network(workers) / machine.network / reach,
        }


def products(samples: float, drawn: float, dim: int) -> float:
    """Return the operations of a step of the softmax: logits twice, gradients of the embeddings and of the classes."""
    return 4 * 2 * samples * drawn * dim


def traffic(drawn: float, dim: int) -> float:
    """Return the bytes of weights and moments that a step copies, reads, steps and puts back."""
    return 10 * 4 * drawn * dim


def measured(classes: int = 500_000, dim: int = 256, rate: float = 0.1) -> tuple[Rates, Rates]:
    """Return what this machine's matrix product and copy reach, and what the softmax reaches of both.

    The softmax's time grows with the batch by its arithmetic; what is left of it at an empty batch is its traffic.
    """
    left, right = torch.randn(256, dim).bfloat16(), torch.randn(CHUNK, dim).bfloat16()
    source, copy = torch.randn(2**24), torch.empty(2**24)
    bare = Rates(
        2 * 256 * CHUNK * dim / fastest(lambda _: left @ right.T),
        2 * 4 * len(source) / fastest(lambda _: copy.copy_(source)),
    )
    head = ShardedMarginSoftmax(dim, classes, 0.3, fixed_scale(classes), rate=rate, precision="bf16")
    head.weight.normal_(0, 0.01)
    head.optimizer = RowAdam(head.weight, 1e-2, 1e-4)

    def step(batch: int) -> Callable[[int], None]:
        def once(number: int) -> None:
            head.begin_step(0, number)
            embeddings = F.normalize(torch.randn(batch, dim), dim=1).requires_grad_()
            head(embeddings, Targets.certain(torch.randint(classes, (batch,)))).backward()

        return once

    few, many = fastest(step(64)), fastest(step(512))
    drawn = rate * classes
    a_sample = (many - few) / (512 - 64)
    if a_sample <= 0:
        raise SystemExit("this machine is too busy to measure on: eight times the batch took no longer")
    return bare, Rates(products(1, drawn, dim) / a_sample, traffic(drawn, dim) / max(few - 64 * a_sample, 1e-9))


def fastest(action: Callable[[int], object], times: int = 7) -> float:
    """Return the seconds of the fastest of some runs; the first does not count."""
    seconds = []
    for number in range(times + 1):
        began = time.perf_counter()
        action(number)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def scanned_a_second(count: int = 400_000, dim: int = 256) -> float:
    """Return the vectors of an IVF with 4-bit codes that one core looks at in a second."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((count, dim), dtype=np.float32)
    index = faiss.index_factory(dim, "IVF256,PQ128x4fs")
    threads = faiss.omp_get_max_threads()
    index.train(vectors[:50_000])
    index.add(vectors)
    faiss.omp_set_num_threads(1)
    faiss.extract_index_ivf(index).nprobe = 64
    seconds = fastest(lambda _: index.search(vectors[:256], 10), times=3)
    faiss.omp_set_num_threads(threads)
    return 256 * count * 64 / 256 / seconds


def training(run: Run, machine: Machine, reach: float, share: Rates, gpus: int | None) -> dict[str, float]:
    """Return the fewest GPUs, a power of two, that hold the run (or `gpus`), and what a step and all samples take."""
    workers = gpus or next((n for n in (2**k for k in range(17)) if run.memory(n) < SPARE * machine.memory), 0)
    if not workers:
        raise SystemExit(f"--batch {run.batch}: the towers' activations and a chunk of logits alone do not fit a GPU")
    parts = run.seconds(workers, machine, reach, share)
    speed = run.batch * workers / sum(parts.values())
    found = {"gpus": workers, "gb_a_gpu": run.memory(workers) / 1e9, "network_mb_a_step": run.network(workers) / 1e6}
    found |= {f"{name}_ms": 1e3 * seconds for name, seconds in parts.items()}
    return found | {"samples_a_second": speed, "training_hours": run.samples / speed / 3600}


def serving(items: float, queries: float, scanned: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Return nodes for the index, each shard twice, and for encoding photos, at most 60 % busy."""
    shards = math.ceil(items * CODE / (SPARE * arguments.node_gb * 1e9))
    search_cores = queries * items * LISTS_VISITED / scanned / 0.6
    encode_cores = queries * arguments.encode_ms / 1e3 / 0.6
    return {
        "shards": shards,
        "index_gb": items * CODE / 1e9,
        "search_nodes": max(2 * shards, math.ceil(search_cores / arguments.node_cores)),
        "encode_nodes": max(2, math.ceil(encode_cores / arguments.node_cores)),
        "search_ms_a_shard": 1e3 * items / shards * LISTS_VISITED / scanned,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=float, default=100e6)
    parser.add_argument("--samples", type=float, default=10e9)
    parser.add_argument("--items", type=float, default=1e9)
    parser.add_argument("--queries", type=float, default=5000, help="a second")
    parser.add_argument("--machine", choices=MACHINES, default="h100")
    parser.add_argument("--gpus", type=int, help="default: the fewest that hold the run")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.1, help="share of the classes that a step draws")
    parser.add_argument("--batch", type=int, default=128, help="samples a GPU brings to a step")
    parser.add_argument("--parameters", type=float, default=86e6, help="of the towers; default: a ViT-B/16")
    parser.add_argument("--forward", type=float, default=35e9, help="operations of the towers on a sample, forward")
    parser.add_argument("--activations", type=float, default=70e6, help="bytes a sample in training")
    parser.add_argument("--reach", type=float, default=0.5, help="share of what a GPU is sold with")
    parser.add_argument("--node-gb", type=float, default=64, help="memory of a serving node")
    parser.add_argument("--node-cores", type=int, default=16)
    parser.add_argument("--encode-ms", type=float, default=7, help="to encode a photo on one core")
    arguments = parser.parse_args()
    names = ("classes", "samples", "dim", "rate", "batch", "parameters", "forward", "activations")
    run, machine = Run(**{name: getattr(arguments, name) for name in names}), MACHINES[arguments.machine]
    bare, ours = measured()
    share = Rates(min(1.0, ours.operations / bare.operations), min(1.0, ours.bandwidth / bare.bandwidth))
    scanned = scanned_a_second()
    report = {
        "here_gflops": bare.operations / 1e9,
        "here_gb_a_second": bare.bandwidth / 1e9,
        "softmax_share_of_gflops": share.operations,
        "softmax_share_of_bandwidth": share.bandwidth,
        "vectors_scanned_a_second": scanned,
        **training(run, machine, arguments.reach, share, arguments.gpus),
        **serving(arguments.items, arguments.queries, scanned, arguments),
    }
    for name, value in report.items():
        print(f"{name:32}{value:>20,.3g}" if value < 1000 else f"{name:32}{value:>20,.0f}")
    report = {name: float(f"{value:.4g}") for name, value in report.items()}
    where = {"commit": versions.commit(os.path.dirname(__file__)), "gpu": arguments.machine}
    print(json.dumps({**report, **where, "machine": f"{os.cpu_count()} cores, {platform.machine()}"}))


if __name__ == "__main__":
    main()
