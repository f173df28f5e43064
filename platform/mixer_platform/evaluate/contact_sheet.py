"""A picture for people: query photos, what was found, and which of it is right."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mixer.images import UnreadableImage, decode
from mixer_platform.errors import StorageError
from mixer_platform.storage import read_uri

_TILE, _GAP, _CAPTION = 132, 12, 34
_RIGHT, _INK, _PAPER, _FAINT = "#17864a", "#1d1d1f", "#ffffff", "#d9d9de"


@dataclass(frozen=True)
class Found:
    """One result: its picture's URI (or none), title, score, and whether it is right."""

    image: str | None
    title: str
    score: float
    right: bool


def draw_sheet(rows: Sequence[tuple[str, Sequence[Found]]]) -> bytes:
    """Return a PNG with a row for each (query photo's URI, results): right results are framed."""
    columns = 1 + max((len(found) for _, found in rows), default=0)
    step, height = _TILE + _GAP, _TILE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * step + 2 * _GAP, len(rows) * height + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, (photo, found) in enumerate(rows):
        top = _GAP + line * height
        sheet.paste(_thumbnail(photo), (_GAP, top))
        draw.text((_GAP, top + _TILE + 3), "query", fill=_INK, font=ImageFont.load_default(12))
        for column, item in enumerate(found, start=1):
            left = 2 * _GAP + column * step
            sheet.paste(_thumbnail(item.image), (left, top))
            frame = (left - 3, top - 3, left + _TILE + 2, top + _TILE + 2)
            draw.rectangle(frame, outline=_RIGHT if item.right else _FAINT, width=4 if item.right else 1)
            draw.text((left, top + _TILE + 3), _shortened(item.title), fill=_INK, font=ImageFont.load_default(12))
            score = f"{item.score:.2f}" + ("  right" if item.right else "")
            ink = _RIGHT if item.right else "#6e6e73"
            draw.text((left, top + _TILE + 18), score, fill=ink, font=ImageFont.load_default(11))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _thumbnail(uri: str | None) -> Image.Image:
    try:
        picture = decode(read_uri(uri)) if uri else None
    except (StorageError, UnreadableImage):
        picture = None
    if picture is None:
        return Image.new("RGB", (_TILE, _TILE), _FAINT)
    return ImageOps.fit(picture, (_TILE, _TILE))


def _shortened(title: str, length: int = 21) -> str:
    return title if len(title) <= length else f"{title[: length - 1]}…"
