"""What the index costs and what it gives, beside a bare onnxruntime loop, a plain FAISS process and autofaiss.

    .venv/bin/python benchmarks/index.py --data FOLDER [--vectors 1000000] [--photos 20000]

FOLDER as in quality.py. A model is trained on it, and every picture in it is embedded as an item, as often as it takes
to come to --photos. Vectors for everything else are drawn from a Gaussian mixture: centres and what lies about them
have the spectra of the real embeddings (k-means centres, and residuals), 20 vectors a centre. References: (a) a loop
that reads, decodes and embeds the same pictures a batch after the other by an onnxruntime session over both cores, and
two such loops at once, each with a session over one core, which decode while the other encodes; (b) one FAISS process
with one thread that trains on as many vectors, adds and writes with the same factory string; (c) autofaiss 2.18, which
needs older libraries and gets an environment of its own, given the same memory, searched with one thread, its settings
swept.
(b) and (c) multiply matrices with the kernels that the product gives FAISS, which may be several times faster than
those that it takes by itself (`mixer/fast_faiss.py`). (a) and (b) are timed before and after what is compared with
their mean, for machines drift. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from quality import CONFIG

from mixer.embedder import ItemEmbedder
from mixer.fast_faiss import cpu_flags, faiss, openblas_core
from mixer.images import UnreadableImage, decode
from mixer_platform import versions
from mixer_platform.config import IndexConfig, load_config
from mixer_platform.gallery import KIND, IndexManifest, Shard, merge_top_k, segment_folders
from mixer_platform.index import embeddings
from mixer_platform.index.build import build_shards
from mixer_platform.index.choose import sweep, training_size
from mixer_platform.index.embed import embed_items, partitions_for
from mixer_platform.index.embeddings import DELETED, REPLACES, STATE, WHOLE, embedding_column
from mixer_platform.index.update import write_deltas
from mixer_platform.inputs import find_input
from mixer_platform.item_ids import assign_ids, part_of
from mixer_platform.prepare.job import prepare
from mixer_platform.schema import ITEMS
from mixer_platform.storage import open_storage
from mixer_platform.train.job import train

DIM = 256
PER_CENTRE = 20
QUERIES = 1000
WISH = 0.95
PLAIN = "IVF4096,SQ8"  # what (b) builds too
AUTOFAISS = ["autofaiss==2.18.0", "numpy==1.26.4", "pyarrow<19", "faiss-cpu==1.7.4"]
MADE_BY_AUTOFAISS = """
import json, sys, time
import faiss, numpy as np
from autofaiss import build_index

folder, memory, wish = sys.argv[1], sys.argv[2], float(sys.argv[3])
faiss.omp_set_num_threads(1)
began = time.perf_counter()
build_index(embeddings=f"{folder}/vectors", index_path=f"{folder}/knn.index", index_infos_path=f"{folder}/infos.json",
            max_index_memory_usage=memory, current_memory_available="12G", nb_cores=1, metric_type="ip", verbose=40)
seconds = time.perf_counter() - began
index = faiss.read_index(f"{folder}/knn.index")
queries, exact = np.load(f"{folder}/queries.npy"), np.load(f"{folder}/exact.npy")
faiss.omp_set_num_threads(1)
infos, found = json.load(open(f"{folder}/infos.json")), []
kind = infos["index_key"]
steps = [f"efSearch={beam}" for beam in (10, 12, *(2**power for power in range(4, 12)))]  # no beam is below k
if "IVF" in kind:
    steps = [f"nprobe={2**power}" + (",quantizer_efSearch=512" if "_HNSW" in kind else "") for power in range(12)]
for step in steps if "HNSW" in kind or "IVF" in kind else [""]:
    if step:
        faiss.ParameterSpace().set_index_parameters(index, step)
    best = 1e9
    for _ in range(3):
        began = time.perf_counter()
        _, ids = index.search(queries, 10)
        best = min(best, time.perf_counter() - began)
    recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, exact)]))
    found.append({"settings": step, "recall": recall, "qps": len(queries) / best})
    if recall > wish + (1 - wish) / 2:
        break
