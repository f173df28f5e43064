"""Checkpoints that know class ranges, not ranks: written by all workers, read by any other number of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from mixer.targets import Targets
from mixer_platform.errors import StorageError
from mixer_platform.patience import PATIENCE_S, patiently
from mixer_platform.storage import Storage

STATE = "state.json"
_FILE = 2**28  # bytes of a worker's rows in one file; stores take no files of any size
P = ParamSpec("P")
R = TypeVar("R")
_TOWERS = "towers.safetensors"


def name_of(epoch: int, batches: int = 0) -> str:
    """Return the name of a checkpoint after an epoch or, with `batches`, after so many of its batches; names sort."""
    return f"epoch-{epoch:05d}" + (f"-{batches:010d}" if batches else "")


def file_of(owned: range | slice) -> str:
    """Return the name of a file of rows, by the classes that it holds; names sort."""
    return f"{owned.start:012d}-{owned.stop:012d}.safetensors"


class Checkpoints:
    """The checkpoints of one run, below `runs/<run>/` of a workspace. `state.json` makes one visible.

    Where the storage does not answer they try again for `patience_s` seconds, then raise its StorageError.
    """

    def __init__(self, storage: Storage, run: str, patience_s: float = PATIENCE_S) -> None:
        self.storage, self.folder, self.patience_s = storage, f"runs/{run}", patience_s
        self._kept = f"{self.folder}/kept.safetensors"

    def latest(self) -> dict[str, Any] | None:
        """Return the state of the newest whole checkpoint, with its `name`, or None."""
        states = [key for key in self._patiently(self.storage.list, self.folder) if key.endswith(f"/{STATE}")]
        return json.loads(self._patiently(self.storage.read, max(states))) if states else None

    def sweep(self) -> None:
        """Delete what interrupted runs wrote of checkpoints that never became visible; once no worker writes."""
        keys = self._patiently(self.storage.list, self.folder)
        names = {key.removeprefix(f"{self.folder}/").partition("/")[0] for key in keys}
        for name in sorted(names):
            if name.startswith("epoch-") and f"{self.folder}/{name}/{STATE}" not in keys:
                self.clear(name)

    def clear(self, name: str) -> None:
        """Delete what an interrupted run left of a checkpoint; other numbers of workers write other files."""
        self._patiently(self.storage.delete, f"{self.folder}/{name}")

    def write_classes(self, name: str, owned: range, rows: dict[str, Tensor]) -> None:
        """Write one worker's rows, each [owned classes, ..]; nothing for a worker without classes."""
        if not len(owned):
            return
        size = max(1, _FILE * len(owned) // sum(value.nbytes for value in rows.values()))
        for start in range(0, len(owned), size):
            piece = owned[start : start + size]
            content = save({part: value[start : start + size].clone() for part, value in rows.items()})
            self._write(f"{self.folder}/{name}/classifier/{file_of(piece)}", content)

    def write_towers(self, name: str, towers: dict[str, Tensor]) -> None:
        """Write the towers; one worker does."""
        self._write(f"{self.folder}/{name}/{_TOWERS}", save(towers))

    def publish(self, name: str, state: dict[str, Any], keep: int = 2) -> None:
        """Make the checkpoint visible once every worker has written, and delete all but the last `keep`."""
        self._write(f"{self.folder}/{name}/{STATE}", json.dumps({"name": name, **state}).encode())
        visible = [key for key in self._patiently(self.storage.list, self.folder) if key.endswith(f"/{STATE}")]
        for key in sorted(visible)[:-keep]:
            self._patiently(self.storage.delete, key.removesuffix(f"/{STATE}"))

    def write_targets(self, stage: int, targets: Targets) -> None:
        """Write what a stage learns from; one worker does."""
        parts = {"classes": targets.classes, "evidence": targets.evidence}
        parts |= {"others": targets.others, "weights": targets.weights}
        self._write(self._targets(stage), save({name: part.contiguous() for name, part in parts.items()}))

    def read_targets(self, stage: int) -> Targets:
        """Return what `write_targets` wrote."""
        return Targets(**load(self._patiently(self.storage.read, self._targets(stage))))

    def write_kept(self, kept: np.ndarray) -> None:
        """Write which class of the model that a run starts from each class goes on from; before the workers read."""
        self._write(self._kept, save({"kept": torch.from_numpy(kept)}))

    def read_kept(self) -> np.ndarray:
        """Return what `write_kept` wrote."""
        return load(self._patiently(self.storage.read, self._kept))["kept"].numpy()

    def read_towers(self, name: str) -> dict[str, Tensor]:
        """Return what `write_towers` wrote."""
        return load(self._patiently(self.storage.read, f"{self.folder}/{name}/{_TOWERS}"))

    def read_classes(self, name: str, owned: range) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Yield the rows of the classes `owned` and where they belong among these, a file at a time: together they may
        take most of the memory. Raises StorageError if some are not there."""
        found = 0
        for key in self.class_files(name):
            start, stop = (int(number) for number in key.rpartition("/")[2].removesuffix(".safetensors").split("-"))
            first, last = max(start, owned.start), min(stop, owned.stop)
            if first < last:
                rows = load(self._patiently(self.storage.read, key))
                mine = {part: value[first - start : last - start] for part, value in rows.items()}
                yield slice(first - owned.start, last - owned.start), mine
                found += last - first
        if found != len(owned):
            folder = f"{self.storage.uri}/{self.folder}"
            raise StorageError(
                f"{folder}/{name}: holds {found} of the classes {owned.start} to {owned.stop}; delete {folder}/{name} "
                "and the run goes on from the checkpoint before"
            )

    def class_files(self, name: str) -> list[str]:
        """Return the keys of what `write_classes` wrote, in order of classes."""
        return sorted(self._patiently(self.storage.list, f"{self.folder}/{name}/classifier"))

    def _targets(self, stage: int) -> str:
        return f"{self.folder}/targets-{stage}.safetensors"

    def _write(self, key: str, data: bytes) -> None:
        self._patiently(self.storage.write, key, data)

    def _patiently(self, action: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        return patiently(action, self.patience_s)(*arguments, **named)
