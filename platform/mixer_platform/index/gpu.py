"""FAISS on a GPU: lists are clustered there and vectors find their list there; the index and its files are a CPU's."""

from __future__ import annotations

import numpy as np

from mixer.fast_faiss import faiss
from mixer_platform.errors import ConfigError


def require_gpu() -> None:
    """Raise ConfigError unless FAISS sees a GPU from this process."""
    if not hasattr(faiss, "StandardGpuResources"):
        reason = "this FAISS is not made for GPUs; install the project's gpu extra"
    elif not faiss.get_num_gpus():
        reason = "FAISS finds no GPU here, where Ray has one to give; look at the node's driver"
    else:
        return
    raise ConfigError(f"index.builder_gpus: {reason}, or take 0")


class GPU:
    """The GPU that this process sees first, for as long as it builds. Raises ConfigError if there is none."""

    def __init__(self) -> None:
        require_gpu()
        self._resources = faiss.StandardGpuResources()

    def copy(self, index: faiss.Index) -> faiss.Index:
        """Return a flat index on the GPU."""
        return faiss.index_cpu_to_gpu(self._resources, 0, index)

    def knn(self, queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k greatest inner products of each query and their rows, [queries, k]."""
        return faiss.knn_gpu(self._resources, queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)


def add_with_ids(index: faiss.IndexIDMap, vectors: np.ndarray, ids: np.ndarray, lists: faiss.Index) -> None:
    """Do what `index.add_with_ids` does; `lists`, a copy of its coarse quantizer, finds the list of each vector."""
    inner = faiss.downcast_index(index.index)
    _add(inner, np.ascontiguousarray(vectors, np.float32), lists)
    known = faiss.vector_to_array(index.id_map)
    faiss.copy_array_to_vector(np.concatenate([known, ids]), index.id_map)
    index.ntotal = inner.ntotal


def _add(index: faiss.Index, vectors: np.ndarray, lists: faiss.Index) -> None:
    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(place)).apply(vectors)
        _add(faiss.downcast_index(index.index), vectors, lists)
    elif isinstance(index, faiss.IndexRefine):
        _add(faiss.downcast_index(index.base_index), vectors, lists)
        index.refine_index.add(vectors)
    elif isinstance(index, faiss.IndexIVFFastScan):  # takes no lists from outside
        quantizer = index.quantizer
        if not index.by_residual:  # else it asks for centres too, one by one
            index.quantizer = lists
        try:
            index.add(vectors)
        finally:
            index.quantizer = quantizer
        return
    elif isinstance(index, faiss.IndexIVF):
        found = np.ascontiguousarray(lists.search(vectors, 1)[1][:, 0])
        index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(found))
        return
    else:
        index.add(vectors)
        return
    index.ntotal += len(vectors)
