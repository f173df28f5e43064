"""Texts to token ids; apart from the encoders, so that inference needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

_FILE = "tokenizer.json"


class Tokenizer:
    """A tokenizer for batches that hold missing texts."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, max_tokens: int) -> None:
        """`max_tokens`: longer texts are cut. Padding is the tokenizer's own."""
        padding = tokenizer.padding or {}
        tokenizer.enable_padding(**{name: padding[name] for name in ("pad_id", "pad_type_id", "pad_token") if padding})
        tokenizer.enable_truncation(max_tokens)
        self._tokenizer = tokenizer

    @classmethod
    def from_transformers(cls, name: str | Path, max_tokens: int) -> Tokenizer:
        """Take the tokenizer of a transformers model, by name or path. Raises OSError and ValueError."""
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(name)
        backend = getattr(found, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{type(found).__name__} is in Python; take a model whose tokenizer is a fast one")
        backend.enable_padding(pad_id=found.pad_token_id or 0, pad_token=found.pad_token or "[PAD]")
        return cls(backend, max_tokens)

    @classmethod
    def load(cls, folder: str | Path, max_tokens: int) -> Tokenizer:
        """Read what `save` wrote. Raises FileNotFoundError."""
        path = Path(folder) / _FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; train the model again, or copy its tokenizer")
        return cls(tokenizers.Tokenizer.from_file(str(path)), max_tokens)

    def __call__(self, texts: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """Return int64 token ids and mask, both [n, tokens], padded to the longest; a missing text's mask is 0."""
        encoded = self._tokenizer.encode_batch([text or "" for text in texts])
        ids = np.array([each.ids for each in encoded], np.int64)
        mask = np.array([each.attention_mask for each in encoded], np.int64)
        return ids, mask * np.array([bool(text) for text in texts], np.int64)[:, None]

    def words(self, text: str) -> list[str]:
        """Return, for each token of a text, the word that it is a part of; "" for marks such as the end's."""
        encoded = self._tokenizer.encode(text)
        spans = [None if word is None else encoded.word_to_chars(word) for word in encoded.word_ids]
        return ["" if span is None else text[span[0] : span[1]] for span in spans]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's file into a folder from which `load` reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / _FILE))
