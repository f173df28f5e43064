"""Concepts drawn from an item's text attend over its image (Mixer, arXiv 2305.03972, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Multi-head attention of queries over a sequence of another width, added to the queries."""

    def __init__(self, dim: int, source_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(source_width, dim)
        self.value = nn.Linear(source_width, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from [n, k, dim] over [n, s, source_width]; `mask` [n, s] is True where attending is allowed.

        Each row must allow at least one place.
        """
        q, k, v = self.query(self.norm(queries)), self.key(source), self.value(source)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        allowed = None if mask is None else mask[:, None, None, :]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return queries + self.out(read.transpose(1, 2).flatten(2))


class ConceptFusion(nn.Module):
    """K learned concept slots read the text; the concepts attend over the image; a gate says how much it adds."""

    def __init__(
        self, concepts: int, concept_dim: int, text_width: int, image_width: int, dim: int, heads: int
    ) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(concepts, concept_dim) * concept_dim**-0.5)
        self.read_text = CrossAttention(concept_dim, text_width, heads)
        self.read_image = CrossAttention(concept_dim, image_width, heads)
        self.project = nn.Linear(concepts * concept_dim, dim)
        self.gate = nn.Linear(2 * dim, dim)
        nn.init.constant_(self.gate.bias, -1.0)  # begin near the image alone

    def forward(self, image: Tensor, has_image: Tensor, patches: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Add what the concepts see to `image`.

        Args:
            image: [n, dim], the transformed picture; zeros where it is missing.
            has_image: bool [n]; where it is False the concepts stay what the text made them.
            patches: [n, patches, image_width]; finite also where the picture is missing.
            tokens: [n, tokens, text_width]; 0 where masked.
            token_mask: int64 or bool [n, tokens]; all 0 where the text is missing, and then nothing is read from it.

        Returns:
            [n, dim], not yet of unit length.
        """
        slots = self.slots.expand(image.shape[0], -1, -1)  # not len(): tracing would freeze it
        allowed = token_mask.bool()
        has_text = allowed.any(dim=1)
        # Softmax over nothing is undefined: a missing text reads its first place, and the result is not used.
        allowed = torch.cat([allowed[:, :1] | ~has_text[:, None], allowed[:, 1:]], dim=1)
        concepts = torch.where(has_text[:, None, None], self.read_text(slots, tokens, allowed), slots)
        concepts = torch.where(has_image[:, None, None], self.read_image(concepts, patches), concepts)
        seen = self.project(concepts.flatten(1))
        return image + torch.sigmoid(self.gate(torch.cat([image, seen], dim=1))) * seen
