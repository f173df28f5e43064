"""One YAML a run, read into frozen pydantic models; `key=value` on the command line overrides it.

A wrong key or value is a ConfigError of one sentence: key, file and what was expected.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mixer.config import MOST_SCALE, ModelConfig
from mixer.embedder import Device
from mixer.labeling import LabelingConfig
from mixer_platform.errors import ConfigError
from mixer_platform.simulate.config import SimulateConfig

_TEXT: tuple[Any, ...] = (str, str | None)
_HOST = r"^(\*\.[a-z0-9-]+\.)?([a-z0-9-]+\.)*[a-z0-9-]*[a-z][a-z0-9-]*$"  # a name in lower case, no address
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NULLS = ("null", "Null", "NULL", "~")


def _size(value: Any) -> Any:
    """Read a number of bytes, such as 2G or 500M; anything else is left to be refused."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", value.strip(), re.IGNORECASE)
    return int(float(found[1]) * _UNITS[found[2].upper()]) if found else value


Size = Annotated[int, BeforeValidator(_size), Field(gt=0)]


class Section(BaseModel):
    """A part of the configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_device(name: str, device: Device, gpus: float) -> None:
    """Raise ValueError unless an actor gets a share of a GPU if, and only if, it computes on one."""
    if device != "cpu" and not gpus:
        raise ValueError(f"{name}_gpus is 0 and {name}_device {device}; give each a share of a GPU, such as 0.25")
    if device == "cpu" and gpus:
        raise ValueError(f"{name}_gpus {gpus:g} would lie idle, for {name}_device is cpu; set it to cuda")


class PrepareConfig(Section):
    labeling: LabelingConfig = LabelingConfig()
    min_side: int = Field(16, ge=1, description="pictures with a shorter side (pixels) are quarantined")
    partitions: int = Field(4, ge=1, description="partitions of a shuffle; about one per 64 MB of logs")


class FineTuneConfig(Section):
    """The image encoder learns too, once the towers have learned on its features (Kumar et al., arXiv 2202.10054)."""

    epochs: int = Field(0, ge=0, description="after those of the rounds; 0: the encoder stays as it is")
    from_block: int = Field(6, ge=0, description="the first block of the image encoder that learns; 0: all of it")
    batch_size: int = Field(64, ge=1, description="samples a step, over all workers")
    checkpoint_activations: bool = Field(
        False, description="keep what enters each block of the image encoder only, and compute the rest again"
    )
    decoders: int = Field(
        0, ge=0, description="Ray Data actors for each worker, of a CPU of their own, that make its batches; 0: threads"
    )
    encoder_lr: float = Field(3e-4, gt=0)
    tower_lr: float = Field(3e-4, gt=0)
    classifier_lr: float = Field(3e-3, gt=0)


class TrainConfig(Section):
    samples: str = Field("latest", description="version of samples/ to learn from")
    start: str | None = Field(
        None, description="version of models/ to go on from; latest: of other samples, if any; null: an untrained model"
    )
    workers: int = Field(2, ge=1)
    least_workers: int | None = Field(
        None, ge=1, description="go on with so few while the cluster has no room for all workers; null: wait for all"
    )
    resize_s: float = Field(
        60, gt=0, description="with least_workers: seconds from look to look for more nodes, of which Ray hears in 20"
    )
    cpus_per_worker: float = Field(0.5, gt=0, description="leave whole CPUs to Ray Data, or feeding waits for ever")
    gpus_per_worker: float = Field(0, ge=0)
    epochs: int = Field(15, ge=1, description="of each round, over cached features of the frozen encoder")
    batch_size: int = Field(256, ge=1, description="samples a step, over all workers")
    micro_batch: int | None = Field(
        None, ge=1, description="samples of a worker whose activations are in memory at a time; null: all of its batch"
    )
    rounds: int = Field(
        1, ge=1, description="trainings from the start; each but the first learns from what the one before believes"
    )
    neighbours: int = Field(10, ge=0, description="visual neighbours whose evidence a photo shares; 0: none")
    candidates: int = Field(32, ge=1, description="classes that a round keeps for each photo, the likeliest first")
    least_belief: float = Field(-6.0, lt=0, description="ln of what a round believes of all unlikely classes together")
    views: int = Field(1, ge=1, description="cached augmented views of a picture")
    tower_lr: float = Field(1e-3, gt=0)
    classifier_lr: float = Field(1e-2, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of all steps over which learning rates rise")
    margin: float = Field(0.3, ge=0, lt=1, description="subtracted from the cosine of the right class")
    scale: float | None = Field(
        None,
        gt=0,
        le=MOST_SCALE,
        description="cosines are multiplied by it before the softmax; null: AdaCos' fixed scale, 10 at least",
    )
    class_rate: float = Field(
        1.0, gt=0, le=1, description="share of the classes that a step draws beside those that its samples name"
    )
    class_rate_unbiased: bool = Field(
        False, description="a class drawn stands for 1 / class_rate of them, so that evidence keeps its weight"
    )
    nearest_classes: int = Field(
        0, ge=0, description="with class_rate < 1: classes nearest to each sample that a step draws besides"
    )
    nearest_every: int = Field(500, ge=1, description="steps after which the index of the nearest classes is replaced")
    skew: float = Field(
        1.0, ge=0, le=1, description="a class of n samples is drawn with p ~ n^skew; 1: as logged, 0: all alike"
    )
    branch_weight: float = Field(
        0.1, ge=0, description="how much an item's picture alone, and its text alone, count beside both together"
    )
    interpolation: float = Field(
        0.8,
        gt=0,
        le=1,
        description="of the way from the transformations' initial weights to what they learned; after fine-tuning all",
    )
    text_dropout: float = Field(0.2, ge=0, lt=1, description="share of item samples trained without their text")
    image_dropout: float = Field(0.1, ge=0, lt=1, description="share of item samples trained without their picture")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="cut over the workers, of towers and encoder: moments (1), gradients too (2), parameters too (3)"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: towers and classifier multiply in it, as GPUs and few CPUs can; weights stay fp32"
    )
    clip_classes: bool = Field(
        False, description="the norm that is clipped at 1 is of towers and classes together, not of the towers alone"
    )
    holdout: float = Field(0.05, ge=0, lt=0.5, description="share of query samples kept out to follow recall")
    recall_every: int = Field(1, ge=1, description="epochs from one measurement of the held-out recall to the next")
    checkpoint_steps: int = Field(0, ge=0, description="steps from checkpoint to checkpoint within an epoch; 0: none")
    fine_tune: FineTuneConfig = FineTuneConfig()
    max_failures: int = Field(2, ge=0, description="how often Ray Train restarts the workers before it gives up")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _least_workers_are_fewer(self) -> TrainConfig:
        if self.least_workers and self.least_workers > self.workers:
            raise ValueError(f"least_workers {self.least_workers} is above workers {self.workers}; lower it")
        return self

    @model_validator(mode="after")
    def _workers_have_a_gpu_each(self) -> TrainConfig:
        if self.workers > 1 and self.gpus_per_worker not in (0, 1):
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g}: of several workers each takes one, or none (0)"
            )
        return self


class IndexConfig(Section):
    model: str = Field("latest", description="version of models/ to embed with")
    shards: int = Field(2, ge=1)
    recall_at_10: float = Field(
        0.95, gt=0, le=1, description="wished share of the 10 nearest items that a search finds; less is not published"
    )
    memory: Size | None = Field(None, description="what vectors of all shards may take together, such as 2G; null: any")
    latency_ms: float | None = Field(None, gt=0, description="what one query may take in a shard; null: any")
    factory: str = Field("auto", description="FAISS factory string; auto: what fulfils the wishes fastest")
    recall_queries: int = Field(200, ge=1, description="queries on which recall@10 is measured against exact search")
    embedders: int = Field(1, ge=1, description="actors that embed items")
    embedder_device: Literal["cpu", "cuda"] = Field("cpu", description="where items are embedded")
    embedder_gpus: float = Field(0, ge=0, le=1, description="share of a GPU that each embedder has to itself")
    builder_gpus: float = Field(
        0,
        ge=0,
        le=1,
        description="share of a GPU for each task that trains or builds a shard with lists",
    )
    batch_size: int = Field(32, ge=1)
    partition_items: int = Field(20_000, ge=1, description="items embedded and written together; a kill costs no more")
    changes: str | None = Field(None, description="update: folder with items, new or changed, and deleted (item_id)")
    compact_above: float = Field(0.2, gt=0, description="update: share of updates above which it compacts too")
    version: str = Field("current", description="publish, verify, describe, unusable: version of index/")
    keep: int = Field(3, ge=1, description="gc: versions served last that stay")
    grace_hours: float = Field(24, ge=0, description="gc: what is younger stays, for it may be in the making")

    @model_validator(mode="after")
    def _embedders_have_their_device(self) -> IndexConfig:
        _check_device("embedder", self.embedder_device, self.embedder_gpus)
        return self


class EvaluateConfig(Section):
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10), min_length=1)
    baseline: bool = Field(True, description="measure the untrained image encoder too")
    contact_sheet: int = Field(8, ge=0, description="queries on the contact sheet")
    concept_items: int = Field(4, ge=0, description="items on the picture of what concepts read and look at")
    against: str | None = Field(None, description="version of an earlier report to compare with")
    seed: int = Field(0, ge=0)


class ReplicasConfig(Section):
    """Autoscaling of one deployment."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1)
    target_ongoing_requests: float = Field(4, gt=0)
    cpus: float = Field(0.2, gt=0)
    upscale_delay_s: float = Field(10, ge=0, description="how long the load must be high before replicas are added")
    downscale_delay_s: float = Field(300, ge=0, description="how long it must be low before some are taken away")


class ServeConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    index: str = Field("current", description="version of index/ to serve; current: what index/CURRENT names")
    model: str = Field("index", description="version of models/ for queries; index: the one that built the index")
    ingress: ReplicasConfig = ReplicasConfig()
    encoder: ReplicasConfig = ReplicasConfig(target_ongoing_requests=1)  # batches, as for shards
    shard: ReplicasConfig = ReplicasConfig(target_ongoing_requests=1)
    layout: Literal["auto", "beside", "deployments"] = Field(
        "auto", description="shards beside the encoder in each replica, or as deployments of their own; auto: by size"
    )
    beside: Size = Field(2 * 10**9, description="auto: vectors up to this size are searched beside the encoder")
    encoder_threads: int = Field(2, ge=1, description="of one encoder; batches in work at a time share them")
    encoder_device: Device = Field("cpu", description="where photos are encoded, by onnxruntime")
    encoder_gpus: float = Field(0, ge=0, le=1, description="share of a GPU that each replica with an encoder has")
    concurrent_batches: int = Field(2, ge=1, description="batches that an encoder, or a replica, has in work at a time")
    max_batch: int = Field(4, ge=1, description="photos encoded together, of those that wait")
    max_queued: int = Field(12, ge=1, description="photos waiting in a replica before new ones get 503")
    timeout_ms: float = Field(5000, gt=0, description="what a request may take; a client may ask for less")
    follow_s: float = Field(2, ge=0, description="seconds from look to look at index/CURRENT; 0: never")
    retire_s: float = Field(
        30, ge=5, description="layout deployments: how long those of a version stay that is no longer asked"
    )
    lost_shard: Literal["degrade", "fail"] = Field(
        "degrade", description="where a shard does not answer: the items of the others, marked, or 503"
    )
    min_probability: float = Field(0, ge=0, le=1, description="items less likely the same product are not shown")
    max_k: int = Field(1000, ge=1)
    max_photos: int = Field(64, ge=1, description="photos in one batch request")
    max_body_mb: float = Field(10, gt=0)
    mapped: bool = Field(False, description="leave vectors on disk, mapped into memory as they are searched")
    keep_up: bool = Field(True, description="stay until interrupted, then stop serving; false: leave it to the cluster")
    same_look: float = Field(
        0.95, gt=0, le=1, description="cosine from which listings are near-identical, for group_by=look"
    )
    keys: bool = Field(True, description="requests need an API key; off: anybody may ask, on a loopback host only")
    keys_file: str | None = Field(None, description="YAML or JSON of API keys; null: MIXER_API_KEYS holds its text")
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/]+)$")], ...] = Field(
        (), description="origins, such as https://shop.example, whose pages may ask; *: any"
    )

    fetch_hosts: tuple[Annotated[str, Field(pattern=_HOST)], ...] = Field(
        (), description="hosts, or *.shop.example, whose photos a search may name by URL; none: photos are sent"
    )
    fetch_http: bool = Field(False, description="fetch over http:// too, where anybody on the way may change the photo")
    fetch_ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = (80, 443)
    fetch_timeout_s: float = Field(5, gt=0, description="from the first look-up to the last byte")
    canary_s: float = Field(60, ge=0, description="seconds from search to search for known photos; 0: never")
    canary_photos: int = Field(8, ge=0, description="photos that an evaluation found; 0: a new version need find none")
    traces: Annotated[str, Field(pattern=r"^https?://")] | None = Field(
        None, description="OTLP endpoint, such as http://collector:4318/v1/traces; null: no traces"
    )
    log_share: float = Field(
        1, ge=0, le=1, description="of answered requests that are written down; refused and failed ones always are"
    )
    trace_share: float = Field(0.01, ge=0, le=1, description="of requests; one whose caller records it is recorded too")

    @model_validator(mode="after")
    def _encoders_have_their_device(self) -> ServeConfig:
        _check_device("encoder", self.encoder_device, self.encoder_gpus)
        return self


