"""The whole marketplace from synthetic drawings: contract, determinism, and never half a folder."""

import json
import re
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, UnidentifiedImageError

from mixer_platform.errors import InputError
from mixer_platform.schema import ITEMS, LOGS, QUERIES, TRUTH
from mixer_platform.simulate import job
from mixer_platform.simulate.config import ClickConfig, SimulateConfig
from mixer_platform.simulate.emoji import Thing
from mixer_platform.simulate.job import build, simulate

CONFIG = SimulateConfig(
    val_photos=8, photo_size=48, item_size=40, clicks=ClickConfig(sessions_per_query=10, page_size=6, pool_size=8)
)


def make_thing(index):
    rng = np.random.default_rng(index)
    colour = "#" + rng.bytes(3).hex()
    drawings = []
    for _ in range(2):
        picture = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(picture).regular_polygon((32, 32, 28), 3 + index % 5, fill=colour)
        file = BytesIO()
        picture.save(file, "PNG")
        drawings.append(file.getvalue())
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><circle cx="36" cy="36" r="30" fill="{colour}"/>'
    )
    return Thing(
        code=f"{index}",
        label=f"thing {index}",
        tags=("small", colour),
        group=f"group {index % 2}",
        subgroup=f"subgroup {index % 4}",
        twitter=drawings[0],
        google=drawings[1],
        openmoji=f"{svg}</svg>".encode(),
    )


@pytest.fixture(scope="module")
def things():
    return [make_thing(index) for index in range(12)]


@pytest.fixture(scope="module")
def made(things, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "emoji"
    return folder, build(things, CONFIG, folder)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tables_are_the_contract_s(made):
    folder, report = made
    items, queries, val, truth = (
        pq.read_table(folder / f"{name}.parquet") for name in ("items", "queries", "val", "truth")
    )
    assert items.schema.names == ["item_id", "title", "description", "group", "subgroup", "image"]
    assert all(items.schema.field(field.name).type == field.type for field in ITEMS.columns)
    assert queries.schema.equals(QUERIES.columns)
    assert val.schema.equals(TRUTH.columns)
    assert truth.schema.equals(pa.schema([("query_id", pa.string()), ("item_id", pa.string())]))
    assert (items.num_rows, queries.num_rows, val.num_rows, truth.num_rows) == (12, 48, 8, 48)
    parts = sorted((folder / "logs").iterdir())
    assert [part.name for part in parts] == [f"week-{number}.parquet" for number in range(4)]
    assert all(pq.read_schema(part).equals(LOGS.columns) for part in parts)
    assert sum(pq.read_metadata(part).num_rows for part in parts) == report["logs"]["events"]
    assert report == json.loads((folder / "simulate.json").read_text())
    assert report["items_without_description"] == items["description"].null_count > 0


def test_pictures_are_there_and_their_names_tell_nothing(made):
    folder, _ = made
    photos = [*pq.read_table(folder / "queries.parquet")["image"].to_pylist()]
    photos += pq.read_table(folder / "val.parquet")["image"].to_pylist()
    assert len(set(photos)) == 56
    assert {f"photos/{path.name}" for path in (folder / "photos").iterdir()} == set(photos)
    for name in photos:
        assert re.fullmatch(r"photos/[0-9a-f]{16}\.jpg", name)
        assert Image.open(folder / name).size == (48, 48)


def test_some_listings_have_no_usable_picture_and_val_does_not_ask_for_them(made):
    folder, report = made
    assert report["broken_pictures"] == {"missing": 1, "truncated": 1, "not an image": 1}
    bad = {}
    for item in pq.read_table(folder / "items.parquet").to_pylist():
        try:
            assert np.asarray(Image.open(folder / item["image"]).convert("RGB")).shape == (40, 40, 3)
        except (OSError, UnidentifiedImageError) as error:
            bad[item["item_id"]] = type(error)
    assert len(bad) == 3
    asked = pq.read_table(folder / "val.parquet")["relevant_item_ids"].to_pylist()
    assert not bad.keys() & {item for items in asked for item in items}


def test_new_photos_are_of_every_thing_and_then_again_in_the_other_style():
    photos = job._new_photos(np.array([4, 2, 7, 5]), 10, np.random.default_rng(0))
    assert photos.thing.tolist() == [4, 2, 7, 5, 4, 2, 7, 5, 4, 2]
    assert photos.style.tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 0, 1]
    assert len(set(photos.image)) == 10


def test_something_is_left_to_photograph():
    with pytest.raises(ValueError, match="max_things 3 leaves no item with a picture"):
        SimulateConfig(max_things=3)
    SimulateConfig(max_things=3, broken_pictures=2)


def test_pictures_that_are_all_broken_are_one_sentence(things, tmp_path):
    with pytest.raises(InputError, match="no item has a picture to ask for; make broken_pictures less than 12"):
        build(things, CONFIG.model_copy(update={"broken_pictures": 12}), tmp_path / "made")


def test_truth_names_the_item_that_people_click_most(made):
    folder, _ = made
    truth = dict(
        zip(
            *(pq.read_table(folder / "truth.parquet")[name].to_pylist() for name in ("query_id", "item_id")),
            strict=True,
        )
    )
    logs = pa.concat_tables(pq.read_table(part) for part in (folder / "logs").iterdir()).to_pylist()
    clicks = [row for row in logs if row["event"] == "click" and row["query_id"] in truth]
    assert 0.4 < np.mean([truth[row["query_id"]] == row["item_id"] for row in clicks]) < 0.8


def test_the_same_seed_makes_the_same_files(made, things, tmp_path):
    folder, _ = made
    build(things, CONFIG, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    build(things, CONFIG.model_copy(update={"seed": 1, "max_things": 5}), tmp_path / "other")
    assert pq.read_metadata(tmp_path / "other" / "items.parquet").num_rows == 5
    assert not contents(tmp_path / "other").keys() & {name for name in contents(folder) if "photos" in name}


def test_a_second_run_does_nothing(made, monkeypatch, tmp_path):
    folder, report = made
    monkeypatch.setattr(job, "fetch", lambda cache: pytest.fail("touched the network"))
    before = contents(folder)
    assert simulate(CONFIG, folder, tmp_path) == report
    assert contents(folder) == before


def test_a_folder_with_anything_else_is_left_alone(made, tmp_path):
    folder, _ = made
    with pytest.raises(InputError, match="another configuration; delete it or name another folder"):
        simulate(SimulateConfig(seed=9), folder, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear to me")
    with pytest.raises(InputError, match="mine: holds data that simulate did not make; name another folder"):
        simulate(CONFIG, tmp_path / "mine", tmp_path)


def test_a_failure_leaves_nothing_behind(things, monkeypatch, tmp_path):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(job, "simulate_logs", fail)
    with pytest.raises(OSError, match="No space left"):
        build(things, CONFIG, tmp_path / "emoji")
    assert list(tmp_path.iterdir()) == []
