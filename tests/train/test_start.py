"""Which classes go on from an earlier model, and with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from mixer.config import ModelConfig
from mixer.towers import MixerModel
from mixer_platform.config import TrainConfig
from mixer_platform.errors import ConfigError
from mixer_platform.storage import open_storage
from mixer_platform.train.job import interpolation_of
from mixer_platform.train.start import NEW, kept_classes, read_rows, starting_model, sums_by_class


def classes(*members: str) -> pa.Table:
    """Each word is a class, each letter an item of it."""
    return pa.table({"class_id": range(len(members)), "item_ids": [list(word) for word in members]})


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        (["ab", "cd", "e"], ["e", "ab", "cd"], [2, 0, 1]),
        (["ab", "cd"], ["abx", "y", "cd"], [0, NEW, 1]),
        (["abc", "d"], ["d"], [1]),
        (["abcde", "f"], ["ab", "cde", "f"], [NEW, 0, 1]),  # split: the larger part
        (["abcd"], ["ab", "cd"], [0, NEW]),  # into equal parts: the first
        (["ab", "cde"], ["abcde"], [1]),  # merged: the larger one
        (["ab", "cd"], ["ac", "bd"], [0, 1]),  # mixed up
        (["abc", "d"], ["ab", "cd"], [0, 1]),  # its second choice is free
        (["ab"], ["x", "y"], [NEW, NEW]),
    ],
)
def test_a_class_goes_on_from_the_one_that_held_its_items(before: list[str], now: list[str], kept: list[int]) -> None:
    assert kept_classes(classes(*before), classes(*now), len(now)).tolist() == kept


def test_most_of_many_classes_are_found_again() -> None:
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 300, 3000)
    order = rng.permutation(300)
    before, now = (
        pa.table(
            {"class_id": range(300), "item_ids": [np.flatnonzero(of == n).astype(str).tolist() for n in range(300)]}
        )
        for of in (owner, np.where(rng.random(3000) < 0.1, rng.integers(0, 300, 3000), order[owner]))
    )
    kept = kept_classes(before, now, 300)
    assert (kept[order] == np.arange(300)).mean() > 0.99
    assert len(set(kept[kept != NEW])) == (kept != NEW).sum()


def test_rows_are_read_by_class_from_however_many_files(tmp_path: Path) -> None:
    storage, rows = open_storage(str(tmp_path)), torch.randn(10, 3)
    for first, end in ((0, 4), (4, 5), (5, 10)):
        content = save({"weight": rows[first:end].clone(), "exp_avg": torch.zeros(end - first, 3)})
        storage.write(f"models/m/classifier/{first:012d}-{end:012d}.safetensors", content)
    wanted = np.array([9, NEW, 0, 4, NEW])
    found = read_rows(storage, "m", wanted)
    assert torch.equal(found[wanted != NEW], rows[wanted[wanted != NEW]])
    assert not found[wanted == NEW].any()
    assert read_rows(storage, "m", np.array([], np.int64)).shape == (0, 3)


def test_samples_are_summed_by_class() -> None:
    embeddings = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8], [-1, 0]])
    rows = sums_by_class(embeddings, torch.tensor([5, 5, 2, 9]), np.array([2, 5, 7]))
    assert sums_by_class(embeddings, torch.tensor([5, 5, 2, 9]), np.array([], np.int64)).shape == (0, 2)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [1, 1], [0, 0]], atol=1e-6)


def test_a_model_that_does_not_fit_is_named(tmp_path: Path, architecture: ModelConfig) -> None:
    state = saved(tmp_path, MixerModel(architecture))
    del state["towers.item_transform.bias"]
    save_file(state, tmp_path / "models/old/model.safetensors")
    message = (
        r"^train\.start: model old: the weights do not fit config\.json: .*item_transform\.bias.*; start from none"
    )
    with pytest.raises(ConfigError, match=message):
        starting_model(open_storage(str(tmp_path)), "old", architecture)


def test_a_run_starts_from_all_that_a_model_has_learned(tmp_path: Path, architecture: ModelConfig) -> None:
    model = MixerModel(architecture)
    torch.nn.init.normal_(model.towers.query_transform.weight)
    learned = model.towers.query_transform.weight.detach().clone()
    model.towers.interpolate(0.5)
    saved(tmp_path, model)
    found = starting_model(open_storage(str(tmp_path)), "old", architecture).towers
    torch.testing.assert_close(found.query_transform.weight, learned)
    assert found.interpolation == 1


def test_a_model_of_before_interpolation_has_all_that_it_learned(tmp_path: Path, architecture: ModelConfig) -> None:
    state = saved(tmp_path, MixerModel(architecture))
    older = {name: value for name, value in state.items() if not name.endswith(("initial_weight", "interpolation"))}
    save_file(older, tmp_path / "models/old/model.safetensors")
    found = starting_model(open_storage(str(tmp_path)), "old", architecture).towers
    assert torch.equal(found.query_transform.weight, state["towers.query_transform.weight"])


def saved(workspace: Path, model: MixerModel) -> dict[str, torch.Tensor]:
    folder = workspace / "models/old"
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("epochs", "start", "share"),
    [
        (0, None, 0.8),
        (8, None, 1.0),
        (0, {"interpolation": 0.8}, 0.8),
        (0, {"interpolation": 1.0}, 1.0),  # its encoder was fine-tuned
        (0, {}, 1.0),  # of before there was any
        (8, {"interpolation": 0.8}, 1.0),
        (0, {"interpolation": 1.0, "fine_tuned": False}, 0.8),  # it was asked for
        (0, {"interpolation": 1.0, "fine_tuned": True}, 1.0),
    ],
)
def test_a_fine_tuned_model_keeps_all_it_learned(epochs: int, start: dict[str, Any] | None, share: float) -> None:
    config = TrainConfig.model_validate({"fine_tune": {"epochs": epochs}, "interpolation": 0.8})
    assert interpolation_of(config, start) == share
