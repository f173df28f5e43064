"""Bind the graph: `Ingress` over one `QueryEncoder` and one `ShardSearch` a shard, each autoscaled on its own."""

from __future__ import annotations

import json
import math
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from mixer.embedder import QUERY_GRAPH, SETTINGS
from mixer_platform import gallery, versions
from mixer_platform.config import ReplicasConfig, RunConfig, load_config
from mixer_platform.errors import ConfigError, StorageError, VersionError
from mixer_platform.gallery import IndexManifest, check_model, read_manifest
from mixer_platform.serve.deployments import MODELS, Ingress, QueryEncoder, ShardSearch
from mixer_platform.serve.errors import RETRY_AFTER_S
from mixer_platform.serve.service import ENCODER
from mixer_platform.storage import Storage, open_storage


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application; Ray Serve config files name it `mixer_platform.serve.app:build`.

    `args`: "config" is the path of a run's YAML, every other key overrides one of it, such as "serve.index".
    """
    if "config" not in args:
        raise ConfigError("args of mixer_platform.serve.app:build: config is missing; give the path of a run's YAML")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in args.items()}
    overrides = [f"{key}={text}" for key, text in texts.items() if key != "config"]
    config = load_config(args["config"], overrides)
    return application(config, read_manifest(open_storage(config.workspace), config.serve.index))


def application(config: RunConfig, manifest: IndexManifest) -> serve.Application:
    """Return the application that serves an index. Raises StorageError, VersionError and ConfigError."""
    storage = open_storage(config.workspace)
    if config.serve.model != "index":
        check_model(manifest, config.serve.model)
    _check(storage, manifest)
    settings, workspace = config.serve, storage.uri
    # Two batches: one is encoded while the next one gathers.
    ongoing = 2 * settings.max_batch
    queued = settings.max_queued
    encoder = _deployment(QueryEncoder, ENCODER, settings.encoder, ongoing, queued)
    shards = {
        entry.name: _deployment(ShardSearch, entry.name, settings.shard, ongoing, queued).bind(
            workspace, entry, manifest.search, settings
        )
        for entry in manifest.shards
    }
    # Room for more than the encoders and their queue hold: they refuse first, as JSON; Serve's proxy says it in text.
    room = 2 * (queued + ongoing * settings.encoder.max_replicas)
    ingress = _deployment(Ingress, "Ingress", settings.ingress, room, room)
    return ingress.bind(settings, manifest, encoder.bind(workspace, manifest.model, settings), shards)


def _deployment(
    implementation: type, name: str, replicas: ReplicasConfig, ongoing: int, queued: int
) -> serve.Deployment:
    if replicas.min_replicas > replicas.max_replicas:
        raise ConfigError(
            f"{name}: min_replicas {replicas.min_replicas} is above max_replicas {replicas.max_replicas}; lower it"
        )
    return serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": replicas.cpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min_replicas,
            max_replicas=replicas.max_replicas,
            target_ongoing_requests=replicas.target_ongoing_requests,
        ),
        max_ongoing_requests=max(ongoing, math.ceil(replicas.target_ongoing_requests)),
        max_queued_requests=queued,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=5,
        max_constructor_retry_count=3,  # what stops a replica (a broken file) will stop the next one too
    )(implementation)


def _check(storage: Storage, manifest: IndexManifest) -> None:
    """Find what would stop every replica here, where it can be said in one sentence."""
    check_model(manifest, versions.require(storage, MODELS, manifest.model)["version"])
    model = f"{MODELS}/{manifest.model}"
    segments = [part for entry in manifest.shards for part in entry.segments]
    present = storage.list(model)
    for version in {part.version for part in segments}:
        present |= storage.list(f"{gallery.KIND}/{version}")
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
