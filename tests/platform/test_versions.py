"""Versions appear whole, once, and are found again."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mixer_platform import versions
from mixer_platform.errors import ConflictError, StorageError
from mixer_platform.storage import LocalStorage, Storage


def test_fingerprints_name_what_they_are_given() -> None:
    one = versions.fingerprint("a", {"x": 1, "y": [2]})
    assert one == versions.fingerprint("a", {"y": [2], "x": 1})
    assert one != versions.fingerprint("a", {"x": 1, "y": [3]})
    assert len(one) == 12


def test_a_version_is_published_once(storage: Storage) -> None:
    storage.write("models/v1/weights", b"w")
    assert versions.manifest(storage, "models", "v1") is None
    whole = versions.publish(storage, "models", "v1", {"dim": 8})
    assert whole["version"] == "v1"
    assert versions.manifest(storage, "models", "v1") == whole
    with pytest.raises(ConflictError):
        versions.publish(storage, "models", "v1", {"dim": 9})
    assert versions.require(storage, "models", "v1")["dim"] == 8


def test_names_part_runs_and_keep_the_fingerprint() -> None:
    names = {versions.new_version("0123456789ab") for _ in range(9)}
    assert len(names) == 9
    assert {versions.fingerprint_of(name) for name in names} == {"0123456789ab"}
    assert [versions.fingerprint_of(name) for name in ("v1", "model-a")] == ["v1", "model-a"]


def test_two_runs_of_a_fingerprint_publish_and_the_newest_is_found(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(1)
    monkeypatch.setattr(versions.time, "time", lambda: next(ticks))
    assert versions.find(storage, "samples", "f") is None
    one, two = "f-00000b", "f-00000a"
    storage.write(f"samples/{one}/train/rows", b"one")
    storage.write("samples/f-00000c/train/rows", b"of a run that was interrupted")
    versions.publish(storage, "samples", "g-00000a", {})
    assert versions.find(storage, "samples", "f") is None
    for version in (one, two):
        assert versions.publish(storage, "samples", version, {})["fingerprint"] == "f"
    found = versions.find(storage, "samples", "f")
    assert found == versions.require(storage, "samples", two)


def test_the_latest_is_the_newest_that_is_published(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(1)
    monkeypatch.setattr(versions.time, "time", lambda: next(ticks))
    for version in ("b", "c", "a"):
        versions.publish(storage, "models", version, {})
    storage.write("models/z/weights", b"not published")
    storage.write("models/z/deeper/manifest.json", b"{}")
    versions.publish(storage, "models-of-others", "x", {})
    assert versions.latest(storage, "models") == "a"
    assert versions.require(storage, "models", "latest")["version"] == "a"


def test_what_is_not_published_is_one_sentence(storage: Storage) -> None:
    storage.write("models/v1/weights", b"w")
    with pytest.raises(StorageError) as error:
        versions.require(storage, "models", "v1")
    assert str(error.value) == f"{storage.uri}/models/v1: no such published version"
    with pytest.raises(StorageError, match="models: nothing is published here; run the job that writes models/ first"):
        versions.require(storage, "models", "latest")


def test_folders_travel(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(b"1")
    (folder / "sub/b").write_bytes(b"2")
    versions.upload(storage, folder, "models/v1")
    assert sorted(storage.list("models")) == ["models/v1/a", "models/v1/sub/b"]
    found = versions.fetch(storage, "models/v1", tmp_path / "copy")
    assert (found / "a").read_bytes() == b"1"
    assert (found / "sub/b").read_bytes() == b"2"
    some = versions.fetch(storage, "models/v1", tmp_path / "some", ("sub", "none"))
    assert isinstance(storage, LocalStorage) or [path.name for path in some.iterdir()] == ["sub"]
    assert (tmp_path / "copy").exists() != isinstance(storage, LocalStorage), "a folder is used where it is"
