"""Thumbnails of items' pictures: made from what a row names, or refused in one sentence."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from PIL import Image

from mixer_platform.serve.errors import ApiError
from mixer_platform.serve.pictures import thumbnail
from tests.flaky import Flaky

Photo = Callable[..., bytes]


def size_of(content: bytes) -> tuple[str | None, tuple[int, int]]:
    image = Image.open(io.BytesIO(content))
    return image.format, image.size


@pytest.mark.parametrize(
    ("size", "kind", "expected"),
    [
        ((1600, 1200), "JPEG", (320, 240)),
        ((300, 900), "PNG", (107, 320)),
        ((40, 30), "WEBP", (40, 30)),
        ((2, 2000), "PNG", (1, 320)),
    ],
)
def test_a_picture_is_a_small_jpeg(
    tmp_path: Path, photo: Photo, size: tuple[int, int], kind: str, expected: tuple[int, int]
):
    (tmp_path / "shoes").mkdir()
    (tmp_path / "shoes/1").write_bytes(photo(1, size=size, kind=kind))
    content = thumbnail("shoes/1", str(tmp_path))
    assert size_of(content) == ("JPEG", expected)
    assert len(content) < 20_000
    assert thumbnail(str(tmp_path / "shoes/1"), "/elsewhere") == content


def test_a_turned_picture_is_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (800, 400), "red").save(tmp_path / "1.jpg", exif=exif)
    assert size_of(thumbnail("1.jpg", str(tmp_path))) == ("JPEG", (160, 320))


def test_a_picture_in_a_bucket(s3: str, photo: Photo):
    boto3.client("s3").put_object(Bucket=s3, Key="shop/1.jpg", Body=photo(1))
    assert thumbnail("1.jpg", f"s3://{s3}/shop") == thumbnail(f"s3://{s3}/shop/1.jpg", "/elsewhere")


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        (None, "the item has no picture"),
        ("", "the item has no picture"),
        ("2.jpg", "the item's picture '2.jpg' is not there"),
        ("https://shop.example/1.jpg", "the item's picture 'https://shop.example/1.jpg' is not there"),
        ("notes.jpg", "the item's picture 'notes.jpg' cannot be used: not a JPEG, PNG or WebP picture"),
    ],
)
def test_no_picture_is_404(tmp_path: Path, uri: str | None, sentence: str):
    (tmp_path / "notes.jpg").write_text("not a picture")
    with pytest.raises(ApiError) as caught:
        thumbnail(uri, str(tmp_path))
    assert (caught.value.status, caught.value.code, caught.value.message) == (404, "no_picture", sentence)


def test_a_storage_that_does_not_answer_is_503(flaky: Flaky, s3: str):
    flaky.fail("unavailable", times=math.inf)
    with pytest.raises(ApiError) as caught:
        thumbnail("1.jpg", f"s3://{s3}/shop")
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})
    assert caught.value.message == "the item's picture '1.jpg' cannot be read just now; try again"
