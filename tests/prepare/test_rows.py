"""What only other rows show: repeats, references, robots, pictures."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from mixer_platform.inputs import IMAGE, OTHERS, RAW, REASON
from mixer_platform.prepare import rows
from mixer_platform.prepare.job import _states


def marked(reasons: list[str | None] | None = None, **columns: list) -> pa.Table:
    count = len(next(iter(columns.values())))
    table = pa.table(columns)
    table = table.append_column(REASON, pa.array(reasons or [None] * count, pa.string()))
    return table.append_column(RAW, pa.nulls(count, pa.string()))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_of_repeated_keys_exactly_one_sound_row_stays(order: tuple[int, ...]) -> None:
    """Whatever the order: a broken row of the same key must not make the sound one a repeat."""
    given = [("a", "broken", 0), ("a", None, 1), ("a", None, 2), ("b", None, 3)]
    keys, reasons, n = zip(*(given[place] for place in order), strict=True)
    found = rows.mark_repeats(marked(list(reasons), key=list(keys), n=list(n)), "key").to_pylist()
    assert sorted((row["key"], row[REASON] or "") for row in found) == [
        ("a", ""), ("a", "broken"), ("a", "key is repeated"), ("b", ""),
    ]  # fmt: skip
    assert sorted(row["n"] for row in found) == [0, 1, 2, 3]
    assert next(row["n"] for row in found if row[REASON] == "broken") == 0


def test_missing_keys_are_no_repeats_of_each_other() -> None:
    found = rows.mark_repeats(marked(["key is missing"] * 2 + [None], key=[None, None, "a"]), "key")
    assert sorted(str(reason) for reason in found[REASON].to_pylist()) == ["None", "key is missing", "key is missing"]
    assert rows.mark_repeats(marked(key=pa.array([], pa.string())), "key").num_rows == 0


def test_references_are_sound_unknown_or_in_quarantine() -> None:
    batch = marked([None, None, None, "broken"], key=["a", "b", "c", "d"], state=["", None, "picture", None])
    found = rows.mark_references(batch, "key", "state")
    assert found[REASON].to_pylist() == [None, "key is unknown", "key is in quarantine: picture", "broken"]
    assert found.column_names == ["key", REASON, RAW]


def test_each_key_has_one_state_and_a_sound_row_decides_it() -> None:
    batch = marked(
        ["image is missing", None, "image is missing", "text", "key is repeated", None, "key is missing"],
        key=["a", "a", "b", "b", "c", "c", None],
    )
    states = _states(batch, "key", "state").to_pylist()
    assert sorted((row["key"], row["state"]) for row in states) == [("a", ""), ("b", "image is missing"), ("c", "")]


def test_robots_are_sessions_with_many_sound_clicks() -> None:
    sessions = ["robot"] * 4 + ["busy"] * 4 + ["person"]
    events = [*["click"] * 3, "impression", *["click"] * 3, "purchase", "click"]
    reasons = [*[None] * 6, "event_id is repeated", None, None]
    found = rows.mark_robots(marked(reasons, session_id=sessions, event=events), clicks=3)
    assert found[REASON].to_pylist() == ["session is a robot's"] * 4 + reasons[4:]


def test_sessions_that_are_missing_do_no_harm() -> None:
    batch = marked(["session_id is missing"] * 3, session_id=[None] * 3, event=["click"] * 3)
    assert rows.mark_robots(batch, clicks=2)[REASON].to_pylist() == ["session_id is missing"] * 3


def test_others_are_marked() -> None:
    batch = marked([None, None, "broken"], key=pa.array(["a", "b", "c"], pa.large_string()))
    assert rows.mark_others(batch, "key", pa.array(["a"]), "why")[REASON].to_pylist() == [None, "why", "broken"]


def test_pictures(tmp_path: Path) -> None:
    def picture(side: int) -> bytes:
        file = io.BytesIO()
        Image.effect_noise((side, side), 50).save(file, "PNG")
        return file.getvalue()

    files = {"good": picture(32), "cut": picture(32)[:300], "small": picture(4), "text": b"hello", "empty": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    uris = [None, *(str(tmp_path / name) for name in [*files, "none"]), str(tmp_path / "none")]
    found = rows.mark_pictures(marked([None] * 7 + ["broken"], **{IMAGE: uris}), min_side=8)[REASON].to_pylist()
    assert found[2].startswith("broken picture")
    assert found[:2] + found[3:] == [
        None, None, "picture of 4 x 4 pixels; each side needs 8", "not a JPEG, PNG or WebP picture",
        "not a JPEG, PNG or WebP picture", "picture cannot be read: No such file or directory", "broken",
    ]  # fmt: skip


def test_a_picture_behind_another_scheme_is_told() -> None:
    batch = marked(**{IMAGE: ["https://shop/a/1.jpg", "https://shop/b/2.jpg"]})
    said = "picture cannot be read: only folders and s3://bucket/prefix are read and written"
    assert rows.mark_pictures(batch, min_side=8)[REASON].to_pylist() == [said, said]


def test_quarantine_and_sound_rows_part() -> None:
    batch = pa.table({"key": ["a", "b", "c"], "added": pa.array([1, 2, 3], pa.timestamp("s"))})
    batch = batch.append_column(REASON, pa.array([None, "x", "y"], pa.string()))
    batch = batch.append_column(RAW, pa.array([None, None, "as it came"], pa.string()))
    kept = rows.quarantined(batch, "items")
    assert kept.schema == rows.QUARANTINE
    assert kept["table"].to_pylist() == ["items"] * 2
    assert kept["reason"].to_pylist() == ["x", "y"]
    assert json.loads(kept["raw"][0].as_py()) == {"key": "b", "added": "1970-01-01 00:00:02"}
    assert kept["raw"][1].as_py() == "as it came"
    assert rows.sound(batch).to_pylist() == batch.slice(0, 1).drop_columns([REASON, RAW]).to_pylist()


def test_quarantine_shows_the_row_and_samples_the_picture() -> None:
    batch = marked([None, "x"], image=["p/a", "p/b"], **{IMAGE: ["/d/p/a", "/d/p/b"], OTHERS: [None, '{"lens": 3}']})
    assert rows.sound(batch).to_pylist() == [{"image": "/d/p/a"}]
    assert json.loads(rows.quarantined(batch, "queries")["raw"][0].as_py()) == {"image": "p/b", "lens": 3}


def test_of_repeated_items_the_same_one_stays_whatever_order_they_came_in() -> None:
    given = marked([None, None, None], item_id=["a", "a", "a"], title=["new", "old", "new"], price=[2, 1, 1])
    for order in itertools.permutations(range(3)):
        found = rows.mark_repeats(given.take(list(order)), "item_id").to_pylist()
        (kept,) = [row for row in found if row[REASON] is None]
        assert (kept["title"], kept["price"]) == ("new", 1)


def test_quarantine_takes_times_that_python_does_not_have() -> None:
    bad = marked(["broken"], item_id=["a"], added=pa.array([2**62], pa.timestamp("us")))
    (row,) = rows.quarantined(bad, "items").to_pylist()
    assert json.loads(row["raw"])["added"] == str(2**62)
