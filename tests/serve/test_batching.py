"""What waits is done together, in bounds; what is late or left is not begun."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import pytest

from mixer_platform.serve.batching import Batcher
from mixer_platform.serve.errors import ApiError

LATER = time.time() + 1000


class Gate:
    """Processes batches of numbers when it is opened."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = asyncio.Event()

    async def __call__(self, works: list[int]) -> Sequence[int]:
        self.batches.append(works)
        await self.open.wait()
        return [-work for work in works]


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


async def begun(*asking: Awaitable[Any]) -> list[asyncio.Task[Any]]:
    """Start these one after another, each until it waits."""
    tasks = []
    for each in asking:
        tasks.append(asyncio.ensure_future(each))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return tasks


def test_the_first_goes_alone_and_the_others_together():
    async def test() -> None:
        gate = Gate()
        batcher = Batcher(gate, max_batch=3, concurrent=lambda: 1, max_queued=100)
        tasks = await begun(*(batcher([number], LATER) for number in range(1, 7)))
        assert gate.batches == [[1]]
        assert batcher.waiting == 5
        gate.open.set()
        assert await asyncio.gather(*tasks) == [[-number] for number in range(1, 7)]
        assert gate.batches == [[1], [2, 3, 4], [5, 6]]

    run(test)


def test_as_many_batches_at_a_time_as_now_allowed():
    async def test() -> None:
        gate, allowed = Gate(), 2
        batcher = Batcher(gate, max_batch=1, concurrent=lambda: allowed, max_queued=100)
        tasks = await begun(*(batcher([number], LATER) for number in range(4)))
        assert gate.batches == [[0], [1]]
        allowed = 3
        tasks += await begun(batcher([4], LATER))
        assert gate.batches == [[0], [1], [2]]
        gate.open.set()
        await asyncio.gather(*tasks)
        assert sorted(gate.batches) == [[0], [1], [2], [3], [4]]

    run(test)


def test_a_request_of_many_is_answered_in_its_order_over_several_batches():
    async def test() -> None:
        gate = Gate()
        gate.open.set()
        batcher = Batcher(gate, max_batch=4, concurrent=lambda: 2, max_queued=1)
        assert await batcher(range(10), LATER) == [-number for number in range(10)]
        assert [len(batch) for batch in gate.batches] == [4, 4, 2]

    run(test)


def test_a_full_queue_refuses_at_once():
    async def test() -> None:
        gate = Gate()
        batcher = Batcher(gate, max_batch=1, concurrent=lambda: 1, max_queued=2)
        tasks = await begun(*(batcher([number], LATER) for number in range(3)))
        with pytest.raises(ApiError, match=r"^2 photos are waiting already; try again$") as refused:
            await batcher([3], LATER)
        assert (refused.value.status, refused.value.code) == (503, "saturated")
        assert refused.value.headers == {"Retry-After": "1"}
        gate.open.set()
        assert await asyncio.gather(*tasks) == [[0], [-1], [-2]]

    run(test)


def test_what_is_late_or_left_is_not_begun():
    async def test() -> None:
        gate, soon = Gate(), time.time() + 0.01
        batcher = Batcher(gate, max_batch=8, concurrent=lambda: 1, max_queued=100)
        first, late, left, good = await begun(
            batcher([1], LATER), batcher([2], soon), batcher([3], LATER), batcher([4], LATER)
        )
        left.cancel()
        while time.time() <= soon or not left.done():
            await asyncio.sleep(0.001)
        gate.open.set()
        assert await asyncio.gather(first, good) == [[-1], [-4]]
        with pytest.raises(ApiError, match="within the time that the request allowed"):
            await late
        assert gate.batches == [[1], [4]]

    run(test)


def test_a_failure_reaches_all_of_its_batch_and_no_other():
    async def test() -> None:
        async def process(works: list[int]) -> list[int]:
            await asyncio.sleep(0)
            if 2 in works:
                raise ValueError("two")
            return works

        batcher = Batcher(process, max_batch=2, concurrent=lambda: 1, max_queued=100)
        asked = (batcher([number], LATER) for number in (1, 2, 3, 4, 5))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [repr(answer) for answer in answers] == ["[1]", "ValueError('two')", "ValueError('two')", "[4]", "[5]"]

    run(test)


def test_a_batch_that_is_cancelled_leaves_nobody_waiting():
    async def test() -> None:
        async def process(works: list[int]) -> list[int]:
            raise asyncio.CancelledError

        batcher = Batcher(process, max_batch=2, concurrent=lambda: 1, max_queued=100)
        with pytest.raises(ApiError, match="the search was interrupted; try again"):
            await batcher([1, 2, 3], LATER)

    run(test)


def test_results_that_are_too_few_leave_nobody_waiting():
    async def test() -> None:
        async def process(works: list[int]) -> list[int]:
            return works[1:]

        batcher = Batcher(process, max_batch=2, concurrent=lambda: 1, max_queued=100)
        with pytest.raises(RuntimeError, match="1 results of 2"):
            await batcher([1, 2], LATER)

    run(test)


def test_who_has_left_is_not_in_the_way_of_others():
    async def test() -> None:
        gate = Gate()
        batcher = Batcher(gate, max_batch=1, concurrent=lambda: 1, max_queued=2)
        first, *left = await begun(*(batcher([number], LATER) for number in range(3)))
        for each in left:
            each.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        assert batcher.waiting == 0
        (last,) = await begun(batcher([9], LATER))
        gate.open.set()
        assert await asyncio.gather(first, last) == [[0], [-9]]

    run(test)


def test_batches_are_observed():
    async def test() -> None:
        gate, seen = Gate(), []
        gate.open.set()
        batcher = Batcher(gate, max_batch=4, concurrent=lambda: 1, max_queued=100)
        batcher.observe = seen.append
        await batcher(range(6), LATER)
        assert seen == [4, 2]

    run(test)
