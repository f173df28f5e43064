"""What breaks in mid-epoch: a worker, the driver, the storage. The run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pytest
import ray
import torch
from moto.server import ThreadedMotoServer
from ray._common.utils import reset_ray_address
from ray._raylet import PlacementGroupID
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from safetensors.torch import load

from mixer.config import ModelConfig
from mixer_platform.config import RunConfig
from mixer_platform.storage import open_storage
from mixer_platform.train.checkpoints import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, sys
import ray
from mixer_platform.config import RunConfig
from mixer_platform.train.job import train

address, config, variables = sys.argv[1:]
ray.init(address, runtime_env={"env_vars": json.loads(variables)}, logging_level="ERROR", log_to_driver=False)
print(json.dumps(train(RunConfig.model_validate(json.loads(config)))))
"""
OUTAGE = 30  # seconds


def make_config(workspace: str, architecture: ModelConfig) -> RunConfig:
    settings = {
        "epochs": 8,
        "batch_size": 5,
        "workers": 2,
        "holdout": 0,
        "neighbours": 0,
        "checkpoint_steps": 2,
        "views": 2,
    }
    tree = {"data": "unused", "workspace": workspace, "model": architecture.model_dump()}
    return RunConfig.model_validate({**tree, "train": {**settings, "cpus_per_worker": 0.5, "max_failures": 3}})


def start(config: RunConfig, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a driver of its own that trains."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    known = {"PYTHONPATH": paths, **(variables or {})}
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address, config.model_dump_json(), json.dumps(known)]
    return subprocess.Popen(command, env={**os.environ, **known}, stdout=subprocess.PIPE, text=True)


def finish(driver: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0
    return json.loads(out.splitlines()[-1])


def wait(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
    return found


def checkpoints_of(workspace: str) -> Checkpoints | None:
    runs = open_storage(workspace).folders("runs")
    return Checkpoints(open_storage(workspace), runs[0]) if runs else None


def within_an_epoch(workspace: str) -> dict[str, Any] | None:
    """Return the state of a run that is in the middle of an epoch and has some behind it."""
    run = checkpoints_of(workspace)
    with suppress(Exception):  # it may be deleting what is being looked at
        state = run.latest() if run else None
        if state and state["epoch"] >= 2 and state["batches"]:
            return state
    return None


def training_workers() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"RayTrainWorker" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0)


@contextmanager
def broken_off(config: RunConfig) -> Iterator[None]:
    """Start a driver that trains; it is killed at the end, and nothing of its run stays.

    What it held is given back by those who ask the dashboard whether it is gone, such as Ray Train's
    PlacementGroupCleaner; here is none.
    """
    workers, groups, free = training_workers(), set(placement_group_table()), free_cpus()
    driver = start(config)
    try:
        yield
    finally:
        driver.kill()
        driver.communicate()
        wait(lambda: not training_workers() - workers)
        for group in placement_group_table().keys() - groups:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))
        ray.kill(get_or_create_autoscaling_coordinator())
        wait(lambda: free_cpus() >= free)


