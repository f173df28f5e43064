"""Tiny encoders, saved as any transformers checkpoint is, and a handmade samples version to learn from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mixer.config import ModelConfig
from mixer_platform import versions
from mixer_platform.prepare.job import SAMPLES
from mixer_platform.storage import open_storage

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["red", "green", "blue", "round", "square", "thing", ",", "."]]


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A small model over a ViT of 32 pixels and a BERT of thirteen words, both untrained."""
    from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("encoders")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=32, patch_size=16, **small)).save_pretrained(folder / "image")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "image/preprocessor_config.json").write_text(json.dumps(processor))
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **small)).save_pretrained(folder / "text")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "text")
    encoders = {"image_encoder": str(folder / "image"), "text_encoder": str(folder / "text")}
    return ModelConfig(**encoders, dim=8, concepts=2, concept_dim=8, heads=2, max_tokens=8)


def make_workspace(parent: Path) -> Path:
    """Make a workspace with samples/v1: three classes of one colour each, four photos and two items a class."""
    folder = parent / "workspace"
    rng = np.random.default_rng(0)
    rows = []
    for label, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        for n in range(6):
            kind = "query" if n < 4 else "item"
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (40, 48, 3)), 0, 255).astype(np.uint8)
            path = parent / f"{kind}-{label}-{n}.png"
            Image.fromarray(pixels).save(path)
            text = None if kind == "query" else f"{['red', 'green', 'blue'][label]} round thing"
            row = {"sample_id": path.stem, "kind": kind, "image": str(path), "text": text, "class_id": label}
            row["weight"] = 0.5 + 0.1 * n if kind == "query" else 1.0
            if kind == "query":
                row |= {"candidates": [label, (label + 1) % 3][: 1 + n % 2], "evidence": [5.0, -1.0][: 1 + n % 2]}
                row["unseen"] = -0.5
            rows.append(row)
    rows[4]["image"] = None
    rows[11]["text"] = None
    (folder / "samples/v1/train").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows[:7], SAMPLES), folder / "samples/v1/train/0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[7:], SAMPLES), folder / "samples/v1/train/1.parquet")
    versions.publish(open_storage(str(folder)), "samples", "v1", {"classes": 3})
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace of `make_workspace`."""
    return make_workspace(tmp_path)


@pytest.fixture(scope="module")
def other_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another, for the whole of a module."""
    return make_workspace(tmp_path_factory.mktemp("other"))
