"""Local copies of published versions: replicas of a machine share them, and what none of them holds makes room."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from mixer_platform import versions
from mixer_platform.errors import StorageError
from mixer_platform.storage import LocalStorage, open_storage

LOCK = ".lock"


class Copy:
    """A local folder with files of a published version; it stays as long as this object, in whatever process."""

    def __init__(self, folder: Path, held: IO[str] | None = None) -> None:
        """`held`: a file that is locked, and with that object is not any more."""
        self.folder, self._held = folder, held


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
    held = _lock(folder, fcntl.LOCK_SH)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        _remove_unheld(cache)
    for name in missing:
        storage.download(f"{prefix}/{name}", folder / name)
    return Copy(folder, held)


def _cache() -> Path:
    """Return this user's folder of copies. Raises StorageError if somebody else could have put something there."""
    cache = Path(tempfile.gettempdir()) / f"mixer-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    found = cache.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise StorageError(f"{cache}: others may write there; remove it, or set TMPDIR to a folder of your own")
    return cache


def _lock(folder: Path, how: int) -> IO[str]:
    """Lock a copy: it ends as the file that is returned is closed, or its process dies. Raises BlockingIOError."""
    file = folder.with_name(folder.name + LOCK).open("a")
    fcntl.flock(file, how)
    return file


def _remove_unheld(cache: Path) -> None:
    for folder in [each for each in cache.iterdir() if each.is_dir()]:
        try:
            with _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
