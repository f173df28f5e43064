"""Fixtures that several stages share."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported; a token left in ~/.ray does no harm

import ray

from mixer.config import ModelConfig
from mixer_platform.cli import connect

ROOT = Path(__file__).parents[1]
# Ray Data runs each kind of shuffle task in workers of its own, and starting one takes seconds: keep them.
KEEP_WORKERS = {"num_workers_soft_limit": 16, "idle_worker_killing_time_threshold_ms": 60_000}

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["red", "green", "blue", "round", "square", "thing", ",", "."]]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A small Ray cluster on this machine, with the checkout importable in its workers."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")])}
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": environment},
        _system_config=KEEP_WORKERS,
    )
    connect()  # as jobs do
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A small model over a ViT of 32 pixels and a BERT of thirteen words, both untrained."""
    import torch
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
