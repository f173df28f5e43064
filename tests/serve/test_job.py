"""Serving on a real cluster, over real HTTP."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve as ray_serve

from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.errors import ConfigError, MixerError, StorageError, VersionError
from mixer_platform.serve import job
from mixer_platform.serve.app import application, backend, build
from mixer_platform.serve.keys import make_key
from tests.serve.conftest import INDEX

Photo = Callable[..., bytes]


def application_of(config: RunConfig) -> ray_serve.Application:
    return application(config)


@pytest.fixture(scope="module")
def http(report: dict[str, Any]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=report["url"], timeout=30) as client:
        yield client


def test_the_report_says_what_is_served(report: dict[str, Any]):
    assert report | {"url": "", "seconds": 0} == {
        "url": "",
        "index": "index-a",
        "model": "model-a",
        "items": 60,
        "shards": 3,
        "seconds": 0,
    }


def test_deployments_are_separate_and_autoscaled(report: dict[str, Any]):
    deployments = ray_serve.status().applications["mixer"].deployments
    assert set(deployments) == {"Ingress"}


def test_multipart_and_json_search_over_http(http: httpx.Client, workspace: Any, photo: Photo):
    query = photo(4711)
    expected = workspace.exact(workspace.embed(query), 12)
    replies = [
        http.post("/v1/search", files={"photo": ("query.jpg", query, "image/jpeg")}, data={"k": "12"}),
        http.post("/v1/search", json={"image": base64.b64encode(query).decode(), "k": 12}),
    ]
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert [item["id"] for item in reply.json()["items"]] == expected


def test_batch_similar_and_pages_over_http(http: httpx.Client, workspace: Any, photo: Photo):
    reply = http.post("/v1/search/batch", files=[("photos", photo(1)), ("photos", b"x")], data={"k": "2"}).json()
    assert [item["id"] for item in reply["results"][0]["items"]] == workspace.exact(workspace.embed(photo(1)), 2)
    assert reply["results"][1]["error"]["code"] == "unreadable_image"
    assert len(http.get("/v1/items/shop%2Fno. 7%3F/similar").json()["items"]) == 10
    assert http.get("/readyz").json() == http.get("/healthz").json() == {"status": "ok"}
    assert "/v1/search" in http.get("/openapi.json").json()["paths"]
    assert http.get("/docs").status_code == 200


def test_errors_over_http_carry_the_request_id(http: httpx.Client, photo: Photo):
    reply = http.post("/v1/search", files={"photo": photo(1)}, data={"k": "0"}, headers={"x-request-id": "mine"})
    assert reply.status_code == 422
    assert reply.json()["error"] == {
        "code": "invalid_request",
        "message": "k is 0; it must be from 1 to 50",
        "request_id": "mine",
    }
    reply = http.post("/v1/search", files={"photo": bytes(1_500_000)})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert reply.json()["error"]["request_id"] == reply.headers["x-request-id"]


def test_the_port_of_a_running_serve_is_taken_again_and_no_other(report: dict[str, Any]):
    port = int(report["url"].rpartition(":")[2])
    assert job.start_http("127.0.0.1", port) == job.start_http("127.0.0.1", 0) == ("127.0.0.1", port)
    with pytest.raises(
        MixerError, match=rf"listens on 127\.0\.0\.1:{port} already; set serve.host=.*serve.port={port}"
    ):
        job.start_http("127.0.0.1", port - 1)


def test_a_port_in_use_is_said_in_one_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        sentence = f"port {port} on 127.0.0.1 is in use; stop what uses it or set serve.port=..."
        with pytest.raises(MixerError, match=f"^{re.escape(sentence)}$"):
            job.free_port("127.0.0.1", port)
    assert job.free_port("127.0.0.1", port) == port
    assert job.free_port("127.0.0.1", 0) > 0


def test_a_host_of_another_machine():
    with pytest.raises(MixerError, match=r"192\.0\.2\.1:8000 cannot be listened on: .*; set serve.host"):
        job.free_port("192.0.2.1", 8000)


def test_an_index_built_by_another_model(fresh_workspace: Any):
    manifest = fresh_workspace.model_folder / versions.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": "model-b"}))
    with pytest.raises(VersionError, match="index index-a was built by model model-a, not by model-b"):
        application_of(fresh_workspace.config)


def test_a_model_of_another_dimension(fresh_workspace: Any):
    settings = fresh_workspace.model_folder / "embedder.json"
    settings.write_text(settings.read_text().replace('"dim": 48', '"dim": 32'))
    with pytest.raises(VersionError, match="holds embeddings of 48 dimensions, model model-a makes 32"):
        application_of(fresh_workspace.config)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("models/model-a/manifest.json", "models/model-a: no such published version"),
        ("models/model-a/query.onnx", "models/model-a/query.onnx: missing; copy it again"),
        ("index/index-a/shard-00001.arrow", "index/index-a/shard-00001.arrow: missing; copy it again"),
        ("index/CURRENT", "index/CURRENT: no index is published"),
    ],
)
def test_what_is_missing_is_named(fresh_workspace: Any, file: str, sentence: str):
    (Path(fresh_workspace.config.workspace) / file).unlink()
    with pytest.raises(StorageError, match=sentence):
        application_of(fresh_workspace.config)


def test_bounds_of_replicas_are_checked(fresh_workspace: Any):
    config = RunConfig.model_validate(
        {
            **fresh_workspace.config.model_dump(),
            "serve": {"keys": False, "shard": {"min_replicas": 5, "max_replicas": 2}},
        }
    )
    with pytest.raises(ConfigError, match=r"serve\.shard: min_replicas 5 is above max_replicas 2"):
        application_of(config)


@pytest.mark.parametrize("layout", ["beside", "deployments"])
def test_the_replicas_with_an_encoder_ask_for_its_gpu(fresh_workspace: Any, layout: str):
    settings = {"keys": False, "layout": layout, "encoder_device": "cuda", "encoder_gpus": 0.25}
    config = RunConfig.model_validate({**fresh_workspace.config.model_dump(), "serve": settings})

    def gpus(app: ray_serve.Application) -> dict[str, float]:
        bound = app._bound_deployment  # private, but before it runs there is nobody else to ask
        parts = [each for each in bound.init_args if isinstance(each, ray_serve.Application)]
        found = {bound.name: bound.ray_actor_options.get("num_gpus", 0)}
        return found | {name: share for part in parts for name, share in gpus(part).items()}

    asked = gpus(application_of(config))
    assert asked == ({"Ingress": 0.25} if layout == "beside" else {"Ingress": 0, "Backends": 0})
    shards = {f"shard-{number:05d}": 0 for number in range(3)}
    assert gpus(backend(config, INDEX)) == {"Backend": 0, "QueryEncoder": 0.25, **shards}


def test_the_builder_reads_the_configuration_and_its_overrides(
    fresh_workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MIXER_API_KEYS", f"[{make_key('test')[1].model_dump_json()}]")
    path = tmp_path / "run.yaml"
    path.write_text("data: nowhere\nworkspace: nowhere\n")
    args = {"config": str(path), "workspace": fresh_workspace.config.workspace, "serve.encoder.cpus": 0.1}
    assert isinstance(build(args), ray_serve.Application)
    with pytest.raises(StorageError, match="no index is published"):
        build({"config": str(path)})
    with pytest.raises(ConfigError, match="config is missing"):
        build({})
    with pytest.raises(ConfigError, match=r"run\.yaml: serve\.keys: off is for jobs/serve\.py"):
        build({**args, "serve.keys": "off"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_serving(monkeypatch: pytest.MonkeyPatch, number: signal.Signals):
    stopped: list[bool] = []
    monkeypatch.setattr(job, "stop", lambda: stopped.append(True))
    handler = signal.getsignal(number)
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    job.wait_for_interrupt()
    assert stopped == [True]
    assert signal.getsignal(number) == handler


@pytest.mark.slow
def test_a_replica_that_cannot_start_is_said_in_one_sentence_and_the_next_index_replaces_it(
    report: dict[str, Any], fresh_workspace: Any, workspace: Any
):
    shard = Path(fresh_workspace.config.workspace) / "index/index-a/shard-00001.faiss"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(MixerError, match=r"^Ingress did not start: .*shard-00001.faiss: not the bytes that were"):
        job.serve(fresh_workspace.config)
    assert job.serve(workspace.config)["url"] == report["url"]
