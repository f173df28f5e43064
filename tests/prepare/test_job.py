"""A small marketplace with one of everything that can be wrong, through the whole job on Ray."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.data import Dataset

from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.errors import InputError, MixerError
from mixer_platform.prepare.job import SAMPLES, prepare
from mixer_platform.schema import LOGS, QUERIES

pytestmark = pytest.mark.usefixtures("ray_cluster")

Rows = list[dict[str, Any]]
Reasons = dict[str, dict[str, int]]


def png(side: int = 24, colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (colour % 256, 90, 120)).save(file, "PNG")
    return file.getvalue()


def sound_tables(folder: Path) -> dict[str, Rows]:
    """Ten items, twenty photos that two shoppers each clicked one item of, and the pictures, under `folder`."""
    (folder / "pictures").mkdir(parents=True)
    items: Rows = []
    for n in range(10):
        (folder / f"pictures/i{n}.png").write_bytes(png(colour=25 * n))
        items.append({"item_id": f"i{n}", "title": f"thing {n}", "description": None, "image": f"pictures/i{n}.png"})
        items[-1] |= {"price": 1.5 * n, "colour": "red" if n % 2 else None}
    items.append({"item_id": "text only", "title": "a word", "description": "and more", "image": None})
    items[-1] |= {"price": None, "colour": None}
    queries, logs = [], []
    for n in range(20):
        (folder / f"pictures/q{n}.png").write_bytes(png(colour=7 * n))
        queries.append({"query_id": f"q{n}", "image": f"pictures/q{n}.png", "lens": n})
        for shopper in range(2):
            page = [f"i{(n + shopper) % 10}", f"i{(n + 1 - shopper) % 10}", f"i{(n + 2) % 10}"]
            for position, item in enumerate(page):
                logs.append(event(f"q{n}", item, "impression", position, f"shopper {n} {shopper}"))
            logs.append(event(f"q{n}", f"i{n % 10}", "click", shopper, f"shopper {n} {shopper}"))
    return {"items": items, "queries": queries, "logs": logs}


NUMBERS = itertools.count()


def event(
    query: str | None, item: str | None, kind: str, position: int = 0, session: str | None = None, **changes: Any
) -> dict[str, Any]:
    """Return a row of the logs, of a session of its own unless one is named."""
    number = next(NUMBERS)
    row = {"event_id": f"e{number}", "timestamp_ms": 1_700_000_000_000 + number, "session_id": session or f"s{number}"}
    row |= {"query_id": query, "item_id": item, "position": position, "event": kind, "dwell_ms": None}
    row |= {"client": f"version {number % 3}"}  # a column that the contract does not know
    return row | changes


def broken_tables(folder: Path) -> tuple[dict[str, Rows], Reasons]:
    """Return the sound tables with broken rows among them, and how many there are of each kind."""
    tables = sound_tables(folder)
    items, queries, logs = tables["items"], tables["queries"], tables["logs"]
    whole = png(64)
    for name, content in {"cut": whole[: len(whole) // 2], "text": b"no picture", "tiny": png(8)}.items():
        (folder / f"pictures/{name}.png").write_bytes(content)
    common = {"title": "t", "description": None, "price": 1.0, "colour": "blue"}
    items += [{"item_id": name, "image": f"pictures/{name}.png", **common} for name in ("gone", "cut", "text", "tiny")]
    items += [{"item_id": "i3", "image": None, **common}, {"item_id": "", "image": None, **common}]
    items += [{"item_id": None, "image": "pictures/i1.png", **common}]

    queries += [{"query_id": "no photo", "image": None}, {"query_id": "text", "image": "pictures/text.png"}]
    queries += [{"query_id": "q1", "image": "pictures/q1.png"}] * 2 + [{"query_id": None, "image": "pictures/q1.png"}]
    queries += [{"query_id": "q2", "image": None}, {"query_id": "twice broken", "image": None}]  # q2 is sound elsewhere
    queries += [{"query_id": "twice broken", "image": ""}, {"query_id": "nobody clicked", "image": "pictures/q1.png"}]

    logs += [event("q1", "i1", "buy"), event("q1", "i1", "")]
    logs += [event("q1", "i1", "click", timestamp_ms=0), event("q1", "i1", "click", timestamp_ms=-5)]
    logs += [event("q1", "i1", "click", position=-1), event("q1", "i1", "click", position=2**31)]
    logs += [event("q1", "i1", "click", event_id=""), event("q1", "i1", "click", event_id=None)]
    logs += [event("q1", "i1", "click", session_id=None), event("q1", "i1", "click", timestamp_ms=None)]
    logs += [event(None, "i1", "click"), event("q1", None, "click"), event("q1", "", "click")]
    logs += [dict(logs[0]), dict(logs[0]), dict(logs[7])]
    logs += [event("unheard of", "i1", "click") for _ in range(4)]
    logs += [event("q1", "unheard of", "click") for _ in range(3)]
    logs += [event("text", "i1", "click"), event("no photo", "i1", "click"), event("twice broken", "i1", "click")]
    logs += [event("q1", name, "impression") for name in ("gone", "cut", "text", "tiny", "tiny")]
    logs += [event("q1", "i9", "click", session="robot") for _ in range(7)]
    logs += [event("q1", "i8", "impression", session="robot")]
    logs += [event("nobody clicked", "i8", "impression")]
    logs += [event("q2", "i2", "purchase", session="shopper 2 0", dwell_ms=900)]
    queries[20:] = [{**row, "lens": 20 + n} for n, row in enumerate(queries[20:])]
    np.random.default_rng(0).shuffle(items)
    np.random.default_rng(0).shuffle(queries)
    np.random.default_rng(0).shuffle(logs)
    planted: Reasons = {
        "items": {
            "item_id is missing": 2,
            "item_id is repeated": 1,
            "not a JPEG, PNG or WebP picture": 1,
            "picture cannot be read": 1,
            "picture of 8 x 8 pixels; each side needs 16": 1,
            "broken picture": 1,
        },
        "queries": {
            "image is missing": 4,
            "query_id is missing": 1,
            "query_id is repeated": 2,
            "no usable click says what it shows": 1,
            "not a JPEG, PNG or WebP picture": 1,
        },
        "logs": {
            "event is unknown": 1,
            "event is missing": 1,
            "event_id is missing": 2,
            "event_id is repeated": 3,
            "item_id is in quarantine": 5,
            "item_id is missing": 2,
            "item_id is unknown": 3,
            "position is missing": 1,
            "position is negative": 1,
            "query_id is in quarantine": 3,
            "query_id is missing": 1,
            "query_id is unknown": 4,
            "session is a robot's": 8,
            "session_id is missing": 1,
            "timestamp_ms is missing": 1,
            "timestamp_ms is not positive": 2,
        },
    }
    return tables, planted


def write_parquet(tables: dict[str, Rows], folder: Path) -> None:
    """Write items in two files, of which one has no colours at all, and the others in one."""
    schemas = {"queries": QUERIES.columns, "logs": LOGS.columns}
    schemas["queries"] = schemas["queries"].append(pa.field("lens", pa.int64()))
    schemas["logs"] = schemas["logs"].set(5, pa.field("position", pa.int64())).append(pa.field("client", pa.string()))
    for name, schema in schemas.items():
        pq.write_table(pa.Table.from_pylist(tables[name], schema), folder / f"{name}.parquet")
    (folder / "items").mkdir()
    bare = [{**row, "colour": None} for row in tables["items"] if row["colour"] is None]
    rest = [row for row in tables["items"] if row["colour"] is not None]
    pq.write_table(pa.Table.from_pylist(bare), folder / "items/0.parquet")
    pq.write_table(pa.Table.from_pylist(rest), folder / "items/1.parquet")


def write_json_lines(tables: dict[str, Rows], folder: Path, more: str = "") -> None:
    for name, rows in tables.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows) + more
        if name == "logs":
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(lines)


def run_config(folder: Path, **prepare_settings: Any) -> RunConfig:
    tree = {"data": str(folder / "data"), "workspace": str(folder / "workspace")}
    return RunConfig.model_validate({**tree, "prepare": {"partitions": 3, **prepare_settings}})


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run over the broken Parquet tables."""
    folder = tmp_path_factory.mktemp("market")
    tables, planted = broken_tables(folder / "data")
    write_parquet(tables, folder / "data")
    report = prepare(run_config(folder))
    return {"folder": folder, "tables": tables, "planted": planted, "report": report}


