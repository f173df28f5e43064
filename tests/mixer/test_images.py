"""Pictures as people send them: turned, transparent, huge, broken."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from mixer.images import ImagePreprocess, UnreadableImage, augment, decode

ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(width: int, height: int, data: bytes, bits: int = 1) -> bytes:
    """Write a greyscale PNG whatever Pillow thinks of its size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_pictures_are_told_by_content(kind: str) -> None:
    image = noise(30, 20)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    found = decode(encoded(image, kind, **options))
    assert (found.mode, found.size) == ("RGB", (30, 20))
    tolerance = 4 if kind == "JPEG" else 0
    assert abs(np.asarray(found, int) - np.asarray(image, int)).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    blocks = Image.new("RGB", (16, 16), (40, 160, 200))
    image = blocks.convert(mode)
    found = decode(encoded(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"))
    assert found.mode == "RGB"
    assert np.asarray(found, float) == pytest.approx(np.asarray(image.convert("RGB"), float), abs=3)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (4, 1))
    found = np.asarray(decode(encoded(Image.fromarray(ramp), "PNG")), int)
    assert abs(found - np.arange(256)[None, :, None]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_as_the_camera_says(kind: str, orientation: int) -> None:
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20] = (255, 0, 0)  # red top left, green top right, blue below
    upright[:12, 20:] = (0, 255, 0)
    upright[12:] = (0, 0, 255)
    # how a camera held in each of the eight ways stores it, by the EXIF standard
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    found = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))
    assert found.size == (40, 24)
    for x, y in ((5, 5), (35, 5), (20, 20)):
        assert np.array(found.getpixel((x, y))) == pytest.approx(upright[y, x].astype(float), abs=12)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_a_senseless_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert decode(encoded(noise(30, 20), "PNG", exif=exif)).size == (30, 20)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_put_on_white(kind: str) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :] = (200, 0, 0, 0)  # invisible red
    pixels[:, 4:, 3] = 255
    pixels[:, 2:4, 3] = 128
    found = np.asarray(decode(encoded(Image.fromarray(pixels), kind, lossless=True, exact=True)), int)
    assert (found[:, :2] == 255).all()
    assert (found[:, 4:] == (200, 0, 0)).all()
    assert abs(found[:, 2:4] - (227, 127, 127)).max() <= 2


def test_transparency_of_grey_and_of_palettes_is_put_on_white() -> None:
    grey = Image.fromarray(np.dstack([np.full((4, 4), 60, np.uint8), np.eye(4, dtype=np.uint8) * 255]), "LA")
    found = np.asarray(decode(encoded(grey, "PNG")))[:, :, 0]
    assert np.array_equal(found, np.where(np.eye(4), 60, 255))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    found = np.asarray(decode(encoded(palette, "PNG", transparency=0)))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[3, 3].tolist() == [10, 20, 30]


def test_large_jpegs_are_decoded_small_but_not_too_small() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = Image.linear_gradient("L").resize((2600, 1300)).convert("RGB")
    found = decode(encoded(image, "JPEG", exif=exif))
    assert found.width * 2 == found.height
    assert 512 <= found.width < 1300
    small = np.asarray(found.rotate(90, expand=True).resize((64, 32), Image.Resampling.BOX), int)
    assert abs(small - np.asarray(image.resize((64, 32), Image.Resampling.BOX), int)).max() <= 3


