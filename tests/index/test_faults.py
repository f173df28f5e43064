"""What is killed, cut off or too late leaves the served version whole, and the next run goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import ray

from mixer_platform.config import RunConfig
from mixer_platform.gallery import read_manifest
from mixer_platform.index.job import build, compact, update
from mixer_platform.index.lifecycle import publish, rollback, verify
from mixer_platform.storage import open_storage
from tests.flaky import Flaky
from tests.index.conftest import ITEMS, Shop  # type: ignore[import-not-found]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).parents[2]
COMMANDS = {"build": build, "update": update, "compact": compact, "publish": publish, "rollback": rollback}
# Dies where `call` of `module` is called for the n-th time; or waits there until `met` says that others have come too.
DRIVER = """
import importlib, json, os, signal, sys, time
from pathlib import Path
import ray
from mixer_platform.cli import connect, mixer_error_in
from mixer_platform.config import RunConfig
from mixer_platform.index.job import build, compact, update
from mixer_platform.index.lifecycle import publish, rollback

address, command, config, where, variables = sys.argv[1:]
place, count, met = json.loads(where)
module, _, name = place.rpartition(":")
module = importlib.import_module(f"mixer_platform.{module}")
original, calls = getattr(module, name), 0

def call(*arguments, **named):
    global calls
    calls += 1
    if calls == count and not met:
        os.kill(os.getpid(), signal.SIGKILL)
    if calls == count:
        (Path(met) / str(os.getpid())).touch()
        while len(list(Path(met).iterdir())) < 2:
            time.sleep(0.01)
    return original(*arguments, **named)

setattr(module, name, call)
ray.init(address, runtime_env={"env_vars": json.loads(variables)}, logging_level="ERROR", log_to_driver=False)
connect()
try:
    print(json.dumps(globals()[command](RunConfig.model_validate(json.loads(config)))))
except Exception as error:
    if (known := mixer_error_in(error)) is None:
        raise
    sys.exit(f"{type(known).__name__}: {known}")
