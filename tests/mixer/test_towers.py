"""Queries and items to unit embeddings, with any transformers encoders by path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixer.config import ModelConfig
from mixer.towers import MixerModel, Towers

TEXTS = ["red apples", None, "milk", "fresh small sweet pear . green", None]
HAS_IMAGE = [True, True, False, True, False]  # the last has neither: it must not spoil the others
EXACT = {"rtol": 1e-4, "atol": 1e-5}

Make = Callable[[ModelConfig], MixerModel]


def pixels(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def embed_items(model: MixerModel, pictures: Tensor, has_image: list[bool], texts: list[str | None]) -> Tensor:
    token_ids, token_mask = (torch.from_numpy(array) for array in model.text_encoder.tokenizer(texts))
    return model.embed_items(pictures, torch.tensor(has_image), token_ids, token_mask)


@torch.no_grad()
def test_items_in_one_batch_equal_items_one_by_one(tiny_model: MixerModel) -> None:
    pictures = pixels(len(TEXTS))
    together = embed_items(tiny_model, pictures, HAS_IMAGE, TEXTS)
    for row in range(len(TEXTS)):
        alone = embed_items(tiny_model, pictures[row : row + 1], HAS_IMAGE[row : row + 1], TEXTS[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, **EXACT)
    torch.testing.assert_close(together.norm(dim=1), torch.tensor([1.0, 1, 1, 1, 0]))  # nothing is like nothing
    assert (together @ together.T - torch.eye(len(TEXTS))).max() < 0.999  # and all differ


@torch.no_grad()
def test_queries_in_one_batch_equal_queries_one_by_one(tiny_model: MixerModel) -> None:
    pictures = pixels(4)
    together = tiny_model.embed_queries(pictures)
    torch.testing.assert_close(together, torch.cat([tiny_model.embed_queries(row[None]) for row in pictures]), **EXACT)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@torch.no_grad()
def test_what_stands_for_a_missing_image_or_text_does_not_matter(tiny_model: MixerModel) -> None:
    pictures = pixels(len(TEXTS))
    expected = embed_items(tiny_model, pictures, HAS_IMAGE, TEXTS)
    blank = pictures * torch.tensor(HAS_IMAGE)[:, None, None, None]
    torch.testing.assert_close(embed_items(tiny_model, blank, HAS_IMAGE, TEXTS), expected, **EXACT)
    other = embed_items(tiny_model, pixels(len(TEXTS), seed=9), HAS_IMAGE, TEXTS)
    missing = ~torch.tensor(HAS_IMAGE)
    torch.testing.assert_close(other[missing], expected[missing], **EXACT)
    assert not torch.isclose(other[~missing], expected[~missing], atol=1e-3).all(dim=1).any()


@torch.no_grad()
def test_padding_of_tokens_has_no_effect(tiny_model: MixerModel) -> None:
    pictures, present = pixels(2), torch.tensor([True, False])
    ids, mask = (torch.from_numpy(array) for array in tiny_model.text_encoder.tokenizer(["red apple", "milk"]))
    expected = tiny_model.embed_items(pictures, present, ids, mask)
    ids = torch.cat([ids, torch.full((2, 3), 7)], dim=1)  # not even if the padding were words
    mask = torch.cat([mask, torch.zeros(2, 3, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(tiny_model.embed_items(pictures, present, ids, mask), expected, **EXACT)


@torch.no_grad()
def test_the_towers_are_what_they_say(tiny_model: MixerModel) -> None:
    towers, pictures = tiny_model.towers, pixels(3)
    patches = tiny_model.image_encoder(pictures)
    plain = (patches.mean(dim=1) - towers.feature_mean) / towers.feature_std
    queries = towers.query_transform(plain)
    torch.testing.assert_close(tiny_model.embed_queries(pictures), queries / queries.norm(dim=1, keepdim=True))

    ids, mask = torch.tensor([[2, 5, 3]] * 3), torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 1]])
    seen = (patches - towers.feature_mean) / towers.feature_std
    said, shares, _ = towers.concepts(tiny_model.text_encoder(ids, mask), mask, seen)
    whole = towers.item_transform(plain)
    part = towers.item_transform(torch.einsum("nkp,npd->nkd", shares, seen).mean(dim=1))
    whole, part = (each / each.norm(dim=1, keepdim=True) for each in (whole, part))
    says, shows = towers.log_gates.exp()
    both = whole[0] + says * said[0] + shows * part[0]
    expected = torch.stack([both / both.norm(), whole[1], said[2]])
    found = tiny_model.embed_items(pictures, torch.tensor([True, True, False]), ids, mask)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_pooling_first_takes_the_cls_token(tiny_model: MixerModel, tiny_config: ModelConfig) -> None:
    first = MixerModel(tiny_config.model_copy(update={"pooling": "first"})).eval()
    first.load_state_dict(tiny_model.state_dict())
    patches = first.image_encoder(pixels(2))
    torch.testing.assert_close(first.embed_queries(pixels(2)), first.towers.query(patches[:, 0]))
    assert not torch.allclose(first.embed_queries(pixels(2)), tiny_model.embed_queries(pixels(2)), atol=1e-3)


def test_both_transformations_begin_as_one(tiny_config: ModelConfig) -> None:
    towers = Towers(tiny_config, 16, 24)
    assert torch.equal(towers.query_transform.weight, towers.item_transform.weight)
    assert towers.query_transform.weight is not towers.item_transform.weight


def test_features_are_centred_and_scaled_as_one(tiny_config: ModelConfig) -> None:
    towers = Towers(tiny_config, 16, 24)
    pooled = torch.randn(500, 16) * torch.linspace(0.1, 5, 16) + 3
    towers.initialise(pooled)
    plain = (pooled - towers.feature_mean) / towers.feature_std
    torch.testing.assert_close(plain.mean(dim=0), torch.zeros(16), rtol=0, atol=1e-5)
    assert plain.square().mean() == pytest.approx(1.0, rel=1e-4)
    assert plain.std(dim=0).max() / plain.std(dim=0).min() > 10  # rare features stay quiet


def test_transformations_begin_halfway_to_whitening(tiny_config: ModelConfig) -> None:
    towers = Towers(tiny_config, 16, 24)
    turn = torch.linalg.qr(torch.randn(16, 16))[0]
    pooled = torch.randn(16_000, 16) * torch.linspace(2, 1, 16) @ turn
    towers.initialise(pooled)
    assert torch.equal(towers.query_transform.weight, towers.initial_weight)
    assert torch.equal(towers.item_transform.weight, towers.initial_weight)
    found = towers.query_transform(towers.standardised(pooled)).detach()
    covariance = found.T @ found / len(found)
    torch.testing.assert_close(covariance, covariance.diagonal().diag(), rtol=0, atol=1e-3)
    deviations = torch.linspace(2, 1, 16)[: tiny_config.dim]
    ratios = covariance.diagonal() / deviations  # a variance comes out as a deviation
    torch.testing.assert_close(ratios / ratios.mean(), torch.ones(tiny_config.dim), rtol=0.03, atol=0)
    assert found.square().mean() == pytest.approx(1 / 3, rel=1e-2)


def test_components_that_hardly_vary_are_not_made_loud(tiny_config: ModelConfig) -> None:
    towers = Towers(tiny_config.model_copy(update={"dim": 16}), 16, 24)
    towers.initialise(torch.randn(5000, 16) * torch.linspace(1, 1e-4, 16) ** 4)
    gains = towers.initial_weight.norm(dim=1)
    assert gains.max() / gains.min() == pytest.approx((16 / 2 / 0.1) ** 0.25, rel=0.3)


def test_broken_features_leave_it_to_training_to_say_so(tiny_config: ModelConfig) -> None:
    towers = Towers(tiny_config, 16, 24)
    before = towers.query_transform.weight.clone()
    towers.initialise(torch.tensor([[torch.inf] * 16, [0.0] * 16]))
    assert torch.equal(towers.query_transform.weight, before)


def test_there_may_be_fewer_components_than_dimensions(tiny_config: ModelConfig) -> None:
    towers = Towers(tiny_config.model_copy(update={"dim": 24}), 16, 24)
    towers.initialise(torch.randn(50, 16))
    assert towers.initial_weight[:16].any(dim=1).all()
    assert not towers.initial_weight[16:].any()


@pytest.mark.parametrize("shared", [False, True])
def test_what_was_learned_is_interpolated_with_the_start(tiny_config: ModelConfig, shared: bool) -> None:
    towers = Towers(tiny_config, 16, 24)
    towers.initialise(torch.randn(50, 16))
    if shared:
        towers.item_transform = towers.query_transform
    with torch.no_grad():
        towers.query_transform.weight += 1
        towers.item_transform.bias += 2
    item = towers.item_transform.weight.clone()
    towers.interpolate(1.0)
    torch.testing.assert_close(towers.item_transform.weight, item, **EXACT)
    for share in (0.5, 0.75):  # of what was learned, not of what is left of it
        towers.interpolate(share)
        torch.testing.assert_close(towers.query_transform.weight, towers.initial_weight + share)
        torch.testing.assert_close(towers.item_transform.bias, torch.full((tiny_config.dim,), 2 * share))


@pytest.mark.parametrize("pooled", [torch.ones(1, 16), torch.ones(5, 16)])
def test_features_that_do_not_vary_give_finite_embeddings(tiny_config: ModelConfig, pooled: Tensor) -> None:
    towers = Towers(tiny_config, 16, 24)
    towers.initialise(pooled)
    assert towers.query(pooled).isfinite().all()


def test_the_gradient_reaches_concepts_and_transformation(tiny_model: MixerModel) -> None:
    embeddings = embed_items(tiny_model, pixels(len(TEXTS)), HAS_IMAGE, TEXTS)
    (embeddings * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    for name in ("concepts.slots", "concepts.look.weight", "item_transform.weight", "log_gates"):
        gradient = tiny_model.towers.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.abs().max() > 1e-5, name
    assert tiny_model.towers.query_transform.weight.grad is None
    assert all(parameter.grad is None for parameter in tiny_model.text_encoder.parameters())


def test_a_broken_feature_of_a_missing_image_spoils_no_gradient(tiny_config: ModelConfig) -> None:
    towers = Towers(tiny_config, 16, 24)
    patches = torch.randn(2, 9, 16)
    patches[1] = torch.nan
    embeddings = towers.item(patches, torch.tensor([True, False]), torch.randn(2, 3, 24), torch.ones(2, 3).long())
    embeddings[:, 0].sum().backward()
    assert embeddings.isfinite().all()
    for name, parameter in towers.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("block", [None, 1, 0])
def test_fine_tuning_trains_the_encoder_from_a_block_on(tiny_config: ModelConfig, make_tiny_model: Make, block) -> None:
    model = make_tiny_model(tiny_config)
    model.image_encoder.train_from(block)
    blocks = model.image_encoder.blocks
    trained = {id(p) for b in (blocks[block:] if block is not None else []) for p in b.parameters()}
    assert {id(p) for p in model.image_encoder.parameters() if p.requires_grad} == trained
    assert all(parameter.requires_grad for parameter in model.towers.parameters())
    assert not any(parameter.requires_grad for parameter in model.text_encoder.parameters())
    model.embed_queries(pixels(2))[:, 0].sum().backward()
    moved = {id(p) for p in model.image_encoder.parameters() if p.grad is not None and p.grad.any()}
    assert moved <= trained
    assert bool(moved) == bool(trained)


@torch.no_grad()
def test_what_is_saved_is_read_back(tiny_config: ModelConfig, make_tiny_model: Make, tmp_path: Path) -> None:
    model = make_tiny_model(tiny_config)
    for parameter in model.image_encoder.parameters():
        parameter.mul_(1.1)  # as training would: the weights of the named encoder are not enough
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "tokenizer"}
    read = MixerModel.from_pretrained(tmp_path / "model")
    assert read.config == model.config
    assert not read.training
    assert {k: p.requires_grad for k, p in read.named_parameters()} == {
        k: p.requires_grad for k, p in model.named_parameters()
    }
    assert torch.equal(read.embed_queries(pixels(3)), model.embed_queries(pixels(3)))
    expected = embed_items(model, pixels(len(TEXTS)), HAS_IMAGE, TEXTS)
    assert torch.equal(embed_items(read, pixels(len(TEXTS)), HAS_IMAGE, TEXTS), expected)


@pytest.fixture
def saved(tiny_model: MixerModel, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_weights_of_another_size_are_refused(saved: Path) -> None:
    edit_config(saved, dim=13)
    with pytest.raises(ValueError, match=r"model: the weights do not fit config\.json.*query_transform|size mismatch"):
        MixerModel.from_pretrained(saved)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_with_other_names_are_refused(saved: Path, change: str) -> None:
    weights = load_file(saved / "model.safetensors")
    if change == "missing":
        del weights["towers.item_transform.bias"]
    else:
        weights["towers.more"] = torch.zeros(1)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"towers\.(more|item_transform)"):
        MixerModel.from_pretrained(saved)


def test_half_a_file_of_weights_is_refused(saved: Path) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="the weights do not fit"):
        MixerModel.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        MixerModel.from_pretrained(saved)


def test_an_unknown_key_in_config_is_refused(saved: Path) -> None:
    edit_config(saved, dims=12)
    with pytest.raises(ValueError, match="dims"):
        MixerModel.from_pretrained(saved)
