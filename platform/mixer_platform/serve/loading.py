"""Open the engine of an index version: its parts in this process, or as deployments of their own."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable

from ray import serve
from ray.serve.handle import DeploymentHandle

from mixer.calibration import Calibration
from mixer.embedder import QUERY_GRAPH, SETTINGS
from mixer_platform import gallery, versions
from mixer_platform.config import RunConfig
from mixer_platform.errors import MixerError, StorageError, VersionError
from mixer_platform.gallery import IndexManifest, check_model, current_version, read_calibration, read_manifest
from mixer_platform.serve.engine import Engine
from mixer_platform.serve.parts import ENCODER, MODELS, Beside, Deployed, Parts, QueryEncoder, ShardSearch
from mixer_platform.storage import Storage, open_storage

APPLICATION = "mixer"
START_TIMEOUT_S = 600.0
LOOK_S = 0.2
_FLOAT32 = 4

log = logging.getLogger(__name__)


def wished(config: RunConfig) -> Callable[[], str]:
    """Return what reads the index version to serve: CURRENT, or the one that the configuration names."""
    storage = open_storage(config.workspace)
    return (lambda: current_version(storage)) if config.serve.index == "current" else (lambda: config.serve.index)


def calibrated(config: RunConfig) -> Callable[[str], Calibration | None]:
    """Return what reads the calibration of a model's scores."""
    storage = open_storage(config.workspace)
    return lambda model: read_calibration(storage, model)


def are_beside(config: RunConfig, manifest: IndexManifest) -> bool:
    """Return whether the shards are searched in the process of the encoder."""
    if config.serve.layout != "auto":
        return config.serve.layout == "beside"
    return manifest.items * (manifest.bytes_per_vector or _FLOAT32 * manifest.dim) <= config.serve.beside


def backend_name(version: str) -> str:
    """Return the name of the Serve application that holds an index version's encoder and shards."""
    return f"{APPLICATION}-{version}"


def open_beside(config: RunConfig, version: str) -> Engine:
    """Load an index version and its model into this process. Raises StorageError, VersionError."""
    storage = open_storage(config.workspace)
    manifest = read_checked(storage, config, version)
    encoder = QueryEncoder(storage.uri, manifest.model, config.serve)
    shards = {entry.name: ShardSearch(storage.uri, entry, manifest.search, config.serve) for entry in manifest.shards}
    return _engine(storage, config, manifest, Beside(encoder, shards, config.serve.concurrent_batches))


async def open_deployed(config: RunConfig, version: str, encoders: Callable[[], int]) -> Engine:
    """Wait until an index version's deployments run, and ask them from now on. Raises MixerError.

    `encoders` says how many encoders there are.
    """
    storage = open_storage(config.workspace)
    manifest = await asyncio.to_thread(read_checked, storage, config, version)
    name = backend_name(version)
    still = wished(config)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await asyncio.to_thread(is_running, name):
                await asyncio.sleep(LOOK_S)
                if config.serve.follow_s and await asyncio.to_thread(still) != version:
                    raise MixerError(f"index {version} is not wished any more")
    except TimeoutError:
        raise MixerError(f"{name} did not start within {START_TIMEOUT_S:g} s; see `serve status`") from None
    shards = {entry.name: handle(entry.name, name) for entry in manifest.shards}
    parts = Deployed(handle(ENCODER, name), shards, config.serve.concurrent_batches, encoders)
    return _engine(storage, config, manifest, parts)


def handle(deployment: str, application: str) -> DeploymentHandle:
    """Return a handle for bytes and arrays, which need none of what cloudpickle adds to pickle and takes time for."""
    return serve.get_deployment_handle(deployment, application).options(
        request_serialization="pickle", response_serialization="pickle"
    )


def is_running(name: str) -> bool:
    """Return whether an application runs, False while it starts. Raises MixerError if it failed."""
    application = serve.status().applications.get(name)
    if application is None:
        return False
    if application.status == "DEPLOY_FAILED":
        raise MixerError(why_failed(name, application))
    return application.status == "RUNNING"


def why_failed(name: str, application: object) -> str:
    """Return in one sentence why an application of `serve.status()` did not start."""
    deployments = application.deployments  # type: ignore[attr-defined]
    failed = {part: each.message for part, each in deployments.items() if each.status in ("DEPLOY_FAILED", "UNHEALTHY")}
    part, message = next(iter(failed.items()), (name, application.message))  # type: ignore[attr-defined]
    return f"{part} did not start: {last_sentence(message)}"


def last_sentence(message: str) -> str:
    """Return the last line of a message that may hold a traceback, without the exception's type."""
    lines = [line for line in message.splitlines() if line.strip()]
    return re.sub(r"^[\w.]+(Error|Exception): ", "", lines[-1].strip()) if lines else "no reason given"


def read_checked(storage: Storage, config: RunConfig, version: str) -> IndexManifest:
    """Return the manifest of an index all of whose files are there, with the model that embedded it.

    Finds what would stop every replica, where it can be said in one sentence. Raises StorageError, VersionError.
    """
    manifest = read_manifest(storage, version)
    if config.serve.model != "index":
        check_model(manifest, config.serve.model)
    check_model(manifest, versions.require(storage, MODELS, manifest.model)["version"])
    model = f"{MODELS}/{manifest.model}"
    segments = [part for entry in manifest.shards for part in entry.segments]
    present = storage.list(model)
    for each in {part.version for part in segments}:
        present |= storage.list(f"{gallery.KIND}/{each}")
    needed = [f"{model}/{name}" for name in (QUERY_GRAPH, SETTINGS)]
    needed += [f"{gallery.KIND}/{part.version}/{name}" for part in segments for name in part.files]
    for key in needed:
        if key not in present:
            raise StorageError(f"{storage.uri}/{key}: missing; copy it again, or publish that version again")
    dim = json.loads(storage.read(f"{model}/{SETTINGS}"))["dim"]
    if dim != manifest.dim:
        raise VersionError(
            f"index {manifest.version} holds embeddings of {manifest.dim} dimensions, model {manifest.model} makes "
            f"{dim}: run jobs/index.py with index.model={manifest.model} first"
        )
    return manifest


def _engine(storage: Storage, config: RunConfig, manifest: IndexManifest, parts: Parts) -> Engine:
    calibration = read_calibration(storage, manifest.model)
    if config.serve.min_probability and calibration is None:
        log.warning(
            "serve.min_probability hides nothing yet: model %s is not calibrated; run jobs/evaluate.py", manifest.model
        )
    return Engine(manifest, parts, calibration, degrade=config.serve.lost_shard == "degrade")
