"""Who may ask, how often, and what they are told if not."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from mixer_platform.config import ServeConfig, load_config
from mixer_platform.errors import ConfigError
from mixer_platform.serve.errors import ApiError
from mixer_platform.serve.keys import ApiKey, Authenticate, Bucket, Keys, add_guards, find_key, key_ring, make_key

ROOT = Path(__file__).parents[2]


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def told(request: Request) -> PlainTextResponse:
    return PlainTextResponse(getattr(request.state, "client", "nobody"))


async def talk(socket: WebSocket) -> None:
    await socket.accept()
    await socket.close()


def client_of(*ring: ApiKey, clock: Any = None, root_path: str = "") -> TestClient:
    routes = [
        *(Route(path, told) for path in ("/", "/healthz", "/readyz", "/page/app.js", "/v1/search", "/docs", "/page")),
        WebSocketRoute("/v1/talk", talk),
    ]
    api = Starlette(routes=routes)
    keys = Keys(ring, clock) if clock else Keys(ring)
    add_guards(api, keys, ["https://shop.example"])
    return TestClient(Starlette(routes=[Mount(root_path, api)]) if root_path else api)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- keys


def test_a_key_is_long_random_and_kept_as_its_hash_alone() -> None:
    key, entry = make_key("shop")
    other, _ = make_key("shop")
    assert key != other
    assert len(key.removeprefix("mixer_")) == 43  # 256 bits
    assert entry.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert key not in repr(entry)


def test_each_key_is_found_and_no_other_is() -> None:
    made = [make_key(f"client {n}") for n in range(5)]
    ring = tuple(entry for _, entry in made)
    for key, entry in made:
        assert find_key(ring, key) is entry
    key, entry = made[0]
    for wrong in ("", key[:-1], key + "x", key.upper(), entry.sha256, "Ünïcode", make_key("shop")[0]):
        assert find_key(ring, wrong) is None


@pytest.mark.parametrize("place", [0, 2, 4, None])
def test_every_entry_is_compared_in_constant_time_wherever_the_right_one_is(
    place: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [make_key(f"client {n}") for n in range(5)]
    compared: list[str] = []
    plain = hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        compared.append(one)
        return plain(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    find_key(tuple(entry for _, entry in made), "nobody's" if place is None else made[place][0])
    assert compared == [entry.sha256 for _, entry in made]


# --- configuration


def test_keys_come_from_a_file_or_the_environment_and_the_file_goes_first(tmp_path: Path) -> None:
    (_, one), (_, other) = make_key("one", requests_per_second=2.5, burst=3), make_key("other")
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump([one.model_dump()]))
    as_json = f"[{other.model_dump_json()}]"
    assert key_ring(ServeConfig(keys_file=str(path)), {}) == (one,)
    assert key_ring(ServeConfig(), {"MIXER_API_KEYS": as_json}) == (other,)
    assert key_ring(ServeConfig(keys_file=str(path)), {"MIXER_API_KEYS": as_json}) == (one,)


def refusal(config: ServeConfig, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        key_ring(config, environ or {})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("environ", [{}, {"MIXER_API_KEYS": ""}, {"MIXER_API_KEYS": " \n"}])
def test_neither_keys_nor_the_word_that_none_are_wanted_is_refused(environ: dict[str, str]) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        said = refusal(ServeConfig(host=host), environ)
        assert said.startswith("serve.keys_file: no API keys; name a file of them, set MIXER_API_KEYS")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "192.168.1.2", "shop.example", "localhost.example", ""])
def test_off_is_refused_where_others_reach_it(host: str) -> None:
    _, entry = make_key("shop")
    said = refusal(ServeConfig(keys=False, host=host), {"MIXER_API_KEYS": f"[{entry.model_dump_json()}]"})
    assert said.startswith(f"serve.keys: off, but serve.host is {host}: whoever reaches it could ask; set serve.host=")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_off_is_taken_on_this_machine(host: str) -> None:
    assert key_ring(ServeConfig(keys=False, host=host), {}) is None


SHA = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not YAML or JSON; it should hold a list of API keys"),
        ("{}", "the whole: input should be a valid tuple"),
        ("[]", "the whole: tuple should have at least 1 item after validation, not 0"),
        ("[{name: a}]", "0.sha256: field required"),
        (f"[{{sha256: '{SHA}'}}]", "0.name: field required"),
        ("[{name: a, sha256: mixer_the-key-itself}]", "0.sha256: string should match pattern"),
        (f"[{{name: a, sha256: '{SHA.upper()}'}}]", "0.sha256: string should match pattern"),
        (f"[{{name: a, sha256: '{SHA}', rate: 3}}]", "0.rate: extra inputs are not permitted"),
        (f"[{{name: a, sha256: '{SHA}', requests_per_second: 0}}]", "0.requests_per_second: input should be greater"),
        (f"[{{name: a, sha256: '{SHA}'}}, {{name: b, sha256: '{SHA}'}}]", "a: another key has the same sha256"),
        (f"[{{name: a, sha256: '{SHA}'}}, {{name: a, sha256: '{SHA[::-1]}'}}]", "a: another key has the same name"),
    ],
)
def test_wrong_entries_are_named_and_never_quoted(text: str, said: str) -> None:
    found = refusal(ServeConfig(), {"MIXER_API_KEYS": text})
    assert found.startswith(f"MIXER_API_KEYS: {said}")
    assert "the-key-itself" not in found


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    assert refusal(ServeConfig(keys_file=str(path))) == (
        f"serve.keys_file: {path}: No such file or directory; name a readable file"
    )
    path.write_bytes(b"\xff\xfe\x00")
    assert refusal(ServeConfig(keys_file=str(path))) == f"{path}: not text; it should hold a list of API keys"


@pytest.mark.parametrize("name", ["demo", "local"])
def test_configurations_of_one_machine_say_off(name: str) -> None:
    path = ROOT / f"jobs/configs/{name}.yaml"
    assert key_ring(load_config(path).serve, {}) is None
    assert "keys: off" in path.read_text()
    assert "serve.keys: off" in refusal(load_config(path, ["serve.host=0.0.0.0"]).serve)


def test_production_asks_for_keys(tmp_path: Path) -> None:
    path = ROOT / "jobs/configs/production.yaml"
    _, entry = make_key("shop")
    environ = {"MIXER_API_KEYS": f"[{entry.model_dump_json()}]"}
    assert key_ring(load_config(path).serve, environ) == (entry,)
    assert refusal(load_config(path).serve).startswith("serve.keys_file: no API keys")
    assert refusal(load_config(path, ["serve.keys=off"]).serve, environ).startswith("serve.keys: off, but")


# --- the middleware


def test_a_key_is_taken_in_either_header_and_its_name_is_passed_on() -> None:
    (one, first), (other, second) = make_key("one"), make_key("other")
    client = client_of(first, second)
    for headers in (bearer(one), {"authorization": f"bearer  {one} "}, {"X-API-Key": one}):
        assert client.get("/v1/search", headers=headers).text == "one"
    assert client.get("/v1/search", headers=bearer(other)).text == "other"
    # a proxy before the service may use Authorization for itself
    assert client.get("/v1/search", headers={"Authorization": "Basic eDp5", "X-API-Key": other}).text == "other"


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/page/app.js"])
def test_probes_and_the_page_need_no_key(path: str) -> None:
    _, entry = make_key("shop")
    for root in ("", "/mixer"):
        assert client_of(entry, root_path=root).get(root + path).text == "nobody"


@pytest.mark.parametrize(
    "path",
    ["/v1/search", "/docs", "/openapi.json", "/nothing", "/page", "/healthz/", "//", "/healthz/../v1/search",
     "/page%2e/app.js", "/v1/search?/page/", "/v1/search#/healthz", "/v1/page/"],
)  # fmt: skip
@pytest.mark.parametrize("root", ["", "/mixer", "/page"])
def test_everything_else_does(path: str, root: str) -> None:
    _, entry = make_key("shop")
    client = client_of(entry, root_path=root)
    assert client.get(f"http://testserver{root}{path}").status_code == 401


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE"])
def test_every_method_needs_a_key(method: str) -> None:
    assert client_of(make_key("shop")[1]).request(method, "/v1/search").status_code == 401


@pytest.mark.parametrize(
    ("headers", "challenge", "said"),
    [
        ({}, 'Bearer realm="mixer"', "an API key is needed; send it as `Authorization: Bearer KEY` or"),
        ({"Authorization": "Bearer "}, 'Bearer realm="mixer"', "an API key is needed; "),
        ({"Authorization": "Basic eDp5"}, 'Bearer realm="mixer"', "an API key is needed; "),
        (bearer("wrong"), 'Bearer realm="mixer", error="invalid_token"', "the API key is not known here; "),
        ({"X-API-Key": "ü".encode("latin-1")}, 'Bearer realm="mixer", error="invalid_token"', "the API key is not"),
    ],
)
def test_a_refusal_has_the_shape_of_every_error(headers: Any, challenge: str, said: str) -> None:
    reply = client_of(make_key("shop")[1]).get("/v1/search", headers={**headers, "x-request-id": "r-1"})
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == challenge
    error = reply.json()["error"]
    assert (error["code"], error["request_id"]) == ("unauthorized", "r-1")
    assert error["message"].startswith(said)
    assert "wrong" not in reply.text


def test_a_websocket_needs_a_key_too() -> None:
    key, entry = make_key("shop")
    client = client_of(entry)
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/talk"):
        pass
    with client.websocket_connect("/v1/talk", headers=bearer(key)):
        pass


def test_a_refused_body_is_not_read_and_nothing_behind_is_called() -> None:
    sent: list[Any] = []

    async def never(*_: Any) -> Any:
        raise AssertionError("called")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/search", "headers": []}
    asyncio.run(Authenticate(never, Keys((make_key("shop")[1],)))(scope, never, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "content-type"])
def test_a_browser_may_ask_before_it_sends_the_key_and_read_the_refusal(header: str) -> None:
    client = client_of(make_key("shop")[1])
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = header
    reply = client.options("/v1/search", headers=asked)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    refused = client.get("/v1/search", headers={"Origin": "https://shop.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://shop.example")
    assert refused.headers["access-control-expose-headers"] == "Retry-After, X-Request-ID"


def test_pages_of_other_origins_may_not_ask() -> None:
    key, entry = make_key("shop")
    client = client_of(entry)
    asked = {"Origin": "https://other.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/search", headers=asked).status_code == 400
    for reply in (
        client.options("/v1/search", headers=asked),
        client.get("/v1/search", headers={"Origin": "https://other.example", **bearer(key)}),
    ):
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("origin", ["https://shop.example/", "shop.example", "https://shop.example/page", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError):
        ServeConfig(cors_origins=(origin,))
    assert ServeConfig(cors_origins=("*", "http://localhost:3000")).cors_origins == ("*", "http://localhost:3000")


def test_without_a_ring_nobody_is_asked_for_a_key() -> None:
    api = Starlette(routes=[Route("/v1/search", told)])
    add_guards(api, None, [])
    assert TestClient(api).get("/v1/search").text == "nobody"


def test_an_empty_ring_lets_nobody_in() -> None:
    api = Starlette(routes=[Route("/v1/search", told)])
    add_guards(api, Keys(()), [])
    assert TestClient(api).get("/v1/search").status_code == 401


# --- rates


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    bucket = Bucket(rate=2, burst=3, now=10)
    assert [bucket.take(10) for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert bucket.take(10.25) == 0.25
    assert bucket.take(10.5) == 0
    assert bucket.take(10.5) == 0.5
    assert [bucket.take(1000) for _ in range(4)] == [0, 0, 0, 0.5]  # no more than the burst is saved up


def test_each_key_has_its_own_rate_and_is_told_when_to_come_back() -> None:
    (slow, first), (fast, second), (free, third) = (
        make_key("slow", requests_per_second=0.25, burst=2),
        make_key("fast", requests_per_second=100, burst=1),
        make_key("free"),
    )
    clock = Clock()
    client = client_of(first, second, third, clock=clock)
    assert [client.get("/v1/search", headers=bearer(slow)).status_code for _ in range(4)] == [200, 200, 429, 429]
    reply = client.get("/v1/search", headers=bearer(slow))
    assert reply.headers["retry-after"] == "4"
    assert reply.json()["error"]["code"] == "rate_limited"
    assert reply.json()["error"]["message"] == "slow asks more than 0.25 times a second; ask less often"
    assert client.get("/v1/search", headers=bearer(fast)).status_code == 200
    assert client.get("/v1/search", headers=bearer(fast)).headers["retry-after"] == "1"
    assert {client.get("/v1/search", headers=bearer(free)).status_code for _ in range(50)} == {200}
    assert client.get("/healthz", headers=bearer(slow)).status_code == 200
    clock.now += 4
    assert [client.get("/v1/search", headers=bearer(slow)).status_code for _ in range(2)] == [200, 429]


# --- another file


def test_a_key_is_added_and_revoked_while_others_ask_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (lasting, first), (leaked, second), (new, third) = (
        make_key("a", requests_per_second=0.1, burst=3),
        *(make_key(name) for name in ("b", "c")),
    )
    path = tmp_path / "keys.yaml"

    def write(text: str) -> None:
        staged = tmp_path / "staged"
        staged.write_text(text)
        staged.rename(path)

    def may(keys: Keys, key: str) -> bool:
        try:
            return bool(keys.admit(key))
        except ApiError:
            return False

    async def until(condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def change() -> None:
        write(as_yaml(first, second))
        keys = Keys((first, second), Clock())
        assert (may(keys, lasting), may(keys, leaked), may(keys, new)) == (True, True, False)
        following = asyncio.create_task(keys.follow(str(path), 0.01))
        write(as_yaml(first, third))
        await until(lambda: third in keys.ring)
        assert (may(keys, leaked), may(keys, new)) == (False, True)
        assert [may(keys, lasting) for _ in range(3)] == [True, True, False]  # of three, one was asked before
        for broken, said in (
            ("[", "not YAML"),
            ("[]", "the whole: "),
            ("- name: x", "sha256"),
            ("[" * 5000, "recursion"),
        ):
            caplog.clear()
            write(broken)
            await until(lambda said=said: said in caplog.text)
            assert may(keys, new)
        path.unlink()
        await until(lambda: "No such file" in caplog.text)
        write(as_yaml(second))
        await until(lambda: keys.ring == (second,))
        assert (may(keys, leaked), may(keys, new)) == (True, False)
        following.cancel()

    asyncio.run(change())
    assert caplog.text.count("No such file") == 1


def as_yaml(*entries: ApiKey) -> str:
    return yaml.safe_dump([entry.model_dump(exclude_none=True) for entry in entries])


# --- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mixer_platform.serve.keys", *arguments]
    return subprocess.run(line, cwd=ROOT / "platform", env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_the_command_tells_the_key_once_and_writes_an_entry_that_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    done = [command("shop"), command("app", "--requests-per-second", "5", "--burst", "9")]
    path.write_text("".join(each.stdout for each in done))
    ring = key_ring(ServeConfig(keys_file=str(path)), {})
    assert ring is not None
    assert [(entry.name, entry.requests_per_second, entry.burst) for entry in ring] == [
        ("shop", None, 20),
        ("app", 5, 9),
    ]
    for each, entry in zip(done, ring, strict=True):
        key = each.stderr.split()[-1]
        assert find_key(ring, key) == entry
        assert key not in each.stdout


def test_the_command_refuses_limits_that_make_no_sense() -> None:
    done = command("shop", "--burst", "0")
    assert done.returncode == 2
    assert "burst: input should be greater than or equal to 1" in done.stderr
    assert not done.stdout
