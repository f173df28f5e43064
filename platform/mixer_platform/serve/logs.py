"""What the service says goes into Serve's log of the replica, as JSON: a line a request, and whatever else happens."""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.context import _get_internal_replica_context  # `get_replica_context` raises outside a replica

SERVE = "ray.serve"

# Serve's own line of each request says less; ours takes its place.
LOGGING = {"encoding": "JSON", "enable_access_log": False}

log = logging.getLogger(__name__)


def join_serve_log() -> None:
    """Let this package's loggers write to the log of the replica, where Serve adds the request's id and route.

    Otherwise all below a warning would be lost, and the rest would be lines without an id.
    """
    ours, serve = logging.getLogger("mixer_platform"), logging.getLogger(SERVE)
    ours.handlers, ours.propagate = serve.handlers, False  # the very list: Serve may fill it anew
    ours.setLevel(serve.level)


class RequestLog:
    """Writes a line for each request that has ended."""

    def __init__(self) -> None:
        # Serve's filters would look all this up for each line anew, at the price of the line itself.
        self._replica: dict[str, Any] = {}
        if replica := _get_internal_replica_context():
            self._replica = {
                "skip_context_filter": True,
                "application": replica.app_name,
                "deployment": replica.deployment,
                "replica": replica.replica_tag,
            }

    def __call__(self, method: str, path: str, status: int, fields: dict[str, Any]) -> None:
        """Write a line; `fields` without a value are left out."""
        told = {name: value for name, value in fields.items() if value is not None}
        log.info("%s %s %d", method, path, status, extra={**self._replica, "status": status, **told})
