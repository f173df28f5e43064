"""Every request that has ended is counted, written down and traced, whatever became of it."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixer_platform.serve.logs import RequestLog
from mixer_platform.serve.metrics import Metrics, Searched
from mixer_platform.serve.tracing import trace_request

GONE = 499  # the client went away before it had an answer
FAILED = 500  # what no handler knew: whoever is around this one answers
NO_ROUTE = "none"  # refused before one was found, or there is none: never the path, which could be any
PROBES = ("/healthz", "/readyz")


class Watch:
    """ASGI middleware. Add it last: what is added last sees a request first, and those that others refuse too."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log_share: float = 1.0) -> None:
        self.app, self._metrics, self._log, self._log_share = app, metrics, RequestLog(), log_share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), FAILED

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        except asyncio.CancelledError:
            status = GONE
            raise
        finally:
            self._tell(scope, status, 1000 * (time.perf_counter() - began))

    def _tell(self, scope: Scope, status: int, total_ms: float) -> None:
        state: dict[str, Any] = scope.get("state", {})
        searched: Searched | None = state.get("searched")
        route = getattr(scope.get("route"), "path", NO_ROUTE)
        self._metrics.request(route, status, total_ms, searched)
        trace_id = trace_request(searched)
        if status < 400 and (route in PROBES or random.random() >= self._log_share):
            return
        fields: dict[str, Any] = {
            "request_id": Headers(scope=scope).get("x-request-id"),
            "trace_id": trace_id,
            "method": scope["method"],
            "route": route,
            "client": state.get("client"),
            "code": state.get("code"),
            "total_ms": round(total_ms, 3),
        }
        if searched:
            fields |= {f"{part}_ms": round(took_ms, 3) for part, took_ms in searched.parts_ms.items()}
            fields |= {
                "k": searched.k,
                "queries": len(searched.rankings),
                "index": searched.index.version,
                "model": searched.index.model,
                "missing_shards": searched.missing_shards or None,
            }
        self._log(scope["method"], scope["path"], status, fields)
