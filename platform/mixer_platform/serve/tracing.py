"""OpenTelemetry: Ray Serve makes a span for each request; below it go the waiting, encoding and searching."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from ray.serve._private import tracing_utils  # Serve asks its controller only, whose setting is fixed as it starts
from ray.serve.context import _get_internal_replica_context
from ray.serve.schema import TracingConfig

from mixer_platform.config import ServeConfig
from mixer_platform.errors import ConfigError

if TYPE_CHECKING:
    from mixer_platform.serve.metrics import Searched

EXPORTER = "opentelemetry.exporter.otlp.proto.http"
ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
SERVICE = "OTEL_SERVICE_NAME"
EXPORT_MS = 1000  # a replica that dies takes no more spans with it

log = logging.getLogger(__name__)


def check_traces(config: ServeConfig) -> None:
    """Raise ConfigError if traces are wanted and what sends them is not installed."""
    if config.traces is None:
        return
    try:
        found = find_spec(EXPORTER)
    except ModuleNotFoundError:  # not even the package around it
        found = None
    if found is None:
        raise ConfigError(
            f"serve.traces: {EXPORTER} is missing; install the project's traces extra, or set serve.traces=null"
        )


def span_processors() -> list[BatchSpanProcessor]:
    """Return what sends spans to the endpoint that OpenTelemetry's own variables name; Ray Serve calls it."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # an extra: not always there

    return [BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=EXPORT_MS)]


def trace_replica(config: ServeConfig) -> None:
    """Let Serve make spans in this replica from now on, if the configuration says where to."""
    replica = _get_internal_replica_context()
    if config.traces is None or replica is None or tracing_utils.is_tracing_enabled():
        return
    os.environ[ENDPOINT] = config.traces
    os.environ.setdefault(SERVICE, replica.app_name)
    wanted = TracingConfig(
        enabled=True,
        exporter_import_path=f"{__name__}:{span_processors.__name__}",
        sampling_ratio=config.trace_share,
    )
    tracing_utils.setup_tracing(replica.deployment, replica.replica_tag, tracing_config=wanted)
    log.info("spans go to %s", config.traces)


def trace_request(searched: Searched | None) -> str | None:
    """Add what a request searched to its span, and spans below it; return the trace's id, None if it is not recorded.

    The parts of a request are the work of its batch, which belongs to no one request: so their spans are made
    afterwards, from the times that were taken.
    """
    span = trace.get_current_span()
    if not span.is_recording():
        return None
    if searched and searched.rankings:
        span.set_attributes(
            {
                "mixer.index": searched.index.version,
                "mixer.model": searched.index.model,
                "mixer.k": searched.k,
                "mixer.queries": len(searched.rankings),
                "mixer.missing_shards": searched.missing_shards,
            }
        )
        _add_parts(searched)
    return trace.format_trace_id(span.get_span_context().trace_id)


def _add_parts(searched: Searched) -> None:
    tracer = trace.get_tracer(__name__)
    slowest = max(searched.rankings, key=lambda ranking: ranking.begun + ranking.search_ms / 1000)
    encoded = slowest.begun + (slowest.encode_ms or 0) / 1000
    parts: dict[str, tuple[float, float]] = {"wait": (slowest.asked, slowest.begun)}
    if slowest.encode_ms is not None:
        parts["encode"] = (slowest.begun, encoded)
    parts["search"] = (encoded, encoded + slowest.search_ms / 1000)
    for name, (began, ended) in parts.items():
        tracer.start_span(name, start_time=_nanoseconds(began)).end(_nanoseconds(ended))


def _nanoseconds(unix: float) -> int:
    return int(unix * 1e9)
