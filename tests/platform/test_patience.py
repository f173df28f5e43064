"""What is tried again, what is not, and for how long."""

from __future__ import annotations

import pytest

from mixer_platform.errors import ConflictError, MissingError, StorageError
from mixer_platform.patience import patiently


@pytest.mark.parametrize("error", [StorageError("away"), OSError("AWS Error NETWORK_CONNECTION: away")])
def test_what_fails_for_a_while_is_tried_again(error: Exception) -> None:
    failures = [error, error]

    def action(value: int) -> int:
        if failures:
            raise failures.pop()
        return value

    assert patiently(action)(3) == 3
    assert failures == []


@pytest.mark.parametrize("error", [MissingError("gone"), ConflictError("taken"), FileNotFoundError("gone")])
def test_what_no_other_try_would_change_is_raised_at_once(error: Exception) -> None:
    tries = []

    def action() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        patiently(action)()
    assert len(tries) == 1


def test_patience_begins_with_the_first_failure_however_long_the_action_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, failures = [0.0], [StorageError("away"), StorageError("away")]
    monkeypatch.setattr("mixer_platform.patience.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("mixer_platform.patience.time.sleep", lambda seconds: None)

    def action() -> str:
        clock[0] += 100.0
        if failures:
            raise failures.pop()
        return "done"

    assert patiently(action, patience_s=150.0)() == "done"
    failures += [StorageError("away")] * 3
    with pytest.raises(StorageError, match="away"):
        patiently(action, patience_s=150.0)()


def test_in_the_end_the_error_is_raised() -> None:
    def action() -> None:
        raise StorageError("s3://shop: away")

    with pytest.raises(StorageError, match="s3://shop: away"):
        patiently(action, patience_s=0.05)()
