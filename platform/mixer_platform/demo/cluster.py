"""A Ray cluster of one machine that lives as long as the demo, and jobs submitted to it."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mixer_platform.errors import MixerError
from mixer_platform.loopback import free_ports, open_url
from mixer_platform.serve.ingress import OWN_PORTS, own_ports
from mixer_platform.versions import commit

ROOT = Path(__file__).parents[3]
MARK = "MIXER_DEMO"  # in the environment of every process of the demo
_ATTEMPTS = 3
_PASSED = re.compile(r"execution finished in ([\d.]+) seconds")
_ROWS = re.compile(r"\((\w+)Worker\): (\d+)/(\d+)$")
_EPOCH = re.compile(r"'epoch': (\d+), 'loss': ([\d.]+)")
_SAID = re.compile(r"^(error: .*|\d\d:\d\d:\d\d .*)")
# Ray Data runs each kind of shuffle task in workers of its own, and starting one takes seconds: keep them.
_KEEP_WORKERS = {"num_workers_soft_limit": 12, "idle_worker_killing_time_threshold_ms": 60_000}
_RUNTIME_ENV = {"env_vars": {"PYTHONPATH": "platform"}}


class LocalCluster:
    """`ray start --head` on free ports, with a token of its own; ended by leaving the context.

    `programs` is the folder of the `ray` and the `python` of the cluster; default: this Python's.
    """

    def __init__(self, logs: Path, programs: Path | None = None) -> None:
        self.logs = logs
        self.mark = secrets.token_hex(8)
        names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
        free = free_ports(len(names) + OWN_PORTS)
        self._ports = dict(zip(names, free[: len(names)], strict=True))
        self.dashboard = self._ports["dashboard-port"]
        self._url = f"http://127.0.0.1:{self.dashboard}"
        self._environment = os.environ | {
            MARK: self.mark,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": "",
            **dict.fromkeys(("no_proxy", "NO_PROXY"), _past_proxies()),
            "PATH": f"{programs or Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            **own_ports(free[len(names) :]),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody else asks the service: end at once
            "MIXER_COMMIT": commit(ROOT) or "",  # jobs get the files, not the repository
            "HF_HUB_OFFLINE": "1",  # the demo's encoders are packages
            "RAY_DEDUP_LOGS": "0",  # every epoch's line is told
        }

    def __enter__(self) -> LocalCluster:
        self.logs.mkdir(parents=True, exist_ok=True)
        # A short path: sockets below it must stay within 107 characters.
        self._scratch = tempfile.TemporaryDirectory(prefix="mixer-ray-", dir="/tmp", ignore_cleanup_errors=True)
        command = [
            *("ray", "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
            *(f"--{name}={port}" for name, port in self._ports.items()),
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
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._scratch.cleanup()

    def submit(self, name: str, arguments: Sequence[str]) -> dict[str, Any]:
        """Run `jobs/NAME.py` by `ray job submit`; return the report it prints. Raises MixerError when it fails."""
        identity = f"{name}-{secrets.token_hex(4)}"
        command = [
            *("ray", "job", "submit", "--address", self._url, "--submission-id", identity, "--no-wait"),
            *("--working-dir", str(ROOT), "--runtime-env-json", json.dumps(_RUNTIME_ENV)),
            *("--", "python", f"jobs/{name}.py", *arguments),
        ]
        print(f"\n$ ray job submit --working-dir . -- python jobs/{name}.py {' '.join(arguments)}", flush=True)
        path = self.logs / f"{name}.log"
        with path.open("w") as log:
            submitted = subprocess.run(
                command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, check=False
            )
            succeeded = not submitted.returncode and self._follow(identity, log)
        report = _last_report(path.read_text())
        if not succeeded or report is None:
            raise MixerError(f"{name} failed; its log is {path}")
        return report

    def _follow(self, job: str, log: IO[str]) -> bool:
        """Copy a job's output to its log, show the telling lines, and return whether the job succeeded.

        Without `--no-wait` the client does this too, but it notices the end of a job seconds late.
        """
        seen, told, status = "", "", "PENDING"
        while status in ("PENDING", "RUNNING"):
            time.sleep(0.5)
            status = self._ask(f"/api/jobs/{job}")["status"]  # before the output, which is whole once the job has ended
            output = self._ask(f"/api/jobs/{job}/logs")["logs"] or ""
            whole = output if status not in ("PENDING", "RUNNING") else output[: output.rfind("\n") + 1]
            for shown in telling(whole[len(seen) :].splitlines(), told):
                print("   ", shown, flush=True)
                told = shown
            log.write(whole[len(seen) :])
            seen = whole
        return status == "SUCCEEDED"

    def _ask(self, path: str) -> dict[str, Any]:
        token = {"Authorization": f"Bearer {self._environment['RAY_AUTH_TOKEN']}"}
        attempt = 0
        while True:
            try:
                with open_url(urllib.request.Request(self._url + path, headers=token), 30) as reply:
                    return json.load(reply)
            except OSError as error:
                attempt += 1
                if attempt == _ATTEMPTS:
                    raise MixerError(f"Ray does not answer any more ({error}); see {self.logs / 'ray.log'}") from error
                time.sleep(1)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self._head.poll() is not None:
                raise MixerError(f"Ray did not start; see {self.logs / 'ray.log'}")
            try:
                with open_url(f"{self._url}/api/version", 2):
                    return
            except urllib.error.HTTPError:
                return  # it answers: without the token, with a refusal
            except OSError:
                time.sleep(0.2)
        raise MixerError(f"Ray did not answer within 120 s; see {self.logs / 'ray.log'}")


def telling(lines: Iterable[str], told: str) -> Iterator[str]:
    """Yield what the lines tell a person of a job's progress, `told` being what was said last, without what repeats it:
    Ray Train reports an epoch for each worker, Ray Data a state for each look at it."""
    for shown in filter(None, map(progress, lines)):
        if shown != told:
            yield shown
        told = shown


def progress(line: str) -> str | None:
    """Return what a line of a job's output tells a person of its progress, if anything."""
    if rows := _ROWS.search(line):
        what, done, total = rows[1], int(rows[2]), max(int(rows[2]), int(rows[3]))
        filled = 30 * done // max(total, 1)
        return f"[{'#' * filled}{'.' * (30 - filled)}] {done:,} of {total:,} rows through {what}Worker"
    if epoch := _EPOCH.search(line):
        return f"epoch {int(epoch[1]) + 1}, loss {float(epoch[2]):.3f}"
    if passed := _PASSED.search(line):
        return f"Ray Data: one pass done in {float(passed[1]):.1f} s"
    said = _SAID.match(line)
    return said[1] if said else None


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


def _last_report(output: str) -> dict[str, Any] | None:
    """Return the last line of a job's output that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def _past_proxies() -> str:
    """Return what no_proxy must say: this machine, and what it says already, in either spelling."""
    said = [os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    return ",".join(filter(None, ["127.0.0.1", "localhost", *said]))
