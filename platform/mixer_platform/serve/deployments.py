"""The deployments: `Ingress` answers over HTTP; where shards are not beside it, `Backends` brings up what it asks."""

from __future__ import annotations

import asyncio
import logging
import os
import time

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from mixer_platform.config import RunConfig
from mixer_platform.errors import MixerError
from mixer_platform.serve.api import create_api
from mixer_platform.serve.engine import Engine
from mixer_platform.serve.keys import key_ring
from mixer_platform.serve.loading import backend_name, calibrated, is_running, open_beside, open_deployed, wished
from mixer_platform.serve.service import SearchService
from mixer_platform.serve.swap import Swapper, check

log = logging.getLogger(__name__)


@serve.ingress()
class Ingress:
    """The HTTP side, and with shards beside it all of the service."""

    async def __init__(self, config: RunConfig, version: str, beside: bool, backends: object = None) -> None:  # type: ignore[misc]
        """Open and check the index version. Raises MixerError."""
        self._config, self._beside, self._ring = config, beside, key_ring(config.serve, os.environ)
        engine = await self._load(version)
        await check(engine)
        self._swapper = Swapper(engine, wished(config), self._load, calibrated(config))
        self._service = SearchService(self._swapper, config.serve, None if beside else self._batches)
        self._encoders = 1

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._service, self._config, self._ring)

    async def _load(self, version: str) -> Engine:
        if self._beside:
            return await asyncio.to_thread(open_beside, self._config, version)
        return await open_deployed(self._config, version)

    def _batches(self) -> int:
        return self._config.serve.concurrent_batches


class Backends:
    """Keeps a Serve application of encoder and shards for the wished version, and for a while the one before."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._wished = config, wished(config)
        self._since: dict[str, float] = {}  # when a version was last wished
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.look)
            except (MixerError, RayServeException, RayError, ValueError) as error:
                log.warning("deployments of the wished index: %s", error)
            await asyncio.sleep(self._config.serve.follow_s or 2.0)

    def look(self) -> None:
        """Bring up what is wished, take down what has not been for a while."""
        from mixer_platform.serve.app import backend

        version = self._wished()
        name, now = backend_name(version), time.monotonic()
        running = serve.status().applications
        if name not in running:
            serve.run_many(
                [serve.RunTarget(backend(self._config, version), name, route_prefix=None)],
                wait_for_applications_running=False,
            )
        self._since[version] = now
        if not is_running(name):
            return
        for old in [each for each in running if each.startswith(backend_name("")) and each != name]:
            since = self._since.setdefault(old.removeprefix(backend_name("")), now)
            if now - since > self._config.serve.retire_s:
                serve.delete(old, _blocking=False)


class Backend:
    """The root of an index version's application: it holds encoder and shards together."""

    def __init__(self, *parts: object) -> None:
        pass
