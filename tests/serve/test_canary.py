"""Photos that an evaluation found keep a bad index out, and tell how well the one that answers does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.errors import MixerError
from mixer_platform.evaluate.job import photo_table, publish_report
from mixer_platform.serve.canary import Canary, known_photos
from mixer_platform.serve.engine import Engine
from mixer_platform.serve.loading import calibrated, open_beside, wished
from mixer_platform.serve.service import SearchService
from mixer_platform.serve.swap import Swapper, check
from mixer_platform.storage import open_storage
from tests.serve.conftest import make_photo, publish_version, serve_version

Photo = Callable[..., bytes]
FOUND, MISSED = [False, True, False], [False] * 20


def report(root: Path, version: str, hits: Sequence[list[bool] | None], created_ms: int = 1, **fields: Any) -> None:
    """Publish an evaluation of model-a: photo i is that of item i + 10, found as `hits` say."""
    rows = range(10, 10 + len(hits))
    for row in rows:
        (root / f"photo-{row}.jpg").write_bytes(make_photo(row))
    asked = pa.table(
        {
            "id": [f"q{row}" for row in rows],
            "image": [str(root / f"photo-{row}.jpg") for row in rows],
            "relevant_item_ids": [[f"item-{row:03}", "long-gone"] for row in rows],
            "hits": pa.array(hits, pa.list_(pa.bool_())),
        }
    )
    content = {"version": version, "model": "model-a", "created_ms": created_ms, **fields}
    publish_report(open_storage(str(root)), content, {"parquet": photo_table(asked)})


def publish_wrong(root: Path) -> None:
    """Publish index-b, of which the manifest says that model-a embedded it, and it was the negative of that."""
    publish_version(root, "model-b", "index-b", negative=True)
    manifest = root / "index/index-b" / versions.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "model": "model-a"}))


def canary_of(config: RunConfig, **serve: Any) -> Canary:
    return Canary(config.model_copy(update={"serve": config.serve.model_copy(update=serve)}))


def swapper_of(config: RunConfig, canary: Canary) -> Swapper:
    async def load(version: str) -> Any:
        return open_beside(config, version)

    return Swapper(checked(config, "index-a"), wished(config), load, calibrated(config), canary)


def checked(config: RunConfig, version: str) -> Engine:
    engine = open_beside(config, version)
    asyncio.run(check(engine))
    return engine


def test_only_photos_that_were_found_are_known(tmp_path: Path):
    late = [*[False] * 10, True]
    report(tmp_path, "r", [FOUND, MISSED, late, None, [True]])
    known = known_photos(open_storage(str(tmp_path)), "r", 8)
    assert [photo.content for photo in known] == [make_photo(10), make_photo(14)]
    assert [photo.relevant for photo in known] == [{"item-010", "long-gone"}, {"item-014", "long-gone"}]


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, [10]), (3, [10, 12, 14]), (9, [10, 11, 12, 13, 14])])
def test_known_photos_are_spread_over_the_report(tmp_path: Path, count: int, expected: list[int]):
    report(tmp_path, "r", [FOUND] * 5)
    known = known_photos(open_storage(str(tmp_path)), "r", count)
    assert [photo.content for photo in known] == [make_photo(row) for row in expected]


def test_a_photo_that_is_gone_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    report(tmp_path, "r", [FOUND] * 2)
    (tmp_path / "photo-10.jpg").unlink()
    known = known_photos(open_storage(str(tmp_path)), "r", 8)
    assert [photo.content for photo in known] == [make_photo(11)]
    assert "photo-10.jpg" in caplog.text


def test_a_version_that_finds_none_of_the_known_photos_does_not_come_in(fresh_workspace: Any):
    root, config = fresh_workspace.root, fresh_workspace.config
    report(root, "r", [FOUND] * 3)
    swapper = swapper_of(config, canary_of(config))
    swaps: list[Any] = []
    swapper.observe = swaps.append
    publish_wrong(root)
    serve_version(root, "index-b")
    asyncio.run(swapper.look())
    assert swapper.engine.index.version == "index-a"
    (swap,) = swaps
    assert swap.error == (
        "index index-b: it finds no right item for any of 3 photos that model model-a is known to find; "
        "evaluate it, or set serve.canary_photos=0"
    )
    off = swapper_of(config, canary_of(config, canary_photos=0))
    asyncio.run(off.look())
    assert off.engine.index.version == "index-b"


def test_a_good_version_and_a_model_without_a_report_come_in(fresh_workspace: Any):
    root, config = fresh_workspace.root, fresh_workspace.config
    report(root, "r", [FOUND] * 3)
    swapper = swapper_of(config, canary_of(config))
    asyncio.run(check(swapper.engine, canary_of(config)))
    publish_version(root, "model-b", "index-b", negative=True)
    serve_version(root, "index-b")
    asyncio.run(swapper.look())
    assert swapper.engine.index.version == "index-b"


def test_photos_whose_items_left_the_catalogue_keep_nothing_out(fresh_workspace: Any):
    root, config = fresh_workspace.root, fresh_workspace.config
    report(root, "r", [FOUND] * 60)  # the last ones are of items that there are none of
    publish_wrong(root)
    engine = checked(config, "index-b")
    with pytest.raises(MixerError, match="for any of 50 photos"):
        asyncio.run(canary_of(config, canary_photos=60).check(engine, fresh()))
    for path in root.glob("photo-[1-5]*.jpg"):
        path.unlink()
    asyncio.run(canary_of(config, canary_photos=60).check(engine, fresh()))


def test_the_newest_report_of_the_model_counts(fresh_workspace: Any):
    root, config = fresh_workspace.root, fresh_workspace.config
    service = SearchService(swapper_of(config, canary_of(config)), config.serve)
    canary = canary_of(config)
    assert asyncio.run(canary.search(service)) == (0, 0, 0)
    report(root, "zzz", [FOUND] * 2, created_ms=1)
    report(root, "other", [FOUND] * 5, created_ms=9, model="model-z")
    assert asyncio.run(canary.search(service)) == (2, 0, 0)
    report(root, "aaa", [FOUND] * 4, created_ms=2)
    assert asyncio.run(canary.search(service)) == (4, 0, 0)


def test_what_is_found_missed_and_failed_is_counted(fresh_workspace: Any):
    root, config = fresh_workspace.root, fresh_workspace.config
    report(root, "r", [FOUND] * 6)
    canary = canary_of(config)
    service = SearchService(swapper_of(config, canary), config.serve)
    known = canary._photos("model-a")
    canary._known = (
        "r",
        [
            *known[:2],
            type(known[0])(make_photo(20), frozenset(["item-050"])),  # another thing's photo
            type(known[0])(make_photo(20), frozenset(["long-gone"])),
            type(known[0])(b"no photo", frozenset(["item-010"])),
        ],
    )
    assert asyncio.run(canary.search(service)) == (2, 1, 1)


@pytest.mark.parametrize("broken", ["r.json", "r.parquet"])
def test_a_report_that_cannot_be_read_stops_nothing(
    fresh_workspace: Any, broken: str, caplog: pytest.LogCaptureFixture
):
    root, config = fresh_workspace.root, fresh_workspace.config
    report(root, "r", [FOUND] * 2)
    (root / "reports" / broken).write_bytes(b"{")
    asyncio.run(canary_of(config).check(checked(config, "index-a"), fresh()))
    assert "the known photos of model model-a cannot be read" in caplog.text


def test_it_searches_again_and_again(fresh_workspace: Any):
    root, config = fresh_workspace.root, fresh_workspace.config
    report(root, "r", [FOUND] * 2)
    canary = canary_of(config)
    service = SearchService(swapper_of(config, canary), config.serve)

    async def watch() -> list[tuple[int, int, int]]:
        rounds: list[tuple[int, int, int]] = []
        twice = asyncio.Event()

        def observe(*counts: int) -> None:
            rounds.append(counts)  # type: ignore[arg-type]
            if len(rounds) == 2:
                twice.set()

        following = asyncio.create_task(canary.follow(service, 0.01, observe))
        await asyncio.wait_for(twice.wait(), 30)
        following.cancel()
        return rounds[:2]

    assert asyncio.run(watch()) == [(2, 0, 0)] * 2


def fresh() -> float:
    """Return a Unix time by which there is an answer."""
    return time.time() + 30
