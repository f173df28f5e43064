"""The product's whole job as its users run it: `ray job submit` to a real cluster, then HTTP."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import urllib.error
import urllib.request
import uuid
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image, ImageDraw

from mixer_platform.demo.cluster import LocalCluster, processes
from mixer_platform.errors import MixerError
from mixer_platform.gallery import read_calibration
from mixer_platform.simulate.config import ClickConfig, SimulateConfig
from mixer_platform.simulate.emoji import Thing
from mixer_platform.simulate.job import build
from mixer_platform.storage import open_storage

pytestmark = pytest.mark.slow
ATTRIBUTES = ("kind", "reason", "raw", "score", "shard", "state", "text", "weight")  # the platform has such columns too


def thing(number: int) -> Thing:
    """Draw a thing that no other resembles: a coloured shape with its own number of corners."""
    rng = np.random.default_rng(number)
    colour, corners = tuple(int(part) for part in rng.integers(30, 220, 3)), 3 + number % 6
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).regular_polygon((32, 32, 28), corners, fill=colour, rotation=int(rng.integers(360)))
    file = io.BytesIO()
    image.save(file, "PNG")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><circle cx="32" cy="32" r="{10 + 2 * corners}" '
    svg += f'fill="rgb{colour}"/></svg>'
    return Thing(
        code=str(number),
        label=f"thing {number}",
        tags=(f"corners {corners}",),
        group=f"group {number % 3}",
        subgroup=f"subgroup {number % 5}",
        twitter=file.getvalue(),
        google=file.getvalue(),
        openmoji=svg.encode(),
    )


@pytest.fixture(scope="module")
def marketplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop") / "data"
    clicks = ClickConfig(sessions_per_query=12, demand_ratio=3, page_size=6, pool_size=8)
    build([thing(number) for number in range(24)], SimulateConfig(val_photos=16, clicks=clicks), folder)
    items = pq.read_table(folder / "items.parquet")
    for name in ATTRIBUTES:
        items = items.append_column(name, items["item_id"])
    pq.write_table(items, folder / "items.parquet")
    return folder


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket; `make demo` does the same in a folder."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"shop-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/mixer"
    server.stop()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a Python that has the dependencies but not the project, as a cluster's image does."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, symlinks=True)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    # Its packages are found there, but not what its own .pth files add: the editable project.
    (site / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    ray = folder / "bin/ray"
    ray.write_text(f"#!{folder}/bin/python\nfrom ray.scripts.scripts import main\nmain()\n")
    ray.chmod(0o755)
    for package in ("mixer", "mixer_platform"):
        found = subprocess.run([folder / "bin/python", "-c", f"import {package}"], cwd="/", capture_output=True)
        assert b"ModuleNotFoundError" in found.stderr
    return folder / "bin"


def test_submitted_jobs_make_an_index_that_is_searched(
    marketplace: Path, workspace: str, programs: Path, tmp_path: Path
) -> None:
    common = ["--config", "jobs/configs/demo.yaml", f"data={marketplace}", f"workspace={workspace}"]
    common += ["train.epochs=3", "train.views=1", "index.recall_queries=20"]
    cluster = LocalCluster(tmp_path / "logs", programs)
    with cluster:
        prepared = cluster.submit("prepare", common)
        for figures in prepared["tables"].values():
            assert figures["rows_in"] == figures["rows_out"] + sum(figures["quarantined"].values())
        trained = cluster.submit("train", common)
        assert [entry["epoch"] for entry in trained["history"]] == [0, 1, 2]
        indexed = cluster.submit("index", common)
        assert indexed["recall_at_10"] == 1.0, "Flat is exact"
        assert indexed["model"] == trained["version"]
        again = cluster.submit("index", common)
        assert again["reused"]
        assert again["version"] == indexed["version"]
        evaluated = cluster.submit("evaluate", common)
        assert evaluated["queries"] == 16
        assert 0 < evaluated["r1"] <= evaluated["r5"] <= 1
        assert evaluated["calibration"]["photos"] == 16
        worth = read_calibration(open_storage(workspace), trained["version"])
        assert worth.slope == evaluated["calibration"]["slope"]
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            said = refused(cluster, [*common, f"serve.port={port}", "serve.keep_up=false"])
            assert said == f"port {port} on 127.0.0.1 is in use; stop what uses it or set serve.port=..."
        said = refused(cluster, [*common, "serve.port=0", "serve.keep_up=false", "serve.model=another"])
        assert said.startswith(f"index {indexed['version']} was built by model {trained['version']}, not by another: ")
        served = cluster.submit("serve", [*common, "serve.port=0", "serve.keep_up=false"])
        photo = (marketplace / pq.read_table(marketplace / "val.parquet")["image"][0].as_py()).read_bytes()
        status, reply = search(served["url"], photo, k=3)
        assert status == 200
        assert len(reply["items"]) == 3
        for item in reply["items"]:
            assert {name: item["attributes"][name] for name in ATTRIBUTES} == dict.fromkeys(ATTRIBUTES, item["id"])
        assert (reply["model"], reply["index"]) == (trained["version"], indexed["version"])
        scores = [item["score"] for item in reply["items"]]
        assert scores == sorted(scores, reverse=True)
        for body, k, sentence in (
            (photo, 0, "k is 0; it must be from 1 to 1000"),
            (b"<html>", 3, "the photo cannot be used: not a JPEG, PNG or WebP picture"),
            (photo[: len(photo) // 2], 3, "the photo cannot be used: broken picture: "),
            (wide_png(), 3, "the photo cannot be used: picture of 20000 x 20000 pixels; at most 40 million"),
        ):
            status, reply = search(served["url"], body, k)
            assert status == 422
            assert reply["error"]["message"].startswith(sentence)
    assert processes(cluster.mark) == [], "the cluster leaves no process behind"


def refused(cluster: LocalCluster, arguments: list[str]) -> str:
    """Submit a serve job that fails, and return the sentence that it says."""
    with pytest.raises(MixerError, match="serve failed"):
        cluster.submit("serve", arguments)
    (said,) = re.findall(r"^error: (.*)$", (cluster.logs / "serve.log").read_text(), re.MULTILINE)
    return said


def search(url: str, photo: bytes, k: int) -> tuple[int, dict[str, Any]]:
    """Ask over HTTP; return the status and the reply."""
    body = json.dumps({"image": base64.b64encode(photo).decode(), "k": k}).encode()
    request = urllib.request.Request(f"{url}/v1/search", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wide_png() -> bytes:
    """Return a whole PNG of 20,000 x 20,000 white pixels, one bit each."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000), 1).save(file, "PNG")
    return file.getvalue()
