"""What a stage begins with: a storage that may be away, and a processor that may not know bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixer.config import ModelConfig
from mixer_platform.config import TrainConfig
from mixer_platform.storage import open_storage
from mixer_platform.train.pictures import PictureSamples
from mixer_platform.train.stages import multiplies_in_bf16, read_samples
from tests.flaky import Flaky


@pytest.mark.parametrize("requests", ["^HEAD", "^GET"])
def test_samples_are_waited_for(
    cached: Path, architecture: ModelConfig, s3: str, flaky: Flaky, monkeypatch: pytest.MonkeyPatch, requests: str
) -> None:
    storage, local = open_storage(f"s3://{s3}/shop"), open_storage(str(cached))
    for key in local.list(""):
        storage.upload(key, cached / key)
    config = TrainConfig(views=2, neighbours=0)
    job = {"workspace": storage.uri, "samples": "v1", "widths": [16, 16], "classes": 3}
    job |= {"features": local.folders("features")[0], "model": architecture.model_dump(), "train": config.model_dump()}
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client gives up at once
    flaky.fail("unavailable", 3, requests)
    samples, rows, held_out = read_samples(job, config, 0)
    assert (len(samples.photos), len(samples.labels)) == (12, 18)
    storage.delete("features")  # which fine-tuning, where a run goes on in it, does without
    flaky.fail("unavailable", 3, requests)
    pictures, *split = read_samples(job, config, config.rounds)
    assert isinstance(pictures, PictureSamples)
    assert pictures.labels.tolist() == samples.labels.tolist()
    assert [part.tolist() for part in split] == [rows.tolist(), held_out.tolist()]
    assert flaky.failed == 3


def test_a_cpu_saves_time_by_bf16_if_it_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multiplies_in_bf16(torch.device("cuda"))
    for known in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda known=known: known)
        assert multiplies_in_bf16(torch.device("cpu")) is known
