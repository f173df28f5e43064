"""The three deployments: `QueryEncoder`, `ShardSearch` (one a shard) and `Ingress`."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from mixer.embedder import QUERY_GRAPH, SETTINGS, QueryEmbedder
from mixer.images import UnreadableImage, decode
from mixer_platform import gallery, versions
from mixer_platform.config import ServeConfig
from mixer_platform.gallery import MISSING, IndexManifest, Shard, ShardEntry
from mixer_platform.serve.api import create_api
from mixer_platform.serve.service import Found, SearchService
from mixer_platform.storage import LocalStorage, open_storage

MODELS = "models"


class QueryEncoder:
    """Photos to unit embeddings; photos of requests that arrive together are encoded together."""

    def __init__(self, workspace: str, model: str, config: ServeConfig) -> None:
        folder = fetch(workspace, f"{MODELS}/{model}", (QUERY_GRAPH, SETTINGS))
        self._embedder = QueryEmbedder(folder, config.encoder_threads)
        # A pool of its own bounds how many large pictures are in memory at once.
        self._decoders = ThreadPoolExecutor(config.encoder_threads, thread_name_prefix="decode")
        # Wrapped here, not above the method: the queue of a decorated method is shared by all objects of the class.
        self._embed = serve.batch(max_batch_size=config.max_batch, batch_wait_timeout_s=config.batch_wait_ms / 1000)(
            self._embed_batch
        )

    async def encode(self, photos: Sequence[bytes]) -> tuple[np.ndarray, list[str | None]]:
        """Return the embeddings float32 [m, dim] of the readable photos, and for all n None or why it is not."""
        encoded = await asyncio.gather(*(self._encode(photo) for photo in photos))
        embeddings = [result for result in encoded if not isinstance(result, str)]
        reasons = [result if isinstance(result, str) else None for result in encoded]
        return np.array(embeddings, np.float32).reshape(len(embeddings), self._embedder.dim), reasons

    async def ready(self) -> bool:
        """Answer."""
        return True

    async def _encode(self, photo: bytes) -> np.ndarray | str:
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(self._decoders, self._pixels, photo)
        except UnreadableImage as error:
            return str(error)
        return await self._embed(pixels)

    def _pixels(self, photo: bytes) -> np.ndarray:
        return self._embedder.preprocess(decode(photo))

    async def _embed_batch(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
        return list(await asyncio.to_thread(self._embedder, np.stack(pixels)))


class ShardSearch:
    """One shard of the index."""

    def __init__(self, workspace: str, entry: ShardEntry, search: Mapping[str, int], config: ServeConfig) -> None:
        folders = {
            part.version: fetch(workspace, f"{gallery.KIND}/{part.version}", part.files) for part in entry.segments
        }
        self._shard = Shard(folders, entry, search, mapped=config.mapped)
        # OpenMP keeps its number of threads for each thread that calls it, so the searching thread must set its own.
        self._searcher = ThreadPoolExecutor(1, "search", initializer=faiss.omp_set_num_threads, initargs=(1,))

    async def search(self, queries: np.ndarray, k: int) -> Found:
        """Return the k nearest items of this shard to queries float32 [n, dim], and their rows."""
        return await asyncio.get_running_loop().run_in_executor(self._searcher, self._search, queries, k)

    async def vector(self, item_id: str) -> np.ndarray | None:
        """Return the embedding of an item, float32 [dim], or None if it is not in this shard."""
        return self._shard.vector(item_id)

    async def ready(self) -> bool:
        """Answer."""
        return True

    def _search(self, queries: np.ndarray, k: int) -> Found:
        scores, ids = self._shard.search(queries, max(1, min(k, self._shard.count)))
        distinct = np.unique(ids[ids != MISSING])
        return Found(scores, ids, dict(zip(distinct.tolist(), self._shard.items(distinct), strict=True)))


@serve.ingress()
class Ingress:
    """The HTTP side: fans a query out and merges what comes back."""

    def __init__(
        self,
        config: ServeConfig,
        index: IndexManifest,
        encoder: DeploymentHandle,
        shards: Mapping[str, DeploymentHandle],
    ) -> None:
        self._api = create_api(SearchService(index, encoder, shards), config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api


def fetch(workspace: str, prefix: str, names: Iterable[str]) -> Path:
    """Return a local folder with these files of a published version: its own folder, or a copy on this machine.

    Replicas share the copy, and may make it at the same time. Raises StorageError.
    """
    storage = open_storage(workspace)
    if isinstance(storage, LocalStorage):
        return Path(storage.path(prefix))
    cache = Path(tempfile.gettempdir()) / f"mixer-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    manifest = storage.tag(f"{prefix}/{versions.MANIFEST}")  # a workspace made anew may use a version's name again
    folder = cache / versions.fingerprint(storage.uri, prefix, manifest)
    for name in names:
        if not (folder / name).exists():
            storage.download(f"{prefix}/{name}", folder / name)
    return folder
