"""What Ray pickles of a build."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

import pytest
import ray
import ray.cloudpickle
from ray.remote_function import RemoteFunction

from mixer_platform.index import build, update

TASKS = [
    task._function for module in (build, update) for task in vars(module).values() if isinstance(task, RemoteFunction)
]
TASKS += [build._train, build._build_shard, build.require_gpu]  # these become tasks when their share of a GPU is known


def test_there_are_tasks() -> None:
    assert len(TASKS) >= 5


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_no_task_brings_faiss_with_the_kernels_that_it_takes_by_itself(task: Callable[..., Any]) -> None:
    pickled = ray.cloudpickle.dumps(task)
    names = {argument for _, argument, _ in pickletools.genops(pickled)}
    assert any(isinstance(name, str) and name.startswith("mixer") for name in names), "pickled with what it names"
    assert "faiss" not in names
