"""Versions: immutable folders `<kind>/<version>/` of a workspace, visible once their manifest is published.

A version is named `<fingerprint>-<6 hex digits>`: what it was made of, and which run made it. Every run writes into a
folder of its own, so that two at once cannot mix their files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixer_platform.errors import MissingError, StorageError
from mixer_platform.storage import LocalStorage, Storage

MANIFEST = "manifest.json"


def fingerprint(*parts: Any) -> str:
    """Return 12 hex digits that name the JSON-able `parts`: the same inputs and settings give the same ones."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def new_version(fingerprint: str) -> str:
    """Return a name that no other run has for a version with this fingerprint."""
    return f"{fingerprint}-{secrets.token_hex(3)}"


def fingerprint_of(version: str) -> str:
    """Return the fingerprint in a version's name; a name without one stands for itself."""
    return re.sub(r"-[0-9a-f]{6}$", "", version)


def find(storage: Storage, kind: str, fingerprint: str) -> dict[str, Any] | None:
    """Return the manifest of the newest published version with this fingerprint, None if there is none."""
    names = [name for name in storage.folders(kind) if fingerprint_of(name) == fingerprint]
    return _newest(storage, kind, names)


def manifest(storage: Storage, kind: str, version: str) -> dict[str, Any] | None:
    """Return the manifest of a published version, None if it is not (or not yet) published."""
    key = f"{kind}/{version}/{MANIFEST}"
    return json.loads(storage.read(key)) if storage.tag(key) else None


def publish(storage: Storage, kind: str, version: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Make a version visible, atomically and once: ConflictError if it is published already."""
    named = {"version": version, "fingerprint": fingerprint_of(version)}
    whole = {**named, "created_ms": int(time.time() * 1000), **content}
    storage.publish(f"{kind}/{version}/{MANIFEST}", to_json(whole), replaces=None)
    return whole


def use(storage: Storage, kind: str, version: str) -> None:
    """Mark a version's folder as in use now, so that it is young to whoever collects garbage."""
    storage.write(f"{kind}/{version}/USED", f"{time.time_ns()}\n".encode())


def latest(storage: Storage, kind: str) -> str:
    """Return the newest published version of a kind. Raises StorageError when there is none."""
    newest = _newest(storage, kind, storage.folders(kind))
    if newest is None:
        raise StorageError(f"{storage.uri}/{kind}: nothing is published here; run the job that writes {kind}/ first")
    return newest["version"]


def require(storage: Storage, kind: str, version: str) -> dict[str, Any]:
    """Return the manifest of `version` ("latest": the newest). Raises MissingError when it is not published."""
    if version == "latest":
        version = latest(storage, kind)
    found = manifest(storage, kind, version)
    if found is None:
        raise MissingError(f"{storage.uri}/{kind}/{version}: no such published version")
    return found


def fetch(storage: Storage, prefix: str, destination: str | Path, names: Iterable[str] = ("",)) -> Path:
    """Return a local folder with the files below `prefix`: the folder itself, or a copy under `destination`.

    Only what begins with one of `names` is copied; default: everything.
    """
    if isinstance(storage, LocalStorage):
        return Path(storage.path(prefix))
    wanted = tuple(f"{prefix}/{name}" for name in names)
    for key in storage.list(prefix):
        if not key.startswith(wanted):
            continue
        target = Path(destination) / key
        if not target.exists():
            storage.download(key, target)
    return Path(destination) / prefix


def upload(storage: Storage, folder: Path, prefix: str) -> None:
    """Copy every file of a local folder below `prefix`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.upload(f"{prefix}/{path.relative_to(folder)}", path)


def to_json(content: Mapping[str, Any]) -> bytes:
    """Return `content` as readable JSON."""
    return json.dumps(content, indent=1).encode()


def read_json(storage: Storage, key: str) -> dict[str, Any]:
    """Return the JSON object at `key`. Raises StorageError when it is not there."""
    return json.loads(storage.read(key))


def commit(folder: str | Path) -> str | None:
    """Return the commit of the code in `folder`: what MIXER_COMMIT says, for jobs have no repository, else git's."""
    if said := os.environ.get("MIXER_COMMIT"):
        return said
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _newest(storage: Storage, kind: str, names: Iterable[str]) -> dict[str, Any] | None:
    published = [found for name in names if (found := manifest(storage, kind, name))]
    return max(published, key=lambda entry: entry["created_ms"], default=None)
