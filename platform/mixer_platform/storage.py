"""A workspace is a root, a folder or `s3://bucket/prefix`, that holds immutable versions and their manifests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Protocol

import pyarrow.fs

from mixer_platform.errors import MissingError, published_already
from mixer_platform.s3 import S3Storage, local_errors, staged

_GONE = {errno.ENOENT, errno.ENOTDIR}
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]+://")


class Storage(Protocol):
    """Keys are relative, with `/`. Every method raises StorageError with the full address when it cannot."""

    uri: str
    filesystem: pyarrow.fs.FileSystem

    def path(self, key: str = "") -> str:
        """Return where `key` is, as `filesystem` spells it (what Ray Data reads and writes)."""

    def read(self, key: str) -> bytes:
        """Return the bytes of `key`."""

    def write(self, key: str, data: bytes) -> None:
        """Write `key` whole: a reader sees the old bytes or the new, never a part."""

    def upload(self, key: str, path: Path) -> None:
        """Copy the local file `path` to `key`, whole or not at all."""

    def download(self, key: str, path: Path) -> None:
        """Copy `key` to the local file `path`, whole or not at all."""

    def modified(self, prefix: str) -> float | None:
        """Return when the newest key below the folder `prefix` was written, in seconds since the epoch.

        Files that are still being written count. None if there are none.
        """

    def list(self, prefix: str, most: int | None = None) -> dict[str, str]:
        """Return every key below the folder `prefix`, or any `most` of them, with a tag that changes when its content
        does."""

    def folders(self, prefix: str) -> Sequence[str]:
        """Return the names of the folders directly in the folder `prefix`, in order, without looking into them."""

    def tag(self, key: str) -> str | None:
        """Return the tag of `key`'s content, None if there is none."""

    def publish(self, key: str, data: bytes, replaces: str | None) -> None:
        """Write `key` only if its tag is still `replaces` (None: only if it does not exist); else ConflictError."""

    def delete(self, prefix: str) -> None:
        """Delete every key below the folder `prefix`."""


def open_storage(uri: str) -> Storage:
    """Open the folder or `s3://bucket/prefix` at `uri`. A folder need not exist yet; a bucket must."""
    if uri.startswith("s3://"):
        return S3Storage(uri)
    if _SCHEME.match(uri):
        raise _not_read(uri)
    return LocalStorage(uri)


def read_uri(uri: str) -> bytes:
    """Return the bytes behind a picture's URI: an absolute path or `s3://bucket/key`.

    Raises MissingError if there is no such picture, StorageError if the storage does not answer.
    """
    if not _SCHEME.match(uri):
        root, key = os.path.split(uri)
        return LocalStorage(root).read(key)
    if not uri.startswith("s3://"):
        raise _not_read(uri)
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return _bucket(bucket).read(key)


def resolve_uri(uri: str, root: str) -> str:
    """Return `uri` as it is if it is absolute or has a scheme, else below `root`."""
    return uri if _SCHEME.match(uri) or uri.startswith("/") else f"{root.rstrip('/')}/{uri}"


@lru_cache(maxsize=16)  # a client takes a while to make; pictures lie in many folders, but in few buckets
def _bucket(name: str) -> Storage:
    return S3Storage(f"s3://{name}", check=False)


class LocalStorage:
    """A workspace in a folder."""

    def __init__(self, uri: str) -> None:
        self.root = Path(uri).expanduser().absolute()
        self.uri = str(self.root)
        self.filesystem = pyarrow.fs.LocalFileSystem()

    def path(self, key: str = "") -> str:
        return str(self.root / key)

    def read(self, key: str) -> bytes:
        with local_errors(self.path(key)):
            return (self.root / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        with local_errors(self.path(key)), staged(self.root / key) as file:
            file.write(data)

    def upload(self, key: str, path: Path) -> None:
        _copy(path, self.root / key)

    def download(self, key: str, path: Path) -> None:
        _copy(self.root / key, path)

    def modified(self, prefix: str) -> float | None:
        return max((stat.st_mtime for _, stat in self._files(prefix)), default=None)

    def list(self, prefix: str, most: int | None = None) -> dict[str, str]:
        files = islice(self._files(prefix, links=True), most)
        visible = [(path, stat) for path, stat in files if not path.name.startswith(".")]
        return {str(path.relative_to(self.root)): _tag_of(stat) for path, stat in sorted(visible)}

    def folders(self, prefix: str) -> Sequence[str]:
        folder = self.root / prefix
        with local_errors(str(folder)):
            return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def tag(self, key: str) -> str | None:
        path = self.root / key
        with local_errors(str(path)):
            if not path.is_file():
                return None
            with path.open("rb") as file:  # of any size
                return hashlib.file_digest(file, "sha256").hexdigest()

    def publish(self, key: str, data: bytes, replaces: str | None) -> None:
        with local_errors(self.path(key)), self._locked(key), staged(self.root / key) as file:
            if self.tag(key) != replaces:
                raise published_already(self.path(key))
            file.write(data)

    def delete(self, prefix: str) -> None:
        with local_errors(self.path(prefix)):
            for path, _ in self._files(prefix):
                if not path.name.startswith("."):
                    path.unlink(missing_ok=True)
        # What is left is nobody's: locks, what a killed run had staged, and folders.
        for path in sorted((self.root / prefix).rglob("*"), reverse=True):
            with suppress(OSError):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        with suppress(OSError):
            (self.root / prefix).rmdir()

    def _files(self, prefix: str, links: bool = False) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield every file below a folder, none if there is no such folder; what goes meanwhile is passed over.

        With `links` also what lies behind links to folders, once, and links to nothing.
        """

        def failed(error: OSError) -> None:
            if error.errno not in _GONE:
                raise error

        seen: set[str] = set()
        with local_errors(self.path(prefix)):
            for folder, folders, names in os.walk(self.root / prefix, onerror=failed, followlinks=links):
                if links:
                    real = os.path.realpath(folder)
                    if real in seen:
                        folders.clear()
                        continue
                    seen.add(real)
                    folders.sort(key=lambda name: os.path.islink(f"{folder}/{name}"))  # by its own name, if it has one
                for name in names:
                    path = Path(folder, name)
                    try:
                        stat = path.stat()
                    except FileNotFoundError:  # it was being written, and now has its name
                        if not (links and path.is_symlink()):
                            continue
                        stat = path.lstat()
                    yield path, stat

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        lock = self.root / f"{key}.lock"
        lock = lock.with_name(f".{lock.name}")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _copy(source: Path, target: Path) -> None:
    with local_errors(str(source)), source.open("rb") as file, local_errors(str(target)), staged(target) as copy:
        shutil.copyfileobj(file, copy)


def _not_read(uri: str) -> MissingError:
    return MissingError(f"{uri}: only folders and s3://bucket/prefix are read and written")


def file_tag(path: Path) -> str:
    """Return what changes when a file of this machine does. Raises OSError."""
    return _tag_of(path.stat())


def _tag_of(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"
