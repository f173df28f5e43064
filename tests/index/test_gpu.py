"""What a GPU takes part in is the index that a CPU alone would have made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mixer.fast_faiss import faiss
from mixer.metrics import recall_of_neighbours
from mixer_platform.errors import ConfigError
from mixer_platform.index import gpu
from mixer_platform.index.choose import exact_top_k, sweep
from mixer_platform.index.embeddings import embedding_column
from mixer_platform.index.segments import trained_template, write_segment

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
HAS_GPU = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs faiss-gpu and a GPU")
without_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a GPU")


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
    lists = faiss.clone_index(faiss.try_extract_index_ivf(helped).quantizer)
    for rows in parts_of(vectors):
        added = np.array(rows["embedding"].to_pylist(), np.float32), rows["id"].to_numpy()
        alone.add_with_ids(*added)
        gpu.add_with_ids(helped, *added, lists)
    assert helped.ntotal == COUNT
    np.testing.assert_array_equal(faiss.serialize_index(helped), faiss.serialize_index(alone))
    assert faiss.try_extract_index_ivf(helped).quantizer.ntotal == 16  # its own, not `lists`


@without_gpu
def test_a_gpu_that_is_wished_and_not_there_is_one_clear_sentence(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^index\.builder_gpus: this FAISS is not made for GPUs; install the project"
    ):
        gpu.require_gpu()


@on_gpu
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
