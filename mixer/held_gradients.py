"""Gradients of classes that wait for a step until what clips them is known."""

from __future__ import annotations

from torch import Tensor

from mixer.class_logits import RowOptimizer
from mixer.row_adam import Rows


class HeldGradients:
    """A `RowOptimizer` that keeps the gradients of the backward pass, and steps another one with them when it is told.

    Memory: 4 dim bytes for each class drawn.
    """

    def __init__(self, optimizer: RowOptimizer) -> None:
        self._optimizer = optimizer
        self._rows: Rows | None = None
        self._held: list[tuple[slice, Tensor]] = []

    def draw(self, index: Tensor | None) -> Rows:
        """Return the classes `index` as they are now; None for all."""
        return self._optimizer.draw(index)

    def update(self, rows: Rows, part: slice, gradient: Tensor) -> None:
        """Keep the gradient of a part of the rows."""
        self._held.append((part, gradient))

    def commit(self, rows: Rows) -> None:
        """End the backward pass."""
        self._rows = rows

    def gradients(self) -> list[Tensor]:
        """Return the gradients that are kept, to be changed in place."""
        return [gradient for _, gradient in self._held]

    def step(self) -> None:
        """Step the classes with the gradients that are kept, and give these up."""
        assert self._rows is not None, "a backward pass comes before a step"
        for part, gradient in self._held:
            self._optimizer.update(self._rows, part, gradient)
        self._optimizer.commit(self._rows)
        self._rows, self._held = None, []
