"""The index's life on Ray: build, update, compact; what is found is always what a fresh build would find."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest

from mixer_platform.cli import mixer_error_in
from mixer_platform.config import RunConfig
from mixer_platform.errors import (
    ConfigError,
    ConflictError,
    InputError,
    StorageError,
    VersionError,
    WishError,
    published_already,
)
from mixer_platform.gallery import read_manifest
from mixer_platform.index.embeddings import LEFT_OUT, TEXT_ONLY
from mixer_platform.index.job import build, compact, update
from mixer_platform.index.lifecycle import describe, gc, publish, rollback, unusable, verify
from mixer_platform.index.worker import ItemWorker, Job
from mixer_platform.storage import LocalStorage
from tests.index.conftest import ITEMS, Shop  # type: ignore[import-not-found]

pytestmark = pytest.mark.usefixtures("ray_cluster")


def ask(count: int = 20, dim: int = 8) -> np.ndarray:
    queries = np.random.default_rng(7).standard_normal((count, dim)).astype(np.float32)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def same(found: list, expected: list) -> None:
    for one, other in zip(found, expected, strict=True):
        assert [score for _, score in one] == pytest.approx([score for _, score in other], abs=1e-5)
        assert {item for item, _ in one} == {item for item, _ in other}


def identities(shop: Shop) -> dict[str, int]:
    parts = [(shard.item_ids(), shard.segments[0].ids.tolist()) for shard in shop.shards()]
    return {item: identity for part in parts for item, identity in zip(*part, strict=True)}


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="onnxruntime knows CUDA")
def test_an_embedder_without_its_device_names_the_key(shop: Shop) -> None:
    job = Job(shop.storage.uri, "v", "model-a", 4, [], 32, "cuda")
    with pytest.raises(ConfigError, match=r"^index\.embedder_device: this onnxruntime is not made for cuda; "):
        ItemWorker(job)


def test_a_build_is_searched_as_its_embeddings_are(shop: Shop) -> None:
    report = build(shop.config)
    assert (report["items"], report["left_out"], report["without_picture"]) == (ITEMS - 1, 1, 2)
    listed = unusable(shop.config)
    assert (listed[LEFT_OUT], listed[TEXT_ONLY]) == (1, 2)
    assert pq.read_table(listed["written"]).sort_by("item_id").to_pylist() == [
        {"item_id": "i3", "state": TEXT_ONLY},
        {"item_id": "i4", "state": TEXT_ONLY},
        {"item_id": "i5", "state": LEFT_OUT},
    ]
    assert (report["factory"], report["recall_at_10"]) == ("Flat", 1.0)
    embedded, queries = shop.embedded(), ask()
    assert set(embedded) == {row["item_id"] for row in shop.rows} - {"i5"}
    names, matrix = list(embedded), np.stack(list(embedded.values()))
    scores = queries @ matrix.T
    for found, row in zip(shop.search(queries, 10), scores, strict=True):
        best = np.argsort(-row, kind="stable")[:10]
        assert [item for item, _ in found] == [names[place] for place in best]
    shown = shop.shown()
    picture = str((shop.data / shop.rows[7]["image"]).resolve())
    assert shown["i7"] == {**shop.rows[7], "description": None, "image": picture}
    again = build(shop.config)
    assert again["reused"]
    assert again["version"] == report["version"]


def test_what_is_embedded_already_is_not_embedded_again(shop: Shop) -> None:
    first = build(shop.config)
    ids = identities(shop)
    before = shop.embedded()
    rows = [row for row in shop.rows if row["item_id"] != "i9"]
    rows[0] |= {"price": 99.0}
    rows[1] = shop.item(1, seed=201)
    rows.append(shop.item(ITEMS))
    shop.write_items(rows)
    report = build(shop.config)
    made = json.loads(shop.storage.read(f"embeddings/{report['embeddings']}/manifest.json"))
    assert (made["embedded"], made["reused"]) == (2, ITEMS - 3)
    assert report["version"] != first["version"]
    found = shop.embedded()
    assert "i9" not in found
    assert not np.allclose(found["i1"], before["i1"], atol=1e-3)
    for item in set(before) - {"i1", "i9"}:
        np.testing.assert_array_equal(found[item], before[item])
    assert shop.shown()["i0"]["price"] == 99.0
    kept = {item: identity for item, identity in identities(shop).items() if item in ids}
    assert kept == {item: ids[item] for item in kept}, "ids never drift"


def test_finished_partitions_outlive_a_run(shop: Shop) -> None:
    report = build(shop.config)
    folder = shop.workspace / f"embeddings/{report['embeddings']}"
    parts = sorted(folder.glob("part-*.parquet"))
    assert len(parts) > 3
    lost, kept = parts[1], {path: path.stat().st_mtime_ns for path in parts if path != parts[1]}
    (folder / "manifest.json").unlink()
    lost.unlink()
    before = shop.embedded
    again = build(shop.config)
    assert again["version"] == report["version"], "the index is there"
    assert lost.exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(before()) == ITEMS - 1


def test_updates_and_their_compaction_find_what_a_fresh_build_would(shop: Shop) -> None:
    shop.config = shop.with_index(compact_above=1.0)
    built = build(shop.config)
    queries = ask()
    rows = {row["item_id"]: row for row in shop.rows}
    first = [shop.item(1, seed=301), {**shop.rows[2], "price": 7.5}, shop.item(70), shop.item(71)]
    first.append({**shop.rows[8], "image": None, "title": None})  # nothing is left to embed
    updated = update(shop.changes("monday", first, ["i10", "i11", "nobody"]))
    counts = dict(embedded=3, reused=1, replaced=3, deleted=2, unknown=1, broken=0, without_picture=0, left_out=1)
    assert updated["changes"] == counts
    second = [shop.item(10, seed=310), shop.item(70, seed=370)]
    tuesday = shop.changes("tuesday", second, ["i12", "i71", "i5"])
    updated = update(tuesday)
    assert updated["items"] == ITEMS - 1 - 3 + 2 + 1 - 2
    assert (updated["changes"]["deleted"], updated["changes"]["unknown"]) == (2, 1), "i5 was not found"
    assert unusable(shop.config)[LEFT_OUT] == 1, "i8, and i5 no more"
    assert update(tuesday)["reused"], "the same changes again are none"
    by_updates = shop.search(queries, 15)
    shown = shop.shown()
    assert shown["i2"]["price"] == 7.5
    assert set(shown) == set(shop.embedded())
    description = describe(shop.config)
    assert description["embeddings"][-1] == built["embeddings"]
    assert len(description["embeddings"]) == 3
    similar = [vector for shard in shop.shards() if (vector := shard.vector("i10")) is not None]
    np.testing.assert_allclose(similar, [shop.embedded()["i10"]], atol=1e-6)
    assert all(shard.vector("i12") is None for shard in shop.shards())

    compacted = compact(shop.config)
    assert compacted["items"] == updated["items"]
    assert (compacted["left_out"], unusable(shop.config)[LEFT_OUT]) == (1, 1)
    assert describe(shop.config)["updated_share"] == 0
    same(shop.search(queries, 15), by_updates)

    for row in (*first, *second):
        rows[row["item_id"]] = row
    for item_id in ("i5", "i11", "i12", "i71"):
        del rows[item_id]
    shop.write_items(list(rows.values()))
    fresh = build(shop.config)
    assert fresh["items"] == updated["items"]
    assert fresh["version"] != compacted["version"]
    same(shop.search(queries, 15), by_updates)
    assert shop.shown() == shown

    assert rollback(shop.config)["version"] == compacted["version"]
    assert rollback(shop.config)["version"] == updated["version"]
    same(shop.search(queries, 15), by_updates)
    assert publish(shop.with_index(version=fresh["version"]))["replaced"] == updated["version"]
    report = gc(shop.with_index(keep=2, grace_hours=0))
    assert set(report["kept"]) == {fresh["version"], updated["version"]}
    assert f"index/{compacted['version']}" in report["deleted"]
    assert f"index/{built['version']}" not in report["deleted"], "the updated version's vectors lie there"
    same(shop.search(queries, 15, updated["version"]), by_updates)
    assert verify(shop.config)["sound"]
    assert gc(shop.with_index(keep=1))["deleted"] == [], "what is young may be in the making"
    gc(shop.with_index(keep=1, grace_hours=0))
    assert shop.storage.folders("index") == [fresh["version"]]
    assert shop.storage.folders("embeddings") == [fresh["embeddings"]]


def test_a_damaged_version_is_built_again_and_damaged_embeddings_are_named(shop: Shop) -> None:
    built = build(shop.config)
    path = shop.workspace / f"index/{built['version']}/shard-00001.faiss"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StorageError, match=r"shard-00001\.faiss: not the bytes that were published"):
        verify(shop.config)
    again = build(shop.config)
    assert again["version"] != built["version"]
    assert verify(shop.config)["sound"]
    (path, *_) = sorted((shop.workspace / f"embeddings/{built['embeddings']}").glob("part-*.parquet"))
    data = bytearray(path.read_bytes())
    place = data.index(shop.embedded()[shop.shards()[0].item_ids()[0]].tobytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StorageError, match=r"part-\d+\.parquet: cannot be read \(.*\); delete that version's folder"):
        shop.embedded()
    manifest = shop.workspace / "models/model-a/manifest.json"
    assert manifest.exists()


def test_an_index_of_another_models_embeddings_is_refused(shop: Shop) -> None:
    built = build(shop.config)
    path = shop.workspace / f"embeddings/{built['embeddings']}/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": "model-b"}))
    with pytest.raises(VersionError, match=r"says it was built by model model-a, its embeddings .* by model-b"):
        verify(shop.config)
    with pytest.raises(VersionError, match="was built by model model-a, not by model-b"):
        update(shop.changes("none", [], ["i1"]).model_copy(update={"index": shop.with_index(model="model-b").index}))


def test_rollbacks_go_back_through_what_was_served(shop: Shop) -> None:
    first = build(shop.config)["version"]
    second = build(shop.with_index(shards=2))["version"]
    publish(shop.with_index(version=first))
    assert [rollback(shop.config)["version"] for _ in range(2)] == [second, first]
    with pytest.raises(StorageError, match=f"nothing was served before {first}; there is no way back"):
        rollback(shop.config)


def test_what_is_served_stays_though_nothing_was_written_of_it(shop: Shop) -> None:
    build(shop.config)
    update(shop.changes("some", [shop.item(1, seed=601)]))
    shop.storage.delete("publications")
    assert gc(shop.with_index(grace_hours=0))["deleted"] == []
    assert verify(shop.config)["sound"]
    assert "i1" in shop.embedded()


def test_a_storage_that_does_not_answer_costs_no_version(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(shop.config)
    build(shop.with_index(shards=2))
    read = LocalStorage.read

    def once_in_a_while(storage: LocalStorage, key: str) -> bytes:
        if key == f"embeddings/{first['embeddings']}/manifest.json":
            raise StorageError(f"{key}: no answer")
        return read(storage, key)

    monkeypatch.setattr(LocalStorage, "read", once_in_a_while)
    before = shop.storage.list("")
    with pytest.raises(StorageError, match="no answer"):
        gc(shop.with_index(grace_hours=0))
    assert shop.storage.list("") == before


def test_what_is_brought_back_is_young_to_whoever_collects_garbage(shop: Shop) -> None:
    build(shop.config)
    updated = update(shop.changes("some", [shop.item(1, seed=601)]))
    fresh = build(shop.with_index(shards=2))
    needed = {f"{kind}/{name}" for kind in ("index", "embeddings") for name in shop.storage.folders(kind)}
    week_ago = time.time() - 7 * 86_400
    for path in shop.workspace.rglob("*"):
        if path.is_file() and "models" not in path.parts:
            os.utime(path, (week_ago, week_ago))
    publish(shop.with_index(version=updated["version"]))
    publish(shop.with_index(version=fresh["version"]))
    shop.storage.delete("publications")  # nobody knows that it was served
    assert gc(shop.with_index(keep=1))["deleted"] == []
    assert {f"{kind}/{name}" for kind in ("index", "embeddings") for name in shop.storage.folders(kind)} == needed


def test_embeddings_that_a_build_goes_on_from_are_young(shop: Shop) -> None:
    with pytest.raises(WishError):
        build(shop.with_index(memory=100))
    (made,) = shop.storage.folders("embeddings")
    week_ago = time.time() - 7 * 86_400
    for path in (shop.workspace / "embeddings").rglob("*"):
        os.utime(path, (week_ago, week_ago))
    assert shop.storage.modified(f"embeddings/{made}") < week_ago + 60
    build(shop.config)
    assert shop.storage.modified(f"embeddings/{made}") > week_ago + 60


def test_a_way_back_costs_two_records_however_long_the_history(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    build(shop.config)
    other = build(shop.with_index(shards=2))["version"]
    for _ in range(4):
        rollback(shop.config)
        publish(shop.with_index(version=other))
    read, seen = LocalStorage.read, []

    def counted(storage: LocalStorage, key: str) -> bytes:
        seen.append(key)
        return read(storage, key)

    monkeypatch.setattr(LocalStorage, "read", counted)
    rollback(shop.config)
    assert sum(key.startswith("publications/") for key in seen) == 2


def test_pictures_of_an_update_are_shown_from_its_own_folder(shop: Shop) -> None:
    build(shop.config)
    config = shop.changes("some", [shop.item(1, seed=601)])
    folder = Path(config.index.changes or "")
    (folder / "pictures").unlink()
    (folder / "pictures").mkdir()
    (shop.data / "pictures/i1-601.png").rename(folder / "pictures/i1-601.png")
    assert update(config)["changes"]["without_picture"] == 0
    assert shop.shown()["i1"]["image"] == str((folder / "pictures/i1-601.png").resolve())


def test_an_update_that_leaves_nothing_is_refused(shop: Shop) -> None:
    built = build(shop.config)
    with pytest.raises(InputError, match="nothing would be left in the index; it stays as it is"):
        update(shop.changes("none", [], [row["item_id"] for row in shop.rows]))
    assert read_manifest(shop.storage).version == built["version"]


def test_many_updates_are_compacted_by_themselves(shop: Shop) -> None:
    build(shop.config)
    changed = shop.changes("all", [shop.item(number, seed=400 + number) for number in range(20)])
    report = update(changed)
    assert all(len(shard["segments"]) == 1 for shard in report["shards"])
    assert report["items"] == ITEMS - 1 + ("i5" in shop.embedded())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"factory": "IVF2,PQ2x4", "recall_at_10": 0.99}, WishError, r"index: recall@10 is 0\.\d+ at most, and"),
        ({"factory": "IVF2,Fla"}, ConfigError, "index.factory: FAISS refuses 'IVF2,Fla'"),
        ({"factory": "IVF4096,Flat"}, ConfigError, "index.factory: "),  # which a task says, of so few items
    ],
)
def test_an_update_that_cannot_be_compacted_is_served_and_says_so(
    shop: Shop, settings: dict, error: type[Exception], message: str
) -> None:
    built = build(shop.config)
    shop.config = shop.with_index(**settings)
    with pytest.raises(error, match=f"the update is served as (.*), but cannot be compacted: {message}") as raised:
        update(shop.changes("all", [shop.item(number, seed=400 + number) for number in range(20)]))
    served = read_manifest(shop.storage).version
    assert f"served as {served}," in str(raised.value)
    assert served != built["version"]


def test_a_publisher_that_is_faster_than_a_compaction_is_not_said_to_serve_the_update(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def published_by_another(config: RunConfig) -> dict:
        raise published_already("CURRENT")

    build(shop.config)
    monkeypatch.setattr("mixer_platform.index.job.compact", published_by_another)
    with pytest.raises(ConflictError, match=r"^CURRENT: somebody else published first"):
        update(shop.changes("all", [shop.item(number, seed=400 + number) for number in range(20)]))


@pytest.mark.parametrize(
    ("items", "deleted", "message"),
    [
        ([{"item_id": "i1", "title": "x"}], ["i1"], "item 'i1' is both in items and in deleted; keep one of them"),
        ([{"item_id": "i1", "size": "L"}], [], r"items: column size is not in the index; leave it out, or add it to"),
        ([{"item_id": "i1", "price": "dear"}], [], "column price is string, double in the index; cast it and try"),
        ([], [], "neither items nor deleted is there; write one of them as Parquet or JSONL"),
    ],
)
def test_changes_that_cannot_be_used_are_named_and_change_nothing(
    shop: Shop, tmp_path: Path, items: list, deleted: list, message: str
) -> None:
    built = build(shop.config)
    config = shop.changes("changes", [], deleted)
    if items:
        (tmp_path / "changes/items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    with pytest.raises(Exception, match=message) as raised:
        update(config)
    assert mixer_error_in(raised.value)
    assert read_manifest(shop.storage).version == built["version"]


def test_below_the_wished_recall_nothing_is_published(shop: Shop) -> None:
    coarse = shop.with_index(factory="IVF2,PQ2x4", recall_at_10=0.99)
    with pytest.raises(WishError, match=r"recall@10 is 0\.\d+ at most, and index\.recall_at_10=0\.99 is wished"):
        build(coarse)
    assert shop.storage.tag("index/CURRENT") is None
    with pytest.raises(WishError, match=r"index\.memory: no kind of index fits 59 items into 100 bytes; allow 1K"):
        build(shop.with_index(memory=100))
    with pytest.raises(ConfigError, match=r"index\.factory: FAISS refuses 'Nonsense'"):
        build(shop.with_index(factory="Nonsense"))
    build(shop.config)
    with pytest.raises(InputError, match=r"index\.changes: missing"):
        update(shop.config)
