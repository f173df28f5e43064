"""What docs/index.md says of searching without this project holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixer_platform.index.job import build
from tests.index.conftest import Shop  # type: ignore[import-not-found]

DOCS = Path(__file__).parents[2] / "docs/index.md"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("factory", ["Flat", "IVF1,SQ8,Refine(SQ8)", "HNSW8"])
def test_the_documented_script_searches_the_shards_without_the_project(
    shop: Shop, tmp_path: Path, factory: str
) -> None:
    # One list: where those that are probed hold fewer items than are asked for, the project looks further.
    report = build(shop.with_index(factory=factory, recall_at_10=0.8))
    (script,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert "mixer" not in script
    queries = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    np.save(tmp_path / "queries.npy", queries)
    command = [
        sys.executable,
        "-I",
        "-c",
        script,
        shop.workspace / f"index/{report['version']}",
        tmp_path / "queries.npy",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[list[tuple[str, float]]] = [[], [], []]
    for number, line in enumerate(run.stdout.splitlines()):
        found[number % 3] += ast.literal_eval(line.split(" ", 1)[1])
    for by_script, expected in zip(found, shop.search(queries, 10), strict=True):
        best = sorted(by_script, key=lambda each: -each[1])[:10]
        assert [item for item, _ in best] == [item for item, _ in expected]
