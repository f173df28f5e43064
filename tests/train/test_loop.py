"""The pure parts of the training loop."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixer.targets import Targets, concatenate
from mixer_platform.train.loop import held_out_recall
from mixer_platform.train.stages import split_holdout


@pytest.mark.parametrize("share", [0.0, 0.1, 0.49])
def test_only_photos_are_held_out_and_sure_ones(share: float) -> None:
    evidence = torch.linspace(0, 9, 50)[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    photos = Targets(torch.zeros(50, 1, dtype=torch.int64), evidence[:, None], torch.zeros(50), torch.ones(50))
    targets = concatenate([photos, Targets.certain(torch.zeros(30, dtype=torch.int64))])
    rows, held_out = split_holdout(targets, photos=50, classes=4, share=share, seed=3)
    assert len(held_out) == int(share * 50)
    assert (held_out < 50).all()
    assert sorted([*rows, *held_out]) == list(range(80))
    if share == 0.1:
        assert evidence[held_out].min() > evidence.mean()
    again, _ = split_holdout(targets, 50, 4, share, 3)
    assert (rows == again).all()


def test_held_out_recall_counts_photos_whose_nearest_item_has_their_label() -> None:
    embeddings = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [1, 0], [0, 1]]))
    samples = SimpleNamespace(photos=[0, 1, 2], labels=torch.tensor([7, 8, 8, 7, 8]))  # rows 3 and 4 are the items
    samples.batch = lambda rows, plan: SimpleNamespace(to=lambda device: torch.from_numpy(rows))
    head = SimpleNamespace(world=1, rank=0, group=None)
    config = SimpleNamespace(micro_batch=None)
    trainer = SimpleNamespace(engine=lambda rows: embeddings[rows], head=head, config=config)
    found = held_out_recall(trainer, samples, np.array([0, 1, 2]), 2, torch.device("cpu"))  # type: ignore[arg-type]
    assert found == pytest.approx(2 / 3, abs=1e-4)
