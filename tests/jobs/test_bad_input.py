"""Input that cannot be used, as its owner meets it: one clear sentence from the submitted job, which fails."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from mixer_platform.demo.cluster import LocalCluster
from mixer_platform.errors import MixerError
from mixer_platform.schema import LOGS

pytestmark = pytest.mark.slow
Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    patch = pytest.MonkeyPatch()
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with LocalCluster(tmp_path_factory.mktemp("logs")) as started:
        yield started
    server.stop()
    patch.undo()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A marketplace of two items, two photos and two clicks."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), "red").save(folder / f"{name}.png")
    pictures = ["a.png", "b.png"]
    pq.write_table(
        pa.table({"item_id": ["i", "j"], "title": ["one", "two"], "image": pictures}), folder / "items.parquet"
    )
    pq.write_table(pa.table({"query_id": ["p", "q"], "image": pictures}), folder / "queries.parquet")
    logs = {"event_id": ["1", "2"], "timestamp_ms": [1, 2], "session_id": ["s", "t"], "query_id": ["p", "q"]}
    logs |= {"item_id": ["i", "j"], "position": [0, 0], "event": ["click", "click"]}
    pq.write_table(pa.table(logs).cast(LOGS.required), folder / "logs.parquet")
    return folder


def fail(cluster: LocalCluster, job: str, *arguments: str) -> str:
    """Submit a job that fails, and return the one sentence that it says."""
    with pytest.raises(MixerError, match=rf"{job} failed"):
        cluster.submit(job, ["--config", "jobs/configs/local.yaml", *arguments])
    output = (cluster.logs / f"{job}.log").read_text()
    said = re.findall(r"^error: (.*)$", output, re.MULTILINE)
    assert len(said) == 1, output
    assert "mixer_platform/cli.py" not in output, "the job shows a trace of its own; Ray Data logs those of its tasks"
    return said[0]


def rewrite_logs(change: Callable[[pa.Table], pa.Table]) -> Spoil:
    return lambda data: pq.write_table(change(pq.read_table(data / "logs.parquet")), data / "logs.parquet")


def cut_off(data: Path) -> None:
    whole = (data / "logs.parquet").read_bytes()
    (data / "logs.parquet").write_bytes(whole[: len(whole) // 2])


def break_a_page(data: Path) -> None:
    rows = pq.read_table(data / "logs.parquet").to_pylist()
    rows = [row | {"event_id": str(n**9), "session_id": str(n)} for n in range(1000) for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, LOGS.required), data / "logs.parquet")
    whole = bytearray((data / "logs.parquet").read_bytes())
    whole[1000:2000] = b"\xff" * 1000
    (data / "logs.parquet").write_bytes(whole)


def cut_off_gzip(data: Path) -> None:
    (data / "logs.parquet").unlink()
    (data / "logs.jsonl.gz").write_bytes(bytes.fromhex("1f8b08000000000002ff"))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        pytest.param(shutil.rmtree, r"DATA: no such folder; data= names the folder that holds .*", id="no folder"),
        pytest.param(
            rewrite_logs(lambda logs: logs.drop_columns("position")),
            r"DATA/logs\.parquet: column position is missing; logs needs event_id \(string\), .*",
            id="missing column",
        ),
        pytest.param(
            rewrite_logs(lambda logs: logs.set_column(1, "timestamp_ms", pc.cast(logs["timestamp_ms"], pa.string()))),
            r"DATA/logs\.parquet: column timestamp_ms is string, expected int64; cast it and try again",
            id="mistyped column",
        ),
        pytest.param(
            cut_off, r"DATA/logs\.parquet: not a whole Parquet file \(.*\); write it again", id="half a Parquet"
        ),
        pytest.param(
            break_a_page, r"DATA/logs\.parquet: not a whole Parquet file \(.*\); write it again", id="broken page"
        ),
        pytest.param(cut_off_gzip, r"DATA/logs\.jsonl\.gz: not a whole file \(.*\); write it again", id="half a gzip"),
    ],
)
def test_prepare_names_what_is_wrong(
    cluster: LocalCluster, data: Path, tmp_path: Path, spoil: Spoil, sentence: str
) -> None:
    spoil(data)
    said = fail(cluster, "prepare", f"data={data}", f"workspace={tmp_path}/workspace")
    assert re.fullmatch(sentence, said.replace(str(data), "DATA")), said
    assert not list((tmp_path / "workspace").rglob("manifest.json")), "nothing may be published"


@pytest.mark.parametrize(
    ("job", "argument", "sentence"),
    [
        ("prepare", "train.epoch=3", r"command line: train\.epoch: unknown key; did you mean epochs\?"),
        ("train", "train.epochs=0", r"command line: train\.epochs: expected greater than or equal to 1, found 0"),
        ("prepare", "workspace=s3://no-such-bucket/x", r"s3://no-such-bucket: the bucket does not exist: create it"),
        ("train", "train.samples=v0", r".*/samples/v0: no such published version"),
        ("index", "index.shards=3", r".*/models: nothing is published here; run the job that writes models/ first"),
        ("serve", "serve.port=0", r".*/index/CURRENT: no index is published; run jobs/index\.py first"),
    ],
)
def test_settings_and_what_is_not_there(
    cluster: LocalCluster, data: Path, tmp_path: Path, job: str, argument: str, sentence: str
) -> None:
    said = fail(cluster, job, f"data={data}", f"workspace={tmp_path}/workspace", argument)
    assert re.fullmatch(sentence, said), said
