"""What a job prints and how it exits."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import WorkerGroupError

from mixer_platform import cli
from mixer_platform.config import RunConfig
from mixer_platform.errors import InputError, MixerError, StorageError


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("data: d\nworkspace: w\n")
    monkeypatch.setattr("sys.argv", ["job", "--config", str(tmp_path / "run.yaml"), "train.epochs=9"])
    monkeypatch.setattr(cli, "connect", lambda: None)


def run_and_fail(job: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(job, "a job")
    out, err = capsys.readouterr()
    assert out == ""
    return stop.value.code, err  # type: ignore[return-value]


@pytest.mark.usefixtures("arguments")
def test_the_report_is_the_last_line_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def job(config: RunConfig) -> Mapping[str, Any]:
        print("something else")
        return {"epochs": config.train.epochs}

    cli.main(job, "a job")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"epochs": 9}


@pytest.mark.usefixtures("arguments")
def test_an_error_is_one_sentence_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    def job(config: RunConfig) -> Mapping[str, Any]:
        raise InputError("d/items: not found")

    assert run_and_fail(job, capsys) == (1, "error: d/items: not found\n")


@pytest.mark.usefixtures("arguments", "ray_cluster")
def test_an_error_from_a_ray_task_is_the_same_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def job(config: RunConfig) -> Mapping[str, Any]:
        @ray.remote
        def task() -> None:
            raise StorageError("s3://b/k: no such key")

        return ray.get(task.remote())

    status, said = run_and_fail(job, capsys)
    assert status == 1
    assert said.splitlines()[-1] == "error: s3://b/k: no such key"


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.ray, "is_initialized", lambda: False)  # the tests' cluster is another one
    with socket.socket() as bound_only:
        bound_only.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound_only.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(MixerError, match=f"RAY_ADDRESS={address}: no Ray cluster answers there"):
            cli.connect()


@pytest.mark.usefixtures("arguments")
def test_a_programming_error_keeps_its_trace() -> None:
    def job(config: RunConfig) -> Mapping[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.main(job, "a job")


def test_a_mixer_error_is_found_however_deep() -> None:
    wanted = InputError("deep")
    middle = RuntimeError("middle")
    middle.__cause__ = wanted
    outer = RuntimeError("outer")
    outer.cause = middle  # type: ignore[attr-defined]
    assert cli.mixer_error_in(outer) is wanted
    loop = RuntimeError("loop")
    loop.__context__ = middle
    middle.__cause__ = loop
    assert cli.mixer_error_in(loop) is None


def test_a_mixer_error_of_a_train_worker_is_found() -> None:
    wanted = StorageError("gone")
    assert cli.mixer_error_in(WorkerGroupError("a long story", {1: wanted})) is wanted


def test_every_error_has_an_exit_status() -> None:
    assert {error.exit_status for error in MixerError.__subclasses__()} == {1, 2}
