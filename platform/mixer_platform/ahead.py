"""Doing what is asked for next while what is there is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def ahead(
    threads: ThreadPoolExecutor, function: Callable[[Given], Made], values: Iterable[Given], most: int = 2
) -> Iterator[Made]:
    """Yield function(value) of each value in order; `most` of them, the one that is asked for among them, are made at a
    time, so that `most` - 1 are made while one is used."""
    waiting: deque = deque()
    rest = iter(values)
    while True:
        while len(waiting) < most and (value := next(rest, None)) is not None:
            waiting.append(threads.submit(function, value))
        if not waiting:
            return
        yield waiting.popleft().result()
