"""Embeddings and gradients of a batch, with or without photos, items, texts or pictures."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from mixer.config import ModelConfig
from mixer.targets import Targets
from mixer.towers import MixerModel, Towers
from mixer.training import Batch, FrozenTower, WholeModel

PATCHES, IMAGE_WIDTH, TEXT_WIDTH, TOKENS, SIDE = 17, 16, 24, 5, 32


def make_batch(photos: int, items: int, pixels: bool, seed: int = 0) -> Batch:
    """Return a batch in which every second item lacks its picture and every third its text."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(items, TOKENS, dtype=torch.int64)
    mask[::3] = 0

    def pictures(n: int) -> Tensor:
        return torch.randint(0, 256, (n, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)

    return Batch(
        photos=pictures(photos) if pixels else torch.randn(photos, IMAGE_WIDTH, generator=generator).half(),
        pictures=pictures(items) if pixels else torch.randn(items, PATCHES, IMAGE_WIDTH, generator=generator).half(),
        has_image=torch.arange(items) % 2 == 0,
        tokens=torch.randint(5, 15, (items, TOKENS), generator=generator)
        if pixels
        else torch.randn(items, TOKENS, TEXT_WIDTH, generator=generator).half(),
        token_mask=mask,
        targets=Targets.certain(torch.zeros(photos + items, dtype=torch.int64)),
    )


@pytest.fixture(params=["frozen", "whole"])
def tower(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "frozen":
        return FrozenTower(Towers(tiny_config, IMAGE_WIDTH, TEXT_WIDTH))
    model = MixerModel(tiny_config)
    model.image_encoder.train_from(1)
    return WholeModel(model)


def batch_for(tower: nn.Module, photos: int, items: int) -> Batch:
    return make_batch(photos, items, pixels=isinstance(tower, WholeModel))


@torch.no_grad()
def test_photos_come_first_and_parts_do_not_mix(tower: nn.Module) -> None:
    batch = batch_for(tower, 3, 4)
    found = tower(batch)
    assert found.dtype == torch.float32
    known = batch.has_image | batch.token_mask.any(dim=1)
    torch.testing.assert_close(found.norm(dim=1), torch.cat([torch.ones(3), known.float()]))
    nothing = slice(0, 0)
    of_items = ("pictures", "has_image", "tokens", "token_mask")
    parts = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    only_photos = Batch(**{name: value[nothing] if name in of_items else value for name, value in parts.items()})
    only_items = Batch(**{name: value[nothing] if name == "photos" else value for name, value in parts.items()})
    torch.testing.assert_close(tower(only_photos), found[:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tower(only_items), found[3:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_they_equal_the_models_own_embeddings(tiny_model: MixerModel) -> None:
    batch = make_batch(3, 4, pixels=True)
    queries = tiny_model.embed_queries(batch.photos)
    items = tiny_model.embed_items(batch.pictures, batch.has_image, batch.tokens, batch.token_mask)
    expected = torch.cat([queries, items])
    torch.testing.assert_close(WholeModel(tiny_model)(batch), expected, rtol=1e-4, atol=1e-5)

    patches = tiny_model.image_encoder(torch.cat([batch.photos, batch.pictures]))
    cached = Batch(
        photos=tiny_model.towers.pool(patches[:3]),
        pictures=patches[3:],
        has_image=batch.has_image,
        tokens=tiny_model.text_encoder(batch.tokens, batch.token_mask),
        token_mask=batch.token_mask,
        targets=batch.targets,
    )
    torch.testing.assert_close(FrozenTower(tiny_model.towers)(cached), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_branches_are_items_by_their_pictures_and_by_their_texts_alone(tower: nn.Module) -> None:
    batch = batch_for(tower, 3, 4)
    found = tower(batch, branches=True)
    assert torch.equal(found[:7], tower(batch))
    without_text = replace(batch, token_mask=torch.zeros_like(batch.token_mask))
    torch.testing.assert_close(found[7:11], tower(without_text)[3:])
    without_picture = replace(batch, has_image=torch.zeros_like(batch.has_image))
    torch.testing.assert_close(found[11:], tower(without_picture)[3:])

    batch.targets.weights[:] = torch.arange(7) + 1.0
    targets = batch.targets_by_branch(0.25)
    both = batch.has_image & batch.token_mask.any(dim=1)
    assert both.any()
    assert not both.all()
    assert torch.equal(targets.weights[:7], batch.targets.weights)
    for alone in (targets[torch.arange(7, 11)], targets[torch.arange(11, 15)]):
        assert torch.equal(alone.classes, batch.targets.classes[3:])
        assert torch.equal(alone.weights, 0.25 * batch.targets.weights[3:] * both)


@pytest.mark.parametrize(("photos", "items"), [(2, 0), (0, 2), (0, 0), (3, 1)])
def test_every_trained_parameter_gets_a_gradient_whatever_the_batch_holds(
    tower: nn.Module, photos: int, items: int
) -> None:
    embeddings = tower.train()(batch_for(tower, photos, items))
    assert embeddings.shape == (photos + items, 12)
    embeddings[:, 0].sum().backward()
    for name, parameter in tower.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        nothing_to_learn = (
            photos + items == 0
            or (photos == 0 and "query_transform" in name)
            or (items == 0 and ("item_transform" in name or "concepts" in name or "gates" in name))
        )
        if nothing_to_learn:
            assert not parameter.grad.any(), name
    if photos:
        assert any(p.grad.any() for name, p in tower.named_parameters() if name.endswith("query_transform.weight"))


def test_half_precision_towers_take_half_precision_features(tiny_config: ModelConfig) -> None:
    tower = FrozenTower(Towers(tiny_config, IMAGE_WIDTH, TEXT_WIDTH)).to(torch.bfloat16)
    assert tower(make_batch(2, 2, pixels=False)).dtype == torch.bfloat16


def test_a_batch_moves_as_a_whole() -> None:
    moved = make_batch(2, 2, pixels=False).to(torch.device("meta"))
    parts = [getattr(moved, field.name) for field in fields(Batch) if field.name != "targets"]
    parts += [getattr(moved.targets, field.name) for field in fields(Targets)]
    assert {part.device.type for part in parts} == {"meta"}
