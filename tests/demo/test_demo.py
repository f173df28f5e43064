"""The demo's own parts: what it counts as its processes, and what it prints."""

from __future__ import annotations

import os
import subprocess
import sys

from mixer_platform.demo.cluster import MARK, processes
from mixer_platform.demo.job import table
from mixer_platform.demo.memory import PeakMemory, proportional_kib


def test_processes_are_known_by_their_mark_and_their_memory_is_counted() -> None:
    code = "block = bytearray(64 * 2**20); print('ready', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {MARK: "test-mark"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert processes("test-mark") == [child.pid]
        assert proportional_kib(child.pid) > 64 * 1024
        with PeakMemory(lambda: processes("test-mark"), every_s=0.05) as memory:
            while memory.gib == 0:
                pass
        assert memory.gib > (64 * 1024 + proportional_kib(os.getpid()) / 2) / 2**20
    finally:
        child.communicate("\n")
    assert processes("test-mark") == []
    assert proportional_kib(child.pid) == 0


def test_the_table_holds_quality_stages_and_latency() -> None:
    figures = {"r1": 0.5, "r5": 0.75, "r10": 0.875, "queries": 1234, "items": 99, "untrained": {}}
    figures["untrained"] = {"r1": 0.25, "r5": 0.3, "r10": 0.4}
    text = table(figures, {"prepare": 1.5, "train": 2.0}, {"prepare": {"reused": True}}, 12.34, 50)
    assert "R@1                            0.250       0.500" in text
    assert "1.5 s   (was there already)" in text
    assert "2.0 s" in text
    assert "12.3 ms" in text
