"""AdamW for a matrix of which a step touches few rows, with one second moment a row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixer.pages import on_large_pages

_CHUNK = 8192  # rows that fit into a cache with their moments
_MOST_STEPS = 4096  # that a row may be behind


@dataclass
class Rows:
    """Rows of the matrix as they are now: views of all of them, or copies of those that a step draws.

    index: int64 [drawn], ascending; None where all are drawn. weight, exp_avg: [drawn, dim]. exp_avg_sq: [drawn].
    draw: which draw this is.
    """

    index: Tensor | None
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    draw: int = 0

    def parts(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of some of the rows: weight, exp_avg, exp_avg_sq."""
        return self.weight[part], self.exp_avg[part], self.exp_avg_sq[part]


class RowAdam:
    """AdamW (arXiv 1711.05101) whose time and memory a step follow the rows drawn, not all rows.

    To a row that is not drawn a step brings no gradient; still its moments decay, it drifts by the first one and its
    weight decays. All this is made up for in closed form when the row is drawn next, so a row comes out as if every
    step had touched it. That needs two differences from AdamW: the second moment is the mean over the row, a scalar,
    as for embedding tables in recommendation, and eps^2 is added to the squared gradient, not eps to the root.

    A step is `draw`, `update` of each part of what was drawn, `commit`. Memory: (dim + 2) x 4 bytes a row beside the
    matrix itself.
    """

    def __init__(
        self,
        weight: Tensor,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.weight, self.lr, self.weight_decay, self.betas, self.eps = weight, lr, weight_decay, betas, eps
        # Filled, not `zeros`: memory that cannot be had is missed now, and not when the last row is drawn.
        self.exp_avg = on_large_pages(torch.empty_like(weight)).fill_(0)
        self.exp_avg_sq = torch.empty(len(weight), device=weight.device).fill_(0)
        self._copies: list[Tensor] | None = None
        self._draws = 0
        self.step_count = 0
        # Per step since `settle`: what a row last drawn in it has been multiplied by since, and how far it has
        # drifted, in multiples of exp_avg / sqrt(exp_avg_sq). `_last_step`: the place of each row's last step in them.
        self._last_step = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        self._ratio: Tensor
        self._decay: Tensor
        self._drift: Tensor
        self._forget()

    def draw(self, index: Tensor | None) -> Rows:
        """Return rows as they are after `step_count` steps. They last until the next draw."""
        self._draws += 1
        if index is None:
            self.settle()
            return Rows(None, self.weight, self.exp_avg, self.exp_avg_sq, self._draws)
        rows = Rows(index, *self._room(len(index)), self._draws)
        for start in range(0, len(index), _CHUNK):
            self._catch_up(rows, slice(start, start + _CHUNK))
        return rows

    def update(self, rows: Rows, part: slice, gradient: Tensor) -> None:
        """Take this step with the gradient, [n, dim], of n of the rows drawn; it is used up.

        Raises RuntimeError for rows that were committed, or drawn before others were.
        """
        if rows.draw != self._draws:
            raise RuntimeError("rows of an earlier draw: a step is one draw, its updates and one commit")
        first, second = self.betas
        weight, exp_avg, exp_avg_sq = rows.parts(part)
        square = gradient.norm(dim=1).square_().div_(gradient.shape[1]).add_(self.eps**2)
        exp_avg_sq.lerp_(square, 1 - second)
        exp_avg.lerp_(gradient, 1 - first)
        if self.weight_decay:
            weight.mul_(1 - self.lr * self.weight_decay)
        length = self.lr * self._correction() / exp_avg_sq.sqrt()
        weight.addcmul_(exp_avg, length[:, None], value=-1)
        if rows.index is not None:
            for whole, copy in zip(self._parts(), rows.parts(part), strict=True):
                whole.index_copy_(0, rows.index[part], copy)

    def commit(self, rows: Rows) -> None:
        """End the step, in which every row drawn was updated."""
        correction = self._correction()
        self.step_count += 1
        self._draws += 1
        if rows.index is None:
            return
        self._ratio *= self.betas[0] / self.betas[1] ** 0.5
        self._decay *= 1 - self.lr * self.weight_decay
        self._drift = self._drift * (1 - self.lr * self.weight_decay) + self.lr * correction * self._ratio
        self._ratio, self._decay = (torch.cat([part, part.new_ones(1)]) for part in (self._ratio, self._decay))
        self._drift = torch.cat([self._drift, self._drift.new_zeros(1)])
        self._last_step[rows.index] = len(self._decay) - 1
        if len(self._decay) > _MOST_STEPS:  # what is kept of each step takes time too
            self.settle()

    def settle(self) -> None:
        """Bring every row up to date, before the matrix is read as a whole."""
        if len(self._decay) == 1:
            return
        for index in torch.arange(len(self.weight), device=self.weight.device).split(_CHUNK):
            rows = self.draw(index)
            for part, drawn in zip(self._parts(), rows.parts(slice(None)), strict=True):
                part[int(index[0]) : int(index[-1]) + 1] = drawn
        self._forget()

    def state(self) -> dict[str, Tensor]:
        """Return what `load` takes: the matrix and its moments, each [rows, ..]."""
        self.settle()
        return {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load(self, pieces: Iterable[tuple[slice, dict[str, Tensor]]], step_count: int) -> None:
        """Go on after `step_count` steps from what `state` gave, a piece of the rows after the other."""
        state = self.state()
        for part, rows in pieces:
            for name, values in rows.items():
                state[name][part] = values
        self.step_count = step_count

    def _room(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return memory for copies, which is kept from step to step: to have it anew takes longer than to copy."""
        if self._copies is None or count > len(self._copies[0]):
            room = count + count // 16
            self._copies = [part.new_empty(room, *part.shape[1:]) for part in self._parts()]
        weight, exp_avg, exp_avg_sq = (copy[:count] for copy in self._copies)
        return weight, exp_avg, exp_avg_sq

    def _catch_up(self, rows: Rows, part: slice) -> None:
        """Copy a part of the rows drawn and make up for the steps that passed over them."""
        assert rows.index is not None
        index, copies = rows.index[part], rows.parts(part)
        for whole, copy in zip(self._parts(), copies, strict=True):
            torch.index_select(whole, 0, index, out=copy)
        weight, exp_avg, exp_avg_sq = copies
        last = self._last_step[index].long()
        missed = (len(self._decay) - 1 - last).to(weight.dtype)
        root = exp_avg_sq.sqrt()
        drift = torch.where(root > 0, self._drift[last].to(weight.dtype) / root, 0)
        weight.mul_(self._decay[last].to(weight.dtype)[:, None]).addcmul_(exp_avg, drift[:, None], value=-1)
        exp_avg.mul_((self.betas[0] ** missed)[:, None])
        exp_avg_sq.mul_(self.betas[1] ** missed)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.exp_avg, self.exp_avg_sq

    def _correction(self) -> float:
        """Return what corrects the moments of the present step for their start at zero."""
        first, second = self.betas
        step = self.step_count + 1
        return (1 - second**step) ** 0.5 / (1 - first**step)

    def _forget(self) -> None:
        """Begin the tables anew: every row is up to date."""
        self._last_step.zero_()
        one = torch.ones(1, dtype=torch.float64, device=self.weight.device)
        self._ratio, self._decay, self._drift = one, one.clone(), torch.zeros_like(one)
