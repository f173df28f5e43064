"""FAISS on a GPU: lists are clustered there and vectors find their list there; the index and its files are a CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import ray

from mixer.fast_faiss import faiss
from mixer_platform.errors import ConfigError

_SCRATCH_BYTES = 256 * 2**20  # of the GPU, for one task; FAISS would take 1.5 GiB, and several tasks share one


class GPU:
    """The GPU that this process sees first. Raises ConfigError if there is none."""

    def __init__(self) -> None:
        require_gpu()
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(_SCRATCH_BYTES)

    @classmethod
    def of_task(cls) -> GPU | None:
        """Return the GPU of which Ray gave a share to this task, if it did. Raises ConfigError."""
        return cls() if ray.get_gpu_ids() else None

    def copy(self, index: faiss.IndexFlat) -> faiss.Index:
        """Return a flat index on the GPU."""
        return faiss.index_cpu_to_gpu(self._resources, 0, index)

    def knn(self, queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k greatest inner products of each query and their rows, [queries, k]."""
        return faiss.knn_gpu(self._resources, queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)


def require_gpu() -> None:
    """Raise ConfigError unless FAISS sees a GPU from this process."""
    if not hasattr(faiss, "StandardGpuResources"):
        reason = "this FAISS is not made for GPUs; install the project's gpu extra"
    elif not faiss.get_num_gpus():
        reason = "FAISS finds no GPU here, where Ray has one to give; look at the node's driver"
    else:
        return
    raise ConfigError(f"index.builder_gpus: {reason}, or take 0")


def failed_on_gpu(error: RuntimeError) -> bool:
    """Return whether FAISS raised this about a GPU, such as its memory; it says where in its source."""
    return "/gpu/" in str(error)


@contextmanager
def gpu_errors() -> Iterator[None]:
    """Raise what FAISS says of a GPU as ConfigError."""
    try:
        yield
    except RuntimeError as error:
        if not failed_on_gpu(error):
            raise
        reason = str(error).splitlines()[-1].strip()
        mend = "give each task a larger share, or take 0"
        raise ConfigError(f"index.builder_gpus: FAISS fails on the GPU: {reason}; {mend}") from error


def cluster_on(gpu: GPU, index: faiss.IndexIDMap) -> faiss.Index | None:
    """Let an index that is not trained cluster its lists on the GPU, as long as what this returns is kept."""
    ivf = faiss.try_extract_index_ivf(index)
    if not ivf:
        return None
    ivf.clustering_index = clustering = gpu.copy(faiss.IndexFlatIP(ivf.d))
    clustering.thisown = True  # which it lost to the index, and that never frees it
    return clustering


def coarse_on(gpu: GPU, index: faiss.IndexIDMap) -> faiss.Index | None:
    """Return the index' coarse quantizer on the GPU; None where there is none, or one that no GPU searches."""
    ivf = faiss.try_extract_index_ivf(index)
    coarse = faiss.downcast_index(ivf.quantizer) if ivf else None
    return gpu.copy(coarse) if isinstance(coarse, faiss.IndexFlat) else None


def add_with_ids(index: faiss.IndexIDMap, vectors: np.ndarray, ids: np.ndarray, coarse: faiss.Index) -> None:
    """Do what `index.add_with_ids` does; `coarse`, a copy of its coarse quantizer, finds the list of each vector."""
    inner = faiss.downcast_index(index.index)
    _add(inner, np.ascontiguousarray(vectors, np.float32), coarse)
    known = index.id_map.size()
    index.id_map.resize(known + len(ids))
    faiss.rev_swig_ptr(index.id_map.data(), index.id_map.size())[known:] = ids
    index.ntotal = inner.ntotal


def _add(index: faiss.Index, vectors: np.ndarray, coarse: faiss.Index) -> None:
    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(place)).apply(vectors)
        _add(faiss.downcast_index(index.index), vectors, coarse)
        index.ntotal += len(vectors)
    elif isinstance(index, faiss.IndexRefine):
        _add(faiss.downcast_index(index.base_index), vectors, coarse)
        index.refine_index.add(vectors)
        index.ntotal += len(vectors)
    elif isinstance(index, faiss.IndexIVFFastScan):
        _add_packed(index, vectors, coarse)
    elif isinstance(index, faiss.IndexIVF):
        found = np.ascontiguousarray(coarse.search(vectors, 1)[1][:, 0])
        index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(found))
    else:
        index.add(vectors)


def _add_packed(index: faiss.IndexIVFFastScan, vectors: np.ndarray, coarse: faiss.Index) -> None:
    """Add to an index that takes no lists from outside: `coarse` stands in for its quantizer meanwhile."""
    if index.by_residual:  # it would ask for centres too, one by one
        return index.add(vectors)
    own, index.quantizer = index.quantizer, coarse
    try:
        index.add(vectors)
    finally:
        index.quantizer = own
        coarse.thisown = True  # which it lost to the index
