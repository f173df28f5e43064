"""ZeRO 3 with an image encoder that learns: parameters are gathered as modules are called, by all workers at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from mixer.config import ModelConfig
from mixer.softmax import ShardedMarginSoftmax
from mixer.targets import Targets
from mixer.towers import MixerModel
from mixer.training import Batch, WholeModel
from mixer_platform.config import TrainConfig
from mixer_platform.loopback import free_ports
from tests.train.test_engine import cutting_all

# Photos and items of each worker of two in each step: uneven, without one kind, without any.
PARTS: list[list[tuple[list[int], list[int]]]] = [
    [([0, 1], [4]), ([2], [5, 6])],
    [([0, 1, 2], []), ([3], [7])],
    [([], [4, 5, 6]), ([1], [])],
    [([0], [4]), ([], [])],
]


def make_batch(photos: list[int], items: list[int]) -> Batch:
    rng = np.random.default_rng(1)
    pixels = torch.from_numpy(rng.integers(0, 256, (8, 32, 32, 3), np.uint8))
    tokens = torch.from_numpy(rng.integers(5, 12, (8, 6)))
    labels = torch.arange(8) % 3
    queries, listed = (torch.tensor(rows, dtype=torch.int64) for rows in (photos, items))
    return Batch(
        photos=pixels[queries],
        pictures=pixels[listed],
        has_image=torch.ones(len(listed), dtype=torch.bool),
        tokens=tokens[listed],
        token_mask=torch.ones(len(listed), 6, dtype=torch.int64),
        targets=Targets.certain(labels[torch.cat([queries, listed])]),
    )


def worker(rank: int, world: int, port: int, folder: str, architecture: ModelConfig, settings: dict[str, Any]) -> None:
    from mixer_platform.train import engine

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    if settings["zero_stage"] == 3:
        engine._deepspeed_config = cutting_all(engine._deepspeed_config)
    torch.manual_seed(0)
    model = MixerModel(architecture)
    model.image_encoder.train_from(1)
    if world == 2:
        model.image_encoder.checkpoint_activations()
    head = ShardedMarginSoftmax(architecture.dim, 3, margin=0.2, scale=4.0)
    head.reset(0)
    config = TrainConfig.model_validate({"batch_size": 8, "fine_tune": {"encoder_lr": 0.02}, **settings})
    trainer = engine.HybridTrainer(WholeModel(model), head, config, len(PARTS))
    before = trainer.trained_state()
    losses = []
    for parts in PARTS:
        (photos, items), (more_photos, more_items) = parts
        whole = photos + more_photos, items + more_items
        losses.append(trainer.step(make_batch(*(whole if world == 1 else parts[rank]))))
        with torch.no_grad():  # as when recall is followed: one worker has nothing to embed
            trainer.engine(make_batch([], [4] if rank == 0 else []))
    found = {"losses": losses, "before": before, "state": trainer.trained_state(), "classes": head.weight[:1]}
    if rank == 0:
        torch.save(found, folder)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_two_workers_with_all_of_an_encoder_cut_equal_one_that_has_it_whole(
    tmp_path: Path, architecture: ModelConfig, micro_batch: int | None
) -> None:
    runs = {1: {"zero_stage": 0}, 2: {"zero_stage": 3, "micro_batch": micro_batch}}
    for world, settings in runs.items():
        arguments = (world, free_ports(1)[0], str(tmp_path / f"{world}.pt"), architecture, settings)
        torch.multiprocessing.spawn(worker, arguments, nprocs=world)
    whole, cut = (torch.load(tmp_path / f"{world}.pt") for world in runs)
    np.testing.assert_allclose(cut["losses"], whole["losses"], atol=1e-4)
    assert cut["state"].keys() == whole["state"].keys()
    torch.testing.assert_close(cut["classes"], whole["classes"], atol=1e-3, rtol=0)
    for name, value in whole["state"].items():
        if not name.endswith("key.bias"):  # no gradient but rounding noise
            torch.testing.assert_close(cut["state"][name], value, atol=1e-3, rtol=0, msg=name)
    moved = [name for name, value in cut["before"].items() if (cut["state"][name] - value).abs().max() > 0.01]
    assert any(name.startswith("image_encoder.") for name in moved)
