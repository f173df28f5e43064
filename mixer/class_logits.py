"""Logits of one worker's classes, a chunk of classes at a time, and the gradient and step of these classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mixer.row_adam import Rows

_LEAST_NORM = 1e-12


class RowOptimizer(Protocol):
    """What the backward pass hands the gradients of classes to, such as `RowAdam`."""

    def draw(self, index: Tensor | None) -> Rows:
        """Return the classes `index` as they are now; None for all."""

    def update(self, rows: Rows, part: slice, gradient: Tensor) -> None:
        """Step a part of the rows; may use up the gradient."""

    def commit(self, rows: Rows) -> None:
        """Keep the rows and end the step."""


@dataclass
class DrawnClasses:
    """The classes of one step, and which of them its samples name.

    rows: of `drawn` classes. stands_for: [drawn], for how many classes each stands; None: each for itself.
    sample, slot, place: int64 [m], of each class named: the row and column of `Targets.classes` and the place among
    `rows`, ascending by place.
    """

    rows: Rows
    stands_for: Tensor | None
    sample: Tensor
    slot: Tensor
    place: Tensor

    def chunks(self, size: int) -> Iterator[tuple[slice, slice]]:
        """Yield parts of the rows and, with each, the part of the named classes that are in it."""
        edges = torch.arange(0, len(self.rows.weight) + size, size, device=self.place.device)
        named = torch.searchsorted(self.place, edges).tolist()
        for i in range(len(edges) - 1):
            yield slice(i * size, min((i + 1) * size, len(self.rows.weight))), slice(named[i], named[i + 1])


class ClassLogits(torch.autograd.Function):
    """From embeddings [n, dim] and the classes drawn, the `total` [n] and `named` [n, k] of `evidence_loss`; `named` is
    0 where another worker has the class.

    The backward pass computes each chunk's logits once more and steps its classes, so that neither the logits nor the
    gradient of all classes ever exist. Nothing is subtracted before an exponential is taken: see `MOST_SCALE`.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, drawn: DrawnClasses, slots: int, scale: float, chunk: int, kind: torch.dtype,
        optimizer: RowOptimizer,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scaled = embeddings * scale
        total = embeddings.new_zeros(len(embeddings))
        named = embeddings.new_zeros(len(embeddings), slots)
        shrink = embeddings.new_empty(len(drawn.rows.weight))
        for part, names in drawn.chunks(chunk):
            weight, sample, place = drawn.rows.weight[part], drawn.sample[names], drawn.place[names] - part.start
            shrink[part] = weight.norm(dim=1).clamp_min_(_LEAST_NORM).reciprocal_()
            # In fp32, whatever `kind` is: these are the logits that a loss depends on most.
            right = torch.linalg.vecdot(scaled[sample], weight[place]) * shrink[part][place]
            named[sample, drawn.slot[names]] = right
            others = _exponentials(scaled.to(kind), weight.to(kind), shrink[part], (sample, place))
            total += others.sum(dim=1) if drawn.stands_for is None else others @ drawn.stands_for[part]
        ctx.save_for_backward(scaled, shrink)
        ctx.drawn, ctx.scale, ctx.chunk, ctx.kind, ctx.optimizer = drawn, scale, chunk, kind, optimizer
        return total, named

    @staticmethod
    def backward(ctx: Any, slope_total: Tensor, slope_named: Tensor) -> tuple[Tensor | None, ...]:
        scaled, shrink = ctx.saved_tensors
        drawn, optimizer, kind = ctx.drawn, ctx.optimizer, ctx.kind
        factor = shrink if drawn.stands_for is None else shrink * drawn.stands_for
        pulls, ones = (slope_total[:, None] * scaled).to(kind), scaled.new_ones(scaled.shape[1])
        of_rest, of_named = torch.zeros_like(scaled), torch.zeros_like(scaled)
        for part, names in drawn.chunks(ctx.chunk):
            weight, sample, place = drawn.rows.weight[part], drawn.sample[names], drawn.place[names] - part.start
            rounded = weight.to(kind)
            others = _exponentials(scaled.to(kind), rounded, shrink[part], (sample, place))
            others = others.mul_(factor[part]).to(kind)
            of_rest += others @ rounded
            of_weight = (others.T @ pulls).to(weight.dtype)
            slope = (slope_named[sample, drawn.slot[names]] * shrink[part][place])[:, None]
            of_named.index_add_(0, sample, slope * weight[place])
            of_weight.index_add_(0, place, slope * scaled[sample])
            # A logit does not depend on the length of the class's weight.
            along = (of_weight * weight).mv(ones).mul_(shrink[part].square())
            optimizer.update(drawn.rows, part, of_weight.addcmul_(weight, along[:, None], value=-1))
        optimizer.commit(drawn.rows)
        gradient = of_rest.mul_(slope_total[:, None]).add_(of_named).mul_(ctx.scale)
        return gradient, None, None, None, None, None, None


def _exponentials(scaled: Tensor, weight: Tensor, shrink: Tensor, named: tuple[Tensor, Tensor]) -> Tensor:
    """Return the exponentials of logits, [n, classes], in fp32, with 0 for the classes that a sample names."""
    found = (scaled @ weight.T).to(shrink.dtype).mul_(shrink).exp_()
    found[named] = 0
    return found
