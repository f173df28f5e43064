"""One contract, whatever the workspace is on."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixer_platform.errors import ConflictError, MissingError, StorageError
from mixer_platform.storage import LocalStorage, Storage, open_storage, read_uri, resolve_uri
from tests.flaky import Fault, Flaky

ROOT = Path(__file__).parents[2]
BIG = 2**23  # bytes from which on S3 gets a file in parts


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file that S3 gets in parts."""
    path = tmp_path / "source"
    path.write_bytes(np.random.default_rng(0).bytes(2 * BIG))
    return path


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write("a/b.bin", b"one")
    storage.write("a/b.bin", b"two")
    assert storage.read("a/b.bin") == b"two"


def test_list_gives_the_keys_below_a_folder_only(storage: Storage) -> None:
    for key in ("a/1", "a/b/2", "ab/3", "4"):
        storage.write(key, key.encode())
    assert sorted(storage.list("a")) == ["a/1", "a/b/2"]
    assert sorted(storage.list("")) == ["4", "a/1", "a/b/2", "ab/3"]
    assert storage.list("nothing") == {}
    assert len(storage.list("", 3)) == 3


def test_folders_are_those_directly_below(storage: Storage) -> None:
    for key in ("a/1", "a/b/2", "a/c/d/3", "ab/3"):
        storage.write(key, key.encode())
    assert storage.folders("a") == ["b", "c"]
    assert storage.folders("") == ["a", "ab"]
    assert storage.folders("nothing") == []


def test_tags_change_when_content_does(storage: Storage) -> None:
    assert storage.tag("a/key") is None
    storage.write("a/key", b"one")
    first, listed = storage.tag("a/key"), storage.list("a")
    storage.write("a/key", b"other")
    assert storage.tag("a/key") not in (None, first)
    assert storage.list("a") != listed
    storage.write("a/key", b"one")
    assert storage.tag("a/key") == first


def test_delete_takes_a_folder_and_nothing_beside_it(storage: Storage) -> None:
    for key in ("a/1", "a/b/2", "ab/3"):
        storage.write(key, b"")
    storage.delete("a")
    storage.delete("nothing")
    assert sorted(storage.list("")) == ["ab/3"]
    assert storage.tag("a/1") is None


