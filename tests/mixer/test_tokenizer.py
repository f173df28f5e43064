"""Batches of texts in which some are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixer.tokenizer import Tokenizer

PAD, CLS, SEP = 0, 2, 3


@pytest.fixture
def tokenizer(bert_path: str) -> Tokenizer:
    return Tokenizer.from_transformers(bert_path, max_tokens=6)


def test_texts_are_padded_to_the_longest_and_missing_ones_masked(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(["red apples", None, "milk", ""])
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (4, 5)
    assert mask.tolist() == [[1, 1, 1, 1, 1], [0] * 5, [1, 1, 1, 0, 0], [0] * 5]
    assert (ids[:, 0] == CLS).all()
    assert ids[2, 2:].tolist() == [SEP, PAD, PAD]


def test_tokens_know_their_words(tokenizer: Tokenizer) -> None:
    assert tokenizer.words("red apples") == ["", "red", "apples", "apples", ""]
    assert tokenizer.words("") == ["", ""]
    assert len(tokenizer.words("red green blue apple pear milk sweet")) == 6


def test_long_texts_are_cut_and_keep_their_end_mark(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(["red green blue apple pear milk sweet"])
    assert ids.shape == (1, 6)
    assert mask.all()
    assert ids[0, -1] == SEP


@pytest.mark.parametrize("texts", [[None], [None, None]])
def test_a_batch_without_any_text_has_a_place_to_attend_to(tokenizer: Tokenizer, texts: list[None]) -> None:
    ids, mask = tokenizer(texts)
    assert len(ids) == len(texts)
    assert ids.shape[1] >= 1
    assert not mask.any()


def test_what_is_saved_reads_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    again = Tokenizer.load(tmp_path / "tokenizer", max_tokens=6)
    texts = ["Red APPLES . sweet", None, "something unheard of"]
    for found, expected in zip(again(texts), tokenizer(texts), strict=True):
        assert np.array_equal(found, expected)
