"""From embeddings to shards: which item goes where, under which id, in which kind of FAISS index. No Ray."""

from __future__ import annotations

import hashlib
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from mixer_platform.gallery import ShardEntry, sha256

AUTO_IVF_FROM = 100_000
_TRAIN_PER_LIST = 64


def shard_of(item_id: str, shards: int) -> int:
    """Return the shard of an item: a stable hash, so that an item stays where it is from build to build."""
    return _hash(item_id) % shards


def assign_ids(item_ids: list[str], shards: int) -> np.ndarray:
    """Return a stable int64 id for each item of one shard; ids of different shards never meet.

    An id is the item's hash. Should two items of a shard share one, the later in order of item_id moves on in steps of
    `shards`, which stay in the shard's own residue class.
    """
    ids = np.zeros(len(item_ids), np.int64)
    taken: set[int] = set()
    for row in sorted(range(len(item_ids)), key=item_ids.__getitem__):
        identity = _hash(item_ids[row])
        while identity in taken:
            identity = (identity + shards) % (2**63 - 2**63 % shards)
        taken.add(identity)
        ids[row] = identity
    return ids


def factory_for(items: int, wished: str) -> str:
    """Return the FAISS factory string for one shard's kind of index."""
    if wished != "auto":
        return wished
    return "Flat" if items < AUTO_IVF_FROM else f"IVF{4 * int(items**0.5)},Flat"


def training_size(factory: str) -> int:
    """Return how many vectors an index of this kind wants to be trained on."""
    lists = factory.removeprefix("IVF").split(",")[0] if factory.startswith("IVF") else "256"
    return _TRAIN_PER_LIST * int(lists) if lists.isdigit() else 65_536


def trained_template(factory: str, dim: int, sample: np.ndarray) -> np.ndarray:
    """Return an empty, trained index, serialised, that every shard starts from; inner product, ids of its own.

    Raises ValueError for a factory string that FAISS refuses.
    """
    kind = factory if factory.startswith("IVF") else f"IDMap2,{factory}"
    try:
        index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(np.ascontiguousarray(sample, np.float32))
    except RuntimeError as error:
        raise ValueError(f"FAISS refuses {factory!r}: {str(error).splitlines()[-1]}") from error
    if isinstance(index, faiss.IndexIVF):
        index.set_direct_map_type(faiss.DirectMap.Hashtable)  # items are looked up by id
    return faiss.serialize_index(index)


def write_shard(
    folder: Path, number: int, template: np.ndarray, vectors: np.ndarray, rows: pa.Table, shards: int
) -> tuple[ShardEntry, faiss.Index, np.ndarray]:
    """Write shard-NNNNN.faiss and .arrow from vectors [n, dim] and display rows (with item_id) in the same order.

    Returns the manifest's entry, the index and the ids in the order of `vectors`.
    """
    name = f"shard-{number:05d}"
    ids = assign_ids(rows["item_id"].to_pylist(), shards)
    order = np.argsort(ids)
    index = faiss.deserialize_index(template)
    index.add_with_ids(np.ascontiguousarray(vectors[order], np.float32), ids[order])
    faiss.write_index(index, str(folder / f"{name}.faiss"))
    table = rows.take(pa.array(order)).add_column(0, "id", pa.array(ids[order]))
    with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    files = {file: sha256(folder / file) for file in (f"{name}.faiss", f"{name}.arrow")}
    return ShardEntry(name=name, count=len(ids), files=files), index, ids


def exact_top_k(queries: np.ndarray, vectors: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and ids, both [queries, min(k, n)], of the greatest inner products, best first."""
    scores = queries @ vectors.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, best, axis=1), ids[best]


def _hash(item_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(item_id.encode(), digest_size=8).digest(), "big") >> 1
