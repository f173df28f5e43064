"""One model and one index that answer together: a batch of queries in, their nearest items out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa

from mixer.calibration import Calibration
from mixer_platform.attributes import merge_attributes, merged_schema
from mixer_platform.gallery import MISSING, IndexManifest, merge_top_k
from mixer_platform.serve.errors import ApiError, unavailable, unreadable
from mixer_platform.serve.parts import Found, Parts


@dataclass(frozen=True, eq=False)
class Query:
    """What is searched for: a photo, or a unit embedding float32 [dim]; the k nearest that `where` lets pass.

    `engine`: whose embedding and whose columns those are, so who must answer, whatever has come in meanwhile.
    `shown`: how many of the k may be shown, default all: the others' display columns are not read.
    """

    photo: bytes | None
    vector: np.ndarray | None
    k: int
    where: str | None
    expires: float  # Unix time
    engine: Engine | None = None
    shown: int | None = None
    asked: float = field(default_factory=time.time)


@dataclass(frozen=True, eq=False)
class Ranking:
    """The nearest items of one query, best first: scores float32 and ids int64 [m].

    `items` are the display columns of those that may be shown.
    `asked` and `begun` are when the query came and when its batch was begun, Unix times.
    """

    engine: Engine
    vector: np.ndarray
    scores: np.ndarray
    ids: np.ndarray
    items: list[dict[str, Any]]
    missing_shards: list[str]
    encode_ms: float | None
    search_ms: float
    asked: float
    begun: float

    @property
    def wait_ms(self) -> float:
        """What the query waited for its turn."""
        return max(0.0, 1000 * (self.begun - self.asked))


def read_items(found: Sequence[Found], ids: np.ndarray, schema: pa.Schema) -> list[dict[str, Any]]:
    """Return the display columns of ids, int64 [m] in their order, each from the shard that found it."""
    parts = [part.rows.items(ids, schema) for part in found]
    return [next(filter(None, each), {}) for each in zip(*parts, strict=True)]


class Engine:
    """The encoder and the shards of one index version. Its parts never change, so it never mixes two versions."""

    def __init__(
        self,
        index: IndexManifest,
        parts: Parts,
        calibration: Calibration | None = None,
        degrade: bool = True,
    ) -> None:
        """`degrade`: answer without shards that are lost; else such a query fails."""
        self.index, self.calibration = index, calibration
        self._parts, self._degrade = parts, degrade
        self.schema: pa.Schema = pa.schema([])
        self.attributes: list[Any] = []

    @property
    def batches(self) -> int:
        """How many batches may be in work at a time."""
        return self._parts.batches

    async def describe(self, expires: float) -> None:
        """Learn the index's attributes from its shards. Raises ApiError."""
        described, lost = await self._parts.run(self._ask, "describe", expires)
        if lost:
            raise next(iter(lost.values()))
        self.schema = merged_schema([schema for schema, _ in described])
        self.attributes = merge_attributes([attributes for _, attributes in described])

    async def answer(self, queries: list[Query]) -> list[Ranking | ApiError]:
        """Return each query's ranking, or why its photo cannot be used. Raises ApiError where no part answers.

        `describe` comes first: it says which columns there are.
        """
        return await self._parts.run(self._answer, queries)

    async def _answer(self, queries: list[Query]) -> list[Ranking | ApiError]:
        begun, began = time.time(), perf_counter()
        expires = max(query.expires for query in queries)
        vectors, errors = await self._vectors(queries, expires)
        encoded = perf_counter()
        results: list[Ranking | ApiError | None] = list(errors)
        # Of an index that is not exact, what is found depends on how deep it is searched: so not on who else asks.
        asked: dict[tuple[str | None, int], list[int]] = {}
        for place, (query, error) in enumerate(zip(queries, errors, strict=True)):
            if error is None:
                asked.setdefault((query.where, query.k), []).append(place)
        encode_ms = 1000 * (encoded - began)
        for (where, k), places in asked.items():
            started = perf_counter()
            stacked = np.stack([vectors[place] for place in places])
            nearest, lost = await self._ask("search", expires, stacked, k, where)
            scores, ids = merge_top_k([(part.scores, part.ids) for part in nearest], k)
            best = [each[each != MISSING] for each in ids]
            shown = [each[: queries[place].shown] for each, place in zip(best, places, strict=True)]
            items = iter(read_items(nearest, np.concatenate(shown), self.schema))
            search_ms = 1000 * (perf_counter() - started)
            for row, place in enumerate(places):
                results[place] = Ranking(
                    self,
                    vectors[place],
                    scores[row, : len(best[row])],
                    best[row],
                    list(islice(items, len(shown[row]))),
                    list(lost),
                    None if queries[place].photo is None else encode_ms,
                    search_ms,
                    queries[place].asked,
                    begun,
                )
        return results  # type: ignore[return-value]

    async def vector(self, item_id: str, expires: float) -> np.ndarray | None:
        """Return the embedding of an item, float32 [dim], or None if no shard holds it. Raises ApiError."""
        return await self._parts.run(self._first, "vector", item_id, expires)

    async def item(self, item_id: str, expires: float) -> dict[str, Any] | None:
        """Return the display columns of an item, or None if no shard holds it. Raises ApiError."""
        return await self._parts.run(self._first, "item", item_id, expires)

    async def vectors_of(self, ids: np.ndarray, expires: float) -> np.ndarray:
        """Return the embeddings of ids, float32 [n, dim]; zeros where its shard is lost."""
        vectors = np.zeros((len(ids), self.index.dim), np.float32)
        answers, _ = await self._parts.run(self._ask, "vectors", expires, ids)
        for held, found in answers:
            vectors[held] = found
        return vectors

    async def unready(self, expires: float) -> list[str]:
        """Return the names of the parts that do not answer."""
        return await self._parts.unready(expires)

    async def _vectors(
        self, queries: Sequence[Query], expires: float
    ) -> tuple[list[np.ndarray], list[ApiError | None]]:
        photos = [query.photo for query in queries if query.photo is not None]
        embeddings: Iterable[np.ndarray] = []
        reasons: list[str | None] = []
        if photos:
            embeddings, reasons = await self._parts.encode(photos, expires)
        encoded, why = iter(embeddings), iter(reasons)
        vectors: list[np.ndarray] = []
        errors: list[ApiError | None] = []
        for query in queries:
            reason = next(why) if query.photo is not None else None
            errors.append(unreadable(reason) if reason else None)
            if query.vector is not None:
                vectors.append(query.vector)
            else:
                vectors.append(np.empty(0, np.float32) if reason else next(encoded))
        return vectors, errors

    async def _ask(self, method: str, expires: float, *arguments: Any) -> tuple[list[Any], dict[str, ApiError]]:
        """Return what those shards say that answer, and why the others do not. Raises ApiError."""
        if self._degrade:  # leave time to answer without those that hang
            expires = (time.time() + expires) / 2
        answers = await self._parts.ask(method, *arguments, expires=expires)
        lost: dict[str, ApiError] = {}
        for name, answer in zip(self._parts.names, answers, strict=True):
            if isinstance(answer, ApiError):
                if answer.status != 503:
                    raise answer
                lost[name] = answer
        if lost and (not self._degrade or len(lost) == len(answers)):
            raise next(iter(lost.values()))
        return [answer for answer in answers if not isinstance(answer, ApiError)], lost

    async def _first(self, method: str, item_id: str, expires: float) -> Any:
        """Return what the one shard says that knows the item, None if none does."""
        answers, lost = await self._ask(method, expires, item_id)
        known = next((answer for answer in answers if answer is not None), None)
        if known is None and lost:
            raise unavailable(f"{' and '.join(lost)} cannot be asked just now; try again")
        return known
