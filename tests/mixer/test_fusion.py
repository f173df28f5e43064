"""Attention against loops; what is missing or padded must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixer.fusion import Concepts, CrossAttention

DIM, SOURCE, HEADS = 8, 6, 2
EXACT = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def concepts() -> Concepts:
    torch.manual_seed(0)
    return Concepts(concepts=3, concept_dim=DIM, text_width=SOURCE, image_width=5, dim=7, heads=HEADS)


def items(n: int, tokens: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, a full token mask and patches of n items."""
    generator = torch.Generator().manual_seed(seed)
    text, patches = (torch.randn(shape, generator=generator) for shape in ((n, tokens, SOURCE), (n, 9, 5)))
    return text, torch.ones(n, tokens, dtype=torch.int64), patches


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
    found, shares = attention(queries, source, mask)
    torch.testing.assert_close(found, slow_attention(attention, queries, source, mask))
    torch.testing.assert_close(shares.sum(dim=2), torch.ones(3, 2))
    assert not shares.transpose(1, 2)[~mask].any()


def test_concepts_read_the_text_and_look_at_the_image(concepts: Concepts) -> None:
    tokens, mask, patches = items(2)
    said, shares, reads = concepts(tokens, mask, patches)
    read, expected_reads = concepts.read_text(concepts.slots.expand(2, -1, -1), tokens, mask.bool())
    assert torch.equal(reads, expected_reads)
    spoken = concepts.say(read.flatten(1))
    torch.testing.assert_close(said, spoken / spoken.norm(dim=1, keepdim=True))
    for n in range(2):
        for k in range(3):
            looking = concepts.look(concepts.norm(read[n, k]))
            scores = torch.stack([looking @ concepts.look_at(patch) for patch in patches[n]]) / math.sqrt(DIM)
            torch.testing.assert_close(shares[n, k], scores.exp() / scores.exp().sum())


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_padding_has_no_effect(concepts: Concepts, kind: torch.dtype) -> None:
    tokens, mask, patches = items(3)
    padded = torch.cat([tokens, torch.full((3, 5, SOURCE), 1e3)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(3, 5, dtype=torch.int64)], dim=1).to(kind)
    found, expected = concepts(padded, padded_mask, patches), concepts(tokens, mask, patches)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    torch.testing.assert_close(found[1], expected[1], **EXACT)
    torch.testing.assert_close(found[2][..., :4], expected[2], **EXACT)
    assert not found[2][..., 4:].any()


def test_a_missing_text_says_nothing(concepts: Concepts) -> None:
    tokens, mask, patches = items(2)
    expected = concepts(tokens, mask, patches)[0]
    mask[1] = 0
    found = concepts(tokens, mask, patches)[0]
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], torch.zeros(7))


def test_text_and_image_both_tell_where_to_look(concepts: Concepts) -> None:
    tokens, mask, patches = items(1)
    said, shares, _ = concepts(tokens, mask, patches)
    other_said, other_shares, _ = concepts(-tokens, mask, patches)
    assert not torch.allclose(said, other_said, atol=1e-3)
    assert not torch.allclose(shares, other_shares, atol=1e-3)
    assert not torch.allclose(shares, concepts(tokens, mask, -patches)[1], atol=1e-3)


@pytest.mark.parametrize("texts", ["all but one", "none", "no items"])
def test_every_parameter_gets_a_finite_gradient(concepts: Concepts, texts: str) -> None:
    tokens, mask, patches = items(0 if texts == "no items" else 3)
    mask[slice(1, 2) if texts == "all but one" else slice(None)] = 0
    said, shares, _ = concepts(tokens, mask, patches)
    (said[:, 0].sum() + (shares * mask.any(dim=1)[:, None, None])[..., 0].square().sum()).backward()
    for name, parameter in concepts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if texts != "all but one":
            assert not parameter.grad.any(), name
        elif not name.endswith("key.bias"):  # the same for every place, so the softmax takes it out
            assert parameter.grad.abs().max() > 1e-6, name