def test_a_truncated_jpeg_is_refused() -> None:
    whole = encoded(noise(200, 200), "JPEG")
    with pytest.raises(UnreadableImage, match=r"broken picture: .*truncated"):
        decode(whole[: len(whole) // 2])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_damage_ends_in_another_error(kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    whole = encoded(noise(20, 20), kind, exif=exif)
    rng = np.random.default_rng(0)
    reasons = []
    for round_ in range(300):
        data = bytearray(whole[: rng.integers(1, len(whole))] if round_ % 2 else whole)
        for place in rng.integers(0, min(len(data), 150), 3):
            data[place] = rng.integers(256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except UnreadableImage as error:
            reasons.append(str(error))
    assert len(reasons) > 100
    assert all(reasons)


@pytest.mark.parametrize("data", [b"", b"\x00", b"<html>404 not found</html>", b"\xff\xd8\xff\xe0 not really a jpeg"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableImage, match=r"not a JPEG, PNG or WebP picture|broken picture"):
        decode(data)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(UnreadableImage, match="not a JPEG, PNG or WebP picture"):
        decode(encoded(noise(8, 8), kind))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    row = b"\0" * (1 + 20_000 // 8)
    bomb = png(20_000, 20_000, zlib.compress(row * 20_000, 1))
    assert len(bomb) < 300_000  # small enough to be sent

    def never(self: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    with pytest.raises(UnreadableImage, match="picture of 20000 x 20000 pixels; at most 40 million"):
        decode(bomb)
    with pytest.raises(UnreadableImage, match="at most 40 million"):
        decode(png(40_000_001, 1, b""))


def test_the_largest_size_allowed_is_decoded() -> None:
    assert decode(png(40_000, 1_000, zlib.compress((b"\0" * 5_001) * 1_000, 1))).size == (40_000, 1_000)


def test_pictures_with_a_side_too_short_are_refused() -> None:
    assert decode(encoded(noise(30, 16), "PNG"), min_side=16).size == (30, 16)
    with pytest.raises(UnreadableImage, match="picture of 30 x 15 pixels; each side needs 16"):
        decode(encoded(noise(30, 15), "PNG"), min_side=16)


def resized_whole(image: Image.Image, size: int, resize: int) -> np.ndarray:
    """The plain way: resize the whole picture, then crop."""
    scale = resize / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((left, top, left + size, top + size)), int)


@pytest.mark.parametrize("shape", [(40, 30), (31, 77), (500, 300), (257, 999), (64, 64), (3, 100), (100, 3), (1, 1)])
@pytest.mark.parametrize(("size", "resize"), [(56, 64), (64, 64), (33, 47)])
def test_preprocess_equals_resize_then_crop(shape: tuple[int, int], size: int, resize: int) -> None:
    image = noise(*shape)
    found = ImagePreprocess(size, resize)(image)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    # not to the bit: here and there a filter reaches one pixel further
    assert abs(found - resized_whole(image, size, resize)).mean() < 0.5


def test_preprocess_keeps_the_middle() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    assert (ImagePreprocess(size=48, resize=64)(image) == (0, 0, 255)).all()


@pytest.mark.parametrize("shape", [(1, 3_000_000), (3_000_000, 1)])
def test_a_picture_one_pixel_wide_costs_no_more_than_its_crop(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = Image.Image.resize

    def resize(self: Image.Image, size: tuple[int, int], *rest: object, **options: object) -> Image.Image:
        asked.append(size[0] * size[1])
        assert asked[-1] < 10**6, "resized to gigabytes"
        return plain(self, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    image = Image.new("RGB", shape, (10, 20, 30))
    assert (ImagePreprocess(size=224, resize=256)(image) == (10, 20, 30)).all()
    assert asked == [224 * 224]


def test_views_are_told_by_the_generator_alone() -> None:
    image = noise(60, 40)
    views = [np.asarray(augment(image, np.random.default_rng(seed)).resize((32, 32))) for seed in (1, 1, 2)]
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])
    assert np.array_equal(np.asarray(image), np.asarray(noise(60, 40)))  # the picture itself is as it was


def test_views_are_crops_of_the_size_promised() -> None:
    image = noise(120, 80)
    shares = [np.prod(augment(image, np.random.default_rng(seed)).size) / (120 * 80) for seed in range(200)]
    assert min(shares) > 0.38  # bounded by the picture's sides, a crop may be smaller than asked
    assert max(shares) <= 1
    assert np.std(shares) > 0.1


def test_views_are_mirrored_half_the_time_and_vary_in_brightness() -> None:
    image = Image.new("RGB", (64, 64), (60, 60, 60))
    image.paste((200, 200, 200), (32, 0, 64, 64))
    views = [np.asarray(augment(image, np.random.default_rng(seed)).resize((8, 8)), float) for seed in range(200)]
    mirrored = np.mean([view[:, 0].mean() > view[:, -1].mean() for view in views])
    assert 0.4 < mirrored < 0.6
    brightness = np.array([view.mean() for view in views])
    assert 15 < brightness.std() < 60


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_views_of_tiny_pictures(shape: tuple[int, int]) -> None:
    for seed in range(20):
        view = augment(noise(*shape), np.random.default_rng(seed))
        assert view.mode == "RGB"
        assert ImagePreprocess(8, 8)(view).shape == (8, 8, 3)
