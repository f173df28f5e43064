"""Put the application on a Ray cluster, wait until it answers, and take it down."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import threading
import time
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from mixer_platform.config import RunConfig
from mixer_platform.errors import MixerError
from mixer_platform.gallery import read_manifest
from mixer_platform.loopback import free_ports, open_url
from mixer_platform.serve.app import application
from mixer_platform.serve.loading import (
    APPLICATION,
    START_TIMEOUT_S,
    are_beside,
    backend_name,
    last_sentence,
    why_failed,
)
from mixer_platform.storage import open_storage

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}

log = logging.getLogger(__name__)


def serve(config: RunConfig) -> dict[str, Any]:
    """Serve the index over HTTP and return once a query would be answered; Ray Serve keeps it up from then on.

    Running it again with the same cluster and port brings in another index or configuration. Raises MixerError.
    """
    started = time.monotonic()
    app = application(config)
    manifest = read_manifest(open_storage(config.workspace), config.serve.index)
    host, port = start_http(config.serve.host, config.serve.port)
    try:
        ray_serve.run_many([ray_serve.RunTarget(app, APPLICATION)], wait_for_applications_running=False)
    except (RayServeException, RayError, ValueError) as error:
        raise MixerError(f"Ray Serve does not take the application: {last_sentence(str(error))}") from error
    _wait_until_running()
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    _wait_until_ready(url)
    if are_beside(config, manifest):
        _delete_backends()  # of another layout before
    return {
        "url": url,
        "index": manifest.version,
        "model": manifest.model,
        "items": manifest.items,
        "shards": len(manifest.shards),
        "seconds": round(time.monotonic() - started, 2),
    }


def wait_for_interrupt() -> None:
    """Block until SIGINT or SIGTERM, then stop serving."""
    interrupted = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: interrupted.set()) for number in signals]
    interrupted.wait()
    for number, handler in zip(signals, before, strict=True):
        signal.signal(number, handler)
    stop()


def stop() -> None:
    """Take the application down, and Ray Serve with it if nothing else runs there."""
    names = [name for name in ray_serve.status().applications if name == APPLICATION or _is_backend(name)]
    # All in one message, which Serve then has even if this process is killed as it waits: `ray job stop` gives it 3 s.
    _get_global_client().delete_apps(names)
    if not ray_serve.status().applications:
        ray_serve.shutdown()


def start_http(host: str, port: int) -> tuple[str, int]:
    """Start Serve's HTTP proxy, or find it running; return the address for a client. Raises MixerError."""
    # Private, but Serve has no other way to ask where it listens, and it ignores a new port in silence.
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        running = (client.http_config.host, client.http_config.port)
        if running != (host, port or running[1]):
            raise MixerError(
                f"Ray Serve of this cluster listens on {running[0]}:{running[1]} already; "
                f"set serve.host={running[0]} serve.port={running[1]}, or stop it with `serve shutdown`"
            )
        return _EVERYWHERE.get(host, host), running[1]
    port = free_port(host, port)
    ray_serve.start(http_options=HTTPOptions(host=host, port=port))
    return _EVERYWHERE.get(host, host), port


def free_port(host: str, port: int) -> int:
    """Return the port if it is free, or any free one for 0. Raises MixerError."""
    port = port or free_ports(1)[0]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise MixerError(f"{host}:{port} cannot be listened on: {error.strerror}; set serve.host") from error
            raise MixerError(f"port {port} on {host} is in use; stop what uses it or set serve.port=...") from error
    return port


def _delete_backends() -> None:
    for name in ray_serve.status().applications:
        if _is_backend(name):
            ray_serve.delete(name)


def _is_backend(application: str) -> bool:
    return application.startswith(backend_name(""))


def _wait_until_running() -> None:
    deadline, said = time.monotonic() + START_TIMEOUT_S, time.monotonic()
    while time.monotonic() < deadline:
        status = ray_serve.status().applications[APPLICATION]
        if status.status == "RUNNING":
            return
        waiting = {name: each for name, each in status.deployments.items() if each.status != "HEALTHY"}
        if status.status == "DEPLOY_FAILED":
            raise MixerError(why_failed(APPLICATION, status))
        if time.monotonic() - said > 10:
            said = time.monotonic()
            log.info("waiting for %s", "; ".join(f"{name}: {each.message}" for name, each in waiting.items()))
        time.sleep(0.1)
    raise MixerError(
        f"{' and '.join(waiting)} did not start within {START_TIMEOUT_S:g} s; see `serve status`: the cluster may have "
        "too few CPUs for serve.ingress, serve.encoder and serve.shard, or GPUs for serve.encoder_gpus"
    )


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with open_url(f"{url}/readyz", 10):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise MixerError(f"{url}/readyz: {error}; see the log of Ray Serve") from error
        time.sleep(0.1)
