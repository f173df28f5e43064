"""A picture for people: the words that each concept of an item reads, and where in its photo it then looks."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from mixer.towers import MixerModel

_TILE, _GAP, _CAPTION = 132, 10, 34
_INK, _PAPER, _HEAT = "#1d1d1f", "#ffffff", (226, 54, 34)


@dataclass(frozen=True)
class Fired:
    """What the concepts of one item do.

    pixels: uint8 [size, size, 3], as the encoder sees it. looks: [concepts, side, side], sum 1 each. words: what each
    concept reads most.
    """

    pixels: np.ndarray
    title: str
    looks: np.ndarray
    words: list[str]


def concepts_of(model: MixerModel, picture: Image.Image, text: str) -> Fired:
    """Return what the concepts of an item with a picture and a text do."""
    pixels = model.image_encoder.preprocess(picture)
    tokenizer = model.text_encoder.tokenizer
    looks, reads = (shares[0] for shares in model.attention(pixels[None], *tokenizer([text])))
    side = math.isqrt(looks.shape[1])
    grid = looks[:, looks.shape[1] - side**2 :]  # without what stands before the patches, such as a CLS token
    tokens = tokenizer.words(text)
    words = sorted({token for token in tokens if any(letter.isalnum() for letter in token)}) or [""]
    told = np.stack([reads[:, [token == word for token in tokens]].sum(axis=1) for word in words], axis=1)
    return Fired(pixels, text, grid.reshape(-1, side, side), [words[place] for place in told.argmax(axis=1)])


def draw_concepts(items: Sequence[Fired]) -> bytes:
    """Return a PNG with a row an item: its picture, then each concept's word over what it looks at, in red."""
    step, height = _TILE + _GAP, _TILE + _CAPTION + _GAP
    columns = 1 + max((len(item.words) for item in items), default=0)
    sheet = Image.new("RGB", (columns * step + _GAP, len(items) * height + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for line, item in enumerate(items):
        top = _GAP + line * height
        picture = Image.fromarray(item.pixels).resize((_TILE, _TILE))
        sheet.paste(picture, (_GAP, top))
        draw.text((_GAP, top + _TILE + 3), item.title[:60], fill=_INK, font=font)
        for column, (look, word) in enumerate(zip(item.looks, item.words, strict=True), start=1):
            heat = Image.fromarray(np.uint8(200 * look / look.max())).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
            left = _GAP + column * step
            sheet.paste(Image.composite(Image.new("RGB", picture.size, _HEAT), picture, heat), (left, top))
            draw.text((left, top + _TILE + 17), word, fill=_INK, font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()
