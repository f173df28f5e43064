"""Tiny encoders, saved as any transformers checkpoint would be, and models built from their paths."""

from __future__ import annotations

import json

import pytest
import torch

from mixer.config import ModelConfig
from mixer.towers import MixerModel

SIDE, PATCH, IMAGE_WIDTH, TEXT_WIDTH = 32, 8, 16, 24
WORDS = ("red", "green", "blue", "apple", "pear", "milk", "sweet", "small", "fresh", "##s", ".")

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vit_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ViT of two blocks for 32 x 32 pictures: 16 patches and a CLS token, 16 wide."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=IMAGE_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=0.3,  # tiny weights would make every picture the same
    )
    ViTModel(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@pytest.fixture(scope="session")
def bert_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of two blocks, 24 wide, with a WordPiece vocabulary of a few words and BERT's usual dropout."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_config(vit_path: str, bert_path: str) -> ModelConfig:
    """A model of the two tiny encoders."""
    return ModelConfig(
        image_encoder=vit_path,
        text_encoder=bert_path,
        dim=12,
        concepts=3,
        concept_dim=8,
        heads=2,
        max_tokens=8,
    )


@pytest.fixture
def tiny_model(tiny_config: ModelConfig) -> MixerModel:
    """A model with random towers that a test may change."""
    return make_model(tiny_config)


def make_model(config: ModelConfig) -> MixerModel:
    torch.manual_seed(3)
    model = MixerModel(config).eval()
    with torch.no_grad():  # away from the start, where both transformations are one and the missing patch is 0
        for parameter in model.towers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.towers.feature_mean.normal_()
        model.towers.feature_std.fill_(0.7)
    return model


@pytest.fixture(scope="session")
def make_tiny_model():
    return make_model
