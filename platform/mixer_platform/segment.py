"""A segment of an index as its readers see it: vectors and display rows that are searched together."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from mixer.fast_faiss import faiss
from mixer_platform.errors import StorageError
from mixer_platform.filters import Filter
from mixer_platform.rows import RowReader

MISSING = -1  # FAISS pads short results with this id
_LEAST = np.float32(np.finfo(np.float32).min)  # and with this score
_MOST_TIED = 16  # times k: so many equal scores are put in order
_CACHED_BYTES = 32 * 2**20  # of filters' bitmaps, a segment: 250 of a million rows
# Measured on 200,000 vectors of 128 dimensions, with filters that have to do with the vectors and others that have not.
_TAKE_OUT = 1 / 200  # share of rows up to which vectors are taken out: a scan looks at every row to pass it over
_SCAN_BELOW = 0.1  # share below which codes and graphs lead to too few of the rows that pass
_THOROUGH = -1.5  # exponent: the fewer rows pass, the more of them lie in other lists than those next to the query


class SegmentEntry(BaseModel):
    """One segment of a shard: its files lie in the folder of the index version that wrote them.

    `NAME.faiss` holds vectors by id, `NAME.arrow` the display columns of the same ids in the same order;
    `NAME.gone.arrow`, where there is one, the ids that this segment's update deleted.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    name: str
    rows: int
    files: dict[str, str]  # names and their sha256


class Passing(NamedTuple):
    """The rows that a search may find. Without `bits` (one a row, the lowest first) it may find all."""

    total: int
    bits: np.ndarray | None = None
    selector: faiss.IDSelector | None = None

    @classmethod
    def of(cls, mask: np.ndarray) -> Passing:
        """Return what lets bool [rows] pass."""
        total = int(mask.sum())
        if total == len(mask):
            return cls(total)
        bits = np.packbits(mask, bitorder="little")
        return cls(total, bits, faiss.IDSelectorBitmap(bits))

    def rows(self) -> np.ndarray:
        """Return the numbers of the rows."""
        if self.bits is None:
            return np.arange(self.total)
        return np.flatnonzero(np.unpackbits(self.bits, bitorder="little"))


