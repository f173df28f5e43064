"""Training for real, on tiny encoders: Ray Data caches features, Ray Train and DeepSpeed learn."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mixer.config import ModelConfig
from mixer.embedder import ItemEmbedder, QueryEmbedder
from mixer.images import decode
from mixer.towers import MixerModel
from mixer_platform import versions
from mixer_platform.config import RunConfig
from mixer_platform.errors import ConfigError, StorageError, TrainingError
from mixer_platform.storage import open_storage
from mixer_platform.train.checkpoints import Checkpoints
from mixer_platform.train.job import train
from tests.train.conftest import write_samples


def run_config(workspace: Path, architecture: ModelConfig, **settings: Any) -> RunConfig:
    plain = {"epochs": 2, "batch_size": 7, "workers": 2, "views": 2, "holdout": 0.2, "neighbours": 2}
    tree = {"data": "unused", "workspace": str(workspace), "model": architecture.model_dump()}
    return RunConfig.model_validate({**tree, "train": {**plain, "tower_lr": 0.01, "max_failures": 0, **settings}})


def losses(report: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in report["history"]]


def weights(workspace: Path, report: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(workspace / "models" / report["version"] / "model.safetensors")


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_publishes_a_model_and_an_interrupted_one_goes_on(workspace: Path, architecture: ModelConfig) -> None:
    config = run_config(workspace, architecture)
    report = train(config)
    folder = workspace / "models" / report["version"]
    check_model(folder, report)

    again = train(config)
    assert again.pop("reused")
    assert again == report
    check_interpolated(workspace, report, config.train.interpolation)

    # As if it had been stopped after the first epoch; one worker takes over from two.
    first = weights(workspace, report)
    shutil.rmtree(folder)
    run = Checkpoints(open_storage(str(workspace)), report["fingerprint"])
    shutil.rmtree(workspace / run.folder / "epoch-00001")
    resumed = train(run_config(workspace, architecture, workers=1))
    assert resumed["fingerprint"] == report["fingerprint"]
    folder = workspace / "models" / resumed["version"]
    assert resumed["history"][0] == report["history"][0], "the first epoch was trained again"
    np.testing.assert_allclose(losses(resumed), losses(report), rtol=1e-5)
    second = weights(workspace, resumed)
    for name, value in first.items():
        if not name.endswith("key.bias"):  # no gradient but rounding noise
            torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)
    assert [path.name for path in (folder / "classifier").iterdir()] == ["000000000000-000000000003.safetensors"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("epochs", "trained"), [(1, 1), (2, 3)])
def test_a_run_of_two_rounds_goes_on_between_and_within_them(
    cached: Path, architecture: ModelConfig, epochs: int, trained: int
) -> None:
    settings = {"epochs": epochs, "rounds": 2}
    whole = train(run_config(cached, architecture, **settings))
    assert [entry["epoch"] for entry in whole["history"]] == list(range(2 * epochs))
    run = Checkpoints(open_storage(str(cached)), whole["fingerprint"])
    told = run.read_targets(1)
    assert (told.others[:12] == -6).all()
    assert torch.isneginf(told.others[12:]).all()
    shutil.rmtree(cached / "models" / whole["version"])
    shutil.rmtree(cached / run.folder / f"epoch-{2 * epochs - 1:05d}")
    resumed = train(run_config(cached, architecture, **settings, workers=1))
    assert resumed["history"][:trained] == whole["history"][:trained], "what was trained is trained again"
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=1e-4)


def check_interpolated(workspace: Path, report: dict[str, Any], share: float) -> None:
    run = Checkpoints(open_storage(str(workspace)), report["fingerprint"])
    state = run.latest()
    assert state is not None
    learned, published = run.read_towers(state["name"]), weights(workspace, report)
    start = learned["towers.initial_weight"]
    for name in ("towers.query_transform", "towers.item_transform"):
        wanted = start + share * (learned[f"{name}.weight"] - start)
        torch.testing.assert_close(published[f"{name}.weight"], wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(published[f"{name}.bias"], share * learned[f"{name}.bias"], rtol=0, atol=1e-6)
    torch.testing.assert_close(published["towers.log_gates"], learned["towers.log_gates"], rtol=0, atol=0)


def check_model(folder: Path, report: dict[str, Any]) -> None:
    assert [entry["epoch"] for entry in report["history"]] == [0, 1]
    assert all(math.isfinite(loss) for loss in losses(report))
    assert all(0 <= entry["held_out_r1"] <= 1 for entry in report["history"])
    for entry in report["history"]:
        assert sum(entry[f"share_{part}"] for part in ("data", "towers", "softmax", "communication")) == pytest.approx(
            1, abs=1e-3
        )
    assert (report["samples"], report["classes"], report["dim"]) == ("v1", 3, 8)
    assert json.loads((folder / "metrics.json").read_text())["history"] == report["history"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "tokenizer/tokenizer.json").exists()
    parts = sorted(path.name for path in (folder / "classifier").iterdir())
    assert parts == ["000000000000-000000000002.safetensors", "000000000002-000000000003.safetensors"]
    assert {name: rows.shape for name, rows in load_file(folder / "classifier" / parts[0]).items()} == {
        "weight": (2, 8)
    }

    model = MixerModel.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    with torch.no_grad():
        wanted = model.embed_queries(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(QueryEmbedder(folder)(pixels), wanted, atol=1e-4)
    ItemEmbedder(folder)([None], ["red thing"])
    assert model.towers.feature_mean.abs().sum() > 0, "the features' mean was lost"
    moved = model.towers.query_transform.weight - model.towers.item_transform.weight
    assert moved.abs().max() > 1e-3, "the two transformations have not parted"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("epochs", "zero_stage"), [(1, 0), (2, 3)])
def test_the_image_encoder_can_be_trained_too(
    cached: Path, architecture: ModelConfig, epochs: int, zero_stage: int
) -> None:
    tuning = {"epochs": epochs, "from_block": 1, "batch_size": 6, "encoder_lr": 0.01}
    report = train(run_config(cached, architecture, epochs=1, fine_tune=tuning, zero_stage=zero_stage))
    assert [entry["epoch"] for entry in report["history"]] == list(range(1 + epochs))
    before = MixerModel(architecture).state_dict()
    after = weights(cached, report)
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert any(name.startswith("image_encoder.") and ".1." in name for name in changed)
    assert not any(name.startswith("text_encoder.") for name in changed)
    assert not any(name.startswith("image_encoder.") and ".0." in name for name in changed)
    assert after["towers.feature_mean"].abs().sum() > 0, "the features' mean was lost"
    check_interpolated(cached, report, 1.0)

    # As if it had been stopped before its last epoch, the first or the second of fine-tuning; one worker takes over,
    # with all that saves memory and with batches that Ray Data makes.
    run = Checkpoints(open_storage(str(cached)), report["fingerprint"])
    shutil.rmtree(cached / "models")
    shutil.rmtree(cached / run.folder / f"epoch-{epochs:05d}")
    if epochs > 1:  # within fine-tuning, which wants pictures only
        for rows in cached.glob("features/*/rows"):
            shutil.rmtree(rows)
    sparing = {**tuning, "checkpoint_activations": True, "decoders": 1}
    settings = {"workers": 1, "micro_batch": 2, "zero_stage": zero_stage}
    resumed = train(run_config(cached, architecture, epochs=1, fine_tune=sparing, **settings))
    assert resumed["history"][:epochs] == report["history"][:epochs], "what was trained is trained again"
    np.testing.assert_allclose(losses(resumed), losses(report), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_classes_that_were_there_go_on_and_new_ones_start_from_their_samples(
    cached: Path, architecture: ModelConfig
) -> None:
    first = train(run_config(cached, architecture, classifier_lr=0.05, start="latest"))
    assert first["start"] is None, "there was none"
    rows = pq.read_table(cached / "samples/v1/train").to_pylist()
    numbers = {0: 2, 1: 0, 2: 3}
    for row in rows:
        row["class_id"] = numbers[row["class_id"]]
        row["candidates"] = row["candidates"] and [numbers[label] for label in row["candidates"]]
    blue = next(row for row in rows if row["kind"] == "item" and row["text"] == "blue round thing")
    rows += [{**blue, "sample_id": f"new-{n}", "text": "a new thing", "class_id": 1} for n in range(2)]
    write_samples(cached, "v2", rows)

    still = {"tower_lr": 1e-12, "classifier_lr": 1e-12, "epochs": 1, "rounds": 2, "zero_stage": 1}
    config = run_config(cached, architecture, samples="v2", start="latest", **still)
    second = train(config)
    assert train(config)["version"] == second["version"], "what is asked for again is there"
    assert (second["start"], second["kept_classes"], second["classes"]) == (first["version"], 3, 4)
    before, after = (classifier(cached, report) for report in (first, second))
    for old, new in numbers.items():
        torch.testing.assert_close(after[new], before[old], rtol=0, atol=1e-9)
    items = ItemEmbedder(cached / "models" / first["version"])
    pixels = torch.from_numpy(items.preprocess(decode(Path(blue["image"]).read_bytes()))[None])
    learned = MixerModel.from_pretrained(cached / "models" / first["version"])
    learned.towers.interpolate(1.0)
    words = map(torch.from_numpy, learned.text_encoder.tokenizer(["a new thing"]))
    with torch.no_grad():
        expected = learned.embed_items(pixels, torch.tensor([True]), *words)[0]
    np.testing.assert_allclose(after[1], expected, atol=2e-3)  # features are cached in 16 bits
    trained, went_on = weights(cached, first), weights(cached, second)
    for name, value in trained.items():
        torch.testing.assert_close(went_on[name], value, rtol=0, atol=1e-6)

    # As if it had been stopped before its last epoch.
    shutil.rmtree(cached / "models" / second["version"])
    run = Checkpoints(open_storage(str(cached)), second["fingerprint"])
    shutil.rmtree(cached / run.folder / "epoch-00001")
    torch.testing.assert_close(classifier(cached, train(config)), after, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_goes_on_from_a_model_whose_encoder_was_trained(cached: Path, architecture: ModelConfig) -> None:
    tuning = {"epochs": 1, "from_block": 1, "batch_size": 6, "encoder_lr": 0.01}
    first = train(run_config(cached, architecture, epochs=1, fine_tune=tuning))
    still = {"tower_lr": 1e-12, "classifier_lr": 1e-12, "encoder_lr": 1e-12}
    settings = {"epochs": 1, "start": first["version"], "tower_lr": 1e-12, "classifier_lr": 1e-12}
    frozen = train(run_config(cached, architecture, **settings))
    tuned = train(run_config(cached, architecture, **settings, fine_tune={**tuning, **still}))
    trained = weights(cached, first)
    assert not torch.equal(MixerModel(architecture).state_dict()[name := encoder_name(trained)], trained[name])
    for report in (frozen, tuned):
        for name, value in weights(cached, report).items():
            torch.testing.assert_close(value, trained[name], rtol=0, atol=1e-9)
    assert frozen["history"][0]["loss"] < first["history"][0]["loss"]
    features = {path.name for path in (cached / "features").iterdir()}
    assert len(features) == 2, "what the trained encoder sees is cached apart, once"


def encoder_name(state: dict[str, torch.Tensor]) -> str:
    return next(name for name in state if name.startswith("image_encoder.") and ".1." in name and "weight" in name)


def classifier(workspace: Path, report: dict[str, Any]) -> torch.Tensor:
    files = sorted((workspace / "models" / report["version"] / "classifier").iterdir())
    return torch.cat([load_file(path)["weight"] for path in files])


@pytest.mark.parametrize(
    ("start", "error", "sentence"),
    [
        ("unknown", StorageError, r"samples/v0/classes\.parquet: missing; train\.start tells classes by the items"),
        ("none-such", StorageError, "models/none-such: no such published version"),
        ("other", ConfigError, r"^train\.start: model other has another model\.dim: 16; set it so, or start from none"),
    ],
)
def test_a_model_that_it_cannot_start_from_is_one_sentence(
    workspace: Path, architecture: ModelConfig, start: str, error: type[Exception], sentence: str
) -> None:
    storage = open_storage(str(workspace))
    for name, dim in (("other", 16), ("unknown", architecture.dim)):
        config = architecture.model_copy(update={"dim": dim}).model_dump_json()
        storage.write(f"models/{name}/config.json", config.encode())
        versions.publish(storage, "models", name, {"samples": "v0"})
    with pytest.raises(error, match=sentence):
        train(run_config(workspace, architecture, start=start))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_loss_that_is_no_number_ends_the_run_at_once(cached: Path, architecture: ModelConfig) -> None:
    """Workers that fail are started again, and Ray Train's error would come of it in the end, not ours."""
    with pytest.raises(TrainingError, match=r"^step \d+: .* lower train\.tower_lr"):
        train(run_config(cached, architecture, classifier_lr=3e38, max_failures=3))
    assert not list(cached.glob("models/*"))


def test_no_samples_is_one_sentence(tmp_path: Path, architecture: ModelConfig) -> None:
    with pytest.raises(StorageError, match=r"samples: nothing is published here; run the job that writes samples/"):
        train(run_config(tmp_path, architecture))


def test_an_unknown_encoder_is_one_sentence(workspace: Path, architecture: ModelConfig) -> None:
    unknown = architecture.model_copy(update={"image_encoder": str(workspace / "no-such-encoder")})
    with pytest.raises(ConfigError, match=r"^model: image encoder .*no-such-encoder: ") as error:
        train(run_config(workspace, unknown))
    assert "\n" not in str(error.value)


def test_fine_tuning_from_a_block_that_is_not_there_is_one_sentence(workspace: Path, architecture: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"^train\.fine_tune\.from_block 2: the image encoder has blocks 0 to 1"):
        train(run_config(workspace, architecture, fine_tune={"epochs": 1, "from_block": 2}))
