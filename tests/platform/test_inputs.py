"""Files that people bring, good and bad."""

from __future__ import annotations

import gzip
import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixer_platform.errors import InputError, StorageError
from mixer_platform.inputs import (
    IMAGE,
    OTHERS,
    RAW,
    REASON,
    _unreadable,
    count_rows,
    find_file,
    find_input,
    in_one_order,
    mark_rows,
    pictures_tag,
    read_input,
    read_lines,
    read_parquet,
)
from mixer_platform.inputs import _parse_lines as parse_lines
from mixer_platform.rows import to_dicts
from mixer_platform.schema import ITEMS, LOGS, QUERIES, TRUTH

QUERY_ROWS = [{"query_id": "a", "image": "p/a.png"}, {"query_id": "b", "image": "/p/b.png"}]
QUERY_ROWS += [{"query_id": "c", "image": "s3://b/c.png"}, {"query_id": "d", "image": None}, {"image": "p/e.png"}]


def write_queries(path: Path, rows: list[dict] = QUERY_ROWS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, QUERIES.columns), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def said(data: Path, table=QUERIES) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError) as error:
        find_input(str(data), table)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{data}", "DATA")


def marked(lines: list[Any], table=LOGS) -> list[dict[str, Any]]:  # type: ignore[no-untyped-def]
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    encoded = pa.array([text.encode() for text in texts], pa.binary())
    return mark_rows(pa.table({"line": encoded}), table, "/d", lambda batch: parse_lines(batch, table)).to_pylist()


