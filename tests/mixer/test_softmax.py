"""2 workers = 1 process: loss and every gradient to 1e-5 in fp32, with real processes that talk over gloo."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

from mixer.class_logits import ClassLogits
from mixer.row_adam import RowAdam, Rows
from mixer.softmax import ShardedMarginSoftmax, class_range, fixed_scale
from mixer.targets import PADDING, Targets

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
DIM = 8


class Case(NamedTuple):
    """A global batch: how many samples each rank brings, and which classes they are of."""

    classes: int
    counts: tuple[int, ...]  # a world of 2 uses the first two
    labels: tuple[int, ...] = ()  # the classes that occur; () for all
    margin: float = 0.2
    scale: float = 16.0
    weights: tuple[float, ...] = (1.0,)  # repeated over the samples
    uncertain: float = 0.0  # share of samples that have evidence for some classes and not one class
    rate: float = 1.0
    unbiased: bool = False
    seed: int = 0


CASES = {
    "uneven classes and uneven batches": Case(7, (5, 2, 4)),
    "the first worker has no positives": Case(7, (3, 4, 2), labels=(5, 6)),
    "the last worker has no positives": Case(7, (3, 4, 2), labels=(0, 1)),
    "the first worker has an empty batch": Case(10, (0, 6, 3)),
    "the last workers have empty batches": Case(10, (6, 0, 0)),
    "no worker has a sample": Case(5, (0, 0, 0)),
    "more workers than classes": Case(1, (2, 3, 1)),
    "two classes": Case(2, (2, 3, 1)),
    "classes of very unequal size": Case(9, (8, 8, 8), labels=(4, 4, 4, 4, 4, 4, 0)),
    "sample weights": Case(7, (5, 2, 4), weights=(0.1, 2.0, 0.0, 0.7)),
    "only one sample counts": Case(7, (1, 5, 3), weights=(1.0, *(0.0,) * 8)),
    "no sample counts": Case(7, (1, 5, 3), weights=(0.0,)),
    "evidence": Case(7, (5, 2, 4), uncertain=1.0),
    "evidence without a margin": Case(7, (5, 2, 4), margin=0.0, uncertain=1.0),
    "certain and uncertain samples": Case(7, (5, 2, 4), weights=(0.1, 2.0, 0.7), uncertain=0.5),
    "evidence for more classes than a worker has": Case(4, (5, 2, 4), uncertain=0.7),
    "no margin": Case(6, (3, 1, 2), margin=0.0),
    "some classes are drawn": Case(60, (5, 2, 4), rate=0.2, uncertain=0.5),
    "classes drawn stand for others": Case(60, (5, 2, 4), rate=0.2, unbiased=True, uncertain=0.5),
    "a large scale and margin": Case(6, (3, 1, 2), margin=0.5, scale=64.0),
}


def whole_batch(case: Case, world: int) -> tuple[list[int], Tensor, Targets, Tensor]:
    """Return each rank's count, and everybody's embeddings, targets and class weights."""
    generator = torch.Generator().manual_seed(case.seed)
    counts = list(case.counts[:world])
    total = sum(counts)
    embeddings = F.normalize(torch.randn(total, DIM, generator=generator), dim=1)
    occurring = torch.tensor(case.labels or tuple(range(case.classes)))
    labels = occurring[torch.randint(len(occurring), (total,), generator=generator)]
    weights = torch.tensor(case.weights).repeat(total)[:total]
    class_weights = torch.randn(case.classes, DIM, generator=generator)
    targets = Targets.certain(labels, weights, width=3)
    for row in range(total):
        if torch.rand(1, generator=generator) < case.uncertain:
            named = torch.randperm(case.classes, generator=generator)[: 1 + row % 3]
            targets.classes[row] = PADDING
            targets.classes[row, : len(named)] = named
            targets.evidence[row] = 3 * torch.randn(3, generator=generator)
            targets.others[row] = 0.5
    return counts, embeddings, targets, class_weights


def slow_loss(case: Case, embeddings: Tensor, targets: Targets, class_weights: Tensor, drawn: Tensor) -> Tensor:
    """The loss written out sample by sample, in one process, over the classes `drawn`."""
    stands_for = torch.full((len(drawn),), 1 / case.rate if case.unbiased else 1.0)
    stands_for[torch.isin(drawn, targets.classes)] = 1
    absent = torch.full((case.classes,), -torch.inf)
    absent[drawn] = stands_for.log()
    cosines = embeddings @ (class_weights / class_weights.norm(dim=1, keepdim=True)).T
    losses = []
    for row, cosine in enumerate(cosines):
        evidence = targets.others[row].repeat(case.classes)
        for label, value in zip(targets.classes[row].tolist(), targets.evidence[row].tolist(), strict=True):
            if label != PADDING:
                evidence[label] = value
        belief = (case.scale * cosine.detach() + absent + evidence).softmax(dim=0)
        unnamed = [label for label in range(case.classes) if label not in targets.classes[row].tolist()]
        belief[unnamed] = belief[unnamed].sum()  # they share as one
        log_probabilities = (case.scale * (cosine - case.margin * belief) + absent).log_softmax(dim=0)
        losses.append(-(log_probabilities + evidence).logsumexp(dim=0) * targets.weights[row])
    total = sum(losses, start=cosines.sum() * 0)
    return total / targets.weights.sum() if targets.weights.sum() > 0 else total * 0


class Recorder:
    """An optimizer that only keeps the gradient of each class, [classes, dim]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.gradient = weight, torch.zeros_like(weight)
        self.drawn: list[Tensor] = []

    def draw(self, index: Tensor | None) -> Rows:
        rows = torch.arange(len(self.weight), device=self.weight.device) if index is None else index
        return Rows(rows, self.weight[rows], self.weight[rows], self.weight[rows, 0])

    def update(self, rows: Rows, part: slice, gradient: Tensor) -> None:
        assert rows.index is not None
        self.gradient[rows.index[part]] += gradient
        self.drawn.append(rows.index[part])

    def commit(self, rows: Rows) -> None:
        pass


