"""Waiting for storage that does not answer for a while, where giving up would cost hours of training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from mixer_platform.errors import ConflictError, MissingError, StorageError

PATIENCE_S = 300.0
P = ParamSpec("P")
R = TypeVar("R")
_log = logging.getLogger(__name__)


def patiently(action: Callable[P, R], patience_s: float = PATIENCE_S) -> Callable[P, R]:
    """Return `action`, tried again for `patience_s` seconds while the storage fails; then its StorageError is raised,
    or the OSError that Arrow has for the same.

    What is missing, or was published by somebody else, is raised at once: no other try would change it.
    """

    def tried(*arguments: P.args, **named: P.kwargs) -> R:
        failing: float | None = None  # since when; the action itself may take long
        wait = 0.1
        while True:
            try:
                return action(*arguments, **named)
            except (MissingError, ConflictError, FileNotFoundError):
                raise
            except (StorageError, OSError) as error:
                failing = time.monotonic() if failing is None else failing
                if time.monotonic() - failing > patience_s:
                    raise
                _log.warning("%s; trying again in %.1f s", error, wait)
                time.sleep(wait)
                wait = min(2 * wait, 5.0)

    return tried
