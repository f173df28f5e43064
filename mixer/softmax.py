"""A margin softmax whose class weights are cut over the workers (hybrid parallelism; ArcFace's Partial FC lineage).

Every worker holds a contiguous range of the classes. The embeddings of all workers are gathered, each worker computes
the logits of its own classes, and three scalars a sample (maximum, sum of exponentials, logit of the right class) are
reduced. Gradients are exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def class_range(classes: int, world: int, rank: int) -> range:
    """Return the classes of one rank: contiguous, in order of ranks, sizes differing by at most one."""
    small, extra = divmod(classes, world)
    start = rank * small + min(rank, extra)
    return range(start, start + small + (rank < extra))


def fixed_scale(classes: int) -> float:
    """Return sqrt(2) ln(classes - 1), the fixed scale of AdaCos (Zhang et al., CVPR 2019, arXiv 1905.00292).

    With a much larger one the softmax is certain of every label of a small set of classes, also of the wrong ones.
    """
    return math.sqrt(2) * math.log(max(classes - 1, 2))


class ShardedMarginSoftmax(nn.Module):
    """Cross-entropy over all classes of scale * (cosine - margin where right), as in CosFace (arXiv 1801.09414).

    Without an initialised process group it is the plain one-process loss. A worker may bring no samples, and may own
    no classes.
    """

    def __init__(
        self, dim: int, classes: int, margin: float, scale: float, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.group, self.margin, self.scale, self.classes = group, margin, scale, classes
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.owned = class_range(classes, self.world, self.rank)
        self.weight = nn.Parameter(torch.zeros(len(self.owned), dim))

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw the weights; a class's row depends on the seed and the class alone, not on the number of workers."""
        for row, identity in enumerate(self.owned):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + identity)
            self.weight[row] = torch.randn(self.weight.shape[1], generator=generator) * 0.01

    def forward(self, embeddings: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean loss over the samples of all workers, the same scalar on each.

        Args:
            embeddings: [n, dim], this worker's; n may differ between workers and may be 0.
            labels: int64 [n], global class ids.
            weights: [n], how much each sample counts.
        """
        everyone, all_labels, all_weights = self._gathered(embeddings, labels, weights)
        cosines = everyone @ F.normalize(self.weight, dim=1).T
        loss = _ShardedCrossEntropy.apply(cosines, all_labels, all_weights, self)
        assert isinstance(loss, Tensor)
        return loss

    def _gathered(self, embeddings: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.world == 1:
            return embeddings, labels, weights
        counts = [torch.zeros(1, dtype=torch.int64, device=labels.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(labels)], device=labels.device), self.group)
        sizes = [int(count) for count in counts]
        everyone = _GatherRows.apply(embeddings, sizes, self.rank, self.group)
        assert isinstance(everyone, Tensor)
        return everyone, gather_rows(labels, sizes, self.group), gather_rows(weights, sizes, self.group)


def gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks, `sizes[rank]` each; collectives want equal shapes, so they travel padded."""
    if len(sizes) == 1:
        return rows
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])


class _GatherRows(torch.autograd.Function):
    """`gather_rows` whose gradient is summed over the ranks: each saw the logits of its own classes only."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], rank: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.rank, ctx.group = sizes, rank, group
        return gather_rows(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        start = sum(ctx.sizes[: ctx.rank])
        return gradient[start : start + ctx.sizes[ctx.rank]], None, None, None


class _ShardedCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over cosines [n, owned classes] of every rank at once."""

    @staticmethod
    def forward(ctx: Any, cosines: Tensor, labels: Tensor, weights: Tensor, head: ShardedMarginSoftmax) -> Tensor:
        own = (labels >= head.owned.start) & (labels < head.owned.stop)
        rows = own.nonzero().squeeze(1)
        columns = labels[rows] - head.owned.start
        logits = cosines * head.scale
        logits[rows, columns] -= head.scale * head.margin

        highest = logits.amax(dim=1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)
        if head.world > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX, head.group)
        exponentials = (logits - highest[:, None]).exp_()
        right = torch.zeros_like(highest)
        right[rows] = logits[rows, columns]
        sums = torch.stack([exponentials.sum(dim=1), right])
        if head.world > 1:
            dist.all_reduce(sums, group=head.group)
        total, right = sums
        share = weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
        loss = ((highest + total.log() - right) * share).sum()

        probabilities = exponentials.div_(total[:, None])
        probabilities[rows, columns] -= 1
        ctx.save_for_backward(probabilities.mul_((share * head.scale)[:, None]))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradient, None, None, None
