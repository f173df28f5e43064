"""Write a model's towers as ONNX graphs, from pixels and tokens to unit embeddings, for inference without torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mixer.embedder import ENCODER_GRAPH, ITEM_GRAPH, QUERY_GRAPH, SETTINGS, TEXT_GRAPH, TOKENIZER
from mixer.encoders import ImageEncoder
from mixer.towers import MixerModel

_BATCH = {0: "n"}
_TEXTS = {0: "n", 1: "tokens"}


class _Call(nn.Module):
    """Exports a method other than forward."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.module, self.method)(*inputs)


def export_model(model: MixerModel, folder: Path) -> None:
    """Write query.onnx, item.onnx and embedder.json into `folder`, beside what `save_pretrained` wrote."""
    model = model.cpu().eval()
    pixels = _pixels(model.image_encoder)
    present = torch.ones(len(pixels), dtype=torch.bool)
    tokens = torch.ones(len(pixels), 4, dtype=torch.int64)
    _export(model, "embed_queries", {"pixels": pixels}, folder / QUERY_GRAPH)
    _export(
        model,
        "embed_items",
        {"pixels": pixels, "has_image": present, "token_ids": tokens, "token_mask": tokens},
        folder / ITEM_GRAPH,
    )
    _write_settings(model.image_encoder, folder, model.config.dim, model.config.max_tokens)


def export_encoders(model: MixerModel, folder: Path) -> None:
    """Write the bare encoders, encoder.onnx and text.onnx, with tokenizer/ and embedder.json: for caching features."""
    model = model.cpu().eval()
    tokens = torch.ones(2, 4, dtype=torch.int64)
    export_image_encoder(model.image_encoder, folder, model.config.max_tokens)
    _export(model.text_encoder, "forward", {"token_ids": tokens, "token_mask": tokens}, folder / TEXT_GRAPH)
    model.text_encoder.tokenizer.save(folder / TOKENIZER)


def export_image_encoder(encoder: ImageEncoder, folder: Path, max_tokens: int = 0) -> None:
    """Write encoder.onnx, from pixels to patches, and embedder.json."""
    folder.mkdir(parents=True, exist_ok=True)
    _export(encoder.cpu().eval(), "forward", {"pixels": _pixels(encoder)}, folder / ENCODER_GRAPH)
    _write_settings(encoder, folder, encoder.width, max_tokens)


def _pixels(encoder: ImageEncoder) -> Tensor:
    size = encoder.preprocess.size
    return torch.zeros(2, size, size, 3, dtype=torch.uint8)


def _write_settings(encoder: ImageEncoder, folder: Path, dim: int, max_tokens: int) -> None:
    preprocess = {"size": encoder.preprocess.size, "resize": encoder.preprocess.resize}
    (folder / SETTINGS).write_text(json.dumps({"preprocess": preprocess, "dim": dim, "max_tokens": max_tokens}))


def _export(module: nn.Module, method: str, inputs: dict[str, Tensor], path: Path) -> None:
    names: Sequence[str] = list(inputs)
    axes = {name: _TEXTS if name.startswith("token") else _BATCH for name in names} | {"output": _BATCH}
    with warnings.catch_warnings(), torch.no_grad():
        # The tracer warns of each shape it takes for constant; the tests compare the graph with the model.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Call(module, method).eval(),
            tuple(inputs.values()),
            str(path),
            input_names=names,
            output_names=["output"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,  # the newer exporter takes ten times as long and gives no faster graph here
        )
