"""Applications over HTTP, on free ports of this machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from mixer_platform.serve.api import create_api
from mixer_platform.serve.keys import KeyRing
from mixer_platform.serve.loading import calibrated, open_beside
from mixer_platform.serve.service import SearchService
from mixer_platform.serve.swap import Swapper, check


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve an ASGI application on a free port; yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=0))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.005)
        assert thread.is_alive(), "the server did not start"
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def create_service(workspace: Any, ring: KeyRing | None = None) -> FastAPI:
    """The service itself over a test's workspace, its parts beside it."""
    engine = open_beside(workspace.config, "index-a")
    swapper = Swapper(engine, lambda: "index-a", None, calibrated(workspace.config))  # type: ignore[arg-type]
    asyncio.run(check(engine))
    return create_api(SearchService(swapper, workspace.config.serve), workspace.config, ring)


@contextmanager
def service(workspace: Any, ring: KeyRing | None = None) -> Iterator[str]:
    """Serve it; yield its URL."""
    with running(create_service(workspace, ring)) as url:
        yield url
