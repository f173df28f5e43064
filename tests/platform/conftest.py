"""A workspace of each kind: a folder, and a bucket behind real HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixer_platform.storage import Storage, open_storage


@pytest.fixture(params=["folder", "s3", "whole bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "workspace"))
    bucket = request.getfixturevalue("s3")
    return open_storage(f"s3://{bucket}/a/workspace" if request.param == "s3" else f"s3://{bucket}")
