"""Arrows point one way: nothing in `mixer` knows of Ray or of the platform."""

from __future__ import annotations

import ast
from pathlib import Path

import mixer


def test_mixer_imports_neither_ray_nor_the_platform() -> None:
    files = sorted(Path(mixer.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"ray", "mixer_platform", "deepspeed"}, file.name
