"""Arrows point one way: nothing in `mixer` knows of Ray or of the platform."""

from __future__ import annotations

import ast
from pathlib import Path

import mixer
import mixer_platform


def test_mixer_imports_neither_ray_nor_the_platform() -> None:
    files = sorted(Path(mixer.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"ray", "mixer_platform", "deepspeed"}, file.name


def test_faiss_is_imported_with_the_kernels_of_the_cpu_only() -> None:
    root = Path(mixer.__file__).parents[1]
    folders = (Path(mixer.__file__).parent, Path(mixer_platform.__file__).parent, root / "jobs", root / "benchmarks")
    plain = {
        file.name
        for folder in folders
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import) and "faiss" in [alias.name for alias in node.names]
    }
    assert plain == {"fast_faiss.py"}
