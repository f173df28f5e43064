"""The image, as far as its recipe tells: it is not built here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mixer_platform.serve.ingress import ENVIRONMENT

ROOT = Path(__file__).parents[2]
RECIPE = re.sub(r"\\\n\s*", "", (ROOT / "cluster/Dockerfile").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lines(instruction: str) -> list[str]:
    return re.findall(rf"^{instruction} (.+)$", RECIPE, re.MULTILINE)


def test_the_python_is_one_the_project_supports() -> None:
    (base,) = lines("FROM")
    version = re.match(r"python:(\d+\.\d+)-slim", base)
    assert version
    assert version[1] in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_dependencies_are_the_projects(
    extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the recipe's one line of Python: it lists the dependencies, the extra's that was chosen, and the traces'."""
    (line,) = re.findall(r'python -c "(.+?)" > /tmp/requirements.txt', RECIPE)
    monkeypatch.chdir(ROOT)
    exec(line.replace("$EXTRA", extra))
    listed = [str(Requirement(text)) for text in capsys.readouterr().out.splitlines()]
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras[extra] + extras["traces"]
    assert listed == [str(Requirement(text)) for text in wanted]


def test_it_has_what_the_launcher_and_kuberay_call() -> None:
    installed = re.search(r"apt-get install (.+?)&&", RECIPE)
    assert installed
    # The launcher's copies, its autoscaler's way to other nodes, KubeRay's probes.
    assert {"rsync", "openssh-client", "wget"} <= set(installed[1].split())
    (environment,) = lines("ENV")
    assert "HOME=/home/mixer" in environment  # the launcher expands ~ by it
    assert "PYTHONPATH=/app:/app/platform" in environment


def test_it_does_not_run_as_root() -> None:
    assert lines("USER") == ["1000"]  # a number, so that Kubernetes can tell
    assert "--uid 1000 mixer" in RECIPE


def test_only_what_it_copies_is_sent_to_the_builder() -> None:
    copied = {line.split()[0] for line in lines("COPY")}
    sent = (ROOT / "cluster/Dockerfile.dockerignore").read_text().splitlines()
    assert sent[0] == "*"
    assert {line.removeprefix("!") for line in sent if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_it_has_what_ray_serve_reads_when_it_is_imported() -> None:
    (environment,) = lines("ENV")
    of_one_line = {name: value for name, value in ENVIRONMENT.items() if "\n" not in value}
    assert set(ENVIRONMENT) - set(of_one_line) == {"RAY_SERVE_HAPROXY_RETRY_ON"}
    for name, value in of_one_line.items():
        assert f"{name}={value}" in environment.split()
