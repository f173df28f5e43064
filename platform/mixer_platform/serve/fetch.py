"""Fetch a photo that a request names by URL, from allowed hosts on the public internet and from nowhere else.

By aiohttp, which Ray Serve brings along: its resolver is the one place where addresses come from, so that the address
that was checked is the one that is connected to, whatever the name resolves to a moment later.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from mixer_platform.config import ServeConfig
from mixer_platform.serve.errors import ApiError, invalid

Address = IPv4Address | IPv6Address
Lookup = Callable[[str, int], Awaitable[list[Address]]]

MAX_REDIRECTS = 3
MAX_URL = 2000  # characters
CONNECTIONS = 16  # as many photos of the largest size are in memory at once
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
# Of IANA's registries of special addresses those that `is_global` passes, or once did: relays, protocol
# assignments, tunnels to any IPv4 address, documentation; and Azure's metadata, whose address looks like anybody's.
_SPECIAL = tuple(
    map(
        ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2002::/16", "2001:db8::/32", "3fff::/20"),
    )
)
_UNICAST = ip_network("2000::/3")  # of IPv6, all that is routed in public


def is_public(address: Address) -> bool:
    """Say whether an address is a host of the public internet: not private, loopback or otherwise special."""
    if address.version == 6 and address not in _UNICAST:
        return False
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return not any(address in network for network in _SPECIAL)


async def look_up(host: str, port: int) -> list[Address]:
    """Return the addresses of a host as the system's resolver gives them. Raises OSError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{host!r} is no name of a host") from error
    return [ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


class CheckedResolver(AbstractResolver):
    """Names to addresses, all of which must be allowed: a name that also leads inside is not trusted at all."""

    def __init__(self, lookup: Lookup, allowed: Callable[[Address], bool]) -> None:
        self._lookup, self._allowed = lookup, allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return what aiohttp connects to. Raises ApiError and OSError."""
        addresses = await self._lookup(host, port)
        if not all(map(self._allowed, addresses)):
            raise _forbidden(f"{host} leads to an address that is not public")
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Hold nothing, release nothing."""


class Fetcher:
    """Fetches photos as `serve.fetch_*` allow: without cookies, credentials and the environment's proxies.

    `lookup`, `allowed` and `tls`: how names are resolved, which addresses may be asked, whose certificates count.
    """

    def __init__(
        self,
        config: ServeConfig,
        lookup: Lookup = look_up,
        allowed: Callable[[Address], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._max_bytes = int(config.max_body_mb * 1e6)
        self._resolver = CheckedResolver(lookup, allowed)
        self._tls: ssl.SSLContext | bool = tls or True
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, text: str) -> bytes:
        """Return what is at a URL. Raises ApiError."""
        if not self._config.fetch_hosts:
            raise _forbidden("photos are not fetched by URL here; send the photo itself")
        url = self._check(text)
        try:
            async with asyncio.timeout(self._config.fetch_timeout_s):
                for _ in range(MAX_REDIRECTS + 1):
                    found = await self._ask(url)
                    if isinstance(found, bytes):
                        return found
                    url = self._check(found)
        except TimeoutError:
            raise _failed(url, f"did not send it within {self._config.fetch_timeout_s:g} s") from None
        except aiohttp.ClientConnectorDNSError:
            raise _failed(url, "has no address") from None
        except aiohttp.ClientSSLError:
            raise _failed(url, "has no certificate that is trusted") from None
        except aiohttp.ClientConnectionError:
            raise _failed(url, "cannot be reached, or hung up") from None
        except aiohttp.ClientError:
            raise _failed(url, "did not answer as HTTP asks") from None
        raise _failed(url, f"redirects more than {MAX_REDIRECTS} times")

    async def close(self) -> None:
        """Close the connections that are kept."""
        if self._session:
            await self._session.close()

    def _check(self, text: str) -> URL:
        """Return the URL if it may be asked; every redirect comes here too. Raises ApiError."""
        if len(text) > MAX_URL:
            raise invalid(f"url has {len(text)} characters; at most {MAX_URL}")
        try:
            url = URL(text)
            scheme, host, port = url.scheme, url.raw_host, url.port
        except ValueError:
            raise invalid("url is not a URL") from None
        schemes = ("https", "http") if self._config.fetch_http else ("https",)
        if scheme not in schemes or not host:
            raise invalid(f"url must start with {' or '.join(f'{each}://' for each in schemes)} and a host")
        if url.raw_user is not None or url.raw_password is not None:
            raise invalid("url holds a user or a password; photos are fetched without")
        if not any(_matches(host, pattern) for pattern in self._config.fetch_hosts):
            raise _forbidden("its host is not one that photos are fetched from")
        if port not in self._config.fetch_ports:
            raise _forbidden(f"port {port} is not one that photos are fetched from")
        return url

    async def _ask(self, url: URL) -> bytes | str:
        """Return the photo, or where it is instead. Raises ApiError and aiohttp.ClientError."""
        async with self._open().get(url, allow_redirects=False) as reply:
            if reply.status in _REDIRECTS:
                try:
                    return str(url.join(URL(reply.headers.get("Location", ""))))
                except ValueError:
                    raise _failed(url, "redirects to what is not a URL") from None
            if reply.status != 200:
                raise _failed(url, f"answers {reply.status}")
            if (reply.content_length or 0) > self._max_bytes:
                raise self._too_large(url)
            photo = bytearray()
            async for chunk in reply.content.iter_any():
                photo += chunk
                if len(photo) > self._max_bytes:
                    raise self._too_large(url)
            return bytes(photo)

    def _open(self) -> aiohttp.ClientSession:
        """Return the session; made here, for it belongs to the event loop that runs."""
        if self._session is None:
            # Each new connection resolves and checks anew.
            connector = aiohttp.TCPConnector(
                resolver=self._resolver, use_dns_cache=False, ssl=self._tls, limit=CONNECTIONS
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,  # what is counted is what is kept
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"User-Agent": "mixer", "Accept": "image/*", "Accept-Encoding": "identity"},
            )
        return self._session

    def _too_large(self, url: URL) -> ApiError:
        limit = f"{self._max_bytes / 1e6:g} MB"
        return ApiError(413, "body_too_large", f"the photo at {url.raw_host} is above {limit}; name a smaller one")


def _matches(host: str, pattern: str) -> bool:
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


def _forbidden(reason: str) -> ApiError:
    return ApiError(403, "url_not_allowed", f"the url cannot be used: {reason}")


def _failed(url: URL, reason: str) -> ApiError:
    return ApiError(422, "fetch_failed", f"the photo cannot be fetched: {url.raw_host} {reason}")