print(json.dumps({"kind": kind, "seconds": seconds, "found": found}))
"""


def alone(function: Callable[..., Any], *arguments: Any, threads: int = 1) -> Any:
    """Run a function in a process of its own, whose libraries find `threads` threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def start_ray(cpus: int) -> None:
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


# Embedding ----------------------------------------------------------------------------------------------------------


def trained_model(data: str, workspace: str) -> str:
    """Prepare and train on the shop's logs; return the model's version."""
    start_ray(2)
    config = load_config(CONFIG, [f"data={data}", f"workspace={workspace}", "train.epochs=10", "train.views=1"])
    prepare(config)
    return train(config)["version"]


def write_photos(data: str, folder: Path, wanted: int) -> list[tuple[str, str]]:
    """Write a catalogue of all the shop's pictures, again and again under other titles; return pictures and texts."""
    root = Path(data).absolute()
    pictures = []
    for name in ("items", "queries"):
        for uri in pq.read_table(root / f"{name}.parquet")["image"].to_pylist():
            try:
                decode((root / uri).read_bytes())
                pictures.append(str(root / uri))
            except (OSError, TypeError, UnreadableImage):
                continue
    rows = [(pictures[n % len(pictures)], f"photo {n}") for n in range(wanted)]
    columns = {"item_id": [text for _, text in rows], "title": [text for _, text in rows]}
    folder.mkdir()
    pq.write_table(pa.table({**columns, "image": [picture for picture, _ in rows]}), folder / "items.parquet")
    return rows


