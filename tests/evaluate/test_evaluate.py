"""Figures by hand, and a contact sheet that shows what is right."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mixer.calibration import fit_calibration
from mixer_platform.config import RunConfig
from mixer_platform.errors import InputError, StorageError
from mixer_platform.evaluate.calibrate import calibrate, keep_calibration
from mixer_platform.evaluate.compare import check_comparable, compare
from mixer_platform.evaluate.concepts import Fired, draw_concepts
from mixer_platform.evaluate.contact_sheet import Found, draw_sheet
from mixer_platform.evaluate.embed import PHOTO, picture_rows
from mixer_platform.evaluate.job import (
    found_items,
    measure,
    photo_table,
    publish_report,
    shared_gallery,
    untrained_ranking,
    why_unusable,
)
from mixer_platform.gallery import calibration_key, read_calibration
from mixer_platform.index import lifecycle
from mixer_platform.inputs import IMAGE, REASON
from mixer_platform.storage import LocalStorage


def test_measure_by_hand() -> None:
    ranked = [["a", "b"], ["b", "a"], ["c", "d"]]
    relevant = [{"a"}, {"a"}, {"x"}]
    figures = measure(ranked, relevant, (1, 2))
    assert figures["r1"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["r2"] == pytest.approx(2 / 3, abs=1e-4)
    assert figures["macro_r1"] == pytest.approx((0.5 + 0) / 2, abs=1e-4)
    assert figures["ndcg_10"] == pytest.approx((1 + 0.6309 + 0) / 3, abs=1e-4)


def test_the_baseline_answers_over_the_gallery_of_the_index_or_not_at_all() -> None:
    items = pa.table({"id": ["a", "b", "c"]})
    kept = shared_gallery(items, {"a", "c"})
    assert kept is not None
    assert kept["id"].to_pylist() == ["a", "c"], "b was deleted by an update"
    assert shared_gallery(items, {"a", "new"}) is None


def test_the_baseline_ranks_photos_some_at_a_time_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    asked, items = (
        pa.table({"id": [f"{n:02}" for n in range(count)], "untrained": list(rng.normal(size=(count, 4)))})
        for count in (7, 12)
    )
    whole = untrained_ranking(asked, items, 5)
    monkeypatch.setattr("mixer_platform.evaluate.job._SCORES", 24)
    assert untrained_ranking(asked, items, 5) == whole
    gallery = np.stack(items["untrained"].to_pylist())
    unit = [(x - gallery.mean(0)) / np.linalg.norm(x - gallery.mean(0)) for x in gallery]
    photo = np.array(asked["untrained"][6].as_py()) - gallery.mean(0)
    assert whole[6][0] == f"{np.argmax(unit @ photo):02}"


def test_why_photos_of_the_truth_cannot_be_used_is_told() -> None:
    columns = {"query_id": ["a", "b", "c", "d"], "relevant_item_ids": [["i"], [], None, ["i"]]}
    reasons = {IMAGE: ["a.png", "b.png", "c.png", "d.png"], REASON: [None, None, "relevant_item_ids is missing", None]}
    rows = picture_rows(pa.table({**columns, **reasons}), PHOTO)
    assert rows["image"].to_pylist() == ["a.png", None, None, "d.png"]
    photos = rows.append_column("query", pa.array([[1.0], None, None, None]))
    assert why_unusable(photos) == {
        "relevant_item_ids is empty": 1,
        "relevant_item_ids is missing": 1,
        "picture cannot be read": 1,
    }


def test_of_two_equal_reports_at_once_the_first_stands(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    first, second = ({"version": "v", "r1": 0.5, "seconds": seconds} for seconds in (1, 2))
    assert publish_report(storage, first, {"png": b"sheet"}) == first
    assert publish_report(storage, second, {"png": b"sheet of the second"}) == first
    assert storage.read("reports/v.png") == b"sheet"


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


def report_of(storage: LocalStorage, version: str, hits: list[list[bool]], gallery: str = "g") -> tuple[dict, pa.Table]:
    """Publish a report of these hits; return it and its photos."""
    asked = pa.table(
        {
            "id": [f"q{row}" for row in range(len(hits))],
            "image": ["p.png"] * len(hits),
            "relevant_item_ids": [["a"]] * len(hits),
            "hits": pa.array(hits, pa.list_(pa.bool_())),
        }
    )
    report = {"version": version, "gallery": gallery, "truth": "t"}
    publish_report(storage, report, {"parquet": photo_table(asked)})
    return report, asked


def test_a_report_is_compared_with_an_earlier_one_photo_by_photo(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    report_of(storage, "before", [[False, True], [True, False], [], [False, False]])
    report, asked = report_of(storage, "after", [[True, False], [True, False], [True], [False, True]])
    gain = compare(storage, "reports", report, asked, "before")
    assert (gain["version"], gain["r1_gain"]) == ("before", 0.5)
    assert 0 <= gain["interval"][0] < 0.5 < gain["interval"][1] <= 1


@pytest.mark.parametrize("part", ["gallery", "truth"])
def test_reports_of_different_galleries_or_truths_are_not_compared(tmp_path: Path, part: str) -> None:
    storage = LocalStorage(str(tmp_path))
    report_of(storage, "before", [[True]])
    report, asked = report_of(storage, "after", [[True]])
    with pytest.raises(
        InputError, match=rf"^evaluate\.against: reports/before was measured on another {part}; "
    ) as error:
        compare(storage, "reports", {**report, part: "another"}, asked, "before")
    known = {"gallery": report["gallery"]}  # what is known before photos are read
    check_comparable(storage, "reports", known, "before")
    with pytest.raises(InputError):
        check_comparable(storage, "reports", {"gallery": "another"}, "before")
    with pytest.raises(InputError, match=r"^evaluate\.against: no report befor in .*reports; give the version of one$"):
        check_comparable(storage, "reports", {}, "befor")
    assert "\n" not in str(error.value)


def test_concepts_are_drawn_with_their_words_and_where_they_look() -> None:
    pixels = np.full((32, 32, 3), 200, np.uint8)
    looks = np.zeros((2, 2, 2))
    looks[0, 0, 0] = looks[1, 1, 1] = 1  # the first looks to the upper left, the second to the lower right
    sheet = Image.open(io.BytesIO(draw_concepts([Fired(pixels, "red apples", looks, ["red", "apples"])]))).convert(
        "RGB"
    )
    red = np.asarray(sheet, int)[..., 0] - np.asarray(sheet, int)[..., 1]
    first, second = (red[10:142, left : left + 132] for left in (152, 294))
    assert first[:40, :40].mean() > 50 > first[90:, 90:].mean()
    assert second[90:, 90:].mean() > 50 > second[:40, :40].mean()
    assert draw_concepts([]).startswith(b"\x89PNG")


def test_calibration_is_of_the_first_ten_found_items_of_each_photo() -> None:
    rng = np.random.default_rng(0)
    results, relevant = [], []
    for photo in range(60):
        scores = np.sort(rng.uniform(0, 1, 12))[::-1]
        results.append([(float(score), {"item_id": f"{photo}-{rank}"}) for rank, score in enumerate(scores)])
        relevant.append({f"{photo}-{rank}" for rank, score in enumerate(scores) if rng.random() < score**3})
    said = calibrate(results, relevant)
    assert said is not None
    assert (said["photos"], said["pairs"]) == (60, 600)
    pairs = [
        (score, item["item_id"] in relevant[photo]) for photo, row in enumerate(results) for score, item in row[:10]
    ]
    fitted = fit_calibration(*(np.array(column) for column in zip(*pairs, strict=True)))
    assert (said["slope"], said["intercept"]) == (fitted.slope, fitted.intercept)
    assert said["right"] == sum(right for _, right in pairs)
    assert 0 < said["ece"] < 0.15
    assert sum(count for _, _, count in said["reliability"]) == 600
    assert calibrate(results, [set()] * 60) is None
    assert calibrate([[(0.9, {"item_id": "a"})]], [{"a"}]) is None
    assert calibrate([[]], [{"a"}]) is None


def calibrated(version: str, photos: int, slope: float) -> dict:
    said = {"slope": slope, "intercept": -1.0, "photos": photos, "pairs": 10 * photos, "right": 5, "ece": 0.01}
    return {"version": version, "model": "model-a", "calibration": said}


def test_a_model_keeps_the_calibration_of_most_photos(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    assert read_calibration(storage, "model-a") is None
    slopes = []
    for version, photos, slope in (("r1", 20, 1.0), ("r2", 10, 2.0), ("r3", 20, 3.0), ("r4", 40, 4.0)):
        keep_calibration(storage, calibrated(version, photos, slope))
        slopes.append(read_calibration(storage, "model-a").slope)
    assert slopes == [1, 1, 3, 4]
    keep_calibration(storage, {**calibrated("r5", 90, 5.0), "calibration": None})
    assert read_calibration(storage, "model-a").slope == 4
    assert read_calibration(storage, "model-b") is None
    config = RunConfig.model_validate({"data": "", "workspace": str(tmp_path), "index": {"grace_hours": 0}})
    assert lifecycle.gc(config)["deleted"] == []
    assert read_calibration(storage, "model-a").probability(np.array([0.25])) == pytest.approx(0.5)


def test_of_two_evaluations_at_once_the_one_of_more_photos_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, publish = LocalStorage(str(tmp_path)), LocalStorage.publish

    def overtaken(self: LocalStorage, *arguments: object, **named: object) -> None:
        monkeypatch.setattr(LocalStorage, "publish", publish)
        keep_calibration(storage, calibrated("other", 30, 3.0))
        publish(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStorage, "publish", overtaken)
    keep_calibration(storage, calibrated("mine", 20, 2.0))
    assert read_calibration(storage, "model-a").slope == 3


@pytest.mark.parametrize("content", [b"", b"[]", b'{"slope": 1}', b'{"slope": "x", "intercept": 0}'])
def test_what_is_no_calibration_is_named(tmp_path: Path, content: bytes) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.write(calibration_key("model-a"), content)
    with pytest.raises(StorageError, match=r"calibration/model-a\.json: not a calibration; delete it"):
        read_calibration(storage, "model-a")
