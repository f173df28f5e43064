"""Which version answers: the one that CURRENT names, once it is loaded, warm and checked; until then the one before."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import numpy as np

from mixer.calibration import Calibration
from mixer_platform.errors import MixerError
from mixer_platform.serve.canary import Canary
from mixer_platform.serve.engine import Engine, Query, Ranking
from mixer_platform.serve.schemas import Swap

CHECK_SECONDS = 60.0
CHECKED_K = 10

log = logging.getLogger(__name__)


class Swapper:
    """Holds the engine that answers, and replaces it by the one of the wished version when that is ready."""

    def __init__(
        self,
        engine: Engine,
        wished: Callable[[], str],
        load: Callable[[str], Awaitable[Engine]],
        calibrated: Callable[[str], Calibration | None],
        canary: Canary | None = None,
    ) -> None:
        """`wished` reads the version to serve, `load` opens it, `calibrated` reads what a model's scores are worth.

        The first and the last may block. All raise MixerError. A version that fails the `canary` does not come in.
        """
        self.engine = engine
        self.observe: Callable[[Swap], None] = lambda swap: None
        self.loading: str | None = None
        self.last_swap: Swap | None = None
        self._wished, self._load, self._calibrated, self._canary = wished, load, calibrated, canary

    async def follow(self, every_s: float) -> None:
        """Look every `every_s` seconds, for ever, whether another version is wished."""
        while True:
            await asyncio.sleep(every_s)
            await self.look()

    async def look(self) -> None:
        """Bring in the wished version if it is not the one that answers. What fails is told and tried again."""
        try:
            version = await asyncio.to_thread(self._wished)
        except Exception as error:  # whatever it is, here and below: who follows must not stop
            log.warning("which index to serve cannot be read: %s", error)
            return
        if version == self.engine.index.version:
            return await self._refresh()
        began, self.loading, before = time.time(), version, self.engine.index.version
        reason: str | None = None
        try:
            engine = await self._load(version)
            await check(engine, self._canary)
        except Exception as error:
            reason = str(error) or type(error).__name__
            if self.last_swap is None or (self.last_swap.version, self.last_swap.error) != (version, reason):
                log.warning("index %s stays: %s cannot be served: %s", before, version, reason)
        else:
            self.engine = engine  # in one step; what is being answered keeps the engine it began with
            log.info("index %s now answers, in the place of %s", version, before)
        finally:
            self.loading = None
        self.last_swap = Swap(
            version=version,
            replaces=before,
            ended_ms=int(1000 * time.time()),
            seconds=time.time() - began,
            error=reason,
        )
        self.observe(self.last_swap)

    async def _refresh(self) -> None:
        """Look at what may change of the version that answers."""
        try:
            # A model is evaluated once it is served: what its scores are worth comes later, and may be told anew.
            self.engine.calibration = await asyncio.to_thread(self._calibrated, self.engine.index.model)
        except Exception as error:
            log.warning("index %s: %s", self.engine.index.version, error)


async def check(engine: Engine, canary: Canary | None = None) -> None:
    """Warm an engine up and see that it answers, and finds what it is known to. Raises ApiError and MixerError."""
    expires = time.time() + CHECK_SECONDS
    await engine.describe(expires)
    grey = test_photo()
    results = await engine.answer([Query(grey, None, CHECKED_K, None, expires) for _ in range(2)])
    for result in results:
        if not isinstance(result, Ranking):
            raise result
        expected = min(CHECKED_K, engine.index.items)
        if len(result.ids) < expected or not np.isfinite(result.scores).all():
            raise MixerError(
                f"index {engine.index.version}: a search for {CHECKED_K} items found {len(result.ids)} of "
                f"{engine.index.items}; verify it with jobs/index.py verify"
            )
        if result.missing_shards:
            raise MixerError(f"index {engine.index.version}: {', '.join(result.missing_shards)} do not answer")
    if canary:
        await canary.check(engine, expires)


def test_photo() -> bytes:
    """Return a JPEG to warm up with: a picture of nothing."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").save(file, "JPEG")
    return file.getvalue()
