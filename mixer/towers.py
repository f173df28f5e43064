"""One shared image encoder, two transformations: photos of shoppers and items part ways (Mixer, arXiv 2305.03972)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixer.config import ModelConfig
from mixer.embedder import TOKENIZER
from mixer.encoders import TextEncoder, image_encoder
from mixer.fusion import Concepts

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_MOST_ROWS = 16_384  # of which principal components are taken
_LEAST_VARIANCE = 0.1  # of a component, for its scale; the mean of all variances is 1


class Towers(nn.Module):
    """What is trained when the encoders are frozen: from encoded patches and tokens to unit embeddings."""

    feature_mean: Tensor
    feature_std: Tensor
    initial_weight: Tensor
    interpolation: Tensor

    def __init__(self, config: ModelConfig, image_width: int, text_width: int) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.query_transform = nn.Linear(image_width, config.dim)
        self.item_transform = nn.Linear(image_width, config.dim)
        nn.init.zeros_(self.query_transform.bias)
        self.item_transform.load_state_dict(self.query_transform.state_dict())  # the domains part in training
        self.concepts = Concepts(config.concepts, config.concept_dim, text_width, image_width, config.dim, config.heads)
        # What the text says, and what it shows, beside the picture; with more of it known items are found less well.
        self.log_gates = nn.Parameter(torch.tensor([0.5, 0.37]).log())
        self.register_buffer("feature_mean", torch.zeros(image_width))
        self.register_buffer("feature_std", torch.ones(image_width))
        self.register_buffer("initial_weight", self.query_transform.weight.detach().clone())  # of both transformations
        self.register_buffer("interpolation", torch.ones(()))  # how much of what was learned since is in them

    def pool(self, patches: Tensor) -> Tensor:
        """Pool patches [n, patches, width] into [n, width]."""
        return patches.mean(dim=1) if self.pooling == "mean" else patches[:, 0]

    def query(self, pooled: Tensor) -> Tensor:
        """Transform pooled query photos [n, width] into unit embeddings [n, dim]."""
        return F.normalize(self.query_transform(self.standardised(pooled)), dim=-1)

    def item(self, patches: Tensor, has_image: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Fuse items into unit embeddings [n, dim]; 0 for an item with neither picture nor text.

        Args:
            patches: [n, patches, image_width]; anything where `has_image` is False.
            has_image: bool [n].
            tokens: [n, tokens, text_width].
            token_mask: [n, tokens]; all 0 where the text is missing.
        """
        return self.item_branches(patches, has_image, tokens, token_mask)[0]

    def item_branches(
        self, patches: Tensor, has_image: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed items as `item` does, and by their pictures and by their texts alone, [n, dim] each; 0 without one.

        The picture as a whole, what the text's concepts say, and what they look at in the picture are of unit length
        when they are added: none can drown another, and each by itself can be near its class.
        """
        missing = ~has_image[:, None]
        # What stands where a picture is missing must reach neither an embedding nor a gradient.
        patches = self.standardised(patches.masked_fill(missing[..., None], 0))
        said, looks, _ = self.concepts(tokens, token_mask, patches)
        looked_at = (looks.mean(dim=1, keepdim=True) @ patches).squeeze(1)
        whole, part = (F.normalize(self.item_transform(seen), dim=1) for seen in (self.pool(patches), looked_at))
        whole = whole.masked_fill(missing, 0)
        part = part.masked_fill(missing | ~token_mask.bool().any(dim=1, keepdim=True), 0)
        says, shows = self.log_gates.exp()
        return F.normalize(whole + says * said + shows * part, dim=1), whole, said

    @torch.no_grad()
    def initialise(self, pooled: Tensor) -> None:
        """Set mean and scale of the image features, [n, width], that the transformations take out, and let these begin
        as what tells such features apart before anything is learned."""
        self.feature_mean.copy_(pooled.mean(dim=0))
        # One scale for all: rare features must not become loud ones.
        self.feature_std.fill_(float(pooled.var(dim=0, correction=0).mean().sqrt().clamp_min(1e-6)))
        some = self.standardised(pooled[:: -(-len(pooled) // _MOST_ROWS)])
        if not some.isfinite().all():
            return  # training says so
        self.initial_weight.copy_(half_whitening(some, len(self.initial_weight)))
        for each in (self.query_transform, self.item_transform):
            each.weight.copy_(self.initial_weight)

    @torch.no_grad()
    def interpolate(self, learned: float) -> None:
        """Leave the transformations that share of the way from their initial weights to what they have learned; 1: all.

        A little of the start finds better what was not learned from (WiSE-FT: Wortsman et al., "Robust fine-tuning of
        zero-shot models", CVPR 2022). Asked again, it begins with all that was learned: nothing is lost but rounding.
        """
        if learned == float(self.interpolation):
            return
        change = learned / float(self.interpolation)
        for each in {self.query_transform, self.item_transform}:
            each.weight.copy_(self.initial_weight + change * (each.weight - self.initial_weight))
            each.bias.mul_(change)
        self.interpolation.fill_(learned)

    def standardised(self, features: Tensor) -> Tensor:
        """Take the mean and the scale that `initialise` found out of features [.., width]."""
        scale = 1 / self.feature_std
        return torch.addcmul(-self.feature_mean * scale, features, scale)  # one pass over what is large


def half_whitening(features: Tensor, dim: int) -> Tensor:
    """Return the projection on the first principal components of features [n, width], [dim, width], that takes half
    (as an exponent) of each one's deviation out; rows of zeros if there are fewer than `dim`.

    Whitening (Jegou and Chum, "Negative evidences and co-occurences in image retrieval: the benefit of PCA and
    whitening", ECCV 2012) takes all of it out. What comes out is as large as what nn.Linear begins with.
    """
    variances, axes = torch.linalg.eigh((features.T @ features / len(features)).double())
    variances, axes = variances.flip(0)[:dim].clamp_min(_LEAST_VARIANCE), axes.flip(1)[:, :dim]
    weight = axes.T * variances[:, None] ** -0.25 / (3 * variances.sqrt().mean()).sqrt()
    return F.pad(weight, (0, 0, 0, dim - len(weight))).float()


class MixerModel(nn.Module):
    """The whole model: pixels and text to unit embeddings that queries and items share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = image_encoder(config.image_encoder)
        self.image_encoder.train_from(None)
        self.text_encoder = TextEncoder(config.text_encoder, config.max_tokens)
        self.towers = Towers(config, self.image_encoder.width, self.text_encoder.width)

    def embed_queries(self, pixels: Tensor) -> Tensor:
        """Embed query photos, uint8 [n, size, size, 3], into [n, dim]."""
        return self.towers.query(self.towers.pool(self.image_encoder(pixels)))

    def embed_items(self, pixels: Tensor, has_image: Tensor, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Embed items into [n, dim].

        Args:
            pixels: uint8 [n, size, size, 3]; anything where `has_image` is False.
            has_image: bool [n].
            token_ids: int64 [n, tokens].
            token_mask: int64 [n, tokens]; all 0 where the text is missing.
        """
        tokens = self.text_encoder(token_ids, token_mask)
        return self.towers.item(self.image_encoder(pixels), has_image, tokens, token_mask)

    @torch.no_grad()
    def attention(self, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what each concept attends to: [n, concepts, patches] and [n, concepts, tokens], each of sum 1.

        `arrays` are pixels, token ids and their mask, as `embed_items` takes them, of items with picture and text.
        """
        pixels, token_ids, token_mask = (torch.from_numpy(array) for array in arrays)
        patches = self.towers.standardised(self.image_encoder(pixels))
        _, looks, reads = self.towers.concepts(self.text_encoder(token_ids, token_mask), token_mask, patches)
        return looks.numpy(), reads.numpy()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and tokenizer/ into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(self.config.model_dump_json(indent=1))
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)
        self.text_encoder.tokenizer.save(folder / TOKENIZER)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MixerModel:
        """Read what `save_pretrained` wrote. Raises FileNotFoundError, and ValueError if the weights do not fit."""
        folder = Path(folder)
        model = cls(ModelConfig.model_validate(json.loads((folder / CONFIG).read_text())))
        try:
            weights = load_file(folder / WEIGHTS)
            # Models of before transformations were interpolated have all that they learned.
            weights.setdefault("towers.initial_weight", weights.get("towers.query_transform.weight", torch.zeros(0)))
            weights.setdefault("towers.interpolation", torch.ones(()))
            model.load_state_dict(weights)
        except (RuntimeError, SafetensorError) as error:
            detail = str(error).splitlines()[-1].strip()
            raise ValueError(f"{folder}: the weights do not fit {CONFIG}: {detail}") from error
        return model.eval()
