"""Pictures that nobody's camera makes: bombs, liars, two formats in one file, and mutations of good ones."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HTML = b"<html><script>alert(1)</script></html>"


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0, channels: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8))


# --- parts of files


def segment(marker: int, body: bytes = b"") -> bytes:
    """A segment of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))


def riff(kind: bytes, body: bytes = b"") -> bytes:
    """A chunk of a WebP."""
    return kind + struct.pack("<L", len(body)) + body + b"\0" * (len(body) % 2)


def webp(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<L", len(body)) + body


def canvas(width: int, height: int, flags: int = 0) -> bytes:
    """WebP's VP8X."""
    sides = ((side - 1).to_bytes(3, "little") for side in (width, height))
    return riff(b"VP8X", bytes((flags, 0, 0, 0)) + b"".join(sides))


def png(
    width: int, height: int, data: bytes, *, bits: int = 8, colours: int = 0, before: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG whatever Pillow thinks of its size; `data` is compressed already."""
    header = struct.pack(">LLBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = (chunk(b"IHDR", header), before, chunk(b"IDAT", data), after, chunk(b"IEND"))
    return SIGNATURE + b"".join(parts)


def zeros(count: int) -> bytes:
    """`count` zero bytes, compressed: one piece over and over, so that even a gigabyte takes no time to make."""
    packer = zlib.compressobj(9, wbits=-15)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, wbits=-15)
    end = rest.compress(bytes(count % (1 << 20))) + rest.flush()
    checksum = struct.pack(">HH", count % 65521, 1)
    return b"\x78\xda" + piece * (count >> 20) + end + checksum


def in_jpeg(segments: bytes, image: Image.Image | None = None) -> bytes:
    """A JPEG of 64 x 64 with more segments in it."""
    whole = encoded(image or noise(64, 64), "JPEG")
    return whole[:2] + segments + whole[2:]


def in_png(before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of 64 x 64 with more chunks in it."""
    return png(64, 64, zeros(64 * 65), before=before, after=after)


def in_webp(*chunks: bytes, flags: int = 0) -> bytes:
    """A WebP of 64 x 64 with more chunks in it."""
    return webp(canvas(64, 64, flags), encoded(noise(64, 64), "WEBP")[12:], *chunks)


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """The least EXIF that says how the camera was held."""
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HL", 42, 8)
    value = struct.pack(order + {3: "H", 4: "L"}[kind], orientation).ljust(4, b"\0")
    return start + struct.pack(f"{order}HHHL", 1, 0x0112, kind, 1) + value + bytes(4)


def overlapping_exif(size: int, entries: int) -> bytes:
    """EXIF whose every entry is all of its bytes: a reader that keeps them all needs `size` x `entries`."""
    head = b"II" + struct.pack("<HLH", 42, 8, entries)
    body = b"".join(struct.pack("<HHLL", 0x1000 + n, 1, size - 16, 8) for n in range(entries))
    return (head + body).ljust(size, b"\0")


def many_scans(width: int, height: int, scans: int) -> bytes:
    """A grey progressive JPEG of one colour: one scan says so, all others refine nothing, in some bytes each."""
    sizes = struct.pack(">BHHB", 8, height, width, 1)
    table = bytes([1] + [0] * 15)
    blocks = -(-width // 8) * -(-height // 8)
    runs = "0" + "1" * 14  # a code, and a run of 32,767 empty blocks
    bits = runs * -(-blocks // 32767)
    bits += "1" * (-len(bits) % 8)
    empty = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    parts = [
        b"\xff\xd8",
        segment(0xDB, b"\0" + bytes([1] * 64)),
        segment(0xC2, sizes + bytes((1, 0x11, 0))),
        segment(0xC4, b"\x00" + table + b"\x00"),
        segment(0xC4, b"\x10" + table + b"\xe0"),
        segment(0xDA, bytes((1, 1, 0, 0, 0, 0x01))) + bytes(-(-blocks // 8)),
        segment(0xDA, bytes((1, 1, 0, 1, 63, 0x01))) + empty,
        (segment(0xDA, bytes((1, 1, 0, 1, 63, 0x10))) + empty) * (scans - 2),
    ]
    return b"".join(parts) + b"\xff\xd9"


# --- what to send


def seeds() -> dict[str, bytes]:
    """Good pictures of every kind that is taken, small enough to be mutated thousands of times."""
    image, moving = noise(40, 30), [noise(24, 24, seed) for seed in range(3)]
    held = Image.Exif()
    held[0x0112] = 6
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 50)
    return {
        "jpeg": encoded(image, "JPEG", exif=held),
        "jpeg progressive": encoded(image, "JPEG", progressive=True),
        "jpeg grey": encoded(image.convert("L"), "JPEG"),
        "jpeg cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "jpeg restarts": encoded(image, "JPEG", restart_marker_blocks=1),
        "png": encoded(image, "PNG", exif=held, icc_profile=bytes(200)),
        "png palette": encoded(palette, "PNG", transparency=0),
        "png 16 bit": encoded(deep, "PNG"),
        "png alpha": encoded(noise(40, 30, channels=4), "PNG"),
        "png 1 bit": encoded(image.convert("1"), "PNG"),
        "apng": encoded(moving[0], "PNG", save_all=True, append_images=moving[1:]),
        "webp": encoded(image, "WEBP", exif=held),
        "webp lossless": encoded(noise(40, 30, channels=4), "WEBP", lossless=True),
        "webp alpha": encoded(noise(40, 30, channels=4), "WEBP"),
        "webp moving": encoded(moving[0], "WEBP", save_all=True, append_images=moving[1:]),
    }


def polyglots() -> dict[str, bytes]:
    """Files that are a picture and something else."""
    jpeg, png_, webp_ = (encoded(noise(40, 30), kind) for kind in ("JPEG", "PNG", "WEBP"))
    gif = encoded(noise(8, 8), "GIF")
    return {
        "jpeg then html": jpeg + HTML,
        "jpeg with html": in_jpeg(segment(0xFE, HTML)),
        "jpeg in jpeg": in_jpeg(segment(0xE1, b"Exif\0\0" + jpeg)),
        "html then jpeg": HTML + jpeg,
        "png then html": png_ + HTML,
        "png with html": in_png(before=chunk(b"tEXt", b"Comment\0" + HTML)),
        "png then jpeg": png_ + jpeg,
        "gif then png": gif + png_,
        "gif of png": b"GIF89a" + png_,
        "png of gif": SIGNATURE + gif,
        "webp then zip": webp_ + b"PK\x03\x04" + HTML,
        "riff of wave": webp_[:8] + b"WAVE" + webp_[12:],
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "pdf": b"%PDF-1.4\n" + jpeg,
    }


def liars() -> dict[str, bytes]:
    """Files that say of themselves what is not so."""
    jpeg = encoded(noise(40, 30), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    sized = {
        f"jpeg of {width} x {height}": jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]
        for width, height in ((0, 0), (1, 1), (65535, 1), (1, 65535), (6000, 6000), (65535, 65535))
    }
    return {
        **sized,
        "jpeg of two sizes": jpeg[:frame] + segment(0xC0, struct.pack(">BHHB", 8, 65535, 65535, 3)) + jpeg[frame:],
        "jpeg of one marker": b"\xff\xd8\xff\xd9",
        "jpeg that ends in a length": b"\xff\xd8\xff\xe1\xff",
        "jpeg of a length of nothing": b"\xff\xd8\xff\xe1\x00\x00" + jpeg[2:],
        "jpeg of fillings": b"\xff\xd8" + b"\xff" * 100_000 + jpeg[2:],
        "png without data": png(6000, 6000, b""),
        "png of too little": png(6000, 6000, zeros(100)),
        "png of too much": png(8, 8, zeros(10_000_000)),
        "png of nothing": png(0, 0, zeros(10)),
        "png of 2^31": png(2**31 - 1, 2**31 - 1, zeros(10)),
        "png of an endless chunk": SIGNATURE + b"\xff\xff\xff\xffIHDR" + bytes(30),
        "png of two headers": in_png(before=chunk(b"IHDR", struct.pack(">LLBBBBB", 60000, 60000, 8, 0, 0, 0, 0))),
        "webp of a huge canvas": webp(canvas(2**24, 2**24), encoded(noise(8, 8), "WEBP")[12:]),
        "webp of a wrong canvas": webp(canvas(5000, 5000), encoded(noise(8, 8), "WEBP")[12:]),
        "webp of an endless chunk": webp(b"VP8 \xff\xff\xff\xff" + bytes(20)),
        "webp of nothing": webp(),
        "webp of a huge picture": webp(riff(b"VP8L", b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little") + bytes(9))),
        "webp of a small canvas": webp(canvas(4, 4, 2), riff(b"ANIM", bytes(6)), riff(b"ANMF", bytes(200))),
    }


def bombs() -> dict[str, Callable[[], bytes]]:
    """Files of less than ten megabytes on which decoders that read all of them spend seconds, minutes or gigabytes."""
    big = overlapping_exif(600_000, 600)
    pieces = b"".join(segment(0xE1, b"Exif\0\0" + big[at : at + 65_000]) for at in range(0, len(big), 65_000))
    one = zeros(1_000_000)
    flat = Image.new("RGB", (64, 64))
    return {
        "scans": lambda: many_scans(4000, 4000, 3000),
        "exif in jpeg": lambda: in_jpeg(pieces),
        "exif in png": lambda: in_png(before=chunk(b"eXIf", big)),
        "exif in webp": lambda: in_webp(riff(b"EXIF", big), flags=8),
        "multi-picture": lambda: in_jpeg(segment(0xE2, b"MPF\0" + overlapping_exif(65_000, 5000))),
        "comments": lambda: in_jpeg(segment(0xFE) * 2_000_000),
        "tables": lambda: in_jpeg(segment(0xDB) * 2_000_000),
        "profiles": lambda: in_png(before=b"".join(chunk(b"iCCP", b"p\0\0" + one) for _ in range(1000))),
        "packed texts": lambda: in_png(before=b"".join(chunk(b"zTXt", b"k%d\0\0" % n + one) for n in range(1000))),
        "packed words": lambda: in_png(
            before=b"".join(chunk(b"iTXt", b"k%d\0\1\0\0\0" % n + one) for n in range(1000))
        ),
        "a packed gigabyte": lambda: in_png(before=chunk(b"zTXt", b"k\0\0" + zeros(1_000_000_000))),
        "chunks": lambda: in_png(before=chunk(b"aaAa") * 700_000),
        "late chunks": lambda: in_png(after=chunk(b"tEXt", b"a\0b") * 500_000),
        "pieces of pixels": lambda: in_png(before=chunk(b"IDAT") * 700_000),
        "frames of png": lambda: encoded(
            flat, "PNG", save_all=True, append_images=[noise(64, 64, n) for n in range(50)]
        ),
        "frames of webp": lambda: in_webp(riff(b"ANIM", bytes(6)), *[riff(b"ANMF", bytes(24))] * 200_000, flags=2),
        "one pixel wide": lambda: png(1, 39_000_000, zeros(2 * 39_000_000)),
        "one pixel high": lambda: png(39_000_000, 1, zeros(39_000_001)),
    }


def mutations(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` variants: cut off, bytes changed (mostly near the start), pieces doubled, dropped or moved."""
    rng = np.random.default_rng(seed)
    for turn in range(count):
        data = bytearray(whole)
        kind = turn % 4
        if kind == 0:
            del data[rng.integers(0, len(data)) :]
        for place in rng.integers(0, min(len(data) or 1, 64 if kind == 1 else 10**9), rng.integers(0, 6)):
            if data:
                data[place] = rng.choice((0, 0xFF, 0x7F, 0x80, 1, rng.integers(256)))
        if kind > 1 and data:
            begin, to = (int(place) for place in rng.integers(0, len(data), 2))
            piece = data[begin : begin + int(rng.integers(1, 40))]
            if kind == 2:
                del data[begin : begin + len(piece)]
            data[to:to] = piece
        yield bytes(data)
