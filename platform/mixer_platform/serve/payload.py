"""Read photos and options out of requests: multipart, JSON or a bare picture, never more bytes than allowed."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pyarrow as pa
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixer_platform.config import ServeConfig
from mixer_platform.filters import FilterError, parse_filter
from mixer_platform.serve.errors import ApiError, invalid, sentence, unreadable
from mixer_platform.serve.fetch import Fetcher
from mixer_platform.serve.grouping import LOOK

DEFAULT_K = 10
JSON, MULTIPART = "application/json", "multipart/form-data"
PICTURES = ("image/jpeg", "image/png", "image/webp")
Body = TypeVar("Body", bound=BaseModel)


class BodyLimit:
    """ASGI middleware: 413 for a body above `max_bytes`, counted while it is read and not after."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = dict(scope.get("headers", ())).get(b"content-length", b"")
        announced = int(said) if said.isdigit() and len(said) < 20 else 0  # what is no number is counted as it comes
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = {} if announced > self.max_bytes else await receive()
            seen += len(message.get("body", b""))
            if max(seen, announced) > self.max_bytes:
                raise ApiError(413, "body_too_large", f"the body is above {self.max_bytes / 1e6:g} MB; send less")
            return message

        await self.app(scope, limited, send)


def _json_text(value: Any) -> Any:
    """Read a filter that came as text, in a form or a query string; anything else is left to be checked."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("should be a JSON object") from None


class Options(BaseModel):
    """What a search may say beside what it searches for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int = Field(DEFAULT_K, description="items on a page")
    offset: int = Field(0, ge=0, description="items to pass over: a reply's next_offset")
    filter: Annotated[dict[str, Any] | None, BeforeValidator(_json_text)] = Field(
        None, description='what items must be like, such as {"brand": ["x"], "price": {"lte": 20}}'
    )
    group_by: str | None = Field(
        None, description=f'an attribute: one item of each value; "{LOOK}": one of those that look alike'
    )
    min_probability: float | None = Field(None, ge=0, le=1, description="find nothing that is less likely the same")

    def check(self, config: ServeConfig) -> Options:
        """Return itself if it is within what the service allows. Raises ApiError."""
        if not 1 <= self.k <= config.max_k:
            raise invalid(f"k is {self.k}; it must be from 1 to {config.max_k}")
        if self.offset + self.k > config.max_k:
            raise invalid(f"offset {self.offset} and k {self.k} reach beyond {config.max_k} items; ask for less")
        return self

    def where(self, schema: pa.Schema) -> str | None:
        """Return the filter in its one form, None for none. Raises ApiError if the items lack what it names."""
        if not self.filter:
            return None
        try:
            return parse_filter(self.filter, schema).text
        except FilterError as error:
            raise invalid(str(error)) from None


class _SearchBody(Options):
    image: str | None = None
    url: str | None = None


class _BatchBody(Options):
    images: list[str]


async def read_search(request: Request, config: ServeConfig, fetcher: Fetcher) -> tuple[bytes, Options]:
    """Return the photo of a search, fetched if a URL names it, and its options. Raises ApiError."""
    kind = _content_type(request, (MULTIPART, JSON, *PICTURES))
    if kind in PICTURES:
        return await request.body(), _validate(Options, request.query_params).check(config)
    _refuse_query(request)
    if kind == JSON:
        body = _parse(_SearchBody, await request.body())
        options = _options(body).check(config)
        if (body.image is None) == (body.url is None):
            raise invalid("image is missing" if body.image is None else "image and url are both given; send one")
        if body.url is not None:
            return await fetcher.fetch(body.url), options
        photo = _decode_base64(body.image or "")
        if isinstance(photo, ApiError):
            raise photo
        return photo, options
    photos, options = await _read_form(request, "photo", config)
    if len(photos) != 1:
        raise invalid(f"{len(photos)} photos; a search takes one, /v1/search/batch takes several")
    return photos[0], options


async def read_batch(request: Request, config: ServeConfig) -> tuple[list[bytes | ApiError], Options]:
    """Return the photos of a batch, an error in the place of one that is not base64, and options. Raises ApiError."""
    kind = _content_type(request, (MULTIPART, JSON))
    _refuse_query(request)
    photos: list[bytes | ApiError]
    if kind == JSON:
        body = _parse(_BatchBody, await request.body())
        photos, options = [_decode_base64(image) for image in body.images], _options(body).check(config)
    else:
        uploads, options = await _read_form(request, "photos", config)
        photos = [*uploads]
    if not 1 <= len(photos) <= config.max_photos:
        raise invalid(f"{len(photos)} photos; a batch takes 1 to {config.max_photos}")
    return photos, options


