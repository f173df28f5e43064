"""From a drawing to pictures: the catalogue's picture of it, and what a person's photo of it might look like."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mixer_platform.errors import MixerError

DRAWING_SIZE = 128
DESCRIPTOR_GRID = 8
BILINEAR = Image.Resampling.BILINEAR


def read_drawing(data: bytes) -> Image.Image:
    """Decode PNG bytes, or draw SVG bytes, and cut the empty border off. Returns RGBA, 128 px on the long side."""
    png = _draw_svg(data.decode()) if data.lstrip()[:1] == b"<" else data
    drawing = Image.open(BytesIO(png)).convert("RGBA")
    drawing = drawing.crop(drawing.getchannel("A").getbbox())
    return _scaled(drawing, DRAWING_SIZE)


def descriptor(drawing: Image.Image) -> NDArray[np.float32]:
    """Coarse colour and shape of a drawing: a float32 vector of length 256 and norm 1, for the incumbent engine."""
    square = Image.new("RGBA", (DRAWING_SIZE, DRAWING_SIZE))
    square.paste(drawing, _centred(drawing, DRAWING_SIZE))
    cells = np.asarray(square.resize((DESCRIPTOR_GRID, DESCRIPTOR_GRID), Image.Resampling.BOX), np.float32) / 255
    alpha = cells[..., 3:]
    vector = np.concatenate([(cells[..., :3] - 0.5) * alpha, alpha - 0.5], axis=-1).ravel()
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def catalog_picture(drawing: Image.Image, size: int) -> Image.Image:
    """The drawing in the middle of a white square of `size` px. Returns RGB."""
    picture = Image.new("RGB", (size, size), "white")
    small = _scaled(drawing, round(0.8 * size))
    picture.paste(small, _centred(small, size), small)
    return picture


def photo(drawing: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A person's photo: the drawing turned, scaled and moved on a random background. Returns RGB, `size` px square."""
    scale = rng.uniform(0.5, 0.8) * size / max(drawing.size)
    turn = np.radians(rng.uniform(-25, 25))
    middle = size / 2 + rng.uniform(-0.12, 0.12, 2) * size
    # One affine map does all three. Pillow asks for the way back: from a pixel of the photo to one of the drawing.
    back = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) / scale
    offset = np.asarray(drawing.size) / 2 - back @ middle
    matrix = (*back[0], offset[0], *back[1], offset[1])
    placed = drawing.transform((size, size), Image.Transform.AFFINE, matrix, BILINEAR)
    picture = _background(size, rng)
    picture.paste(placed, (0, 0), placed)
    brightness = rng.uniform(0.75, 1.2)
    picture = picture.point([min(255, round(value * brightness)) for value in range(256)] * 3)
    return picture.filter(ImageFilter.BoxBlur(rng.uniform(0, 1)))


def _draw_svg(svg: str) -> bytes:
    try:
        import resvg_py  # of use to the demo alone
    except ImportError as error:
        raise MixerError("resvg-py, which draws the demo's SVG files, is missing: pip install resvg-py") from error
    # The drawings are all paths: looking for fonts would cost more than drawing.
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWING_SIZE, skip_system_fonts=True))


def _background(size: int, rng: np.random.Generator) -> Image.Image:
    """A few random cells enlarged: one cell is a plain colour, two by two a gradient, many a noise texture."""
    cells, spread = ((1, 0), (2, 45), (24, 25))[rng.integers(3)]
    colours = rng.uniform(30, 225, 3) + spread * rng.standard_normal((cells, cells, 3))
    grid = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
    return grid.resize((size, size), BILINEAR)


def _scaled(drawing: Image.Image, long_side: int) -> Image.Image:
    ratio = long_side / max(drawing.size)
    width, height = (max(1, round(side * ratio)) for side in drawing.size)
    return drawing.resize((width, height), Image.Resampling.BICUBIC)


def _centred(drawing: Image.Image, size: int) -> tuple[int, int]:
    return (size - drawing.width) // 2, (size - drawing.height) // 2
