"""What Prometheus is told of the service: Ray's metrics, which the agent of each node exports as `ray_mixer_...`.

Serve adds the deployment, its replica and the application to each. A record costs 2 to 4 microseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from ray.serve.metrics import Counter, Gauge, Histogram

from mixer_platform.gallery import IndexManifest
from mixer_platform.serve.engine import Ranking
from mixer_platform.serve.schemas import Swap
from mixer_platform.serve.service import SearchService

PREFIX = "ray_"  # of every name, by Ray
LATENCY_MS = [1, 2, 5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000]
BATCH_SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 32, 64]
SAMPLE_S = 1.0  # from look to look at what has no event of its own


@dataclass(frozen=True)
class Searched:
    """What a request searched: in which index, for how many items, and how its queries were ranked, if any was."""

    index: IndexManifest
    k: int
    rankings: Sequence[Ranking]

    @property
    def missing_shards(self) -> list[str]:
        """The shards that did not answer."""
        return sorted({shard for ranking in self.rankings for shard in ranking.missing_shards})

    @property
    def parts_ms(self) -> dict[str, float]:
        """What each part took, the slowest of the queries: wait and search, and encode where a photo was sent."""
        if not self.rankings:
            return {}
        parts = {
            "wait": max(ranking.wait_ms for ranking in self.rankings),
            "search": max(ranking.search_ms for ranking in self.rankings),
        }
        encodes = [ranking.encode_ms for ranking in self.rankings if ranking.encode_ms is not None]
        return parts | {"encode": max(encodes)} if encodes else parts


class Metrics:
    """The service's metrics in this replica."""

    def __init__(self) -> None:
        self._requests = Counter("mixer_requests", "Requests answered, or refused", ("route", "status"))
        self._latency = Histogram(
            "mixer_latency_ms",
            "Milliseconds of requests: wait (for a turn), encode, search, and total with all the rest",
            LATENCY_MS,
            ("route", "part"),
        )
        self._degraded = Counter("mixer_degraded", "Replies without the items of a shard that did not answer")
        self._batch = Histogram("mixer_batch_size", "Queries that were answered together", BATCH_SIZES)
        self._queued = Gauge("mixer_queued", "Queries that wait for their turn")
        self._version = Gauge("mixer_version", "1: it answers; 0: it has answered", ("index", "model"))
        self._swaps = Counter("mixer_swaps", "Tries to bring in another version: done or failed", ("outcome",))
        self._recall = Gauge(
            "mixer_canary_recall", "Share of the known photos of which a right item is among the first 10"
        )
        self._canary = Counter("mixer_canary_searches", "Known photos: found, missed or failed", ("outcome",))
        self._answers: dict[str, str] | None = None

    def request(self, route: str, status: int, total_ms: float, searched: Searched | None) -> None:
        """Record a request that has ended."""
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._latency.observe(total_ms, {"route": route, "part": "total"})
        if searched is None:
            return
        for part, took_ms in searched.parts_ms.items():
            self._latency.observe(took_ms, {"route": route, "part": part})
        if searched.missing_shards:
            self._degraded.inc(1, {})

    def batch(self, size: int) -> None:
        """Record a batch as it is begun: `Batcher.observe`."""
        self._batch.observe(size, {})

    def swap(self, swap: Swap) -> None:
        """Record a try to bring in another version."""
        self._swaps.inc(1, {"outcome": "failed" if swap.error else "done"})

    def canary(self, found: int, missed: int, failed: int) -> None:
        """Record a round of the known photos."""
        for outcome, count in (("found", found), ("missed", missed), ("failed", failed)):
            if count:
                self._canary.inc(count, {"outcome": outcome})
        if found + missed:
            self._recall.set(found / (found + missed), {})

    def sample(self, service: SearchService) -> None:
        """Record what waits, and which version answers."""
        self._queued.set(service.batcher.waiting, {})
        answers = {"index": service.engine.index.version, "model": service.engine.index.model}
        if self._answers not in (None, answers):
            self._version.set(0, self._answers)
        self._version.set(1, answers)
        self._answers = answers

    async def follow(self, service: SearchService) -> None:
        """Sample for ever."""
        while True:
            self.sample(service)
            await asyncio.sleep(SAMPLE_S)
