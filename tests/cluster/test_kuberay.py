"""The KubeRay manifests against KubeRay's CRDs, Ray's autoscaler, Ray Serve's schema and this project's files."""

from __future__ import annotations

import ast
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from mixer_platform.config import load_config
from mixer_platform.errors import ConfigError
from mixer_platform.serve.ingress import ENVIRONMENT
from mixer_platform.serve.keys import key_ring

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared" / "schemas" / "kuberay"
GROUPS = {"prepare": {"cpu"}, "train": {"cpu", "gpu"}, "index": {"cpu"}, "evaluate": {"cpu"}, "serve": {"cpu"}}

WRITTEN = [
    manifest
    for path in sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
]
MANIFESTS = {manifest["metadata"]["name"]: manifest for manifest in WRITTEN}
JOBS = {name: manifest for name, manifest in MANIFESTS.items() if manifest["kind"] == "RayJob"}
(SERVICE,) = (manifest for manifest in WRITTEN if manifest["kind"] == "RayService")

every_manifest = pytest.mark.parametrize("name", MANIFESTS)
every_job = pytest.mark.parametrize("name", JOBS)


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster specification in a manifest, wherever its kind keeps it."""
    key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(manifest["kind"])
    return manifest["spec"][key] if key else manifest["spec"]


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


# --- KubeRay's CRDs


def strict(schema: Any) -> Any:
    """Turn an openAPIV3Schema into a JSON schema that refuses what the API server would drop or refuse.

    The server drops unknown fields of an object with `properties` unless it preserves them, and `kubectl apply`
    refuses them; JSON Schema lets them pass unless told otherwise. `nullable` is OpenAPI's own word.
    """
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:  # its keys are field names, which may look like keywords
        out["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    if schema.get("nullable") and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    return out


@cache
def crd(kind: str, version: str) -> Draft202012Validator:
    if not CRDS.is_dir():
        pytest.skip(f"no CRDs at {CRDS}")
    for path in CRDS.glob("*.yaml"):
        spec = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        if spec["names"]["kind"] == kind:
            (schema,) = (v["schema"]["openAPIV3Schema"] for v in spec["versions"] if v["name"] == version)
            return Draft202012Validator(strict(schema))
    raise AssertionError(f"{kind}: none of the CRDs describes it")


def refusals(manifest: dict[str, Any]) -> list[str]:
    group, version = manifest["apiVersion"].split("/")
    assert group == "ray.io"
    errors = crd(manifest["kind"], version).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@every_manifest
def test_a_manifest_is_what_its_crd_says(name: str) -> None:
    assert refusals(MANIFESTS[name]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"rayClusterSpecs": {}},  # a field the CRD does not know
        {"backoffLimit": "1"},  # a wrong type
        {"rayClusterSpec": {}},  # a required field left out
        {"rayClusterSpec": {"headGroupSpec": {"template": {"spec": {"containers": [{"name": "head", "imag": "x"}]}}}}},
        {"rayClusterSpec": {"headGroupSpec": {"template": {}}, "authOptions": {"mode": "tokens"}}},  # not in the enum
    ],
)
def test_the_crd_check_refuses(change: dict[str, Any]) -> None:
    manifest = JOBS["mixer-prepare"]
    assert len(refusals(manifest | {"spec": manifest["spec"] | change})) == 1


# --- the clusters


def autoscaling(manifest: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler reads out of the manifest's cluster."""
    metadata = manifest["metadata"] | {"namespace": "any"}
    return _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": cluster_of(manifest)})


@every_manifest
def test_every_cluster_scales_by_itself_and_asks_for_a_token(name: str) -> None:
    cluster = cluster_of(MANIFESTS[name])
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token"}
    assert autoscaling(MANIFESTS[name])["idle_timeout_minutes"] == 10


@every_manifest
def test_no_task_lands_on_the_head(name: str) -> None:
    config = autoscaling(MANIFESTS[name])
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0


@every_manifest
def test_ray_sees_the_groups_the_stage_needs(name: str) -> None:
    manifest = MANIFESTS[name]
    config = autoscaling(manifest)
    groups = dict(config["available_node_types"])
    del groups[config["head_node_type"]]
    assert set(groups) == GROUPS.get(manifest["metadata"]["labels"].get("stage"), {"cpu", "gpu"})
    for group, node in groups.items():
        assert node["min_workers"] == (2 if manifest["kind"] == "RayService" else 0)
        assert node["max_workers"] > node["min_workers"]
        assert node["resources"]["CPU"] > 0
        assert node["resources"].get("GPU", 0) == (1 if group == "gpu" else 0)


@every_manifest
def test_pods_run_the_image_for_their_hardware_and_reach_the_storage(name: str) -> None:
    cluster = cluster_of(MANIFESTS[name])
    assert cluster["rayVersion"] == ray.__version__
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        container = container_of(group)
        assert container["image"].endswith("/mixer:gpu" if group.get("groupName") == "gpu" else "/mixer:cpu")
        assert container["envFrom"] == [{"secretRef": {"name": "mixer-storage", "optional": True}}]
        # Any node may read the keys as the service starts; without the secret its pods do not.
        serves = MANIFESTS[name]["kind"] == "RayService"
        mounted = [{"name": "keys", "mountPath": "/etc/mixer", "readOnly": True}]
        assert container.get("volumeMounts", []) == mounted * serves
        volumes = group["template"]["spec"].get("volumes", [])
        assert volumes == [{"name": "keys", "secret": {"secretName": "mixer-keys"}}] * serves
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert "replicas" not in group  # the autoscaler's to set: a second `kubectl apply` would undo it


