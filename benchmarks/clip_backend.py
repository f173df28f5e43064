"""clip-retrieval's backend, asked by vectors: the same vectors, kind of index and search settings as an index version.

It gets an environment of its own with what its server imports, and starts as its command does, less the CLIP model,
which vectors do not need and whose weights it would download, and on loopback only.
"""

from __future__ import annotations

import json
import subprocess
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixer.fast_faiss import faiss
from mixer_platform.gallery import IndexManifest, read_manifest
from mixer_platform.index import embeddings
from mixer_platform.index.choose import training_size
from mixer_platform.loopback import open_url
from mixer_platform.storage import open_storage

PACKAGE = "clip-retrieval==2.45.0"
NEEDED = [
    "numpy<2",
    "faiss-cpu",
    "flask>=3",
    "flask_restful",
    "flask_cors<5",
    "pandas<3",
    "pyarrow<16",
    "fsspec",
    "h5py",
]
NEEDED += ["tqdm", "prometheus-client", "fire<0.6", "requests", "pillow", "setuptools<80"]
QUERIES = 512
_START = """
import importlib.util, sys, types
from pathlib import Path

# Its package imports all of its tools when it is imported; its server is one file of it.
root = types.ModuleType("clip_retrieval")
root.__path__ = [str(Path(importlib.util.find_spec("flask").origin).parents[1] / "clip_retrieval")]
torch, clip = types.ModuleType("torch"), types.ModuleType("all_clip")
torch.cuda = types.SimpleNamespace(is_available=lambda: False)
clip.load_clip = lambda *args, **more: (None, None, None)
sys.modules.update(clip_retrieval=root, torch=torch, all_clip=clip)

import flask
run = flask.Flask.run
flask.Flask.run = lambda self, host, port, debug: run(self, host="127.0.0.1", port=port, debug=debug)

from clip_retrieval.clip_back import clip_back
clip_back(indices_paths=sys.argv[1], port=int(sys.argv[2]), enable_mclip_option=False,
          provide_aesthetic_embeddings=False)
"""


def environment(folder: Path) -> Path:
    """Return the Python of an environment that has the backend, made unless it is there. Raises CalledProcessError."""
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for what in (("--no-deps", PACKAGE), tuple(NEEDED)):
            subprocess.run([*install, *what], check=True, capture_output=True, text=True)
        (folder / "ready").touch()
    return python


def write_index(workspace: Path, version: str, folder: Path) -> list[str]:
    """Write an index version's vectors as the backend reads them, and queries: bodies, listed in `queries/names`.

    Return the item_ids of the vectors that are the queries. What is there already is not written again.
    """
    storage = open_storage(str(workspace))
    manifest = read_manifest(storage, version)
    if not (folder / "asked.json").exists():
        chain = embeddings.chain_of(storage, manifest.embeddings)
        rows = embeddings.read_rows(storage, chain, (0, 2**63 - 1), ["item_id", "embedding"])
        assert rows is not None
        vectors = embeddings.vectors(rows["embedding"])
        (folder / "metadata").mkdir(parents=True, exist_ok=True)
        (folder / "queries").mkdir(exist_ok=True)
        faiss.write_index(built(vectors, manifest), str(folder / "image.index"))
        pq.write_table(pa.table({"caption": rows["item_id"]}), folder / "metadata/0.parquet")
        (folder / "paths.json").write_text(json.dumps({"vectors": str(folder)}))
        drawn = np.random.default_rng(0).permutation(len(vectors))[:QUERIES]
        more = {"modality": "image", "num_images": 10, "num_result_ids": 10, "indice_name": "vectors"}
        for number, row in enumerate(drawn):
            body = {"embedding_input": vectors[row].astype(float).round(6).tolist(), **more}
            (folder / f"queries/{number}").write_text(json.dumps(body))
        (folder / "queries/names").write_text("".join(f"{number}\n" for number in range(len(drawn))))
        (folder / "asked.json").write_text(json.dumps(rows["item_id"].take(pa.array(drawn)).to_pylist()))
    return json.loads((folder / "asked.json").read_text())


def built(vectors: np.ndarray, manifest: IndexManifest) -> faiss.Index:
    """Return one index of all vectors, of the manifest's kind and with its search settings."""
    index = faiss.index_factory(manifest.dim, manifest.factory, faiss.METRIC_INNER_PRODUCT)
    rows = np.random.default_rng(0).permutation(len(vectors))[: training_size(manifest.factory, manifest.dim)]
    index.train(vectors[rows])
    index.add(vectors)
    for name, value in manifest.search.items():
        faiss.ParameterSpace().set_index_parameter(index, {"k_factor": "k_factor_rf"}.get(name, name), value)
    return index


@contextmanager
def backend(python: Path, folder: Path, port: int, log: Path) -> Iterator[str]:
    """Run the backend as long as the context lasts; yield the URL that takes queries."""
    with log.open("w") as file:
        command = [str(python), "-c", _START, str(folder / "paths.json"), str(port)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            _wait(process, f"http://127.0.0.1:{port}/indices-list", log)
            yield f"http://127.0.0.1:{port}/knn-service"
        finally:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"it did not start: {(log.read_text().splitlines() or ['no reason given'])[-1]}")
        try:
            open_url(url, 5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"it did not answer within 300 s; see {log}")