class RunConfig(Section):
    """Everything a run needs: where the data and the workspace are, and a section a stage."""

    data: str = Field(description="folder or s3:// prefix with items, queries and logs")
    workspace: str = Field(description="folder or s3://bucket/prefix for everything derived")
    truth: str | None = Field(None, description="Parquet or JSONL with query_id, image, relevant_item_ids")
    prepare: PrepareConfig = PrepareConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()
    simulate: SimulateConfig = SimulateConfig()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML at `path`, apply `key=value` overrides (dotted keys, YAML values, texts as typed) and validate.

    Raises ConfigError.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a configuration with --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    tree = {key: value for key, value in tree.items() if value is not None}  # an empty section is its defaults
    overridden = {_override(tree, text) for text in overrides}
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(error, str(path), overridden)) from error


def _override(tree: dict[str, Any], text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"command line: {text!r} is not key=value, such as train.epochs=3")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"command line: {key}: {parent} is a value, not a section")
    wanted = _annotation(key.split("."))
    if wanted in _TEXT:  # a folder may be called 2024, or hold a #
        absent = not value or (value in _NULLS and wanted is not str)
        tree[leaf] = None if absent else value
        return key
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"command line: {key}: {value!r} is not a YAML value") from error
    return key


def _sentence(error: ValidationError, path: str, overridden: set[str]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    above = {f"{name}." for name in overridden}
    # What a section checks as a whole is the command line's if a part of it is.
    within = first["type"] == "value_error" and any(name.startswith(f"{key}.") for name in above)
    place = "command line" if within or f"{key}.".startswith(tuple(above)) else path
    if first["type"] == "extra_forbidden":
        known = sorted(_annotation(first["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{place}: {key}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{place}: {key}: missing; give it in the file or as {key}=VALUE"
    if first["type"] == "value_error":
        return f"{place}: {key}: {first['ctx']['error']}"
    expected = first["msg"].removeprefix("Input should be ")
    return f"{place}: {key}: expected {expected}, found {first['input']!r}"


def _annotation(key: Sequence[int | str]) -> Any:
    """Return the type of a section or a value, None if there is no such key."""
    found: Any = RunConfig
    for part in key:
        field = getattr(found, "model_fields", {}).get(part)
        found = field.annotation if field else None
    return found
