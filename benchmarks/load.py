"""Load on a service of this machine: in closed loop by wrk, in open or closed loop by a process of this file.

    python benchmarks/load.py URL PHOTOS --rate 50 | --clients 8

PHOTOS is a folder of JPEGs, all of which are sent in turn as bodies of POST URL. At a fixed rate a request is due when
it is due, whatever became of those before, and its latency counts from then: nothing is left out because the service,
or this process, was busy. Runs until its standard input ends and then prints one JSON object, a column for each thing
known of the replies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

MOST_CONNECTIONS = 900  # select() takes no file above 1024
LOST = 0  # in the place of a status: the connection ended before the reply did
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_MODEL, _INDEX = re.compile(rb'"model":"([^"]*)"'), re.compile(rb'"index":"([^"]*)"')
_WRK = """
local threads, photos, at = 0, {}, 0
function setup(thread) thread:set("number", threads); threads = threads + 1 end
function init(args)
  for name in io.lines(args[1] .. "/names") do
    if name:sub(1, 1) == "/" then  -- a path to get
      photos[#photos + 1] = wrk.format("GET", name)
    else
      local file = io.open(args[1] .. "/" .. name, "rb")
      photos[#photos + 1] = wrk.format("POST", nil, {["content-type"] = "image/jpeg"}, file:read("*a"))
      file:close()
    end
  end
  at = number * 61
end
function request() at = at + 1; return photos[at % #photos + 1] end
function done(summary, latency, requests)
  local e = summary.errors
  local form = '{"requests": %d, "seconds": %f, "refused": %d, "lost": %d, "p50": %f, "p90": %f, "p99": %f}\\n'
  io.write(string.format(form, summary.requests, summary.duration / 1e6, e.status,
    e.connect + e.read + e.write + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(90) / 1e3, latency:percentile(99) / 1e3))
end
"""


# What the benchmarks call --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replies:
    """What became of requests, in the order they were due: seconds since the first, milliseconds since due until sent
    and until answered, statuses, "model index" of the answers, and whether they were degraded."""

    due: np.ndarray
    late_ms: np.ndarray
    ms: np.ndarray
    status: np.ndarray
    version: list[str | None]
    degraded: int
    untouched: int  # of the lost ones: the server ended a connection that it had kept open, and replied no byte

    @property
    def statuses(self) -> dict[str, int]:
        return {str(status): count for status, count in sorted(Counter(self.status.tolist()).items())}

    @property
    def failed(self) -> int:
        return int((self.status != 200).sum())

    def quantiles(self) -> dict[str, float]:
        """Return p50, p90 and p99 of what was answered with 200, milliseconds."""
        good = self.ms[self.status == 200]
        if not len(good):
            return {"p50": float("nan"), "p90": float("nan"), "p99": float("nan")}
        return {f"p{percent}": float(np.percentile(good, percent)) for percent in (50, 90, 99)}

    def after(self, seconds: float) -> Replies:
        """Return those that were due after so many seconds."""
        kept = self.due >= seconds
        return replace(
            self,
            due=self.due[kept],
            late_ms=self.late_ms[kept],
            ms=self.ms[kept],
            status=self.status[kept],
            version=[version for version, keep in zip(self.version, kept, strict=True) if keep],
        )


def by_wrk(url: str, photos: Path, clients: int, seconds: float) -> dict[str, float]:
    """Ask in closed loop; return requests, qps, p50, p90 and p99 (ms), refused (statuses above 399) and lost.

    wrk adds to latencies above twice the mean those of requests that, in its view, waited for them: p90 and p99 are
    upper bounds.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_WRK)
        script.flush()
        command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", script.name]
        run = subprocess.run([*command, url, "--", str(photos)], capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"wrk failed: {run.stdout} {run.stderr}")
    found = json.loads(lines[-1])
    return {**found, "qps": (found["requests"] - found["refused"]) / found["seconds"]}


def closed_loop(url: str, photos: Path, clients: int, seconds: float) -> dict[str, float]:
    """Ask in closed loop, by wrk where it is installed."""
    if shutil.which("wrk"):
        return by_wrk(url, photos, clients, seconds)
    with running(url, photos, clients=clients) as load:
        time.sleep(seconds)
    replies = load.replies
    good = int((replies.status == 200).sum())
    lost = int((replies.status == LOST).sum())
    counts = {"requests": len(replies.due), "refused": replies.failed - lost, "lost": lost}
    return {**counts, "seconds": load.seconds, "qps": good / load.seconds, **replies.quantiles()}


class Load:
    """A generator that runs. `replies` are known once it has ended."""

    replies: Replies
    seconds: float

    def __init__(self, url: str, photos: Path, *how: str) -> None:
        command = [sys.executable, __file__, url, str(photos), *how]
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  a pipe would fill
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._output, text=True)
        self._began = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait(120):
            raise SystemExit("the load generator failed")
        self._output.seek(0)
        found = json.load(self._output)
        self.seconds = found["seconds"]
        due, late_ms, ms, status = (np.array(found[name]) for name in ("due", "late_ms", "ms", "status"))
        self.replies = Replies(due, late_ms, ms, status, found["version"], found["degraded"], found["untouched"])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def running(
    url: str, photos: Path, rate: float | None = None, clients: int | None = None, poisson: bool = False
) -> Iterator[Load]:
    """Load a service as long as the context lasts: at a rate (1/s), or in closed loop by so many clients."""
    how = ["--rate", str(rate)] if rate else ["--clients", str(clients)]
    load = Load(url, photos, *how, *(["--poisson"] if poisson else []))
    try:
        yield load
    except BaseException:
        load.kill()
        raise
    load.end()


def at_rate(url: str, photos: Path, rate: float, seconds: float, poisson: bool = False) -> Replies:
    """Load a service at a rate (1/s) for so long; what is due in the first second, a cold start, does not count."""
    with running(url, photos, rate=rate, poisson=poisson) as load:
        time.sleep(seconds + 1)
    return load.replies.after(1.0)


# The generator -------------------------------------------------------------------------------------------------------


class _Connection(asyncio.Protocol):
    """HTTP/1.1, kept open, one request at a time."""

    def __init__(self) -> None:
        self.open, self.used = True, False
        self._buffer = bytearray()
        self._reply: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Return status and body; LOST without a body where the connection ended, with one byte if a reply began."""
        self._reply = asyncio.get_running_loop().create_future()
        self._buffer.clear()
        self._transport.write(request)
        reply = await self._reply
        self.used = True
        return reply

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        length = _LENGTH.search(self._buffer, 0, head + 2) if head >= 0 else None
        if length is None or len(self._buffer) < (end := head + 4 + int(length[1])):
            return
        if _CLOSE.search(self._buffer, 0, head + 2):
            self.open = False
            self._transport.close()
        self._finish(int(self._buffer[9:12]), bytes(self._buffer[head + 4 : end]))

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._finish(LOST, bytes(self._buffer[:1]))

    def _finish(self, status: int, body: bytes) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_result((status, body))


class _Generator:
    def __init__(self, url: str, photos: Path) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        head = f"POST {path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: image/jpeg\r\n"
        bodies = [(photos / name).read_bytes() for name in (photos / "names").read_text().split()]
        self._requests = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        self._free: list[_Connection] = []
        self._room = asyncio.Semaphore(MOST_CONNECTIONS)
        self._rows: list[tuple[float, float, float, int, str | None]] = []
        self._degraded = self._untouched = 0
        self._stopped = asyncio.Event()

    async def run(self, rate: float | None, clients: int | None, poisson: bool) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin, self._stopped.set)
        self._start = loop.time()
        asking = self._at_rate(rate, poisson) if rate else self._closed(clients or 1)
        tasks = [task async for task in asking]
        seconds = loop.time() - self._start
        await asyncio.wait(tasks, timeout=60)
        columns = zip(*sorted(self._rows), strict=True) if self._rows else iter([[]] * 5)
        named = dict(zip(("due", "late_ms", "ms", "status", "version"), map(list, columns), strict=True))
        return {**named, "degraded": self._degraded, "untouched": self._untouched, "seconds": seconds}

    async def _at_rate(self, rate: float, poisson: bool) -> Any:
        loop, rng, due, number = asyncio.get_running_loop(), random.Random(0), self._start, 0
        while not self._stopped.is_set():
            while due <= loop.time():
                yield loop.create_task(self._ask(number, due))
                number += 1
                due += rng.expovariate(rate) if poisson else 1 / rate
            await asyncio.sleep(max(0, due - loop.time()))

    async def _closed(self, clients: int) -> Any:
        async def client(number: int) -> None:
            while not self._stopped.is_set():
                await self._ask(number, asyncio.get_running_loop().time())
                number += clients

        for number in range(clients):
            yield asyncio.create_task(client(number))
        await self._stopped.wait()

    async def _ask(self, number: int, due: float) -> None:
        loop = asyncio.get_running_loop()
        request = self._requests[number % len(self._requests)]
        async with self._room:
            connection = self._free.pop() if self._free else None
            sent = loop.time()
            kept = connection is not None
            try:
                if connection is None:
                    _, connection = await loop.create_connection(_Connection, self._host, self._port)
                status, body = await connection.ask(request)
            except OSError:
                status, body = LOST, b""
        done = loop.time()
        if connection is not None and connection.open:
            self._free.append(connection)
        version = None
        if status == 200:
            model, index = _MODEL.search(body), _INDEX.search(body)
            version = f"{model[1].decode()} {index[1].decode()}" if model and index else None
            self._degraded += b'"degraded":true' in body
        elif status == LOST:
            self._untouched += kept and not body
        self._rows.append((due - self._start, 1000 * (sent - due), 1000 * (done - due), status, version))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rate", type=float, help="requests a second that are due")
    parser.add_argument("--clients", type=int, help="closed loop: requests under way at a time")
    parser.add_argument("--poisson", action="store_true", help="due at random, not at equal distances")
    arguments = parser.parse_args()
    # epoll waits whole milliseconds, select microseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:

        async def run() -> dict[str, Any]:
            return await _Generator(arguments.url, arguments.photos).run(
                arguments.rate, arguments.clients, arguments.poisson
            )

        print(json.dumps(runner.run(run())))


if __name__ == "__main__":
    main()
