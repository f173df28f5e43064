"""The HTTP side: routes, the shape of every error, and what the OpenAPI page says."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mixer_platform.config import ServeConfig
from mixer_platform.serve.errors import ApiError, invalid, sentence, unavailable
from mixer_platform.serve.payload import (
    DEFAULT_K,
    BodyLimit,
    check_k,
    k_schema,
    read_batch,
    read_search,
    request_body,
)
from mixer_platform.serve.schemas import BatchReply, ErrorDetail, ErrorReply, PhotoItems, SearchReply, Status
from mixer_platform.serve.service import SearchService

Responses = dict[int | str, dict[str, Any]]
_INVALID: Responses = {422: {"model": ErrorReply, "description": "Something in the request is wrong"}}
_UNAVAILABLE: Responses = {503: {"model": ErrorReply, "description": "Not now; Retry-After says when to try again"}}
_UNKNOWN: Responses = {404: {"model": ErrorReply, "description": "No such item"}}
_BODY: Responses = {
    413: {"model": ErrorReply, "description": "The body is too large"},
    415: {"model": ErrorReply, "description": "Neither multipart nor JSON"},
}


def create_api(service: SearchService, config: ServeConfig) -> FastAPI:
    """Return the HTTP API over `service`."""
    api = FastAPI(title="Mixer", description="Visual search: a photo in, similar items out.", version="1")
    api.add_middleware(BodyLimit, max_bytes=int(config.max_body_mb * 1e6))
    _add_error_handlers(api)
    any_k = Query(DEFAULT_K, json_schema_extra=k_schema(config))
    served = {"model": service.index.model, "index": service.index.version}

    @api.post("/v1/search", responses=_INVALID | _BODY | _UNAVAILABLE, openapi_extra=request_body(config))
    async def search(request: Request) -> SearchReply:
        """Find the items that look like a photo."""
        photo, k = await read_search(request, config)
        (items,), timings = await service.search([photo], k)
        if isinstance(items, ApiError):
            raise items
        return SearchReply(items=items, timings_ms=timings, **served)

    @api.post("/v1/search/batch", responses=_INVALID | _BODY | _UNAVAILABLE, openapi_extra=request_body(config, True))
    async def search_batch(request: Request) -> BatchReply:
        """Search for several photos; one that cannot be used gets an error in its place."""
        photos, k = await read_batch(request, config)
        found, timings = await service.search(photos, k)
        results = [_error(request, each) if isinstance(each, ApiError) else PhotoItems(items=each) for each in found]
        return BatchReply(results=results, timings_ms=timings, **served)

    @api.get("/v1/items/{item_id:path}/similar", responses=_INVALID | _UNKNOWN | _UNAVAILABLE)
    async def similar(item_id: str, k: int = any_k) -> SearchReply:
        """Find the items that are like an item; the item itself is left out."""
        items, timings = await service.similar(item_id, check_k(k, config))
        return SearchReply(items=items, timings_ms=timings, **served)

    @api.get("/healthz")
    async def healthz() -> Status:
        """Say that the process lives."""
        return Status()

    @api.get("/readyz", responses=_UNAVAILABLE)
    async def readyz() -> Status:
        """Say whether the encoder and every shard answer."""
        missing = await service.unready()
        if missing:
            raise unavailable(f"not ready: {', '.join(missing)}", code="not_ready")
        return Status()

    return api


def _add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def expected(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(_error(request, error).model_dump(), error.status, error.headers)

    @api.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return await expected(request, invalid(sentence(error.errors())))

    @api.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> JSONResponse:
        code = str(error.detail).lower().replace(" ", "_")
        message = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
        return await expected(request, ApiError(error.status_code, code, message, error.headers))

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return await expected(request, ApiError(500, "internal", "the server failed; its log has this request's id"))


def _error(request: Request, error: ApiError) -> ErrorReply:
    request_id = request.headers.get("x-request-id") or uuid.uuid4().hex  # Serve's proxy gives every request one
    return ErrorReply(error=ErrorDetail(code=error.code, message=error.message, request_id=request_id))
