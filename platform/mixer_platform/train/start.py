"""Where a run starts: from an untrained model, or from an earlier one whose classes have grown and shrunk since.

New items come every day, and every `prepare` numbers its classes anew. A class is known by its items: it goes on with
the row of the class that held them before, and a new one begins as the mean of its samples.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load
from torch import Tensor

from mixer.config import ModelConfig
from mixer.towers import CONFIG, WEIGHTS, MixerModel
from mixer_platform import versions
from mixer_platform.errors import ConfigError, MissingError, StorageError
from mixer_platform.storage import Storage

MODELS = "models"
NEW = -1


def start_of(storage: Storage, wanted: str | None, architecture: ModelConfig, samples: str) -> dict[str, Any] | None:
    """Return the manifest of the model that a run over a samples version starts from, None for an untrained one.

    "latest" is the newest that learned from other samples, if there is any: a run that is asked for again is the same,
    until another of those is published.
    Raises StorageError if there is no such version, ConfigError if it is of another architecture.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        named = (versions.manifest(storage, MODELS, version) for version in storage.folders(MODELS))
        others = [found for found in named if found and found["samples"] != samples]
        found = max(others, key=lambda each: each["created_ms"], default=None)
        if found is None:
            return None
    else:
        found = versions.require(storage, MODELS, wanted)
    config = ModelConfig.model_validate(versions.read_json(storage, f"{MODELS}/{found['version']}/{CONFIG}"))
    theirs, ours = config.model_dump(), architecture.model_dump()
    if other := min((name for name in ours if theirs[name] != ours[name]), default=None):
        raise ConfigError(
            f"train.start: model {found['version']} has another model.{other}: {theirs[other]!r}; "
            "set it so, or start from none"
        )
    return found


def starting_model(storage: Storage, start: str | None, architecture: ModelConfig) -> MixerModel:
    """Return the model that a run starts from, whole: all that `start` has learned, or an untrained one.

    Raises ConfigError if the weights of `start` do not fit.
    """
    if start is None:
        return MixerModel(architecture)
    with tempfile.TemporaryDirectory() as scratch:
        folder = versions.fetch(storage, f"{MODELS}/{start}", scratch, (CONFIG, WEIGHTS))
        try:
            model = MixerModel.from_pretrained(folder)
        except ValueError as error:
            reason = str(error).removeprefix(f"{folder}: ")
            raise ConfigError(f"train.start: model {start}: {reason}; start from none, or from another") from error
    model.towers.interpolate(1.0)  # its classes were learned with all of it
    return model


def classes_of(storage: Storage, samples: str) -> pa.Table:
    """Return class_id and item_ids of a samples version. Raises StorageError if it was deleted."""
    key = f"samples/{samples}/classes.parquet"
    try:
        content = storage.read(key)
    except MissingError as error:
        raise StorageError(
            f"{storage.uri}/{key}: missing; train.start tells classes by the items that a model learned from: keep its "
            "samples, or start from another model"
        ) from error
    return pq.read_table(pa.BufferReader(content), columns=["class_id", "item_ids"])


def kept_classes(before: pa.Table, now: pa.Table, count: int) -> np.ndarray:
    """Return which earlier class each of `count` classes goes on from, int64 [count], `NEW` for none.

    It is the one with which it shares most items, of those that no class has which shares more; of equal ones the
    first. Where an earlier class was split, the part with most of its items has it. Both tables have class_id and
    item_ids.
    """
    pairs = _members(before, "before").join(_members(now, "now"), "item_id", join_type="inner")
    shared = pairs.group_by(["before", "now"]).aggregate([([], "count_all")])
    shared = shared.sort_by([("count_all", "descending"), ("now", "ascending"), ("before", "ascending")])
    ours, theirs = shared["now"].to_numpy(), shared["before"].to_numpy()
    kept = np.full(count, NEW)
    while len(ours):
        best_of_ours, best_of_theirs = (np.unique(side, return_index=True)[1] for side in (ours, theirs))
        first = np.intersect1d(best_of_ours, best_of_theirs)
        kept[ours[first]] = theirs[first]
        left = ~np.isin(ours, ours[first]) & ~np.isin(theirs, theirs[first])
        ours, theirs = ours[left], theirs[left]
    return kept


def _members(classes: pa.Table, name: str) -> pa.Table:
    item_ids = classes["item_ids"].combine_chunks()
    owners = np.repeat(classes["class_id"].to_numpy(), item_ids.value_lengths().to_numpy(zero_copy_only=False))
    return pa.table({"item_id": item_ids.flatten().cast(pa.string()), name: owners})


def read_rows(storage: Storage, model: str, wanted: np.ndarray) -> Tensor:
    """Return the rows of a published model's classes, float32 [n, dim], 0 where `NEW` is wanted; file by file."""
    rows: Tensor | None = None
    for key in sorted(storage.list(f"{MODELS}/{model}/classifier")):
        first, end = (int(number) for number in key.rpartition("/")[2].removesuffix(".safetensors").split("-"))
        places = np.flatnonzero((wanted >= first) & (wanted < end))
        if rows is None or len(places):  # the first file also tells the shape
            held = load(storage.read(key))["weight"]
            rows = torch.zeros(len(wanted), held.shape[1]) if rows is None else rows
            rows[places] = held[wanted[places] - first].float()
    assert rows is not None, "a model is published with its classifier"
    return rows


def sums_by_class(embeddings: Tensor, labels: Tensor, wanted: np.ndarray) -> Tensor:
    """Return the sum of each wanted class's samples, [n, dim].

    Args:
        embeddings: [m, dim] of samples.
        labels: int64 [m], their classes.
        wanted: int64 [n], classes, ascending.
    """
    mine = torch.from_numpy(np.isin(labels.numpy(), wanted))
    places = torch.from_numpy(np.searchsorted(wanted, labels[mine].numpy()))
    return torch.zeros(len(wanted), embeddings.shape[1]).index_add_(0, places, embeddings[mine])
