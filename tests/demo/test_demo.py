"""The demo's own parts: what it counts as its processes, and what it prints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray._private.runtime_env.packaging import _dir_travel

from mixer_platform.demo.cluster import MARK, ROOT, _past_proxies, processes, progress, telling
from mixer_platform.demo.job import main, read_questions, table
from mixer_platform.demo.memory import PeakMemory, proportional_kib


def test_processes_are_known_by_their_mark_and_their_memory_is_counted() -> None:
    code = "block = bytearray(64 * 2**20); print('ready', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {MARK: "test-mark"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert processes("test-mark") == [child.pid]
        assert proportional_kib(child.pid) > 64 * 1024
        with PeakMemory(lambda: processes("test-mark"), every_s=0.05) as memory:
            while memory.gib == 0:
                pass
        assert memory.gib > (64 * 1024 + proportional_kib(os.getpid()) / 2) / 2**20
    finally:
        child.communicate("\n")
    assert processes("test-mark") == []
    assert proportional_kib(child.pid) == 0


def test_what_repeats_is_told_once() -> None:
    first, second = (f"x Dataset d_0 execution finished in {n} seconds" for n in (1, 2))
    told = ["Ray Data: one pass done in 1.0 s", "Ray Data: one pass done in 2.0 s"]
    assert list(telling([first, "anything", first, second, first], "")) == [*told, told[0]]
    assert list(telling([first, second], told[0])) == told[1:]


def test_progress_tells_rows_epochs_and_errors() -> None:
    rows = "2026-11-24 03:32:44,915\tINFO logging_progress.py:231 -- MapBatches(FeatureWorker): 3264/4672"
    assert progress(rows) == "[####################..........] 3,264 of 4,672 rows through FeatureWorker"
    beyond = rows.replace("4672", "1")  # Ray Data's totals are guesses at first
    assert progress(beyond) == f"[{'#' * 30}] 3,264 of 3,264 rows through FeatureWorker"
    epoch = (
        "(RayTrainWorker pid=1) TrainingReport(checkpoint=None, metrics={'epoch': 4, 'loss': 4.0268, 'seconds': 4.3})"
    )
    assert progress(epoch) == "epoch 5, loss 4.027"
    assert progress("x Dataset d_0 execution finished in 3.28 seconds") == "Ray Data: one pass done in 3.3 s"
    assert progress("error: d/items: not found") == "error: d/items: not found"
    assert progress("03:24:50 index a is there already") == "03:24:50 index a is there already"
    assert progress('{"loss": 1}') is None
    assert progress("2026-11-24 03:32:44,915 INFO anything") is None


def test_questions_are_drawn_from_all_that_was_asked(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    pq.write_table(pa.table({"query_id": list(range(800))}), tmp_path / "reports/r.parquet")
    asked = [row["query_id"] for row in read_questions(tmp_path, "r", 100)]
    assert asked == sorted(set(asked)) == [row["query_id"] for row in read_questions(tmp_path, "r", 100)]
    assert len(asked) == 100
    assert 30 < sum(query % 2 for query in asked) < 70, "every second photo is of another team's drawing"
    assert min(asked) < 80 < 720 < max(asked)
    assert len(read_questions(tmp_path, "r", 9999)) == 800


def test_both_spellings_of_no_proxy_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", ".corp")
    monkeypatch.setenv("NO_PROXY", ".shop")
    assert _past_proxies() == "127.0.0.1,localhost,.corp,.shop"


def test_the_table_holds_quality_stages_and_latency() -> None:
    figures = {"r1": 0.5, "r5": 0.75, "r10": 0.875, "queries": 1234, "items": 99, "untrained": {}}
    figures["untrained"] = {"r1": 0.25, "r5": 0.3, "r10": 0.4}
    seconds, reports = {"prepare": 1.5, "train": 2.0}, {"prepare": {"reused": True}}
    text = table(figures, (1, 5, 10), seconds, reports, 12.34, 50)
    assert "R@1                            0.250       0.500" in text
    assert "1.5 s   (was there already)" in text
    assert "2.0 s" in text
    assert "12.3 ms" in text
    del figures["untrained"]
    assert "R@5                                -       0.750" in table(figures, (5,), seconds, reports, 12.34, 50)


def test_what_travels_with_a_job_is_the_code(tmp_path: Path) -> None:
    """By what Ray itself does with .rayignore: a shop's photos in this folder stay where they are."""
    for name in ("mixer/a.py", "platform/b.js", "jobs/configs/c.yaml", "own.yaml", "shop/logs.parquet", "x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / ".rayignore", tmp_path)
    sent: list[Path] = []
    _dir_travel(tmp_path, [], sent.append, include_gitignore=True)
    files = {str(path.relative_to(tmp_path)) for path in sent if path.is_file()}
    assert files == {"mixer/a.py", "platform/b.js", "jobs/configs/c.yaml", "own.yaml"}


def test_the_demo_names_its_own_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "train.epochs=1", "--queries", "5", "workspace=w"])
    with pytest.raises(SystemExit) as error:
        main(None)
    assert error.value.code == 2
    assert capsys.readouterr().err == "error: workspace=w: the demo takes a folder as --workspace w\n"
