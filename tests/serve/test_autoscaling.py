"""Replicas follow the load, and nodes follow the replicas, by Ray's own autoscaler with nodes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from mixer_platform.loopback import free_ports
from mixer_platform.serve.ingress import OWN_PORTS, own_ports, prepare
from mixer_platform.serve.job import free_port
from tests.conftest import ROOT
from tests.serve.conftest import INDEX, publish_version, serve_version

pytestmark = pytest.mark.slow
HEAD, WORKER = "ray.head.default", "worker"  # the first is the name that the provider knows
PROVIDER = {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True}
CLUSTER: dict[str, Any] = {
    "provider": PROVIDER,
    "cluster_name": "autoscaled",
    "max_workers": 2,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.05,
    "auth": {},
    "docker": {},
    "head_node_type": HEAD,
    "available_node_types": {
        HEAD: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        WORKER: {
            "resources": {"CPU": 2, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
    **{name: [] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")},
    **{name: [] for name in ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands")},
    "cluster_synced_files": [],
    "file_mounts": {},
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head and the autoscaler; yields the environment of who uses it."""
    address = f"{ray.util.get_node_ip_address()}:{free_port('127.0.0.1', 0)}"
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps({**CLUSTER, "provider": {**PROVIDER, "gcs_address": address}}))
    environment = {
        **os.environ,
        **prepare(),
        **own_ports(free_ports(OWN_PORTS)),
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_ADDRESS": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", None)
    with tempfile.TemporaryDirectory(prefix="mixer-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        command = ["ray", "start", "--head", "--block", "--num-cpus=1", "--include-dashboard=false"]
        command += [f"--autoscaling-config={path}", f"--temp-dir={scratch}", "--disable-usage-stats"]
        command += [f"--port={address.rpartition(':')[2]}"]
        with (tmp_path / "ray.log").open("w") as log:
            head = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield {**environment, "RAY_ADDRESS": address}
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            head.wait(60)


def test_replicas_and_nodes_come_with_load_and_go_without(cluster: dict[str, str], tmp_path: Path):
    publish_version(tmp_path / "workspace", shards=1)
    serve_version(tmp_path / "workspace", INDEX)
    command = [sys.executable, str(ROOT / "tests/serve/autoscaling.py"), str(tmp_path / "workspace")]
    ran = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    seen = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("{")))
    one = {"QueryEncoder": 1, "shard-00000": 1}
    assert {name: count for name, count in seen["first"].items() if name != "nodes"} == one
    assert {name: count for name, count in seen["loaded"].items() if name != "nodes"} == dict.fromkeys(one, 2)
    assert seen["loaded"]["nodes"] > seen["first"]["nodes"] > 1
    assert seen["idle"] == seen["first"]
    assert seen["failed"] == 0
    assert seen["requests"] > 100
    assert seen["left"] == []
