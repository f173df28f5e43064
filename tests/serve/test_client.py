"""The Python client: against servers that fail on purpose, and against the service itself."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import urllib3
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mixer_platform.serve import client as client_module
from mixer_platform.serve.client import Client, MixerHttpError, MixerUnreachableError
from mixer_platform.serve.keys import make_key
from mixer_platform.serve.schemas import ErrorReply, Page
from tests.serve.servers import running, service

ROOT = Path(__file__).parents[2]
PAGE = {"items": [], "next_offset": None, "nothing_similar": False}
TIMINGS = {"encode": 1, "search": 1, "total": 2}
REPLY = {**PAGE, "model": "m", "index": "i", "timings_ms": TIMINGS, "degraded": False, "missing_shards": []}
Say = Callable[[Request], Response]


class Script:
    """A server that answers request after request as told, the last answer again and again."""

    def __init__(self, *answers: Response) -> None:
        self.answers = list(answers)
        self.seen: list[Request] = []
        self.bodies: list[bytes] = []
        self.clients: set[Any] = set()

    async def answer(self, request: Request) -> Response:
        self.seen.append(request)
        self.bodies.append(await request.body())
        self.clients.add(request.client)
        return self.answers[min(len(self.seen), len(self.answers)) - 1]

    @contextmanager
    def running(self) -> Iterator[str]:
        methods = ["GET", "POST"]
        with running(Starlette(routes=[Route("/{path:path}", self.answer, methods=methods)])) as url:
            yield url


def refusing(status: int, headers: dict[str, str] | None = None) -> Response:
    error = {"code": "saturated", "message": "too many requests wait; try again", "request_id": "r-7"}
    return JSONResponse({"error": error}, status, headers)


class Clock:
    """Time that passes as the client sleeps, and not otherwise."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return 1000 + sum(self.slept)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    time = staticmethod(time.time)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(client_module, "time", clock)
    monkeypatch.setattr(client_module, "random", SimpleNamespace(uniform=lambda low, high: high))
    return clock


@contextmanager
def raw(*answers: bytes) -> Iterator[tuple[str, list[int]]]:
    """A socket that says these bytes to one connection after the other and hangs up; the last again and again."""
    served: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    answer = answers[min(len(served), len(answers) - 1)]
                    served.append(len(answer))
                    if answer:
                        connection.recv(65536)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", served
        listening.shutdown(socket.SHUT_RDWR)


def http(body: bytes, length: int | None = None) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


# --- what is asked


def test_a_search_sends_the_photo_its_options_and_the_key(tmp_path: Path) -> None:
    script = Script(JSONResponse(REPLY))
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG...")
    with script.running() as url, Client(url + "/", key="secret") as client:
        reply = client.search(photo, k=3, offset=6, filter={"brand": ["ä & b"]}, group_by="look", min_probability=0.5)
        client.search(b"\xff\xd8...")
        client.search(b"RIFF....WEBP", filter=None)
    assert (reply.items, reply.model, reply.timings_ms.total) == ([], "m", 2)
    first, *others = script.seen
    assert (first.method, first.url.path, script.bodies[0]) == ("POST", "/v1/search", b"\x89PNG...")
    asked = dict(first.query_params)
    assert json.loads(asked.pop("filter")) == {"brand": ["ä & b"]}
    assert asked == {"k": "3", "offset": "6", "group_by": "look", "min_probability": "0.5"}
    assert [each.headers["content-type"] for each in script.seen] == ["image/png", "image/jpeg", "image/webp"]
    assert all(each.headers["authorization"] == "Bearer secret" for each in script.seen)
    assert [str(each.query_params) for each in others] == ["", ""]


def test_without_a_key_none_is_sent_and_the_environment_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    script = Script(JSONResponse(REPLY))
    with script.running() as url, Client(url) as client:
        client.search(b"x")
    assert "authorization" not in script.seen[0].headers


def test_connections_are_kept() -> None:
    script = Script(JSONResponse(REPLY), refusing(404), JSONResponse(REPLY))
    with script.running() as url, Client(url) as client:
        client.search(b"x")
        with pytest.raises(MixerHttpError):
            client.search(b"x")
        client.similar("a")
        client.similar("a")
    assert len(script.clients) == 1


def test_item_ids_may_hold_anything() -> None:
    script = Script(JSONResponse(REPLY))
    with script.running() as url, Client(url) as client:
        client.similar("shop/no. 7?#%&ü", k=2)
    assert script.seen[0].scope["raw_path"] == b"/v1/items/shop%2Fno.%207%3F%23%25%26%C3%BC/similar"
    assert dict(script.seen[0].query_params) == {"k": "2"}


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "file:///etc"])
def test_what_is_no_service_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="is not the URL of a service"):
        Client(url)


# --- tries


