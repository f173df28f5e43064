"""Fixtures that several stages share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported; a token left in ~/.ray does no harm

import ray

ROOT = Path(__file__).parents[1]
# Ray Data runs each kind of shuffle task in workers of its own, and starting one takes seconds: keep them.
KEEP_WORKERS = {"num_workers_soft_limit": 16, "idle_worker_killing_time_threshold_ms": 60_000}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A small Ray cluster on this machine, with the checkout importable in its workers."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")])}
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": environment},
        _system_config=KEEP_WORKERS,
    )
    yield
    ray.shutdown()
