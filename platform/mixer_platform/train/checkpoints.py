"""Checkpoints that know class ranges, not ranks: written by all workers, read by any other number of them."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from mixer.targets import Targets
from mixer_platform.storage import Storage

STATE = "state.json"
_TOWERS = "towers.safetensors"


class Checkpoints:
    """The checkpoints of one run, below `runs/<run>/` of a workspace. `state.json` makes one visible."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage, self.folder = storage, f"runs/{run}"

    def latest(self) -> dict[str, Any] | None:
        """Return the state of the newest whole checkpoint, or None."""
        states = [key for key in self.storage.list(self.folder) if key.endswith(f"/{STATE}")]
        return json.loads(self.storage.read(max(states))) if states else None

    def clear(self, epoch: int) -> None:
        """Delete what an interrupted run left of an epoch; other numbers of workers write other files."""
        self.storage.delete(self._epoch(epoch))

    def write_classes(self, epoch: int, owned: range, rows: dict[str, Tensor]) -> None:
        """Write one worker's rows, each [owned classes, dim]; nothing for a worker without classes."""
        if len(owned):
            key = f"{self._epoch(epoch)}/classifier/{owned.start:012d}-{owned.stop:012d}.safetensors"
            self.storage.write(key, save({name: value.contiguous() for name, value in rows.items()}))

    def write_towers(self, epoch: int, towers: dict[str, Tensor]) -> None:
        """Write the towers; one worker does."""
        self.storage.write(f"{self._epoch(epoch)}/{_TOWERS}", save(towers))

    def publish(self, epoch: int, state: dict[str, Any], keep: int = 2) -> None:
        """Make the checkpoint visible once every worker has written, and delete all but the last `keep`."""
        self.storage.write(f"{self._epoch(epoch)}/{STATE}", json.dumps({"epoch": epoch, **state}).encode())
        visible = [key for key in self.storage.list(self.folder) if key.endswith(f"/{STATE}")]
        for key in sorted(visible)[:-keep]:
            self.storage.delete(key.removesuffix(f"/{STATE}"))

    def write_targets(self, round_: int, targets: Targets) -> None:
        """Write what a round learns from; one worker does."""
        parts = {"classes": targets.classes, "evidence": targets.evidence}
        parts |= {"others": targets.others, "weights": targets.weights}
        self.storage.write(self._targets(round_), save({name: part.contiguous() for name, part in parts.items()}))

    def read_targets(self, round_: int) -> Targets:
        """Return what `write_targets` wrote."""
        return Targets(**load(self.storage.read(self._targets(round_))))

    def read_towers(self, epoch: int) -> dict[str, Tensor]:
        """Return what `write_towers` wrote."""
        return load(self.storage.read(f"{self._epoch(epoch)}/{_TOWERS}"))

    def read_classes(self, epoch: int, owned: range) -> dict[str, Tensor]:
        """Return the rows of the classes `owned`, from however many files they were written to."""
        folder = f"{self._epoch(epoch)}/classifier"
        parts: list[dict[str, Tensor]] = []
        for key in sorted(self.storage.list(folder)):
            start, stop = (int(number) for number in key.rpartition("/")[2].removesuffix(".safetensors").split("-"))
            first, last = max(start, owned.start), min(stop, owned.stop)
            if first < last or not parts:  # the first file also tells the shape to a worker without classes
                rows = load(self.storage.read(key))
                cut = slice(max(first - start, 0), max(last - start, 0))
                parts.append({name: value[cut] for name, value in rows.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _targets(self, round_: int) -> str:
        return f"{self.folder}/targets-{round_}.safetensors"

    def _epoch(self, epoch: int) -> str:
        return f"{self.folder}/epoch-{epoch:05d}"
