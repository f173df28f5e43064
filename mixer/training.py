"""Batches of query photos and items as equal samples, and the module that embeds them in training."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from mixer.targets import Targets, concatenate
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

    def parts(self, count: int) -> list[Batch]:
        """Cut the batch into `count`, each with its share of the photos and of the items; some may be empty."""
        photos = torch.arange(len(self.photos), device=self.photos.device).tensor_split(count)
        items = torch.arange(len(self.pictures), device=self.photos.device).tensor_split(count)
        items = items[::-1]  # the first parts have a photo more, so the last ones have an item more
        return [
            Batch(
                photos=self.photos[mine],
                pictures=self.pictures[theirs],
                has_image=self.has_image[theirs],
                tokens=self.tokens[theirs],
                token_mask=self.token_mask[theirs],
                targets=self.targets[torch.cat([mine, theirs + len(self.photos)])],
            )
            for mine, theirs in zip(photos, items, strict=True)
        ]

    def targets_by_branch(self, weight: float) -> Targets:
        """Return the targets of what a tower gives when asked for branches too, [q + 3i].

        An item's picture and its text count `weight` each beside both together; where it has one of them only, nothing.
        """
        items = self.targets[torch.arange(len(self.photos), len(self.targets), device=self.targets.weights.device)]
        both = self.has_image & self.token_mask.any(dim=1)
        alone = replace(items, weights=items.weights * both * weight)
        return concatenate([self.targets, alone, alone])


class FrozenTower(nn.Module):
    """Trains the towers on features that the frozen encoders gave."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, batch: Batch, branches: bool = False) -> Tensor:
        """Return unit embeddings [q + i, dim], photos first. Both parts run even when empty: every worker must bring
        a gradient for every parameter.

        With `branches`, [q + 3i, dim]: after them the items by their pictures alone and by their texts alone.
        """
        kind = self.towers.query_transform.weight.dtype
        queries = self.towers.query(batch.photos.to(kind))
        return torch.cat(
            [queries, *_items(self.towers, batch.pictures.to(kind), batch.tokens.to(kind), batch, branches)]
        )


class WholeModel(nn.Module):
    """Trains the towers and those blocks of the image encoder that `train_from` left open."""

    def __init__(self, model: MixerModel) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder, self.towers = model.image_encoder, model.text_encoder, model.towers

    def forward(self, batch: Batch, branches: bool = False) -> Tensor:
        """Return what a `FrozenTower` does; the shared encoder sees all pictures at once."""
        patches = self.image_encoder(torch.cat([batch.photos, batch.pictures]))
        photos, pictures = patches[: len(batch.photos)], patches[len(batch.photos) :]
        tokens = self.text_encoder(batch.tokens, batch.token_mask)
        queries = self.towers.query(self.towers.pool(photos))
        return torch.cat([queries, *_items(self.towers, pictures, tokens, batch, branches)])


def _items(towers: Towers, pictures: Tensor, tokens: Tensor, batch: Batch, branches: bool) -> tuple[Tensor, ...]:
    """Embed items, each [i, dim]; with `branches` also by their pictures alone and by their texts alone."""
    return towers.item_branches(pictures, batch.has_image, tokens, batch.token_mask)[: 3 if branches else 1]
