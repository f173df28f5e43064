"""A client of the service for Python programs: typed replies, retries, one deadline for all of a call.

    with Client("https://search.shop.example", key=KEY) as client:
        reply = client.search(Path("photo.jpg"), k=5, filter={"brand": ["x"]})
        print([item.title for item in reply.items])

Needs pydantic and urllib3 alone, which boto3 and Ray bring along: no Ray, and nothing of the environment is read.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlencode

import urllib3
from pydantic import BaseModel, ValidationError

from mixer_platform.errors import MixerError
from mixer_platform.serve.schemas import (
    Attribute,
    AttributesReply,
    BatchReply,
    ErrorReply,
    ItemDetails,
    SearchReply,
    Status,
    StatusReply,
)

Reply = TypeVar("Reply", bound=BaseModel)
Photo = bytes | Path

RETRIED = frozenset((429, 502, 503, 504))  # every request only asks, so each may be asked again
_LOST = "http_500"  # in a proxy's words, not the service's: the replica that had the request died
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0
_STARTS = {b"\x89PNG": "image/png", b"RIFF": "image/webp"}


class MixerHttpError(MixerError):
    """The service answered, and with no result.

    `status` is HTTP's, `code` is for programs, `message` a sentence for people, `request_id` finds it in the log.
    """

    def __init__(self, status: int, code: str, message: str, request_id: str | None) -> None:
        super().__init__(f"{message} ({status} {code}, request {request_id})")
        self.status, self.code, self.message, self.request_id = status, code, message, request_id


class MixerUnreachableError(MixerError):
    """The service did not answer within the deadline, or what answered is no Mixer."""


class Options(TypedDict, total=False):
    """What searches may say; docs of the service's `/v1/search` say what each means."""

    k: int
    offset: int
    filter: Mapping[str, Any] | None
    group_by: str | None
    min_probability: float | None


