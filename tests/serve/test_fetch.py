"""Photos by URL: from allowed hosts at public addresses, and from nowhere else, whatever a URL or a name says."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from mixer_platform.config import ServeConfig
from mixer_platform.serve.errors import ApiError
from mixer_platform.serve.fetch import Address, Fetcher, is_public, look_up

HOST = "img.shop.example"
LOOPBACK = ip_address("127.0.0.1")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Names:
    """A resolver of this test: what each look-up in turn says; the last is said again."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = [[ip_address(each) for each in answer] for answer in answers]
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[Address]:
        self.asked.append(host)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


@asynccontextmanager
async def site(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serve on a free port of this machine."""
    server = web.Application()
    server.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(server, handler_cancellation=True, shutdown_timeout=0.01)
    await runner.setup()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        await web.SockSite(runner, listening, ssl_context=tls).start()
        try:
            yield listening.getsockname()[1]
        finally:
            await runner.cleanup()


async def no_site(request: web.Request) -> web.Response:
    raise AssertionError(f"{request.url} was asked")


def fetched(
    path: str,
    handler: Handler = no_site,
    *,
    host: str = HOST,
    lookup: Any = None,
    allowed: Callable[[Address], bool] = lambda address: address == LOOPBACK,
    tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
    times: int = 1,
    **config: Any,
) -> bytes:
    """Fetch `path` of a site of this machine (PORT in it is the site's), over http or, with `tls`, over https."""

    async def run() -> bytes:
        async with site(handler, tls[0] if tls else None) as port:
            settings = {"fetch_hosts": (HOST, "*.cdn.example"), "fetch_http": not tls, "fetch_ports": (port,)}
            fetcher = Fetcher(
                ServeConfig(**(settings | config)), lookup or Names(["127.0.0.1"]), allowed, tls[1] if tls else None
            )
            try:
                url = path.replace("PORT", str(port))
                if "://" not in url:
                    url = f"{'https' if tls else 'http'}://{host}:{port}{path}"
                for _ in range(times):
                    found = await fetcher.fetch(url)
                return found
            finally:
                await fetcher.close()

    return asyncio.run(run())


def refused(*arguments: Any, status: int = 403, code: str = "url_not_allowed", **options: Any) -> str:
    with pytest.raises(ApiError) as error:
        fetched(*arguments, **options)
    assert (error.value.status, error.value.code) == (status, code)
    assert "\n" not in error.value.message
    assert "127.0.0.1" not in error.value.message  # what is inside is nobody's business
    return error.value.message


def failed(*arguments: Any, **options: Any) -> str:
    said = refused(*arguments, status=422, code="fetch_failed", **options)
    return said.removeprefix("the photo cannot be fetched: ")


async def photo(request: web.Request) -> web.Response:
    return web.Response(body=b"photo")


# --- addresses


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "169.254.169.254",
     "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.0.1", "192.0.2.1", "192.88.99.1",
     "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
     "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::1", "100::1",
     "2001::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254",
     "fe80::1", "fec0::1", "ff02::1", "ff0e::1"],
)  # fmt: skip
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.63.255.255", "2001:4860:4860::8888", "2600::"]
)
def test_others_are(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["10.0.0.1", "8.8.8.8"], ["169.254.169.254"], ["::1"]]
)
def test_a_name_is_not_asked_if_any_of_its_addresses_is_not_public(addresses: list[str]) -> None:
    names = Names(addresses)
    said = refused("/1.jpg", lookup=names, allowed=is_public)
    assert said == f"the url cannot be used: {HOST} leads to an address that is not public"
    assert names.asked == [HOST]


def test_the_address_that_was_checked_is_the_one_that_is_asked() -> None:
    """A name that is rebound after the check leads nowhere else: it is not looked up again."""
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    checked: list[Address] = []
    assert fetched("/", photo, lookup=names, allowed=lambda address: not checked.append(address)) == b"photo"
    assert names.asked == [HOST]
    assert checked == [LOOPBACK]


def test_a_name_is_checked_anew_for_a_new_connection() -> None:
    async def hang_up(request: web.Request) -> web.Response:
        reply = web.Response(body=b"photo")
        reply.force_close()
        return reply

    names = Names(["127.0.0.1"], ["10.0.0.1"])
    assert "leads to an address that is not public" in refused("/", hang_up, lookup=names, times=2)
    assert names.asked == [HOST, HOST]


def test_the_systems_resolver_is_asked() -> None:
    assert LOOPBACK in asyncio.run(look_up("localhost", 80))
    for host in ("a" * 70 + ".cdn.example", "nothing.invalid"):
        with pytest.raises(OSError):  # noqa: PT011  # which one is the system's affair
            asyncio.run(look_up(host, 80))


# --- URLs


