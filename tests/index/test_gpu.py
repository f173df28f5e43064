"""What a GPU takes part in is the index that a CPU alone would have made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from mixer.fast_faiss import faiss
from mixer.metrics import recall_of_neighbours
from mixer_platform.config import IndexConfig
from mixer_platform.errors import ConfigError
from mixer_platform.index import build, gpu
from mixer_platform.index.choose import exact_top_k, sweep
from mixer_platform.index.embeddings import embedding_column
from mixer_platform.index.segments import new_index, trained_template, write_segment

DIM, COUNT = 16, 3000
KINDS = [
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,SQ4",
    "IVF16,PQ8x4fs,Refine(SQ8)",
    "IVF16,RaBitQ,Refine(SQ4)",
    "IVF16,RaBitQfs,Refine(SQ4)",
    "OPQ8,IVF16,PQ8x4",
]
MADE_FOR_GPUS = hasattr(faiss, "StandardGpuResources")
HAS_GPU = MADE_FOR_GPUS and faiss.get_num_gpus() > 0


def unit(seed: int, count: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def parts_of(vectors: np.ndarray, size: int = 1000) -> Iterator[pa.Table]:
    """Yield rows of embeddings, a partition after the other; ids are not the rows' numbers."""
    for start in range(0, len(vectors), size):
        ids = 7 * np.arange(start, min(start + size, len(vectors)))
        names = pa.array([f"item-{each}" for each in ids])
        embeddings = embedding_column(vectors[start : start + size])
        yield pa.table({"id": ids, "item_id": names, "embedding": embeddings})


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_whose_lists_were_found_elsewhere_make_the_same_index(kind: str) -> None:
    vectors = unit(0, COUNT)
    template = trained_template(kind, DIM, vectors)
    alone, helped = faiss.deserialize_index(template), faiss.deserialize_index(template)
    coarse = faiss.clone_index(faiss.try_extract_index_ivf(helped).quantizer)
    for rows in parts_of(vectors):
        added = np.array(rows["embedding"].to_pylist(), np.float32), rows["id"].to_numpy()
        alone.add_with_ids(*added)
        gpu.add_with_ids(helped, *added, coarse)
    assert helped.ntotal == COUNT
    np.testing.assert_array_equal(faiss.serialize_index(helped), faiss.serialize_index(alone))
    assert coarse.thisown, "else nobody would free it"


class FlatOnly:
    """Copies what a GPU could."""

    def copy(self, index: faiss.Index) -> faiss.Index:
        assert isinstance(index, faiss.IndexFlat)
        return faiss.clone_index(index)


@pytest.mark.parametrize(
    ("kind", "found"), [("IVF16,SQ8", True), ("IVF16_HNSW8,SQ8", False), ("HNSW16", False), ("Flat", False)]
)
def test_only_flat_coarse_quantizers_go_to_the_gpu(kind: str, found: bool) -> None:
    index = faiss.deserialize_index(trained_template(kind, DIM, unit(0, COUNT)))
    assert (gpu.coarse_on(FlatOnly(), index) is not None) is found


def test_lists_may_be_clustered_by_another_index_that_is_freed() -> None:
    vectors = unit(0, COUNT)
    index = new_index("OPQ8,IVF16,PQ8x4", DIM)
    clustering = gpu.cluster_on(FlatOnly(), index)
    index.train(vectors)
    assert clustering.thisown
    assert clustering.ntotal == 16
    assert gpu.cluster_on(FlatOnly(), new_index("HNSW16", DIM)) is None


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_a_gpu_that_faiss_cannot_use_is_one_clear_sentence() -> None:
    why = "FAISS finds no GPU here, .*" if MADE_FOR_GPUS else "this FAISS is not made for GPUs; install .* gpu extra"
    with pytest.raises(ConfigError, match=rf"^index\.builder_gpus: {why}, or take 0$"):
        gpu.GPU()


def test_a_cluster_without_a_gpu_is_waited_for_and_then_one_clear_sentence(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ray.cluster_resources().get("GPU"):
        pytest.skip("the cluster has a GPU")
    monkeypatch.setattr(build, "_PATIENCE_S", 1)
    config = IndexConfig(builder_gpus=0.5)
    with pytest.raises(ConfigError, match=r"^index\.builder_gpus: the Ray cluster had no GPU to give in 1 s; add one"):
        build._gpus("IVF16,SQ8", DIM, config)
    assert build._gpus("HNSW16", DIM, config) == 0, "it would lie idle"


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory at /x/gpu/A.cpp:530: no room", True),
        ("Error in void faiss::f() at /x/IndexIVF.cpp:1: what a CPU says", False),
    ],
)
def test_what_faiss_says_of_a_gpu_is_told_apart(said: str, named: bool) -> None:
    kind, match = (ConfigError, "no room; give each") if named else (RuntimeError, "CPU says")
    with pytest.raises(kind, match=match), gpu.gpu_errors():
        raise RuntimeError(said)


@pytest.mark.skipif(not HAS_GPU, reason="needs faiss-gpu and a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_gpu_trained_and_built_is_searched_on_a_cpu_as_well(kind: str, tmp_path: Path) -> None:
    vectors, queries = unit(0, COUNT), unit(1, 100)
    exact = exact_top_k(queries, vectors, 7 * np.arange(COUNT), 10)
    np.testing.assert_array_equal(exact_top_k(queries, vectors, 7 * np.arange(COUNT), 10, gpu.GPU())[1], exact[1])
    recalls = []
    for device in (None, gpu.GPU()):
        template = trained_template(kind, DIM, vectors, device)
        entry, index = write_segment(tmp_path, "v", f"shard-{len(recalls)}", template, parts_of(vectors), gpu=device)
        assert entry.rows == COUNT
        read = faiss.read_index(str(tmp_path / f"{entry.name}.faiss"))
        np.testing.assert_array_equal(faiss.serialize_index(read), faiss.serialize_index(index))
        trials = sweep(read, queries, exact[1], 0.99)
        recalls.append(max(recall_of_neighbours(trial.found[1], exact[1]) for trial in trials))
    assert recalls[1] > recalls[0] - 0.02
