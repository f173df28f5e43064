"""A margin softmax whose class weights are cut over the workers (hybrid parallelism; ArcFace's Partial FC lineage).

Every worker holds a contiguous range of the classes. The embeddings of all workers are gathered, each worker computes
the logits of its own classes, a chunk at a time, and one collective adds up what the loss needs of them: a sum of
exponentials, and the logits of the classes that samples name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mixer.class_logits import ClassLogits, DrawnClasses, RowOptimizer
from mixer.config import MOST_SCALE
from mixer.negatives import NearestClasses, merged, stratified
from mixer.pages import on_large_pages
from mixer.targets import PADDING, Targets

_NONE = -1e4  # a logit whose exponential is 0; unlike -inf, it has a gradient
_BLOCK = 4096  # classes drawn from one seed
_LEAST_SCALE = 10.0
Lap = Callable[[str], None]
_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def class_range(classes: int, world: int, rank: int) -> range:
    """Return the classes of one rank: contiguous, in order of ranks, sizes differing by at most one."""
    small, extra = divmod(classes, world)
    start = rank * small + min(rank, extra)
    return range(start, start + small + (rank < extra))


def fixed_scale(classes: int) -> float:
    """Return sqrt(2) ln(classes - 1), the fixed scale of AdaCos (Zhang et al., CVPR 2019, arXiv 1905.00292), or 10.

    With a much larger one the softmax is certain of every label, also of the wrong ones; with a smaller one, which the
    rule would give few classes, it learns less of the right ones (docs/quality.md).
    """
    return max(_LEAST_SCALE, math.sqrt(2) * math.log(max(classes - 1, 2)))


class ShardedMarginSoftmax(nn.Module):
    """Cross-entropy over all classes of scale * (cosine - margin where right), as in CosFace (arXiv 1801.09414).

    Which class is right need not be certain, see `evidence_loss`. With `rate` < 1 a step draws a share of the classes
    (Partial FC, arXiv 2203.15565), and its time follows the number drawn, not the number there are.

    Without an initialised process group it is the plain one-process loss. A worker may bring no samples, and may own
    no classes.

    Args:
        dim: length of an embedding.
        classes: number of classes, over all workers.
        margin: subtracted from the cosine of the right class.
        scale: multiplies cosines; at most `MOST_SCALE`: exponentials are summed as they are, in fp32.
        group: the workers; None for all.
        rate: share of the classes that a step draws, beside those that its samples name; 1: all.
        unbiased: a class drawn stands for 1 / rate classes, so that the sum of exponentials is right in expectation
            (Jean et al., arXiv 1412.2007); else, as in Partial FC, for itself, and evidence that a sample is of none of
            the classes that it names counts for less, by ln 1 / rate.
        nearest: beside them, the so many classes nearest to each sample's embedding, in an index of the classes that is
            built anew every `nearest_every` steps; the others then still have their chance. A worker looks among its
            own classes, and one that goes on from a checkpoint begins with an index of what is in it.
        precision: of the products. In bf16 a cosine is off by less than 0.012; where samples name the class it is not.
        chunk: number of classes whose logits exist at once. A step needs about 12 (samples + dim) bytes for each.

    `optimizer` steps the classes in the backward pass and must be set before anything else. `lap` is told, as each part
    of a step ends, that it was "softmax" or "communication".
    """

    weight: Tensor
    optimizer: RowOptimizer
    lap: Lap = staticmethod(lambda part: None)

    def __init__(
        self,
        dim: int,
        classes: int,
        margin: float,
        scale: float,
        group: dist.ProcessGroup | None = None,
        *,
        rate: float = 1.0,
        unbiased: bool = False,
        nearest: int = 0,
        nearest_every: int = 500,
        precision: Literal["fp32", "bf16"] = "fp32",
        chunk: int = 8192,
    ) -> None:
        super().__init__()
        if not 0 < scale <= MOST_SCALE:
            raise ValueError(f"scale {scale}: expected more than 0 and at most {MOST_SCALE:g}")
        self.group, self.margin, self.scale, self.classes = group, margin, scale, classes
        self.rate, self.unbiased, self.kind, self.chunk = rate, unbiased, _KINDS[precision], chunk
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.owned = class_range(classes, self.world, self.rank)
        self.register_buffer("weight", on_large_pages(torch.empty(len(self.owned), dim)).zero_())
        self._drawing = 0  # seed of what the next step draws
        self._nearest = NearestClasses(nearest, nearest_every) if nearest and rate < 1 else None

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw the weights; a class's row depends on the seed and the class alone, not on the number of workers."""
        for block in range(self.owned.start // _BLOCK, -(-self.owned.stop // _BLOCK)):
            generator = torch.Generator().manual_seed(_mixed(seed, block))
            rows = torch.randn(_BLOCK, self.weight.shape[1], generator=generator) * 0.01
            first, last = max(self.owned.start, block * _BLOCK), min(self.owned.stop, (block + 1) * _BLOCK)
            mine = slice(first - self.owned.start, last - self.owned.start)
            self.weight[mine] = rows[first - block * _BLOCK : last - block * _BLOCK]

    def begin_step(self, seed: int, step: int) -> None:
        """Let what the next step draws depend on these and the classes' weights alone, on any number of workers."""
        self._drawing = _mixed(seed, step)
        if self._nearest:
            self._nearest.refresh(step, lambda: self.optimizer.draw(None).weight)

    def forward(self, embeddings: Tensor, targets: Targets) -> Tensor:
        """Return the weighted mean loss over the samples of all workers, the same scalar on each.

        Args:
            embeddings: [n, dim], this worker's; n may differ between workers and may be 0.
            targets: of the n samples, k the same on every worker. A sample names a class at most once.
        """
        everyone, known = self._gathered(embeddings, targets)
        total, named = ClassLogits.apply(
            everyone,
            self._draw(everyone, known),
            known.classes.shape[1],
            self.scale,
            self.chunk,
            self.kind,
            self.optimizer,
        )
        if self.world > 1:
            self.lap("softmax")
            both = _SumOverRanks.apply(torch.cat([total[:, None], named], dim=1), self.group)
            total, named = both[:, 0], both[:, 1:]
            self.lap("communication")
        return evidence_loss(total, named, known, self.scale * self.margin)

    @torch.no_grad()
    def likeliest(self, embeddings: Tensor, targets: Targets, count: int) -> tuple[Tensor, Tensor]:
        """Return the `count` likeliest classes of the samples of all workers and ln P(class | embedding, evidence).

        Both are [samples, count], best first, the same on every worker; fewer where there are fewer classes.
        """
        everyone, known = self._gathered(embeddings, targets)
        weight = self.optimizer.draw(None).weight
        total = torch.full((len(everyone),), -torch.inf, device=everyone.device)
        best, classes = everyone.new_zeros(len(everyone), 0), known.classes.new_zeros(len(everyone), 0)
        for start in range(0, len(self.owned), self.chunk):
            owned = self.owned[start : start + self.chunk]
            rows = F.normalize(weight[start : start + self.chunk], dim=1)
            logits = self.scale * everyone @ rows.T + known.over(owned)
            total = torch.logaddexp(total, logits.logsumexp(dim=1))
            here = torch.arange(owned.start, owned.stop, device=classes.device).expand(len(everyone), -1)
            best, classes = _best(torch.cat([best, logits], dim=1), torch.cat([classes, here], dim=1), count)
        if self.world > 1:
            counts = [min(count, len(class_range(self.classes, self.world, rank))) for rank in range(self.world)]
            best, classes = (gather_rows(part.T.contiguous(), counts, self.group).T for part in (best, classes))
            best, classes = _best(best, classes, count)
            total = gather_rows(total[None], [1] * self.world, self.group).logsumexp(dim=0)
        return classes, best - total[:, None]

    def _draw(self, everyone: Tensor, known: Targets) -> DrawnClasses:
        """Draw the classes of a step: those of this worker that samples name or are near to, and a share of all."""
        owned = self.owned
        sample, slot = ((known.classes >= owned.start) & (known.classes < owned.stop)).nonzero(as_tuple=True)
        place, order = (known.classes[sample, slot] - owned.start).sort()
        sample, slot = sample[order], slot[order]
        named, count = place.unique_consecutive(), math.ceil(self.rate * self.classes)
        if count >= self.classes:
            return DrawnClasses(self.optimizer.draw(None), None, sample, slot, place)
        drawn = stratified(owned, self.classes, count, self._drawing).to(place.device) - owned.start
        certain = merged(named, self._nearest.near(everyone)) if self._nearest else named
        index = merged(drawn, certain)
        stands_for = None
        if self.unbiased:
            stands_for = torch.full((len(index),), self.classes / count, device=index.device)
            stands_for[torch.searchsorted(index, certain)] = 1  # they would have been here anyway
        return DrawnClasses(self.optimizer.draw(index), stands_for, sample, slot, torch.searchsorted(index, place))

    def _gathered(self, embeddings: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        if self.world == 1:
            return embeddings, targets
        counts = [torch.zeros(1, dtype=torch.int64, device=embeddings.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(embeddings)], device=embeddings.device), self.group)
        sizes = [int(count) for count in counts]
        everyone = _GatherRows.apply(embeddings, sizes, self.rank, self.group, self.lap)
        assert isinstance(everyone, Tensor)
        known = Targets.unpacked(gather_rows(targets.packed(), sizes, self.group))
        self.lap("communication")
        return everyone, known


def evidence_loss(total: Tensor, named: Tensor, targets: Targets, margin: float) -> Tensor:
    """Return the weighted mean of -ln sum over classes of P(class | embedding) * P(what was observed | class).

    A sample's belief is what its evidence and its embedding say together. The margin is shared as the belief is, and
    the classes that a sample does not name share as one. With certain targets this is CosFace's loss, and without any
    evidence it is 0.

    Args:
        total: [n], the sum of exponentials of the logits of all classes that a sample does not name.
        named: [n, k], the logits of those that it names; whatever in the place of `PADDING`.
        targets: of the n samples.
        margin: in units of a logit.
    """
    named = torch.where(targets.classes == PADDING, _NONE, named)
    rest = torch.where(total > 0, total.clamp_min(torch.finfo(total.dtype).tiny).log(), _NONE)
    logits = torch.cat([named, rest[:, None]], dim=1)
    evidence = torch.cat([targets.evidence, targets.others.clamp_min(_NONE)[:, None]], dim=1)
    if margin:
        with torch.no_grad():
            belief = (logits + evidence).softmax(dim=1)
        logits = logits - margin * belief
    share = targets.weights / targets.weights.sum().clamp_min(torch.finfo(targets.weights.dtype).tiny)
    return ((logits.logsumexp(dim=1) - (logits + evidence).logsumexp(dim=1)) * share).sum()


def _mixed(*numbers: int) -> int:
    """Return a seed for a tuple of numbers; torch's generator looks at its last 32 bits only."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks, `sizes[rank]` each; collectives want equal shapes, so they travel padded."""
    if len(sizes) == 1:
        return rows
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])


def _best(values: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` greatest of each row with their classes, best first."""
    best, places = values.topk(min(count, values.shape[1]), dim=1)
    return best, classes.gather(1, places)


class _GatherRows(torch.autograd.Function):
    """`gather_rows` whose gradient is summed over the ranks: each saw the logits of its own classes only."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sizes: list[int], rank: int, group: dist.ProcessGroup | None, lap: Lap
    ) -> Tensor:
        ctx.sizes, ctx.rank, ctx.group, ctx.lap = sizes, rank, group, lap
        return gather_rows(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.lap("softmax")
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        ctx.lap("communication")
        start = sum(ctx.sizes[: ctx.rank])
        return gradient[start : start + ctx.sizes[ctx.rank]], None, None, None, None


class _SumOverRanks(torch.autograd.Function):
    """Every rank derives the same loss from the sum, and takes the gradient of what it brought to it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