@pytest.mark.usefixtures("ray_cluster")
def test_an_attribute_has_one_type_in_all_files(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    parts: list[dict[str, pa.Array]] = [
        {"price": pa.array([3], pa.int64()), "colour": pa.nulls(1)},
        {"price": pa.array([2.5]), "colour": pa.array(["red"]).dictionary_encode()},
        {"colour": pa.array(["blue"])},
    ]
    for number, columns in enumerate(parts):
        table = pa.table({"item_id": [f"i{number}"], **columns})
        pq.write_table(table, tmp_path / f"items/part-{number}.parquet")
    batches = list(read_input(find_input(str(tmp_path), ITEMS)).iter_batches(batch_size=1, batch_format="pyarrow"))
    assert {(str(batch["price"].type), str(batch["colour"].type)) for batch in batches} == {("double", "string")}
    rows = [(row["item_id"], row["price"], row["colour"]) for batch in batches for row in batch.to_pylist()]
    assert sorted(rows) == [("i0", 3.0, None), ("i1", 2.5, "red"), ("i2", None, "blue")]

    other = pa.table({"item_id": ["i3"], "price": ["cheap"]})
    pq.write_table(other, tmp_path / "items/part-3.parquet")
    wanted = "DATA/items/part-3.parquet: column price is string, in DATA/items/part-1.parquet it is double"
    assert said(tmp_path, ITEMS) == f"{wanted}; cast one of them"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_share_of_the_rows_is_the_same_one_each_time(tmp_path: Path, ending: str) -> None:
    for part in range(2):
        rows = [{"query_id": f"q{part}-{row}", "image": "p.png"} for row in range(200)]
        write_queries(tmp_path / f"queries/part-{part}.{ending}", rows)
    files = find_input(str(tmp_path), QUERIES)
    fifth, again, half = ({row["query_id"] for row in read_input(files, s).take_all()} for s in (0.2, 0.2, 0.5))
    assert fifth == again < half
    assert 40 < len(fifth) < 130
    assert {row.partition("-")[0] for row in fifth} == {"q0", "q1"}


def test_no_folder_no_file_and_an_empty_folder(tmp_path: Path) -> None:
    assert said(tmp_path / "none").startswith("DATA: no such folder; data= names the folder")
    sought = "DATA/queries: not found; expected queries.parquet, .jsonl, .jsonl.gz or a folder of such"
    assert said(tmp_path) == sought
    (tmp_path / "queries").mkdir()
    assert said(tmp_path) == sought
    (tmp_path / "queries/readme.txt").write_text("")
    assert said(tmp_path) == sought


def test_mixed_endings(tmp_path: Path) -> None:
    write_queries(tmp_path / "queries/a.parquet")
    write_queries(tmp_path / "queries/b.jsonl")
    assert said(tmp_path) == "DATA/queries: mixes .jsonl and .parquet; keep one kind of file a table"
    shutil.rmtree(tmp_path / "queries")
    write_queries(tmp_path / "queries.jsonl")
    write_queries(tmp_path / "queries.jsonl.gz")
    assert said(tmp_path) == "DATA/queries: mixes .jsonl and .jsonl.gz; keep one kind of file a table"


def test_a_parquet_file_with_a_broken_page_is_named(tmp_path: Path) -> None:
    write_queries(tmp_path / "queries.parquet", [{"query_id": f"q{n}", "image": f"{n**9}.png"} for n in range(2000)])
    data = bytearray((tmp_path / "queries.parquet").read_bytes())
    data[1000:2000] = b"\xff" * 1000
    (tmp_path / "queries.parquet").write_bytes(data)
    files = find_input(str(tmp_path), QUERIES)
    with pytest.raises(InputError, match=r"queries\.parquet: not a whole Parquet file \(.*\); write it again"):
        list(read_parquet(pa.table({"key": list(files.tags)}), files.storage))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", ["queries.parquet", "queries.jsonl.gz"])
def test_rows_are_counted_as_they_lie(tmp_path: Path, name: str) -> None:
    write_queries(tmp_path / name)
    assert count_rows(find_input(str(tmp_path), QUERIES)) == len(QUERY_ROWS)


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    write_queries(tmp_path / "queries/a.parquet")
    write_queries(tmp_path / "queries/b.parquet")
    whole = (tmp_path / "queries/b.parquet").read_bytes()
    (tmp_path / "queries/b.parquet").write_bytes(whole[: len(whole) // 2])
    assert said(tmp_path).startswith("DATA/queries/b.parquet: not a whole Parquet file (")
    (tmp_path / "queries/b.parquet").write_bytes(b"")
    assert said(tmp_path).startswith("DATA/queries/b.parquet: not a whole Parquet file (")


def test_every_parquet_file_must_keep_the_contract(tmp_path: Path) -> None:
    write_queries(tmp_path / "queries/a.parquet")
    pq.write_table(pa.table({"query_id": [1], "image": ["x"]}), tmp_path / "queries/b.parquet")
    assert said(tmp_path) == "DATA/queries/b.parquet: column query_id is int64, expected string; cast it and try again"
    pq.write_table(pa.table({"query_id": ["1"]}), tmp_path / "queries/b.parquet")
    assert said(tmp_path).startswith("DATA/queries/b.parquet: column image is missing; queries needs")


def test_one_named_file(tmp_path: Path) -> None:
    pq.write_table(TRUTH.columns.empty_table(), tmp_path / "val.parquet")
    assert find_file(f"{tmp_path}/val.parquet", TRUTH).paths == [f"{tmp_path}/val.parquet"]
    with pytest.raises(InputError, match=r"test.parquet: not found"):
        find_file(f"{tmp_path}/test.parquet", TRUTH)
    with pytest.raises(InputError, match=r"val.csv: not a file of a kind that is read; expected .parquet, .jsonl"):
        find_file(f"{tmp_path}/val.csv", TRUTH)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", ["queries.parquet", "queries.jsonl", "queries/x.jsonl", "queries.jsonl.gz"])
def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write_queries(tmp_path / name)
    rows = {row["query_id"]: row for row in read_input(find_input(str(tmp_path), QUERIES)).take_all()}
    assert {key: (row["image"], row[IMAGE], row[REASON]) for key, row in rows.items()} == {
        "a": ("p/a.png", f"{tmp_path}/p/a.png", None),
        "b": ("/p/b.png", "/p/b.png", None),
        "c": ("s3://b/c.png", "s3://b/c.png", None),
        "d": (None, None, "image is missing"),
        None: ("p/e.png", f"{tmp_path}/p/e.png", "query_id is missing"),
    }
    assert rows["a"][RAW] is None
    assert json.loads(rows["d"][RAW]) == {"query_id": "d", "image": None}
    assert json.loads(rows[None][RAW])["image"] == "p/e.png"


@pytest.mark.usefixtures("ray_cluster")
def test_attributes_may_be_null_or_missing_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    parts = [{"item_id": ["a"], "colour": pa.nulls(1), "price": [1.5]}, {"item_id": ["b"], "colour": ["red"]}]
    for name, columns in zip("01", parts, strict=True):
        pq.write_table(pa.table(columns), tmp_path / f"items/{name}.parquet")
    found = read_input(find_input(str(tmp_path), ITEMS)).repartition(1).take_all()
    rows = {row["item_id"]: (row.get("colour"), row.get("price"), row[REASON]) for row in found}
    assert rows == {"a": (None, 1.5, None), "b": ("red", None, None)}


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    write_queries(tmp_path / "queries.jsonl.gz")
    whole = (tmp_path / "queries.jsonl.gz").read_bytes()
    (tmp_path / "queries.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    files = find_input(str(tmp_path), QUERIES)
    with pytest.raises(InputError, match=r"queries\.jsonl\.gz: not a whole file \(.*\); write it again"):
        list(read_lines(pa.table({"key": list(files.tags)}), files.storage))


def test_lines_that_are_not_unicode_are_broken_rows(tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_bytes(
        b'{"query_id": "a\xff", "image": "x"}\r\n\n{"query_id": "b", "image": "y"}'
    )
    files = find_input(str(tmp_path), QUERIES)
    (read,) = read_lines(pa.table({"key": list(files.tags)}), files.storage)
    rows = mark_rows(read, QUERIES, "/d", lambda batch: parse_lines(batch, QUERIES)).to_pylist()
    assert [(row["query_id"], row[REASON]) for row in rows] == [(None, "not a JSON object"), ("b", None)]
    assert rows[0][RAW] == '{"query_id": "a\\xff", "image": "x"}'


def test_broken_json_lines_are_kept_as_they_came() -> None:
    half = '{"query_id": "\\ud83d", "image": "x"}'  # of a surrogate pair
    rows = marked(['{"query_id": "a", ', "[1]", "3", "null", half, {"query_id": "q", "image": "x"}], QUERIES)
    assert [row[REASON] for row in rows] == ["not a JSON object"] * 5 + [None]
    assert [row[RAW] for row in rows] == ['{"query_id": "a", ', "[1]", "3", "null", half, None]
    assert (rows[-1]["image"], rows[-1][IMAGE]) == ("x", "/d/x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"timestamp_ms": "5"}, "timestamp_ms is not of type int64"),
        ({"timestamp_ms": True}, "timestamp_ms is not of type int64"),
        ({"timestamp_ms": 2**70}, "timestamp_ms is not of type int64"),
        ({"timestamp_ms": 5.0}, None),
        ({"position": 2**31}, "position is missing"),
        ({"position": 3.0}, None),
        ({"item_id": 7}, "item_id is not of type string"),
        ({"item_id": None}, "item_id is missing"),
        ({"dwell_ms": "long"}, "dwell_ms is not of type int64"),
        ({"dwell_ms": None}, None),
        ({"another": {"deep": 1}}, None),
    ],
)
def test_a_json_value_of_another_type_is_named_and_kept(change: dict, reason: str | None) -> None:
    sound = {"event_id": "e", "timestamp_ms": 5, "session_id": "s", "query_id": "q", "item_id": "i", "position": 0}
    sound |= {"event": "click"}
    first, second = marked([sound, sound | change])
    assert (first[REASON], first[RAW]) == (None, None)
    assert second[REASON] == reason
    assert second[RAW] == (json.dumps(sound | change) if reason else None)


def test_json_attributes_have_one_type() -> None:
    rows = marked(
        [{"item_id": "a", "size": 3}, {"item_id": "b", "size": "L"}, {"item_id": "c", "colour": "red"}], ITEMS
    )
    assert [(row["size"], row["colour"]) for row in rows] == [("3", None), ("L", None), (None, "red")]


def test_columns_that_the_contract_does_not_know_are_kept_for_quarantine() -> None:
    given = [{"query_id": "a", "image": "x", "lens": 3}, {"query_id": "b", "image": "y"}]
    for found in (marked(given, QUERIES), mark_rows(pa.Table.from_pylist(given), QUERIES, "/d").to_pylist()):
        assert json.loads(found[0][OTHERS]) == {"lens": 3}
        assert json.loads(found[1][OTHERS] or "{}").get("lens") is None
    assert [row[OTHERS] for row in mark_rows(pa.Table.from_pylist(given[1:]), QUERIES, "/d").to_pylist()] == [None]
    assert OTHERS not in marked([{"item_id": "a", "lens": 3}], ITEMS)[0], "they are attributes"


def test_json_lists_hold_strings() -> None:
    rows = marked([{"query_id": "a", "image": "x", "relevant_item_ids": ids} for ids in (["i"], [1], "i")], TRUTH)
    assert [row[REASON] for row in rows] == [None] + ["relevant_item_ids is not of type list<item: string>"] * 2


def test_a_raw_parquet_row_keeps_what_json_cannot() -> None:
    table = pa.table({"item_id": [""], "added": pa.array([1], pa.timestamp("s")), "blob": [b"\xff"]})
    (row,) = mark_rows(table, ITEMS, "/d").to_pylist()
    assert json.loads(row[RAW])["added"] == "1970-01-01 00:00:01"


@pytest.mark.usefixtures("ray_cluster")
def test_a_changed_picture_is_noticed_and_another_file_is_not(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "unused.png"):
        (tmp_path / name).write_bytes(b"picture")
    rows = {"query_id": ["a", "b", "c", "d"], "image": ["a.png", "b.png", "none.png", "s3://shop/c.png"]}
    pq.write_table(pa.table(rows), tmp_path / "queries.parquet")
    tag = pictures_tag(find_input(str(tmp_path), QUERIES))
    (tmp_path / "unused.png").write_bytes(b"another picture")
    assert pictures_tag(find_input(str(tmp_path), QUERIES)) == tag
    (tmp_path / "b.png").write_bytes(b"another picture")
    changed = pictures_tag(find_input(str(tmp_path), QUERIES))
    assert changed != tag
    (tmp_path / "none.png").write_bytes(b"picture")
    assert pictures_tag(find_input(str(tmp_path), QUERIES)) not in (tag, changed)


def test_no_part_of_a_table_is_passed_over(tmp_path: Path) -> None:
    write_queries(tmp_path / "queries/a.parquet")
    for name in ("_SUCCESS", "_metadata.json", ".a.parquet.crc", "_delta_log/0.json", "p/x.jpg", "p/x.json.jpg"):
        (tmp_path / "queries" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "queries" / name).touch()
    write_queries(tmp_path / "queries/_delta_log/9.checkpoint.parquet")
    assert list(find_input(str(tmp_path), QUERIES).tags) == ["queries/a.parquet"]
    for name in ("b.parquet.gz", "b.PARQUET", "b.json", "b.jsonl.zst", "b.csv", "p/b.csv"):
        (tmp_path / "queries" / name).touch()
        told = f"DATA/queries/{name}: would not be read; make it one of .parquet, .jsonl, .jsonl.gz, or take it away"
        assert said(tmp_path) == told
        (tmp_path / "queries" / name).unlink()
    write_queries(tmp_path / "queries.parquet")
    assert said(tmp_path) == "DATA: holds both queries.parquet and queries/a.parquet; keep one of them"
    (tmp_path / "queries/a.parquet").unlink()
    assert list(find_input(str(tmp_path), QUERIES).tags) == ["queries.parquet"], "a folder of pictures is no table"


def test_links_are_followed_once_and_one_to_nothing_is_named(tmp_path: Path) -> None:
    write_queries(tmp_path / "elsewhere/b.parquet")
    write_queries(tmp_path / "data/queries/2024-05-01/a.parquet")
    data = tmp_path / "data"
    (data / "queries/latest").symlink_to(data / "queries/2024-05-01")
    (data / "queries/loop").symlink_to(data)
    (data / "queries/more").symlink_to(tmp_path / "elsewhere")
    (data / "queries/photo.jpg").symlink_to(tmp_path / "gone")
    (data / "queries/.#a.parquet").symlink_to("me@here.1234")
    assert list(find_input(str(data), QUERIES).tags) == ["queries/2024-05-01/a.parquet", "queries/more/b.parquet"]
    (data / "queries/c.parquet").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageError, match=r"queries/c\.parquet: cannot be read \(.*No such file"):
        find_input(str(data), QUERIES)


def test_storage_that_does_not_answer_is_no_broken_file(tmp_path: Path) -> None:
    write_queries(tmp_path / "queries.parquet")
    away = OSError("When reading information for key 'a': AWS Error NETWORK_CONNECTION during HeadObject operation")
    for error in (away, PermissionError(13, "Permission denied")):
        told = _unreadable("s3://b/a", "Parquet file", error)
        assert isinstance(told, StorageError)
        assert str(told).startswith("s3://b/a: cannot be read (")
    assert isinstance(_unreadable("s3://b/a", "file", OSError("Truncated compressed stream")), InputError)


def test_what_json_may_not_hold_is_a_broken_row() -> None:
    surrogates = b'{"query_id": "\xed\xa0\xbd\xed\xb8\x80", "image": "x"}'  # an emoji as Java writes it
    deep = b'{"query_id": ' + b"[" * 100_000
    marked_bom = b'\xef\xbb\xbf{"query_id": "q", "image": "x"}'
    encoded = pa.table({"line": pa.array([surrogates, deep, marked_bom], pa.binary())})
    rows = mark_rows(encoded, QUERIES, "/d", lambda batch: parse_lines(batch, QUERIES)).to_pylist()
    assert [row[REASON] for row in rows] == ["not a JSON object", "not a JSON object", None]


def test_a_time_that_python_does_not_have_stops_nothing() -> None:
    far = pa.array([2**62, 0], pa.timestamp("us", "UTC"))
    rows = mark_rows(pa.table({"query_id": [None, "q"], "image": ["x", "y"], "asked": far}), QUERIES, "/d").to_pylist()
    assert json.loads(rows[0][RAW])["asked"] == json.loads(rows[0][OTHERS])["asked"] == str(2**62)
    assert json.loads(rows[1][OTHERS])["asked"].startswith("1970-01-01")


def test_equal_keys_have_one_order_whatever_order_they_came_in() -> None:
    rows = [{"item_id": "a", "title": title, "price": price} for title in ("x", "y") for price in (1, 2, None)]
    whole = [row | {"sizes": [1]} for row in rows]
    ordered = in_one_order(pa.Table.from_pylist(whole), ["item_id"]).to_pylist()
    assert ordered == whole
    assert in_one_order(pa.Table.from_pylist(whole[::-1]), ["item_id"]).to_pylist() == whole


def test_rows_with_columns_that_have_no_order_are_ordered_by_the_others() -> None:
    shared = {"item_id": ["a", "a"], "title": ["y", "x"], "sizes": [[1], [2]], "box": [{"x": 1}, {"x": 2}]}
    columns = {name: pa.array(values) for name, values in shared.items()}
    columns["half"] = pa.array([1.0, 2.0], pa.float16())
    columns["every"] = pa.array([(1, 2, 3), (1, 2, 4)], pa.month_day_nano_interval())
    columns["cost"] = pa.array([Decimal("1.5"), Decimal("2.5")])
    columns["added"] = pa.array([2, 1], pa.timestamp("us", "UTC"))
    assert in_one_order(pa.table(columns), ["item_id"])["title"].to_pylist() == ["x", "y"]


def test_times_that_python_does_not_have_are_kept_wherever_they_are() -> None:
    far = pa.array([2**62], pa.timestamp("us"))
    listed = pa.ListArray.from_arrays([0, 1], far)
    whole = pa.StructArray.from_arrays([far, pa.array(["x"])], ["at", "name"])
    (row,) = to_dicts(pa.table({"listed": listed, "whole": whole}))
    assert row == {"listed": [str(2**62)], "whole": {"at": str(2**62), "name": "x"}}