@pytest.mark.parametrize("status", [429, 503])
def test_not_now_is_asked_again_after_waits_that_double(status: int, clock: Clock) -> None:
    script = Script(refusing(status), refusing(status), refusing(status), JSONResponse(REPLY))
    with script.running() as url, Client(url) as client:
        assert client.search(b"x").items == []
    assert clock.slept == pytest.approx([0.1, 0.2, 0.4])
    assert script.bodies == [b"x"] * 4


def test_waits_are_drawn_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    for _ in range(2):
        clock = Clock()
        monkeypatch.setattr(client_module, "time", clock)
        with Script(refusing(503)).running() as url, Client(url) as client, pytest.raises(MixerHttpError):
            client.search(b"x")
        slept += clock.slept
    assert len(set(slept)) == 6
    assert all(0 <= wait <= 0.4 for wait in slept)


@pytest.mark.parametrize("retries", [0, 2])
def test_after_the_last_try_the_error_is_told(retries: int, clock: Clock) -> None:
    script = Script(refusing(503))
    with script.running() as url, Client(url, retries=retries) as client, pytest.raises(MixerHttpError) as error:
        client.search(b"x")
    said = error.value
    assert (said.status, said.code, said.request_id) == (503, "saturated", "r-7")
    assert said.message == "too many requests wait; try again"
    assert str(said) == "too many requests wait; try again (503 saturated, request r-7)"
    assert len(script.seen) == 1 + retries


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 500])
def test_other_errors_are_told_at_once(status: int, clock: Clock) -> None:
    script = Script(refusing(status), JSONResponse(REPLY))
    with script.running() as url, Client(url) as client, pytest.raises(MixerHttpError) as error:
        client.search(b"x")
    assert error.value.status == status
    assert clock.slept == []


def test_a_request_whose_replica_died_is_asked_again(clock: Clock) -> None:
    script = Script(Response("<h1>500 Internal Server Error</h1>", 500), JSONResponse(REPLY))
    with script.running() as url, Client(url) as client:
        assert client.search(b"x").model == "m"
    assert len(script.seen) == 2


def test_retry_after_is_heeded(clock: Clock) -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    headers = [{"Retry-After": text} for text in ("7", "0.5", in_a_minute, "soon")]
    script = Script(*[refusing(429, each) for each in headers], JSONResponse(REPLY))
    with script.running() as url, Client(url, timeout_s=100, retries=4) as client:
        client.search(b"x")
    assert clock.slept[0] == pytest.approx(7.1)
    assert clock.slept[1] == pytest.approx(0.7)
    assert 55 < clock.slept[2] < 61
    assert clock.slept[3] == pytest.approx(0.8)


@pytest.mark.parametrize("wait", ["31", "1e9", "inf"])
def test_a_wait_beyond_the_deadline_is_not_begun(wait: str, clock: Clock) -> None:
    script = Script(refusing(429, {"Retry-After": wait}))
    with script.running() as url, Client(url, timeout_s=30) as client, pytest.raises(MixerHttpError):
        client.search(b"x")
    assert clock.slept == []


def test_a_broken_connection_is_tried_again(clock: Clock) -> None:
    good = http(json.dumps(REPLY).encode())
    with raw(b"", b"HTTP/1.1 2", http(b"{", 1000), good) as (url, served), Client(url) as client:
        assert client.search(b"x").index == "i"
    assert len(served) == 4
    assert len(clock.slept) == 3


def test_where_nobody_answers_that_is_told(clock: Clock) -> None:
    with raw(b"") as (url, _):
        pass
    with Client(url, retries=2) as client, pytest.raises(MixerUnreachableError, match=f"{url} does not answer: "):
        client.status()
    assert len(clock.slept) == 2


def test_there_is_one_deadline_for_all_tries() -> None:
    began = time.monotonic()
    with Script(refusing(503)).running() as url, Client(url, timeout_s=0.3, retries=10**6) as client:
        began = time.monotonic()
        with pytest.raises(MixerHttpError):
            client.search(b"x")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("silent", [True, False])
def test_a_reply_that_does_not_come_or_does_not_end_meets_the_deadline(silent: bool) -> None:
    async def drip(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"  # it has no lifespan
        if silent:
            await asyncio.Event().wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:  # each byte in time, all of them never
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.02)

    with running(drip) as url, Client(url, timeout_s=0.3) as client:
        began = time.monotonic()
        with pytest.raises(MixerUnreachableError, match="does not answer"):
            client.status()
        assert time.monotonic() - began < 2


def test_the_service_is_told_how_long_there_is() -> None:
    script = Script(refusing(503), JSONResponse(REPLY))
    with script.running() as url, Client(url, timeout_s=20) as client:
        client.search(b"x")
    first, second = (int(each.headers["x-request-timeout-ms"]) for each in script.seen)
    assert 15_000 < second < first <= 20_000


