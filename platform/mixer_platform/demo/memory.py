"""The memory that a demo's processes take together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType


class PeakMemory:
    """Samples, while its context is open, the proportional memory of some processes and of this one; `gib` is the peak.

    Proportional: what processes share, such as Ray's object store, counts once.
    """

    def __init__(self, running: Callable[[], Iterable[int]], every_s: float = 3.0) -> None:
        self.gib = 0.0
        self._running, self._every_s = running, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.is_set():
            total = sum(proportional_kib(process) for process in [os.getpid(), *self._running()])
            self.gib = max(self.gib, total / 2**20)
            self._done.wait(self._every_s)


def proportional_kib(process: int) -> int:
    """Return the proportional set size of a process in KiB, 0 if it is gone."""
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
