"""Work that arrives while other work is done is done together: nothing waits for company, and little waits at all."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mixer_platform.serve.errors import late, unavailable

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Waiting(Generic[Work, Result]):
    work: Work
    expires: float
    result: asyncio.Future[Result]


class Batcher(Generic[Work, Result]):
    """Give `process` what waits, up to `max_batch` at once, in up to `concurrent` batches at a time.

    A single request is taken at once; at load, batches grow to what arrives while the ones before are processed.
    """

    def __init__(
        self,
        process: Callable[[list[Work]], Awaitable[Sequence[Result]]],
        max_batch: int,
        concurrent: Callable[[], int],
        max_queued: int,
    ) -> None:
        """`process` returns one result each, in order; `max_queued` bounds what waits, `concurrent` may change."""
        self._process, self._max_batch, self._concurrent, self._max_queued = process, max_batch, concurrent, max_queued
        self._queue: deque[_Waiting[Work, Result]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self.observe: Callable[[int], None] = lambda size: None

    @property
    def waiting(self) -> int:
        """How much is in the queue."""
        return len(self._queue)

    def refuse_if_full(self) -> None:
        """Raise ApiError 503 if new work would not be taken now."""
        if len(self._queue) >= self._max_queued:
            raise unavailable(f"{len(self._queue)} photos are waiting already; try again", code="saturated")

    async def __call__(self, works: Sequence[Work], expires: float) -> list[Result]:
        """Return the result of each. Work that was not begun by `expires` (Unix time) is dropped.

        Raises ApiError: 503 if the queue is full or it got late, and what `process` raises.
        """
        self.refuse_if_full()
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(work, expires, loop.create_future()) for work in works]
        self._queue.extend(waiting)
        self._start()
        try:
            return list(await asyncio.gather(*(each.result for each in waiting)))
        finally:
            for each in waiting:
                each.result.cancel()
            if any(each.result.cancelled() for each in waiting):  # whoever asked has gone: do not begin, do not count
                self._queue = deque(each for each in self._queue if not each.result.done())

    def _start(self) -> None:
        while self._queue and len(self._running) < self._concurrent():
            batch: list[_Waiting[Work, Result]] = []
            while self._queue and len(batch) < self._max_batch:
                each = self._queue.popleft()
                if each.result.done():
                    continue
                if each.expires < time.time():
                    each.result.set_exception(late())
                    continue
                batch.append(each)
            if batch:
                # In no request's context: Serve would cancel its calls with that request.
                task = asyncio.create_task(self._run(batch), context=contextvars.Context())
                self._running.add(task)
                task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    async def _run(self, batch: list[_Waiting[Work, Result]]) -> None:
        try:
            self.observe(len(batch))
            results = await self._process([each.work for each in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results of {len(batch)}")
        except BaseException as error:  # it belongs to those who wait
            ended = isinstance(error, asyncio.CancelledError)  # by Serve, when the client that began the batch leaves
            for each in batch:
                if not each.result.done():
                    each.result.set_exception(unavailable("the search was interrupted; try again") if ended else error)
            if not isinstance(error, Exception):
                raise
            return
        for each, result in zip(batch, results, strict=True):
            if not each.result.done():
                each.result.set_result(result)
