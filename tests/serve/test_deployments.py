"""Encoder and shards as deployments of their own, on a real cluster: changed and killed under requests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve as ray_serve

from mixer_platform.config import RunConfig
from mixer_platform.serve import job
from mixer_platform.serve.loading import backend_name
from tests.serve.conftest import Workspace, make_workspace, publish_version, serve_version

pytestmark = pytest.mark.slow
Photo = Callable[..., bytes]
PATIENCE_S = 120


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    two = {"min_replicas": 2, "max_replicas": 2, "cpus": 0.1}
    replicas = {name: two for name in ("ingress", "encoder", "shard")}
    root = tmp_path_factory.mktemp("deployed")
    return make_workspace(root, port=0, follow_s=0.2, layout="deployments", retire_s=5, timeout_ms=30_000, **replicas)


@pytest.fixture(scope="module")
def http(report: dict[str, Any], deployed: Workspace, workspace: Workspace) -> Iterator[httpx.Client]:
    """The service in its other layout, in the place of the session's, which is brought back."""
    said = job.serve(deployed.config)
    with httpx.Client(base_url=said["url"], timeout=30) as client:
        yield client
    job.serve(workspace.config)


class Asking:
    """Asks one photo after another in threads, until it is left; `replies` are statuses and what was said."""

    def __init__(self, http: httpx.Client, photo: bytes, clients: int = 4) -> None:
        self.replies: list[tuple[int, dict[str, Any]]] = []
        self._http, self._photo, self._stopped = http, photo, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self._stopped.is_set():
            headers = {"content-type": "image/jpeg", "content-length": str(len(self._photo))}
            reply = self._http.post("/v1/search?k=5", content=self._pieces(), headers=headers)
            self.replies.append((reply.status_code, reply.json()))

    def _pieces(self) -> Iterator[bytes]:
        """Yield the photo as it comes over a network: later than the head, and not at once."""
        for start in range(0, len(self._photo), 4096):
            time.sleep(0.002)
            yield self._photo[start : start + 4096]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count: int = 50) -> None:
        wanted = len(self.replies) + count
        until(lambda: len(self.replies) >= wanted)


def until(done: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def replicas(name: str) -> list[psutil.Process]:
    """Return the processes of a deployment's replicas."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if f"ServeReplica:{name}" in " ".join(each.cmdline()):
                found.append(each)
    return found


def test_the_parts_are_deployments_of_their_own(http: httpx.Client, deployed: Workspace, photo: Photo):
    applications = ray_serve.status().applications
    assert set(applications["mixer"].deployments) == {"Ingress", "Backends"}
    shards = {"shard-00000", "shard-00001", "shard-00002"}
    assert set(applications[backend_name("index-a")].deployments) == {"Backend", "QueryEncoder", *shards}
    reply = http.post("/v1/search", files={"photo": photo(5)}, data={"k": "12"})
    assert [item["id"] for item in reply.json()["items"]] == deployed.exact(deployed.embed(photo(5)), 12)
    assert http.get("/readyz").status_code == 200


@pytest.mark.parametrize("part", ["QueryEncoder", "shard-00001", "Ingress"])
def test_a_killed_replica_costs_no_request(http: httpx.Client, deployed: Workspace, photo: Photo, part: str):
    application = "mixer" if part == "Ingress" else backend_name("index-a")
    expected = deployed.exact(deployed.embed(photo(6)), 5)
    before = {process.pid for process in replicas(f"{application}:{part}")}
    assert len(before) == 2
    with Asking(http, photo(6)) as asking:
        asking.wait_for_more()
        os.kill(min(before), signal.SIGKILL)
        asking.wait_for_more(200)
        until(lambda: len({each.pid for each in replicas(f"{application}:{part}")} - {min(before)}) == 2)
        asking.wait_for_more()
    assert {status for status, _ in asking.replies} == {200}
    assert all([item["id"] for item in said["items"]] == expected for _, said in asking.replies)
    assert not any(said["degraded"] for _, said in asking.replies)


def test_encoder_and_shards_change_together_and_the_old_ones_end(http: httpx.Client, deployed: Workspace, photo: Photo):
    expected = deployed.exact(deployed.embed(photo(7)), 5)
    root = Path(deployed.config.workspace)
    publish_version(root, "model-b", "index-b", shards=2, negative=True)
    with Asking(http, photo(7)) as asking:
        for version in ("index-b", "index-a"):
            asking.wait_for_more()
            serve_version(root, version)
            until(lambda version=version: all(said.get("index") == version for _, said in asking.replies[-20:]))
            other = "index-a" if version == "index-b" else "index-b"
            until(lambda other=other: backend_name(other) not in ray_serve.status().applications)
            killed = min(process.pid for process in replicas("mixer:Ingress"))
            os.kill(killed, signal.SIGKILL)  # the next one opens what is served now
            until(lambda killed=killed: len({each.pid for each in replicas("mixer:Ingress")} - {killed}) == 2)
        asking.wait_for_more()
    assert [said for status, said in asking.replies if status != 200] == []
    pairs = {("index-a", "model-a"), ("index-b", "model-b")}
    assert {(said["index"], said["model"]) for _, said in asking.replies} == pairs
    assert all([item["id"] for item in said["items"]] == expected for _, said in asking.replies)


def test_the_other_layout_can_come_back(http: httpx.Client, deployed: Workspace, photo: Photo):
    serve = deployed.config.serve.model_copy(update={"layout": "beside"})
    config: RunConfig = deployed.config.model_copy(update={"serve": serve})
    with Asking(http, photo(8), clients=2) as asking:
        asking.wait_for_more()
        job.serve(config)
        asking.wait_for_more()
    assert {status for status, _ in asking.replies} == {200}
    assert set(ray_serve.status().applications) == {"mixer"}
