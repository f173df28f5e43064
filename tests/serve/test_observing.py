"""What a running service tells: metrics of every node, a line of JSON a request, spans to an OTLP endpoint."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from mixer_platform.config import RunConfig
from mixer_platform.errors import ConfigError
from mixer_platform.loopback import open_url
from mixer_platform.serve import job, tracing
from mixer_platform.serve.app import application
from tests.cluster.test_grafana import asked_of, expressions

Photo = Callable[..., bytes]
PATIENCE_S = 60.0
PROBE = "a" * 32


class Collector(ThreadingHTTPServer):
    """An OTLP endpoint that keeps what it is sent."""

    def __init__(self) -> None:
        self.services: set[str] = set()
        self.spans: list[Span] = []
        super().__init__(("127.0.0.1", 0), _Receive)

    def trace(self, trace_id: str, names: set[str]) -> dict[str, Span]:
        """Wait for spans of these names in a trace, and return all of it by name."""

        def look() -> dict[str, Span] | None:
            found = {span.name: span for span in list(self.spans) if span.trace_id.hex() == trace_id}
            return found if names <= set(found) else None

        return wait_for(look)


class _Receive(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in request.resource_spans:
            self.server.services |= {  # type: ignore[attr-defined]
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.server.spans.extend(scope.spans)  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def wait_for(look: Callable[[], Any]) -> Any:
    """Return what `look` finds, once it is not None."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := look()) is None:
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        yield collector
        collector.shutdown()