"""

STEPS = {
    "build": [
        ("versions:publish", 1),  # all partitions are written, their manifest is not
        ("index.job:build_shards", 1),
        ("index.build:measure", 1),  # the shards are written
        ("versions:publish", 2),
        ("index.lifecycle:_serve", 1),
        ("index.lifecycle:publish_current", 1),
    ],
    "update": [
        ("versions:publish", 1),
        ("index.job:write_deltas", 1),
        ("versions:publish", 2),  # the segments are written
        ("index.lifecycle:publish_current", 1),
    ],
    "compact": [
        ("versions:publish", 1),
        ("index.job:build_shards", 1),
        ("versions:publish", 2),
        ("index.lifecycle:publish_current", 1),
    ],
    "publish": [("index.lifecycle:_serve", 1), ("index.lifecycle:publish_current", 1)],
    "rollback": [("index.lifecycle:_serve", 1), ("index.lifecycle:publish_current", 1)],
}
for place, _ in chain.from_iterable(STEPS.values()):
    resolve_name(f"mixer_platform.{place}")  # what was renamed fails here, where fast tests are collected too


def start(
    command: str, config: RunConfig, place: str, count: int, met: str = "", variables: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a driver of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    known = {"PYTHONPATH": paths, **(variables or {})}
    where = json.dumps([place, count, met])
    address = ray.get_runtime_context().gcs_address
    line = [sys.executable, "-c", DRIVER, address, command, config.model_dump_json(), where, json.dumps(known)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env={**os.environ, **known}, **piped)  # type: ignore[call-overload]


def report_in(output: str) -> dict[str, Any]:
    """Return the report among what a driver, and Ray, printed."""
    (line,) = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> tuple[Shop, RunConfig]:
    """A shop whose index was built and then updated, its catalogue as it is now, and further changes."""
    shop = Shop(tmp_path_factory.mktemp("shop"), model_folder, compact_above=1.0)
    build(shop.config)
    first = [shop.item(1, seed=501), shop.item(80)]
    update(shop.changes("first", first, ["i11"]))
    rows = {row["item_id"]: row for row in [*shop.rows, *first, shop.item(2, seed=502)]}
    del rows["i11"]
    shop.write_items(list(rows.values()))
    return shop, shop.changes("second", [shop.item(2, seed=502), shop.item(81)], ["i12"])


def in_copy(shop: Shop, config: RunConfig, folder: Path) -> tuple[Shop, RunConfig]:
    """Return the shop with a copy of its workspace that a test may break."""
    workspace = folder / "workspace"
    shutil.copytree(shop.workspace, workspace, symlinks=True)
    copy = object.__new__(Shop)
    copy.__dict__ |= shop.__dict__
    copy.workspace, copy.storage = workspace, open_storage(str(workspace))
    config = config.model_copy(update={"workspace": str(workspace)})
    copy.config = shop.config.model_copy(update={"workspace": str(workspace)})
    return copy, config


@pytest.mark.parametrize(("command", "place", "count"), [(c, *step) for c, steps in STEPS.items() for step in steps])
def test_a_kill_leaves_what_is_served_and_the_next_run_goes_on(
    changed: tuple[Shop, RunConfig], tmp_path: Path, command: str, place: str, count: int
) -> None:
    shop, config = in_copy(*changed, tmp_path)
    served = read_manifest(shop.storage).version
    if command == "publish":  # the version before
        (other,) = set(shop.storage.folders("index")) - {served}
        config = shop.with_index(version=other)
    queries = np.random.default_rng(3).standard_normal((10, 8)).astype(np.float32)
    before = shop.search(queries, 8)
    driver = start(command, config, place, count)
    _, said = driver.communicate(timeout=120)
    assert driver.returncode == -9, said
    assert read_manifest(shop.storage).version == served
    assert shop.search(queries, 8) == before
    assert verify(shop.config)["sound"]
    parts = {path: path.stat().st_mtime_ns for path in shop.workspace.glob("embeddings/*/part-*.parquet")}
    report = COMMANDS[command](config)
    assert read_manifest(shop.storage).version == report["version"] != served
    assert verify(shop.config)["sound"]
    assert {path: path.stat().st_mtime_ns for path in parts} == parts, "no partition was made twice"
    assert report["items"] == ITEMS - 1


def test_a_kill_while_items_are_embedded(changed: tuple[Shop, RunConfig], tmp_path: Path) -> None:
    shop, _ = in_copy(*changed, tmp_path)
    shutil.rmtree(shop.workspace / "embeddings")
    shutil.rmtree(shop.workspace / "index")
    driver = start("build", shop.config, "versions:publish", 99)
    while not list(shop.workspace.glob("embeddings/*/part-*.parquet")):
        assert driver.poll() is None
    driver.kill()
    driver.communicate()
    assert shop.storage.tag("index/CURRENT") is None
    assert build(shop.config)["items"] == ITEMS - 1
    assert verify(shop.config)["sound"]


def test_of_two_publishers_at_once_one_wins(changed: tuple[Shop, RunConfig], tmp_path: Path) -> None:
    shop, config = in_copy(*changed, tmp_path)
    (tmp_path / "met").mkdir()
    drivers = [
        start(command, config, "index.lifecycle:publish_current", 1, str(tmp_path / "met"))
        for command in ("update", "compact")
    ]
    outputs = [driver.communicate(timeout=180) for driver in drivers]
    codes = [driver.returncode for driver in drivers]
    assert sorted(codes) == [0, 1], outputs
    won, lost = outputs[codes.index(0)], outputs[codes.index(1)]
    assert read_manifest(shop.storage).version == report_in(won[0])["version"]
    assert re.search(r"ConflictError: .*CURRENT: somebody else published first; theirs stands, run again", lost[1])
    assert verify(shop.config)["sound"]


def test_storage_that_answers_503_and_cuts_transfers(
    changed: tuple[Shop, RunConfig], s3: str, flaky: Flaky, tmp_path: Path
) -> None:
    shop, _ = changed
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    config = shop.config.model_copy(update={"workspace": f"s3://{s3}/mixer"})
    storage = open_storage(config.workspace)
    for path in (shop.workspace / "models/model-a").rglob("*"):
        if path.is_file():
            storage.upload(f"models/model-a/{path.relative_to(shop.workspace / 'models/model-a')}", path)

    def run() -> dict[str, Any]:
        driver = start("build", config, "versions:publish", 99, variables=variables)
        out, said = driver.communicate(timeout=240)
        assert driver.returncode == 0, said
        return report_in(out)

    flaky.fail("unavailable", 6, r"PUT .*(part-|shard-|manifest)")
    built = run()
    assert flaky.failed == 6
    assert built["items"] == ITEMS - 1
    flaky.fail("cut", 3, r"GET .*(\.faiss|\.arrow|manifest)")
    assert verify(config)["sound"]
    assert flaky.failed == 3


SMALL_DISK = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=300k none "$0" && exec "$@"']


def test_a_full_disk_is_one_sentence_and_nothing_is_published(changed: tuple[Shop, RunConfig], tmp_path: Path) -> None:
    shop, _ = changed
    (tmp_path / "small").mkdir()
    if subprocess.run([*SMALL_DISK, str(tmp_path / "small"), "true"], capture_output=True).returncode:
        pytest.skip("no file system of its own can be mounted here")
    models = shop.workspace / "models"
    program = f"""
import os, sys
from pathlib import Path
from mixer_platform.cli import connect, mixer_error_in
import ray
from mixer_platform.config import RunConfig
from mixer_platform.index.job import build
small = Path(sys.argv[1])
(small / "models").symlink_to({str(models)!r})
config = RunConfig.model_validate_json({shop.config.model_dump_json()!r}).model_copy(update=dict(workspace=str(small)))
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
connect()
(small / "ballast").write_bytes(bytes(int(sys.argv[2])))
try:
    build(config)
except Exception as error:
    print(mixer_error_in(error))
print((small / "index/CURRENT").exists(), [str(path) for path in small.rglob("index/*/manifest.json")])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")])}
    environment.pop("RAY_ADDRESS", None)
    for ballast in (270_000, 252_000):  # embeddings do not fit; shards do not
        command = [
            *SMALL_DISK,
            str(tmp_path / "small"),
            sys.executable,
            "-c",
            program,
            str(tmp_path / "small"),
            str(ballast),
        ]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        said, *rest = run.stdout.splitlines()
        assert re.search(r"/small/(embeddings|index)/.*: No space left on device; free some and run again", said), (
            run.stderr
        )
        assert rest == ["False []"]
