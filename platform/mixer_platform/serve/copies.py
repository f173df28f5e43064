"""Local copies of published versions: replicas of a machine share them, and what none of them holds makes room."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mixer_platform import versions
from mixer_platform.errors import StorageError
from mixer_platform.storage import LocalStorage, open_storage

LOCK = ".lock"


class Copy:
    """A local folder with files of a published version; it stays as long as this object, in whatever process."""

    def __init__(self, folder: Path, lock: int | None = None) -> None:
        """`lock`: a descriptor that is locked, and closed with this object."""
        self.folder = folder
        if lock is not None:
            weakref.finalize(self, os.close, lock)


def fetch(workspace: str, prefix: str, names: Iterable[str]) -> Copy:
    """Return these files of a published version: in its own folder, or copied to this machine.

    Replicas share the copy, and may make it at the same time. Raises StorageError.
    """
    storage = open_storage(workspace)
    if isinstance(storage, LocalStorage):
        return Copy(Path(storage.path(prefix)))
    cache = _cache()
    manifest = storage.tag(f"{prefix}/{versions.MANIFEST}")  # a workspace made anew may use a version's name again
    folder = cache / versions.fingerprint(storage.uri, prefix, manifest)
    copy = Copy(folder, _lock(folder, fcntl.LOCK_SH))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        _remove_unheld(cache)
    for name in missing:
        storage.download(f"{prefix}/{name}", folder / name)
    return copy


def _cache() -> Path:
    """Return this user's folder of copies. Raises StorageError if somebody else could have put something there."""
    cache = Path(tempfile.gettempdir()) / f"mixer-{os.getuid()}"
    with suppress(FileExistsError):
        cache.mkdir(mode=0o700)
    found = cache.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise StorageError(f"{cache}: others may write there; remove it, or set TMPDIR to a folder of your own")
    return cache


def _lock(folder: Path, how: int) -> int:
    """Lock a copy until the descriptor that is returned is closed, or its process dies. Raises BlockingIOError."""
    lock = os.open(folder.with_name(folder.name + LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, how)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_unheld(cache: Path) -> None:
    for folder in [each for each in cache.iterdir() if each.is_dir()]:
        try:
            lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
