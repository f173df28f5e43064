"""Only pixels are left of a file, and how the camera was held; what would cost too much is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mixer.containers import MOST_PARTS, MOST_SCANS, TooCostly, only_pixels
from mixer.images import UnreadableImage, decode
from tests.hostile import (
    HTML,
    SIGNATURE,
    canvas,
    chunk,
    encoded,
    exif,
    in_jpeg,
    in_png,
    in_webp,
    liars,
    many_scans,
    png,
    polyglots,
    riff,
    seeds,
    segment,
    zeros,
)

XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
SECRET = b"SECRET" * 10
EXTRAS = {
    "jpeg": in_jpeg(
        b"".join(segment(marker, SECRET) for marker in (*range(0xE1, 0xEE), 0xEF, 0xFE))
        + segment(0xE2, b"MPF\0" + SECRET)
    ),
    "png": in_png(
        before=b"".join(
            chunk(kind, SECRET) for kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"acTL", b"eXIf", b"pHYs")
        ),
        after=chunk(b"fdAT", SECRET) + chunk(b"tEXt", SECRET),
    ),
    "webp": in_webp(*(riff(kind, SECRET) for kind in (b"ICCP", b"EXIF", b"XMP ", b"ABCD")), flags=0x2C),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_what_makes_no_pixels_is_cut_away_and_pixels_stay(name: str) -> None:
    whole = EXTRAS[name]
    cut = only_pixels(whole).data
    assert SECRET in whole
    assert SECRET not in cut
    plain = {"jpeg": in_jpeg(b""), "png": in_png(), "webp": in_webp()}[name]
    assert np.array_equal(np.asarray(decode(whole)), np.asarray(decode(plain)))


@pytest.mark.parametrize("name", seeds())
def test_every_kind_of_picture_decodes_as_it_would_whole(name: str) -> None:
    whole = seeds()[name]
    with Image.open(io.BytesIO(whole)) as image:
        expected = image.convert("RGBA" if "alpha" in name or "lossless" in name or "palette" in name else "RGB")
    found = decode(only_pixels(whole).data)
    if expected.mode == "RGBA":
        expected = Image.alpha_composite(Image.new("RGBA", expected.size, "white"), expected).convert("RGB")
    if name == "png 16 bit":
        assert found.getextrema()[0] == (0, 233)
        return
    assert abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1


def test_what_stands_behind_the_end_is_cut_away() -> None:
    for name, whole in polyglots().items():
        if " then " in name and not name.startswith(("html", "gif")):
            assert HTML not in only_pixels(whole).data
            assert decode(whole).size == (40, 30)
    assert SECRET not in only_pixels(in_png() + chunk(b"IDAT", SECRET)).data


def test_other_files_are_left_as_they_are() -> None:
    for data in (b"", b"\xff", HTML, b"GIF89a" + bytes(50), b"RIFF\0\0\0\0WAVE"):
        assert only_pixels(data) == (data, 1, [])


# --- orientation


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_read_wherever_a_format_keeps_exif(orientation: int, order: str, kind: int) -> None:
    tag = exif(orientation, order, kind)
    for whole in (
        in_jpeg(segment(0xE1, b"Exif\0\0" + tag)),
        in_png(before=chunk(b"eXIf", tag)),
        in_png(after=chunk(b"eXIf", tag)),
        in_webp(riff(b"EXIF", tag), flags=8),
        in_webp(riff(b"EXIF", b"Exif\0\0" + tag), flags=8),
    ):
        assert only_pixels(whole).orientation == orientation


def test_orientation_is_read_from_xmp_where_there_is_no_exif() -> None:
    name = b"http://ns.adobe.com/xap/1.0/\0"
    for whole in (
        in_jpeg(segment(0xE1, name + XMP)),
        in_png(before=chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        in_webp(riff(b"XMP ", XMP), flags=4),
    ):
        assert only_pixels(whole).orientation == 6
    assert only_pixels(in_jpeg(segment(0xE1, name + XMP) + segment(0xE1, b"Exif\0\0" + exif(3)))).orientation == 3


@pytest.mark.parametrize(
    "tag", [b"", b"II", b"XX*\0" + bytes(20), exif(6)[:12], exif(9), exif(0), exif(6)[:9] + b"\xff" * 2]
)
def test_senseless_exif_turns_nothing(tag: bytes) -> None:
    assert only_pixels(in_jpeg(segment(0xE1, b"Exif\0\0" + tag))).orientation == 1


# --- bounds


@pytest.mark.parametrize(
    "whole",
    [
        in_jpeg(segment(0xFE) * MOST_PARTS),
        in_jpeg(segment(0xDB) * MOST_PARTS),
        in_png(before=chunk(b"aaAa") * MOST_PARTS),
        in_png(before=chunk(b"IDAT") * MOST_PARTS),
        in_webp(riff(b"ABCD") * MOST_PARTS),
    ],
    ids=["comments", "tables", "chunks", "pixels", "webp"],
)
def test_files_of_too_many_parts_are_refused(whole: bytes) -> None:
    with pytest.raises(TooCostly, match="file of more than 100,000 parts"):
        only_pixels(whole)
    with pytest.raises(UnreadableImage, match=r"^file of more than 100,000 parts$"):
        decode(whole)


def test_a_jpeg_has_no_more_scans_than_an_encoder_writes() -> None:
    assert decode(many_scans(64, 64, MOST_SCANS)).size == (64, 64)
    with pytest.raises(UnreadableImage, match=r"^JPEG of more than 32 scans$"):
        decode(many_scans(64, 64, MOST_SCANS + 1))


def test_scans_cannot_be_hidden() -> None:
    """Behind what libjpeg passes over: filling, stray bytes, restarts, markers that mean nothing."""
    whole = many_scans(64, 64, MOST_SCANS + 1)
    first = whole.index(b"\xff\xda")
    for hiding in (
        b"\xff" * 9,
        b"stray",
        b"\xff\x00\xff\x00",
        b"\xff\xd3",
        b"\xff\x01\xff\x02",
        segment(0xFE, b"\xff\xd9"),
    ):
        hidden = whole[:first] + whole[first:].replace(b"\xff\xda", hiding + b"\xff\xda")
        with pytest.raises(UnreadableImage, match=r"^JPEG of more than 32 scans$"):
            decode(hidden)
    # and what only looks like one is not counted
    assert decode(in_jpeg(segment(0xE5, b"\xff\xda" * 1000))).size == (64, 64)


def test_every_size_that_a_file_claims_is_checked() -> None:
    assert only_pixels(liars()["jpeg of two sizes"]).sizes == [(65535, 65535), (40, 30)]
    assert only_pixels(in_webp()).sizes == [(64, 64)]
    for name in ("jpeg of two sizes", "webp of a huge canvas"):
        with pytest.raises(UnreadableImage, match=r"at most 40 million$"):
            decode(liars()[name])


def test_a_canvas_is_refused_before_its_decoder_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(Image, "open", never)
    for whole in (liars()["webp of a huge canvas"], liars()["jpeg of two sizes"]):
        with pytest.raises(UnreadableImage, match=r"at most 40 million$"):
            decode(whole)


@pytest.mark.parametrize(("width", "height"), [(1, 65_536), (65_536, 1), (1, 40_000_000), (40_000_000, 1)])
def test_pictures_of_one_endless_side_are_refused(width: int, height: int) -> None:
    with pytest.raises(UnreadableImage, match=f"picture of {width} x {height} pixels; each side at most 65,535"):
        decode(png(width, height, zeros((width + 1) * height)))


def test_the_first_frame_is_the_picture() -> None:
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    for kind in ("PNG", "WEBP"):
        whole = encoded(red, kind, save_all=True, append_images=[blue, red], lossless=True)
        assert decode(whole).getpixel((8, 8)) == (255, 0, 0)
        assert len(only_pixels(whole).data) < len(whole)


def test_broken_files_are_left_for_their_decoder_to_refuse() -> None:
    for whole in (
        b"\xff\xd8\xff\xe1\xff", b"\xff\xd8\xff\xe1\x00\x01" + bytes(9), SIGNATURE, SIGNATURE + b"\x80\0\0\0IHDR",
        b"RIFF\0\0\0\0WEBP", b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff", canvas(9, 9)[:12],
    ):  # fmt: skip
        only_pixels(whole)
        with pytest.raises(UnreadableImage):
            decode(whole)
