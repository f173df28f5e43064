"""Embed photos and items with the ONNX graphs of a saved model. Needs onnxruntime, not torch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mixer.images import ImagePreprocess
from mixer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import onnxruntime

Device = Literal["cpu", "cuda", "tensorrt"]

QUERY_GRAPH = "query.onnx"
ITEM_GRAPH = "item.onnx"
ENCODER_GRAPH = "encoder.onnx"
TEXT_GRAPH = "text.onnx"
TOKENIZER = "tokenizer"
SETTINGS = "embedder.json"

# What a provider cannot compute falls to the next one.
_PROVIDERS: dict[Device, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}


class DeviceError(RuntimeError):
    """onnxruntime cannot compute on the wished device; the message says why and what to do."""


class _Graph:
    """One ONNX graph on a device; on the CPU, on as many threads as given."""

    def __init__(self, folder: str | Path, name: str, threads: int, device: Device = "cpu") -> None:
        """Raises DeviceError."""
        self._session = _open_session(Path(folder) / name, threads, device)
        settings = json.loads((Path(folder) / SETTINGS).read_text())
        self.preprocess = ImagePreprocess(**settings["preprocess"])
        self.dim: int = settings["dim"]
        self.max_tokens: int = settings["max_tokens"]

    def run(self, **inputs: np.ndarray) -> np.ndarray:
        (output,) = self._session.run(None, inputs)
        return output


def _open_session(path: Path, threads: int, device: Device) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others share the cores
    providers = _PROVIDERS[device]
    if device == "cpu":
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    if providers[0] not in onnxruntime.get_available_providers():
        raise DeviceError(
            f"this onnxruntime is not made for {device}; install the project's gpu extra, or take the CPU"
        )
    onnxruntime.preload_dlls()  # CUDA and cuDNN of Python's packages, which torch brings
    if device == "tensorrt":
        try:
            importlib.import_module("tensorrt")  # it loads its libraries, which onnxruntime would not find
        except ImportError as error:
            raise DeviceError('tensorrt is not installed; pip install "tensorrt-cu13<11", or take cuda') from error
    # Left to itself it says in its log only that it computes on the CPU instead.
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        found = session.get_providers()[0]
    except Exception as error:
        raise DeviceError(f"onnxruntime cannot open {path.name} on {device}: {' '.join(str(error).split())}") from error
    if found != providers[0]:
        raise DeviceError(
            f"onnxruntime cannot use {device} here; its log, above, names the library or the driver that is missing"
        )
    return session


class ImageFeatures:
    """The bare image encoder: pixels to patches."""

    def __init__(self, folder: str | Path, threads: int = 1, device: Device = "cpu") -> None:
        """`threads` are the CPU's. Raises DeviceError."""
        self._graph = _Graph(folder, ENCODER_GRAPH, threads, device)
        self.preprocess, self.dim = self._graph.preprocess, self._graph.dim

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Encode uint8 [n, size, size, 3] into float32 [n, patches, dim]."""
        return self._graph.run(pixels=pixels)


class TextFeatures:
    """The bare text encoder: texts to encoded tokens."""

    def __init__(self, folder: str | Path, threads: int = 1, device: Device = "cpu") -> None:
        """`threads` are the CPU's. Raises DeviceError."""
        self._graph = _Graph(folder, TEXT_GRAPH, threads, device)
        self._tokenizer = Tokenizer.load(Path(folder) / TOKENIZER, self._graph.max_tokens)

    def __call__(self, texts: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """Encode n texts into float32 [n, tokens, width] and int64 mask [n, tokens], all 0 where a text is missing."""
        token_ids, token_mask = self._tokenizer(texts)
        return self._graph.run(token_ids=token_ids, token_mask=token_mask), token_mask


class QueryEmbedder:
    """Query photos to unit embeddings."""

    def __init__(self, folder: str | Path, threads: int = 1, device: Device = "cpu") -> None:
        """`threads` are the CPU's. Raises DeviceError."""
        self._graph = _Graph(folder, QUERY_GRAPH, threads, device)
        self.preprocess, self.dim = self._graph.preprocess, self._graph.dim

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Embed uint8 [n, size, size, 3] into float32 [n, dim]."""
        return self._graph.run(pixels=pixels)


class ItemEmbedder:
    """Items, with picture, text or both, to unit embeddings."""

    def __init__(self, folder: str | Path, threads: int = 1, device: Device = "cpu") -> None:
        """`threads` are the CPU's. Raises DeviceError."""
        self._graph = _Graph(folder, ITEM_GRAPH, threads, device)
        self.preprocess, self.dim = self._graph.preprocess, self._graph.dim
        self._tokenizer = Tokenizer.load(Path(folder) / TOKENIZER, self._graph.max_tokens)

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