def test_what_a_link_leads_to_is_listed_and_not_deleted(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "root"))
    storage.write("a/1", b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/2").touch()
    (tmp_path / "root/a/more").symlink_to(tmp_path / "elsewhere")
    assert list(storage.list("a")) == ["a/1", "a/more/2"]
    storage.delete("a")
    assert (tmp_path / "elsewhere/2").exists()
    assert not (tmp_path / "root/a").exists()


def test_a_missing_key_is_one_sentence_with_its_address(storage: Storage) -> None:
    with pytest.raises(StorageError) as error:
        storage.read("no/such")
    assert str(error.value).startswith(f"{storage.uri}/no/such: ")
    assert "\n" not in str(error.value)


def test_publish_is_a_compare_and_swap(storage: Storage) -> None:
    storage.publish("CURRENT", b"1", replaces=None)
    with pytest.raises(ConflictError, match="CURRENT: somebody else published first"):
        storage.publish("CURRENT", b"2", replaces=None)
    first = storage.tag("CURRENT")
    storage.publish("CURRENT", b"2", replaces=first)
    with pytest.raises(ConflictError):
        storage.publish("CURRENT", b"3", replaces=first)
    with pytest.raises(ConflictError):
        storage.publish("NEVER", b"3", replaces=first)
    assert storage.read("CURRENT") == b"2"
    assert sorted(storage.list("")) == ["CURRENT"], "no lock or staged file is seen"


@pytest.mark.parametrize("first", [True, False])
def test_of_many_who_publish_at_once_exactly_one_wins(storage: Storage, first: bool) -> None:
    for round_ in range(3):
        key, replaces = f"CURRENT-{round_}", None
        if not first:
            storage.write(key, b"before")
            replaces = storage.tag(key)
        start, won, lost = threading.Barrier(6), [], []

        def publish(number: int, key=key, replaces=replaces, start=start, won=won, lost=lost) -> None:  # type: ignore[no-untyped-def]
            start.wait()
            try:
                storage.publish(key, f"{number}".encode(), replaces)
            except ConflictError:
                lost.append(number)
            else:
                won.append(number)

        threads = [threading.Thread(target=publish, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 5)
        assert storage.read(key) == f"{won[0]}".encode()


def test_no_half_written_file_is_seen(storage: Storage) -> None:
    """A reader meets the old bytes or the new, and the folder holds no other key, while a writer writes."""
    old, new = b"0" * 2_000_000, b"1" * 2_000_000
    storage.write("f/key", old)
    done = threading.Event()

    def write() -> None:
        for n in range(6):
            storage.write("f/key", old if n % 2 else new)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert storage.read("f/key") in (old, new)
        assert list(storage.list("f")) == ["f/key"]
    writer.join()


def test_what_is_too_large_for_one_put_is_written_in_parts(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixer_platform.s3._WHOLE", 2**20)
    data = np.random.default_rng(0).bytes(2 * BIG + 1)
    storage.write("large", data)
    assert storage.read("large") == data


def test_files_travel_whole(storage: Storage, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "new/folder/copy"
    for data in (b"", b"some", np.random.default_rng(0).bytes(2 * BIG + 1)):
        source.write_bytes(data)
        storage.upload("a/b.bin", source)
        assert storage.read("a/b.bin") == data
        storage.download("a/b.bin", copy)
        assert copy.read_bytes() == data
    assert list(storage.list("")) == ["a/b.bin"]
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_of_files_that_are_not_there_nothing_is_left(storage: Storage, tmp_path: Path) -> None:
    none, copy = tmp_path / "none", tmp_path / "folder/copy"
    with pytest.raises(MissingError, match=f"^{none}: No such file or directory$"):
        storage.upload("a/b.bin", none)
    assert storage.list("") == {}
    with pytest.raises(MissingError, match=f"^{storage.uri}/a/b.bin: "):
        storage.download("a/b.bin", copy)
    assert not copy.parent.exists() or not list(copy.parent.iterdir())


def test_a_folder_is_as_old_as_its_newest_key(storage: Storage) -> None:
    assert storage.modified("a") is None
    for key in ("a/1", "a/b/2", "ab/3"):
        storage.write(key, b"")
    whole = storage.modified("")
    assert whole is not None
    assert storage.modified("a") <= whole
    assert storage.modified("ab") <= whole
    assert abs(whole - datetime.now(UTC).timestamp()) < 60


def test_what_is_being_written_counts_as_new(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.write("a/b/key", b"")
    os.utime(tmp_path / "a/b/key", (1, 1))
    assert storage.modified("a") == 1
    (tmp_path / "a/b/.staged-x").touch()
    os.utime(tmp_path / "a/b/.staged-x", (2, 2))
    assert storage.modified("a") == 2


SMALL_DISK = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"']
SMALL_FILES = ["sh", "-c", 'ulimit -f 1000 && exec "$@"']
FILL = """
import json, sys
from pathlib import Path
from mixer_platform.errors import StorageError
from mixer_platform.storage import open_storage

small, *others = map(open_storage, sys.argv[1:3] + [sys.argv[4]])
source, target, data = Path(sys.argv[3]), small.root / "f/key", Path(sys.argv[3]).read_bytes()
small.write("f/key", b"old")
said = []
for action in (
    lambda: small.write("f/key", data),
    lambda: small.upload("f/key", source),
    lambda: small.publish("f/key", data, small.tag("f/key")),
    *(lambda other=other: other.download("big", target) for other in others),
):
    try:
        action()
    except StorageError as error:
        said.append(str(error))
print(json.dumps([said, target.read_text(), sorted(path.name for path in target.parent.iterdir())]))
"""


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (SMALL_DISK, "No space left on device; free some and run again"),
        (SMALL_FILES, "File too large"),
    ],
    ids=["small disk", "small files"],
)
def test_a_full_disk_leaves_the_old_bytes_and_no_litter(
    s3: str, source: Path, tmp_path: Path, limit: list[str], reason: str
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run([*limit, small, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this machine lets no user mount a disk of its own")
    others = [open_storage(str(tmp_path)), open_storage(f"s3://{s3}")]
    for other in others:
        other.upload("big", source)
    program = [sys.executable, "-c", FILL, small, others[0].uri, source, others[1].uri]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([*limit, small, *program], env=environment, stdout=subprocess.PIPE, check=True)
    said, kept, names = json.loads(done.stdout)
    assert said == [f"{small}/f/key: {reason}"] * 5
    assert (kept, names) == ("old", [".key.lock", "key"])


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, StorageError), (errno.EACCES, MissingError)])
@pytest.mark.parametrize("look", [LocalStorage.list, LocalStorage.modified, LocalStorage.folders, LocalStorage.delete])
def test_a_folder_that_cannot_be_looked_into_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable, number: int, kind: type[StorageError]
) -> None:
    """A run that took it for one would begin anew."""
    storage = LocalStorage(str(tmp_path))
    storage.write("runs/r/state.json", b"{}")

    def broken(folder: object) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", broken)
        patch.setattr(os, "listdir", broken)
        with pytest.raises(StorageError, match=f"{tmp_path}/runs: {os.strerror(number)}") as caught:
            look(storage, "runs")
    assert type(caught.value) is kind
    assert list(storage.list("runs")) == ["runs/r/state.json"]


def test_a_key_that_cannot_be_looked_at_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"xxx: File name too long"):
        LocalStorage(str(tmp_path)).tag("x" * 300)


def test_arrow_reads_what_storage_wrote_and_the_reverse(storage: Storage) -> None:
    table = pa.table({"a": [1, 2]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write("t/x.parquet", sink.getvalue().to_pybytes())
    assert pq.read_table(storage.path("t/x.parquet"), filesystem=storage.filesystem) == table
    pq.write_table(table, storage.path("t/y.parquet"), filesystem=storage.filesystem)
    assert sorted(storage.list("t")) == ["t/x.parquet", "t/y.parquet"]
    assert pq.read_table(pa.BufferReader(storage.read("t/y.parquet"))) == table


def test_storage_travels_to_other_processes(storage: Storage) -> None:
    storage.write("key", b"bytes")
    assert pickle.loads(pickle.dumps(storage)).read("key") == b"bytes"


def test_pictures_are_read_by_uri(storage: Storage) -> None:
    storage.write("pictures/a b.png", b"bytes")
    assert read_uri(resolve_uri("pictures/a b.png", storage.uri)) == b"bytes"
    assert resolve_uri("s3://b/k.png", storage.uri) == "s3://b/k.png"
    assert resolve_uri("/k.png", storage.uri) == "/k.png"
    with pytest.raises(StorageError):
        read_uri(resolve_uri("pictures/none.png", storage.uri))


def test_any_character_may_stand_in_a_prefix(s3: str) -> None:
    for name in ("run #1", "why?", "50%20off"):
        storage = open_storage(f"s3://{s3}/{name}/deep/")
        storage.write("a #1?.bin", name.encode())
        assert boto3.client("s3").get_object(Bucket=s3, Key=f"{name}/deep/a #1?.bin")["Body"].read() == name.encode()
        assert list(storage.list("")) == ["a #1?.bin"]
        assert read_uri(f"{storage.uri}/a #1?.bin") == name.encode()
        with storage.filesystem.open_input_stream(storage.path("a #1?.bin")) as stream:
            assert stream.read() == name.encode()


def test_pictures_of_many_folders_share_one_client(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, made, client = open_storage(f"s3://{s3}"), [], boto3.client
    monkeypatch.setattr(boto3, "client", lambda name, **settings: made.append(name) or client(name, **settings))
    for n in range(5):
        storage.write(f"pictures/{n}/p.png", b"bytes")
        assert read_uri(f"s3://{s3}/pictures/{n}/p.png") == b"bytes"
    assert made == ["s3"]


def test_a_long_list_is_whole(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")  # S3 gives 1000 at once
    storage = open_storage(f"s3://{s3}")
    for n in range(7):
        storage.write(f"many/{n}", b"")
    assert len(boto3.client("s3").list_objects_v2(Bucket=s3)["Contents"]) == 3
    assert len(storage.list("many")) == 7


def test_a_bucket_that_is_not_there_is_one_sentence(s3: str) -> None:
    with pytest.raises(StorageError) as error:
        open_storage("s3://no-such-bucket/prefix")
    assert str(error.value) == "s3://no-such-bucket: the bucket does not exist: create it"


def test_a_service_that_does_not_answer_is_one_sentence(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError, match=r'^s3://b: Could not connect to the endpoint URL: "http://127.0.0.1:9/b"$'):
        open_storage("s3://b/prefix")


def test_other_schemes_are_refused() -> None:
    with pytest.raises(StorageError, match=r"^gs://b/p: only folders and s3://bucket/prefix are read and written"):
        open_storage("gs://b/p")


def test_a_picture_that_is_not_there_is_told_from_storage_that_is_away(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for uri in ("/no/such.jpg", "/dev/null/x.jpg", f"/{'long' * 99}", "/a\0b", "https://shop/x.jpg", f"s3://{s3}/none",
                "s3://b", "s3://b/", "s3://no bucket/x"):  # fmt: skip
        with pytest.raises(MissingError):
            read_uri(uri)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError) as away:
        read_uri("s3://not-read-before/p.png")
    assert not isinstance(away.value, MissingError)


READS: dict[str, Callable[[Storage, Path], object]] = {
    "read": lambda storage, path: storage.read("f/key"),
    "download": lambda storage, path: (storage.download("f/key", path), path.read_bytes())[1],
    "arrow": lambda storage, path: storage.filesystem.open_input_file(storage.path("f/key")).read(),
}
WRITES: dict[str, Callable[[Storage, Path], object]] = {
    "write": lambda storage, path: storage.write("f/key", path.read_bytes()),
    "upload": lambda storage, path: storage.upload("f/key", path),
    "publish": lambda storage, path: storage.publish("f/key", path.read_bytes(), storage.tag("f/key")),
}


@pytest.fixture
def bucket(flaky: Flaky, s3: str) -> Storage:
    """A workspace behind a flaky port."""
    return open_storage(f"s3://{s3}/work")


@pytest.mark.parametrize("fault", ["unavailable", "cut"])
@pytest.mark.parametrize("read", READS)
def test_reading_rides_out_faults(
    bucket: Storage, flaky: Flaky, source: Path, tmp_path: Path, read: str, fault: Fault
) -> None:
    bucket.upload("f/key", source)
    flaky.fail(fault, 3, "GET")
    assert READS[read](bucket, tmp_path / "copy") == source.read_bytes()
    assert flaky.failed == 3


@pytest.mark.parametrize("fault", ["unavailable", "cut", "lost"])
def test_looking_rides_out_faults(bucket: Storage, flaky: Flaky, fault: Fault) -> None:
    bucket.write("f/key", b"bytes")
    looks = [lambda: list(bucket.list("")), lambda: bucket.folders(""), lambda: bucket.modified("f")]
    for look in looks:
        expected = look()
        flaky.fail(fault, 3, "GET")
        assert look() == expected
        assert flaky.failed == 3
    tag = bucket.tag("f/key")
    flaky.fail("unavailable", 3, "HEAD")
    assert bucket.tag("f/key") == tag


@pytest.mark.parametrize("fault", ["unavailable", "lost"])
@pytest.mark.parametrize("write", WRITES)
def test_writing_rides_out_faults(bucket: Storage, flaky: Flaky, source: Path, write: str, fault: Fault) -> None:
    for _ in range(2):  # a new key, and an old one
        flaky.fail(fault, 3, "PUT|POST")
        WRITES[write](bucket, source)
        assert flaky.failed == 3
        assert bucket.read("f/key") == source.read_bytes()
        source.write_bytes(source.read_bytes()[::-1])


def test_the_answer_that_a_large_file_is_whole_may_be_lost(bucket: Storage, flaky: Flaky, source: Path) -> None:
    flaky.fail("lost", 1, r"POST .*uploadId")
    bucket.upload("f/key", source)
    assert flaky.failed == 1
    assert bucket.read("f/key") == source.read_bytes()


@pytest.mark.parametrize("replaces", [False, True])
def test_a_lost_answer_hides_no_conflict(bucket: Storage, flaky: Flaky, replaces: bool) -> None:
    """The second to publish is told so, also when it does not get to hear the answer."""
    tag = None
    if replaces:
        bucket.write("CURRENT", b"0")
        tag = bucket.tag("CURRENT")
    bucket.publish("CURRENT", b"1", tag)
    flaky.fail("lost", 2, "PUT")
    with pytest.raises(ConflictError):
        bucket.publish("CURRENT", b"2", tag)
    assert flaky.failed == 2
    assert bucket.read("CURRENT") == b"1"


@pytest.mark.parametrize("fault", ["unavailable", "cut", "lost"])
@pytest.mark.parametrize("read", ["read", "download"])
def test_reading_ends_where_faults_do_not(
    bucket: Storage,
    flaky: Flaky,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: str,
    fault: Fault,
) -> None:
    bucket.upload("f/key", source)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    impatient = open_storage(bucket.uri)
    flaky.fail(fault, math.inf, "GET")
    with pytest.raises(StorageError, match=f"^{bucket.uri}/f/key: [^\n]*$") as error:
        READS[read](impatient, tmp_path / "folder/copy")
    assert not isinstance(error.value, MissingError)
    assert not list(tmp_path.glob("folder/*"))


@pytest.mark.parametrize(
    ("write", "fault", "requests"),
    [
        *((write, "unavailable", "PUT|POST") for write in WRITES),
        *((write, "lost", "PUT") for write in WRITES),
        ("upload", "unavailable", "PUT .*partNumber=2"),
        ("upload", "unavailable", "POST .*uploadId"),
    ],
)
def test_writing_ends_where_faults_do_not(
    bucket: Storage,
    flaky: Flaky,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: str,
    fault: Fault,
    requests: str,
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    impatient = open_storage(bucket.uri)
    flaky.fail(fault, math.inf, requests)
    with pytest.raises(StorageError, match=f"^{bucket.uri}/f/key: [^\n]*$") as error:
        WRITES[write](impatient, source)
    assert not isinstance(error.value, ConflictError)
    whole = fault == "lost" and write != "upload"  # what has no parts
    assert list(bucket.list("")) == ["f/key"] * whole
