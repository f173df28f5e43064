"""The HTTP side: routes, the shape of every error, and what the OpenAPI page says."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mixer_platform.config import RunConfig
from mixer_platform.serve.caching import cached
from mixer_platform.serve.canary import Canary
from mixer_platform.serve.engine import Engine, Ranking
from mixer_platform.serve.errors import ApiError, error_reply, error_response, invalid, sentence, unavailable
from mixer_platform.serve.fetch import Fetcher
from mixer_platform.serve.keys import KeyRing, Keys, add_guards
from mixer_platform.serve.metrics import Metrics, Searched
from mixer_platform.serve.page import add_page
from mixer_platform.serve.payload import (
    BodyLimit,
    Options,
    query_parameters,
    read_batch,
    read_options,
    read_search,
    request_body,
)
from mixer_platform.serve.pictures import CACHE_CONTROL, MEDIA_TYPE, thumbnail
from mixer_platform.serve.schemas import (
    AttributesReply,
    BatchReply,
    ErrorReply,
    ItemDetails,
    Page,
    SearchReply,
    Status,
    StatusReply,
)
from mixer_platform.serve.service import SearchService, timings, until_expired
from mixer_platform.serve.watch import Watch
from mixer_platform.storage import open_storage

Responses = dict[int | str, dict[str, Any]]
_INVALID: Responses = {422: {"model": ErrorReply, "description": "Something in the request is wrong"}}
_UNAVAILABLE: Responses = {503: {"model": ErrorReply, "description": "Not now; Retry-After says when to try again"}}
_UNKNOWN: Responses = {404: {"model": ErrorReply, "description": "No such item"}}
_BODY: Responses = {
    413: {"model": ErrorReply, "description": "The body is too large"},
    415: {"model": ErrorReply, "description": "A body of another type"},
}
_PICTURE: Responses = {200: {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}}
# FastAPI's own spans would stand beside Serve's and not below them, with what callers filter by in plain sight.
_NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}
PAINTERS = 2
KEYS_S = 10.0  # from look to look at serve.keys_file where serve.follow_s is 0
TIMEOUT_HEADER = "x-request-timeout-ms"
PROBE_S = 2.0


def create_api(
    service: SearchService, run: RunConfig, ring: KeyRing | None = None, canary: Canary | None = None
) -> FastAPI:
    """Return the HTTP API over `service`; with a `ring`, for those who have one of its keys.

    With a `canary`, known photos are searched for as often as the configuration says.
    """
    config, metrics = run.serve, Metrics()
    service.batcher.observe, service.swapper.observe = metrics.batch, metrics.swap
    fetcher, root = Fetcher(config), open_storage(run.data).uri
    keys = None if ring is None else Keys(ring)
    painters = ThreadPoolExecutor(PAINTERS, "pictures")  # few: catalogue pictures may be large

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(metrics.follow(service))]
        if config.follow_s:
            tasks.append(asyncio.create_task(service.swapper.follow(config.follow_s)))
        if keys and config.keys_file:  # a key is revoked even where the version stays
            tasks.append(asyncio.create_task(keys.follow(config.keys_file, config.follow_s or KEYS_S)))
        if canary and config.canary_s:
            tasks.append(asyncio.create_task(canary.follow(service, config.canary_s, metrics.canary)))
        yield
        for task in tasks:
            task.cancel()
        await fetcher.close()

    api = FastAPI(
        title="Mixer",
        description="Visual search: a photo in, similar items out.",
        version="1",
        lifespan=lifespan,
        telemetry=_NO_TELEMETRY,
    )
    api.add_middleware(BodyLimit, max_bytes=int(config.max_body_mb * 1e6))
    _add_error_handlers(api)
    options_in_query = {"parameters": query_parameters(config)}

    def expires(request: Request) -> float:
        asked = request.headers.get(TIMEOUT_HEADER)
        try:
            allowed = config.timeout_ms if asked is None else min(float(asked), config.timeout_ms)
            if math.isnan(allowed):  # no time is later than it
                raise ValueError
        except ValueError:
            raise invalid(f"{TIMEOUT_HEADER} is {asked!r}; send a number of milliseconds") from None
        return time.time() + allowed / 1000

    @api.post(
        "/v1/search",
        response_model=SearchReply,
        responses=_INVALID | _BODY | _UNAVAILABLE,
        openapi_extra=request_body(config),
    )
    async def search(request: Request) -> Response:
        """Find the items that look like a photo."""
        began, until = time.time(), expires(request)
        service.batcher.refuse_if_full()  # before the body is read, parsed and held
        async with until_expired(until):
            photo, options = await read_search(request, config, fetcher)
        (answer,) = await service.search([photo], options, until)
        if isinstance(answer, ApiError):
            raise answer
        page, ranking = answer
        return _json(_reply(SearchReply, request, options, ranking.engine, [ranking], began, **_fields(page)))

    @api.post(
        "/v1/search/batch",
        response_model=BatchReply,
        responses=_INVALID | _BODY | _UNAVAILABLE,
        openapi_extra=request_body(config, batch=True),
    )
    async def search_batch(request: Request) -> Response:
        """Search for several photos; one that cannot be used gets an error in its place."""
        began, until = time.time(), expires(request)
        service.batcher.refuse_if_full()
        async with until_expired(until):
            photos, options = await read_batch(request, config)
        answers = await service.search(photos, options, until)
        results = [error_reply(each, request.headers) if isinstance(each, ApiError) else each[0] for each in answers]
        rankings = [each[1] for each in answers if not isinstance(each, ApiError)]
        engine = rankings[0].engine if rankings else service.engine
        return _json(_reply(BatchReply, request, options, engine, rankings, began, results=results))

    @api.get(
        "/v1/items/{item_id:path}/similar",
        response_model=SearchReply,
        responses=_INVALID | _UNKNOWN | _UNAVAILABLE,
        openapi_extra=options_in_query,
    )
    async def similar(request: Request, item_id: str) -> Response:
        """Find the items that are like an item; the item itself is left out."""
        began, until = time.time(), expires(request)
        options = read_options(request, config)
        page, ranking = await service.similar(item_id, options, until)
        return _json(_reply(SearchReply, request, options, ranking.engine, [ranking], began, **_fields(page)))

    @api.get(
        "/v1/items/{item_id:path}/image",
        response_class=Response,
        responses=_PICTURE | _INVALID | _UNKNOWN | _UNAVAILABLE,
    )
    async def image(request: Request, item_id: str) -> Response:
        """Show an item's picture, small."""
        until = expires(request)
        row = await service.item(item_id, until)
        async with until_expired(until):  # a slow storage must not fill the replica with those who wait
            made = asyncio.get_running_loop().run_in_executor(painters, thumbnail, row.get("image"), root)
            content = await made
        return cached(request, content, MEDIA_TYPE, CACHE_CONTROL)

    @api.get("/v1/items/{item_id:path}", responses=_INVALID | _UNKNOWN | _UNAVAILABLE)
    async def item(request: Request, item_id: str) -> ItemDetails:
        """Show an item."""
        return ItemDetails.from_row(await service.item(item_id, expires(request)))

    @api.get("/v1/attributes")
    async def attributes() -> AttributesReply:
        """List the columns that a filter may name, and what they hold."""
        return AttributesReply(attributes=service.engine.attributes)

    @api.get("/v1/status")
    async def status() -> StatusReply:
        """Say which version answers in this replica, and how the last try to bring in another one ended."""
        index, swapper = service.engine.index, service.swapper
        return StatusReply(
            model=index.model,
            index=index.version,
            items=index.items,
            shards=len(index.shards),
            calibrated=service.engine.calibration is not None,
            max_k=config.max_k,
            waiting=service.batcher.waiting,
            loading=swapper.loading,
            last_swap=swapper.last_swap,
        )

    @api.get("/healthz")
    async def healthz() -> Status:
        """Say that the process lives."""
        return Status()

    @api.get("/readyz", responses=_UNAVAILABLE)
    async def readyz() -> Status:
        """Say whether the encoder and every shard answer."""
        missing = await service.engine.unready(time.time() + PROBE_S)
        if missing:
            raise unavailable(f"not ready: {', '.join(missing)}", code="not_ready")
        return Status()

    add_page(api)
    add_guards(api, keys, config.cors_origins)
    api.add_middleware(Watch, metrics=metrics, log_share=config.log_share)
    return api


def _fields(page: Page) -> dict[str, Any]:
    return {"items": page.items, "next_offset": page.next_offset, "nothing_similar": page.nothing_similar}


def _reply(
    kind: type[BaseModel],
    request: Request,
    options: Options,
    engine: Engine,
    rankings: list[Ranking],
    began: float,
    **fields: Any,
) -> BaseModel:
    searched = request.state.searched = Searched(engine.index, options.k, rankings)
    missing = searched.missing_shards
    return kind.model_construct(
        model=engine.index.model,
        index=engine.index.version,
        timings_ms=timings(rankings, began),
        degraded=bool(missing),
        missing_shards=missing,
        **fields,
    )


def _json(reply: BaseModel) -> Response:
    """Write a reply that was made here, so needs no check, at a tenth of the time that FastAPI takes to check it."""
    return Response(reply.model_dump_json(), media_type="application/json")


def _add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def expected(request: Request, error: ApiError) -> JSONResponse:
        request.state.code = error.code
        return error_response(error, request.headers)

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