class Segment:
    """Vectors and display rows in one order; rows that a later segment replaced or deleted are hidden."""

    def __init__(self, folder: str | Path, entry: SegmentEntry, search: Mapping[str, int], mapped: bool) -> None:
        """Load and check it from a local folder. Raises StorageError naming the file that is not as published."""
        for name, digest in entry.files.items():
            path = Path(folder) / name
            if not path.exists():
                raise StorageError(f"{path}: missing; publish the index again")
            if sha256(path) != digest:
                raise StorageError(f"{path}: not the bytes that were published; copy or publish the index again")
        path = Path(folder) / f"{entry.name}.faiss"
        self._owner = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        self._index = faiss.downcast_index(self._owner.index)
        self._vectors = _storage(self._index)
        self._apart = isinstance(self._index, faiss.IndexRefine | faiss.IndexHNSW)  # from how they are found
        self._settings = search
        self.dim: int = self._owner.d
        self.rows = _mapped_table(Path(folder) / f"{entry.name}.arrow")
        self._reader = RowReader(self.rows)
        self.ids: np.ndarray = self.rows["id"].to_numpy()
        if not np.array_equal(faiss.vector_to_array(self._owner.id_map), self.ids):
            raise StorageError(f"{path}: its ids are not those of {entry.name}.arrow; publish the index again")
        gone = f"{entry.name}.gone.arrow"
        self._gone = _mapped_table(Path(folder) / gone)["id"].to_numpy() if gone in entry.files else self.ids[:0]
        self.alive = np.ones(len(self.ids), bool)
        self._all = Passing(len(self.ids))
        self._filtered: OrderedDict[Filter, Passing] = OrderedDict()
        self._filtered_bytes = 0
        self._lock = threading.Lock()

    @property
    def replaces(self) -> np.ndarray:
        """The ids that earlier segments no longer show."""
        return np.concatenate([self.ids, self._gone])

    def hide(self, ids: np.ndarray) -> None:
        """Find none of these ids any more. Only before the first search."""
        rows = self.rows_of(ids)
        self.alive[rows[rows != MISSING]] = False
        self._all = Passing.of(self.alive)

    def search(self, queries: np.ndarray, k: int, where: Filter | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and ids as `Shard.search` does: k of them wherever k rows pass `where`."""
        passing = self._passing(where)
        if not passing.total:
            return np.full((len(queries), k), _LEAST), np.full((len(queries), k), MISSING)
        search = self._taken_out if passing.total <= _TAKE_OUT * len(self.ids) else self._probed
        # Of equal scores FAISS keeps any: ask for more until the first that is left out is worse than the last.
        for depth in (k + 1, 2 * k, 4 * k, _MOST_TIED * k):
            scores, rows = search(queries, depth, passing)
            if depth > passing.total or not (scores[:, k - 1] == scores[:, depth - 1]).any():
                break
        ids = np.where(rows < 0, MISSING, self.ids[rows])
        return best_of(np.where(rows < 0, _LEAST, scores), ids, k)

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the row of each id, int64 [n], MISSING where it is not found here."""
        if not len(self.ids):
            return np.full(len(ids), MISSING)
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where((self.ids[rows] == ids) & self.alive[rows], rows, MISSING)

    def items(self, rows: np.ndarray, schema: pa.Schema) -> list[dict[str, Any]]:
        """Return the display columns of rows as `RowReader.read` does."""
        return self._reader.read(rows.tolist(), schema)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of rows as the index knows them, float32 [n, dim]."""
        return self._vectors.reconstruct_batch(np.ascontiguousarray(rows, np.int64))

    def _passing(self, where: Filter | None) -> Passing:
        if not where:
            return self._all
        with self._lock:
            if found := self._filtered.get(where):
                self._filtered.move_to_end(where)
                return found
        passing = Passing.of(self.alive & where.mask(self.rows))
        with self._lock:
            if where not in self._filtered:
                self._filtered_bytes += _size(where, passing)
            self._filtered[where] = passing
            while self._filtered_bytes > _CACHED_BYTES:
                self._filtered_bytes -= _size(*self._filtered.popitem(last=False))
        return passing

    def _probed(self, queries: np.ndarray, k: int, passing: Passing) -> tuple[np.ndarray, np.ndarray]:
        """Search as the index is made to be, the more thoroughly the fewer rows pass; scan where that finds too few."""
        share = passing.total / self._all.total
        if self._apart and share < _SCAN_BELOW:
            return self._scanned(queries, k, passing)
        settings = {
            name: round(value * share**_THOROUGH) if name in ("nprobe", "efSearch") else value
            for name, value in self._settings.items()
        }
        # FAISS knows rows by number below the layer of ids, and only there can it be told which ones to pass over.
        parameters = search_parameters(self._index, settings, passing.selector)
        scores, rows = self._index.search(queries, k, params=parameters)
        short = (rows >= 0).sum(axis=1) < min(k, passing.total)
        if short.any():
            scores[short], rows[short] = self._scanned(queries[short], k, passing)
        return scores, rows

    def _scanned(self, queries: np.ndarray, k: int, passing: Passing) -> tuple[np.ndarray, np.ndarray]:
        """Compare with every row that passes."""
        ivf = faiss.try_extract_index_ivf(self._vectors)
        every = {"nprobe": ivf.nlist} if ivf else {}
        return self._vectors.search(queries, k, params=search_parameters(self._vectors, every, passing.selector))

    def _taken_out(self, queries: np.ndarray, k: int, passing: Passing) -> tuple[np.ndarray, np.ndarray]:
        """Compare with the rows that pass, of which there are few, taken out of the index."""
        among = passing.rows()
        found = min(k, len(among))
        best, places = faiss.knn(queries, self.vectors(among), found, metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.full((len(queries), k), _LEAST)
        rows = np.full((len(queries), k), MISSING)
        scores[:, :found], rows[:, :found] = best, among[places]
        return scores, rows


def best_of(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of scores and ids [n, k'], best first: equal scores by smaller id, MISSING last."""
    order = np.lexsort((ids, -scores, ids == MISSING), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def search_parameters(
    index: faiss.Index, settings: Mapping[str, int], selector: faiss.IDSelector | None = None
) -> faiss.SearchParameters:
    """Return how to search an index of any kind: the settings that it understands, over what `selector` lets pass."""
    kind = faiss.downcast_index(index)
    chosen = {"sel": selector} if selector is not None else {}
    if isinstance(kind, faiss.IndexRefine):
        base = search_parameters(kind.base_index, settings, selector)
        return faiss.IndexRefineSearchParameters(k_factor=settings.get("k_factor", 1), base_index_params=base)
    if isinstance(kind, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=search_parameters(kind.index, settings, selector))
    if isinstance(kind, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=settings.get("nprobe", 1), **chosen)
    if isinstance(kind, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=settings.get("efSearch", 16), **chosen)
    return faiss.SearchParameters(**chosen)


def sha256(path: str | Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _storage(index: faiss.Index) -> faiss.Index:
    """Return the part of an index, as `downcast_index` gives it, that holds its vectors best."""
    if isinstance(index, faiss.IndexRefine):
        return faiss.downcast_index(index.refine_index)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.downcast_index(index.storage)
    return index


def _size(where: Filter, passing: Passing) -> int:
    return len(where.text) + (0 if passing.bits is None else passing.bits.nbytes) + 1000  # objects


def _mapped_table(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
