"""A Ray cluster of one machine that lives as long as the demo, and jobs submitted to it."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mixer_platform.errors import MixerError

ROOT = Path(__file__).parents[3]
MARK = "MIXER_DEMO"  # in the environment of every process of the demo
_SHOWN = re.compile(r"execution finished|Reporting training result|^error: |^\d\d:\d\d:\d\d ")
# Ray Data runs each kind of shuffle task in workers of its own, and starting one takes seconds: keep them.
_KEEP_WORKERS = {"num_workers_soft_limit": 12, "idle_worker_killing_time_threshold_ms": 60_000}
_RUNTIME_ENV = {"env_vars": {"PYTHONPATH": "platform"}}


class LocalCluster:
    """`ray start --head` on free ports, with a token of its own; ended by leaving the context."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.mark = secrets.token_hex(8)
        self.dashboard = _free_port()
        self._environment = os.environ | {
            MARK: self.mark,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": "",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody else asks the service: end at once
            "HF_HUB_OFFLINE": "1",  # the demo's encoders are packages
        }

    def __enter__(self) -> LocalCluster:
        self.logs.mkdir(parents=True, exist_ok=True)
        # A short path: sockets below it must stay within 107 characters.
        self._scratch = tempfile.TemporaryDirectory(prefix="mixer-ray-", dir="/tmp", ignore_cleanup_errors=True)
        ports = {
            "port": _free_port(),
            "dashboard-port": self.dashboard,
            "ray-client-server-port": _free_port(),
            "dashboard-agent-listen-port": _free_port(),
        }
        command = [
            *("ray", "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
            *(f"--{name}={port}" for name, port in ports.items()),
            *(f"--temp-dir={self._scratch.name}", f"--num-cpus={max(2, os.cpu_count() or 1)}"),
            f"--object-store-memory={10**9}",
            f"--system-config={json.dumps(_KEEP_WORKERS)}",
        ]
        with (self.logs / "ray.log").open("w") as log:
            self._head = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the head, which ends its node's processes, and wait until all of them are gone."""
        self._head.send_signal(signal.SIGTERM)
        try:
            self._head.wait(30)
        except subprocess.TimeoutExpired:
            self._head.kill()
        deadline = time.monotonic() + 15
        while (left := processes(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in left:
            os.kill(process, signal.SIGKILL)
        self._scratch.cleanup()

    def submit(self, name: str, arguments: Sequence[str]) -> dict[str, Any]:
        """Run `jobs/NAME.py` by `ray job submit`; return the report it prints. Raises MixerError when it fails."""
        command = [
            *("ray", "job", "submit", "--address", f"http://127.0.0.1:{self.dashboard}", "--working-dir", str(ROOT)),
            *("--runtime-env-json", json.dumps(_RUNTIME_ENV), "--", "python", f"jobs/{name}.py", *arguments),
        ]
        print(f"\n$ ray job submit --working-dir . -- python jobs/{name}.py {' '.join(arguments)}", flush=True)
        path = self.logs / f"{name}.log"
        with path.open("w") as log:
            job = subprocess.Popen(
                command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert job.stdout is not None
            report = _follow(job.stdout, log)
            status = job.wait()
        if status or report is None:
            raise MixerError(f"{name} failed; its log is {path}")
        return report

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self._head.poll() is not None:
                raise MixerError(f"Ray did not start; see {self.logs / 'ray.log'}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.dashboard}/api/version", timeout=2):
                    return
            except urllib.error.HTTPError:
                return  # it answers: without the token, with a refusal
            except OSError:
                time.sleep(0.2)
        raise MixerError(f"Ray did not answer within 120 s; see {self.logs / 'ray.log'}")


def processes(mark: str) -> list[int]:
    """Return the ids of the running processes, this one left out, whose environment holds the demo's mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _follow(lines: IO[str], log: IO[str]) -> dict[str, Any] | None:
    """Copy a job's output to its log, show the telling lines, and return the last JSON object."""
    report = None
    for line in lines:
        log.write(line)
        if line.startswith("{"):
            try:
                report = json.loads(line)
            except ValueError:
                continue
        elif _SHOWN.search(line):
            print("   ", line.rstrip()[:150], flush=True)
    return report


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
