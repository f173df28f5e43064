"""The folder `platform/` must not shadow Python's own module."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).parents[2]


def test_there_is_no_package_of_that_name() -> None:
    assert (ROOT / "platform/mixer_platform/__init__.py").exists()
    assert not (ROOT / "platform/__init__.py").exists()


def test_in_pytest() -> None:
    assert platform.python_version() == ".".join(map(str, sys.version_info[:3]))


def test_in_a_plain_process_in_the_checkout() -> None:
    code = "import platform, mixer_platform; print(platform.system())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")])}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{platform.system()}\n", done.stderr


@pytest.mark.usefixtures("ray_cluster")
def test_in_a_ray_worker_with_a_working_dir(tmp_path: Path) -> None:
    """As `ray job submit --working-dir .` does it: the checkout is the worker's current folder."""
    with zipfile.ZipFile(tmp_path / "checkout.zip", "w") as archive:
        for path in sorted(ROOT.glob("platform/**/*.py")):
            archive.write(path, Path("checkout") / path.relative_to(ROOT))
    runtime_env = {"working_dir": f"file://{tmp_path}/checkout.zip", "env_vars": {"PYTHONPATH": "platform"}}

    @ray.remote(runtime_env=runtime_env)
    def look() -> tuple[str, str, list[str]]:
        import platform

        import mixer_platform

        return platform.system(), os.path.relpath(mixer_platform.__file__), sorted(os.listdir())

    assert ray.get(look.remote()) == (platform.system(), "platform/mixer_platform/__init__.py", ["platform"])
