"""The ONNX graphs give what the model gives, for batches and texts of other sizes than were traced."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from mixer.config import ModelConfig
from mixer.embedder import ImageFeatures, TextFeatures
from mixer.export import export_encoders, export_model
from mixer.towers import MixerModel

TEXTS = ["red apples", None, "milk", "fresh small sweet pear . green", None, "blue"]
HAS_IMAGE = [True, True, False, True, False, False]
EXACT = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def exported(tiny_config: ModelConfig, make_tiny_model, tmp_path_factory) -> tuple[MixerModel, Path]:
    model, folder = make_tiny_model(tiny_config), tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder)
    export_model(model, folder)
    export_encoders(model, folder / "encoders")
    return model, folder


def pixels(n: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def run(path: Path, **inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(output)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 7])
def test_queries(exported: tuple[MixerModel, Path], n: int) -> None:
    model, folder = exported
    found = run(folder / "query.onnx", pixels=pixels(n))
    torch.testing.assert_close(found, model.embed_queries(pixels(n)), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[0], [1], [2], [4], [0, 2], [1, 4], [2, 5, 3], list(range(6))], ids=str)
def test_items_with_missing_texts_and_images(exported: tuple[MixerModel, Path], rows: list[int]) -> None:
    model, folder = exported
    ids, mask = model.text_encoder.tokenizer([TEXTS[row] for row in rows])
    inputs = {
        "pixels": pixels(6)[rows],
        "has_image": torch.tensor(HAS_IMAGE)[rows],
        "token_ids": torch.from_numpy(ids),
        "token_mask": torch.from_numpy(mask),
    }
    torch.testing.assert_close(run(folder / "item.onnx", **inputs), model.embed_items(**inputs), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_items_with_texts_of_any_length(exported: tuple[MixerModel, Path], tokens: int) -> None:
    model, folder = exported
    mask = torch.ones(3, tokens, dtype=torch.int64)
    mask[1, tokens // 2 :] = 0
    inputs = {
        "pixels": pixels(3),
        "has_image": torch.tensor([True, True, False]),
        "token_ids": torch.randint(5, 15, (3, tokens), generator=torch.Generator().manual_seed(1)),
        "token_mask": mask,
    }
    torch.testing.assert_close(run(folder / "item.onnx", **inputs), model.embed_items(**inputs), **EXACT)


@torch.no_grad()
def test_the_bare_encoders(exported: tuple[MixerModel, Path]) -> None:
    model, folder = exported
    images, texts = ImageFeatures(folder / "encoders"), TextFeatures(folder / "encoders")
    assert images.preprocess == model.image_encoder.preprocess
    assert images.dim == model.image_encoder.width
    for n in (1, 5):
        patches = torch.from_numpy(images(pixels(n).numpy()))
        torch.testing.assert_close(patches, model.image_encoder(pixels(n)), **EXACT)
    for some in (TEXTS, TEXTS[:1], [None]):
        tokens, mask = texts(some)
        ids, expected_mask = model.text_encoder.tokenizer(some)
        assert np.array_equal(mask, expected_mask)
        expected = model.text_encoder(torch.from_numpy(ids), torch.from_numpy(mask))
        torch.testing.assert_close(torch.from_numpy(tokens), expected, **EXACT)


def test_settings_say_what_inference_needs(exported: tuple[MixerModel, Path]) -> None:
    _, folder = exported
    assert json.loads((folder / "embedder.json").read_text()) == {
        "preprocess": {"size": 32, "resize": 32},
        "dim": 12,
        "max_tokens": 8,
    }


def test_exporting_leaves_the_model_as_it_was(tiny_model: MixerModel, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in tiny_model.parameters()]
    export_encoders(tiny_model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert [parameter.requires_grad for parameter in tiny_model.parameters()] == trained
