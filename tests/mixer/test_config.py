"""What a model may be made of."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mixer.config import ModelConfig


def test_a_config_survives_json() -> None:
    config = ModelConfig(dim=64, pooling="first")
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    "wrong",
    [{"dim": 1}, {"dims": 64}, {"pooling": "max"}, {"heads": 0}, {"max_tokens": 1}],
)
def test_a_wrong_key_or_value_is_named(wrong: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ModelConfig(**wrong)


def test_heads_that_do_not_divide_the_concepts_are_refused_at_once() -> None:
    with pytest.raises(ValidationError, match="concept_dim 128 is not a multiple of heads 3"):
        ModelConfig(heads=3)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        ModelConfig().dim = 3
