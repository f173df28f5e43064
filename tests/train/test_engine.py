"""Workers must add up: the same global batches give the same model, whatever the number of processes."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from mixer.config import ModelConfig
from mixer.held_gradients import HeldGradients
from mixer.row_adam import RowAdam
from mixer.sampling import learning_rate_factor
from mixer.softmax import ShardedMarginSoftmax, class_range
from mixer.targets import Targets
from mixer.towers import Towers
from mixer.training import Batch, FrozenTower
from mixer_platform.config import TrainConfig
from mixer_platform.errors import TrainingError
from mixer_platform.loopback import free_ports
from mixer_platform.storage import open_storage
from mixer_platform.train.checkpoints import Checkpoints, name_of

STEPS, CLASSES, PHOTOS, ITEMS = 6, 7, 10, 8
IMAGE_WIDTH, TEXT_WIDTH = 12, 8
# A small scale keeps gradients below the clipping norm, which would hide a wrong factor; a large one has them clipped.
CLIPPED: dict[str, Any] = {"scale": 8.0}
TOGETHER: dict[str, Any] = {"scale": 8.0, "clip_classes": True}
MODES: dict[str, dict[str, Any]] = {
    "zero0": {},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "zero0-clipped": CLIPPED,
    "zero2-clipped": {"zero_stage": 2, **CLIPPED},
    "zero0-parts": {"micro_batch": 2},
    "zero2-parts": {"zero_stage": 2, "micro_batch": 2, **CLIPPED},
    "zero3-parts": {"zero_stage": 3, "micro_batch": 2, **CLIPPED},
    "zero0-together": TOGETHER,
    "zero1-together": {"zero_stage": 1, "micro_batch": 2, **TOGETHER},
    "zero2-together": {"zero_stage": 2, "micro_batch": 2, **TOGETHER},
    "zero3-together": {"zero_stage": 3, **TOGETHER},
    "zero0-drawn": {"class_rate": 0.5},
    "zero2-drawn-together": {"zero_stage": 2, "class_rate": 0.5, **TOGETHER},
    "zero1-bf16": {"zero_stage": 1, "precision": "bf16"},  # the last: DeepSpeed's autocast is a setting of the process
    "zero1-bf16-together": {"zero_stage": 1, "precision": "bf16", **TOGETHER},
    "zero3-bf16": {"zero_stage": 3, "precision": "bf16"},
}
BROKEN_OFF = {"zero0": 1e-5, "zero1": 1e-5, "zero2": 1e-5, "zero3": 1e-5}  # and how alike they are
BROKEN_OFF |= {"zero0-drawn": 1e-5, "zero2-drawn-together": 5e-5, "zero1-bf16": 0.05}
STOPS = [2, 4, STEPS]  # 2 workers, then 1, then 3

LEARNING: dict[str, Any] = {"batch_size": 12, "tower_lr": 0.02, "classifier_lr": 0.05, "warmup": 0.3}

# The rows of each worker of two in each step: uneven, without photos (< PHOTOS), without items, without anything.
PARTS = [
    [[0, 1, 2, 10, 11], [3, 12]],
    [[13, 14, 15], [4, 5, 16]],
    [[6, 17, 10], [7, 8, 9]],
    [[0, 3, 11, 12, 5], []],
    [[15, 16, 17], [2, 4, 6, 8]],
    [[9], [1, 13, 14, 10, 7, 17]],
]


def make_trainer(scale: float = 0.5, restored: bool = False, device: str = "cpu", **settings: Any) -> Any:
    from mixer_platform.train import engine

    config = TrainConfig(**LEARNING, **settings)
    tower, head = make_model(scale, restored, config.class_rate)
    with pytest.MonkeyPatch.context() as patch:
        if config.zero_stage == 3:  # cut them all: as it comes, parameters as small as these are kept whole
            patch.setattr(engine, "_deepspeed_config", cutting_all(engine._deepspeed_config))
        return engine.HybridTrainer(tower.to(device), head.to(device), config, STEPS)


def make_model(
    scale: float, restored: bool = False, class_rate: float = 1.0
) -> tuple[FrozenTower, ShardedMarginSoftmax]:
    torch.manual_seed(0)
    architecture = ModelConfig(dim=8, concepts=2, concept_dim=8, heads=2)
    towers = Towers(architecture, IMAGE_WIDTH, TEXT_WIDTH)
    if not restored:  # a checkpoint brings the features' mean itself
        towers.initialise(torch.randn(50, IMAGE_WIDTH) + 1)
    head = ShardedMarginSoftmax(architecture.dim, CLASSES, margin=0.2, scale=scale, rate=class_rate)
    head.reset(0)
    return FrozenTower(towers), head


def cutting_all(known: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def config(*given: Any) -> dict[str, Any]:
        found = known(*given)
        return {**found, "zero_optimization": {**found["zero_optimization"], "stage3_param_persistence_threshold": 0}}

    return config


def make_batch(rows: list[int]) -> Batch:
    rng = np.random.default_rng(1)
    photos = torch.from_numpy(rng.normal(size=(PHOTOS, IMAGE_WIDTH)).astype(np.float32))
    pictures = torch.from_numpy(rng.normal(size=(ITEMS, 3, IMAGE_WIDTH)).astype(np.float32))
    tokens = torch.from_numpy(rng.normal(size=(ITEMS, 4, TEXT_WIDTH)).astype(np.float32))
    token_mask = torch.from_numpy(rng.integers(0, 2, (ITEMS, 4)))
    token_mask[2] = 0
    has_image = torch.arange(ITEMS) != 5
    labels = torch.from_numpy(rng.integers(0, CLASSES, PHOTOS + ITEMS))
    targets = Targets.certain(labels, torch.from_numpy(rng.uniform(0.2, 1.0, PHOTOS + ITEMS).astype(np.float32)), 2)
    targets.classes[:PHOTOS, 1] = (labels[:PHOTOS] + 1) % CLASSES
    targets.evidence[:PHOTOS] = torch.from_numpy(rng.normal(0, 2, (PHOTOS, 2)).astype(np.float32))
    targets.others[:PHOTOS] = 0
    queries = torch.tensor([row for row in rows if row < PHOTOS], dtype=torch.int64)
    items = torch.tensor([row - PHOTOS for row in rows if row >= PHOTOS], dtype=torch.int64)
    order = torch.cat([queries, items + PHOTOS])
    return Batch(
        photos[queries], pictures[items], has_image[items], tokens[items], token_mask[items], targets[order],
    )  # fmt: skip


def part_of(step: int, world: int, rank: int) -> Batch:
    parts = PARTS[step]
    if world == 2:
        return make_batch(parts[rank])
    return make_batch([row for part in parts for row in part][rank::world])


def run_steps(trainer: Any, start: int, stop: int, world: int, rank: int) -> list[float]:
    device = trainer.head.weight.device
    return [trainer.step(part_of(step, world, rank).to(device)) for step in range(start, stop)]


def whole_state(trainer: Any, checkpoints: Checkpoints, steps: int, losses: list[float]) -> None:
    """Write a checkpoint the way the loop does."""
    towers = trainer.tower_state()
    checkpoints.write_classes(name_of(steps), trainer.head.owned, trainer.head_state())
    if dist.get_rank() == 0:
        checkpoints.write_towers(name_of(steps), towers)
    dist.barrier()
    if dist.get_rank() == 0:
        checkpoints.publish(name_of(steps), {"step": trainer.step_count, "losses": losses}, keep=9)
    dist.barrier()


def worker(rank: int, world: int, port: int, folder: str) -> None:
    """One process of `world`: every mode without a break, then this world's leg of the interrupted run."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    storage = open_storage(folder)
    linear = torch.nn.functional.linear
    for mode, settings in MODES.items():
        torch.nn.functional.linear = linear  # ZeRO 3 put its own in the place of torch's
        if world < 3:
            trainer = make_trainer(**settings)
            losses = run_steps(trainer, 0, STEPS, world, rank)
            whole_state(trainer, Checkpoints(storage, f"{mode}-whole-{world}"), STEPS, losses)
        if mode not in BROKEN_OFF:
            continue
        leg = {2: 0, 1: 1, 3: 2}[world]
        checkpoints = Checkpoints(storage, f"{mode}-broken")
        losses = []
        state = checkpoints.latest()
        trainer = make_trainer(**settings, restored=state is not None)
        if state:
            name, losses = state["name"], state["losses"]
            trainer.load_tower_state(checkpoints.read_towers(name), state["step"])
            trainer.load_head_state(checkpoints.read_classes(name, trainer.head.owned), state["step"])
        losses = losses + run_steps(trainer, [0, *STOPS][leg], STOPS[leg], world, rank)
        whole_state(trainer, checkpoints, STOPS[leg], losses)
        rows, head = weakref.ref(trainer.head.optimizer), weakref.ref(trainer.head)
        assert len(trainer.release()) == len(class_range(CLASSES, world, rank))
        gc.collect()
        assert rows() is head() is None, "the next stage needs their memory"
        if mode in ("zero0", "zero2"):
            diverge(make_trainer(**settings), part_of(0, world, rank))
    dist.destroy_process_group()


