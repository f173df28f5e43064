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

    def forward(self, queries: Tensor, source: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from [n, k, dim] over [n, s, source_width]; `mask` [n, s] is True where attending is allowed.

        Each row must allow at least one place. Returns what the queries become, [n, k, dim], and their attention, the
        mean over heads, [n, k, s].
        """
        q, k, v = self.query(self.norm(queries)), self.key(source), self.value(source)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
        shares = torch.softmax(scores.masked_fill(~mask[:, None, None], -torch.inf), dim=3)
        return queries + self.out((shares @ v).transpose(1, 2).flatten(2)), shares.mean(dim=1)


class Concepts(nn.Module):
    """K learned slots read an item's text; the concepts they become say what the item is and where to look at it."""

    def __init__(
        self, concepts: int, concept_dim: int, text_width: int, image_width: int, dim: int, heads: int
    ) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(concepts, concept_dim) * concept_dim**-0.5)
        self.read_text = CrossAttention(concept_dim, text_width, heads)
        self.say = nn.Linear(concepts * concept_dim, dim)
        self.norm = nn.LayerNorm(concept_dim)
        self.look = nn.Linear(concept_dim, concept_dim)
        self.look_at = nn.Linear(image_width, concept_dim, bias=False)

    def forward(self, tokens: Tensor, token_mask: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read texts and look at pictures.

        Args:
            tokens: [n, tokens, text_width]; 0 where masked.
            token_mask: int64 or bool [n, tokens]; all 0 where the text is missing, and then nothing is said.
            patches: [n, patches, image_width]; finite also where the picture is missing.

        Returns:
            What is said, [n, dim], of unit length or 0; and the attention of each concept, sum 1: over the picture,
            [n, concepts, patches], and over the text, [n, concepts, tokens].
        """
        slots = self.slots.expand(tokens.shape[0], -1, -1)  # not len(): tracing would freeze it
        allowed = token_mask.bool()
        has_text = allowed.any(dim=1, keepdim=True)
        # Softmax over nothing is undefined: a missing text reads its first place, and the result is not used.
        allowed = torch.cat([allowed[:, :1] | ~has_text, allowed[:, 1:]], dim=1)
        concepts, reads = self.read_text(slots, tokens, allowed)
        said = F.normalize(self.say(concepts.flatten(1)), dim=1) * has_text
        scores = self.look(self.norm(concepts)) @ self.look_at(patches).transpose(1, 2)
        return said, torch.softmax(scores * concepts.shape[2] ** -0.5, dim=2), reads
