"""A query's way through the graph: encode, ask every shard, merge. Knows handles, knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from mixer_platform.gallery import MISSING, IndexManifest, merge_top_k
from mixer_platform.serve.errors import ApiError, unavailable, unreadable
from mixer_platform.serve.schemas import Item, Timings

ANSWER_TIMEOUT_S = 60.0  # long enough for a deployment that was scaled to zero
PROBE_TIMEOUT_S = 2.0
ENCODER = "QueryEncoder"

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """What one shard found for n queries: scores and ids [n, k'] as `Shard.search` gives them, and rows by id."""

    scores: np.ndarray
    ids: np.ndarray
    rows: dict[int, dict[str, Any]]


def merge(found: Sequence[Found], k: int) -> list[list[Item]]:
    """Return the k best items of n queries over all shards, best first; fewer where there are fewer."""
    rows = {item: row for part in found for item, row in part.rows.items()}
    scores, ids = merge_top_k([(part.scores, part.ids) for part in found], k)
    return [
        [Item.from_row(rows[item], score) for score, item in zip(*best, strict=True) if item != MISSING]
        for best in zip(scores.tolist(), ids.tolist(), strict=True)
    ]


class SearchService:
    """Search an index whose encoder and shards answer through `handles`."""

    def __init__(self, index: IndexManifest, encoder: DeploymentHandle, shards: Mapping[str, DeploymentHandle]) -> None:
        self.index = index
        self._encoder, self._shards = encoder, shards

    async def search(self, photos: Sequence[bytes | ApiError], k: int) -> tuple[list[list[Item] | ApiError], Timings]:
        """Return for each photo its k nearest items, or why it cannot be used. Raises ApiError."""
        started = perf_counter()
        embeddings, errors = await self._encode(photos)
        encoded = perf_counter()
        found = iter(await self._nearest(embeddings, k) if len(embeddings) else [])
        return [error or next(found) for error in errors], _timings(started, encoded)

    async def similar(self, item_id: str, k: int) -> tuple[list[Item], Timings]:
        """Return the k items nearest to an item, itself left out. Raises ApiError, 404 if there is no such item."""
        started = perf_counter()
        vectors = await self._ask_shards("vector", item_id)
        vector = next((vector for vector in vectors if vector is not None), None)
        if vector is None:
            raise ApiError(404, "unknown_item", f"index {self.index.version} holds no item {item_id!r}")
        (items,) = await self._nearest(vector[np.newaxis], k + 1)
        return [item for item in items if item.id != item_id][:k], _timings(started)

    async def unready(self) -> list[str]:
        """Return the deployments that do not answer now."""
        parts = {ENCODER: self._encoder, **self._shards}
        probes = [_answer(name, handle.ready.remote(), PROBE_TIMEOUT_S) for name, handle in parts.items()]
        answers = await asyncio.gather(*probes, return_exceptions=True)
        return [name for name, answer in zip(parts, answers, strict=True) if answer is not True]

    async def _encode(self, photos: Sequence[bytes | ApiError]) -> tuple[np.ndarray, list[ApiError | None]]:
        """Return the embeddings of the photos that can be used, and for all of them None or the error."""
        whole = [photo for photo in photos if isinstance(photo, bytes)]
        embeddings, reasons = await _answer(ENCODER, self._encoder.encode.remote(whole), ANSWER_TIMEOUT_S)
        errors = iter([unreadable(reason) if reason else None for reason in reasons])
        return embeddings, [photo if isinstance(photo, ApiError) else next(errors) for photo in photos]

    async def _nearest(self, queries: np.ndarray, k: int) -> list[list[Item]]:
        return merge(await self._ask_shards("search", queries, k), k)

    async def _ask_shards(self, method: str, *arguments: Any) -> list[Any]:
        responses = {name: getattr(shard, method).remote(*arguments) for name, shard in self._shards.items()}
        return await asyncio.gather(
            *(_answer(name, response, ANSWER_TIMEOUT_S) for name, response in responses.items())
        )


async def _answer(part: str, response: Any, timeout_s: float) -> Any:
    """Wait for a deployment's response; every way to be away becomes a 503, what the deployment raises stays."""
    try:
        async with asyncio.timeout(timeout_s):
            return await response
    except RayTaskError:
        raise
    except BackPressureError:
        raise unavailable(f"{part} has too many requests waiting; try again", code="saturated") from None
    except TimeoutError:
        response.cancel()
        raise unavailable(f"{part} did not answer within {timeout_s:g} s; try again") from None
    except (RayError, RayServeException) as error:
        log.warning("%s: %r", part, error)
        raise unavailable(f"{part} is not available just now; try again") from None


def _timings(started: float, encoded: float | None = None) -> Timings:
    now = perf_counter()
    encode = None if encoded is None else _milliseconds(encoded - started)
    return Timings(encode=encode, search=_milliseconds(now - (encoded or started)), total=_milliseconds(now - started))


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