class Client:
    """Asks the service at `url`, such as http://127.0.0.1:8000. Threads may share one; it keeps connections.

    `timeout_s` is for all of a call: waits, retries and the reply. `retries`: how often it asks again where nobody
    answers, or the service says that it cannot just now; waits double, are drawn at random, and heed Retry-After.
    `pool` is for a proxy or certificates of your own. Calls raise MixerHttpError and MixerUnreachableError.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retries: int = 3,
        pool: urllib3.PoolManager | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is not the URL of a service, such as http://127.0.0.1:8000")
        self._url, self._timeout_s, self._retries = url.rstrip("/"), timeout_s, retries
        self._headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._pool = pool or urllib3.PoolManager(num_pools=1, maxsize=16)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that are kept."""
        self._pool.clear()

    def search(self, photo: Photo, **options: Unpack[Options]) -> SearchReply:
        """Find the items that look like a photo (JPEG, PNG or WebP), best first."""
        content = _read(photo)
        kind = _STARTS.get(content[:4], "image/jpeg")
        return self._ask(SearchReply, "POST", _with("/v1/search", options), content, kind)

    def search_batch(self, photos: Sequence[Photo], **options: Unpack[Options]) -> BatchReply:
        """Search for several photos at once; one that cannot be used gets an error in its place."""
        fields: list[tuple[str, Any]] = [("photos", (f"{n}", _read(photo))) for n, photo in enumerate(photos)]
        fields += _texts(options).items()
        body, kind = urllib3.encode_multipart_formdata(fields)
        return self._ask(BatchReply, "POST", "/v1/search/batch", body, kind)

    def similar(self, item_id: str, **options: Unpack[Options]) -> SearchReply:
        """Find the items that are like an item, itself left out, best first."""
        return self._ask(SearchReply, "GET", _with(f"/v1/items/{quote(item_id, safe='')}/similar", options))

    def item(self, item_id: str) -> ItemDetails:
        """Return an item as the catalogue shows it."""
        return self._ask(ItemDetails, "GET", f"/v1/items/{quote(item_id, safe='')}")

    def attributes(self) -> list[Attribute]:
        """Return the columns that a filter may name."""
        return self._ask(AttributesReply, "GET", "/v1/attributes").attributes

    def status(self) -> StatusReply:
        """Say which version answers."""
        return self._ask(StatusReply, "GET", "/v1/status")

    def ready(self) -> bool:
        """Say whether a search would be answered now; asks once."""
        try:
            self._ask(Status, "GET", "/readyz", retries=0)
        except MixerHttpError as error:
            if error.status not in RETRIED:
                raise
            return False
        except MixerUnreachableError:
            return False
        return True

    def _ask(
        self,
        reply: type[Reply],
        method: str,
        path: str,
        body: bytes | None = None,
        kind: str | None = None,
        retries: int | None = None,
    ) -> Reply:
        deadline = time.monotonic() + self._timeout_s
        headers = self._headers | ({"Content-Type": kind} if kind else {})
        attempt = 0
        while True:
            failure: MixerError
            asked_to_wait_s = 0.0
            try:
                status, found, content = self._send(method, path, body, headers, deadline)
            except (urllib3.exceptions.SSLError, urllib3.exceptions.LocationValueError) as error:
                raise MixerUnreachableError(f"{self._url} cannot be asked: {error}") from error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                failure = MixerUnreachableError(f"{self._url} does not answer: {error}")
                failure.__cause__ = error
            else:
                if status == 200:
                    return self._parse(reply, content)
                failure = refusal = _error(status, found, content)
                if status not in RETRIED and refusal.code != _LOST:
                    raise refusal
                asked_to_wait_s = _retry_after_s(found.get("Retry-After"))
            wait_s = asked_to_wait_s + random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt))
            attempt += 1
            allowed = self._retries if retries is None else retries
            if attempt > allowed or time.monotonic() + wait_s >= deadline:
                raise failure
            time.sleep(wait_s)

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], deadline: float
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Ask once; return the status, headers and body. Raises urllib3's HTTPError and OSError."""
        left_s = max(0.001, deadline - time.monotonic())
        timed = {**headers, "X-Request-Timeout-Ms": f"{left_s * 1000:.0f}"}  # so that nobody works on it for longer
        answer = self._pool.request(
            method, self._url + path, body=body, headers=timed, timeout=left_s, retries=False, redirect=False,
            preload_content=False,
        )  # fmt: skip
        try:
            content = bytearray()
            while piece := answer.read1(1 << 16):
                content += piece
                if time.monotonic() > deadline:  # urllib3's own timeout begins anew with every byte
                    raise TimeoutError(f"no whole reply within {self._timeout_s:g} s")
        except BaseException:
            answer.close()  # what is left of the reply must not be taken for the next one's
            raise
        return answer.status, answer.headers, bytes(content)

    def _parse(self, reply: type[Reply], content: bytes) -> Reply:
        try:
            return reply.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise MixerUnreachableError(
                f"{self._url} replies as no Mixer of this version does: {place} {first['msg']}"
            ) from error


def _read(photo: Photo) -> bytes:
    return photo.read_bytes() if isinstance(photo, Path) else photo


def _texts(options: Options) -> dict[str, str]:
    """Return options as forms and query strings carry them, without those that are None."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return {name: json.dumps(value) if name == "filter" else str(value) for name, value in given.items()}


def _with(path: str, options: Options) -> str:
    texts = _texts(options)
    return f"{path}?{urlencode(texts)}" if texts else path


def _error(status: int, headers: Mapping[str, str], content: bytes) -> MixerHttpError:
    try:
        detail = ErrorReply.model_validate_json(content).error
        return MixerHttpError(status, detail.code, detail.message, detail.request_id)
    except ValidationError:  # a proxy's words
        words = " ".join(content[:200].decode(errors="replace").split())
        return MixerHttpError(status, f"http_{status}", words or "no reason given", headers.get("X-Request-Id"))


def _retry_after_s(text: str | None) -> float:
    """Read Retry-After, seconds or a date; 0 if there is none that can be read."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text or "").timestamp() - time.time())
    except ValueError:
        return 0.0