def run_case(
    case: Case, world: int, rank: int, group: dist.ProcessGroup | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """Run one rank's part; its embeddings and its classes only."""
    counts, embeddings, targets, class_weights = whole_batch(case, world)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    drawing = {"rate": case.rate, "unbiased": case.unbiased}
    head = ShardedMarginSoftmax(DIM, case.classes, case.margin, case.scale, group, **drawing, chunk=3)
    with torch.no_grad():
        head.weight.copy_(class_weights[head.owned.start : head.owned.stop])
    head.to(device)
    recorder = head.optimizer = Recorder(head.weight)
    leaf = embeddings[mine].clone().to(device).requires_grad_()
    known = targets[torch.arange(mine.start, mine.stop)].to(device)
    loss = head(leaf, known)
    (3 * loss).backward()
    assert leaf.grad is not None
    gradient = recorder.gradient / 3
    drawn = torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *recorder.drawn])
    classes, belief = head.likeliest(leaf.detach(), known, 3)
    found = {"likeliest": classes, "belief": belief}
    found |= {"classes": gradient, "drawn": drawn + head.owned.start}
    found |= {"loss": loss.detach(), "embeddings": leaf.grad / 3}
    return {name: value.cpu() for name, value in found.items()}


def drawn_weights() -> dict[str, Tensor]:
    head = ShardedMarginSoftmax(DIM, 7, 0.2, 16.0)
    head.reset(seed=5)
    return {"classes": head.weight.detach()}


def worker(rank: int, folder: str) -> None:
    """One of three processes: all cases in a world of 3, then ranks 0 and 1 in a world of 2."""
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous-{world}",
            world_size=world,
            rank=rank,
            timeout=datetime.timedelta(seconds=60),
        )
        results = {name: run_case(case, world, rank) for name, case in CASES.items()}
        results["drawn weights"] = drawn_weights()
        if world == 3:
            group = dist.new_group([1, 2])
            if rank > 0:
                results["subgroup"] = run_case(CASES["sample weights"], 2, rank - 1, group)
        torch.save(results, f"{folder}/{world}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, Tensor]]]]:
    """What each rank got, by size of world."""
    folder = Path(tmp_path_factory.mktemp("gloo"))
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=3)
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in (2, 3)}


