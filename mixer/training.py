"""Batches of query photos and items as equal samples, and the module that embeds them in training."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from mixer.targets import Targets
from mixer.towers import MixerModel, Towers


@dataclass
class Batch:
    """q query photos, then i items.

    With a frozen encoder `photos` are pooled features [q, width], `pictures` patches [i, patches, width] and `tokens`
    encoded text [i, tokens, text_width]; else `photos` and `pictures` are uint8 pixels [n, size, size, 3] and
    `tokens` int64 ids [i, tokens].
    """

    photos: Tensor
    pictures: Tensor
    has_image: Tensor
    tokens: Tensor
    token_mask: Tensor
    targets: Targets

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


class FrozenTower(nn.Module):
    """Trains the towers on features that the frozen encoders gave."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, batch: Batch) -> Tensor:
        """Return unit embeddings [q + i, dim], photos first. Both parts run even when empty: every worker must bring
        a gradient for every parameter."""
        kind = self.towers.query_transform.weight.dtype
        queries = self.towers.query(batch.photos.to(kind))
        items = self.towers.item(batch.pictures.to(kind), batch.has_image, batch.tokens.to(kind), batch.token_mask)
        return torch.cat([queries, items])


class WholeModel(nn.Module):
    """Trains the towers and the image encoder from some block on."""

    def __init__(self, model: MixerModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return unit embeddings [q + i, dim], photos first; the shared encoder sees all pictures at once."""
        towers = self.model.towers
        patches = self.model.image_encoder(torch.cat([batch.photos, batch.pictures]))
        photos, pictures = patches[: len(batch.photos)], patches[len(batch.photos) :]
        tokens = self.model.text_encoder(batch.tokens, batch.token_mask)
        queries = towers.query(towers.pool(photos))
        return torch.cat([queries, towers.item(pictures, batch.has_image, tokens, batch.token_mask)])
