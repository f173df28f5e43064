"""Memory that was given back is used again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from mixer.pages import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
without = faults()
keep_freed_memory()
print(without, [faults() for _ in range(6)][-1])  # the first ones make room
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that gives memory back")
def test_large_tensors_take_the_memory_of_those_before() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    without, kept = (int(number) for number in run.stdout.split())
    assert without >= 5 * 2**5, "pages of 2 MiB at most: each time all of it is new"
    assert kept < without / 20
