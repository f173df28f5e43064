"""Held back, a step is the one that it would have been."""

from __future__ import annotations

import pytest
import torch

from mixer.held_gradients import HeldGradients
from mixer.row_adam import RowAdam

ROWS, DIM = 9, 4


@pytest.mark.parametrize("index", [None, torch.tensor([1, 2, 5, 8])])
def test_steps_held_back_are_the_same_steps(index: torch.Tensor | None) -> None:
    weight = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    plain, other = (RowAdam(weight.clone(), 0.1, weight_decay=0.3) for _ in range(2))
    held = HeldGradients(other)
    for step in range(3):
        gradient = torch.randn(ROWS if index is None else len(index), DIM)
        for optimizer in (plain, held):
            rows = optimizer.draw(index)
            for part in (slice(2), slice(2, len(gradient))):
                optimizer.update(rows, part, gradient[part].clone())
            optimizer.commit(rows)
        assert other.step_count == step
        assert torch.equal(torch.cat(held.gradients()), gradient)
        held.step()
        assert held.gradients() == []
        assert torch.equal(other.weight, plain.weight)
    for name, values in plain.state().items():
        assert torch.equal(other.state()[name], values), name


def test_what_is_changed_in_place_is_what_is_stepped_with() -> None:
    held = HeldGradients(optimizer := RowAdam(torch.zeros(2, DIM), 0.1))
    rows = held.draw(None)
    held.update(rows, slice(2), torch.ones(2, DIM))
    held.commit(rows)
    held.gradients()[0].zero_()
    held.step()
    assert not optimizer.weight.any()
