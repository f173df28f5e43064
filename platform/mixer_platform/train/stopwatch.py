"""Where a step's time goes. A part's time includes its waiting for other workers."""

from __future__ import annotations

import time

import torch

EVERY = 8  # on a GPU, a step that is timed waits for the device after each part


class Stopwatch:
    """Time from lap to lap, by part; on a GPU of one step in `EVERY`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._step, self._last = device, 0, 0.0
        self._seconds: dict[str, float] = {}

    def start(self) -> None:
        """Begin a step."""
        self._step += 1
        if self._timed():
            self._last = self._now()

    def lap(self, part: str) -> None:
        """Count the time since the last lap for `part`."""
        if not self._timed():
            return
        now = self._now()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def shares(self) -> dict[str, float]:
        """Return each part's share of the time, as `share_<part>`, and begin anew."""
        total = sum(self._seconds.values())
        shares = {f"share_{part}": round(seconds / total, 4) for part, seconds in self._seconds.items() if total}
        self._seconds = {}
        return shares

    def _timed(self) -> bool:
        return self._device.type != "cuda" or self._step % EVERY == 0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