def bare_embedding(model: str, rows: list[tuple[str, str]], loops: int) -> float:
    """Return the seconds in which so many loops, each with a session over its share of two cores, embed all rows."""

    def work(embedder: ItemEmbedder, mine: list[tuple[str, str]]) -> None:
        for start in range(0, len(mine), 32):
            batch = mine[start : start + 32]
            pixels = [embedder.preprocess(decode(Path(uri).read_bytes())) for uri, _ in batch]
            embedder(pixels, [text for _, text in batch])

    began = time.perf_counter()
    embedders = [ItemEmbedder(model, threads=2 // loops) for _ in range(loops)]
    with ThreadPoolExecutor(loops) as threads:
        list(threads.map(work, embedders, [rows[start::loops] for start in range(loops)]))
    return time.perf_counter() - began


def product_embedding(data: str, workspace: str, model: str) -> tuple[float, str]:
    """Return the seconds of the embedding job on two CPUs, and the version it wrote."""
    start_ray(2)
    storage = open_storage(workspace)
    config = IndexConfig(embedders=2, partition_items=1000)
    began = time.perf_counter()
    made = embed_items(storage, find_input(data, ITEMS), model, [], config)
    return time.perf_counter() - began, made["version"]


# Vectors ------------------------------------------------------------------------------------------------------------


def draw(real: np.ndarray, count: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw vectors and queries, unit float32 [n, dim], from a mixture with the spectra of `real` ones."""
    kmeans = faiss.Kmeans(real.shape[1], max(2, len(real) // 15), niter=20, seed=0, min_points_per_centroid=1)
    kmeans.train(real)
    centres = kmeans.centroids
    residuals = real - centres[kmeans.index.search(real, 1)[1][:, 0]]
    rng = np.random.default_rng(0)

    def sampler(points: np.ndarray) -> Callable[[int], np.ndarray]:
        mean = points.mean(0)
        values, axes = np.linalg.eigh(np.cov(points.T))
        scaled = (axes * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)
        return lambda n: mean + rng.standard_normal((n, len(values)), dtype=np.float32) @ scaled

    around, about = sampler(centres), sampler(residuals)
    means = around(count // PER_CENTRE)

    def vectors(n: int) -> np.ndarray:
        found = means[rng.integers(len(means), size=n)] + about(n)
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    return np.concatenate([vectors(min(100_000, count - start)) for start in range(0, count, 100_000)]), vectors(
        queries
    )


def real_vectors(workspace: str, source: str) -> np.ndarray:
    """Return the embeddings `source`, float32 [n, dim], each once."""
    storage = open_storage(workspace)
    real = embeddings.read_rows(storage, embeddings.chain_of(storage, source), (0, 2**63 - 1), ["embedding"])
    assert real is not None
    return np.unique(embeddings.vectors(real["embedding"]).round(4), axis=0)


def write_vectors(workspace: str, folder: str, source: str, count: int) -> None:
    """Draw vectors like the embeddings `source`; write them as embeddings `vectors`, as .npy, and what is exact."""
    found, queries = draw(real_vectors(workspace, source), count, QUERIES)
    ids, found = publish_vectors(workspace, "vectors", "benchmark", found)
    exact = faiss.knn(queries, found, 10, metric=faiss.METRIC_INNER_PRODUCT)[1]
    (Path(folder) / "vectors").mkdir()
    np.save(f"{folder}/vectors/0.npy", found)
    np.save(f"{folder}/queries.npy", queries)
    np.save(f"{folder}/exact.npy", exact)
    np.save(f"{folder}/ids.npy", ids)


def publish_vectors(workspace: str, version: str, model: str, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Publish vectors [n, dim] as embeddings of that many items; return ids and vectors in the order of ids."""
    item_ids = [f"item-{number}" for number in range(len(found))]
    ids = assign_ids(item_ids, {})
    order = np.argsort(ids)
    ids, found = ids[order], found[order]
    named = pa.array(item_ids, pa.string()).take(pa.array(order))
    partitions = partitions_for(len(found), IndexConfig().partition_items)
    write_rows(workspace, version, partitions, ids, named, found, None)
    manifest: dict[str, Any] = {"model": model, "base": None, "changes": None, "items": len(found)}
    manifest |= {"partitions": partitions, "parts": list(range(partitions))}
    versions.publish(open_storage(workspace), embeddings.KIND, version, manifest)
    return ids, found


def write_rows(
    workspace: str,
    version: str,
    partitions: int,
    ids: np.ndarray,
    item_ids: pa.Array,
    found: np.ndarray,
    more: dict[str, list] | None,
) -> None:
    """Write rows of embeddings, sorted by id, as the embedding job does."""
    numbers = np.array([part_of(int(identity), partitions) for identity in ids])
    for number in range(partitions):
        first, last = np.searchsorted(numbers, [number, number + 1])
        rows = pa.table({"id": ids[first:last], "item_id": item_ids.slice(first, last - first)})
        rows = rows.append_column("title", rows["item_id"])
        rows = rows.append_column("embedding", embedding_column(found[first:last]))
        states = {STATE: [WHOLE] * (last - first)} if more is None else {k: v[first:last] for k, v in more.items()}
        for name, values in states.items():
            rows = rows.append_column(name, pa.array(values))
        embeddings.write_part(open_storage(workspace), version, number, rows, {})


# Building -----------------------------------------------------------------------------------------------------------


def product_build(workspace: str, folder: str, name: str, workers: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Build and publish an index version on so many CPUs; return its manifest, with the seconds that it took."""
    start_ray(workers)
    storage = open_storage(workspace)
    chain = embeddings.chain_of(storage, "vectors")
    queries = np.load(f"{folder}/queries.npy")[:: QUERIES // IndexConfig().recall_queries]
    began = time.perf_counter()
    config = IndexConfig.model_validate({"recall_at_10": WISH, **settings})
    made = build_shards(storage, name, chain, DIM, queries, config)
    manifest = versions.publish(storage, KIND, name, {**made, "model": "benchmark", "embeddings": "vectors"})
    return {**manifest, "seconds": time.perf_counter() - began}


def plain_build(folder: str) -> float:
    """Return the seconds in which FAISS by itself trains, adds and writes, with one thread."""
    faiss.omp_set_num_threads(1)
    began = time.perf_counter()
    vectors = np.load(f"{folder}/vectors/0.npy")
    index = faiss.index_factory(DIM, PLAIN, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[: training_size(PLAIN, DIM)])
    index.add(vectors)
    faiss.write_index(index, f"{folder}/plain.faiss")
    seconds = time.perf_counter() - began
    os.unlink(f"{folder}/plain.faiss")
    return seconds


def product_update(workspace: str, folder: str, base: str) -> float:
    """Return the seconds of an update of 1 %: half of it changed, a quarter new, a quarter deleted."""
    start_ray(2)
    storage = open_storage(workspace)
    index = IndexManifest.model_validate(versions.require(storage, KIND, base))
    below = embeddings.chain_of(storage, "vectors")[0]
    vectors, ids = np.load(f"{folder}/vectors/0.npy", mmap_mode="r"), np.load(f"{folder}/ids.npy")
    size = len(ids) // 400
    known = np.sort(np.random.default_rng(1).permutation(len(ids))[: 3 * size])
    fresh = [f"new-{number}" for number in range(size)]
    rows = np.concatenate([ids[known], assign_ids(fresh, {})])
    states = np.array([WHOLE] * (2 * size) + [DELETED] * size + [WHOLE] * size)
    replaces = np.array([True] * (3 * size) + [False] * size)
    order = np.argsort(rows)
    found = np.ascontiguousarray(np.concatenate([vectors[known[::-1]], vectors[:size]])[order])
    names = pa.array([str(identity) for identity in rows[order]])
    began = time.perf_counter()
    more = {STATE: states[order].tolist(), REPLACES: replaces[order].tolist()}
    write_rows(workspace, "changes", below["partitions"], rows[order], names, found, more)
    counts = {"items": 3 * size, "replaced": 2 * size, "deleted": size}
    about = {"model": "benchmark", "base": "vectors", "partitions": below["partitions"], "parts": below["parts"]}
    made = versions.publish(storage, embeddings.KIND, "changes", {**about, **counts})
    versions.publish(storage, KIND, "updated", write_deltas(storage, "updated", index, made))
    return time.perf_counter() - began


# Searching ----------------------------------------------------------------------------------------------------------


def search(workspace: str, folder: str, version: str, mapped: bool) -> dict[str, Any]:
    """Search an index version with one thread; return recall@10, queries a second, bytes on disk and MiB in memory."""
    storage = open_storage(workspace)
    index = IndexManifest.model_validate(versions.require(storage, KIND, version))
    queries, exact = np.load(f"{folder}/queries.npy"), np.load(f"{folder}/exact.npy")
    exact = np.load(f"{folder}/ids.npy")[exact]
    before = resident()
    shards = [
        Shard(segment_folders(storage, entry, folder), entry, index.search, mapped=mapped) for entry in index.shards
    ]
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        found = merge_top_k([shard.search(queries, 10) for shard in shards], 10)[1]
        best = min(best, time.perf_counter() - began)
    recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]))
    size = sum(path.stat().st_size for path in Path(workspace, KIND, version).glob("*.faiss"))
    after = resident()
    memory = {name: round(after[name] - before[name]) for name in after}
    return {"recall": recall, "qps": len(queries) / best, "bytes": size, "memory": memory}


def swept(folder: str, path: str) -> list[dict[str, Any]]:
    """Search one shard with one thread and all settings up to a recall of 0.995; return what they reach."""
    faiss.omp_set_num_threads(1)
    queries, exact = np.load(f"{folder}/queries.npy"), np.load(f"{folder}/exact.npy")
    exact = np.load(f"{folder}/ids.npy")[exact]
    found = []
    for trial in sweep(faiss.read_index(path), queries, exact, 0.99):
        recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(trial.found[1], exact, strict=True)]))
        found.append({"settings": trial.settings, "recall": recall, "qps": 1 / trial.seconds})
    return found


def resident() -> dict[str, float]:
    """Return the MiB of this process in memory, and how many of them are no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    read = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines[1:]}
    return {"resident": read["Rss"], "anonymous": read["Anonymous"]}


def by_autofaiss(python: Path, folder: str, memory: str) -> dict[str, Any]:
    """Let autofaiss build with the same memory, sweep its settings, and return what it reaches."""
    command = [str(python), "-c", MADE_BY_AUTOFAISS, folder, memory, str(WISH)]
    core = openblas_core(cpu_flags())
    kernels = {"OPENBLAS_CORETYPE": core} if core else {}
    environment = {**kernels, **os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"autofaiss failed: {run.stderr.splitlines()[-1]}")
    return {**json.loads(run.stdout.splitlines()[-1]), "bytes": os.path.getsize(f"{folder}/knn.index")}


def fastest(found: list[dict[str, Any]], recall: float) -> dict[str, Any] | None:
    """Return the fastest settings that reach a recall, None if none do."""
    return max((each for each in found if each["recall"] >= recall), key=lambda each: each["qps"], default=None)


def environment(folder: Path) -> Path:
    """Return the Python of an environment that has autofaiss, made unless it is there."""
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *AUTOFAISS], check=True)
        (folder / "ready").touch()
    return python


# The table ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--photos", type=int, default=20_000)
    parser.add_argument("--memory", type=int, nargs="+", default=[2000], help="bytes a vector that are allowed")
    parser.add_argument("--environment", type=Path, default=Path("workspace/autofaiss"))
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, commit {versions.commit('.')}")
    figures: dict[str, Any] = {"recall_wished": WISH}
    with tempfile.TemporaryDirectory() as scratch:
        workspace, folder = f"{scratch}/workspace", f"{scratch}/files"
        Path(folder).mkdir()
        model = alone(trained_model, arguments.data, workspace, threads=2)
        figures |= embedding(arguments, workspace, scratch, model)
        source = figures.pop("source")
        alone(write_vectors, workspace, folder, source, arguments.vectors, threads=2)
        figures |= building(workspace, folder)
        figures |= wishes(arguments, workspace, folder)
    print(json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in figures.items()}))


