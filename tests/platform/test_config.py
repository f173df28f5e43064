"""A wrong key or value is one sentence that names the key, the file and what was expected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from mixer_platform.config import RunConfig, load_config
from mixer_platform.errors import ConfigError

ROOT = Path(__file__).parents[2]
GOOD = "data: d\nworkspace: w\n"


def failure(tmp_path: Path, text: str, *overrides: str) -> str:
    """Return what is said of a configuration, without the folder it lies in."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert error.value.exit_status == 2
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trian: {}\n", "run.yaml: trian: unknown key; did you mean train?"),
        ("train: {epoch: 3}\n", "run.yaml: train.epoch: unknown key; did you mean epochs?"),
        (
            "prepare: {labeling: {trsut: 3}}\n",
            "run.yaml: prepare.labeling.trsut: unknown key; did you mean trust",
        ),
        (
            "evaluate: {zzz: 3}\n",
            "run.yaml: evaluate.zzz: unknown key; expected one of against, baseline, concept_items,",
        ),
        ("train: {epochs: 0}\n", "run.yaml: train.epochs: expected greater than or equal to 1, found 0"),
        ("train: {epochs: many}\n", "run.yaml: train.epochs: expected a valid integer"),
        ("train: {zero_stage: 4}\n", "run.yaml: train.zero_stage: expected 0, 1, 2 or 3, found 4"),
        ("train: [1]\n", "run.yaml: train: expected "),
    ],
)
def test_wrong_keys_and_values(tmp_path: Path, text: str, said: str) -> None:
    assert failure(tmp_path, GOOD + text).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: d\n", "run.yaml: workspace: missing; give it in the file or as workspace=VALUE"),
        ("data: [unclosed\n", "run.yaml: not YAML: "),
        ("- a list\n", "run.yaml: expected keys and values, found list"),
        ("", "run.yaml: expected keys and values, found NoneType"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, said: str) -> None:
    assert failure(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs", "command line: 'train.epochs' is not key=value, such as train.epochs=3"),
        ("=3", "command line: '=3' is not key=value"),
        ("train.epochs=none", "command line: train.epochs: expected a valid integer"),
        ("train.epocs=3", "command line: train.epocs: unknown key; did you mean epochs?"),
        ("data.folder=3", "command line: data.folder: data is a value, not a section"),
        ("model.concept_dim=30", "command line: model: concept_dim 30 is not a multiple of heads 4"),
        ("train.seed=-1", "command line: train.seed: expected greater than or equal to 0, found -1"),
        ("evaluate.ks=[]", "command line: evaluate.ks: "),
        ("evaluate.ks=[1", "command line: evaluate.ks: '[1' is not a YAML value"),
        ("evaluate.ks=[0]", "command line: evaluate.ks.0: expected greater than or equal to 1, found 0"),
        ('train={"epochs": 0}', "command line: train.epochs: expected greater than or equal to 1, found 0"),
        ("train={epocs: 3}", "command line: train.epocs: unknown key; did you mean epochs?"),
        (
            "serve.encoder_device=cuda",
            "command line: serve: encoder_gpus is 0 and encoder_device cuda; give each a share of a GPU, such as 0.25",
        ),
        (
            "index.embedder_gpus=1",
            "command line: index: embedder_gpus 1 would lie idle, for embedder_device is cpu; set it to cuda",
        ),
        (
            "train.gpus_per_worker=0.5",
            "command line: train: gpus_per_worker 0.5: of several workers each takes one, or none (0)",
        ),
        ("workspace=", "command line: workspace: expected a valid string, found None"),
    ],
)
def test_wrong_overrides_name_the_command_line(tmp_path: Path, override: str, said: str) -> None:
    assert failure(tmp_path, GOOD, override).startswith(said)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: No such file or directory; name a configuration with --config$"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match=r"picture.yaml: not YAML"):
        load_config(tmp_path / "picture.yaml")


def test_overrides_are_yaml_values_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(GOOD + "train: {epochs: 3, seed: 5}\nserve:\n")
    config = load_config(
        tmp_path / "run.yaml",
        ["train.epochs=7", "evaluate.ks=[1, 2]", "evaluate.baseline=false", "prepare.labeling.trust=2.5",
         "truth=null", "workspace=s3://bucket/a=b", "serve.port=0"],
    )  # fmt: skip
    assert (config.train.epochs, config.train.seed) == (7, 5)
    assert (config.evaluate.ks, config.evaluate.baseline) == ((1, 2), False)
    assert config.prepare.labeling.trust == 2.5
    assert (config.truth, config.workspace, config.serve.port) == (None, "s3://bucket/a=b", 0)


def test_an_override_says_nothing_of_its_neighbours(tmp_path: Path) -> None:
    assert failure(tmp_path, GOOD + "train: {seed: -1}\n", "train.epochs=3").startswith("run.yaml: train.seed: ")


def test_texts_are_kept_as_typed(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(GOOD)
    typed = ["data=/tmp/my #1/data", "workspace=2024", "truth=[a]: b", "model.text_encoder=null", "serve.host=::1"]
    config = load_config(tmp_path / "run.yaml", typed)
    assert (config.data, config.workspace, config.truth) == ("/tmp/my #1/data", "2024", "[a]: b")
    assert (config.model.text_encoder, config.serve.host) == ("null", "::1")


def test_a_configuration_is_frozen() -> None:
    config = RunConfig(data="d", workspace="w")
    with pytest.raises(ValidationError):
        config.train.epochs = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.prepare.labeling.seed = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.model.dim = 2  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs/configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_in_the_repository_loads(path: Path) -> None:
    load_config(path)


def test_a_job_says_it_on_stderr_and_exits_with_2(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "train: {epoch: 3}\n")
    done = subprocess.run(
        [sys.executable, ROOT / "jobs/prepare.py", "--config", path],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")])},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [f"error: {path}: train.epoch: unknown key; did you mean epochs?"]
