"""How the page's files are served: what they are, who may frame or extend them, what is kept."""

from __future__ import annotations

import re

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from mixer_platform.serve.page import FOLDER, add_page


@pytest.fixture(scope="module")
def client() -> TestClient:
    api = FastAPI()
    add_page(api)
    return TestClient(api)


def test_the_page_and_its_parts_are_served_and_nothing_else(client: TestClient):
    assert client.get("/").text == (FOLDER / "index.html").read_text()
    assert client.get("/page/page.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.get("/page/page.css").headers["content-type"] == "text/css; charset=utf-8"
    assert client.head("/").headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/page/nothing.js", "/page/..%2fapi.py", "/page/"):
        assert client.get(path).status_code == 404


def test_the_openapi_page_does_not_mention_it(client: TestClient):
    assert client.get("/openapi.json").json()["paths"] == {}


def test_the_policy_allows_nothing_from_elsewhere(client: TestClient):
    for path in ("/", "/page/page.js"):
        headers = client.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'"
        assert policy["img-src"] == "'self' blob:"
        assert policy["frame-ancestors"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_what_did_not_change_is_not_sent_again(client: TestClient):
    first = client.get("/page/page.css")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        again = client.get("/page/page.css", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/page/page.js", headers={"If-None-Match": tag}).status_code == 200


def test_all_that_the_page_names_is_there_and_nothing_is_from_elsewhere():
    for path in FOLDER.iterdir():
        text = path.read_text()
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), path.name
        named = re.findall(r"""(?:from '\./|(?:src|href)="page/)([\w.]+)""", text)
        assert all((FOLDER / name).exists() for name in named), path.name


def test_the_page_holds_no_script_or_style_of_its_own():
    html = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script[^>]*>", html) == ['<script type="module" src="page/page.js">']
    assert not re.search(r"<style|\sstyle=|\son\w+=", html)
