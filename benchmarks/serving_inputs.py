"""What benchmarks/serving.py serves and asks: two models and their indexes, a million vectors, photos as JPEGs.

Made once in a workspace by the product's jobs, and found there again.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
from index import PER_CENTRE, alone, draw, publish_vectors, real_vectors
from PIL import Image
from quality import CONFIG

from mixer.images import UnreadableImage, decode
from mixer_platform import versions
from mixer_platform.config import IndexConfig, load_config
from mixer_platform.demo.cluster import LocalCluster
from mixer_platform.gallery import CURRENT, KIND, current_version, read_manifest
from mixer_platform.index import embeddings
from mixer_platform.index.build import build_shards
from mixer_platform.index.lifecycle import publish
from mixer_platform.storage import open_storage

PHOTOS = 512
QUALITY = 90
# Frozen encoder, few epochs: any trained model takes as long to ask.
TRAINING = ["train.epochs=5", "train.views=1"]
# Bytes a vector that the million may take: lists of codes and vectors of 8 bits, no graph, which takes longer to build.
BYTES_PER_VECTOR = 380


@dataclass(frozen=True)
class Inputs:
    """Index versions: the catalogue's, that of another model over it, and that of many vectors of the first model."""

    index: str
    other: str
    many: str | None = None

    def pairs(self, workspace: Path) -> set[str]:
        """Return what replies may say: "model index"."""
        storage = open_storage(str(workspace))
        return {f"{read_manifest(storage, index).model} {index}" for index in (self.index, self.other)}


def prepare_inputs(data: Path, workspace: Path, vectors: int) -> Inputs:
    """Return what is in the workspace, made where it is missing; `vectors`: how many besides the catalogue's, or 0."""
    path, storage = workspace / "serving.json", open_storage(str(workspace))
    found = Inputs(**json.loads(path.read_text())) if path.exists() else None
    if found is None:
        index = current_version(storage) if storage.tag(CURRENT) else None
        found = train_and_index(data, workspace, index)
        path.write_text(json.dumps(asdict(found)))
    many = alone(build_many, str(workspace), found.index, vectors, threads=2) if vectors else None
    serve_index(data, workspace, found.index)
    return Inputs(found.index, found.other, many)


def train_and_index(data: Path, workspace: Path, index: str | None) -> Inputs:
    """Run the stages for two models, the first unless it has its `index` already; return their indexes."""
    common = ["--config", str(CONFIG), f"data={data}", f"workspace={workspace}"]
    with LocalCluster(workspace / "logs") as cluster:
        samples = f"train.samples={cluster.submit('prepare', common)['version']}"

        def trained(seed: int) -> str:
            model = cluster.submit("train", [*common, samples, f"train.seed={seed}", *TRAINING])["version"]
            return cluster.submit("index", [*common, f"index.model={model}"])["version"]

        if index is None:
            index = trained(0)
            cluster.submit("evaluate", common)  # scores are calibrated, as they are in production
        return Inputs(index, trained(1))


def serve_index(data: Path, workspace: Path, index: str) -> None:
    """Publish an index version, as `jobs/index.py publish` does."""
    publish(load_config(CONFIG, [f"data={data}", f"workspace={workspace}", f"index.version={index}"]))


def build_many(workspace: str, index: str, count: int) -> str:
    """Publish an index of `count` vectors drawn like those of `index`, of the same model; return its version."""
    storage = open_storage(workspace)
    manifest = read_manifest(storage, index)
    fingerprint = versions.fingerprint("drawn", manifest.embeddings, count, BYTES_PER_VECTOR)
    if found := versions.find(storage, KIND, fingerprint):
        return found["version"]
    print(f"building an index of {count} vectors; takes minutes", flush=True)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    vectors, queries = draw(real_vectors(workspace, manifest.embeddings), max(count, PER_CENTRE), 200)
    if not versions.manifest(storage, embeddings.KIND, fingerprint):
        publish_vectors(workspace, fingerprint, manifest.model, vectors)
    del vectors
    config = IndexConfig(memory=BYTES_PER_VECTOR * count) if count >= 100_000 else IndexConfig()
    version = versions.new_version(fingerprint)
    chain = embeddings.chain_of(storage, fingerprint)
    made = build_shards(storage, version, chain, manifest.dim, queries, config)
    listed = {"model": manifest.model, "embeddings": fingerprint}
    versions.publish(storage, KIND, version, {**made, **listed})
    return version


def write_photos(data: Path, folder: Path) -> tuple[int, float]:
    """Write some of the shop's query photos as JPEGs, listed in `names`; return how many, and their mean bytes.

    What is a JPEG stays as it is; others are encoded at their size.
    """
    if not (folder / "names").exists():
        folder.mkdir(parents=True, exist_ok=True)
        uris = pq.read_table(data / "queries.parquet")["image"].to_pylist()
        names: list[str] = []
        for row in np.random.default_rng(0).permutation(len(uris)):
            try:
                content = as_jpeg((data / uris[row]).read_bytes())
            except (OSError, TypeError, UnreadableImage):
                continue
            names.append(f"{len(names):04}.jpg")
            (folder / names[-1]).write_bytes(content)
            if len(names) == PHOTOS:
                break
        (folder / "names").write_text("".join(f"{name}\n" for name in names))
    sizes = [(folder / name).stat().st_size for name in (folder / "names").read_text().split()]
    return len(sizes), float(np.mean(sizes))


def as_jpeg(content: bytes) -> bytes:
    """Return a picture as JPEG. Raises UnreadableImage."""
    picture = decode(content)
    if Image.open(io.BytesIO(content)).format == "JPEG":
        return content
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