def weights(workspace: str, report: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load(open_storage(workspace).read(f"models/{report['version']}/model.safetensors"))


@pytest.fixture
def workspace(cached: Path) -> Path:
    return cached


@pytest.fixture(scope="module")
def unbroken(
    with_features: Path, tmp_path_factory: pytest.TempPathFactory, architecture: ModelConfig
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The report and the weights of the run that nothing happens to."""
    workspace = str(shutil.copytree(with_features, tmp_path_factory.mktemp("unbroken") / "workspace"))
    report = finish(start(make_config(workspace, architecture)))
    return report, weights(workspace, report)


def check(broken: dict[str, Any], workspace: str, unbroken: tuple, before: list[dict[str, Any]]) -> None:
    """The same losses and weights; and what was trained before is not trained again."""
    report, expected = unbroken
    assert broken["history"][: len(before)] == before
    losses = [[entry["loss"] for entry in each["history"]] for each in (broken, report)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    found = weights(workspace, broken)
    for name, value in expected.items():
        if not name.endswith("key.bias"):  # no gradient but rounding noise
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_worker_is_killed(workspace: Path, architecture: ModelConfig, unbroken: tuple) -> None:
    others = training_workers()
    driver = start(make_config(str(workspace), architecture))
    state = wait(lambda: within_an_epoch(str(workspace)))
    os.kill((training_workers() - others).pop(), signal.SIGKILL)
    check(finish(driver), str(workspace), unbroken, state["history"])


def test_the_driver_is_killed_and_started_again(workspace: Path, architecture: ModelConfig, unbroken: tuple) -> None:
    config = make_config(str(workspace), architecture)
    with broken_off(config):
        state = wait(lambda: within_an_epoch(str(workspace)))
    assert not open_storage(str(workspace)).folders("models")
    check(finish(start(config)), str(workspace), unbroken, state["history"])


def test_a_node_is_lost_and_those_that_are_left_go_on(
    workspace: Path, architecture: ModelConfig, unbroken: tuple
) -> None:
    config = elastic(make_config(str(workspace), architecture))
    with another_node():
        ray.kill(get_or_create_autoscaling_coordinator())  # the next one looks at once, this one in some time
        driver = start(config)
        state = wait(lambda: within_an_epoch(str(workspace)))
        assert state["world"] == 2
    check(finish(driver), str(workspace), unbroken, state["history"])
    run = checkpoints_of(str(workspace))
    assert run is not None
    assert run.latest()["world"] == 1


def test_a_node_joins_and_takes_a_worker(workspace: Path, architecture: ModelConfig) -> None:
    config = elastic(make_config(str(workspace), architecture), epochs=1000, resize_s=1)
    ray.kill(get_or_create_autoscaling_coordinator())
    with broken_off(config):
        before = wait(lambda: within_an_epoch(str(workspace)))
        assert before["world"] == 1
        with another_node():
            after = wait(lambda: (state := within_an_epoch(str(workspace))) and state["world"] == 2 and state, 240)
        assert after["history"][: len(before["history"])] == before["history"], "it went on from where it was"


def elastic(config: RunConfig, **settings: Any) -> RunConfig:
    """Let a run have one worker or two, of which a node has room for one."""
    settings |= {"cpus_per_worker": 3, "least_workers": 1}
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


@contextmanager
def another_node() -> Iterator[None]:
    """Let a node of three CPUs join the cluster; it is killed at the end."""
    address = ray.get_runtime_context().gcs_address
    command = [Path(sys.executable).with_name("ray"), "start", f"--address={address}", "--num-cpus=3", "--block"]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: ray.cluster_resources()["CPU"] == 7)
        yield
    finally:
        for process in [*psutil.Process(node.pid).children(recursive=True), node]:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                process.kill()
        node.wait()
        reset_ray_address()  # `ray start` notes the cluster for whoever starts Ray on this machine next
        wait(lambda: ray.cluster_resources()["CPU"] == 4)


def test_the_storage_fails_for_a_while(
    workspace: Path, architecture: ModelConfig, unbroken: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    with Gate(server.get_host_and_port()) as gate:
        known = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{gate.port}", "AWS_DEFAULT_REGION": "us-east-1"}
        known |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        for name, value in known.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="faults")
        bucket = open_storage("s3://faults/work")
        for path in workspace.rglob("*"):
            if path.is_file():
                bucket.write(str(path.relative_to(workspace)), path.read_bytes())
        driver = start(make_config(bucket.uri, architecture), known)
        state = wait(lambda: within_an_epoch(bucket.uri))
        gate.shut = True
        threading.Timer(OUTAGE, lambda: setattr(gate, "shut", False)).start()
        check(finish(driver), bucket.uri, unbroken, state["history"])
        assert gate.cut
    server.stop()


class Gate:
    """A port in front of a server; while it is shut, every connection is cut."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.server, self.shut, self.cut = server, False, 0

    def __enter__(self) -> Gate:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _listen(self) -> None:
        for client in self._accepted():
            if self.shut:
                self.cut += 1
                client.close()
            else:
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _accepted(self) -> Iterator[socket.socket]:
        with suppress(OSError):  # closed
            while True:
                yield self._listener.accept()[0]

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.server) as server, suppress(OSError):
            while not self.shut:
                for ready in select.select([client, server], [], [], 0.1)[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    (server if ready is client else client).sendall(data)
