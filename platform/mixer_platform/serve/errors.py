"""Errors that a client of the HTTP API sees: a status, a code for programs and one sentence for people."""

from __future__ import annotations

import reprlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from mixer_platform.serve.schemas import ErrorDetail, ErrorReply

RETRY_AFTER_S = 1
UNAVAILABLE = "unavailable"


class ApiError(Exception):
    """A request that gets no result. `headers` are added to the reply."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def __reduce__(self) -> tuple[type[ApiError], tuple[Any, ...]]:  # it travels from deployment to deployment
        return type(self), (self.status, self.code, self.message, self.headers)


def invalid(message: str) -> ApiError:
    """The request is understood and wrong."""
    return ApiError(422, "invalid_request", message)


def unreadable(reason: str) -> ApiError:
    """A photo cannot be used, for `reason`."""
    return ApiError(422, "unreadable_image", f"the photo cannot be used: {reason}")


def unavailable(message: str, code: str = UNAVAILABLE) -> ApiError:
    """Not now, but soon: the reply says when to try again."""
    return ApiError(503, code, message, {"Retry-After": str(RETRY_AFTER_S)})


def error_reply(error: ApiError, headers: Headers) -> ErrorReply:
    """Return what a client reads of an error; `headers`: the request's."""
    request_id = headers.get("x-request-id") or uuid.uuid4().hex  # Serve's proxy gives every request one
    return ErrorReply(error=ErrorDetail(code=error.code, message=error.message, request_id=request_id))


def error_response(error: ApiError, headers: Headers) -> JSONResponse:
    """Return the reply to a request that ended in an error; `headers`: the request's."""
    return JSONResponse(error_reply(error, headers).model_dump(), error.status, error.headers)


def late() -> ApiError:
    """The reply would have come after the request's deadline."""
    return unavailable("no answer within the time that the request allowed; try again", code="deadline_exceeded")


def sentence(errors: Sequence[Any]) -> str:
    """Say the first of pydantic's validation errors as one sentence that names the field."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or "the body"
    if first["type"] == "missing":
        return f"{field} is missing"
    if first["type"] == "extra_forbidden":
        return f"{field} is not a known field"
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']}"
    said = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{field} {said}, found {reprlib.repr(first['input'])}"