def embedding(arguments: argparse.Namespace, workspace: str, scratch: str, model: str) -> dict[str, Any]:
    rows = write_photos(arguments.data, Path(scratch) / "photos", arguments.photos)
    path = f"{workspace}/models/{model}"
    timed = [
        ("a bare loop", alone(bare_embedding, path, rows, 1)),
        ("two of them", alone(bare_embedding, path, rows, 2)),
    ]
    product, source = alone(product_embedding, f"{scratch}/photos", workspace, model)
    timed.append(("index job, 2 actors", product))
    timed += [
        ("two of them", alone(bare_embedding, path, rows, 2)),
        ("a bare loop", alone(bare_embedding, path, rows, 1)),
    ]
    print(f"\nembedding {len(rows)} items, 2 cores            seconds   items/s")
    for name, seconds in timed:
        print(f"{name:45} {seconds:7.1f} {len(rows) / seconds:9.1f}")

    def ratio(reference: str) -> float:
        return statistics.mean(seconds for name, seconds in timed if name == reference) / product

    return {"embed_ratio": ratio("a bare loop"), "embed_ratio_two_loops": ratio("two of them"), "source": source}


def building(workspace: str, folder: str) -> dict[str, Any]:
    settings = {"factory": PLAIN, "shards": 2}
    plain = [alone(plain_build, folder)]
    one = alone(product_build, workspace, folder, "one", 1, settings)
    plain.append(alone(plain_build, folder))
    two = alone(product_build, workspace, folder, "two", 2, settings)
    plain.append(alone(plain_build, folder))
    update = alone(product_update, workspace, folder, "two")
    print(f"\nbuilding {one['items']} x {DIM}, {PLAIN:22} seconds  recall@10")
    for seconds in plain:
        print(f"{'FAISS alone, one thread, before and after':45} {seconds:7.1f}")
    for name, made in (("1 worker of one thread, 2 shards", one), ("2 workers of one thread, 2 shards", two)):
        print(f"{name:45} {made['seconds']:7.1f}  {made['recall_at_10']:.4f}")
    print(f"{'update of 1 %, 2 workers':45} {update:7.1f}")
    around = [statistics.mean(plain[:2]), statistics.mean(plain[1:])]
    ratios = {"build_ratio": one["seconds"] / around[0], "build_ratio_2": two["seconds"] / around[1]}
    return {**ratios, "update_ratio": update / two["seconds"]}


