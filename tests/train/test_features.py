"""Cached features must be what the encoders say of each picture and text."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mixer.config import ModelConfig
from mixer.export import export_encoders
from mixer.images import decode
from mixer.sampling import EpochPlan
from mixer.towers import MixerModel
from mixer_platform.config import TrainConfig
from mixer_platform.errors import ConfigError, InputError, MissingError, StorageError, TrainingError
from mixer_platform.storage import open_storage
from mixer_platform.train import features
from mixer_platform.train.features import FeatureSamples, FeatureWorker
from mixer_platform.train.feeding import Schedule, batches_of
from mixer_platform.train.pictures import PictureSamples, read_picture

VIEWS = 3
PHOTOS, ITEMS = 12, 6


@pytest.fixture
def samples(workspace: Path) -> list[dict]:
    """The samples, photos first, each kind by id: the order of the rows in training."""
    rows = pq.read_table(workspace / "samples/v1/train").to_pylist()
    return sorted(rows, key=lambda row: (row["kind"] != "query", row["sample_id"]))


@pytest.fixture(params=["mean", "first"])
def model(request: pytest.FixtureRequest, architecture: ModelConfig) -> MixerModel:
    return MixerModel(architecture.model_copy(update={"pooling": request.param})).eval()


@pytest.fixture
def cached(workspace: Path, model: MixerModel) -> FeatureSamples:
    (workspace / "features/f/encoders").mkdir(parents=True)
    (workspace / "features/f/rows").mkdir()
    export_encoders(model, workspace / "features/f/encoders")
    worker = FeatureWorker(str(workspace), "features/f/encoders", model.config.pooling, TrainConfig(views=VIEWS))
    for name in ("0", "1"):
        rows = worker(pq.read_table(workspace / f"samples/v1/train/{name}.parquet"))
        pq.write_table(rows, workspace / f"features/f/rows/{name}.parquet")
    return read_cached(workspace, model)


def read_cached(workspace: Path, model: MixerModel) -> FeatureSamples:
    return FeatureSamples(open_storage(str(workspace)), "f", (16, 16), VIEWS, model.config.max_tokens)


def picture_samples(workspace: Path, model: MixerModel) -> PictureSamples:
    preprocess, tokenizer = model.image_encoder.preprocess, model.text_encoder.tokenizer
    return PictureSamples(str(workspace), "v1", preprocess, tokenizer, seed=0)


def plan(view: int = 0, drop_text: bool = False, drop_image: bool = False) -> EpochPlan:
    count = PHOTOS + ITEMS
    return EpochPlan(
        np.arange(count), np.full(count, view), np.full(count, drop_text), np.full(count, drop_image)
    )  # fmt: skip


@torch.no_grad()
def test_batches_hold_the_encoders_features(cached: FeatureSamples, model: MixerModel, samples: list[dict]) -> None:
    rows = np.array([14, 3, 12, 0, 15, 17])
    batch = cached.batch(rows, plan())
    order = [3, 0, 14, 12, 15, 17]  # photos first
    assert cached.ids == [row["sample_id"] for row in samples]
    assert cached.labels.tolist() == [row["class_id"] for row in samples]
    torch.testing.assert_close(batch.targets.weights, torch.tensor([samples[row]["weight"] for row in order]))
    known = batch.targets.over(range(3))
    for place, row in enumerate(order):
        label = samples[row]["class_id"]
        nothing = [-0.5] * 3 if samples[row]["kind"] == "query" else [-torch.inf] * 3
        said = zip(samples[row]["candidates"] or [label], samples[row]["evidence"] or [0.0], strict=True)
        expected = {**dict(enumerate(nothing)), **dict(said)}
        assert known[place].tolist() == list(expected.values())

    def patches(row: int) -> torch.Tensor:
        pixels = model.image_encoder.preprocess(decode(Path(samples[row]["image"]).read_bytes()))
        return model.image_encoder(torch.from_numpy(pixels.copy())[None])

    close = {"rtol": 2e-3, "atol": 2e-3}  # they are cached in half precision
    for place, row in enumerate(order[:2]):
        torch.testing.assert_close(batch.photos[place].float(), model.towers.pool(patches(row))[0], **close)
    for place, row in enumerate(order[2:]):
        sample = samples[row]
        assert batch.has_image[place] == (sample["image"] is not None)
        if sample["image"]:
            torch.testing.assert_close(batch.pictures[place].float(), patches(row)[0], **close)
        ids, mask = model.text_encoder.tokenizer([sample["text"]])
        count = mask.sum()
        assert batch.token_mask[place].tolist() == [1] * count + [0] * (8 - count)
        if count:
            tokens = model.text_encoder(torch.from_numpy(ids), torch.from_numpy(mask))[0]
            torch.testing.assert_close(batch.tokens[place, :count].float(), tokens, **close)
    missing = [(row["sample_id"], row["image"] is None, row["text"] is None) for row in samples[PHOTOS:]]
    assert [entry for entry in missing if any(entry[1:])] == [("item-0-4", True, False), ("item-1-5", False, True)]


def test_views_differ_and_are_drawn_from_seed_and_sample_alone(cached: FeatureSamples, workspace: Path) -> None:
    rows = np.arange(PHOTOS + ITEMS)
    plain, other = cached.batch(rows, plan()), cached.batch(rows, plan(view=2))
    assert (plain.photos - other.photos).abs().amax(dim=1).min() > 0
    worker = FeatureWorker(str(workspace), "features/f/encoders", "mean", TrainConfig(views=VIEWS))
    table = pq.read_table(workspace / "samples/v1/train")
    one, reverse = worker(table), worker(table.take(pa.array(range(len(table) - 1, -1, -1))))
    assert one["views"].to_pylist() == reverse["views"].to_pylist()[::-1]


def test_dropouts_hide_text_or_picture_but_never_both(cached: FeatureSamples) -> None:
    rows = np.arange(PHOTOS, PHOTOS + ITEMS)  # the first has no picture, the fourth no text
    full = cached.batch(rows, plan())
    assert full.has_image.tolist() == [False, True, True, True, True, True]
    assert full.token_mask.any(dim=1).tolist() == [True, True, True, False, True, True]
    untold = cached.batch(rows, plan(drop_text=True))
    assert untold.token_mask.any(dim=1).tolist() == [True] + [False] * 5
    assert untold.has_image.tolist() == full.has_image.tolist()
    unseen = cached.batch(rows, plan(drop_image=True))
    assert unseen.has_image.tolist() == [False, False, False, True, False, False]
    assert unseen.token_mask.any(dim=1).tolist() == full.token_mask.any(dim=1).tolist()
    assert cached.batch(rows, plan()).token_mask.sum() == full.token_mask.sum(), "dropout changed the cache"


def test_batches_without_photos_or_without_items(cached: FeatureSamples) -> None:
    photos, items = cached.batch(np.array([1]), plan()), cached.batch(np.array([13]), plan())
    assert (len(photos.photos), len(photos.pictures), len(photos.targets)) == (1, 0, 1)
    assert (len(items.photos), len(items.pictures), len(items.targets)) == (0, 1, 1)
    assert len(cached.batch(np.array([], int), plan()).targets) == 0


def test_photos_share_evidence_and_items_do_not(cached: FeatureSamples) -> None:
    own = cached.targets
    found = []
    for held_out in ([], [1, 4]):
        cached.targets = own
        cached.pool_evidence(3, 3, np.array(held_out, int))
        found.append(cached.targets.over(range(3)))
        assert torch.equal(found[-1][PHOTOS:], own.over(range(3))[PHOTOS:])
    changed = [(after != own.over(range(3)))[:PHOTOS].any(dim=1) for after in found]
    assert changed[0][[1, 4]].any()
    assert not changed[1][[1, 4]].any(), "they have evidence of others"
    lent = (found[0] != found[1])[:PHOTOS].any(dim=1)
    lent[[1, 4]] = False
    assert lent.any(), "nobody had theirs"


def test_a_picture_that_broke_after_prepare_is_named(
    cached: FeatureSamples, model: MixerModel, workspace: Path, samples: list[dict]
) -> None:
    Path(samples[0]["image"]).write_bytes(b"no picture")
    said = rf"^{samples[0]['image']}: not a JPEG, PNG or WebP picture; prepare could still read it, put "
    with pytest.raises(InputError, match=said):
        FeatureWorker(str(workspace), "features/f/encoders", "mean", TrainConfig(views=VIEWS))(
            pq.read_table(workspace / "samples/v1/train")
        )
    with pytest.raises(InputError, match=said):
        picture_samples(workspace, model).batch(np.array([0]), plan())


def test_features_lie_in_files_that_go_with_them(
    cached: FeatureSamples, workspace: Path, model: MixerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    again = read_cached(workspace, model)
    for name in ("photos", "pictures", "tokens"):
        assert torch.equal(getattr(again, name), getattr(cached, name))
    assert Path("/proc/self/maps").read_text().count(f"{scratch}/mixer-features-") == 3
    assert not list(scratch.iterdir())
    del again
    assert str(scratch) not in Path("/proc/self/maps").read_text()


def test_a_disk_without_room_for_features_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(TrainingError, match=rf"^{tmp_path}: .*GB of features do not fit; set TMPDIR"):
        features._mapped(2**50)
    assert not list(tmp_path.iterdir())


def test_pooled_leaves_missing_pictures_out(cached: FeatureSamples, model: MixerModel) -> None:
    assert cached.pooled(model.towers).shape == (PHOTOS + ITEMS - 1, 16)


@torch.no_grad()
def test_items_are_pooled_as_the_towers_do(cached: FeatureSamples, model: MixerModel) -> None:
    batch = cached.batch(np.arange(PHOTOS, PHOTOS + ITEMS), plan())
    expected = model.towers.pool(batch.pictures[batch.has_image].float())
    torch.testing.assert_close(cached.pooled(model.towers)[PHOTOS:], expected)


@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_makes_the_batches_that_a_worker_makes(model: MixerModel, workspace: Path) -> None:
    samples = picture_samples(workspace, model)
    rows = np.arange(1, PHOTOS + ITEMS)
    schedule = Schedule(PHOTOS + ITEMS, rows, 5, 0, (0.3, 0.3), None, batch_size=9, world=2, rank=1)
    here, there = (list(batches_of(samples, schedule, range(2, 4), 1, decoders)) for decoders in (0, 1))
    assert len(here) == len(there) == 2 * len(schedule.epoch(2)[1]) - 1
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.targets.over(range(3)), other.targets.over(range(3)))
        for name in ("photos", "pictures", "has_image", "tokens", "token_mask"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_pictures_as_needed_give_the_same_batches(
    cached: FeatureSamples, model: MixerModel, workspace: Path, samples: list[dict]
) -> None:
    pictures = picture_samples(workspace, model)
    rows = np.array([14, 3, 12, 15])
    for drops in ({}, {"drop_text": True}, {"drop_image": True}):
        one, other = pictures.batch(rows, plan(**drops)), cached.batch(rows, plan(**drops))
        assert torch.equal(one.targets.over(range(3)), other.targets.over(range(3)))
        assert one.has_image.tolist() == other.has_image.tolist()
        assert one.token_mask.sum(dim=1).tolist() == other.token_mask.sum(dim=1).tolist()
    encoded = model.towers.pool(model.image_encoder(pictures.batch(rows, plan()).photos))
    photos = cached.batch(rows, plan()).photos.float()
    torch.testing.assert_close(encoded, photos, rtol=2e-3, atol=2e-3)
    augmented = pictures.batch(rows, plan(view=1)).photos
    assert not torch.equal(augmented, pictures.batch(rows, plan()).photos)
    assert torch.equal(augmented, pictures.batch(rows, plan(view=1)).photos)
    assert pictures.batch(np.array([12]), plan()).photos.shape == (0, 32, 32, 3)


def test_a_storage_that_does_not_answer_is_asked_again_for_a_picture(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[StorageError] = [StorageError("no answer"), StorageError("no answer")]

    def read(uri: str) -> bytes:
        if errors:
            raise errors.pop(0)
        return Path(uri).read_bytes()

    monkeypatch.setattr("mixer_platform.train.pictures.read_uri", read)
    assert read_picture(str(workspace.parent / "query-0-0.png")).size == (48, 40)
    assert not errors
    errors.append(MissingError("nothing is there"))
    with pytest.raises(MissingError):
        read_picture("gone.png")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="onnxruntime knows CUDA")
def test_workers_with_a_gpu_want_an_onnxruntime_that_knows_it(cached: FeatureSamples, workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train\.gpus_per_worker: this onnxruntime is not made for cuda; install"):
        FeatureWorker(str(workspace), "features/f/encoders", "mean", TrainConfig(gpus_per_worker=1))


@pytest.mark.parametrize("views", [1, 20, 50])
def test_pictures_are_encoded_alike_however_many_at_once(cached: FeatureSamples, workspace: Path, views: int) -> None:
    worker = FeatureWorker(str(workspace), "features/f/encoders", "mean", TrainConfig(views=views))
    rows = pq.read_table(workspace / "samples/v1/train")
    together = worker(rows)
    for place in range(len(rows)):
        alone = worker(rows.slice(place, 1))
        seen, wanted = (table["views"][row].as_py() for table, row in ((together, place), (alone, 0)))
        if wanted is None:
            assert seen is None
        else:
            pair = [np.frombuffer(each, np.float16).astype(np.float32) for each in (seen, wanted)]
            np.testing.assert_allclose(*pair, atol=2e-3)
