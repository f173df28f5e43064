"""A few photos whose items an evaluation found: a version that finds none does not come in, and each minute counts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.errors import MixerError
from mixer_platform.serve.engine import Engine, Query, Ranking
from mixer_platform.serve.errors import ApiError
from mixer_platform.serve.payload import Options
from mixer_platform.storage import Storage, open_storage, read_uri

if TYPE_CHECKING:
    from mixer_platform.serve.service import SearchService

REPORTS = "reports"
FIRST = 10  # a right item among so many counts
_COLUMNS = ["image", "relevant_item_ids", "hits"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class KnownPhoto:
    """A photo, and the items of which one was among the first that an evaluation found."""

    content: bytes
    relevant: frozenset[str]


class Canary:
    """Searches for the known photos of whatever model answers; a model that was not evaluated yet has none."""

    def __init__(self, config: RunConfig) -> None:
        self._storage, self._config = open_storage(config.workspace), config.serve
        self._reports: dict[str, dict[str, Any]] = {}  # by key: they never change
        self._known: tuple[str, list[KnownPhoto]] = ("", [])  # of one report

    async def check(self, engine: Engine, expires: float) -> None:
        """Raise MixerError if an engine finds none of the known photos of its model; ApiError if it does not answer."""
        known = await asyncio.to_thread(self._photos, engine.index.model)
        missed = 0
        for photo in known:
            (ranking,) = await engine.answer([Query(photo.content, None, FIRST, None, expires)])
            if not isinstance(ranking, Ranking):
                raise ranking
            if photo.relevant & {item["item_id"] for item in ranking.items}:
                return
            missed += await _holds(engine, photo.relevant, expires)
        if missed:
            raise MixerError(
                f"index {engine.index.version}: it finds no right item for any of {missed} photos that model "
                f"{engine.index.model} is known to find; evaluate it, or set serve.canary_photos=0"
            )

    async def follow(self, service: SearchService, every_s: float, observe: Callable[[int, int, int], None]) -> None:
        """Search every `every_s` seconds, for ever; `observe` takes how many were found, missed and failed."""
        while True:
            observe(*await self.search(service))
            await asyncio.sleep(every_s)

    async def search(self, service: SearchService) -> tuple[int, int, int]:
        """Search for each known photo as a client would; return how many were found, missed and failed.

        A photo whose items have all left the index counts as none of these.
        """
        found = missed = failed = 0
        options = Options(k=min(FIRST, self._config.max_k))
        for photo in await asyncio.to_thread(self._photos, service.engine.index.model):
            expires = time.time() + self._config.timeout_ms / 1000
            try:
                (answer,) = await service.search([photo.content], options, expires)
                if isinstance(answer, ApiError):
                    raise answer
                page, ranking = answer
                if photo.relevant & {item.id for item in page.items}:
                    found += 1
                elif await _holds(ranking.engine, photo.relevant, expires):
                    missed += 1
            except Exception as error:  # whatever it is, a client would have met it
                failed += 1
                log.warning("a known photo was not searched for: %s", error)
        return found, missed, failed

    def _photos(self, model: str) -> list[KnownPhoto]:
        """Return the known photos of a model. What cannot be read of them is told, and stops nothing."""
        try:
            report = self._newest(model) if self._config.canary_photos else None
            if report is None:
                return []
            version = report["version"]
            if self._known[0] != version:
                self._known = version, known_photos(self._storage, version, self._config.canary_photos)
        except (MixerError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            log.warning("the known photos of model %s cannot be read: %s", model, error)
            return []
        return self._known[1]

    def _newest(self, model: str) -> dict[str, Any] | None:
        keys = [key for key in self._storage.list(REPORTS) if key.endswith(".json")]
        for key in keys:
            if key not in self._reports:
                self._reports[key] = versions.read_json(self._storage, key)
        reports = [self._reports[key] for key in keys if self._reports[key].get("model") == model]
        return max(reports, key=lambda report: report.get("created_ms", 0), default=None)


def known_photos(storage: Storage, report: str, count: int) -> list[KnownPhoto]:
    """Return up to `count` photos, spread over a report, of which a right item was among the first 10.

    Those that cannot be read any more are passed over. Raises StorageError if there is no such report.
    """
    table = pq.read_table(pa.BufferReader(storage.read(f"{REPORTS}/{report}.parquet")), columns=_COLUMNS)
    rows = [row for row in table.to_pylist() if row["image"] and any((row["hits"] or [])[:FIRST])]
    known = []
    for place in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)).tolist():
        try:
            known.append(KnownPhoto(read_uri(rows[place]["image"]), frozenset(rows[place]["relevant_item_ids"])))
        except MixerError as error:
            log.warning("a known photo is passed over: %s", error)
    return known


async def _holds(engine: Engine, item_ids: Iterable[str], expires: float) -> bool:
    """Return whether an index holds one of these items."""
    for item_id in sorted(item_ids):
        if await engine.item(item_id, expires) is not None:
            return True
    return False
