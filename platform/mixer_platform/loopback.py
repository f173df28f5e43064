"""HTTP to this machine's own services."""

from __future__ import annotations

import urllib.request
from http.client import HTTPResponse

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of this machine is not meant


def open_url(request: str | urllib.request.Request, timeout_s: float) -> HTTPResponse:
    """Ask past any proxy that the environment names. Raises OSError, of which HTTPError for a status above 399."""
    return _DIRECT.open(request, timeout=timeout_s)
