"""What every job shares: arguments, one clear sentence on failure, and the report alone on stdout."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import ray
import ray.data
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.utils import get_ray_address_file, read_ray_address  # private, but Ray has no other way to ask
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError, RayError

from mixer_platform.config import RunConfig, load_config
from mixer_platform.errors import MixerError

Job = Callable[[RunConfig], Mapping[str, Any]]


def main(
    job: Job | Mapping[str, Job],
    description: str | None,
    on_ray: bool | Collection[str] = True,
    environment: Mapping[str, str] | None = None,
) -> RunConfig:
    """Parse the command line, connect to Ray, run `job`, print its report as one JSON object; return the configuration.

    Of several jobs by name the command line says which, by default the first; `on_ray` then names those that need Ray.
    `environment` is handed to every process that Ray starts for the job.

    Whatever else is printed, also after this returns, goes to stderr. Exit status: 0 done, 1 a MixerError, 2 a wrong
    configuration.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML of the run, such as jobs/configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.epochs=3")
    arguments = parser.parse_intermixed_args()
    overrides = arguments.overrides
    if isinstance(job, Mapping):
        command = next((word for word in overrides if "=" not in word), next(iter(job)))
        if command not in job:
            parser.error(f"{command}: no such command; expected one of {', '.join(job)}")
        overrides = [word for word in overrides if word != command]
        on_ray = on_ray is True or (on_ray is not False and command in on_ray)
        job = job[command]
    # For good: Ray prints what its workers said whenever it arrives, also after the report.
    stdout, sys.stdout = sys.stdout, sys.stderr
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        config = load_config(arguments.config, overrides)
        if on_ray:
            connect(environment)
        report = job(config)
    except Exception as error:  # Ray wraps what its tasks and its trainers meet
        cause = mixer_error_in(error)
        if cause is None:
            raise
        fail(cause)
    print(json.dumps(report), file=stdout, flush=True)
    return config


def connect(environment: Mapping[str, str] | None = None) -> None:
    """Join the Ray cluster of RAY_ADDRESS or of this machine; start one on this machine if there is none.

    `environment` is what its workers get besides their machine's.

    Raises MixerError if the cluster that RAY_ADDRESS or `ray start` named cannot be joined.
    """
    ray.data.DataContext.get_current().raise_original_map_exception = True  # what it wraps it in loses a MixerError
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    place, mend = f"RAY_ADDRESS={address}", "mend or unset it"
    if address in ("", "auto"):  # Ray then goes where the last `ray start` of this machine was
        address = read_ray_address() or ""
        place, mend = f"{get_ray_address_file(None)} names {address}", "run `ray stop` or delete that file"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
            if not address.startswith("ray://"):
                GcsClient(address=address)  # refused for want of a token, it says so
        given = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")).get("runtime_env", {}).get("env_vars", {})
        more = {name: value for name, value in (environment or {}).items() if name not in given}  # twice is refused
        runtime = {"env_vars": more} if more else None
        ray.init(logging_level=logging.WARNING, log_to_driver=True, runtime_env=runtime)
    except AuthenticationError as error:
        raise MixerError(
            f"{place}: the Ray cluster there asks for its token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        if not address:
            raise
        reason = str(error).strip().splitlines()[0]
        raise MixerError(f"{place}: no Ray cluster answers there ({reason}); {mend}") from error


def fail(error: MixerError) -> NoReturn:
    """Say what is wrong in one sentence and exit with the error's status."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_status)


def mixer_error_in(error: BaseException | None) -> MixerError | None:
    """Return the MixerError that a Ray error wraps, however deep, or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MixerError) and not isinstance(error, RayError):  # Ray mixes both, and tells the traceback
            return error
        seen.add(id(error))
        workers = list(getattr(error, "worker_failures", {}).values())  # Ray Train's
        inner = [each for each in error.args if isinstance(each, BaseException)]  # of an actor that did not start
        wrapped = getattr(error, "cause", None) or error.__cause__ or error.__context__
        error = next(iter([*workers, *inner]), None) or wrapped
    return None
