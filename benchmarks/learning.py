"""Ways to learn from the same samples: by classification, as the product does, and what people use today.

All share the frozen encoder's cached features, the towers and what is kept of their initial weights, the optimizer and
the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixer.row_adam import RowAdam
from mixer.sampling import EpochPlan, learning_rate_factor, plan_epoch
from mixer.softmax import ShardedMarginSoftmax, fixed_scale
from mixer.targets import Targets, concatenate, from_belief, pool_evidence
from mixer.towers import Towers
from mixer.training import Batch, FrozenTower
from mixer_platform.config import RunConfig
from mixer_platform.train.features import FeatureSamples

TEMPERATURE = 0.07  # of InfoNCE
TRIPLET_MARGIN = 0.2
ARCFACE_MARGIN = 0.3  # radians

MakeTowers = Callable[..., Towers]


@dataclass
class Bench:
    """Features of samples and of the photos that are asked, and what is right for each of these.

    clicks: int64 [pairs, 3], photo row, item row and clicks of the clicked pairs that are samples.
    """

    config: RunConfig
    samples: FeatureSamples
    classes: int
    widths: tuple[int, int]
    asked: Tensor
    relevant: list[set[str]]
    clicks: np.ndarray

    @property
    def photos(self) -> int:
        return len(self.samples.photos)

    @property
    def item_ids(self) -> list[str]:
        return self.samples.ids[self.photos :]

    @property
    def everything(self) -> np.ndarray:
        return np.arange(len(self.samples.labels))


# Towers -------------------------------------------------------------------------------------------------------------


def new_towers(bench: Bench, seed: int, make: MakeTowers = Towers, without: np.ndarray | None = None) -> Towers:
    """Return untrained towers that have seen no features of the rows `without`."""
    torch.manual_seed(seed)
    towers = make(bench.config.model, *bench.widths)
    pictured = bench.photos + bench.samples.has_image.nonzero()[:, 0].numpy()
    seen = ~np.isin(np.concatenate([np.arange(bench.photos), pictured]), [] if without is None else without)
    towers.initialise(bench.samples.pooled(towers)[torch.from_numpy(seen)])
    return towers


class OneTransformation(Towers):
    """Photos and items are transformed alike."""

    def __init__(self, *arguments) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*arguments)
        self.item_transform = self.query_transform


class NoMemory(Towers):
    """The mean of the text's tokens, transformed, is added to the picture; there are no concepts."""

    def __init__(self, config, image_width: int, text_width: int) -> None:  # type: ignore[no-untyped-def]
        super().__init__(config, image_width, text_width)
        self.text_transform = nn.Linear(text_width, config.dim)

    def item_branches(
        self, patches: Tensor, has_image: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        pooled = self.pool(self.standardised(patches)) * has_image[:, None]
        whole = F.normalize(self.item_transform(pooled), dim=1) * has_image[:, None]
        said = F.normalize(self.text(pooled, tokens, token_mask), dim=1) * token_mask.any(dim=1)[:, None]
        return F.normalize(whole + said, dim=1), whole, said

    def text(self, pooled: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Return what the text says, [n, dim], of any length."""
        return self.text_transform(mean_token(tokens, token_mask))


class Reversed(NoMemory):
    """The picture asks and the text is read: query and value of the attention change places."""

    def __init__(self, config, image_width: int, text_width: int) -> None:  # type: ignore[no-untyped-def]
        super().__init__(config, image_width, text_width)
        self.ask = nn.Linear(image_width, config.concept_dim)
        self.asked = nn.Linear(text_width, config.concept_dim)

    def text(self, pooled: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        scores = (self.asked(tokens) @ self.ask(pooled)[..., None])[..., 0] / self.ask.out_features**0.5
        shares = torch.softmax(scores.masked_fill(token_mask == 0, -1e9), dim=1)
        return self.text_transform((shares[:, None] @ tokens)[:, 0])


class Concatenated(Towers):
    """Picture and text side by side through one transformation."""

    def __init__(self, config, image_width: int, text_width: int) -> None:  # type: ignore[no-untyped-def]
        super().__init__(config, image_width, text_width)
        self.transform = nn.Linear(image_width + text_width, config.dim)

    @torch.no_grad()
    def initialise(self, pooled: Tensor) -> None:
        super().initialise(pooled)
        self.transform.weight[:, : pooled.shape[1]] = self.initial_weight
        nn.init.zeros_(self.transform.bias)

    @torch.no_grad()
    def interpolate(self, learned: float) -> None:
        super().interpolate(learned)
        self.transform.weight[:, : self.initial_weight.shape[1]].lerp_(self.initial_weight, 1 - learned)
        self.transform.bias.mul_(learned)

    def item_branches(
        self, patches: Tensor, has_image: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        image = self.pool(self.standardised(patches)) * has_image[:, None]
        text = mean_token(tokens, token_mask)
        text = text * (image.shape[1] / text.shape[1]) ** 0.5  # both weigh the same
        shown = [(image, text), (image, torch.zeros_like(text)), (torch.zeros_like(image), text)]
        fused, whole, said = (F.normalize(self.transform(torch.cat(parts, dim=1)), dim=1) for parts in shown)
        return fused, whole, said


def mean_token(tokens: Tensor, token_mask: Tensor) -> Tensor:
    """Return the mean of each text's tokens at a scale near 1, [n, text_width]; zeros without a text."""
    total = (tokens * token_mask[..., None]).sum(dim=1) / token_mask.sum(dim=1, keepdim=True).clamp_min(1)
    return F.normalize(total, dim=1) * total.shape[1] ** 0.5


# Learning -----------------------------------------------------------------------------------------------------------


def steps_of(
    bench: Bench, seed: int, count: int, order: Callable[[EpochPlan, np.random.Generator], np.ndarray]
) -> Iterator:
    """Yield each step's rows and plan, and the factor of its learning rates, for the configured epochs of `count`."""
    train = bench.config.train
    steps, step = train.epochs * math.ceil(count / train.batch_size), 0
    for epoch in range(train.epochs):
        plan = plan_epoch(len(bench.everything), train.views, epoch, seed, train.text_dropout, train.image_dropout)
        rows = order(plan, np.random.default_rng([seed, epoch]))
        for start in range(0, count, train.batch_size):
            yield rows[start : start + train.batch_size], plan, learning_rate_factor(step, steps, train.warmup)
            step += 1


def optimise(
    bench: Bench,
    towers: Towers,
    head: nn.Module | None,
    steps: Iterator,
    loss_of: Callable[[np.ndarray, EpochPlan], Tensor],
) -> None:
    """AdamW on towers and classifier with the product's rates and clipping; the product's classifier steps itself."""
    train = bench.config.train
    groups: list[tuple[nn.Module, float]] = [(towers, train.tower_lr)]
    if isinstance(head, ShardedMarginSoftmax):
        rows = head.optimizer = RowAdam(head.weight, train.classifier_lr, train.weight_decay)
    elif head is not None:
        groups.append((head, train.classifier_lr))
    optimizers = [
        (torch.optim.AdamW(set(module.parameters()), lr=rate, weight_decay=train.weight_decay), rate)
        for module, rate in groups
    ]
    for step, (drawn, plan, factor) in enumerate(steps):
        if isinstance(head, ShardedMarginSoftmax):
            rows.lr = train.classifier_lr * factor
            head.begin_step(train.seed, step)
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
        loss_of(drawn, plan).backward()
        torch.nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()


@dataclass
class Classification:
    """Learning by classification, as the product does; every part can be taken away.

    text: whether items have any. rate: share of the classes that a step draws. precision: of the softmax's products.
    interpolation: how much of what the transformations learned is kept; None: as configured.
    """

    targets: Targets
    classes: int
    make: MakeTowers = Towers
    rounds: int = 1
    text: bool = True
    branch_weight: float | None = None
    rate: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    interpolation: float | None = None

    def __call__(self, bench: Bench, seed: int, without: np.ndarray | None = None) -> Towers:
        """Return what was learned from all samples but the rows `without`."""
        towers, head = self._round(bench, seed, self.targets, without)
        for round_ in range(1, self.rounds):
            targets = believed(bench, towers, head, self.targets)
            towers, head = self._round(bench, seed + 100 * round_, targets, without)
        towers.interpolate(bench.config.train.interpolation if self.interpolation is None else self.interpolation)
        return towers

    def _round(
        self, bench: Bench, seed: int, targets: Targets, without: np.ndarray | None
    ) -> tuple[Towers, ShardedMarginSoftmax]:
        train = bench.config.train
        towers = new_towers(bench, seed, self.make, without)
        tower = FrozenTower(towers)
        scale = train.scale or fixed_scale(self.classes)
        settings: dict[str, Any] = {"rate": self.rate, "precision": self.precision}
        head = ShardedMarginSoftmax(bench.config.model.dim, self.classes, train.margin, scale, **settings)
        head.reset(seed)
        weight = train.branch_weight if self.branch_weight is None else self.branch_weight
        learned = bench.everything if without is None else np.setdiff1d(bench.everything, without)

        def loss_of(rows: np.ndarray, plan: EpochPlan) -> Tensor:
            if not self.text:  # an item without either would teach nothing
                plan = replace(plan, drop_image=np.zeros_like(plan.drop_image))
            batch = without_text(bench.samples.batch(rows, plan), self.text)
            batch.targets = targets[torch.from_numpy(photos_first(rows, bench.photos))]
            return head(tower(batch, branches=weight > 0), batch.targets_by_branch(weight) if weight else batch.targets)

        def order(plan: EpochPlan, _: np.random.Generator) -> np.ndarray:
            return plan.order[np.isin(plan.order, learned)]

        optimise(bench, towers, head, steps_of(bench, seed, len(learned), order), loss_of)
        return towers, head


@torch.no_grad()
def believed(bench: Bench, towers: Towers, head: ShardedMarginSoftmax, targets: Targets) -> Targets:
    """Return what the evidence and a trained model say together, which the next round learns from."""
    train = bench.config.train
    photos, items = torch.arange(bench.photos), torch.arange(bench.photos, len(bench.everything))
    views = [towers.query(bench.samples.photos[:, view].float()) for view in range(train.views)]
    found = head.likeliest(F.normalize(torch.stack(views).mean(dim=0), dim=1), targets[photos], train.candidates)
    beliefs = from_belief(*found, train.least_belief, targets.weights[photos], head.classes)
    return concatenate([beliefs, targets[items]])


def arcface(bench: Bench, seed: int) -> Towers:
    """ArcFace (Deng et al., CVPR 2019): each item is a class, and each photo of the class of its most clicked item."""
    labels, weights = most_clicked(bench)
    items = len(bench.item_ids)
    towers, scale = new_towers(bench, seed), fixed_scale(items)
    tower, centres = FrozenTower(towers), nn.Linear(bench.config.model.dim, items, bias=False)
    nn.init.normal_(centres.weight, std=0.01)

    def loss_of(rows: np.ndarray, plan: EpochPlan) -> Tensor:
        order = torch.from_numpy(photos_first(rows, bench.photos))
        cosines = tower(bench.samples.batch(rows, plan)) @ F.normalize(centres.weight, dim=1).T
        right = F.one_hot(labels[order], items).bool()
        angles = cosines.clamp(-1 + 1e-6, 1 - 1e-6).arccos() + ARCFACE_MARGIN
        # Beyond pi the cosine would rise again.
        logits = scale * torch.where(right & (angles < math.pi), angles.cos(), cosines)
        losses = F.cross_entropy(logits, labels[order], reduction="none")
        return (losses * weights[order]).sum() / weights[order].sum()

    steps = steps_of(bench, seed, len(bench.everything), lambda plan, _: plan.order)
    optimise(bench, towers, centres, steps, loss_of)
    towers.interpolate(bench.config.train.interpolation)
    return towers


def infonce(bench: Bench, seed: int, pairs: np.ndarray | None = None) -> Towers:
    """InfoNCE (van den Oord et al., 2018) on pairs, as often as clicked; negatives are the batch's other items."""

    def loss_of(photos: Tensor, items: Tensor, same: Tensor) -> Tensor:
        logits = (photos @ items.T / TEMPERATURE).masked_fill(same, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(photos)))

    return _learn_pairs(bench, seed, bench.clicks if pairs is None else pairs, loss_of)


def triplet(bench: Bench, seed: int) -> Towers:
    """Triplet loss on clicked pairs with the batch's hardest other item that the margin still tells from the right one
    (semi-hard: Schroff et al., CVPR 2015)."""

    def loss_of(photos: Tensor, items: Tensor, same: Tensor) -> Tensor:
        cosines = photos @ items.T
        right = cosines.diagonal()
        wrong = cosines.masked_fill(same | torch.eye(len(photos), dtype=torch.bool), -1)
        semi_hard = wrong.masked_fill(wrong >= right[:, None], -1).amax(dim=1)
        return F.relu(semi_hard - right + TRIPLET_MARGIN).mean()

    return _learn_pairs(bench, seed, bench.clicks, loss_of)


def _learn_pairs(
    bench: Bench, seed: int, pairs: np.ndarray, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Towers:
    """Learn from pairs [pairs, 3] of photo row, item row and how often: as many a step as others see samples.

    `loss_of` takes photos and items, [n, dim] each, and bool [n, n], where another pair's item is a pair with this
    photo too, and so no negative.
    """
    paired = torch.zeros(bench.photos, len(bench.item_ids), dtype=torch.bool)
    paired[pairs[:, 0], pairs[:, 1]] = True
    chance = pairs[:, 2] / pairs[:, 2].sum()
    towers = new_towers(bench, seed)
    tower, count = FrozenTower(towers), len(bench.everything)

    def pair_loss(rows: np.ndarray, plan: EpochPlan) -> Tensor:
        photos, items = pairs[rows, 0], pairs[rows, 1]
        each, place = np.unique(items, return_inverse=True)  # an item in many pairs is embedded once
        embeddings = tower(bench.samples.batch(np.concatenate([photos, bench.photos + each]), plan))
        same = paired[photos][:, items] & ~torch.eye(len(items), dtype=torch.bool)
        return loss_of(embeddings[: len(photos)], embeddings[len(photos) :][torch.from_numpy(place)], same)

    steps = steps_of(bench, seed, count, lambda _, rng: rng.choice(len(pairs), count, p=chance))
    optimise(bench, towers, None, steps, pair_loss)
    towers.interpolate(bench.config.train.interpolation)
    return towers


# Targets ------------------------------------------------------------------------------------------------------------


def most_clicked(bench: Bench) -> tuple[Tensor, Tensor]:
    """Return the most clicked item of each sample, an item's own, and how much each counts: 0 without a click."""
    pairs = bench.clicks[np.argsort(bench.clicks[:, 2], kind="stable")]
    labels = np.concatenate([np.full(bench.photos, -1), np.arange(len(bench.item_ids))])
    labels[pairs[:, 0]] = pairs[:, 1]  # of equal rows numpy, unlike torch, keeps the last: the most clicked
    return torch.from_numpy(labels.clip(min=0)), torch.from_numpy(labels >= 0).float()


def shared_evidence(bench: Bench) -> Targets:
    """Return the product's targets: photos that look alike have shared their evidence."""
    photos, items = torch.arange(bench.photos), torch.arange(bench.photos, len(bench.everything))
    features = bench.samples.photos[:, 0].float()
    pooled = pool_evidence(features, bench.samples.targets[photos], bench.classes, bench.config.train.neighbours)
    return concatenate([pooled, bench.samples.targets[items]])


def clicked_class(bench: Bench) -> Targets:
    """Return targets without denoising: each photo is certain of the class of its most clicked item."""
    labels, weights = most_clicked(bench)
    classes = bench.samples.labels[bench.photos + labels]
    classes[bench.photos :] = bench.samples.labels[bench.photos :]
    return Targets.certain(classes, weights)


def pairs_of_classes(bench: Bench) -> np.ndarray:
    """Return the pairs of each photo and the items of its likeliest class, [pairs, 3]: classes as pairs."""
    labels = bench.samples.labels.numpy()
    photo, item = np.nonzero(labels[: bench.photos, None] == labels[bench.photos :])
    return np.column_stack([photo, item, np.ones_like(photo)])


def photos_first(rows: np.ndarray, photos: int) -> np.ndarray:
    return np.concatenate([rows[rows < photos], rows[rows >= photos]])


def without_text(batch: Batch, text: bool) -> Batch:
    return batch if text else replace(batch, token_mask=torch.zeros_like(batch.token_mask))
