"""How Ray Serve takes requests in: through HAProxy, straight into replicas. Import this before Ray Serve.

Serve reads these variables once, when it is imported, in every process of the cluster: here, in the controller, in
proxies and replicas. Jobs hand them on (`cli.main`); what is in the environment already stays.
"""

from __future__ import annotations

import os

REPLICA_PORTS = 50
FIXED_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
OWN_PORTS = REPLICA_PORTS + len(FIXED_PORTS)

# Measured on 2 cores with an empty reply: 1,800 a second and 0.8 ms, against 236 and 8.5 ms as Serve comes.
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A search changes nothing, so a request whose replica died goes to another one. It must be in a buffer, whole, for
    # that: HAProxy waits for all of it, which is a line of its own of which Serve's template knows nothing. Larger
    # requests are not tried again. HAProxy copies the whole buffer for each request, however little is in it: of one
    # client's query it takes 1.3 ms of a core with 1 MB, 0.34 with this, and 0.28 with 64 kB.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout\n    option http-buffer-request",
    "RAY_SERVE_HAPROXY_RETRIES": "3",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "262144",
    "RAY_SERVE_HAPROXY_MAXCONN": "2048",
    # Silent connections are closed after this, not after an hour; load balancers keep theirs for 60 s.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "75",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # as Serve comes then, a line shows when 1,000 have been written
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # Replicas count requests themselves; else HAProxy writes a line of each, and a process in Python reads it.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",  # as Serve comes, every process of it does so ten times a second
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",  # each round of the controller takes 4 ms of a core
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # HAProxy hears of it within a second
}


def prepare() -> dict[str, str]:
    """Set what is not set, and return all that this process then has of Serve's variables."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}


def own_ports(ports: range) -> dict[str, str]:
    """Return settings for a cluster that shares its machine with others, with `OWN_PORTS` free ports.

    As Serve comes, these are fixed, and all count their replicas' ports from 30000. Until a replica has found a
    free one, its HAProxy asks whoever listens there; while it has no replica, whoever listens at the fallback's port.
    """
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports[REPLICA_PORTS - 1]),
        **dict(zip(FIXED_PORTS, map(str, ports[REPLICA_PORTS:]), strict=True)),
    }