def check(case: Case, results: list[dict[str, Tensor]]) -> None:
    """Compare the ranks' results, joined, with `slow_loss` over the whole batch."""
    _, embeddings, targets, class_weights = whole_batch(case, len(results))
    embeddings.requires_grad_()
    class_weights.requires_grad_()
    drawn = torch.cat([result["drawn"] for result in results])
    loss = slow_loss(case, embeddings, targets, class_weights, drawn)
    loss.backward()
    for result in results:
        torch.testing.assert_close(result["loss"], loss.detach(), **TOLERANCE)
    for name, expected in (("embeddings", embeddings.grad), ("classes", class_weights.grad)):
        torch.testing.assert_close(torch.cat([result[name] for result in results]), expected, **TOLERANCE)
    cosines = embeddings.detach() @ F.normalize(class_weights.detach(), dim=1).T
    belief = (case.scale * cosines + targets.over(range(case.classes))).log_softmax(dim=1)
    best = belief.topk(min(3, case.classes), dim=1)
    for result in results:
        torch.testing.assert_close(result["belief"], best.values, **TOLERANCE)
        sure = best.values > -torch.inf  # of equal ones any may come first
        assert torch.equal(result["likeliest"][sure], best.indices[sure])


def test_a_class_may_have_several_centres_all_named_with_equal_evidence() -> None:
    head = ShardedMarginSoftmax(DIM, 3 * 2, margin=0.0, scale=8.0)
    head.weight.copy_(torch.randn(3 * 2, DIM, generator=torch.Generator().manual_seed(0)))
    head.optimizer = Recorder(head.weight)
    embeddings = F.normalize(torch.randn(5, DIM, generator=torch.Generator().manual_seed(1)), dim=1).requires_grad_()
    labels = torch.tensor([0, 2, 1, 1, 0])
    centres = labels[:, None] * 2 + torch.arange(2)
    targets = Targets(centres, torch.zeros(5, 2), torch.full((5,), -torch.inf), torch.ones(5))
    loss = head(embeddings, targets)
    (found,) = torch.autograd.grad(loss, embeddings)
    shares = (8.0 * embeddings @ F.normalize(head.weight, dim=1).T).softmax(dim=1).unflatten(1, (3, 2)).sum(dim=2)
    expected = F.nll_loss(shares.log(), labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, embeddings)[0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [2, 3])
def test_workers_equal_one_process(ranks, world: int, name: str) -> None:
    check(CASES[name], [results[name] for results in ranks[world]])


@pytest.mark.parametrize("name", CASES)
def test_without_a_process_group_it_is_the_plain_loss(name: str) -> None:
    check(CASES[name], [run_case(CASES[name], 1, 0)])


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_classes_cannot_explode(name: str) -> None:
    """Each is at most scale / the length of its row; times these, all add up to at most twice the scale."""
    _, _, _, class_weights = whole_batch(CASES[name], 1)
    found = run_case(CASES[name], 1, 0)["classes"]
    pulls = found.norm(dim=1) * class_weights.norm(dim=1) / CASES[name].scale
    assert pulls.max() <= 1 + 1e-5
    assert pulls.sum() <= 2 + 1e-5


