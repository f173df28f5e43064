"""Segments on disk: an ordinary FAISS index over int64 ids and an Arrow file of the same ids, in one order. No Ray."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixer.fast_faiss import faiss
from mixer_platform.errors import StorageError
from mixer_platform.index.embeddings import OWN, REPLACES, STATE, TEXT_ONLY, WHOLE, vectors
from mixer_platform.index.gpu import GPU, add_with_ids, cluster_on, coarse_on, failed_on_gpu
from mixer_platform.s3 import local_errors
from mixer_platform.segment import SegmentEntry, search_parameters, sha256

_SHOWN_BESIDE = "id"
_ROUNDS = 8  # of k-means; the last two of FAISS' ten took a fifth of the training for 0.003 of recall at most


def trained_template(factory: str, dim: int, sample: np.ndarray, gpu: GPU | None = None) -> np.ndarray:
    """Return an empty, trained index over ids, serialised, that every shard starts from; inner product.

    With a GPU the clustering runs there; the index stays a CPU's. Raises ValueError for a factory string that FAISS
    refuses, or of which an index cannot do what is asked of a shard.
    """
    sample = np.ascontiguousarray(sample, np.float32)
    try:
        index = new_index(factory, dim)
        if not index.is_trained:
            if ivf := faiss.try_extract_index_ivf(index):
                ivf.cp.niter = _ROUNDS
            clustering = cluster_on(gpu, index) if gpu else None
            index.train(sample)
            del clustering
        template = faiss.serialize_index(index)
        _try(template, sample[:64])
    except RuntimeError as error:
        if failed_on_gpu(error):
            raise
        raise ValueError(f"FAISS refuses {factory!r}: {reason_of(error)}") from error
    return template


def new_index(factory: str, dim: int) -> faiss.IndexIDMap:
    """Return an untrained index over ids. Rows below the ids keep their order, and can be read back.

    Raises RuntimeError, as FAISS does, for a factory string of which that cannot be had.
    """
    index = faiss.index_factory(dim, f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
    inner = faiss.downcast_index(index.index)
    if not isinstance(inner, faiss.IndexRefine) and (ivf := faiss.try_extract_index_ivf(inner)):
        if isinstance(faiss.downcast_index(ivf), faiss.IndexIVFPQFastScan):  # FAISS would crash
            raise RuntimeError("its rows cannot be read back; append ,RFlat")
        ivf.set_direct_map_type(faiss.DirectMap.Array)  # what refines knows its rows by itself
    return index


def has_lists(factory: str, dim: int) -> bool:
    """Return whether an index of this kind is an IVF below its other layers."""
    return faiss.try_extract_index_ivf(new_index(factory, dim)) is not None


def write_segment(
    folder: Path,
    version: str,
    name: str,
    template: np.ndarray,
    parts: Iterable[pa.Table],
    gone: np.ndarray | None = None,
    gpu: GPU | None = None,
) -> tuple[SegmentEntry, faiss.IndexIDMap]:
    """Write NAME.faiss and NAME.arrow from rows of embeddings in order of id, and NAME.gone.arrow if ids are `gone`.

    With a GPU vectors find their lists there. Returns the manifest's entry and the index. Raises StorageError if the
    disk is full.
    """
    index = faiss.deserialize_index(template)
    coarse = coarse_on(gpu, index) if gpu else None
    shown = []
    for rows in parts:
        added = vectors(rows["embedding"]), rows["id"].to_numpy()
        if coarse:
            add_with_ids(index, *added, coarse)
        else:
            index.add_with_ids(*added)
        hidden = [column for column in OWN if column != _SHOWN_BESIDE and column in rows.column_names]
        shown.append(rows.drop_columns(hidden))
    tables = {f"{name}.arrow": pa.concat_tables(shown, promote_options="default") if shown else _NOTHING}
    if gone is not None and len(gone):
        tables[f"{name}.gone.arrow"] = pa.table({"id": np.sort(gone)})
    path = folder / f"{name}.faiss"
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise StorageError(f"{path}: {reason_of(error)}; free some space and run again") from error
    for file, table in tables.items():
        with local_errors(str(folder / file)):
            _write_arrow(folder / file, table.combine_chunks())  # one batch: rows are then found by number at once
    files = {file: sha256(folder / file) for file in (f"{name}.faiss", *tables)}
    return SegmentEntry(version=version, name=name, rows=index.ntotal, files=files), index


def write_delta(folder: Path, version: str, name: str, dim: int, parts: Iterable[pa.Table]) -> tuple[SegmentEntry, int]:
    """Write the segment of an update from its rows, whatever their state; return its entry and by how many items the
    shard grows, which may be negative.

    Its vectors are kept as they are: there are few, and recall cannot suffer.
    """
    template = faiss.serialize_index(new_index("Flat", dim))
    living, gone, growth = [], [np.zeros(0, np.int64)], 0
    for rows in parts:
        found = pc.is_in(rows[STATE], pa.array([WHOLE, TEXT_ONLY]))
        living.append(rows.filter(found))
        gone.append(rows.filter(pc.invert(found))["id"].to_numpy())
        growth += len(living[-1]) - pc.sum(rows[REPLACES]).as_py()
    entry, _ = write_segment(folder, version, name, template, living, np.concatenate(gone))
    return entry, growth


def bytes_per_vector(index: faiss.Index) -> float:
    """Return how much memory a further vector of an index of this kind takes, by the parts it is made of."""
    kind = faiss.downcast_index(index)  # a name of its own: `index` owns what it is made of
    if isinstance(kind, faiss.IndexIDMap):
        return 8 + bytes_per_vector(kind.index)
    if isinstance(kind, faiss.IndexRefine):
        return bytes_per_vector(kind.base_index) + bytes_per_vector(kind.refine_index)
    if isinstance(kind, faiss.IndexPreTransform):
        return bytes_per_vector(kind.index)
    if isinstance(kind, faiss.IndexIVF):
        return kind.code_size + 8 + (0 if kind.direct_map.no() else 8)
    if isinstance(kind, faiss.IndexHNSW):
        return bytes_per_vector(kind.storage) + 4 * kind.hnsw.nb_neighbors(0) + 16  # links of level 0, level, offset
    return kind.sa_code_size()


def reason_of(error: RuntimeError) -> str:
    """Return what FAISS has to say, without where in its source."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: )?", "", str(error).splitlines()[-1]).strip()


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _try(template: np.ndarray, vectors: np.ndarray) -> None:
    """Do with a copy of the template what will be asked of a shard; FAISS raises RuntimeError if it cannot."""
    index = faiss.deserialize_index(template)
    index.add_with_ids(vectors, np.arange(len(vectors)))
    inner = faiss.downcast_index(index.index)
    selector = faiss.IDSelectorBitmap(np.full(-(-len(vectors) // 8), 255, np.uint8))
    inner.search(vectors, 1, params=search_parameters(inner, {}, selector))
    inner.reconstruct(0)


_NOTHING = pa.table({"id": pa.array([], pa.int64()), "item_id": pa.array([], pa.string())})
