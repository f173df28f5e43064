"""The train job: cache features, run Ray Train, publish the model with its classifier, curves and towers as graphs."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import save
from torch.utils.tensorboard import SummaryWriter

from mixer.config import ModelConfig
from mixer.encoders import EncoderError
from mixer.export import export_model
from mixer.towers import MixerModel
from mixer_platform import versions
from mixer_platform.config import RunConfig, TrainConfig
from mixer_platform.errors import ConfigError, TrainingError
from mixer_platform.patience import patiently
from mixer_platform.storage import Storage, open_storage
from mixer_platform.train.checkpoints import Checkpoints, file_of
from mixer_platform.train.features import cache_features
from mixer_platform.train.loop import train_worker
from mixer_platform.train.stages import read_encoders
from mixer_platform.train.start import MODELS, NEW, classes_of, kept_classes, start_of, starting_model

matplotlib.use("Agg")
KIND = MODELS
_NOT_LEARNED_FROM: dict[str, Any] = {
    "samples": True,
    "workers": True,
    "least_workers": True,
    "resize_s": True,
    "cpus_per_worker": True,
    "gpus_per_worker": True,
    "micro_batch": True,
    "recall_every": True,
    "max_failures": True,
    "checkpoint_steps": True,
    "fine_tune": {"checkpoint_activations": True, "decoders": True},
}
# What large tensors give back stays with the worker, for the next ones. glibc returns it to Linux, and every step gets
# its activations anew, page by page, each filled with zeros first. One arena, for those of threads are small pieces.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
_CURVES = ("loss", "held_out_r1")
_log = logging.getLogger(__name__)


def train(config: RunConfig) -> dict[str, Any]:
    """Train on a samples version and publish `models/<version>/`; return its manifest. A model there is kept.

    An interrupted run goes on from its last checkpoint, also with another number of workers.
    Raises StorageError when there are no samples or no model to start from, ConfigError when an encoder cannot be had
    or the model to start from is of another architecture, TrainingError when a loss is no number.
    """
    started = time.monotonic()
    storage = open_storage(config.workspace)
    samples = versions.require(storage, "samples", config.train.samples)
    start = start_of(storage, config.train.start, config.model, samples["version"])
    learning = config.train.model_copy(update={"start": start["version"] if start else None})
    # What changes neither the samples nor the steps makes no new run.
    settings = learning.model_dump(exclude=_NOT_LEARNED_FROM if start else {**_NOT_LEARNED_FROM, "start": True})
    try:
        widths, encoders = read_encoders(config.model, config.train.fine_tune)
    except EncoderError as error:
        raise ConfigError(f"model: {error}") from error
    prepared = versions.fingerprint_of(samples["version"])
    run = versions.fingerprint(prepared, config.model.model_dump(), encoders, settings)
    if done := versions.find(storage, KIND, run):
        _log.info("model %s is there already", done["version"])
        return {**done, "reused": True}

    checkpoints = Checkpoints(storage, run)
    kept = 0
    if start:
        earlier, now = (classes_of(storage, version) for version in (start["samples"], samples["version"]))
        going_on = kept_classes(earlier, now, samples["classes"])
        checkpoints.write_kept(going_on)
        kept = int((going_on != NEW).sum())
        _log.info("%d of %d classes go on from model %s", kept, samples["classes"], start["version"])
    features = cache_features(storage, samples["version"], config.model, learning)
    job = {
        "workspace": storage.uri,
        "run": run,
        "samples": samples["version"],
        "features": features,
        "widths": widths,
        "classes": samples["classes"],
        "model": config.model.model_dump(),
        "train": learning.model_dump(),
    }
    cached = time.monotonic()
    _fit(job, config)
    checkpoints.sweep()
    state = checkpoints.latest()
    assert state is not None, "Ray Train returned without error, so the last epoch is written"
    report = {
        "samples": samples["version"],
        "classes": samples["classes"],
        "dim": config.model.dim,
        "start": learning.start,
        "kept_classes": kept,
        "interpolation": interpolation_of(config.train, start),
        "fine_tuned": was_fine_tuned(config.train, start),
        "history": state["history"],
        "seconds_features": round(cached - started, 2),
        "seconds": round(time.monotonic() - started, 2),
    }
    shares = {name[6:]: share for name, share in state["history"][-1].items() if name.startswith("share_")}
    _log.info("time of the last epoch's steps: %s", ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))
    version = versions.new_version(run)
    patiently(_publish)(storage, version, checkpoints, state["name"], config.model, report)
    return patiently(versions.publish)(storage, KIND, version, report)


def interpolation_of(config: TrainConfig, start: dict[str, Any] | None) -> float:
    """Return how much of what the transformations learned is published: all of it where the encoder was fine-tuned, now
    or before the model that the run starts from, for they were initialised by what the encoder saw untrained."""
    return 1.0 if was_fine_tuned(config, start) else config.interpolation


def was_fine_tuned(config: TrainConfig, start: dict[str, Any] | None) -> bool:
    """Return whether the encoder learned, in this run or before; older manifests say so by what was published."""
    before = start is not None and start.get("fine_tuned", start.get("interpolation", 1.0) == 1.0)
    return bool(config.fine_tune.epochs or before)


def _fit(job: dict[str, Any], config: RunConfig) -> None:
    workers, resources = config.train.workers, {"CPU": config.train.cpus_per_worker}
    # Workers that report wait until they are asked again; every two seconds, as it comes, is longer than a short epoch.
    # Many workers take a while to ask.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(min(2.0, max(0.1, workers / 100))))
    environment = dict(KEEP_FREED_MEMORY)
    if config.train.gpus_per_worker:
        resources["GPU"] = config.train.gpus_per_worker
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # of a node that has some: DeepSpeed would take the first
    with tempfile.TemporaryDirectory() as scratch:  # Ray Train wants one; checkpoints are in the workspace
        result = TorchTrainer(
            train_worker,
            train_loop_config=job,
            scaling_config=ScalingConfig(
                num_workers=(config.train.least_workers, workers) if config.train.least_workers else workers,
                elastic_resize_monitor_interval_s=config.train.resize_s,
                use_gpu=config.train.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            run_config=RayRunConfig(
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=config.train.max_failures),
                worker_runtime_env={"env_vars": environment},
            ),
        ).fit()
    if result.return_value:
        raise TrainingError(result.return_value)


def _publish(
    storage: Storage, version: str, checkpoints: Checkpoints, name: str, architecture: ModelConfig, report: dict
) -> None:
    """Write the model's files; the manifest, written after them, makes them visible."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = load_trained(checkpoints, name, starting_model(storage, report["start"], architecture))
        model.towers.interpolate(report["interpolation"])
        model.save_pretrained(folder)
        export_model(model, folder)
        write_curves(report["history"], folder)
        versions.upload(storage, folder, f"{KIND}/{version}")
    for owned, rows in checkpoints.read_classes(name, range(report["classes"])):
        key = f"{KIND}/{version}/classifier/{file_of(owned)}"
        storage.write(key, save({"weight": rows["weight"]}))  # without moments, which nobody reads
    storage.write(f"{KIND}/{version}/metrics.json", versions.to_json(report))


def load_trained(checkpoints: Checkpoints, name: str, model: MixerModel) -> MixerModel:
    """Return the model that a run started from with the trained parameters of a checkpoint."""
    state = checkpoints.read_towers(name)
    model.load_state_dict({name: value for name, value in state.items() if ":" not in name}, strict=False)
    return model.eval()


def write_curves(history: list[dict[str, float]], folder: Path) -> None:
    """Write loss, held-out recall and where time went an epoch, for TensorBoard; the first two as curves.png too."""
    import matplotlib.pyplot as plt

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for entry in history:
            for name in entry:
                if name in _CURVES or name.startswith("share_"):
                    writer.add_scalar(name, entry[name], entry["epoch"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, name in zip(axes, _CURVES, strict=True):
        measured = [entry for entry in history if name in entry]
        axis.plot([entry["epoch"] for entry in measured], [entry[name] for entry in measured], marker="o", markersize=3)
        axis.set(xlabel="epoch", title=name)
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
