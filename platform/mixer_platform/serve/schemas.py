"""What the HTTP API replies; the OpenAPI page is made from these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Item(BaseModel):
    """An item that was found."""

    model_config = ConfigDict(ser_json_bytes="base64")

    id: str
    title: str | None
    score: float = Field(description="cosine similarity of query and item, -1 to 1")
    attributes: dict[str, Any] = Field(description="the item's other columns, without nulls")

    @classmethod
    def from_row(cls, row: Mapping[str, Any], score: float) -> Item:
        """Make an item of an index row's display columns."""
        attributes = {name: value for name, value in row.items() if name not in ("item_id", "title")}
        present = {name: value for name, value in attributes.items() if value is not None}
        return cls(id=row["item_id"], title=row.get("title"), score=score, attributes=present)


class Timings(BaseModel):
    """Milliseconds in the server."""

    encode: float | None = Field(description="decoding and encoding the photos; null where none was sent")
    search: float = Field(description="searching the shards and merging")
    total: float


class Versions(BaseModel):
    """What a reply was computed with."""

    model: str = Field(description="version of the model")
    index: str = Field(description="version of the index")
    timings_ms: Timings


class SearchReply(Versions):
    """The items nearest to one query, best first."""

    items: list[Item]


class ErrorDetail(BaseModel):
    """Why there is no result."""

    code: str = Field(description="for programs")
    message: str = Field(description="one sentence for people")
    request_id: str


class ErrorReply(BaseModel):
    """Every reply that is not a result, and a broken photo's place in a batch."""

    error: ErrorDetail


class PhotoItems(BaseModel):
    """The items nearest to one photo of a batch, best first."""

    items: list[Item]


class BatchReply(Versions):
    """One result a photo, in the order of the photos."""

    results: list[PhotoItems | ErrorReply]


class Status(BaseModel):
    """The server is up."""

    status: str = "ok"
