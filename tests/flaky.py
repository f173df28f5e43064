"""A port in front of an HTTP server at which requests meet faults."""

from __future__ import annotations

import re
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

# unavailable: 503 and nothing done; cut: half the body of the answer; lost: done, but no answer.
Fault = Literal["unavailable", "cut", "lost"]


class Flaky(ThreadingHTTPServer):
    """Passes requests on to the HTTP server at `target`, except for those that `fail` names."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.address = target, f"127.0.0.1:{self.server_port}"
        self.failed = 0
        self._lock, self._left = threading.Lock(), 0.0

    def __enter__(self) -> Flaky:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def fail(self, fault: Fault, times: float, requests: str = "") -> None:
        """Let the next `times` requests fail whose `METHOD /path?query` the pattern `requests` matches."""
        with self._lock:
            self.failed, self._fault, self._left, self._requests = 0, fault, times, requests

    def fault(self, request: str) -> Fault | None:
        """Return what happens to a request, and count it in `failed`."""
        with self._lock:
            if not self._left or not re.match(self._requests, request):
                return None
            self._left -= 1
            self.failed += 1
            return self._fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Flaky

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(f"{self.command} {self.path}")
        if fault == "unavailable":
            self.send_response_only(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = HTTPConnection(self.server.target)
        connection.request(self.command, self.path, body, {**self.headers, "Connection": "close"})
        with connection.getresponse() as response:
            data = response.read()
        self.close_connection = True  # so that a client sees where a cut body ends
        if fault == "lost":
            return
        self.send_response_only(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer
