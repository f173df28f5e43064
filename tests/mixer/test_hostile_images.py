"""Whatever bytes come as a photo: a picture or UnreadableImage, in bounded time and memory."""

from __future__ import annotations

import gc
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from mixer.images import ImagePreprocess, UnreadableImage, decode
from tests.hostile import bombs, liars, mutations, png, polyglots, seeds, zeros

SEEDS, BOMBS = seeds(), bombs()
SMALL_S = 0.5  # for some kilobytes; they take a few milliseconds, machines are busy
BOMB_S = 2.0  # for some megabytes; half a second at most
LARGE_S = 8.0  # for 40 million pixels; two seconds


def outcome(data: bytes, limit_s: float) -> str:
    """Decode as the service does; return "" or why not. Any other error, and any delay, fails the test."""
    began = time.process_time()
    try:
        image = decode(data)
        assert image.mode == "RGB"
        assert ImagePreprocess(32, 36)(image).shape == (32, 32, 3)
        reason = ""
    except UnreadableImage as error:
        reason = str(error)
        assert reason
        assert "\n" not in reason
    assert time.process_time() - began < limit_s
    return reason


def memory(what: str) -> int:
    """Bytes of memory of this process: VmRSS, what it holds; VmHWM, the most it held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def fuzz(count: int, seed: int) -> None:
    for name, whole in SEEDS.items():
        reasons = [outcome(data, SMALL_S) for data in mutations(whole, count, seed)]
        assert sum(map(bool, reasons)) > count / 4, f"{name}: mutations break too little"


@pytest.mark.parametrize("name", SEEDS)
def test_good_pictures_are_taken(name: str) -> None:
    assert outcome(SEEDS[name], SMALL_S) == ""


def test_mutations_end_in_a_picture_or_a_reason() -> None:
    fuzz(200, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_very_many_mutations_end_in_a_picture_or_a_reason(seed: int) -> None:
    fuzz(2000, seed)


def test_every_beginning_of_a_picture_ends_in_a_reason() -> None:
    for name in ("jpeg", "png", "webp"):
        whole = SEEDS[name]
        for length in range(0, len(whole) - 40, 11):
            assert outcome(whole[:length], SMALL_S), f"{name}: {length} bytes of {len(whole)}"


def test_files_of_two_formats_are_what_they_begin_with() -> None:
    found = {name: outcome(data, SMALL_S) for name, data in polyglots().items()}
    refused = {name for name, reason in found.items() if reason}
    assert refused == {"html then jpeg", "gif then png", "gif of png", "png of gif", "riff of wave", "svg", "pdf"}


def test_files_that_lie_about_themselves_are_refused() -> None:
    found = {name: outcome(data, LARGE_S) for name, data in liars().items()}
    # What follows a small picture is never read, and libjpeg makes grey of what a large one lacks.
    taken = {name for name, reason in found.items() if not reason}
    assert taken <= {"jpeg of 1 x 1", "jpeg of fillings", "png of too much", "jpeg of 65535 x 1",
                     "jpeg of 6000 x 6000", "jpeg of a length of nothing"}  # fmt: skip
    assert "at most 40 million" in found["jpeg of 65535 x 65535"]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_no_more_than_a_picture(name: str) -> None:
    data = BOMBS[name]()
    assert len(data) < 10_000_000
    Path("/proc/self/clear_refs").write_text("5")  # what the peak is counted from
    before = memory("VmRSS")
    outcome(data, BOMB_S)
    assert memory("VmHWM") - before < 100_000_000


def test_the_largest_picture_costs_what_it_has_to() -> None:
    """40 million pixels with transparency, in 150 kB: RGBA and the RGB below it, four bytes a pixel each."""
    data = png(8000, 5000, zeros(5000 * (1 + 4 * 8000)), colours=6)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    assert outcome(data, LARGE_S) == ""
    assert memory("VmHWM") - before < 400_000_000


def test_nothing_is_kept_of_what_was_sent() -> None:
    sent = [
        *SEEDS.values(),
        *polyglots().values(),
        *(data for whole in SEEDS.values() for data in mutations(whole, 4, 0)),
    ]

    def send_all() -> None:
        for data in sent:
            with suppress(UnreadableImage):
                decode(data)

    for _ in range(3):  # what Pillow and Python keep for ever
        send_all()
    gc.collect()
    tracemalloc.start()
    before, resident = tracemalloc.get_traced_memory()[0], memory("VmRSS")
    for _ in range(10):
        send_all()
    gc.collect()
    grown, grown_resident = tracemalloc.get_traced_memory()[0] - before, memory("VmRSS") - resident
    tracemalloc.stop()
    assert grown < 10 * len(sent) * 50  # bytes a picture
    assert grown_resident < 30_000_000
