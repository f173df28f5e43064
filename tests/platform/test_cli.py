"""What a job prints and how it exits."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
from ray.exceptions import AuthenticationError
from ray.train import WorkerGroupError

from mixer_platform import cli
from mixer_platform.config import RunConfig
from mixer_platform.errors import ConfigError, InputError, MixerError, StorageError


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("data: d\nworkspace: w\n")
    monkeypatch.setattr("sys.argv", ["job", "--config", str(tmp_path / "run.yaml"), "train.epochs=9"])
    monkeypatch.setattr(cli, "connect", lambda environment: None)
    monkeypatch.setattr("sys.stdout", sys.stdout)  # main() takes it away for good


def run_and_fail(job: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(job, "a job")
    out, err = capsys.readouterr()
    assert out == ""
    return stop.value.code, err  # type: ignore[return-value]


@pytest.mark.usefixtures("arguments")
def test_the_report_is_all_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def job(config: RunConfig) -> Mapping[str, Any]:
        print("something else")
        return {"epochs": config.train.epochs}

    cli.main(job, "a job")
    print("what a worker said, late")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"epochs": 9}
    assert err.splitlines() == ["something else", "what a worker said, late"]


@pytest.mark.usefixtures("arguments")
def test_overrides_stand_before_and_after_the_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, option, path, override = sys.argv
    monkeypatch.setattr("sys.argv", [program, "train.seed=4", option, path, override])
    config = cli.main(lambda config: {}, "a job")
    assert (config.train.seed, config.train.epochs) == (4, 9)
    assert capsys.readouterr().out == "{}\n"


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


def test_a_cluster_of_this_machine_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.socket() as bound_only:
        bound_only.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound_only.getsockname()[1]}"
        left = Path(cli.get_ray_address_file(None))
        assert left.is_relative_to(tmp_path)
        left.parent.mkdir(exist_ok=True)
        left.write_text(address)
        with pytest.raises(MixerError, match=rf"{left} names {address}: no Ray cluster answers there \(.*\); run `ray"):
            cli.connect()


def test_a_cluster_that_asks_for_its_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr(cli.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cli, "GcsClient", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(MixerError, match=rf"^RAY_ADDRESS={address}: .* its token; set RAY_AUTH_MODE=token"):
            cli.connect()


def test_what_a_job_was_submitted_with_is_not_handed_on_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(cli.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cli.ray, "init", lambda **settings: asked.append(settings["runtime_env"]))
    monkeypatch.setattr(cli, "read_ray_address", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    submitted = {"runtime_env": {"env_vars": {"A": "1"}}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    cli.connect({"A": "1", "B": "2"})
    cli.connect({"A": "1"})
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    cli.connect({"A": "1"})
    assert asked == [{"env_vars": {"B": "2"}}, None, {"env_vars": {"A": "1"}}]


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


class CannotStart:
    """An actor of Ray Data."""

    def __init__(self) -> None:
        raise ConfigError("index.embedder_device: not here")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


@pytest.mark.usefixtures("ray_cluster")
def test_a_mixer_error_of_an_actor_that_does_not_start_is_found() -> None:
    dataset = ray.data.range(1).map_batches(CannotStart, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.1)
    with pytest.raises(Exception, match="not here") as raised:
        dataset.materialize()
    found = cli.mixer_error_in(raised.value)
    assert isinstance(found, ConfigError)
    assert str(found) == "index.embedder_device: not here"


def test_every_error_has_an_exit_status() -> None:
    assert {error.exit_status for error in MixerError.__subclasses__()} == {1, 2}