def version_folder(folder: Path, report: dict[str, Any]) -> Path:
    return folder / "workspace/samples" / report["version"]


def as_text(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def simplified(counts: dict[str, int]) -> dict[str, int]:
    """Leave out what the decoder, or the row that a log row names, said in detail."""
    found: Counter[str] = Counter()
    for reason, count in counts.items():
        found[reason.split(":")[0]] += count
    return found


def test_every_row_is_used_or_in_quarantine_for_the_planted_reason(run: dict[str, Any]) -> None:
    for name, rows in run["tables"].items():
        table = run["report"]["tables"][name]
        assert simplified(table["quarantined"]) == run["planted"][name], name
        assert table["rows_in"] == len(rows), name
        assert table["rows_in"] == table["rows_out"] + sum(table["quarantined"].values()), name


def test_quarantine_holds_the_rows_as_they_came(run: dict[str, Any]) -> None:
    kept = pq.read_table(version_folder(run["folder"], run["report"]) / "quarantine").to_pylist()
    assert kept == [row for row in kept if row["table"] and row["reason"] and row["raw"]]
    counts = Counter((row["table"], row["reason"].split(":")[0]) for row in kept)
    assert counts == {(name, why): n for name, reasons in run["planted"].items() for why, n in reasons.items()}
    for name, rows in run["tables"].items():
        given = Counter(as_text(row) for row in rows)
        found = Counter(as_text(json.loads(row["raw"])) for row in kept if row["table"] == name)
        assert found <= given, name  # also what only other rows or the pictures showed
    overflow = [json.loads(row["raw"]) for row in kept if row["reason"] == "position is missing"]
    assert [row["position"] for row in overflow] == [2**31]
    unknown = [json.loads(row["raw"]) for row in kept if row["reason"] == "item_id is unknown"]
    assert [row["item_id"] for row in unknown] == ["unheard of"] * 3
    repeated = [json.loads(row["raw"]) for row in kept if row["reason"] == "item_id is repeated"]
    assert {(row["item_id"], row["colour"]) for row in repeated} <= {("i3", "red"), ("i3", "blue")}


def test_samples_and_classes_keep_the_contract(run: dict[str, Any]) -> None:
    folder = version_folder(run["folder"], run["report"])
    samples = pq.read_table(folder / "train")
    assert samples.schema.remove_metadata() == SAMPLES
    rows = {row["sample_id"]: row for row in samples.to_pylist()}
    assert rows.keys() == {f"q{n}" for n in range(20)} | {f"i{n}" for n in range(10)} | {"text only"}
    assert len(rows) == samples.num_rows, "a sample twice"
    assert run["report"]["samples"] == {"items": 11, "queries": 20}
    for n in range(20):
        photo = rows[f"q{n}"]
        assert photo["class_id"] == rows[f"i{n % 10}"]["class_id"], photo
        assert (photo["kind"], photo["text"]) == ("query", None)
        assert photo["image"] == str(run["folder"] / f"data/pictures/q{n}.png")
        assert photo["weight"] == 1
        assert photo["evidence"][photo["candidates"].index(photo["class_id"])] > 1
        assert len(set(photo["candidates"])) == len(photo["evidence"]) == 3
    assert rows["text only"] | {"class_id": 0} == {
        "sample_id": "text only", "kind": "item", "image": None, "text": "a word. and more", "class_id": 0,
        "weight": 1.0, "candidates": None, "evidence": None, "unseen": None,
    }  # fmt: skip

    classes = pq.read_table(folder / "classes.parquet")
    assert classes["class_id"].to_pylist() == list(range(run["report"]["classes"]))
    assert sum(classes["size"].to_pylist()) == samples.num_rows
    for label, size, item_ids in zip(*(classes[name].to_pylist() for name in classes.column_names), strict=True):
        members = [row for row in rows.values() if row["class_id"] == label]
        assert len(members) == size
        assert {row["sample_id"] for row in members if row["kind"] == "item"} == set(item_ids)


def test_a_second_run_reuses_and_other_settings_or_data_make_a_new_version(run: dict[str, Any]) -> None:
    again = prepare(run_config(run["folder"], partitions=2))  # how the work is cut is not a setting
    assert again.pop("reused")
    assert again == run["report"]
    other = prepare(run_config(run["folder"], min_side=8))
    assert other["version"] != run["report"]["version"]
    assert simplified(other["tables"]["items"]["quarantined"]) == {
        reason: count for reason, count in run["planted"]["items"].items() if "8 x 8" not in reason
    }


@pytest.mark.usefixtures("ray_cluster")
def test_a_picture_that_was_mended_is_seen(tmp_path: Path) -> None:
    tables = sound_tables(tmp_path / "data")
    picture = tmp_path / "data/pictures/i3.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:40])
    write_parquet(tables, tmp_path / "data")
    assert prepare(run_config(tmp_path))["tables"]["items"]["rows_out"] == 10
    picture.write_bytes(whole)
    assert prepare(run_config(tmp_path))["tables"]["items"]["rows_out"] == 11


def test_two_runs_at_once_leave_two_whole_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run begins when the first has written everything, and publishes before it by a millisecond or more."""
    tables = sound_tables(tmp_path / "data")
    tables["logs"] += [event("q1", "unheard of", "click")]
    write_parquet(tables, tmp_path / "data")
    config, publish, reports = run_config(tmp_path, partitions=1), versions.publish, []

    def delayed(*arguments: Any) -> dict[str, Any]:
        monkeypatch.setattr(versions, "publish", publish)
        reports.append(prepare(config))
        while time.time_ns() // 1_000_000 <= reports[0]["created_ms"]:
            pass  # what is newest is told by milliseconds
        return publish(*arguments)

    monkeypatch.setattr(versions, "publish", delayed)
    reports.append(prepare(config))
    assert len({report["version"] for report in reports}) == 2
    for report in reports:
        folder = version_folder(tmp_path, report)
        assert len(set(pq.read_table(folder / "train")["sample_id"].to_pylist())) == 31
        assert [pq.read_table(folder / part).num_rows for part in ("train", "quarantine")] == [31, 1]
    assert prepare(config)["version"] == reports[1]["version"]


def test_json_lines_give_what_parquet_gives(run: dict[str, Any], tmp_path: Path) -> None:
    tables = {name: [dict(row) for row in rows] for name, rows in run["tables"].items()}
    data = tmp_path / "data"
    data.mkdir()
    (data / "pictures").symlink_to(run["folder"] / "data/pictures")
    write_json_lines(tables, data, more='{"item_id": \n\n[1]\n')
    report = prepare(run_config(tmp_path))
    for name, reasons in run["planted"].items():
        found = simplified(report["tables"][name]["quarantined"])
        assert found == {**reasons, "not a JSON object": 2}, name
        assert report["tables"][name]["rows_in"] == len(tables[name]) + 2
    kept = pq.read_table(version_folder(tmp_path, report) / "quarantine").to_pylist()
    lines = {row["raw"] for row in kept if row["reason"] == "not a JSON object"}
    assert lines == {'{"item_id": ', "[1]"}

    def comparable(folder: Path, found: dict[str, Any]) -> Any:
        rows = pq.read_table(version_folder(folder, found) / "train").sort_by("sample_id").drop_columns("image")
        return rows.to_pylist()

    assert comparable(tmp_path, report) == comparable(run["folder"], run["report"])


@pytest.mark.parametrize("name", ["queries", "logs"])
def test_a_table_without_rows_is_one_sentence(tmp_path: Path, name: str) -> None:
    tables = sound_tables(tmp_path / "data") | {name: []}
    write_parquet(tables, tmp_path / "data")
    with pytest.raises(InputError, match=rf"{name}: no rows; prepare learns from what people clicked$"):
        prepare(run_config(tmp_path, partitions=1))
    assert not list((tmp_path / "workspace").glob("**/manifest.json"))


def test_logs_without_a_usable_click_are_one_sentence(tmp_path: Path) -> None:
    tables = sound_tables(tmp_path / "data")
    tables["queries"].append({"query_id": "far", "image": "https://shop/q.jpg", "lens": 0})
    tables["logs"] = [event("q1", "i1", "impression"), event("unheard of", "i1", "click")]
    tables["logs"] += [event("far", "i1", "click") for _ in range(2)] + [event("q1", "i1", "buy") for _ in range(3)]
    write_parquet(tables, tmp_path / "data")
    with pytest.raises(InputError) as error:
        prepare(run_config(tmp_path, partitions=1))
    assert str(error.value).endswith(
        "data/logs: no usable click, mend the logs (3 × event is unknown; 2 × query_id is in quarantine: "
        "picture cannot be read: only folders and s3://bucket/prefix are read and written; 1 × query_id is unknown)"
    )


def test_rows_that_a_join_loses_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = sound_tables(tmp_path / "data")
    tables["logs"].append(event("unheard of", "i1", "click"))
    write_parquet(tables, tmp_path / "data")
    join = Dataset.join
    monkeypatch.setattr(
        Dataset, "join", lambda self, other, kind, *rest, **more: join(self, other, "inner", *rest, **more)
    )
    with pytest.raises(
        MixerError, match=r"data/logs: 161 rows were read, but 160 are used or in quarantine; nothing is"
    ):
        prepare(run_config(tmp_path, partitions=1))
    assert not list((tmp_path / "workspace").glob("**/manifest.json"))
