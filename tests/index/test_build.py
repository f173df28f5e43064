"""What Ray pickles of a build."""

from __future__ import annotations

import pickletools

import pytest
import ray
import ray.cloudpickle
from ray.remote_function import RemoteFunction

from mixer_platform.index import build, update

TASKS = [task for module in (build, update) for task in vars(module).values() if isinstance(task, RemoteFunction)]


def test_there_are_tasks() -> None:
    assert len(TASKS) >= 5


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task._function_name)
def test_no_task_brings_faiss_with_the_kernels_that_it_takes_by_itself(task: RemoteFunction) -> None:
    pickled = ray.cloudpickle.dumps(task._function)
    names = {argument for _, argument, _ in pickletools.genops(pickled)}
    assert any(isinstance(name, str) and name.startswith("mixer") for name in names), "pickled with what it names"
    assert "faiss" not in names
