"""Figures by hand, and a contact sheet that shows what is right."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from mixer_platform.evaluate.contact_sheet import Found, draw_sheet
from mixer_platform.evaluate.job import found_items, measure, publish_report
from mixer_platform.storage import LocalStorage


def test_measure_by_hand() -> None:
    ranked = [["a", "b"], ["b", "a"], ["c", "d"]]
    relevant = [{"a"}, {"a"}, {"x"}]
    figures = measure(ranked, relevant, (1, 2))
    assert figures["r1"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["r2"] == pytest.approx(2 / 3, abs=1e-4)
    assert figures["macro_r1"] == pytest.approx((0.5 + 0) / 2, abs=1e-4)
    assert figures["ndcg_10"] == pytest.approx((1 + 0.6309 + 0) / 3, abs=1e-4)


def test_of_two_equal_reports_at_once_the_first_stands(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    first, second = ({"version": "v", "r1": 0.5, "seconds": seconds} for seconds in (1, 2))
    assert publish_report(storage, first, b"photos", b"sheet") == first
    assert publish_report(storage, second, b"photos of the second", b"sheet of the second") == first
    assert (storage.read("reports/v.parquet"), storage.read("reports/v.png")) == (b"photos", b"sheet")


def test_a_right_item_is_framed_and_a_missing_picture_is_no_crash(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    Image.new("RGB", (64, 64), "blue").save(picture)
    items = [(0.9, {"item_id": "a", "title": None, "image": "p.png"}), (0.1, {"item_id": "b"})]
    found = found_items(items, {"a"}, str(tmp_path))
    assert found == [Found(str(picture), "a", 0.9, True), Found(None, "b", 0.1, False)]
    framed = Image.open(io.BytesIO(draw_sheet([(str(picture), found)])))
    plain = Image.open(io.BytesIO(draw_sheet([(str(picture), found_items(items, set(), str(tmp_path)))])))
    green = (0x17, 0x86, 0x4A)
    assert green in {color for _, color in framed.getcolors(1 << 20)}
    assert green not in {color for _, color in plain.getcolors(1 << 20)}