def diverge(trainer: Any, batch: Batch) -> None:
    """Every worker hears of a loss that is no number, and of towers that are none."""
    batch.photos[:], batch.pictures[:] = torch.nan, torch.nan
    with pytest.raises(TrainingError, match=r"step 0: the loss is nan; lower train\.tower_lr"):
        trainer.step(batch)
    next(iter(trainer.engine.module.parameters())).data.fill_(torch.inf)
    if trainer.config.zero_stage == 0:
        with pytest.raises(TrainingError, match="is not finite"):
            trainer.tower_state()


def gpu_worker(rank: int, world: int, port: int, folder: str) -> None:
    """One process of `world` with a GPU each: every mode without a break."""
    torch.cuda.set_device(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("nccl", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for mode, settings in MODES.items():
        trainer = make_trainer(**settings, device=f"cuda:{rank}")
        losses = run_steps(trainer, 0, STEPS, world, rank)
        whole_state(trainer, Checkpoints(open_storage(folder), f"{mode}-gpu"), STEPS, losses)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file: with 2 processes, then 1, then 3."""
    folder = tmp_path_factory.mktemp("runs")
    for world in (2, 1, 3):
        torch.multiprocessing.spawn(worker, (world, free_ports(1)[0], str(folder)), nprocs=world)
    return folder


def read(folder: Path, run: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the loss of each step and all towers, classes and moments at the end."""
    checkpoints = Checkpoints(open_storage(str(folder)), run)
    state = checkpoints.latest()
    assert state is not None
    assert state["step"] == STEPS
    pieces = [rows for _, rows in checkpoints.read_classes(name_of(STEPS), range(CLASSES))]
    classes = {f"classes.{name}": torch.cat([rows[name] for rows in pieces]) for name in pieces[0]}
    return state["losses"], checkpoints.read_towers(name_of(STEPS)) | classes


def assert_equal(found: tuple, wanted: tuple, tolerance: float) -> None:
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        if name.endswith("key.bias"):
            continue  # the softmax takes it out again: its gradient is rounding noise, which Adam makes large
        torch.testing.assert_close(
            found[1][name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "mode",
    ["zero0", "zero1", "zero2", "zero0-clipped", "zero2-clipped", "zero0-parts", "zero2-parts", "zero3", "zero3-parts"],
)
def test_two_processes_equal_one(runs: Path, mode: str) -> None:
    assert_equal(read(runs, f"{mode}-whole-2"), read(runs, f"{mode}-whole-1"), 1e-5)
    plain = "zero0-clipped" if "scale" in MODES[mode] else "zero0"
    assert_equal(read(runs, f"{mode}-whole-2"), read(runs, f"{plain}-whole-1"), 1e-5)


def plainly() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and weights of towers and classes that torch clips together, in this process."""
    tower, head = make_model(8.0)
    towers = {name: parameter for name, parameter in tower.named_parameters() if parameter.requires_grad}
    config = TrainConfig(**LEARNING)
    adam = torch.optim.AdamW(towers.values(), weight_decay=config.weight_decay)
    rows = RowAdam(head.weight, 0.0, config.weight_decay)
    held = head.optimizer = HeldGradients(rows)
    losses = []
    for step in range(STEPS):
        factor = learning_rate_factor(step, STEPS, config.warmup)
        adam.param_groups[0]["lr"], rows.lr = config.tower_lr * factor, config.classifier_lr * factor
        adam.zero_grad()
        batch = part_of(step, 1, 0)
        loss = head(tower(batch, branches=True), batch.targets_by_branch(config.branch_weight))
        loss.backward()
        stand_ins = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in held.gradients()]
        for stand_in, gradient in zip(stand_ins, held.gradients(), strict=True):
            stand_in.grad = gradient
        assert torch.nn.utils.clip_grad_norm_([*towers.values(), *stand_ins], 1.0) > 1
        adam.step()
        held.step()
        losses.append(float(loss.detach()))
    return losses, {name: value.detach() for name, value in towers.items()} | {"classes.weight": head.weight}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("mode", [f"zero{stage}-together" for stage in range(4)])
def test_towers_and_classes_are_clipped_together(runs: Path, mode: str, world: int) -> None:
    losses, weights = plainly()
    found = read(runs, f"{mode}-whole-{world}")
    assert_equal((found[0], {name: found[1][name] for name in weights}), (losses, weights), 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_one_or_two_gpus_equal_one_process(runs: Path, tmp_path: Path) -> None:
    world = min(2, torch.cuda.device_count())
    torch.multiprocessing.spawn(gpu_worker, (world, free_ports(1)[0], str(tmp_path)), nprocs=world)
    for mode, settings in MODES.items():
        tolerance = 0.05 if "precision" in settings else 1e-4
        assert_equal(read(tmp_path, f"{mode}-gpu"), read(runs, f"{mode}-whole-1"), tolerance)


@pytest.mark.parametrize("mode", ["zero0-drawn", "zero2-drawn-together"])
def test_two_processes_equal_one_that_draw_classes(runs: Path, mode: str) -> None:
    assert_equal(read(runs, f"{mode}-whole-2"), read(runs, f"{mode}-whole-1"), 5e-5)


@pytest.mark.parametrize(
    ("mode", "plain"),
    [("zero1-bf16", "zero0"), ("zero3-bf16", "zero0"), ("zero1-bf16-together", "zero0-together")],
)
def test_two_processes_equal_one_in_bf16(runs: Path, mode: str, plain: str) -> None:
    assert_equal(read(runs, f"{mode}-whole-2"), read(runs, f"{mode}-whole-1"), 0.05)
    np.testing.assert_allclose(read(runs, f"{mode}-whole-2")[0], read(runs, f"{plain}-whole-1")[0], rtol=0.05)


@pytest.mark.parametrize(("mode", "tolerance"), BROKEN_OFF.items())
def test_two_then_one_then_three_processes_equal_an_unbroken_run(runs: Path, mode: str, tolerance: float) -> None:
    assert_equal(read(runs, f"{mode}-broken"), read(runs, f"{mode}-whole-1"), tolerance)


def test_the_run_learns_every_parameter(runs: Path) -> None:
    _, state = read(runs, "zero0-whole-1")
    unmoved = [name for name, value in state.items() if name.startswith("exp_avg_sq:") and not value.any()]
    assert unmoved == [], "no gradient reached these"
