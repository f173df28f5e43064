"""Replies that a browser may keep, and asks about again with the ETag it was given."""

from __future__ import annotations

import hashlib

from starlette.requests import Request
from starlette.responses import Response


def cached(request: Request, content: bytes, media_type: str, cache_control: str) -> Response:
    """Return `content` with an ETag made of it, or 304 without a body where the client has just that."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": cache_control, "X-Content-Type-Options": "nosniff"}
    known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    if known & {tag, "*"}:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
