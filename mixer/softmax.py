"""A margin softmax whose class weights are cut over the workers (hybrid parallelism; ArcFace's Partial FC lineage).

Every worker holds a contiguous range of the classes. The embeddings of all workers are gathered, each worker computes
the logits of its own classes, and three scalars a sample (logarithms of sums of exponentials: over all classes, and
over what the evidence leaves of them, with and without the margin) are reduced. Gradients are exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mixer.targets import Targets


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

    Which class is right need not be certain: the loss is -ln sum over classes of P(class | embedding) * P(what was
    observed | class), so that a sample's belief is what its evidence and its embedding say together, and the margin is
    shared as the belief is. With certain targets it is CosFace's loss; without any evidence it is 0.

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

    def forward(self, embeddings: Tensor, targets: Targets) -> Tensor:
        """Return the weighted mean loss over the samples of all workers, the same scalar on each.

        Args:
            embeddings: [n, dim], this worker's; n may differ between workers and may be 0.
            targets: of the n samples, k the same on every worker.
        """
        everyone, known = self._gathered(embeddings, targets)
        cosines = everyone @ F.normalize(self.weight, dim=1).T
        loss = _ShardedCrossEntropy.apply(cosines, known.over(self.owned), known.weights, self)
        assert isinstance(loss, Tensor)
        return loss

    @torch.no_grad()
    def likeliest(self, embeddings: Tensor, targets: Targets, count: int) -> tuple[Tensor, Tensor]:
        """Return the `count` likeliest classes of the samples of all workers and ln P(class | embedding, evidence).

        Both are [samples, count], best first, the same on every worker; fewer where there are fewer classes.
        """
        everyone, known = self._gathered(embeddings, targets)
        logits = self.scale * everyone @ F.normalize(self.weight, dim=1).T + known.over(self.owned)
        belief, classes = (logits - self.log_sum_exp(logits)[0][:, None]).topk(min(count, len(self.owned)), dim=1)
        classes = classes + self.owned.start
        if self.world > 1:
            counts = [min(count, len(class_range(self.classes, self.world, rank))) for rank in range(self.world)]
            belief, classes = (gather_rows(part.T.contiguous(), counts, self.group).T for part in (belief, classes))
        best, places = belief.topk(min(count, belief.shape[1]), dim=1)
        return classes.gather(1, places), best

    def log_sum_exp(self, *logits: Tensor) -> Tensor:
        """Return, for each [n, owned classes], the logarithm of the sum of exponentials over all classes, [.., n]."""
        local = torch.stack([part.logsumexp(dim=1) for part in logits])
        if self.world == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(self.world)]
        dist.all_gather(parts, local, self.group)
        return torch.stack(parts).logsumexp(dim=0)

    def _gathered(self, embeddings: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        if self.world == 1:
            return embeddings, targets
        counts = [torch.zeros(1, dtype=torch.int64, device=embeddings.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(embeddings)], device=embeddings.device), self.group)
        sizes = [int(count) for count in counts]
        everyone = _GatherRows.apply(embeddings, sizes, self.rank, self.group)
        assert isinstance(everyone, Tensor)
        parts = (targets.classes, targets.evidence, targets.others, targets.weights)
        return everyone, Targets(*(gather_rows(part, sizes, self.group) for part in parts))


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
    """The loss of cosines and evidence, each [n, owned classes], of every rank at once."""

    @staticmethod
    def forward(ctx: Any, cosines: Tensor, evidence: Tensor, weights: Tensor, head: ShardedMarginSoftmax) -> Tensor:
        logits = cosines * head.scale
        if head.margin:
            belief = (logits + evidence).sub_(head.log_sum_exp(logits + evidence)[0][:, None]).exp_()
            logits -= head.scale * head.margin * belief
        observed = logits + evidence
        over_all, over_observed = head.log_sum_exp(logits, observed)
        share = weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
        loss = ((over_all - over_observed) * share).sum()
        slope = (logits - over_all[:, None]).exp_() - (observed - over_observed[:, None]).exp_()
        ctx.save_for_backward(slope.mul_((share * head.scale)[:, None]))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradient, None, None, None
