"""Rows that steps pass over come out as if every step had touched them, with a gradient of zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixer.row_adam import RowAdam

ROWS, DIM, FIRST, SECOND, EPS = 9, 4, 0.9, 0.999, 1e-8


def rates(step: int) -> float:
    return 0.1 * (1 - step / 60)


def drawn(step: int, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.nonzero(torch.rand(ROWS, generator=generator) < share).flatten()


def gradient(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(ROWS, DIM, generator=generator) * 10.0 ** torch.arange(-4, 5)[:, None]


def slow(weight: Tensor, steps: int, share: float, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same, touching every row in every step, in float64."""
    weight = weight.double()
    exp_avg, exp_avg_sq = torch.zeros(ROWS, DIM).double(), torch.zeros(ROWS).double()
    for step in range(steps):
        lr, grown = rates(step), torch.zeros(ROWS, DIM).double()
        index = drawn(step, share)
        grown[index] = gradient(step)[index].double()
        square = grown.square().mean(dim=1)
        square[index] += EPS**2
        exp_avg = FIRST * exp_avg + (1 - FIRST) * grown
        exp_avg_sq = SECOND * exp_avg_sq + (1 - SECOND) * square
        root = (exp_avg_sq / (1 - SECOND ** (step + 1))).sqrt()
        length = torch.where(root > 0, lr / (1 - FIRST ** (step + 1)) / root, 0)
        weight = weight * (1 - lr * decay) - length[:, None] * exp_avg
    return weight.float(), exp_avg.float(), exp_avg_sq.float()


def run(weight: Tensor, first: int, last: int, share: float, decay: float, before: RowAdam | None = None) -> RowAdam:
    adam = RowAdam(weight.clone(), 0.0, decay)
    if before is not None:
        state = before.state()
        pieces = [(part, {name: rows[part] for name, rows in state.items()}) for part in (slice(3, None), slice(3))]
        adam.load(pieces, before.step_count)
    for step in range(first, last):
        adam.lr = rates(step)
        rows = adam.draw(drawn(step, share) if share < 1 else None)
        chosen = gradient(step) if rows.index is None else gradient(step)[rows.index]
        for start in range(0, len(chosen), 2):  # in parts, as chunks of classes come
            adam.update(rows, slice(start, start + 2), chosen[start : start + 2])
        adam.commit(rows)
    return adam


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0])
def test_it_equals_touching_every_row(share: float, decay: float) -> None:
    weight = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(7))
    state = run(weight, 0, 50, share, decay).state()
    for found, expected in zip(state.values(), slow(weight, 50, share, decay), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_is_drawn_is_up_to_date_and_drawing_changes_nothing() -> None:
    weight = torch.randn(ROWS, DIM)
    adam = run(weight, 0, 20, 0.3, 0.1)
    before = [part.clone() for part in (adam.weight, adam.exp_avg, adam.exp_avg_sq)]
    rows = adam.draw(torch.arange(ROWS))
    for found, expected in zip((rows.weight, rows.exp_avg, rows.exp_avg_sq), slow(weight, 20, 0.3, 0.1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (adam.weight, adam.exp_avg, adam.exp_avg_sq), strict=True))


def test_rows_of_an_earlier_draw_are_refused() -> None:
    adam = RowAdam(torch.randn(ROWS, DIM), 0.1)
    first = adam.draw(torch.tensor([0, 1]))
    adam.draw(torch.tensor([2, 3]))
    with pytest.raises(RuntimeError, match="earlier draw"):
        adam.update(first, slice(0, 2), torch.ones(2, DIM))
    rows = adam.draw(None)
    adam.commit(rows)
    with pytest.raises(RuntimeError, match="earlier draw"):
        adam.update(rows, slice(0, 2), torch.ones(2, DIM))


def test_steps_far_behind_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixer.row_adam._MOST_STEPS", 7)
    weight = torch.randn(ROWS, DIM)
    state = run(weight, 0, 50, 0.2, 0.1).state()
    for found, expected in zip(state.values(), slow(weight, 50, 0.2, 0.1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_broken_run_goes_on_as_if_unbroken() -> None:
    weight = torch.randn(ROWS, DIM)
    resumed = run(weight, 20, 50, 0.3, 0.1, before=run(weight, 0, 20, 0.3, 0.1)).state()
    for found, expected in zip(resumed.values(), slow(weight, 50, 0.3, 0.1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_row_never_drawn_only_decays() -> None:
    weight = torch.ones(ROWS, DIM)
    adam = RowAdam(weight, 0.1, weight_decay=0.5)
    for _ in range(3):
        rows = adam.draw(torch.tensor([0]))
        adam.update(rows, slice(0, 1), torch.ones(1, DIM))
        adam.commit(rows)
    adam.settle()
    torch.testing.assert_close(adam.weight[1:], torch.full((ROWS - 1, DIM), 0.95**3))


def test_a_full_step_is_that_of_adam_where_a_row_is_one_number() -> None:
    weight = torch.randn(5, 1)
    theirs = torch.nn.Parameter(weight.clone())
    ours, adam = RowAdam(weight, 0.05, weight_decay=0.1), torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1)
    for step in range(10):
        theirs.grad = torch.randn(5, 1, generator=torch.Generator().manual_seed(step))
        rows = ours.draw(None)
        ours.update(rows, slice(0, 5), theirs.grad.clone())
        ours.commit(rows)
        adam.step()
    torch.testing.assert_close(weight, theirs.detach(), rtol=1e-5, atol=1e-6)
