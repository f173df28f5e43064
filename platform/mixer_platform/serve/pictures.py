"""Pictures of items, small enough for a page of results."""

from __future__ import annotations

import io
import logging

from PIL import Image

from mixer.images import UnreadableImage, decode
from mixer_platform.errors import MissingError, StorageError
from mixer_platform.serve.errors import ApiError, unavailable
from mixer_platform.storage import read_uri, resolve_uri

MAX_SIDE = 320  # pixels
MEDIA_TYPE = "image/jpeg"
# An item keeps its picture for long, but not forever; "private" because a key may be needed to see it.
CACHE_CONTROL = "private, max-age=3600"

log = logging.getLogger(__name__)


def thumbnail(uri: str | None, root: str) -> bytes:
    """Return an item's picture as JPEG of at most MAX_SIDE pixels a side, upright, never enlarged.

    `uri` is what the item's row says, below `root` if it is relative. Raises ApiError: 404 if there is no such picture
    or it cannot be decoded, 503 if the storage does not answer.
    """
    if not uri:
        raise ApiError(404, "no_picture", "the item has no picture")
    try:
        image = decode(read_uri(resolve_uri(uri, root)))
    except MissingError:
        raise ApiError(404, "no_picture", f"the item's picture {uri!r} is not there") from None
    except UnreadableImage as error:
        raise ApiError(404, "no_picture", f"the item's picture {uri!r} cannot be used: {error}") from None
    except StorageError as error:
        log.warning("%s", error)
        raise unavailable(f"the item's picture {uri!r} cannot be read just now; try again") from None
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, optimize=True)
    return file.getvalue()