def read_options(request: Request, config: ServeConfig) -> Options:
    """Return the options of a request that has no body. Raises ApiError."""
    return _validate(Options, request.query_params).check(config)


def request_body(config: ServeConfig, batch: bool = False) -> dict[str, Any]:
    """Return OpenAPI's words for the bodies that `read_search`, or `read_batch`, takes."""
    picture = "JPEG, PNG or WebP"
    file = {"type": "string", "contentMediaType": "application/octet-stream", "description": picture}
    text = {"type": "string", "contentEncoding": "base64", "description": picture}
    content: dict[str, Any] = {
        MULTIPART: {"schema": _schema({"photos" if batch else "photo": file}, config, batch)},
        JSON: {"schema": _schema({"images" if batch else "image": text}, config, batch)},
    }
    described: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    if not batch:
        if config.fetch_hosts:
            by_url = _schema({"url": {"type": "string", "format": "uri", "description": "of the photo"}}, config, False)
            content[JSON]["schema"] = {"oneOf": [content[JSON]["schema"], by_url]}
        content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in PICTURES}
        described["parameters"] = query_parameters(config, "With a bare picture as the body: ")
    return described


def query_parameters(config: ServeConfig, when: str = "") -> list[dict[str, Any]]:
    """Return OpenAPI's words for the options in a query string."""
    described = []
    for name, schema in _option_schemas(config).items():
        parameter = {"name": name, "in": "query", "required": False, "description": when + schema.pop("description")}
        if name == "filter":
            described.append({**parameter, "content": {JSON: {"schema": schema}}})
        else:
            described.append({**parameter, "schema": schema})
    return described


def _option_schemas(config: ServeConfig) -> dict[str, dict[str, Any]]:
    described = {name: field.description for name, field in Options.model_fields.items()}
    shapes: dict[str, dict[str, Any]] = {
        "k": {"type": "integer", "minimum": 1, "maximum": config.max_k, "default": DEFAULT_K},
        "offset": {"type": "integer", "minimum": 0, "maximum": config.max_k - 1, "default": 0},
        "filter": {"type": "object"},
        "group_by": {"type": "string"},
        "min_probability": {"type": "number", "minimum": 0, "maximum": 1},
    }
    return {name: {**shape, "description": described[name]} for name, shape in shapes.items()}


def _schema(photo: Mapping[str, dict[str, Any]], config: ServeConfig, batch: bool) -> dict[str, Any]:
    if batch:
        photo = {
            name: {"type": "array", "items": value, "minItems": 1, "maxItems": config.max_photos}
            for name, value in photo.items()
        }
    properties = {**photo, **_option_schemas(config)}
    return {"type": "object", "properties": properties, "required": list(photo), "additionalProperties": False}


def _options(body: Options) -> Options:
    return Options.model_construct(**{name: getattr(body, name) for name in Options.model_fields})


def _refuse_query(request: Request) -> None:
    for name in request.query_params:  # passed over in silence, it would seem to work
        raise invalid(f"{name} is in the query string; send it as a field of the body, beside the photo")


def _content_type(request: Request, known: tuple[str, ...]) -> str:
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in known:
        raise ApiError(415, "unsupported_media_type", f"content type {found!r}; send {', '.join(known)}")
    return found


async def _read_form(request: Request, field: str, config: ServeConfig) -> tuple[list[bytes], Options]:
    try:
        async with request.form(max_files=config.max_photos + 1, max_fields=16) as form:
            photos = [await _read_upload(part, field) for part in form.getlist(field)]
            if field not in form:
                raise invalid(f"{field} is missing")
            fields = {name: value for name, value in form.items() if name != field}
            return photos, _validate(Options, fields).check(config)
    except HTTPException as error:
        raise invalid(f"the multipart body cannot be read: {error.detail}") from None


async def _read_upload(part: UploadFile | str, field: str) -> bytes:
    if isinstance(part, str):
        raise invalid(f"{field} is text; send it as a file")
    return await part.read()


def _validate(model: type[Body], fields: Mapping[str, Any]) -> Body:
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        raise invalid(sentence(error.errors())) from None


def _parse(model: type[Body], body: bytes) -> Body:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(sentence(error.errors())) from None


def _decode_base64(text: str) -> bytes | ApiError:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return unreadable("not base64")