def test_a_proxys_words_are_passed_on() -> None:
    script = Script(PlainTextResponse("<h1>Bad\ngateway</h1>", 502, {"X-Request-Id": "r-9"}))
    with script.running() as url, Client(url, retries=0) as client, pytest.raises(MixerHttpError) as error:
        client.status()
    said = error.value
    assert (said.status, said.code, said.message, said.request_id) == (502, "http_502", "<h1>Bad gateway</h1>", "r-9")


def test_a_redirect_is_not_followed_so_that_the_key_goes_nowhere_else() -> None:
    script = Script(Response(status_code=307, headers={"Location": "/elsewhere"}), JSONResponse(REPLY))
    with script.running() as url, Client(url, key="secret") as client, pytest.raises(MixerHttpError, match="307"):
        client.status()
    assert len(script.seen) == 1


def test_a_reply_of_something_else_is_told() -> None:
    said = "replies as no Mixer of this version does: "
    with (
        Script(JSONResponse({"hello": 1})).running() as url,
        Client(url) as client,
        pytest.raises(MixerUnreachableError, match=said),
    ):
        client.status()


def test_threads_may_share_a_client() -> None:
    script = Script(JSONResponse(REPLY))
    with script.running() as url, Client(url) as client:
        threads = [threading.Thread(target=client.similar, args=(str(n),)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(each.url.path for each in script.seen) == sorted(f"/v1/items/{n}/similar" for n in range(12))


def test_the_client_needs_neither_ray_nor_torch() -> None:
    code = "import sys, mixer_platform.serve.client; print({'ray', 'torch', 'faiss', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "platform", capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# --- the service itself


@pytest.fixture(scope="module")
def client(workspace: Any) -> Iterator[Client]:
    with service(workspace) as url, Client(url) as client:
        yield client


def test_it_searches(client: Client, workspace: Any, photo: Any) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        query = photo(1000, kind=kind)
        reply = client.search(query, k=5)
        assert [item.id for item in reply.items] == workspace.exact(workspace.embed(query), 5)
        assert (reply.index, reply.degraded) == ("index-a", False)
    following = client.search(query, k=5, offset=5)
    assert [item.id for item in following.items] == workspace.exact(workspace.embed(query), 10)[5:]
    red = client.search(query, filter={"colour": "red", "price": {"lte": 20}}, k=50).items
    assert red
    assert {item.attributes["colour"] for item in red} == {"red"}


def test_it_searches_for_several(client: Client, workspace: Any, photo: Any, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo(1000))
    good, bad = client.search_batch([path, b"no picture"], k=3, filter={"price": {"gte": 0}}).results
    assert isinstance(good, Page)
    assert [item.id for item in good.items] == workspace.exact(workspace.embed(photo(1000)), 3)
    assert isinstance(bad, ErrorReply)
    assert bad.error.code == "unreadable_image"


def test_it_looks_items_up(client: Client, workspace: Any) -> None:
    for item_id in ("item-003", "shop/no. 7?"):
        assert client.item(item_id).id == item_id
        assert item_id not in {item.id for item in client.similar(item_id, k=5).items}
    assert "colour" in {attribute.name for attribute in client.attributes()}
    assert client.status().items == len(workspace.item_ids)
    assert client.ready()


def test_its_errors_are_told(client: Client) -> None:
    with pytest.raises(MixerHttpError) as error:
        client.item("nothing")
    assert (error.value.status, error.value.code) == (404, "unknown_item")
    assert error.value.request_id
    with pytest.raises(MixerHttpError, match="the photo cannot be used: not a JPEG, PNG or WebP picture"):
        client.search(b"no picture")


def test_its_keys_are_asked_for(workspace: Any, photo: Any) -> None:
    key, entry = make_key("test", requests_per_second=0.001, burst=2)
    with service(workspace, (entry,)) as url:
        with Client(url) as client, pytest.raises(MixerHttpError, match="an API key is needed"):
            client.search(photo(1))
        with Client(url, key=key, timeout_s=5) as client:
            assert client.ready()
            assert client.search(photo(1), k=1).items
            assert client.status().index == "index-a"
            with pytest.raises(MixerHttpError) as error:
                client.status()
            assert error.value.code == "rate_limited"


def test_readiness_of_what_is_not_there() -> None:
    with Client("http://127.0.0.1:1") as client:
        assert not client.ready()
    script = Script(refusing(503))
    with script.running() as url, Client(url) as client:
        assert not client.ready()
    assert len(script.seen) == 1
    with Script(refusing(404)).running() as url, Client(url) as client, pytest.raises(MixerHttpError):
        client.ready()


def test_a_pool_of_ones_own_is_used() -> None:
    script = Script(JSONResponse(REPLY))
    with script.running() as url, Client(url, pool=urllib3.PoolManager(headers={}, maxsize=1)) as client:
        client.similar("a")
    assert len(script.seen) == 1
