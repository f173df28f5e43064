"""Whatever is sent, the service answers: with what was asked for, or with a sentence; it never fails itself."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.hostile import bombs, liars, mutations, polyglots, seeds
from tests.serve.servers import create_service

JSON = {"content-type": "application/json"}
BOUNDARY = "multipart/form-data; boundary=b"
KNOWN = {200, 403, 404, 405, 413, 415, 422}


@pytest.fixture(scope="module")
def client(workspace: Any) -> Iterator[TestClient]:
    with TestClient(create_service(workspace)) as client:  # an exception that nobody expected ends the test
        yield client


def check(reply: Any) -> str | None:
    """Return the code of the error, None for a result."""
    assert reply.status_code in KNOWN, reply.text
    if reply.status_code == 200:
        return None
    error = reply.json()["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    assert len(error["message"]) < 1000
    return error["code"]


def part(name: str, body: bytes, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + body + b"\r\n"


def form(*parts: bytes) -> dict[str, Any]:
    return {"content": b"".join(parts) + b"--b--\r\n", "headers": {"content-type": BOUNDARY}}


def as_json(value: Any) -> dict[str, Any]:
    return {"content": value if isinstance(value, bytes) else json.dumps(value).encode(), "headers": JSON}


PHOTO = seeds()["png palette"]
TEXT = base64.b64encode(PHOTO).decode()
FILE = part("photo", PHOTO, '; filename="a"')


def test_hostile_photos_are_answered_in_every_kind_of_body(client: TestClient) -> None:
    sent = {
        **polyglots(),
        **liars(),
        **{name: make() for name, make in bombs().items() if name in ("scans", "exif in png")},
    }
    for data in sent.values():
        if len(data) > 700_000:
            continue
        codes = {
            check(client.post("/v1/search", content=data, headers={"content-type": "image/png"})),
            check(client.post("/v1/search", files={"photo": ("photo", data)})),
            check(client.post("/v1/search", json={"image": base64.b64encode(data).decode()})),
        }
        assert codes in ({None}, {"unreadable_image"})


def fuzz_photos(client: TestClient, count: int, seed: int) -> None:
    for whole in seeds().values():
        for data in mutations(whole, count, seed):
            code = check(client.post("/v1/search", content=data, headers={"content-type": "image/jpeg"}))
            assert code in (None, "unreadable_image")


def fuzz_bodies(client: TestClient, count: int, seed: int) -> None:
    """Mutations of whole requests: their forms' boundaries, their JSON's braces."""
    forms = form(FILE, part("k", b"3"), part("filter", b'{"price": {"gte": 1}}'))
    texts = as_json({"image": TEXT, "k": 3, "offset": 2, "filter": {"colour": ["red", "blue"]}, "group_by": "look"})
    several = as_json({"images": [TEXT, TEXT], "k": 3})
    for path, whole in (("/v1/search", forms), ("/v1/search", texts), ("/v1/search/batch", several)):
        assert check(client.post(path, **whole)) is None
        for content in mutations(whole["content"], count, seed):
            check(client.post(path, content=content, headers=whole["headers"]))


def test_mutated_requests_are_answered(client: TestClient) -> None:
    fuzz_photos(client, 5, seed=0)
    fuzz_bodies(client, 60, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_very_many_mutated_requests_are_answered(client: TestClient, seed: int) -> None:
    fuzz_photos(client, 100, seed)
    fuzz_bodies(client, 1000, seed)


DEEP = b"[" * 100_000
FIELDS: list[Any] = [
    {"k": 10**400}, {"k": -(10**400)}, {"k": 1.5}, {"k": True}, {"k": None}, {"k": "3" * 5000}, {"k": [1]}, {"k": {}},
    {"offset": 2**63}, {"offset": -1}, {"offset": "0x10"}, {"min_probability": 2}, {"min_probability": "nan"},
    {"min_probability": 1e400}, {"group_by": ""}, {"group_by": "\0"}, {"group_by": "price\n"},
    {"group_by": "x" * 10_000},
    {"filter": []}, {"filter": "{"}, {"filter": {"": 1}}, {"filter": {"price": {}}},
    {"filter": {"price": {"gte": "x"}}},
    {"filter": {"price": {"$where": "1"}}}, {"filter": {"price": 10**400}}, {"filter": {"colour": [None]}},
    {"filter": {"colour": ["red"] * 50_000}}, {"filter": {"colour": [[["red"]]]}}, {"filter": {"colour": {"gte": {}}}},
    {"filter": {"colour": "\ud800"}}, {"filter": {f"a{n}": n for n in range(10_000)}},
    {"filter": {"price": {"gte": [1]}}},
    {"filter": {"__proto__": 1, "embedding": 1}}, {"filter": {"id": 1}}, {"image": "\ud800"}, {"image": "A" * 999},
    {"image": None}, {"url": "http://169.254.169.254/"}, {"url": "file:///etc/passwd"}, {"url": "x" * 10_000}, {"x": 1},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: str(fields)[:40])
def test_senseless_fields_are_refused(client: TestClient, fields: dict[str, Any]) -> None:
    reply = client.post("/v1/search", **as_json({"image": TEXT, **fields}))
    assert check(reply) or fields == {"k": True}  # which Python takes for 1


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"0", b'"x"', b"[]", DEEP, DEEP + b"]" * 100_000, b'{"image":' * 50_000, b'{"k": NaN}',
     b"\xff\xfe{\0}\0",
     b'{"filter": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, b"\x00" * 1000, b"{" * 999_999,
     b'{"image": "' + b"A" * 900_000, b'{"k": ' + b"1" * 900_000 + b"}"],
    ids=lambda content: str(content[:30]),
)  # fmt: skip
def test_senseless_json_is_refused(client: TestClient, content: bytes) -> None:
    for path in ("/v1/search", "/v1/search/batch"):
        assert check(client.post(path, **as_json(content))) == "invalid_request"


@pytest.mark.parametrize(
    "request_",
    [
        form(), form(FILE, FILE), form(part("photo", b"x")), form(FILE, part("k", b"3", '; filename="k"')),
        form(FILE, part("k", b"\xff")), form(FILE, part("filter", DEEP)), form(*[part("k", b"1")] * 17, FILE),
        form(*[FILE] * 50), form(FILE, part("\xfc", b"")),
        form(FILE, part("k", b"3"), part("k", b"x")), form(FILE, part("k" * 100_000, b"3")), form(FILE[:40]),
        {"content": FILE, "headers": {"content-type": "multipart/form-data"}},
        {"content": FILE, "headers": {"content-type": "multipart/form-data; boundary="}},
        {"content": FILE, "headers": {"content-type": "multipart/form-data; boundary=" + "b" * 10_000}},
        {"content": b"--b\r\n" * 100_000, "headers": {"content-type": BOUNDARY}},
        {"content": b"--b\r\n" + b"A: " + b"x" * 900_000, "headers": {"content-type": BOUNDARY}},
        {"content": b"--b\r\n" + b"A: b\r\n" * 100_000, "headers": {"content-type": BOUNDARY}},
        {"content": gzip.compress(FILE), "headers": {"content-type": BOUNDARY, "content-encoding": "gzip"}},
        {"content": b"k=1", "headers": {"content-type": "application/x-www-form-urlencoded"}},
        {"content": PHOTO, "headers": {"content-type": "image/gif"}},
        {"content": PHOTO, "headers": {"content-type": "image/svg+xml"}},
        {"content": PHOTO},
    ],
    ids=range(23),
)  # fmt: skip
def test_senseless_forms_are_refused(client: TestClient, request_: dict[str, Any]) -> None:
    for path in ("/v1/search", "/v1/search/batch"):
        assert check(client.post(path, **request_)) in ("invalid_request", "unsupported_media_type")


@pytest.mark.parametrize(
    ("value", "status"),
    [("nan", 422), ("x", 422), ("", 422), ("0x1", 422), ("٣", 422), ("-1", 503), ("-inf", 503), ("inf", 200),
     ("1e400", 200)],
)  # fmt: skip
def test_senseless_timeouts_are_answered(client: TestClient, value: str, status: int) -> None:
    reply = client.get("/v1/items/item-003/similar", headers={"x-request-timeout-ms": value.encode()})
    assert reply.status_code == status, reply.text
    assert status == 200 or reply.json()["error"]["message"]


@pytest.mark.parametrize("value", ["x", "-1", "1,1", "", "9" * 100, " 5 "])
def test_senseless_lengths_are_answered(client: TestClient, value: str) -> None:
    reply = client.post("/v1/search", content=PHOTO, headers={"content-type": "image/png", "content-length": value})
    assert check(reply) is None or reply.status_code in (413, 422)


@pytest.mark.parametrize(
    "item",
    ["", "/", "%00", "%ff", "%2e%2e%2f", "a/similar", "x" * 5000, "\u202e", "%252e%252e", "%F0%9F%98%80", "item-003/",
     "null", "' OR 1=1 --", "{{7*7}}", "<script>", "%0d%0aSet-Cookie:%20a=b"],
)  # fmt: skip
@pytest.mark.parametrize("end", ["", "/similar", "/image"])
def test_senseless_items_are_unknown(client: TestClient, item: str, end: str) -> None:
    reply = client.get(f"/v1/items/{item}{end}")
    assert check(reply) in ("unknown_item", "not_found", "no_picture", "invalid_request")
    assert "set-cookie" not in reply.headers


def test_random_queries_are_answered(client: TestClient) -> None:
    rng = np.random.default_rng(0)
    names = ["k", "offset", "filter", "group_by", "min_probability", "x", "k[]", ""]
    values = ["1", "-1", "", "{}", '{"price":{"lte":3}}', "look", "null", "%", "\x00", "1e9", "٣", " 1", "1_0"]
    for _ in range(200):
        query = [(str(rng.choice(names)), str(rng.choice(values))) for _ in range(rng.integers(1, 5))]
        check(client.get("/v1/items/item-003/similar", params=query))
