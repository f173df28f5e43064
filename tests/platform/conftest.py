"""A workspace of each kind: a folder, and a bucket behind real HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from mixer_platform.storage import Storage, open_storage
from tests.platform.flaky import Flaky


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket; returns its name."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture
def flaky(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    """What stands between storage that is opened from here on and the bucket."""
    with Flaky(s3_endpoint.removeprefix("http://")) as flaky:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{flaky.address}")
        yield flaky


@pytest.fixture(params=["folder", "s3", "whole bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "workspace"))
    bucket = request.getfixturevalue("s3")
    return open_storage(f"s3://{bucket}/a/workspace" if request.param == "s3" else f"s3://{bucket}")
