"""A query's way through the service: wait for its turn, be answered by one engine, become a page of items."""

from __future__ import annotations

import asyncio
import reprlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mixer_platform.config import ServeConfig
from mixer_platform.serve.batching import Batcher
from mixer_platform.serve.engine import Engine, Query, Ranking
from mixer_platform.serve.errors import ApiError, invalid, late
from mixer_platform.serve.grouping import LOOK, depths, first_of_each, first_of_each_look
from mixer_platform.serve.payload import Options
from mixer_platform.serve.schemas import Item, Page, Timings
from mixer_platform.serve.swap import Swapper


class SearchService:
    """Answer queries by whatever engine `swapper` holds when their turn comes."""

    def __init__(self, swapper: Swapper, config: ServeConfig) -> None:
        self.swapper, self._config = swapper, config
        self.batcher: Batcher[Query, Ranking | ApiError] = Batcher(
            self._answer, config.max_batch, lambda: self.engine.batches, config.max_queued
        )

    @property
    def engine(self) -> Engine:
        """The engine that answers now."""
        return self.swapper.engine

    async def search(
        self, photos: Sequence[bytes | ApiError], options: Options, expires: float
    ) -> list[tuple[Page, Ranking] | ApiError]:
        """Return for each photo its page and how it was ranked, or why it cannot be used.

        Raises ApiError: 422 for options that the index does not know, 503 where there is no answer by `expires`.
        """
        engine = self.engine
        where = self._where(options, engine)
        whole = [photo for photo in photos if not isinstance(photo, ApiError)]
        depth, shown = next(self._depths(options)), None if options.group_by else options.offset + options.k
        queries = [Query(photo, None, depth, where, expires, engine, shown) for photo in whole]
        async with until_expired(expires):
            rankings = iter(await self.batcher(queries, expires) if queries else [])
            answers = [photo if isinstance(photo, ApiError) else next(rankings) for photo in photos]
            pages = list[tuple[Page, Ranking] | ApiError]()
            for answer in answers:
                pages.append(answer if isinstance(answer, ApiError) else await self._page(answer, options, expires))
                await asyncio.sleep(0)  # long pages of many photos let others in between
            return pages

    async def similar(self, item_id: str, options: Options, expires: float) -> tuple[Page, Ranking]:
        """Return the page of the items nearest to an item, itself left out. Raises ApiError, 404 for no such item."""
        engine = self.engine
        where = self._where(options, engine)
        async with until_expired(expires):
            vector = await engine.vector(item_id, expires)
            if vector is None:
                raise unknown_item(engine, item_id)
            query = Query(None, vector, next(self._depths(options, more=1)), where, expires, engine)
            (ranking,) = await self.batcher([query], expires)
            if isinstance(ranking, ApiError):
                raise ranking
            return await self._page(ranking, options, expires, without=item_id)

    async def item(self, item_id: str, expires: float) -> dict[str, Any]:
        """Return an item's display columns. Raises ApiError, 404 without such an item."""
        async with until_expired(expires):
            engine = self.engine
            row = await engine.item(item_id, expires)
            if row is None:
                raise unknown_item(engine, item_id)
            return row

    async def _answer(self, queries: list[Query]) -> list[Ranking | ApiError]:
        results: dict[int, Ranking | ApiError] = {}
        for engine in {id(query.engine): query.engine for query in queries}.values():  # two while a version comes in
            places = [place for place, query in enumerate(queries) if query.engine is engine]
            answers = await (engine or self.engine).answer([queries[place] for place in places])
            results |= dict(zip(places, answers, strict=True))
        return [results[place] for place in range(len(queries))]

    def _where(self, options: Options, engine: Engine) -> str | None:
        """Return the filter as the engine takes it. Raises ApiError for options that it does not know."""
        names = [name for name in engine.schema.names if name not in ("id", "item_id")]
        if options.group_by not in (None, LOOK, *names):
            raise invalid(
                f"group_by is {reprlib.repr(options.group_by)}; it must be {LOOK} or one of {', '.join(names)}"
            )
        if options.min_probability and engine.calibration is None:
            raise invalid("min_probability: this model's scores are not calibrated; run jobs/evaluate.py")
        return options.where(engine.schema)

    def _depths(self, options: Options, more: int = 0) -> Iterator[int]:
        """Yield how many items to ask for: one more than is shown, which tells whether there is a next page; where
        some turn out to be alike, more and more."""
        shown, most = options.offset + options.k + 1, self._config.max_k + 1
        for depth in depths(shown, most, spare=2 if options.group_by else 1):
            yield depth + more

    async def _page(
        self, ranking: Ranking, options: Options, expires: float, without: str | None = None
    ) -> tuple[Page, Ranking]:
        shown = options.offset + options.k
        deeper = self._depths(options, more=without is not None)
        asked = next(deeper)
        while True:
            kept = await self._kept(ranking, options, expires, without)
            exhausted = len(ranking.ids) < asked
            if len(kept) > shown or exhausted or (depth := next(deeper, None)) is None:
                break
            asked = depth
            query = Query(None, ranking.vector, asked, options.where(ranking.engine.schema), expires)
            (answer,) = await ranking.engine.answer([query])
            assert isinstance(answer, Ranking)
            ranking = replace(
                answer,
                encode_ms=ranking.encode_ms,
                search_ms=ranking.search_ms + answer.search_ms,
                asked=ranking.asked,
                begun=ranking.begun,
            )
        calibration = ranking.engine.calibration
        probabilities = calibration.probability(ranking.scores) if calibration else None
        likely = kept
        least = max(options.min_probability or 0, self._config.min_probability)
        if probabilities is not None and least:
            likely = kept[probabilities[kept] >= least]
        places = likely[options.offset : shown]
        items = [
            Item.from_row(
                ranking.items[place],
                score=float(ranking.scores[place]),
                probability=None if probabilities is None else float(probabilities[place]),
            )
            for place in places.tolist()
        ]
        more = len(likely) > shown and shown < self._config.max_k
        return Page.model_construct(
            items=items, next_offset=shown if more else None, nothing_similar=bool(len(kept)) and not len(likely)
        ), ranking

    async def _kept(self, ranking: Ranking, options: Options, expires: float, without: str | None) -> np.ndarray:
        """Return the places of the ranking that are shown: without the item itself, and one of each group."""
        places = np.arange(len(ranking.ids))
        if without is not None:
            places = np.array([place for place in places if ranking.items[place]["item_id"] != without], np.int64)
        if options.group_by is None:
            return places
        if options.group_by == LOOK:
            vectors = await ranking.engine.vectors_of(ranking.ids[places], expires)
            return places[first_of_each_look(vectors, self._config.same_look)]
        return places[first_of_each([ranking.items[place].get(options.group_by) for place in places])]


def unknown_item(engine: Engine, item_id: str) -> ApiError:
    """There is no such item."""
    return ApiError(404, "unknown_item", f"index {engine.index.version} holds no item {item_id[:200]!r}")


def timings(rankings: Sequence[Ranking], began: float) -> Timings:
    """Return what a request's rankings took, the slowest of each part, and all since `began` (Unix time)."""
    encodes = [ranking.encode_ms for ranking in rankings if ranking.encode_ms is not None]
    return Timings.model_construct(
        encode=round(max(encodes), 3) if encodes else None,
        search=round(max((ranking.search_ms for ranking in rankings), default=0.0), 3),
        total=round(1000 * (time.time() - began), 3),
    )


class until_expired:
    """Gives up at a Unix time, with the reply that says so."""

    def __init__(self, expires: float) -> None:
        self._timeout = asyncio.timeout(expires - time.time())

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *failure: Any) -> None:
        try:
            await self._timeout.__aexit__(*failure)
        except TimeoutError:
            raise late() from None
