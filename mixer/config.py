"""What a model is made of; saved as config.json beside its weights."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_SCALE = 64.0  # of the softmax: sums of exponentials of larger logits do not fit into fp32


class ModelConfig(BaseModel):
    """The architecture of a `MixerModel`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_encoder: str = Field("efficientnet-lite0", description="packaged default, or a transformers name or path")
    text_encoder: str = Field("minilm-l6", description="packaged default, or a transformers name or path")
    dim: int = Field(256, ge=2, description="dimension of the embeddings")
    concepts: int = Field(8, ge=1, description="concept slots that read an item's text")
    concept_dim: int = Field(128, ge=1, description="width of the concepts' attention")
    heads: int = Field(4, ge=1, description="attention heads; concept_dim must be a multiple")
    max_tokens: int = Field(48, ge=2, description="tokens of an item's text; the rest is cut")
    pooling: Literal["mean", "first"] = Field("mean", description="how patches become one vector; first: a CLS token")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.concept_dim % self.heads:
            raise ValueError(f"concept_dim {self.concept_dim} is not a multiple of heads {self.heads}")
        return self