def gpu_worker(rank: int, world: int, folder: str) -> None:
    """One of so many processes with a GPU each."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", world_size=world, rank=rank)
    results = {name: run_case(case, world, rank, device=f"cuda:{rank}") for name, case in CASES.items()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_gpus_equal_one_process(tmp_path: Path) -> None:
    world = min(3, torch.cuda.device_count())
    torch.multiprocessing.spawn(gpu_worker, (world, str(tmp_path)), nprocs=world)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, case in CASES.items():
        check(case, [part[name] for part in parts])


def test_the_group_given_is_the_one_used(ranks) -> None:
    check(CASES["sample weights"], [ranks[3][rank]["subgroup"] for rank in (1, 2)])


def test_the_cases_are_what_their_names_say() -> None:
    """Guards the table above: an uneven case that became even would test nothing."""
    for world in (2, 3):
        owned = [set(class_range(7, world, rank)) for rank in range(world)]
        assert len({len(part) for part in owned}) == 2
        assert not owned[0] & set(CASES["the first worker has no positives"].labels)
        assert not owned[-1] & set(CASES["the last worker has no positives"].labels)
        assert any(not class_range(CASES["more workers than classes"].classes, world, rank) for rank in range(world))


def test_drawn_class_weights_do_not_depend_on_the_number_of_workers(ranks) -> None:
    alone = drawn_weights()["classes"]
    assert len(alone.unique(dim=0)) == len(alone)
    for world, results in ranks.items():
        joined = torch.cat([result["drawn weights"]["classes"] for result in results])
        assert torch.equal(joined, alone), world
    head = ShardedMarginSoftmax(DIM, 7, 0.2, 16.0)
    head.reset(seed=6)
    assert not torch.equal(head.weight, alone)


@pytest.mark.parametrize(("classes", "world"), [(0, 2), (1, 3), (7, 3), (9, 3), (100_000_001, 16)])
def test_class_ranges_are_a_partition_in_order(classes: int, world: int) -> None:
    ranges = [class_range(classes, world, rank) for rank in range(world)]
    assert ranges[0].start == 0
    assert ranges[-1].stop == classes
    assert all(a.stop == b.start for a, b in itertools.pairwise(ranges))
    sizes = [len(part) for part in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_certain_targets_give_the_loss_of_cosface() -> None:
    case = CASES["sample weights"]
    _, embeddings, targets, class_weights = whole_batch(case, 3)
    labels, weights = targets.classes[:, 0], targets.weights
    cosines = embeddings @ F.normalize(class_weights, dim=1).T
    logits = case.scale * (cosines - case.margin * F.one_hot(labels, case.classes))
    expected = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
    everything = torch.arange(case.classes)
    torch.testing.assert_close(slow_loss(case, embeddings, targets, class_weights, everything), expected)


def class_logits(head: ShardedMarginSoftmax, embeddings: Tensor, known: Targets) -> tuple[Tensor, Tensor]:
    """Return the `total` and `named` of `evidence_loss` in one process."""
    drawn = head._draw(embeddings, known)
    return ClassLogits.apply(embeddings, drawn, 1, head.scale, head.chunk, head.kind, head.optimizer)


def make_head(classes: int, dim: int = DIM, **settings) -> ShardedMarginSoftmax:
    head = ShardedMarginSoftmax(dim, classes, 0.0, 8.0, **settings)
    head.weight = torch.randn(classes, dim, generator=torch.Generator().manual_seed(3))
    head.optimizer = Recorder(head.weight)
    return head


@pytest.mark.parametrize("nearest", [0, 5])
def test_the_sum_over_classes_drawn_is_unbiased(nearest: int) -> None:
    embeddings = F.normalize(torch.randn(6, DIM, generator=torch.Generator().manual_seed(1)), dim=1)
    known = Targets.certain(torch.tensor([3, 3, 77, 120, 199, 0]))
    whole, _ = class_logits(make_head(200), embeddings, known)
    head, sums = make_head(200, rate=0.1, unbiased=True, nearest=nearest, nearest_every=10**6), []
    for step in range(4000):
        head.begin_step(0, step)
        sums.append(class_logits(head, embeddings, known)[0])
    ratio = torch.stack(sums) / whole
    error = ratio.std(dim=0) / len(sums) ** 0.5
    assert ((ratio.mean(dim=0) - 1).abs() < 4 * error).all()
    assert (error < (0.01 if nearest else 0.02)).all()  # the largest are there for certain


def test_what_is_drawn_does_not_depend_on_the_number_of_workers(ranks) -> None:
    name = "some classes are drawn"
    alone = run_case(CASES[name], 1, 0)["drawn"]
    assert 12 <= len(alone) < 60
    named = whole_batch(CASES[name], 1)[2].classes
    for world in (2, 3):
        others = torch.cat([results[name]["drawn"] for results in ranks[world]])
        assert set(alone.tolist()) - set(named.flatten().tolist()) <= set(others.tolist())


def test_bf16_moves_a_logit_less_than_its_bound_at_worst() -> None:
    """Of some of these, both factors and the product lie in the middle between two numbers that bf16 has."""
    values, off = torch.linspace(0.5, 1, 257), []
    embeddings, known = torch.stack([values, torch.zeros(257)], dim=1), Targets.certain(torch.zeros(257).long())
    for length in torch.linspace(1, 2, 257).tolist():
        head = ShardedMarginSoftmax(2, 2, 0.0, scale := 19.538, precision="bf16")
        head.weight = torch.tensor([[0.0, 1.0], [length, 0.0]])
        head.optimizer = Recorder(head.weight)
        total, _ = class_logits(head, embeddings, known)  # the exponential of the other class's logit
        off.append((total.log() / scale - values).abs().max())
    assert 2**-7 < max(off) < 0.012


@pytest.mark.parametrize("dim", [16, 256])
def test_bf16_moves_a_logit_less_than_its_bound(dim: int) -> None:
    embeddings = F.normalize(torch.randn(64, dim, generator=torch.Generator().manual_seed(1)), dim=1)
    known = Targets.certain(torch.arange(64) % 50)
    exact, rounded = (class_logits(make_head(50, dim, precision=kind), embeddings, known) for kind in ("fp32", "bf16"))
    torch.testing.assert_close(exact[1], rounded[1])  # of the class named, nothing is rounded
    assert ((exact[0] / rounded[0]).log().abs() < 8.0 * 0.012).all()
    assert not torch.equal(exact[0], rounded[0])


def sampled_run(first: int, last: int, before: RowAdam | None = None) -> tuple[RowAdam, list[float]]:
    """Learn with a twentieth of 400 classes a step; a few samples name some more."""
    head = make_head(400, rate=0.05)
    adam = head.optimizer = RowAdam(head.weight, 0.05, weight_decay=0.01)
    if before:
        adam.load([(slice(None), before.state())], before.step_count)
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        embeddings = F.normalize(torch.randn(9, DIM, generator=generator), dim=1).requires_grad_()
        head.begin_step(7, step)
        loss = head(embeddings, Targets.certain(torch.randint(400, (9,), generator=generator)))
        loss.backward()
        losses.append(float(loss.detach()))
    return adam, losses


def test_a_sampled_run_that_is_broken_off_goes_on_alike() -> None:
    whole, losses = sampled_run(0, 30)
    half, first = sampled_run(0, 14)
    resumed, second = sampled_run(14, 30, before=half)
    torch.testing.assert_close(torch.tensor(first + second), torch.tensor(losses), **TOLERANCE)
    for found, expected in zip(resumed.state().values(), whole.state().values(), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (whole.exp_avg_sq > 0).float().mean() > 0.5  # most were drawn at some time
    assert (whole.exp_avg_sq == 0).any()  # not all


def test_a_scale_whose_exponentials_overflow_is_refused() -> None:
    with pytest.raises(ValueError, match="scale 65: expected more than 0 and at most 64"):
        ShardedMarginSoftmax(DIM, 7, 0.2, 65)


def test_without_evidence_there_is_nothing_to_learn() -> None:
    head = ShardedMarginSoftmax(DIM, 7, 0.0, 16.0)
    head.reset(0)
    head.optimizer = Recorder(head.weight)
    known = Targets(torch.full((4, 1), PADDING), torch.zeros(4, 1), torch.zeros(4), torch.ones(4))
    loss = head(F.normalize(torch.randn(4, DIM), dim=1).requires_grad_(), known)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(head.optimizer.gradient, torch.zeros(7, DIM), atol=1e-5, rtol=0)


def test_the_fixed_scale_grows_with_the_classes() -> None:
    assert fixed_scale(1) == fixed_scale(152) == 10.0
    assert fixed_scale(1619) == pytest.approx(10.449, abs=1e-3)
    assert fixed_scale(10**8) == pytest.approx(26.05, abs=1e-2)
