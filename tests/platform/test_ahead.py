"""What is made while something else is used."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from mixer_platform.ahead import ahead


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_all_come_in_order_and_no_more_than_asked_for_wait(threads: ThreadPoolExecutor, count: int, most: int) -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return 10 * number

    for place, found in enumerate(ahead(threads, make, range(count), most)):
        assert found == 10 * place
        assert len(made) <= place + most
    assert sorted(made) == list(range(count))


def test_the_next_is_made_while_one_is_used(threads: ThreadPoolExecutor) -> None:
    second = Event()
    found = ahead(threads, lambda number: number == 1 and second.set(), range(3))
    next(found)
    assert second.wait(60), "nobody asks for it before the end of the test"


@pytest.mark.parametrize("closed", [False, True])
def test_what_was_not_begun_is_given_up(closed: bool) -> None:
    made: list[int] = []
    over = Event()

    def make(number: int) -> None:
        made.append(number)
        if number == 1 and not closed:
            raise ZeroDivisionError
        assert number == 0 or over.wait(60)

    with ThreadPoolExecutor(1) as thread:
        found = ahead(thread, make, range(9), most=5)
        next(found)
        if closed:
            found.close()
        else:
            with pytest.raises(ZeroDivisionError):
                next(found)
        over.set()
    assert len(made) <= 3, "of five, the thread went on with those that waited"


def test_an_error_comes_where_its_value_would_have_come(threads: ThreadPoolExecutor) -> None:
    found = ahead(threads, lambda number: 1 // (2 - number), range(4))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
