"""What is read from disk or network is data: nothing that is read can run code here."""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

from mixer_platform.errors import InputError
from mixer_platform.inputs import find_input
from mixer_platform.schema import ITEMS, LOGS

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for folder in ("mixer", "platform", "jobs", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pickletools", "code"}
CALLS = {
    "eval", "exec", "__import__", "compile", "os.system", "os.popen", "read_pickle", "to_pickle", "load_pickle",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "torch.hub.load", "torch.package.PackageImporter", "torch.jit.load", "ray.data.read_numpy",
}  # fmt: skip
FLAGS = {"allow_pickle", "trust_remote_code", "shell", "allow_unpickle", "unsafe"}


def faults(source: str) -> Iterator[str]:
    """Name every way in which code of this source may unpickle, or run, what it reads."""
    tree = ast.parse(source)
    names = _real_names(tree)
    for node in ast.walk(tree):
        origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        imported = (
            [origin + alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        )
        for module in imported:
            if set(module.split(".")) & MODULES:
                yield f"line {node.lineno}: imports {module}"
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func, names)
        flags = {word.arg: getattr(word.value, "value", "?") for word in node.keywords}
        if called in CALLS or called.rpartition(".")[2] in CALLS & {"read_pickle", "to_pickle", "load_pickle"}:
            yield f"line {node.lineno}: calls {called}"
        if called in ("torch.load", "torch.serialization.load") and flags.get("weights_only") is not True:
            yield f"line {node.lineno}: torch.load without weights_only=True"
        for flag in FLAGS & set(flags):
            if flags[flag] is not False:
                yield f"line {node.lineno}: {called} with {flag}"


def _real_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for, `np` for numpy and `load` for torch.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_runs_what_it_reads(path: Path) -> None:
    assert list(faults(path.read_text())) == []


def test_all_sources_are_looked_at() -> None:
    assert len(SOURCES) > 80


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "import ray.cloudpickle", "from ray import data, cloudpickle as c",
     "import torch; torch.load(p)", "from torch import load; load(p)", "import torch as t; t.load(p, weights_only=no)",
     "import torch; torch.load(p, weights_only=False)", "import numpy as np; np.load(p, allow_pickle=True)",
     "import yaml; yaml.load(p, Loader=yaml.Loader)", "from yaml import unsafe_load; unsafe_load(p)", "eval(text)",
     "import pandas as pd; pd.read_pickle(p)", "AutoModel.from_pretrained(p, trust_remote_code=True)", "exec(text)",
     "import subprocess; subprocess.run(text, shell=True)", "import os; os.system(text)", "import joblib"],
)  # fmt: skip
def test_the_look_finds(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    ["import torch; torch.load(p, weights_only=True)", "import numpy as np; np.load(p)", "import json; json.load(p)",
     "import yaml; yaml.safe_load(p)", "from safetensors.torch import load; load(p)", "model.eval()",
     "import numpy as np; np.load(p, allow_pickle=False)"],
)  # fmt: skip
def test_the_look_passes(source: str) -> None:
    assert not list(faults(source))


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("table", [ITEMS, LOGS], ids=["items", "logs"])
@pytest.mark.parametrize("depth", ["plain", "list", "struct"])
def test_parquet_that_holds_pickled_objects_is_refused_unread(tmp_path: Path, table: Any, depth: str) -> None:
    """Ray registers a type of Arrow whose values are pickles: reading one runs it, whoever wrote the file."""
    pickled = pa.array([pickle.dumps(Trap(tmp_path / "sprung"))], pa.large_binary())
    column = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), pickled)
    if depth == "list":
        column = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), column)
    elif depth == "struct":
        column = pa.StructArray.from_arrays([column], names=["inner"])
    rows = {field.name: pa.array([None], field.type) for field in table.columns}
    pq.write_table(pa.table({**rows, "extra": column}), tmp_path / f"{table.name}.parquet")
    with pytest.raises(
        InputError, match=rf"{table.name}\.parquet: column extra is .*; write it as plain values"
    ) as said:
        find_input(str(tmp_path), table)
    assert "\n" not in str(said.value)
    assert not (tmp_path / "sprung").exists()