@pytest.fixture(scope="module")
def http(report: dict[str, Any], workspace: Any, collector: Collector) -> Iterator[httpx.Client]:
    """A service that sends spans of those requests whose callers record them."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="dev's exporter of spans")
    traces = {"traces": f"http://127.0.0.1:{collector.server_port}/v1/traces", "trace_share": 0}
    serve = workspace.config.serve.model_copy(update=traces)
    job.serve(workspace.config.model_copy(update={"serve": serve}))
    with httpx.Client(base_url=report["url"], timeout=30) as client:

        def replaced() -> bool | None:
            httpx.get(f"{report['url']}/healthz", headers={"traceparent": parent(PROBE)})
            return bool(collector.spans) or None

        wait_for(replaced)  # for a moment the replica from before answers too
        yield client
    job.serve(workspace.config)


def parent(trace_id: str) -> str:
    """Return the header of a caller who records its trace."""
    return f"00-{trace_id}-{'b' * 16}-01"


def scrape() -> dict[str, Metric]:
    """Return what this machine's agent exports, by name."""
    (node,) = ray.nodes()
    with open_url(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", 10) as reply:
        return {family.name: family for family in text_string_to_metric_families(reply.read().decode())}


def counted(replica: str) -> dict[tuple[str, str], float]:
    """Return how many requests a replica has counted, by route and status."""
    family = scrape().get("ray_mixer_requests")
    samples = [each for each in (family.samples if family else ()) if each.labels["replica"] == replica]
    return {(each.labels["route"], each.labels["status"]): each.value for each in samples}


def lines(text: str) -> list[dict[str, Any]] | None:
    """Return the lines with a text, such as a request's id, in the logs of replicas, None where there are none."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    found = [
        json.loads(line)
        for path in folder.glob("replica_mixer_Ingress_*.log")
        for line in path.read_text().splitlines()
        if text in line
    ]
    return found or None


def search(http: httpx.Client, photo: bytes, **headers: str) -> httpx.Response:
    return http.post("/v1/search", files={"photo": photo}, data={"k": "3"}, headers=headers)


def test_a_line_of_json_tells_how_a_request_went(http: httpx.Client, photo: Photo):
    assert search(http, photo(1), **{"x-request-id": "a-search"}).status_code == 200
    assert search(http, b"no photo", **{"x-request-id": "no-search"}).status_code == 422
    assert http.get("/healthz", headers={"x-request-id": "a-probe"}).status_code == 200
    (line,) = wait_for(lambda: lines("a-search"))
    told = {"levelname": "INFO", "message": "POST /v1/search 200", "method": "POST", "route": "/v1/search"}
    told |= {"status": 200, "request_id": "a-search", "k": 3, "queries": 1, "index": "index-a", "model": "model-a"}
    told |= {"application": "mixer", "deployment": "Ingress"}
    assert line.items() >= told.items()
    assert re.fullmatch(r"\w+", line["replica"])
    assert line["total_ms"] > line["encode_ms"] + line["search_ms"] + line["wait_ms"] > 0
    (line,) = wait_for(lambda: lines("no-search"))
    assert line.items() >= {"status": 422, "code": "unreadable_image", "request_id": "no-search"}.items()
    assert lines("a-probe") is None


def test_what_else_the_service_says_is_in_the_log_too(http: httpx.Client):
    said = wait_for(lambda: lines("spans go to http://"))[-1]
    assert (said["levelname"], said["deployment"]) == ("INFO", "mixer_Ingress")


def test_a_request_has_a_span_and_its_parts_below_it(http: httpx.Client, photo: Photo, collector: Collector):
    trace_id = "c" * 32
    headers = {"x-request-id": "traced", "traceparent": parent(trace_id)}
    assert search(http, photo(2), **headers).status_code == 200
    assert search(http, photo(2)).status_code == 200  # on the same connection, and nobody records it
    spans = collector.trace(trace_id, {"wait", "encode", "search"})
    whole = next(span for span in spans.values() if span.parent_span_id.hex() == "b" * 16)
    told = {each.key: each.value for each in whole.attributes}
    assert told["request_id"].string_value == "traced"
    assert told["mixer.index"].string_value == "index-a"
    assert told["http.status_code"].string_value == "200"
    parts = [spans[name] for name in ("wait", "encode", "search")]
    assert {part.parent_span_id for part in parts} == {whole.span_id}
    times = [time for part in parts for time in (part.start_time_unix_nano, part.end_time_unix_nano)]
    assert [whole.start_time_unix_nano, *times, whole.end_time_unix_nano] == sorted(
        [whole.start_time_unix_nano, *times, whole.end_time_unix_nano]
    )
    assert wait_for(lambda: lines("traced"))[0]["trace_id"] == trace_id
    assert collector.services == {"mixer"}
    assert {span.trace_id.hex() for span in collector.spans} == {trace_id, PROBE}


def test_the_agent_exports_what_happened(http: httpx.Client, photo: Photo):
    assert search(http, photo(3), **{"x-request-id": "counted"}).status_code == 200
    assert http.post("/v1/search/batch", files={"photos": photo(3)}, data={"k": "0"}).status_code == 422
    assert http.post("/v1/search/batch", files={"photos": bytes(1_500_000)}).status_code == 413
    assert http.get("/nowhere").status_code == 404
    replica = wait_for(lambda: lines("counted"))[0]["replica"]
    once = {("/v1/search/batch", "422"): 1, ("/v1/search/batch", "413"): 1, ("none", "404"): 1}
    wait_for(lambda: counted(replica).items() >= once.items() or None)
    assert counted(replica)["/v1/search", "200"] >= 1
    exported = scrape()
    parts = {sample.labels["part"] for sample in exported["ray_mixer_latency_ms"].samples}
    assert parts == {"wait", "encode", "search", "total"}
    of_replica = [each for name in ("queued", "version") for each in exported[f"ray_mixer_{name}"].samples]
    told = {each.name: each for each in of_replica if each.labels["replica"] == replica}
    assert told["ray_mixer_queued"].value == 0
    assert told["ray_mixer_version"].value == 1
    assert told["ray_mixer_version"].labels.items() >= {"index": "index-a", "model": "model-a"}.items()


def test_the_dashboard_asks_for_nothing_that_is_not_exported(http: httpx.Client):
    asked = [
        (name, labels)
        for expression in expressions()
        for name, labels in asked_of(expression).items()
        if not name.startswith("ray_mixer_")  # which are told when they happen; tests/cluster looks at these
    ]
    assert http.get("/v1/items/none").status_code == 404  # one error that HAProxy counts

    def missing() -> list[tuple[str, set[str]]]:
        samples = [sample for family in scrape().values() for sample in family.samples]
        found: dict[str, set[str]] = {}
        for sample in samples:
            found.setdefault(sample.name, set()).update(sample.labels)
        return [(name, labels) for name, labels in asked if not labels <= found.get(name, set())]

    wait_for(lambda: not missing() or None)


def test_the_agent_tells_the_replicas_processes_by_name(http: httpx.Client):
    def components() -> set[str]:  # of a process that has just begun it does not tell yet
        return {sample.labels["Component"] for sample in scrape()["ray_component_rss_bytes"].samples}

    wait_for(lambda: any(each.startswith("ray::ServeReplica:mixer:Ingress") for each in components()) or None)


def test_traces_need_what_sends_them(workspace: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracing, "EXPORTER", "opentelemetry.exporter.none")
    serve = workspace.config.serve.model_copy(update={"traces": "http://127.0.0.1:4318/v1/traces"})
    with pytest.raises(ConfigError, match=r"^serve\.traces: opentelemetry\.exporter\.none is missing; install the"):
        application(workspace.config.model_copy(update={"serve": serve}))


def test_an_endpoint_is_an_address():
    with pytest.raises(ValidationError, match="traces"):
        RunConfig.model_validate({"data": "d", "workspace": "w", "serve": {"traces": "collector:4318"}})
