"""Errors that a client of the HTTP API sees: a status, a code for programs and one sentence for people."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

RETRY_AFTER_S = 1


class ApiError(Exception):
    """A request that gets no result. `headers` are added to the reply."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


def invalid(message: str) -> ApiError:
    """The request is understood and wrong."""
    return ApiError(422, "invalid_request", message)


def unreadable(reason: str) -> ApiError:
    """A photo cannot be used, for `reason`."""
    return ApiError(422, "unreadable_image", f"the photo cannot be used: {reason}")


def unavailable(message: str, code: str = "unavailable") -> ApiError:
    """Not now, but soon: the reply says when to try again."""
    return ApiError(503, code, message, {"Retry-After": str(RETRY_AFTER_S)})


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
    return f"{field} {first['msg'].removeprefix('Input ')}, found {reprlib.repr(first['input'])}"
