"""Attention against loops; what is missing or padded must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixer.fusion import ConceptFusion, CrossAttention

DIM, SOURCE, HEADS = 8, 6, 2
EXACT = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def fusion() -> ConceptFusion:
    torch.manual_seed(0)
    return ConceptFusion(concepts=3, concept_dim=DIM, text_width=SOURCE, image_width=5, dim=7, heads=HEADS)


def items(n: int, tokens: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return n images, patches, tokens and a full token mask."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, 7), (n, 9, 5), (n, tokens, SOURCE))
    image, patches, text = (torch.randn(shape, generator=generator) for shape in shapes)
    return image, patches, text, torch.ones(n, tokens, dtype=torch.int64)


def seeing(image: Tensor) -> Tensor:
    """Return the mask of a batch whose items all have a picture."""
    return torch.ones(len(image), dtype=torch.bool)


@torch.no_grad()
def slow_attention(attention: CrossAttention, queries: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """One row, one query, one head at a time."""
    out = queries.clone()
    width = DIM // HEADS
    for n in range(len(queries)):
        seen = source[n][mask[n]]
        for k, query in enumerate(queries[n]):
            read = []
            for head in range(HEADS):
                part = slice(head * width, (head + 1) * width)
                q = attention.query(attention.norm(query))[part]
                scores = torch.stack([q @ attention.key(place)[part] for place in seen]) / math.sqrt(width)
                shares = scores.exp() / scores.exp().sum()
                read.append(sum(share * attention.value(place)[part] for share, place in zip(shares, seen)))  # noqa: B905
            out[n, k] += attention.out(torch.cat(read))
    return out


def test_attention_equals_the_slow_one() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(DIM, SOURCE, HEADS)
    torch.nn.init.normal_(attention.norm.weight)
    queries, source = torch.randn(3, 2, DIM), torch.randn(3, 5, SOURCE)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    torch.testing.assert_close(attention(queries, source, mask), slow_attention(attention, queries, source, mask))
    everything = torch.ones_like(mask)
    torch.testing.assert_close(attention(queries, source), slow_attention(attention, queries, source, everything))


def test_fusion_is_what_the_paper_says(fusion: ConceptFusion) -> None:
    image, patches, tokens, mask = items(2)
    concepts = fusion.read_text(fusion.slots.expand(2, -1, -1), tokens)
    seen = fusion.project(fusion.read_image(concepts, patches).flatten(1))
    gate = torch.sigmoid(fusion.gate(torch.cat([image, seen], dim=1)))
    torch.testing.assert_close(fusion(image, seeing(image), patches, tokens, mask), image + gate * seen)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_padding_has_no_effect(fusion: ConceptFusion, kind: torch.dtype) -> None:
    image, patches, tokens, mask = items(3)
    padded = torch.cat([tokens, torch.full((3, 5, SOURCE), 1e3)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(3, 5, dtype=torch.int64)], dim=1).to(kind)
    expected = fusion(image, seeing(image), patches, tokens, mask)
    torch.testing.assert_close(fusion(image, seeing(image), patches, padded, padded_mask), expected, **EXACT)


def test_nothing_is_read_from_a_missing_text(fusion: ConceptFusion) -> None:
    image, patches, tokens, mask = items(2)
    mask[1] = 0
    found = fusion(image, seeing(image), patches, tokens, mask)
    torch.testing.assert_close(
        found, fusion(image, seeing(image), patches, tokens * torch.tensor([1.0, -9.0])[:, None, None], mask)
    )
    # the bare slots attend over the image
    seen = fusion.project(fusion.read_image(fusion.slots[None], patches[1:]).flatten(1))
    gate = torch.sigmoid(fusion.gate(torch.cat([image[1:], seen], dim=1)))
    torch.testing.assert_close(found[1:], image[1:] + gate * seen)


def test_nothing_is_read_from_a_missing_image(fusion: ConceptFusion) -> None:
    image, patches, tokens, mask = items(2)
    has_image = torch.tensor([True, False])
    found = fusion(image, has_image, patches, tokens, mask)
    torch.testing.assert_close(found[:1], fusion(image, seeing(image), patches, tokens, mask)[:1])
    seen = fusion.project(fusion.read_text(fusion.slots[None], tokens[1:]).flatten(1))
    gate = torch.sigmoid(fusion.gate(torch.cat([image[1:], seen], dim=1)))
    torch.testing.assert_close(found[1:], image[1:] + gate * seen)


def test_text_and_image_both_tell(fusion: ConceptFusion) -> None:
    image, patches, tokens, mask = items(1)
    found = fusion(image, seeing(image), patches, tokens, mask)
    assert not torch.allclose(found, fusion(image, seeing(image), patches, -tokens, mask), atol=1e-3)
    assert not torch.allclose(found, fusion(image, seeing(image), -patches, tokens, mask), atol=1e-3)


def test_the_gradient_reaches_every_parameter(fusion: ConceptFusion) -> None:
    image, patches, tokens, mask = items(3)
    mask[1] = 0
    fusion(image, seeing(image), patches, tokens, mask).square().sum().backward()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("key.bias"):  # the same for every place, so the softmax takes it out
            assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("texts", ["none", "no items"])
def test_a_batch_without_texts_or_items_gives_zero_gradients(fusion: ConceptFusion, texts: str) -> None:
    image, patches, tokens, mask = items(2 if texts == "none" else 0)
    fusion(image, seeing(image), patches, tokens, mask * 0).sum().backward()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name.startswith("read_text") or texts == "no items":
            assert not parameter.grad.any(), name


def test_it_begins_near_the_image_alone(fusion: ConceptFusion) -> None:
    image, patches, tokens, mask = items(64)
    seen = fusion(image, seeing(image), patches, tokens, mask) - image
    assert seen.norm(dim=1).mean() < 0.5 * image.norm(dim=1).mean()
