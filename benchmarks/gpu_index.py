"""Training and filling an index with a GPU beside the same threads without one: what `index.builder_gpus` saves.

    .venv/bin/python benchmarks/gpu_index.py [--vectors 1000000] [--threads 8]

Vectors of 256 dimensions are drawn around 2,000 centres. Each kind is trained on 262,144 of them and filled with all,
in parts of 50,000, and its file is written; "exact" is a search of 200 queries. Recall@10 is with 32 lists visited and
no more found than is asked for, so that codes are judged without re-ranking. Without a GPU only the CPU is timed.
Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from mixer.fast_faiss import faiss, use_threads
from mixer.metrics import recall_of_neighbours
from mixer_platform import versions
from mixer_platform.errors import ConfigError
from mixer_platform.index.choose import exact_top_k
from mixer_platform.index.embeddings import embedding_column
from mixer_platform.index.gpu import GPU
from mixer_platform.index.segments import trained_template, write_segment

DIM, LISTS, PART, QUERIES = 256, 4096, 50_000, 200
KINDS = [f"IVF{LISTS},SQ8", f"IVF{LISTS},PQ128x4fs,Refine(SQ8)", f"IVF{LISTS},RaBitQ,Refine(SQ8)"]


def draw(count: int) -> np.ndarray:
    """Return unit vectors, float32 [count, DIM]."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2000, DIM), dtype=np.float32)
    parts = [
        centres[rng.integers(len(centres), size=size)] + 0.8 * rng.standard_normal((size, DIM), dtype=np.float32)
        for size in [PART] * (count // PART)
    ]
    vectors = np.concatenate(parts)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows_of(vectors: np.ndarray) -> list[pa.Table]:
    """Return rows of embeddings as a shard is built of."""
    tables = []
    for start in range(0, len(vectors), PART):
        ids = np.arange(start, start + PART)
        columns = {
            "id": ids,
            "item_id": pa.array(ids.astype(str)),
            "embedding": embedding_column(vectors[start:][:PART]),
        }
        tables.append(pa.table(columns))
    return tables


def measure(kind: str, vectors: np.ndarray, rows: list[pa.Table], gpu: GPU | None) -> dict[str, float]:
    """Return seconds of training, filling and exact search, and the recall."""
    queries, ids = vectors[:QUERIES], np.arange(len(vectors))
    began = time.perf_counter()
    template = trained_template(kind, DIM, vectors[: 64 * LISTS], gpu)
    trained = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        _, index = write_segment(Path(folder), "v", "shard-00000", template, rows, gpu=gpu)
    filled = time.perf_counter()
    _, exact = exact_top_k(queries, vectors, ids, 10, gpu)
    searched = time.perf_counter()
    faiss.try_extract_index_ivf(index).nprobe = 32
    recall = recall_of_neighbours(index.search(queries, 10)[1], exact)
    seconds = {"train": trained - began, "fill": filled - trained, "exact": searched - filled}
    return {**{name: round(value, 2) for name, value in seconds.items()}, "recall": round(float(recall), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="a multiple of 50,000")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU, with and without a GPU")
    arguments = parser.parse_args()
    if arguments.vectors <= 0 or arguments.vectors % PART:
        parser.error(f"--vectors {arguments.vectors}: not a multiple of {PART}")
    use_threads(arguments.threads)
    devices: dict[str, GPU | None] = {"cpu": None}
    try:
        devices["gpu"] = GPU()
    except ConfigError as error:
        print(error)
    vectors = draw(arguments.vectors)
    rows, found = rows_of(vectors), {}
    print(f"{'':34}{'':>5}" + "".join(f"{head:>10}" for head in ("train s", "fill s", "exact s", "recall")))
    for kind in KINDS:
        for device, gpu in devices.items():
            figures = found[f"{kind} {device}"] = measure(kind, vectors, rows, gpu)
            print(f"{kind:34}{device:>5}" + "".join(f"{value:>10}" for value in figures.values()), flush=True)
    machine = {"threads": arguments.threads, "commit": versions.commit(os.path.dirname(__file__))}
    print(json.dumps({**found, "vectors": len(vectors), **machine}))


if __name__ == "__main__":
    main()
