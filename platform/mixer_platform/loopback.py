"""HTTP to this machine's own services, and ports for them."""

from __future__ import annotations

import random
import socket
import urllib.request
from contextlib import ExitStack
from http.client import HTTPResponse

from mixer_platform.errors import MixerError

# Connections of this machine get ports from 32768 on Linux: one of those that is free now may be theirs a moment later.
_PORTS = 20_000, 30_000
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of this machine is not meant


def open_url(request: str | urllib.request.Request, timeout_s: float) -> HTTPResponse:
    """Ask past any proxy that the environment names. Raises OSError, of which HTTPError for a status above 399."""
    return _DIRECT.open(request, timeout=timeout_s)


def free_ports(count: int) -> range:
    """Return so many ports in a row on which nothing listens. Raises MixerError."""
    lowest, end = _PORTS
    firsts = range(lowest, end - count + 1, count)
    for first in random.sample(firsts, len(firsts)):
        ports = range(first, first + count)
        with ExitStack() as probes:
            try:
                for port in ports:
                    probes.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
        return ports
    raise MixerError(f"no {count} ports in a row are free from {lowest} to {end}; end what listens on some of them")
