"""What a machine can do at most: photos decoded, encoded and searched for in one bare process, without Ray or HTTP.

    .venv/bin/python benchmarks/bound.py --workspace FOLDER --index VERSION --photos FOLDER

JPEGs lie in memory; the encoder and the shards are those that the service loads. Tries how many workers (threads of
this process, each with an encoder of its own), threads of an encoder and photos a batch give the most queries a second,
and how many threads answer one query at a time soonest. Prints that as one JSON object, and then, for each line of its
standard input, queries a second (`many 5`: for five seconds) or the median milliseconds of one at a time (`one 5`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mixer.embedder import QueryEmbedder
from mixer.fast_faiss import faiss
from mixer.images import decode
from mixer_platform.gallery import Shard, merge_top_k, read_manifest, segment_folders
from mixer_platform.storage import LocalStorage

K = 10
BATCHES = (1, 2, 4, 8, 16, 32)


class Bare:
    """Encoders and shards of an index version, and photos."""

    def __init__(self, workspace: str, index: str, photos: Sequence[bytes]) -> None:
        storage = LocalStorage(workspace)
        manifest = read_manifest(storage, index)
        self._model, self._photos = Path(storage.path(f"models/{manifest.model}")), photos
        with tempfile.TemporaryDirectory() as scratch:
            folders = [segment_folders(storage, entry, scratch) for entry in manifest.shards]
        self._shards = [
            Shard(part, entry, manifest.search) for part, entry in zip(folders, manifest.shards, strict=True)
        ]
        self._encoders: dict[tuple[int, int], QueryEmbedder] = {}

    def answer(self, encoder: QueryEmbedder, photos: Sequence[bytes]) -> np.ndarray:
        """Return the ids of the nearest items, [n, K]."""
        queries = encoder(np.stack([encoder.preprocess(decode(photo)) for photo in photos]))
        return merge_top_k([shard.search(queries, K) for shard in self._shards], K)[1]

    def throughput(self, workers: int, threads: int, batch: int, seconds: float) -> float:
        """Return queries a second."""
        encoders = [self._encoder(number, threads) for number in range(workers)]
        until = time.perf_counter() + seconds

        def work(number: int) -> int:
            faiss.omp_set_num_threads(1)
            done = 0
            while time.perf_counter() < until:
                self.answer(encoders[number], self._some(number * 61 + done, batch))
                done += batch
            return done

        began = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            done = sum(pool.map(work, range(workers)))
        return done / (time.perf_counter() - began)

    def latencies(self, threads: int, search_threads: int, seconds: float) -> list[float]:
        """Return the milliseconds of queries asked one after the other."""
        encoder, found = self._encoder(0, threads), list[float]()
        faiss.omp_set_num_threads(search_threads)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            self.answer(encoder, self._some(len(found), 1))
            found.append(1000 * (time.perf_counter() - began))
        return found

    def _some(self, first: int, count: int) -> list[bytes]:
        return [self._photos[(first + more) % len(self._photos)] for more in range(count)]

    def _encoder(self, number: int, threads: int) -> QueryEmbedder:
        if (number, threads) not in self._encoders:
            self._encoders[number, threads] = QueryEmbedder(self._model, threads)
        return self._encoders[number, threads]


def best_settings(bare: Bare, cores: int, seconds: float) -> dict[str, Any]:
    """Return what is fastest, each candidate tried for so long."""
    halves = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
    together = sorted({(workers, max(1, cores // workers)) for workers in halves} | {(2, cores), (cores, cores)})
    grid = [(workers, threads, batch) for workers, threads in together for batch in BATCHES]
    tried = {each: bare.throughput(*each, seconds) for each in grid}
    alone = [(threads, search) for threads in halves for search in {1, cores}]
    soonest = {each: statistics.median(bare.latencies(*each, seconds)) for each in alone}
    return {"many": max(tried, key=lambda each: tried[each]), "one": min(soonest, key=lambda each: soonest[each])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--index", required=True)
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEGs, listed in its file `names`")
    parser.add_argument("--seconds", type=float, default=1, help="for which each of the settings is tried")
    arguments = parser.parse_args()
    photos = [(arguments.photos / name).read_bytes() for name in (arguments.photos / "names").read_text().split()]
    bare, cores = Bare(arguments.workspace, arguments.index, photos), os.cpu_count() or 1
    bare.throughput(1, cores, 8, arguments.seconds)  # warm up
    settings = best_settings(bare, cores, arguments.seconds)
    print(json.dumps(settings), flush=True)
    (workers, threads, batch), (threads_of_one, search_threads) = settings["many"], settings["one"]
    for line in sys.stdin:
        what, seconds = line.split()
        if what == "many":
            print(bare.throughput(workers, threads, batch, float(seconds)), flush=True)
        else:
            print(statistics.median(bare.latencies(threads_of_one, search_threads, float(seconds))), flush=True)


if __name__ == "__main__":
    main()
