"""Photos and items in, unit embeddings out, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from mixer.config import ModelConfig
from mixer.embedder import DeviceError, ItemEmbedder, QueryEmbedder, item_text
from mixer.export import export_model
from mixer.towers import MixerModel

GPU = torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.fixture(scope="module")
def exported(tiny_config: ModelConfig, make_tiny_model, tmp_path_factory) -> tuple[MixerModel, Path]:
    model, folder = make_tiny_model(tiny_config), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    export_model(model, folder)
    return model, folder


def picture(seed: int, width: int = 60, height: int = 45) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@torch.no_grad()
def test_items_are_preprocessed_tokenized_and_embedded(exported: tuple[MixerModel, Path]) -> None:
    model, folder = exported
    embedder = ItemEmbedder(folder)
    pictures = [picture(0), None, picture(1, 45, 100), picture(2)]
    texts = ["red apples", "fresh milk", None, ""]
    prepared = [each and embedder.preprocess(each) for each in pictures]
    found = embedder(prepared, texts)
    assert found.dtype == np.float32
    assert found.shape == (4, embedder.dim) == (4, 12)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0, abs=1e-5)

    blank = Image.new("RGB", (32, 32))
    pixels = np.stack([model.image_encoder.preprocess(each or blank) for each in pictures])
    ids, mask = (torch.from_numpy(array) for array in model.text_encoder.tokenizer(texts))
    present = torch.tensor([True, False, True, True])
    expected = model.embed_items(torch.from_numpy(pixels), present, ids, mask)
    assert found == pytest.approx(expected.numpy(), abs=1e-4)
    for row in range(4):  # however they are batched
        assert embedder(prepared[row : row + 1], texts[row : row + 1])[0] == pytest.approx(found[row], abs=1e-4)


def test_inference_needs_neither_torch_nor_transformers_nor_ray(
    exported: tuple[MixerModel, Path], tmp_path: Path
) -> None:
    model, folder = exported
    program = f"""
import io, sys
import numpy as np
from mixer.embedder import ItemEmbedder, QueryEmbedder
from mixer.images import decode
embedder = QueryEmbedder({str(folder)!r}, threads=1)
pixels = np.stack([embedder.preprocess(decode(open({str(tmp_path)!r} + f"/{{n}}.png", "rb").read())) for n in range(3)])
np.save({str(tmp_path / "found.npy")!r}, embedder(pixels))
ItemEmbedder({str(folder)!r})([pixels[0]], ["red apples"])
print(sorted({{"torch", "transformers", "ray"}} & {{name.split(".")[0] for name in sys.modules}}))
"""
    pictures = [picture(seed, 50 + 9 * seed) for seed in range(3)]
    for seed, each in enumerate(pictures):
        each.save(tmp_path / f"{seed}.png")
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "[]\n", run.stderr
    pixels = torch.from_numpy(np.stack([model.image_encoder.preprocess(each) for each in pictures]))
    with torch.no_grad():
        expected = model.embed_queries(pixels).numpy()
    assert np.load(tmp_path / "found.npy") == pytest.approx(expected, abs=1e-4)


def test_the_number_of_threads_changes_nothing(exported: tuple[MixerModel, Path]) -> None:
    pixels = np.stack([np.asarray(picture(seed, 32, 32)) for seed in range(3)])
    one, two = (QueryEmbedder(exported[1], threads)(pixels) for threads in (1, 2))
    assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.skipif(GPU, reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_not_there_is_an_error(exported: tuple[MixerModel, Path], device: Any) -> None:
    """And not, as onnxruntime has it, a slow CPU."""
    said = rf"^this onnxruntime is not made for {device}; install|^onnxruntime cannot |tensorrt is not inst"
    for embedder in (QueryEmbedder, ItemEmbedder):
        with pytest.raises(DeviceError, match=said) as error:
            embedder(exported[1], device=device)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not GPU, reason="needs onnxruntime-gpu and a GPU")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_gpu_embeds_as_a_cpu_does(exported: tuple[MixerModel, Path], device: Any) -> None:
    if device == "tensorrt":
        pytest.importorskip("tensorrt")
    pixels = np.stack([np.asarray(picture(seed, 32, 32)) for seed in range(5)])
    wanted = QueryEmbedder(exported[1])(pixels)
    embedder = QueryEmbedder(exported[1], device=device)
    for count in (1, 5, 2):
        assert embedder(pixels[:count]) == pytest.approx(wanted[:count], abs=5e-3)  # TF32 has 10 bits
    items = ItemEmbedder(exported[1], device=device)(list(pixels), ["red apples"] * 5)
    assert items == pytest.approx(ItemEmbedder(exported[1])(list(pixels), ["red apples"] * 5), abs=5e-3)


@pytest.mark.parametrize(
    ("title", "description", "text"),
    [
        ("Apple", "Red and sweet.", "Apple. Red and sweet."),
        (" Apple ", None, "Apple"),
        (None, " Red ", "Red"),
        ("", "  ", None),
        (None, None, None),
    ],
)
def test_item_text(title: str | None, description: str | None, text: str | None) -> None:
    assert item_text(title, description) == text
