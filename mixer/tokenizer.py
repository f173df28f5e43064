"""Texts to token ids; apart from the encoders, so that inference needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Tokenizer:
    """A transformers tokenizer for batches that hold missing texts."""

    def __init__(self, path: str | Path, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        self.max_tokens = max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(path)

    def __call__(self, texts: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """Return int64 token ids and mask, both [n, tokens], padded to the longest; a missing text's mask is 0."""
        encoded = self._tokenizer(
            [text or "" for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="np",
        )
        present = np.array([bool(text) for text in texts], np.int64)
        mask = encoded["attention_mask"].astype(np.int64) * present[:, None]
        return encoded["input_ids"].astype(np.int64), mask

    def words(self, text: str) -> list[str]:
        """Return, for each token of a text, the word that it is a part of; "" for marks such as the end's."""
        encoded = self._tokenizer(text, truncation=True, max_length=self.max_tokens)
        spans = [None if word is None else encoded.word_to_chars(word) for word in encoded.word_ids()]
        return ["" if span is None else text[span.start : span.end] for span in spans]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder from which `Tokenizer(folder, ...)` reads them."""
        self._tokenizer.save_pretrained(folder)
