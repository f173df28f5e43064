"""Replicas get a version's files from S3 once a machine, and only those that they need."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from mixer_platform import versions
from mixer_platform.serve.parts import fetch
from mixer_platform.storage import S3Storage, open_storage


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Storage]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = S3Storage(f"s3://{tmp_path.name.replace('_', '-')}/work", check=False)  # moto's servers share buckets
    storage.client.create_bucket(Bucket=storage.bucket)
    yield storage
    server.stop()


def publish(storage: S3Storage, content: bytes) -> None:
    for name in ("query.onnx", "item.onnx"):
        storage.write(f"models/a/{name}", content)
    versions.publish(storage, "models", "a", {})


def test_only_what_is_needed_is_copied_by_all_replicas_at_once(bucket: S3Storage):
    publish(bucket, b"graph")
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch(bucket.uri, "models/a", ("query.onnx",)), range(8)))
    (folder,) = folders
    assert [path.name for path in folder.iterdir()] == ["query.onnx"]
    assert (folder / "query.onnx").read_bytes() == b"graph"


def test_a_version_made_anew_under_its_old_name_is_fetched_anew(bucket: S3Storage):
    publish(bucket, b"old")
    fetch(bucket.uri, "models/a", ("query.onnx",))
    bucket.delete("models")
    publish(bucket, b"new")
    assert (fetch(bucket.uri, "models/a", ("query.onnx",)) / "query.onnx").read_bytes() == b"new"


def test_files_of_a_folder_are_read_where_they_are(tmp_path: Path):
    assert fetch(str(tmp_path), "models/a", ()) == Path(open_storage(str(tmp_path)).path("models/a"))
