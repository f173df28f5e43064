"""What the HTTP API replies; the OpenAPI page is made from these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field


class ItemDetails(BaseModel):
    """An item as the catalogue shows it."""

    model_config = ConfigDict(ser_json_bytes="base64")

    id: str
    title: str | None
    attributes: dict[str, Any] = Field(description="the item's other columns, without nulls")

    @classmethod
    def from_row(cls, row: Mapping[str, Any], **more: Any) -> Self:
        """Make an item of an index row's display columns."""
        attributes = {
            name: value for name, value in row.items() if name not in ("id", "item_id", "title") and value is not None
        }
        return cls(id=row["item_id"], title=row.get("title"), attributes=attributes, **more)


class Item(ItemDetails):
    """An item that was found."""

    score: float = Field(description="cosine similarity of query and item, -1 to 1")
    probability: float | None = Field(
        None, description="of being the same product, from the score; null until evaluate has calibrated the model"
    )


class Timings(BaseModel):
    """Milliseconds in the server."""

    encode: float | None = Field(description="decoding and encoding the photo; null where none was sent")
    search: float = Field(description="searching the shards and merging")
    total: float = Field(description="all of it, with what the photo waited for its turn")


class Reply(BaseModel):
    """What a reply was computed with."""

    model: str = Field(description="version of the model")
    index: str = Field(description="version of the index")
    timings_ms: Timings
    degraded: bool = Field(description="true where shards did not answer, and their items are missing")
    missing_shards: list[str]


class Page(BaseModel):
    """The items nearest to one query, best first."""

    items: list[Item]
    next_offset: int | None = Field(description="where the next page begins; null where there is none")
    nothing_similar: bool = Field(description="true where nothing reaches the least probability that was asked for")


class SearchReply(Page, Reply):
    """One query's page."""


class ErrorDetail(BaseModel):
    """Why there is no result."""

    code: str = Field(description="for programs")
    message: str = Field(description="one sentence for people")
    request_id: str


class ErrorReply(BaseModel):
    """Every reply that is not a result, and a broken photo's place in a batch."""

    error: ErrorDetail


class BatchReply(Reply):
    """One result a photo, in the order of the photos."""

    results: list[Page | ErrorReply]


class Attribute(BaseModel):
    """What the items hold in one column, for filters."""

    name: str
    kind: Literal["text", "number", "boolean"]
    values: list[str] | None = Field(description="the most frequent texts, at most 20; null for other kinds")
    min: float | str | None = Field(description="least number, or ISO text of the earliest time")
    max: float | str | None


class AttributesReply(BaseModel):
    """The columns that a filter may name."""

    attributes: list[Attribute]


class Status(BaseModel):
    """The server is up."""

    status: str = "ok"


class Swap(BaseModel):
    """The last try to bring in another version."""

    version: str = Field(description="of the index that was to answer")
    replaces: str = Field(description="the version that answered till then")
    ended_ms: int = Field(description="when it ended, Unix time in milliseconds")
    seconds: float
    error: str | None = Field(description="why the version before stays; null where the new one answers")


class StatusReply(BaseModel):
    """What answers in this replica."""

    model: str
    index: str
    items: int
    shards: int
    calibrated: bool
    max_k: int = Field(description="items that one query may reach: offset + k")
    waiting: int = Field(description="photos in the queue")
    loading: str | None = Field(description="version that is being loaded")
    last_swap: Swap | None
