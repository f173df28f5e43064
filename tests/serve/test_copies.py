"""Replicas get a version's files from S3 once a machine, and only those that they need; what none holds goes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from mixer_platform import versions
from mixer_platform.errors import StorageError
from mixer_platform.serve.copies import fetch
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
        folders = set(pool.map(lambda _: fetch(bucket.uri, "models/a", ("query.onnx",)).folder, range(8)))
    (folder,) = folders
    assert [path.name for path in folder.iterdir()] == ["query.onnx"]
    assert (folder / "query.onnx").read_bytes() == b"graph"


def test_a_version_made_anew_under_its_old_name_is_fetched_anew(bucket: S3Storage):
    publish(bucket, b"old")
    fetch(bucket.uri, "models/a", ("query.onnx",))
    bucket.delete("models")
    publish(bucket, b"new")
    assert (fetch(bucket.uri, "models/a", ("query.onnx",)).folder / "query.onnx").read_bytes() == b"new"


def test_files_of_a_folder_are_read_where_they_are(tmp_path: Path):
    assert fetch(str(tmp_path), "models/a", ()).folder == Path(open_storage(str(tmp_path)).path("models/a"))


HOLD = """
import sys
from mixer_platform.serve.copies import fetch
copy = fetch(sys.argv[1], sys.argv[2], ("query.onnx",))
print(copy.folder, flush=True)
sys.stdin.read()
"""


def test_a_copy_that_no_process_holds_makes_room_for_the_next(bucket: S3Storage):
    for name in ("a", "b", "c"):
        bucket.write(f"models/{name}/query.onnx", name.encode())
        versions.publish(bucket, "models", name, {})
    command = [sys.executable, "-c", HOLD, bucket.uri, "models/a"]
    environment = os.environ | {"TMPDIR": tempfile.gettempdir(), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdin
        assert other.stdout
        first = Path(other.stdout.readline().strip())
        second = fetch(bucket.uri, "models/b", ("query.onnx",))
        assert (first / "query.onnx").read_bytes() == b"a"  # another process holds it
        other.kill()
    third = fetch(bucket.uri, "models/c", ("query.onnx",))
    assert not first.exists()
    assert (second.folder / "query.onnx").read_bytes() == b"b"
    assert (third.folder / "query.onnx").read_bytes() == b"c"
    fetch(bucket.uri, "models/c", ("query.onnx",))
    del second
    fetch(bucket.uri, "models/a", ("query.onnx",))
    assert sorted(path.read_bytes() for path in third.folder.parent.glob("*/query.onnx")) == [b"a", b"c"]


def test_a_folder_that_others_may_write_to_is_not_used(bucket: S3Storage):
    publish(bucket, b"graph")
    cache = Path(tempfile.gettempdir()) / f"mixer-{os.getuid()}"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(StorageError, match=r"mixer-\d+: others may write there; remove it, or set TMPDIR to"):
        fetch(bucket.uri, "models/a", ("query.onnx",))
    cache.rmdir()
    (elsewhere := cache.with_name("elsewhere")).mkdir(mode=0o700)
    cache.write_text("")
    with pytest.raises(StorageError, match="others may write there"):
        fetch(bucket.uri, "models/a", ("query.onnx",))
    cache.unlink()
    cache.symlink_to(elsewhere)
    with pytest.raises(StorageError, match="others may write there"):
        fetch(bucket.uri, "models/a", ("query.onnx",))
