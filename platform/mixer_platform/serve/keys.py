"""API keys: who may ask, and how often. `python -m mixer_platform.serve.keys NAME` makes one.

Of a key only its SHA-256 is kept. That is enough, and bcrypt would be wrong: passwords are few enough to be guessed, so
theirs is slow on purpose; a key has 256 random bits, and every request pays for looking it up.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import ipaddress
import logging
import math
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from mixer_platform.config import ServeConfig
from mixer_platform.errors import ConfigError
from mixer_platform.serve.errors import ApiError, error_response

ENVIRONMENT = "MIXER_API_KEYS"
PREFIX = "mixer_"  # so that a key that leaked into a repository is found there
OPEN_PATHS = frozenset(("/", "/healthz", "/readyz"))
OPEN_FOLDER = "/page/"

log = logging.getLogger(__name__)


class ApiKey(BaseModel):
    """An entry of the keys' file: a client, what its key hashes to, and how often it may ask each replica."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=100)
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the key, in hexadecimal digits")
    requests_per_second: float | None = Field(None, gt=0, description="in the long run, each replica; null: any number")
    burst: int = Field(20, ge=1, description="requests that may come at once")


KeyRing = tuple[ApiKey, ...]
_ENTRIES: TypeAdapter[KeyRing] = TypeAdapter(Annotated[KeyRing, Field(min_length=1)])


def key_ring(config: ServeConfig, environ: Mapping[str, str]) -> KeyRing | None:
    """Return the keys that may ask, or None where the configuration says that anybody may. Raises ConfigError."""
    if not config.keys:
        if not _is_loopback(config.host):
            raise ConfigError(
                f"serve.keys: off, but serve.host is {config.host}: whoever reaches it could ask; "
                "set serve.host=127.0.0.1, or serve.keys=on with API keys"
            )
        return None
    if config.keys_file:
        return _parse(_read(config.keys_file), config.keys_file)
    if environ.get(ENVIRONMENT, "").strip():
        return _parse(environ[ENVIRONMENT], ENVIRONMENT)
    raise ConfigError(
        f"serve.keys_file: no API keys; name a file of them, set {ENVIRONMENT} to its text, "
        "or set serve.keys=off to let anybody on this machine ask"
    )


def find_key(ring: KeyRing, presented: str) -> ApiKey | None:
    """Return the entry of a key. It takes as long whichever it is, and whether or not there is one."""
    digest = _hash(presented)
    found = None
    for entry in ring:
        if hmac.compare_digest(entry.sha256, digest):
            found = entry
    return found


def make_key(name: str, **limits: float | None) -> tuple[str, ApiKey]:
    """Return a new key, which nothing will tell again, and its entry. Raises ValidationError."""
    key = PREFIX + secrets.token_urlsafe(32)
    given = {field: value for field, value in limits.items() if value is not None}
    return key, ApiKey.model_validate({"name": name, "sha256": _hash(key), **given})


