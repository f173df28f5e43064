"""Embed photos and items with the ONNX graphs of a saved model. Needs onnxruntime, not torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mixer.images import ImagePreprocess
from mixer.tokenizer import Tokenizer

QUERY_GRAPH = "query.onnx"
ITEM_GRAPH = "item.onnx"
ENCODER_GRAPH = "encoder.onnx"
TEXT_GRAPH = "text.onnx"
TOKENIZER = "tokenizer"
SETTINGS = "embedder.json"


class _Graph:
    """One ONNX graph on as many CPU threads as given, or on the GPU if onnxruntime has it."""

    def __init__(self, folder: str | Path, name: str, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others share the cores
        self._session = onnxruntime.InferenceSession(
            str(Path(folder) / name), options, providers=onnxruntime.get_available_providers()
        )
        settings = json.loads((Path(folder) / SETTINGS).read_text())
        self.preprocess = ImagePreprocess(**settings["preprocess"])
        self.dim: int = settings["dim"]
        self.max_tokens: int = settings["max_tokens"]

    def run(self, **inputs: np.ndarray) -> np.ndarray:
        (output,) = self._session.run(None, inputs)
        return output


class ImageFeatures:
    """The bare image encoder: pixels to patches."""

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        self._graph = _Graph(folder, ENCODER_GRAPH, threads)
        self.preprocess, self.dim = self._graph.preprocess, self._graph.dim

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Encode uint8 [n, size, size, 3] into float32 [n, patches, dim]."""
        return self._graph.run(pixels=pixels)


class TextFeatures:
    """The bare text encoder: texts to encoded tokens."""

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        self._graph = _Graph(folder, TEXT_GRAPH, threads)
        self._tokenizer = Tokenizer(Path(folder) / TOKENIZER, self._graph.max_tokens)

    def __call__(self, texts: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """Encode n texts into float32 [n, tokens, width] and int64 mask [n, tokens], all 0 where a text is missing."""
        token_ids, token_mask = self._tokenizer(texts)
        return self._graph.run(token_ids=token_ids, token_mask=token_mask), token_mask


class QueryEmbedder:
    """Query photos to unit embeddings."""

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        self._graph = _Graph(folder, QUERY_GRAPH, threads)
        self.preprocess, self.dim = self._graph.preprocess, self._graph.dim

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Embed uint8 [n, size, size, 3] into float32 [n, dim]."""
        return self._graph.run(pixels=pixels)


class ItemEmbedder:
    """Items, with picture, text or both, to unit embeddings."""

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        self._graph = _Graph(folder, ITEM_GRAPH, threads)
        self.preprocess, self.dim = self._graph.preprocess, self._graph.dim
        self._tokenizer = Tokenizer(Path(folder) / TOKENIZER, self._graph.max_tokens)

    def __call__(self, pixels: Sequence[np.ndarray | None], texts: Sequence[str | None]) -> np.ndarray:
        """Embed n items into float32 [n, dim]; each has preprocessed pixels uint8 [size, size, 3], a text or both."""
        size = self.preprocess.size
        missing = np.zeros((size, size, 3), np.uint8)
        token_ids, token_mask = self._tokenizer(texts)
        return self._graph.run(
            pixels=np.stack([missing if each is None else each for each in pixels]),
            has_image=np.array([each is not None for each in pixels]),
            token_ids=token_ids,
            token_mask=token_mask,
        )


def item_text(title: str | None, description: str | None) -> str | None:
    """Join an item's title and description into the text its concepts are drawn from; None if it has neither."""
    parts = [part.strip() for part in (title, description) if part and part.strip()]
    return ". ".join(parts) or None