def wishes(arguments: argparse.Namespace, workspace: str, folder: str) -> dict[str, Any]:
    python, count = environment(arguments.environment.absolute()), arguments.vectors
    figures: dict[str, Any] = {}
    print(f"\n{'recall@10 >= ' + str(WISH) + ', one thread, one shard':60} recall@10    qps  bytes/vector  build s")

    def show(name: str, reached: dict[str, Any], size: int, seconds: float) -> None:
        line = f"{name:60} {reached['recall']:9.4f} {reached['qps']:6.0f} {size / count:13.0f} {seconds:8.1f}"
        print(line, flush=True)

    for memory in arguments.memory:
        suffix = "" if memory == arguments.memory[0] else f"_{memory}"
        allowed = int(memory * count)
        settings = {"shards": 1, "memory": allowed}
        made = alone(product_build, workspace, folder, f"wish{suffix}", 2, settings, threads=2)
        ours = alone(search, workspace, folder, f"wish{suffix}", False)
        show(f"{memory} bytes a vector: {made['factory']} {made['search']}", ours, ours["bytes"], made["seconds"])
        theirs = by_autofaiss(python, folder, f"{allowed // 10**6}M")
        for each in theirs["found"]:
            show(f"  autofaiss: {theirs['kind']} {each['settings']}", each, theirs["bytes"], theirs["seconds"])
        # The recall that both are asked for: what is wished, or the least that autofaiss's index can be set to.
        recall = max(WISH, min(each["recall"] for each in theirs["found"]))
        (path,) = Path(workspace, KIND, f"wish{suffix}").glob("*.faiss")
        mine = fastest(alone(swept, folder, str(path)), recall)
        other = fastest(theirs["found"], recall)
        if mine:
            show(f"  the same index at recall {recall:.4f}: {mine['settings']}", mine, ours["bytes"], made["seconds"])
        figures |= {
            f"autofaiss_qps_ratio{suffix}": mine["qps"] / other["qps"] if mine and other else None,
            f"autofaiss_recall{suffix}": recall,
            f"autofaiss_memory_ratio{suffix}": ours["bytes"] / theirs["bytes"],
            f"autofaiss_best_recall{suffix}": max(each["recall"] for each in theirs["found"]),
            f"recall_measured{suffix}": ours["recall"],
        }
    print(f"\n{'serving the first of them':60}  resident  of it anonymous (MiB)")
    for mapped in (False, True):
        found = alone(search, workspace, folder, "wish", mapped)["memory"]
        print(f"{'mapped' if mapped else 'read':60} {found['resident']:9.0f} {found['anonymous']:9.0f}")
        figures["serving_mb_mapped" if mapped else "serving_mb_read"] = found["resident"]
        figures["serving_mb_anonymous_mapped" if mapped else "serving_mb_anonymous_read"] = found["anonymous"]
    return figures


if __name__ == "__main__":
    main()
