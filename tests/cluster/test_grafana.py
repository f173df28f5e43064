"""The dashboard asks for nothing that is not exported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter, Histogram, Metric

from mixer_platform.serve.metrics import PREFIX, Metrics

DASHBOARD = Path(__file__).parents[2] / "cluster/grafana.json"


def expressions() -> list[str]:
    """Return all that the dashboard asks Prometheus."""
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [each["expr"] for each in (*targets, *dashboard["annotations"]["list"])]


def asked_of(expression: str) -> dict[str, set[str]]:
    """Return the metrics in an expression, and the labels of each that it selects or groups by."""
    grouped = set(re.findall(r"\w+", ",".join(re.findall(r"\bby \(([^)]*)\)", expression))))
    asked: dict[str, set[str]] = {}
    for name, selector in re.findall(rf"\b({PREFIX}\w+)(?:{{([^}}]*)}})?", expression):
        labels = set(re.findall(r"(\w+)\s*(?:!=|=~|!~|=)\s*\"", selector))
        asked[name] = asked.get(name, set()) | labels | grouped
    return asked


def exported(metric: Metric) -> Iterator[tuple[str, set[str]]]:
    """Yield the names under which Prometheus sees a metric, and the labels of each."""
    name, labels = PREFIX + metric.info["name"], {*metric.info["tag_keys"], "deployment", "replica", "application"}
    if isinstance(metric, Histogram):
        yield f"{name}_bucket", labels | {"le"}
        yield f"{name}_sum", labels
        yield f"{name}_count", labels
    else:
        yield f"{name}_total" if isinstance(metric, Counter) else name, labels


def test_each_of_the_services_metrics_is_shown_and_no_other():
    defined = [value for value in vars(Metrics()).values() if isinstance(value, Metric)]
    known: dict[str, set[str]] = {name: labels for metric in defined for name, labels in exported(metric)}
    asked: set[str] = set()
    for expression in expressions():
        for name, labels in asked_of(expression).items():
            if name.startswith(f"{PREFIX}mixer_"):
                asked.add(name)
                assert name in known, expression
                assert labels <= known[name], expression
    assert len(defined) == 9
    for metric in defined:
        assert asked & {name for name, _ in exported(metric)}, metric.info["name"]


def test_panels_do_not_overlap_and_each_asks_the_chosen_prometheus():
    dashboard = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place: dict[str, Any] = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"]
            assert panel["targets"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
