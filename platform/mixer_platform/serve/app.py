"""Bind the graph: `Ingress`, each replica all of the service, or in front of encoder and shards that scale alone."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from mixer_platform.config import ReplicasConfig, RunConfig, load_config
from mixer_platform.errors import ConfigError
from mixer_platform.serve.deployments import Backend, Backends, Ingress
from mixer_platform.serve.errors import RETRY_AFTER_S
from mixer_platform.serve.keys import key_ring
from mixer_platform.serve.loading import are_beside, read_checked, wished
from mixer_platform.serve.logs import LOGGING
from mixer_platform.serve.parts import ENCODER, Part, QueryEncoder, ShardApart
from mixer_platform.serve.tracing import check_traces
from mixer_platform.storage import open_storage


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application; Ray Serve config files name it `mixer_platform.serve.app:build`.

    `args`: "config" is the path of a run's YAML, every other key overrides one of it, such as "serve.index".
    """
    if "config" not in args:
        raise ConfigError("args of mixer_platform.serve.app:build: config is missing; give the path of a run's YAML")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in args.items()}
    overrides = [f"{key}={text}" for key, text in texts.items() if key != "config"]
    config = load_config(args["config"], overrides)
    if not config.serve.keys:  # where it listens is said by `http_options` and not by serve.host
        raise ConfigError(f"{args['config']}: serve.keys: off is for jobs/serve.py; a Serve config file needs API keys")
    return application(config)


def application(config: RunConfig) -> serve.Application:
    """Return the application that serves the wished index. Raises StorageError, VersionError and ConfigError."""
    settings = config.serve
    key_ring(settings, os.environ)  # what is wrong there is better said here than by every replica
    check_traces(settings)
    for name, replicas in (("ingress", settings.ingress), ("encoder", settings.encoder), ("shard", settings.shard)):
        if replicas.min_replicas > replicas.max_replicas:
            raise ConfigError(
                f"serve.{name}: min_replicas {replicas.min_replicas} is above max_replicas {replicas.max_replicas}; "
                "lower it"
            )
    version = wished(config)()
    beside = are_beside(config, read_checked(open_storage(config.workspace), config, version))
    # Room for more than the queue holds: it refuses first, as JSON; Serve says it in text.
    room = 4 * (settings.max_queued + settings.max_batch)
    ingress = _deployment(Ingress, "Ingress", settings.ingress, room, settings.encoder_gpus if beside else 0)
    if beside:
        return ingress.bind(config, version, True)
    backends = serve.deployment(
        name="Backends", ray_actor_options={"num_cpus": 0}, health_check_period_s=2, logging_config=LOGGING
    )(Backends)
    return ingress.bind(config, version, False, backends.bind(config, version))


def backend(config: RunConfig, version: str) -> serve.Application:
    """Return the application of an index version's encoder and shards. Raises StorageError, VersionError."""
    storage, settings = open_storage(config.workspace), config.serve
    manifest = read_checked(storage, config, version)
    ongoing = settings.concurrent_batches
    encoder = _deployment(Part, ENCODER, settings.encoder, ongoing, settings.encoder_gpus).bind(
        QueryEncoder, ongoing, storage.uri, manifest.model, settings
    )
    shards = [
        _deployment(Part, entry.name, settings.shard, 4 * ongoing).bind(
            ShardApart, 4 * ongoing, storage.uri, entry, manifest.search, settings
        )
        for entry in manifest.shards
    ]
    root = serve.deployment(name="Backend", ray_actor_options={"num_cpus": 0})(Backend)
    return root.bind(encoder, *shards)


def _deployment(
    implementation: type, name: str, replicas: ReplicasConfig, ongoing: int, gpus: float = 0
) -> serve.Deployment:
    return serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": gpus},
        logging_config=LOGGING,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min_replicas,
            max_replicas=replicas.max_replicas,
            target_ongoing_requests=replicas.target_ongoing_requests,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
        ),
        max_ongoing_requests=max(ongoing, math.ceil(replicas.target_ongoing_requests)),
        max_queued_requests=ongoing * 64,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=5,
        health_check_period_s=2,
        max_constructor_retry_count=3,  # what stops a replica (a broken file) will stop the next one too
    )(implementation)