@pytest.mark.parametrize("path", ["https://img.shop.example/1.jpg", "nonsense"])
def test_it_is_off_unless_hosts_are_named(path: str) -> None:
    names = Names(["127.0.0.1"])
    said = refused(path, lookup=names, fetch_hosts=())
    assert said == "the url cannot be used: photos are not fetched by URL here; send the photo itself"
    assert not names.asked


@pytest.mark.parametrize("host", [HOST, "IMG.Shop.Example", "a.cdn.example", "a.b.cdn.example", "bücher.cdn.example"])
def test_hosts_of_the_list_are_asked(host: str) -> None:
    assert fetched("/", photo, host=host) == b"photo"


@pytest.mark.parametrize(
    "host",
    ["shop.example", "x.img.shop.example", "img.shop.example.evil.example", "evil-img.shop.example", "cdn.example",
     "evilcdn.example", "cdn.example.evil.example", "img.shop.example.", "127.0.0.1", "[::1]", "2130706433",
     "0x7f000001", "127.1", "localhost", "img.shop.example%00.evil.example", "img。shop.example.evil.example"],
)  # fmt: skip
def test_other_hosts_are_not_even_looked_up(host: str) -> None:
    names = Names(["127.0.0.1"])
    with pytest.raises(ApiError, match=r"its host is not one that|must start with|is not a URL"):
        fetched("/", host=host, lookup=names)
    assert not names.asked


@pytest.mark.parametrize(
    "url",
    ["", "nonsense", "/1.jpg", "//img.shop.example/", "file:///etc/passwd", "ftp://img.shop.example/", "data:,x",
     "gopher://img.shop.example:PORT/", "https://", "https:///x", "http://[", "javascript:alert(1)", "http://img.shop.example:x/"],
)  # fmt: skip
def test_what_is_no_web_address_is_refused(url: str) -> None:
    if "://" not in url:
        with pytest.raises(ApiError, match="must start with https"):
            asyncio.run(Fetcher(ServeConfig(fetch_hosts=(HOST,))).fetch(url))
        return
    said = refused(url, status=422, code="invalid_request")
    assert said in ("url must start with https:// or http:// and a host", "url is not a URL")


def test_plain_http_needs_the_configurations_word() -> None:
    said = refused(f"http://{HOST}:PORT/", photo, status=422, code="invalid_request", fetch_http=False)
    assert said == "url must start with https:// and a host"
    assert ServeConfig().fetch_http is False


@pytest.mark.parametrize("user", ["user@", "user:password@", ":password@", "shop.example@"])
def test_credentials_are_refused(user: str) -> None:
    said = refused(f"http://{user}{HOST}:PORT/", photo, status=422, code="invalid_request")
    assert said == "url holds a user or a password; photos are fetched without"


@pytest.mark.parametrize("port", [22, 8080, 65535])
def test_other_ports_are_refused(port: int) -> None:
    said = refused(f"http://{HOST}:{port}/")
    assert said == f"the url cannot be used: port {port} is not one that photos are fetched from"
    assert ServeConfig().fetch_ports == (80, 443)


def test_endless_urls_are_refused() -> None:
    assert (
        refused("http://" + "a" * 2000, status=422, code="invalid_request") == "url has 2007 characters; at most 2000"
    )


@pytest.mark.parametrize(
    "host", ["*", "*.com.", "127.0.0.1", "::1", "Shop.example", "shop.example/", "", "a*.example", "*."]
)
def test_a_list_of_hosts_holds_names(host: str) -> None:
    with pytest.raises(ValidationError):
        ServeConfig(fetch_hosts=(host,))


# --- redirects


def redirects(to: str, count: int = 1) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        step = int(request.query.get("step", 0))
        if step == count:
            return web.Response(body=b"photo")
        location = to.replace("PORT", str(request.url.port)).replace("STEP", str(step + 1))
        return web.Response(status=302, headers={"Location": location})

    return handle


@pytest.mark.parametrize(
    "to", ["/?step=STEP", "http://other.cdn.example:PORT/?step=STEP", "//img.shop.example:PORT/?step=STEP"]
)
def test_three_redirects_are_followed_and_no_more(to: str) -> None:
    assert fetched("/", redirects(to, 3)) == b"photo"
    assert failed("/", redirects(to, 4)).endswith("redirects more than 3 times")


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("http://evil.example:PORT/", "its host is not one that photos are fetched from"),
        ("http://127.0.0.1:PORT/", "its host is not one that photos are fetched from"),
        ("http://169.254.169.254/latest/meta-data/", "its host is not one that photos are fetched from"),
        ("http://img.shop.example:1/", "port 1 is not one that photos are fetched from"),
        ("file:///etc/passwd", "url must start with https:// or http:// and a host"),
        ("http://a:b@img.shop.example:PORT/", "url holds a user or a password"),
        ("http://[", "redirects to what is not a URL"),
    ],
)
def test_redirects_are_checked_like_the_url_itself(to: str, said: str) -> None:
    with pytest.raises(ApiError, match=said):
        fetched("/", redirects(to))


