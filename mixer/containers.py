"""What a picture's file holds besides pixels is cut away, and what pixels may cost is bounded, before any is decoded.

Profiles, thumbnails, comments and further frames are never used here, and each is a way to make a small file cost
minutes: a decoder parses and unpacks them all, as often as they are there. The one thing that is told by them, how the
camera was held, is read here.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

MOST_PARTS = 100_000  # segments of a JPEG, chunks of a PNG or WebP; cameras and editors write a few thousand at most
MOST_SCANS = 32  # of a JPEG, each a pass over all pixels; encoders write 10, for CMYK 18

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # no stuffed byte, filling or restart, as libjpeg goes on from scans
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([1-8])")
_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_WEBP_PIXELS = frozenset((b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"))
_WEBP_FRAMES = frozenset((b"VP8 ", b"VP8L", b"ANMF"))


class TooCostly(ValueError):
    """A file made so that it costs far more than its pixels do; the message is the reason."""


class Pixels(NamedTuple):
    """A file that holds only what makes pixels, how it is to be turned, and the sizes that it claims to have."""

    data: bytes
    orientation: int
    sizes: list[tuple[int, int]]


def only_pixels(data: bytes) -> Pixels:
    """Cut what is no pixel out of a JPEG, PNG or WebP; anything else comes back as it is. Raises TooCostly.

    Sizes are all that the file says of itself before decoding (a JPEG's frames, a WebP's canvas), [width, height]; a
    file that breaks off, or is broken, is left as it is from there on: its decoder will say so.
    """
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(_PNG):
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return Pixels(data, 1, [])


def _jpeg(data: bytes) -> Pixels:
    """Find segments as libjpeg does: it skips anything before a marker, and entropy-coded data end at one."""
    kept, sizes, scans, parts = [], [], 0, 0
    exif = xmp = b""
    begin, at = 0, 2
    while found := _MARKER.search(data, at):
        parts += 1
        _check_parts(parts)
        marker, at = data[found.end() - 1], found.end()
        if marker == 0xD9:
            data = data[:at]
            break
        if marker < 0xC0:  # of no length; libjpeg passes it over, or gives up
            continue
        (length,) = struct.unpack(">H", data[at : at + 2]) if at + 2 <= len(data) else (0,)
        if marker == 0xD8 or length < 2:  # libjpeg gives up
            break
        body, at = data[at + 2 : at + length], at + length
        if marker == 0xDA:
            scans += 1
            if scans > MOST_SCANS:
                raise TooCostly(f"JPEG of more than {MOST_SCANS} scans")
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 5:
            height, width = struct.unpack(">HH", body[1:5])
            sizes.append((width, height))
        elif (0xE1 <= marker <= 0xEF and marker != 0xEE) or marker == 0xFE:  # Adobe's 0xEE says which colours
            exif = exif or (body if body.startswith(b"Exif\0\0") else b"")
            xmp = xmp or (body if body.startswith(b"http://ns.adobe.com/xap/1.0/\0") else b"")
            kept.append(data[begin : found.start()])
            begin = at
    return Pixels(b"".join([*kept, data[begin:]]), _orientation(exif, xmp), sizes)


def _png(data: bytes) -> Pixels:
    kept, parts, at = [_PNG], 0, len(_PNG)
    exif = xmp = b""
    while at + 12 <= len(data):
        parts += 1
        _check_parts(parts)
        length, kind = struct.unpack(">L4s", data[at : at + 8])
        end = at + 12 + length
        if kind in _PNG_PIXELS:
            kept.append(data[at:end])
        elif kind == b"eXIf":
            exif = exif or data[at + 8 : end - 4]
        elif kind == b"iTXt":
            xmp = xmp or (data[at + 8 : end - 4] if data.startswith(b"XML:com.adobe.xmp\0\0", at + 8) else b"")
        at = end
        if kind == b"IEND":
            break
    return Pixels(b"".join(kept), _orientation(exif, xmp), [])


def _webp(data: bytes) -> Pixels:
    kept, sizes, parts, at = [], [], 0, 12
    exif = xmp = b""
    framed = False
    while at + 8 <= len(data):
        parts += 1
        _check_parts(parts)
        kind, length = struct.unpack("<4sL", data[at : at + 8])
        end = at + 8 + length + length % 2
        chunk = data[at:end]
        if kind == b"VP8X" and length >= 10:
            sizes.append((1 + int.from_bytes(chunk[12:15], "little"), 1 + int.from_bytes(chunk[15:18], "little")))
        if kind == b"EXIF":
            exif = exif or chunk[8:]
        elif kind == b"XMP ":
            xmp = xmp or chunk[8:]
        elif kind in _WEBP_PIXELS and not framed:  # a picture that moves is its first frame
            kept.append(chunk)
            framed = kind in _WEBP_FRAMES
        at = end
    body = b"WEBP" + b"".join(kept)
    return Pixels(b"RIFF" + struct.pack("<L", len(body)) + body, _orientation(exif, xmp), sizes)


def _check_parts(parts: int) -> None:
    if parts > MOST_PARTS:
        raise TooCostly(f"file of more than {MOST_PARTS:,} parts")


def _orientation(exif: bytes, xmp: bytes) -> int:
    """Return how EXIF's, or else XMP's, tag says that the picture is to be turned: 1 to 8, 1 if neither does."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    found: int | None = None
    try:
        if order:
            (start,) = struct.unpack_from(f"{order}L", tiff, 4)
            (count,) = struct.unpack_from(f"{order}H", tiff, start)
            for at in range(start + 2, start + 2 + 12 * count, 12):
                tag, kind = struct.unpack_from(f"{order}HH", tiff, at)
                if tag == _ORIENTATION:
                    (found,) = struct.unpack_from(order + {3: "H", 4: "L"}.get(kind, "B"), tiff, at + 8)
                    break
    except struct.error:  # cut off
        pass
    if found is None and (said := _XMP_ORIENTATION.search(xmp)):
        found = int(said[1])
    return found if found is not None and 1 <= found <= 8 else 1