@every_job
def test_a_job_cluster_is_the_shared_one_with_fewer_groups(name: str) -> None:
    shared, own = (dict(cluster_of(manifest)) for manifest in (MANIFESTS["mixer"], JOBS[name]))
    groups = {group["groupName"]: group for group in shared.pop("workerGroupSpecs")}
    assert all(group == groups[group["groupName"]] for group in own.pop("workerGroupSpecs"))
    assert own == shared


# --- the work


def check_runtime_env(env: dict[str, Any]) -> None:
    """Raise unless Ray takes it and it is where cluster/Dockerfile puts the project."""
    RuntimeEnv(**env)
    assert "WORKDIR " + env["working_dir"].removeprefix("local://") in (ROOT / "cluster/Dockerfile").read_text()
    assert env["env_vars"]["PYTHONPATH"] == "platform"


def test_there_is_a_job_for_every_batch_stage() -> None:
    assert [job["metadata"]["labels"]["stage"] for job in JOBS.values()] == ["prepare", "train", "index", "evaluate"]


@every_job
def test_a_job_runs_its_stage_with_a_configuration_that_loads(name: str) -> None:
    job = JOBS[name]
    python, script, option, config, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, option) == ("python", "--config")
    assert script == f"jobs/{job['metadata']['labels']['stage']}.py"
    assert (ROOT / script).is_file()
    assert load_config(ROOT / config, overrides).workspace.startswith("s3://")
    check_runtime_env(yaml.safe_load(job["spec"]["runtimeEnvYAML"]))


@every_job
def test_a_job_is_tried_again_and_cleans_up(name: str) -> None:
    spec = JOBS[name]["spec"]
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert "clusterSelector" not in spec  # KubeRay deletes the cluster between tries, a selected one too


def test_serve_knows_every_key_of_the_service() -> None:
    written = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
    assert ServeDeploySchema(**written).model_dump(mode="json", exclude_unset=True) == written  # it drops unknown keys


def test_the_service_builds_this_project_from_a_configuration_that_loads() -> None:
    (app,) = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])["applications"]
    module, builder = app["import_path"].split(":")
    source = (ROOT / "platform" / module.replace(".", "/")).with_suffix(".py")
    functions = {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert builder in functions
    assert all(isinstance(value, str) for value in app["args"].values())
    overrides = [f"{key}={value}" for key, value in app["args"].items() if key != "config"]
    assert load_config(ROOT / app["args"]["config"], overrides).workspace.startswith("s3://")
    check_runtime_env(app["runtime_env"])


def test_no_stage_is_left_with_the_buckets_of_the_configuration() -> None:
    for manifest in (*JOBS.values(), SERVICE):
        (app,) = yaml.safe_load(manifest["spec"].get("serveConfigV2", "applications: [{args: {}}]"))["applications"]
        overrides = [f"{key}={value}" for key, value in app["args"].items() if key != "config"]
        overrides += shlex.split(manifest["spec"].get("entrypoint", ""))[4:]
        config = load_config(ROOT / "jobs/configs/production.yaml", overrides)
        assert config.data == "s3://YOUR-BUCKET/data"
        assert config.workspace == "s3://YOUR-BUCKET/mixer"


def test_proxies_of_the_service_read_what_the_image_cannot_say() -> None:
    cluster = cluster_of(SERVICE)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        environment = {each["name"]: each["value"] for each in container_of(group)["env"]}
        assert environment["RAY_SERVE_HAPROXY_RETRY_ON"] == ENVIRONMENT["RAY_SERVE_HAPROXY_RETRY_ON"]


def test_the_service_has_room_for_two_versions_during_a_swap() -> None:
    config = load_config(ROOT / "jobs/configs/production.yaml")
    serve = config.serve
    version = serve.encoder.min_replicas * serve.encoder.cpus
    version += config.index.shards * serve.shard.min_replicas * serve.shard.cpus
    needed = 2 * version + serve.ingress.min_replicas * serve.ingress.cpus
    nodes = autoscaling(SERVICE)["available_node_types"].values()
    assert sum(node["max_workers"] * node["resources"]["CPU"] for node in nodes) >= needed


def test_the_service_asks_for_keys_that_its_secret_holds() -> None:
    (app,) = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])["applications"]
    path = Path(app["args"]["serve.keys_file"])
    with pytest.raises(ConfigError, match="no API keys"):
        key_ring(load_config(ROOT / app["args"]["config"]).serve, {})
    told = (ROOT / "cluster/README.md").read_text()
    assert f"kubectl create secret generic mixer-keys --from-file={path.name}" in told  # so is the file called there
    assert str(path.parent) == "/etc/mixer"  # where it is mounted


def test_names_leave_room_for_each_other() -> None:
    """KubeRay names services after clusters and RayServices alike: two of one name would share a head service."""
    assert len(MANIFESTS) == len(WRITTEN) == 6
