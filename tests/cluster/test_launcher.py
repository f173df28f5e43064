"""The launcher files as Ray's own code reads them for `ray up`, short of calling a cloud."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

CLUSTER = Path(__file__).parents[2] / "cluster"


@pytest.fixture(params=["aws", "gcp"])
def cloud(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(cloud: str) -> dict[str, Any]:
    """What `ray up` works from: the file, with Ray's defaults for the cloud where it is silent."""
    written = yaml.safe_load((CLUSTER / f"{cloud}.yaml").read_text())
    return prepare_config(copy.deepcopy(written))


def node_types(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    groups = dict(config["available_node_types"])
    return groups.pop(config["head_node_type"]), groups


def test_ray_accepts_the_file(cloud: str, config: dict[str, Any]) -> None:
    validate_config(config)  # ray-schema.json and Ray's checks beyond it
    assert config["provider"]["type"] == cloud


def test_no_task_lands_on_the_head(config: dict[str, Any]) -> None:
    head, _ = node_types(config)
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0


def test_a_cpu_and_a_gpu_group_grow_from_nothing(config: dict[str, Any]) -> None:
    _, groups = node_types(config)
    assert set(groups) == {"cpu", "gpu"}
    for group in groups.values():
        assert group["min_workers"] == 0
        assert group["max_workers"] > 0
        assert group["resources"]["CPU"] > 0
    assert "GPU" not in groups["cpu"]["resources"]
    assert groups["gpu"]["resources"]["GPU"] > 0
    assert sum(group["max_workers"] for group in groups.values()) <= config["max_workers"]


def test_idle_nodes_go(config: dict[str, Any]) -> None:
    assert config["idle_timeout_minutes"] > 0


def test_every_node_runs_the_image_for_its_hardware(config: dict[str, Any]) -> None:
    head, groups = node_types(config)
    assert config["docker"]["image"].endswith("/mixer:cpu")
    assert groups["gpu"]["docker"]["worker_image"].endswith("/mixer:gpu")
    assert "--gpus all" in groups["gpu"]["docker"]["worker_run_options"]
    assert "docker" not in head
    assert "docker" not in groups["cpu"]


def test_ray_comes_from_the_image_alone(config: dict[str, Any]) -> None:
    """Ray's defaults install a nightly Ray; a key left out would bring them back."""
    commands = [*config["setup_commands"], *config["head_setup_commands"], *config["worker_setup_commands"]]
    assert not [command for command in commands if "ray" in command]


def test_nodes_ask_for_a_token(config: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_only_cpu_workers_are_spot(cloud: str, config: dict[str, Any]) -> None:
    def is_spot(node: dict[str, Any]) -> bool:
        if cloud == "aws":
            return node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        return node.get("scheduling", {}).get("provisioningModel") == "SPOT"

    spot = {name for name, group in config["available_node_types"].items() if is_spot(group["node_config"])}
    assert spot == {"cpu"}


@pytest.mark.parametrize("cloud", ["aws"], indirect=True)
def test_ec2_knows_every_key_of_a_node(config: dict[str, Any]) -> None:
    """Ray's schema leaves node_config open; botocore carries the API's own description of it."""
    request = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    assert request
    for name, group in config["available_node_types"].items():
        report = ParamValidator().validate({**group["node_config"], "MinCount": 1, "MaxCount": 1}, request)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


@pytest.mark.slow
@pytest.mark.parametrize("cloud", ["aws"], indirect=True)
def test_ray_launches_every_kind_of_node_on_a_simulated_ec2(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of `ray up` before SSH: instance types, roles, key pair, subnets, security groups and the launch itself."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair to ~/.ssh
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "simulated")
    with mock_aws():
        iam = boto3.client("iam")
        for group in config["available_node_types"].values():
            name = group["node_config"]["IamInstanceProfile"]["Name"]
            with contextlib.suppress(iam.exceptions.EntityAlreadyExistsException):
                iam.create_instance_profile(InstanceProfileName=name)
        groups = config["available_node_types"]
        silent = config | {"available_node_types": {name: group | {"resources": {}} for name, group in groups.items()}}
        found = AWSNodeProvider.fillout_available_node_types_resources(silent)["available_node_types"]
        for name in ("cpu", "gpu"):  # the head has CPUs, which the file hides on purpose
            assert groups[name]["resources"].items() <= found[name]["resources"].items()

        ready = AWSNodeProvider.bootstrap_config(config)
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        for name, group in ready["available_node_types"].items():
            tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: name}
            assert provider.create_node(copy.deepcopy(group["node_config"]), tags, 1)