def test_a_redirect_to_a_name_that_leads_inside_is_not_followed() -> None:
    names = Names(["127.0.0.1"], ["10.0.0.1"])
    said = refused("/", redirects("http://inside.cdn.example:PORT/"), lookup=names)
    assert said == "the url cannot be used: inside.cdn.example leads to an address that is not public"


def test_https_is_not_left_by_a_redirect(certificates: Any) -> None:
    said = refused("/", redirects(f"http://{HOST}:PORT/"), tls=certificates, status=422, code="invalid_request")
    assert said == "url must start with https:// and a host"


# --- what comes back


@pytest.mark.parametrize("announced", [True, False])
def test_a_photo_above_the_limit_is_not_read_to_its_end(announced: bool) -> None:
    written = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal written
        reply = web.StreamResponse()
        if announced:
            reply.content_length = 10**9
        await reply.prepare(request)
        if announced:
            await asyncio.Event().wait()
        while True:
            await reply.write(bytes(10_000))
            written += 10_000

    said = refused("/", endless, status=413, code="body_too_large", max_body_mb=0.1)
    assert said == f"the photo at {HOST} is above 0.1 MB; name a smaller one"
    assert written < 20_000_000


def test_a_photo_at_the_limit_is_taken() -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=bytes(100_000))

    assert fetched("/", handle, max_body_mb=0.1) == bytes(100_000)


def test_compressed_bytes_are_not_unpacked() -> None:
    async def bomb(request: web.Request) -> web.Response:
        assert request.headers["Accept-Encoding"] == "identity"
        reply = web.Response(body=bytes(10_000_000), zlib_executor_size=2**40)
        reply.enable_compression(web.ContentCoding.gzip)
        return reply

    found = fetched("/", bomb, max_body_mb=0.1)
    assert found[:2] == b"\x1f\x8b"
    assert len(found) < 100_000


@pytest.mark.parametrize("where", ["lookup", "headers", "body"])
def test_there_is_one_deadline_for_all(where: str) -> None:
    began = time.monotonic()

    async def wait(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def drip(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse()
        if where == "body":
            await reply.prepare(request)
            while True:  # each byte in time, all of them never
                await reply.write(b"x")
                await asyncio.sleep(0.01)
        return await wait()

    said = failed("/", drip, lookup=wait if where == "lookup" else None, fetch_timeout_s=0.2)
    assert said == f"{HOST} did not send it within 0.2 s"
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("status", [204, 304, 401, 404, 500])
def test_another_answer_is_told(status: int) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(status=status)

    assert failed("/", handle) == f"{HOST} answers {status}"


def test_a_host_that_is_not_there_is_told() -> None:
    async def nowhere(host: str, port: int) -> list[Address]:
        raise OSError("no such host")

    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def stop_short(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse()
        reply.content_length = 100
        await reply.prepare(request)
        await reply.write(b"x")
        assert request.transport is not None
        request.transport.close()
        return reply

    assert failed("/", lookup=nowhere) == f"{HOST} has no address"
    assert failed("/", hang_up) == f"{HOST} cannot be reached, or hung up"
    assert failed("/", stop_short) == f"{HOST} did not answer as HTTP asks"
    assert failed(f"http://{HOST}:1/", fetch_ports=(1,)) == f"{HOST} cannot be reached, or hung up"


def test_nothing_of_this_machine_is_sent_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {HOST} login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    seen: list[set[str]] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append({name.lower() for name in request.headers})
        reply = await redirects("/?step=STEP", 2)(request)
        reply.set_cookie("session", "1")
        return reply

    assert fetched("/", handle, times=2) == b"photo"
    assert len(seen) == 6
    assert all(names == {"host", "user-agent", "accept", "accept-encoding"} for names in seen)


# --- certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's side for `img.shop.example`, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(1))
        .not_valid_after(today + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "site.pem"
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(key.private_bytes(*plain) + certificate.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=path)


def test_https_is_asked_under_the_hosts_own_name(certificates: Any) -> None:
    assert fetched("/", photo, tls=certificates) == b"photo"
    assert failed("/", photo, tls=certificates, host="a.cdn.example") == (
        "a.cdn.example has no certificate that is trusted"
    )


def test_a_certificate_that_nobody_signed_is_refused(certificates: Any) -> None:
    said = failed("/", photo, tls=(certificates[0], ssl.create_default_context()))
    assert said == f"{HOST} has no certificate that is trusted"


def test_certificates_are_checked_unless_told_otherwise(certificates: Any) -> None:
    async def run() -> None:
        async with site(photo, certificates[0]) as port:
            config = ServeConfig(fetch_hosts=(HOST,), fetch_ports=(port,))
            fetcher = Fetcher(config, Names(["127.0.0.1"]), lambda _: True)
            try:
                await fetcher.fetch(f"https://{HOST}:{port}/")
            finally:
                await fetcher.close()

    with pytest.raises(ApiError, match="has no certificate that is trusted"):
        asyncio.run(run())
