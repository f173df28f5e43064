"""Doing what is asked for next while what is there is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def ahead(
    threads: ThreadPoolExecutor, function: Callable[[Given], Made], values: Iterable[Given], most: int = 2
) -> Generator[Made]:
    """Yield function(value) of each value in order; while one is used, the threads have up to `most` - 1 to make.

    What raises does so where its value would have come. What was not begun by then, or when nobody asks any more, is
    given up.
    """
    waiting: deque[Future[Made]] = deque()
    rest = iter(values)
    try:
        while True:
            waiting.extend(threads.submit(function, value) for value in islice(rest, most - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        for given_up in waiting:
            given_up.cancel()
