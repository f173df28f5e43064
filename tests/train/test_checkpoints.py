"""Checkpoints know class ranges, not ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixer.softmax import class_range
from mixer.targets import Targets
from mixer_platform.errors import MissingError, StorageError
from mixer_platform.storage import LocalStorage
from mixer_platform.train.checkpoints import Checkpoints, name_of

DIM = 3


def rows_of(classes: int, owned: range) -> dict[str, torch.Tensor]:
    whole = torch.arange(classes * DIM, dtype=torch.float32).view(classes, DIM)
    return {"weight": whole[owned.start : owned.stop], "exp_avg": -whole[owned.start : owned.stop]}


def read(checkpoints: Checkpoints, name: str, owned: range) -> dict[str, torch.Tensor]:
    found = {part: torch.full((len(owned), DIM), torch.nan) for part in ("weight", "exp_avg")}
    for place, rows in checkpoints.read_classes(name, owned):
        for part, values in rows.items():
            found[part][place] = values
    return found


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(LocalStorage(str(tmp_path)), "run")


@pytest.mark.parametrize("classes", [1, 2, 7, 12])
@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize("readers", [1, 2, 4, 5])
def test_written_by_n_read_by_m(checkpoints: Checkpoints, classes: int, writers: int, readers: int) -> None:
    for rank in range(writers):
        owned = class_range(classes, writers, rank)
        checkpoints.write_classes(name_of(3), owned, rows_of(classes, owned))
    for rank in range(readers):
        owned = class_range(classes, readers, rank)
        found = read(checkpoints, name_of(3), owned)
        for name, wanted in rows_of(classes, owned).items():
            assert torch.equal(found[name], wanted)


def test_ranges_of_any_size(checkpoints: Checkpoints) -> None:
    for start, stop in ((0, 1), (1, 9), (9, 10)):
        checkpoints.write_classes(name_of(0), range(start, stop), rows_of(10, range(start, stop)))
    for owned in (range(0, 10), range(0, 5), range(8, 10), range(3, 4), range(10, 10)):
        assert torch.equal(read(checkpoints, name_of(0), owned)["weight"], rows_of(10, owned)["weight"])


def test_rows_that_are_not_there_are_missed(checkpoints: Checkpoints) -> None:
    for start in (0, 4):
        checkpoints.write_classes(name_of(0), range(start, start + 2), rows_of(6, range(start, start + 2)))
    sentence = r"runs/run/epoch-00000: holds 3 of the classes 1 to 6; delete .*epoch-00000 and the run goes on from"
    with pytest.raises(StorageError, match=sentence):
        read(checkpoints, name_of(0), range(1, 6))


def test_many_classes_are_written_in_pieces(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixer_platform.train.checkpoints._FILE", 2 * 4 * DIM * 3)
    checkpoints.write_classes(name_of(0), range(10, 20), rows_of(10, range(10)))
    assert len(checkpoints.class_files(name_of(0))) == 4
    found = read(checkpoints, name_of(0), range(12, 17))
    assert torch.equal(found["weight"], rows_of(10, range(2, 7))["weight"])
    assert len(list(checkpoints.read_classes(name_of(0), range(12, 17)))) == 3, "a file at a time"


def test_what_never_became_visible_is_swept(checkpoints: Checkpoints) -> None:
    for name in (name_of(0), name_of(1, 20)):
        checkpoints.write_towers(name, {"a": torch.ones(1)})
    checkpoints.publish(name_of(0), {})
    checkpoints.write_targets(1, Targets.certain(torch.zeros(2, dtype=torch.int64)))
    checkpoints.sweep()
    left = {key.split("/")[2] for key in checkpoints.storage.list("runs")}
    assert left == {"epoch-00000", "targets-1.safetensors"}


def test_nothing_is_seen_before_it_is_published(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None
    checkpoints.write_classes(name_of(0), range(2), rows_of(2, range(2)))
    checkpoints.write_towers(name_of(0), {"a": torch.ones(2), "exp_avg:a": torch.zeros(2)})
    assert checkpoints.latest() is None
    checkpoints.publish(name_of(0), {"step": 4})
    assert checkpoints.latest() == {"name": "epoch-00000", "step": 4}
    checkpoints.write_towers(name_of(1), {"a": torch.ones(2)})
    assert checkpoints.latest() == {"name": "epoch-00000", "step": 4}
    assert checkpoints.read_towers(name_of(0)).keys() == {"a", "exp_avg:a"}


def test_the_last_two_are_kept(checkpoints: Checkpoints) -> None:
    for epoch in (8, 9, 10, 11):
        checkpoints.write_classes(name_of(epoch), range(2), rows_of(2, range(2)))
        checkpoints.write_towers(name_of(epoch), {"a": torch.full((1,), float(epoch))})
        checkpoints.publish(name_of(epoch), {"step": epoch})
    state = checkpoints.latest()
    assert state is not None
    assert state["name"] == "epoch-00011"
    assert {key.split("/")[2] for key in checkpoints.storage.list("runs")} == {"epoch-00010", "epoch-00011"}
    assert checkpoints.read_towers(name_of(10))["a"].item() == 10


def test_targets_of_a_round_come_back(checkpoints: Checkpoints) -> None:
    classes, evidence = torch.tensor([[1, -1], [0, 2]]), torch.tensor([[0.5, 0.0], [-1.0, 2.0]])
    targets = Targets(classes, evidence, torch.tensor([0.0, -6.0]), torch.ones(2))
    checkpoints.write_targets(1, targets)
    found = checkpoints.read_targets(1)
    assert torch.equal(found.over(range(3)), targets.over(range(3)))
    assert checkpoints.latest() is None, "what a round learns from is no checkpoint"


def test_runs_are_apart(checkpoints: Checkpoints) -> None:
    checkpoints.publish(name_of(0), {"step": 1})
    assert Checkpoints(checkpoints.storage, "run2").latest() is None


def test_what_an_interrupted_epoch_left_is_cleared(checkpoints: Checkpoints) -> None:
    for rank in range(2):
        owned = class_range(3, 2, rank)
        checkpoints.write_classes(name_of(1), owned, rows_of(3, owned))
    checkpoints.write_classes(name_of(0), range(3), rows_of(3, range(3)))
    checkpoints.clear(name_of(1))
    checkpoints.write_classes(name_of(1), range(3), rows_of(3, range(3)))
    assert torch.equal(read(checkpoints, name_of(1), range(3))["weight"], rows_of(3, range(3))["weight"])
    assert torch.equal(read(checkpoints, name_of(0), range(3))["weight"], rows_of(3, range(3))["weight"])


def test_names_sort_as_the_run_goes() -> None:
    run = [name_of(0, 5), name_of(0, 40), name_of(0), name_of(1, 999), name_of(1, 1000), name_of(1), name_of(12, 1)]
    assert sorted(f"{name}/state.json" for name in run) == [f"{name}/state.json" for name in run]


def test_a_checkpoint_within_an_epoch_gives_way_to_the_epoch(checkpoints: Checkpoints) -> None:
    for name in (name_of(2), name_of(3, 100), name_of(3)):
        checkpoints.write_towers(name, {"a": torch.ones(1)})
        checkpoints.publish(name, {})
        assert checkpoints.latest() == {"name": name}
    assert not checkpoints.storage.list("runs/run/epoch-00002")
    checkpoints.clear(name_of(3))
    assert checkpoints.latest() == {"name": name_of(3, 100)}


class Failing(LocalStorage):
    """Does not answer the first times it is asked."""

    failures = 0

    def write(self, key: str, data: bytes) -> None:
        if self.failures:
            self.failures -= 1
            raise StorageError(f"{key}: no answer")
        super().write(key, data)


def test_a_storage_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    storage = Failing(str(tmp_path))
    storage.failures = 2
    Checkpoints(storage, "run").publish(name_of(0), {})
    assert Checkpoints(storage, "run").latest() == {"name": name_of(0)}
    storage.failures = 1
    with pytest.raises(StorageError, match="no answer"):
        Checkpoints(storage, "run", patience_s=-1).publish(name_of(1), {})


def test_what_is_missing_is_not_waited_for(checkpoints: Checkpoints) -> None:
    with pytest.raises(MissingError):
        checkpoints.read_towers(name_of(7))