class Bucket:
    """A token bucket: `burst` requests at once, `rate` a second in the long run. Starts full."""

    def __init__(self, rate: float, burst: int, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._filled = float(burst), now

    def take(self, now: float) -> float:
        """Take a token and return 0, or take none and return the seconds until there is one."""
        self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate


class Keys:
    """The keys that may ask now, and how much each still may.

    Rates are counted in each replica by itself: all of n replicas together let n times as much through.
    """

    def __init__(self, ring: KeyRing, clock: Callable[[], float] = time.monotonic) -> None:
        self.ring: KeyRing = ()
        self._buckets: dict[ApiKey, Bucket] = {}
        self._clock = clock
        self.replace(ring)

    def replace(self, ring: KeyRing) -> None:
        """Let these keys ask and no others. What an entry that stays has asked already, counts on."""
        self._buckets = {
            entry: self._buckets.get(entry) or Bucket(entry.requests_per_second, entry.burst, self._clock())
            for entry in ring
            if entry.requests_per_second is not None
        }
        self.ring = ring

    def admit(self, presented: str | None) -> str:
        """Return whose key it is. Raises ApiError: 401 for none, or one that is not known, 429 above its rate."""
        if presented is None:
            message = "an API key is needed; send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
            raise ApiError(401, "unauthorized", message, {"WWW-Authenticate": 'Bearer realm="mixer"'})
        entry = find_key(self.ring, presented)
        if entry is None:
            challenge = {"WWW-Authenticate": 'Bearer realm="mixer", error="invalid_token"'}
            raise ApiError(401, "unauthorized", "the API key is not known here; ask for a new one", challenge)
        bucket = self._buckets.get(entry)
        wait_s = bucket.take(self._clock()) if bucket else 0
        if wait_s:
            message = f"{entry.name} asks more than {entry.requests_per_second:g} times a second; ask less often"
            raise ApiError(429, "rate_limited", message, {"Retry-After": str(math.ceil(wait_s))})
        return entry.name

    async def follow(self, path: str, every_s: float) -> None:
        """Look every `every_s` seconds, for ever, who the file names now. One that is wrong changes nothing."""
        seen, said = "", ""
        while True:
            try:
                text = await asyncio.to_thread(_read, path)
                if text != seen:
                    seen = text
                    self.replace(_parse(text, path))
                    log.info("%s: %d API keys may ask", path, len(self.ring))
                said = ""
            except Exception as error:  # whatever it is: who follows must not stop
                if str(error) != said:
                    log.warning("the API keys stay as they are: %s", error)
                said = str(error)
            await asyncio.sleep(every_s)


class Authenticate:
    """ASGI middleware: nobody without a key gets beyond it; probes and the page itself need none.

    The name of the key is left in the request's state, as `client`.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            scope.setdefault("state", {})["client"] = self._keys.admit(_presented(headers))
        except ApiError as error:
            # Sent and not raised: what a middleware raises is a failure of the server.
            return await error_response(error, headers)(scope, receive, send)
        return await self.app(scope, receive, send)


def add_guards(api: Starlette, keys: Keys | None, cors_origins: Sequence[str]) -> None:
    """Ask for keys, and let pages of these origins ask. Call it last: what is added last sees a request first.

    A browser asks whether it may (CORS) before it sends a key, and reads a refusal only if it carries CORS headers.
    """
    if keys is not None:
        api.add_middleware(Authenticate, keys=keys)
    if cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type", "X-API-Key", "X-Request-ID", "X-Request-Timeout-Ms"),
            expose_headers=("Retry-After", "X-Request-ID"),
        )


def main() -> None:
    """Print a new key once, to the terminal, and its entry to stdout: `... NAME >> keys.yaml` adds it to the file."""
    parser = argparse.ArgumentParser(prog="python -m mixer_platform.serve.keys", description=main.__doc__)
    parser.add_argument("name", help="who will ask with it")
    parser.add_argument("--requests-per-second", type=float, help="in the long run, of each replica")
    parser.add_argument("--burst", type=int, help="requests that may come at once")
    arguments = parser.parse_args()
    try:
        key, entry = make_key(**vars(arguments))
    except ValidationError as error:
        parser.error(_reason(error))
    print(yaml.safe_dump([entry.model_dump(exclude_none=True)], sort_keys=False), end="", flush=True)
    print(f"key of {entry.name}, told this once: {key}", file=sys.stderr)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"serve.keys_file: {path}: {error.strerror}; name a readable file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text; it should hold a list of API keys") from error


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _presented(headers: Headers) -> str | None:
    key = headers.get("x-api-key", "").strip()
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    return key or (token.strip() if scheme.lower() == "bearer" else "") or None


def _is_open(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse(text: str, place: str) -> KeyRing:
    try:
        ring = _ENTRIES.validate_python(yaml.safe_load(text))
    except yaml.YAMLError as error:  # without its words, which quote the file
        raise ConfigError(f"{place}: not YAML or JSON; it should hold a list of API keys") from error
    except ValidationError as error:
        raise ConfigError(f"{place}: {_reason(error)}; see python -m mixer_platform.serve.keys") from error
    for field in ("name", "sha256"):
        values = [getattr(entry, field) for entry in ring]
        twice = next((entry.name for entry in ring if values.count(getattr(entry, field)) > 1), None)
        if twice:
            raise ConfigError(f"{place}: {twice}: another key has the same {field}; give each its own")
    return ring


def _reason(error: ValidationError) -> str:
    """Say what is wrong, not what was found: that may be a key."""
    first = error.errors(include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place or 'the whole'}: {first['msg'][:1].lower()}{first['msg'][1:]}"


if __name__ == "__main__":
    main()
