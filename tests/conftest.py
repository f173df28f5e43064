"""Fixtures that several stages share."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported; a token left in ~/.ray does no harm

from mixer_platform.loopback import free_ports
from mixer_platform.serve.ingress import OWN_PORTS, own_ports, prepare

os.environ.update({name: value for name, value in own_ports(free_ports(OWN_PORTS)).items() if name not in os.environ})
os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0")  # nobody else asks
SERVE = prepare()
# Only here, for Serve's local testing mode knows no other: its handles await what another loop answers.
os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"

import ray

from mixer.config import ModelConfig
from mixer_platform.cli import connect
from tests.flaky import Flaky

ROOT = Path(__file__).parents[1]
# Ray Data runs each kind of shuffle task in workers of its own, and starting one takes seconds: keep them.
KEEP_WORKERS = {"num_workers_soft_limit": 16, "idle_worker_killing_time_threshold_ms": 60_000}

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["red", "green", "blue", "round", "square", "thing", ",", "."]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Try serving last: its service runs on to the end of the session, and what else uses the cluster would wait."""
    items.sort(key=lambda item: item.path.is_relative_to(ROOT / "tests/serve"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A small Ray cluster on this machine, with the checkout importable in its workers."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")]), **SERVE}
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": environment},
        _system_config={**KEEP_WORKERS, "metrics_report_interval_ms": 1000},
    )
    connect()  # as jobs do
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A small model over a ViT of 32 pixels and a BERT of thirteen words, both untrained."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("encoders")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=32, patch_size=16, **small)).save_pretrained(folder / "image")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "image/preprocessor_config.json").write_text(json.dumps(processor))
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **small)).save_pretrained(folder / "text")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "text")
    encoders = {"image_encoder": str(folder / "image"), "text_encoder": str(folder / "text")}
    return ModelConfig(**encoders, dim=8, concepts=2, concept_dim=8, heads=2, max_tokens=8)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket; returns its name."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import boto3

    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture
def flaky(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    """What stands between storage that is opened from here on and the bucket."""
    with Flaky(s3_endpoint.removeprefix("http://")) as flaky:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{flaky.address}")
        yield flaky
