"""Pictures in, square arrays of pixels out. Pillow only: no accelerator, no normalisation (the encoder's part)."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from mixer.containers import TooCostly, only_pixels

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 40_000_000
MAX_SIDE = 65_535  # as JPEG's; a picture one pixel wide takes many times the memory of its pixels
Image.MAX_IMAGE_PIXELS = None  # decode() checks against a lower limit and says so itself


class UnreadableImage(ValueError):
    """The bytes are no picture that can be used; the message is the reason, for a person."""


@dataclass(frozen=True)
class ImagePreprocess:
    """Resize the short side to `resize` pixels (bicubic) and crop the central `size` x `size`."""

    size: int
    resize: int

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return uint8 pixels, [size, size, 3]."""
        scale = self.resize / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        x, y = image.width / width, image.height / height
        # Only the crop is resized: the whole of a picture 1 pixel wide and 30,000 high would take gigabytes.
        box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box))


def decode(data: bytes, min_side: int = 1) -> Image.Image:
    """Decode JPEG, PNG or WebP, told by content, into RGB, upright as the camera's EXIF says, transparency on white.

    Of a picture that moves, the first frame. The size is checked before any pixel is decoded, and what else a file may
    make a decoder do is bounded (`mixer.containers`): the costliest that passes takes some seconds and half a gigabyte.
    Raises UnreadableImage.
    """
    try:
        pixels = only_pixels(data)
        for size in pixels.sizes:
            _check_size(*size)
        image: Image.Image = Image.open(io.BytesIO(pixels.data), formats=FORMATS)
        _check_size(*image.size, min_side)
        image.draft("RGB", (2 * 256, 2 * 256))  # JPEG: decode at a fraction of the size where that is enough
        if image.mode.startswith("I;16"):  # convert() would clip 16 bits to 8, not scale them
            image = image.point(lambda value: value / 257)
        image = image.convert("RGBA" if _has_alpha(image) else "RGB")
    except UnidentifiedImageError:
        raise UnreadableImage("not a JPEG, PNG or WebP picture") from None
    except TooCostly as error:
        raise UnreadableImage(str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, UnreadableImage):
            raise
        raise UnreadableImage(f"broken picture: {str(error) or type(error).__name__}") from None
    if image.mode == "RGBA":
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, mask=image)
        image = opaque
    return _upright(image, pixels.orientation)


def _check_size(width: int, height: int, min_side: int = 0) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"picture of {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million")
    if max(width, height) > MAX_SIDE:
        raise UnreadableImage(f"picture of {width} x {height} pixels; each side at most {MAX_SIDE:,}")
    if min(width, height) < min_side:
        raise UnreadableImage(f"picture of {width} x {height} pixels; each side needs {min_side}")


def augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a random view: crop of 40 to 100 % of the area, mirror, small turn, brightness, contrast and colour.

    Half of the views have something in front of them: a rectangle of any colour (Zhong et al., arXiv 1708.04896).
    """
    area = rng.uniform(0.4, 1.0)
    ratio = np.exp(rng.uniform(-0.25, 0.25))
    width, height = image.size
    crop_width = min(width, max(1, round(np.sqrt(width * height * area * ratio))))
    crop_height = min(height, max(1, round(np.sqrt(width * height * area / ratio))))
    left = int(rng.integers(width - crop_width + 1))
    top = int(rng.integers(height - crop_height + 1))
    view = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor=_corner(image))
    view = view.crop((left, top, left + crop_width, top + crop_height))
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(view, np.float32)
    gains = rng.uniform(0.7, 1.3) * rng.uniform(0.92, 1.08, 3)
    mean = pixels.mean()
    pixels = (pixels - mean) * rng.uniform(0.75, 1.25) + mean
    pixels = np.clip(pixels * gains, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        _erase(pixels, rng)
    return Image.fromarray(pixels)


def _erase(pixels: np.ndarray, rng: np.random.Generator) -> None:
    height, width = (max(1, round(side * rng.uniform(0.15, 0.5))) for side in pixels.shape[:2])
    top, left = rng.integers(pixels.shape[0] - height + 1), rng.integers(pixels.shape[1] - width + 1)
    pixels[top : top + height, left : left + width] = rng.integers(256, size=3)


def _corner(image: Image.Image) -> tuple[int, ...]:
    pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return tuple(int(value) for value in pixel)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
