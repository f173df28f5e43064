"""The deployments: `Ingress` answers over HTTP; where shards are not beside it, `Backends` brings up what it asks."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview

from mixer_platform.config import RunConfig
from mixer_platform.errors import MixerError
from mixer_platform.serve.api import create_api
from mixer_platform.serve.canary import Canary
from mixer_platform.serve.engine import Engine
from mixer_platform.serve.errors import ApiError
from mixer_platform.serve.keys import key_ring
from mixer_platform.serve.loading import backend_name, calibrated, open_beside, open_deployed, wished
from mixer_platform.serve.logs import join_serve_log
from mixer_platform.serve.parts import ENCODER
from mixer_platform.serve.service import SearchService
from mixer_platform.serve.swap import Swapper, check
from mixer_platform.serve.tracing import trace_replica

HOLD_S = 1.0
STATUS_S = 10.0  # Serve takes a tenth of a second of a core to say how all is

log = logging.getLogger(__name__)


@serve.ingress()
class Ingress:
    """The HTTP side, and with shards beside it all of the service."""

    async def __init__(self, config: RunConfig, version: str, beside: bool, backends: Any = None) -> None:  # type: ignore[misc]
        """Open and check the index version. `backends`: the handle of `Backends`. Raises MixerError."""
        join_serve_log()
        trace_replica(config.serve)
        self._config, self._beside, self._ring = config, beside, key_ring(config.serve, os.environ)
        self._canary, self._encoders = Canary(config), 1
        engine = await self._first(version)
        self._swapper = Swapper(engine, wished(config), self._load, calibrated(config), self._canary)
        self._service = SearchService(self._swapper, config.serve)
        if backends is not None:
            self._holding = asyncio.create_task(self._hold(backends))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._service, self._config, self._ring, self._canary)

    async def _first(self, deployed: str) -> Engine:
        """Open what is wished now; what was when this was deployed, maybe long ago, where that cannot be served."""
        wish = await asyncio.to_thread(wished(self._config)) if self._config.serve.follow_s else deployed
        try:
            return await self._opened(wish)
        except (MixerError, ApiError) as error:
            if wish == deployed:
                raise
            log.warning("index %s cannot be served, %s is opened: %s", wish, deployed, error)
            return await self._opened(deployed)

    async def _opened(self, version: str) -> Engine:
        engine = await self._load(version)
        await check(engine, self._canary)
        return engine

    async def _load(self, version: str) -> Engine:
        if self._beside:
            return await asyncio.to_thread(open_beside, self._config, version)
        return await open_deployed(self._config, version, lambda: self._encoders)

    async def _hold(self, backends: DeploymentHandle) -> None:
        """Say again and again which version is asked here, so that it stays; hear how many encoders it has."""
        while True:
            with suppress(Exception):  # whatever it is: what is asked must not be taken down for want of a word
                self._encoders = await backends.hold.remote(self._swapper.engine.index.version)
            await asyncio.sleep(HOLD_S)


class Backends:
    """Keeps a Serve application of encoder and shards for the wished version, and for those that are asked."""

    def __init__(self, config: RunConfig, version: str) -> None:
        """`version`: the one to serve where none is followed."""
        join_serve_log()
        self._config, self._place = config, serve.get_replica_context()
        self._wished = wished(config) if config.serve.follow_s else lambda: version
        self._held: dict[str, float] = {}  # when a version was last wished or asked
        self._encoders: dict[str, int] = {}
        self._settled, self._looked = "", 0.0  # the version that alone was there, when last looked
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def hold(self, version: str) -> int:
        """Let the deployments of a version stay for another while; return how many encoders it has."""
        self._held[version] = time.monotonic()
        return self._encoders.get(version, 1)

    async def _follow(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.look)
            except Exception as error:  # whatever it is: who follows must not stop
                log.warning("deployments of the wished index: %r", error)
            await asyncio.sleep(self._config.serve.follow_s or 2.0)

    def look(self) -> None:
        """Bring up what is wished, take down what has not been for a while."""
        from mixer_platform.serve.app import backend

        version = self._wished()
        name, now = backend_name(version), time.monotonic()
        if version == self._settled and now - self._looked < STATUS_S:
            return
        running = serve.status().applications
        here = running.get(self._place.app_name)
        if here is None or self._place.deployment not in here.deployments:
            return  # what is being taken down brings nothing up
        self._looked, self._settled = now, ""
        self._encoders = {each.removeprefix(backend_name("")): encoders(one) for each, one in running.items()}
        if name in running and running[name].status == "DEPLOY_FAILED":
            if now - self._held.get(version, 0) > self._config.serve.retire_s:  # time to read why, and to mend it
                serve.delete(name, _blocking=False)  # the next look brings it up anew
                self._held[version] = now
            return
        if name not in running:
            serve.run_many(
                [serve.RunTarget(backend(self._config, version), name, route_prefix=None)],
                wait_for_applications_running=False,
            )
        self._held[version] = now
        others = [each for each in running if each.startswith(backend_name("")) and each != name]
        if name in running and running[name].status == "RUNNING" and not others:
            self._settled = version
        for old in others:
            held = self._held.setdefault(old.removeprefix(backend_name("")), now)
            if now - held > self._config.serve.retire_s:
                serve.delete(old, _blocking=False)


def encoders(application: ApplicationStatusOverview) -> int:
    """Return how many replicas of the encoder an application has."""
    deployment = application.deployments.get(ENCODER)
    return deployment.replica_states.get("RUNNING", 0) if deployment else 0


class Backend:
    """The root of an index version's application: it holds encoder and shards together."""

    def __init__(self, *parts: object) -> None:
        pass
