"""Read photos and k out of requests: multipart or JSON, never more bytes than allowed."""

from __future__ import annotations

import base64
import binascii
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixer_platform.config import ServeConfig
from mixer_platform.serve.errors import ApiError, invalid, sentence, unreadable

DEFAULT_K = 10
JSON, MULTIPART = "application/json", "multipart/form-data"
Body = TypeVar("Body", bound=BaseModel)


class BodyLimit:
    """ASGI middleware: 413 for a body above `max_bytes`, counted while it is read and not after."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        announced = int(dict(scope.get("headers", ())).get(b"content-length", b"0"))
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = {} if announced > self.max_bytes else await receive()
            seen += len(message.get("body", b""))
            if max(seen, announced) > self.max_bytes:
                raise ApiError(413, "body_too_large", f"the body is above {self.max_bytes / 1e6:g} MB; send less")
            return message

        await self.app(scope, limited, send)


class _SearchBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    image: str
    k: int = DEFAULT_K


class _BatchBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    images: list[str]
    k: int = DEFAULT_K


class _FormFields(BaseModel):
    model_config = ConfigDict(extra="forbid")

    k: int = DEFAULT_K


async def read_search(request: Request, config: ServeConfig) -> tuple[bytes, int]:
    """Return the photo and k of a search. Raises ApiError."""
    _refuse_query(request)
    if _content_type(request) == JSON:
        body = _parse(_SearchBody, await request.body())
        photo = _decode_base64(body.image)
        if isinstance(photo, ApiError):
            raise photo
        return photo, check_k(body.k, config)
    photos, k = await _read_form(request, "photo")
    if len(photos) != 1:
        raise invalid(f"{len(photos)} photos; a search takes one, /v1/search/batch takes several")
    return photos[0], check_k(k, config)


async def read_batch(request: Request, config: ServeConfig) -> tuple[list[bytes | ApiError], int]:
    """Return the photos of a batch, an error in the place of one that is not base64, and k. Raises ApiError."""
    _refuse_query(request)
    photos: list[bytes | ApiError]
    if _content_type(request) == JSON:
        body = _parse(_BatchBody, await request.body())
        photos, k = [_decode_base64(image) for image in body.images], body.k
    else:
        uploads, k = await _read_form(request, "photos")
        photos = [*uploads]
    if not 1 <= len(photos) <= config.max_photos:
        raise invalid(f"{len(photos)} photos; a batch takes 1 to {config.max_photos}")
    return photos, check_k(k, config)


def check_k(k: int, config: ServeConfig) -> int:
    """Return k if it is allowed. Raises ApiError."""
    if not 1 <= k <= config.max_k:
        raise invalid(f"k is {k}; it must be from 1 to {config.max_k}")
    return k


def request_body(config: ServeConfig, batch: bool = False) -> dict[str, Any]:
    """Return OpenAPI's words for the bodies that `read_search`, or `read_batch`, takes."""
    picture = "JPEG, PNG or WebP"
    file = {"type": "string", "contentMediaType": "application/octet-stream", "description": picture}
    text = {"type": "string", "contentEncoding": "base64", "description": picture}
    return {
        "requestBody": {
            "required": True,
            "content": {
                MULTIPART: {"schema": _schema("photos" if batch else "photo", file, config, batch)},
                JSON: {"schema": _schema("images" if batch else "image", text, config, batch)},
            },
        }
    }


def k_schema(config: ServeConfig) -> dict[str, Any]:
    """Return the JSON schema of k."""
    return {"type": "integer", "minimum": 1, "maximum": config.max_k, "default": DEFAULT_K}


def _schema(name: str, value: dict[str, Any], config: ServeConfig, batch: bool) -> dict[str, Any]:
    if batch:
        value = {"type": "array", "items": value, "minItems": 1, "maxItems": config.max_photos}
    properties = {name: value, "k": k_schema(config)}
    return {"type": "object", "properties": properties, "required": [name], "additionalProperties": False}


def _refuse_query(request: Request) -> None:
    for name in request.query_params:  # passed over in silence, it would seem to work
        raise invalid(f"{name} is in the query string; send it as a field of the body, beside the photo")


def _content_type(request: Request) -> str:
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in (JSON, MULTIPART):
        raise ApiError(415, "unsupported_media_type", f"content type {found!r}; send {MULTIPART} or {JSON}")
    return found


async def _read_form(request: Request, field: str) -> tuple[list[bytes], int]:
    try:
        async with request.form() as form:
            photos = [await _read_upload(part, field) for part in form.getlist(field)]
            return photos, _parse_fields(form, field)
    except HTTPException as error:
        raise invalid(f"the multipart body cannot be read: {error.detail}") from None


async def _read_upload(part: UploadFile | str, field: str) -> bytes:
    if isinstance(part, str):
        raise invalid(f"{field} is text; send it as a file")
    return await part.read()


def _parse_fields(form: FormData, field: str) -> int:
    if field not in form:
        raise invalid(f"{field} is missing")
    try:
        return _FormFields.model_validate({name: value for name, value in form.items() if name != field}).k
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
