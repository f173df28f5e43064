"""Serve on a cluster whose nodes come and go, under load and without, and end amid a swap; prints what was seen.

    python tests/serve/autoscaling.py WORKSPACE

Run by test_autoscaling.py on a cluster of its own; RAY_ADDRESS names it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixer_platform.serve.ingress import prepare

prepare()

import httpx
import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions, ProxyLocation

from mixer_platform.config import RunConfig
from mixer_platform.serve import job
from mixer_platform.serve.loading import backend_name
from mixer_platform.serve.swap import test_photo
from tests.serve.conftest import publish_version, serve_version

CLIENTS, PATIENCE_S = 8, 150
ONE_TO_TWO = {"min_replicas": 1, "max_replicas": 2, "cpus": 1, "target_ongoing_requests": 0.3}
QUICK = {"upscale_delay_s": 1, "downscale_delay_s": 3}


def seen(index: str) -> dict[str, int]:
    """Return how many nodes are alive, and how many replicas run of each part."""
    deployments = ray_serve.status().applications[backend_name(index)].deployments
    parts = ("QueryEncoder", "shard-00000")
    counts = {name: deployments[name].replica_states.get("RUNNING", 0) for name in parts}
    return {"nodes": sum(node["Alive"] for node in ray.nodes()), **counts}


def until(index: str, done: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """Return what is seen once it is as wished, or when patience ends."""
    deadline = time.monotonic() + PATIENCE_S
    while not done(now := seen(index)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return now


def stop_amid_a_swap(workspace: Path) -> None:
    """Stop while two versions are up, when what keeps their deployments looks after them at every turn."""
    publish_version(workspace, "model-b", "index-b", shards=1)
    serve_version(workspace, "index-b")
    deadline, name = time.monotonic() + PATIENCE_S, backend_name("index-b")
    while not (name in (found := ray_serve.status().applications) and found[name].status == "RUNNING"):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    job.stop()


def main(workspace: str) -> None:
    ray.init(logging_level="WARNING", log_to_driver=False)
    # One proxy: the nodes share a machine, and so its ports.
    ray_serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host="127.0.0.1", port=job.free_port("127.0.0.1", 0)),
    )
    parts: dict[str, Any] = {name: {**ONE_TO_TWO, **QUICK} for name in ("encoder", "shard")}
    few = {"min_replicas": 1, "max_replicas": 1, "cpus": 0.1}
    serve = {"port": 0, "keys": False, "follow_s": 0.2, "layout": "deployments", "ingress": few, **parts}
    config = RunConfig.model_validate({"data": workspace, "workspace": workspace, "serve": serve})
    report = job.serve(config)
    index, stopped, statuses = report["index"], threading.Event(), []
    first = until(index, lambda now: True)

    def ask() -> None:
        with httpx.Client(base_url=report["url"], timeout=30) as client:
            while not stopped.is_set():
                reply = client.post("/v1/search", content=test_photo(), headers={"content-type": "image/jpeg"})
                statuses.append(reply.status_code)

    clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    loaded = until(index, lambda now: min(now[name] for name in now if name != "nodes") == 2)
    stopped.set()
    for client in clients:
        client.join()
    idle = until(index, lambda now: now == first)
    stop_amid_a_swap(Path(workspace))
    print(
        json.dumps(
            {
                "first": first,
                "loaded": loaded,
                "idle": idle,
                "requests": len(statuses),
                "failed": sum(status != 200 for status in statuses),
                "left": list(ray_serve.status().applications),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
