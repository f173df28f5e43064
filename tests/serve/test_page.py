"""The search page in a headless Chromium, over the real service; only what must go wrong is made up on the way."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from PIL import Image

pytest.importorskip("playwright", reason="playwright, of the extra `dev`, is not installed")

from playwright.sync_api import Browser, Locator, Page, Route, expect

from mixer_platform.simulate.emoji import DownloadError
from tests.browser import NoBrowser, axe, chromium

Photo = Callable[..., bytes]
Open = Callable[..., Page]

TURNED = 6  # EXIF: what is stored has to be turned by 90 degrees to be upright
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        running = chromium()
        browser = running.__enter__()
    except NoBrowser as reason:
        pytest.skip(str(reason))
    yield browser
    running.__exit__(None, None, None)


@pytest.fixture(scope="module")
def axe_source() -> str:
    try:
        return axe()
    except DownloadError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def open_page(browser: Browser, report: dict[str, Any]) -> Iterator[Open]:
    """Open the page; at the end of the test, nothing may have gone wrong in it or left the service's address."""
    contexts, wrong = [], []

    def open_page(path: str = "/", before: Callable[[Page], None] = lambda page: None, **settings: Any) -> Page:
        context = browser.new_context(reduced_motion="reduce", **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None)
        page.on("request", lambda request: outside(request.url))
        before(page)
        page.goto(report["url"] + path)
        return page

    def outside(url: str) -> None:
        if not url.startswith((report["url"], f"blob:{report['url']}")):
            wrong.append(url)

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def show(page: Page, content: bytes, name: str = "photo.jpg", kind: str = "image/jpeg") -> None:
    page.locator("#pick").set_input_files({"name": name, "mimeType": kind, "buffer": content})


def choose(content: bytes) -> Callable[[Page], None]:
    """Return what makes a page's file dialogs answer with a photo."""
    file = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": content}
    return lambda page: page.on("filechooser", lambda chooser: chooser.set_files(file))


def ids(page: Page, expected: list[str] | None = None) -> list[str]:
    """Return the items that are shown once the page is at rest, or once they are the expected ones."""
    expect(page.locator(".card h3").first).to_be_visible()
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    if expected is not None:
        page.wait_for_function("wanted => document.querySelector('.card').dataset.id === wanted", arg=expected[0])
    return page.locator(".card").evaluate_all("cards => cards.map((card) => card.dataset.id)")


def side_by_side(*photos: bytes) -> bytes:
    pictures = [Image.open(io.BytesIO(each)).resize((800, 600), Image.Resampling.NEAREST) for each in photos]
    whole = Image.new("RGB", (800 * len(pictures), 600))
    for place, picture in enumerate(pictures):
        whole.paste(picture, (800 * place, 0))
    file = io.BytesIO()
    whole.save(file, "PNG")
    return file.getvalue()


def test_a_photo_finds_its_item(open_page: Open, workspace: Any, photo: Photo):
    page = open_page()
    expect(page.get_by_role("heading", name="Find it by a photo")).to_be_visible()
    expect(page.locator("#catalogue")).to_have_text("60 items")
    show(page, photo(5))
    assert ids(page, ["item-005"]) == workspace.exact(workspace.embed(photo(5)), 24)
    first = page.locator(".card").first
    expect(first).to_contain_text("Item 5")
    expect(first).to_contain_text("Similarity 1.00")
    expect(first).to_contain_text("Price 2.5", use_inner_text=True)
    expect(page.locator("#latency")).to_contain_text("Encode")
    expect(page.locator("#latency")).to_contain_text("Round trip")
    expect(page.get_by_role("status")).to_have_text("24 items. Nearest: Item 5.")
    expect(page.locator("#results-title")).to_be_focused()
    page.wait_for_function("() => document.querySelector('.card img').naturalWidth === 40")


def test_more_like_this_and_the_way_back(open_page: Open, workspace: Any, photo: Photo):
    page = open_page()
    show(page, photo(5))
    ids(page, ["item-005"])
    page.get_by_role("button", name="More like this: Item 5", exact=True).click()
    expected = workspace.exact(workspace.embeddings[5], 25)[1:]
    assert ids(page, expected) == expected
    assert page.url.endswith("/?like=item-005")
    expect(page.get_by_role("heading", name="More like this")).to_be_visible()
    expect(page.locator("#latency")).not_to_contain_text("Encode")
    page.wait_for_function("() => document.querySelector('#like').naturalWidth === 40")
    page.go_back()
    ids(page, ["item-005"])
    expect(page.get_by_role("heading", name="Your photo")).to_be_visible()
    page.go_forward()
    ids(page, expected)
    page.get_by_role("button", name="Back to your photo").click()
    ids(page, ["item-005"])


def test_an_address_leads_to_what_is_like_an_item_of_any_name(open_page: Open, workspace: Any):
    expected = workspace.exact(workspace.embeddings[7], 25)[1:]
    page = open_page("/?like=shop%2Fno.%207%3F")
    assert ids(page, expected) == expected
    expect(page.locator("#caption")).to_have_text("Item 7")
    expect(page.get_by_role("button", name="Back to your photo")).to_be_hidden()


def test_more_items_follow_and_get_the_focus(open_page: Open, workspace: Any, photo: Photo):
    page = open_page()
    show(page, photo(5))
    ids(page, ["item-005"])
    page.get_by_role("button", name="More", exact=True).click()
    expect(page.locator(".card")).to_have_count(48)
    assert ids(page) == workspace.exact(workspace.embed(photo(5)), 48)
    expect(page.locator(".card").nth(24).get_by_role("button")).to_be_focused()


def test_a_text_file_is_refused_in_the_service_s_words(open_page: Open, photo: Photo):
    page = open_page(before=choose(photo(5)))
    show(page, b"not a picture", "notes.txt", "text/plain")
    notice = page.locator("#notice")
    expect(notice).to_contain_text("The photo cannot be used: not a JPEG, PNG or WebP picture.")
    expect(notice.locator("code")).to_have_text(re.compile(r"^[\w-]{16,}$"))
    expect(page.get_by_role("status")).to_contain_text("cannot be used")
    expect(page.locator(".card")).to_have_count(0)
    expect(notice.get_by_role("button")).to_be_focused()
    notice.get_by_role("button", name="Choose another photo").click()
    ids(page, ["item-005"])
    expect(notice).to_be_hidden()


def test_a_large_photo_is_turned_upright_and_scaled_down(open_page: Open, photo: Photo):
    page = open_page()
    upright = Image.open(io.BytesIO(photo(5, size=(2000, 1500), kind="PNG")))
    stored, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = TURNED
    file = io.BytesIO()
    stored.save(file, "JPEG", exif=exif, quality=95)
    show(page, file.getvalue())
    ids(page, ["item-005"])
    assert page.locator("#photo").evaluate("canvas => [canvas.width, canvas.height]") == [1024, 768]


def test_what_only_the_browser_reads_is_sent_as_jpeg(open_page: Open, photo: Photo):
    page = open_page()
    content = photo(5, size=(1200, 900), kind="BMP")
    assert len(content) > 1_000_000  # the service takes less
    show(page, content, "photo.bmp", "image/bmp")
    ids(page, ["item-005"])


def test_a_part_of_the_photo_by_keyboard(open_page: Open, photo: Photo):
    page = open_page()
    show(page, side_by_side(photo(5), photo(9)), "two.png", "image/png")
    ids(page)
    page.get_by_role("button", name="Crop").press("Enter")
    expect(page.get_by_role("slider", name="Left edge")).to_be_focused()
    page.keyboard.press("Home")
    for keys in (["Tab", "Home"], ["Tab", *["PageDown"] * 4], ["Tab", "End"]):
        for key in keys:
            page.keyboard.press(key)
    page.get_by_role("slider", name="Right edge").fill("50")
    expect(page.get_by_role("slider", name="Right edge")).to_have_attribute("aria-valuetext", "50 % from the left")
    page.get_by_role("button", name="Search this part").press("Enter")
    ids(page, ["item-005"])


@pytest.mark.parametrize("settings", [{}, PHONE], ids=["mouse", "touch"])
def test_a_part_of_the_photo_by_pointer(open_page: Open, photo: Photo, settings: dict[str, Any]):
    page = open_page(**settings)
    show(page, side_by_side(photo(5), photo(9)), "two.png", "image/png")
    ids(page)
    page.get_by_role("button", name="Crop").click()
    page.locator("#stage").scroll_into_view_if_needed()
    box = page.locator("#photo").bounding_box()
    assert box is not None
    for edges, to in (("right bottom", (1, 1)), ("left top", (0.5, 0))):
        drag(
            page,
            page.locator(f"[data-edges='{edges}']"),
            box["x"] + to[0] * box["width"],
            box["y"] + to[1] * box["height"],
        )
    page.get_by_role("button", name="Search this part").click()
    ids(page, ["item-009"])
    page.get_by_role("button", name="Crop").click()
    expect(page.locator("#frame")).to_be_hidden()


def drag(page: Page, handle: Locator, x: float, y: float) -> None:
    box = handle.bounding_box()
    assert box is not None
    start = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    if not page.evaluate("navigator.maxTouchPoints"):
        page.mouse.move(**start)
        page.mouse.down()
        page.mouse.move(x, y, steps=3)
        page.mouse.up()
        return
    finger = page.context.new_cdp_session(page)
    for kind, points in (("touchStart", [start]), ("touchMove", [{"x": x, "y": y}]), ("touchEnd", [])):
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def test_filters_narrow_the_results_and_are_cleared(open_page: Open, workspace: Any, photo: Photo):
    page = open_page()
    show(page, photo(5))
    ids(page, ["item-005"])
    page.get_by_role("spinbutton", name="from").fill("10")
    page.get_by_role("spinbutton", name="to").fill("11")
    expect(page.locator(".card")).to_have_count(3)
    assert set(ids(page)) == {"item-020", "item-021", "item-022"}
    expect(page.locator("#filter-count")).to_have_text("1 set")
    expect(page.get_by_role("spinbutton", name="to")).to_be_focused()
    page.get_by_role("spinbutton", name="from").fill("1000")
    expect(page.locator("#notice")).to_contain_text("No item passes these filters.")
    page.locator("#notice").get_by_role("button", name="Clear filters").click()
    ids(page, ["item-005"])
    expect(page.locator("#filter-count")).to_be_hidden()


def test_there_is_a_filter_for_every_kind_of_attribute(open_page: Open):
    described = [
        {"name": "brand", "kind": "text", "values": [f"brand {n}" for n in range(9)], "min": None, "max": None},
        {"name": "description", "kind": "text", "values": ["long"], "min": None, "max": None},
        {"name": "sku", "kind": "text", "values": None, "min": None, "max": None},
        {"name": "price", "kind": "number", "values": None, "min": 0.5, "max": 20},
        {"name": "on_sale", "kind": "boolean", "values": None, "min": None, "max": None},
        {"name": "since", "kind": "text", "values": None, "min": "2024-01-01T00:00:00", "max": "2024-12-31T00:00:00"},
    ]

    def describe(page: Page) -> None:
        page.route("**/v1/attributes", lambda route: route.fulfill(json={"attributes": described}))
        page.route("**/v1/status", lambda route: route.fulfill(json={"items": 60, "calibrated": True}))

    page = open_page("/?like=item-005", before=describe)
    ids(page)
    form = page.locator("#filter-form")
    assert form.locator("legend").all_inner_texts() == ["Brand", "Price", "On sale", "Since"]
    form.get_by_label("brand 0").check()
    form.get_by_text("3 more").click()
    form.get_by_label("brand 8").check()
    form.get_by_role("spinbutton", name="from").fill("1.5")
    form.get_by_label("No", exact=True).check()
    form.locator("[type=date]").first.fill("2024-02-03")
    form.locator("[type=date]").last.fill("2024-02-04")
    form.get_by_label("Show near-identical items once").check()
    with page.expect_request(lambda request: "min_probability" in request.url) as sent:
        form.get_by_label("Only items that are likely the same").check()
    fields = dict(parse_qsl(urlsplit(sent.value.url).query))
    assert json.loads(fields.pop("filter")) == {
        "brand": ["brand 0", "brand 8"],
        "price": {"gte": 1.5},
        "on_sale": False,
        "since": {"gte": "2024-02-03", "lte": "2024-02-04T23:59:59.999999"},
    }
    assert fields == {"k": "24", "offset": "0", "group_by": "look", "min_probability": "0.5"}
    expect(page.locator("#filter-count")).to_have_text("6 set")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_photo_is_dropped_or_pasted(open_page: Open, photo: Photo, event: str):
    page = open_page()
    page.evaluate(
        """([event, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], 'photo.jpg', { type: 'image/jpeg' }));
            const made = event === 'drop'
                ? new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true })
                : new ClipboardEvent('paste', { clipboardData: data, bubbles: true });
            document.body.dispatchEvent(made);
        }""",
        [event, list(photo(5))],
    )
    ids(page, ["item-005"])


def test_a_full_service_is_asked_again(open_page: Open, photo: Photo):
    refusals = iter([True])
    message = "QueryEncoder has too many requests waiting; try again"
    error = {"code": "saturated", "message": message, "request_id": "mine"}

    def full_once(route: Route) -> None:
        if next(refusals, False):
            route.fulfill(status=503, headers={"Retry-After": "1"}, json={"error": error})
        else:
            route.continue_()

    page = open_page()
    page.route("**/v1/search", full_once)
    show(page, photo(5))
    expect(page.locator("#notice")).to_contain_text("The service is busy. Trying again in 1 s.")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("button", name="Search")).to_be_disabled()
    ids(page, ["item-005"])
    expect(page.locator("#notice")).to_be_hidden()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nothing_similar": True, "items": []}, "Nothing here is similar enough. Try another photo"),
        ({"degraded": True, "missing_shards": ["shard-00001"]}, "something may be missing here (shard-00001)"),
    ],
)
def test_what_a_reply_says_of_itself_is_shown(open_page: Open, photo: Photo, changes: dict[str, Any], sentence: str):
    def change(route: Route) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, json=reply.json() | changes)

    page = open_page()
    page.route("**/v1/search", change)
    show(page, photo(5))
    expect(page.locator("#notice")).to_contain_text(sentence)
    expect(page.get_by_role("status")).to_contain_text(sentence)
    expect(page.locator(".card:not(.blank)")).to_have_count(len(changes.get("items", range(24))))


def test_an_unreachable_service_can_be_tried_again(open_page: Open, photo: Photo):
    page = open_page()
    page.route("**/v1/search", lambda route: route.abort())
    show(page, photo(5))
    expect(page.locator("#notice")).to_contain_text("The service cannot be reached; check the connection")
    page.unroute("**/v1/search")
    page.get_by_role("button", name="Try again").click()
    ids(page, ["item-005"])


def test_a_key_is_asked_for_and_kept_for_the_tab(open_page: Open, photo: Photo):
    refused = json.dumps({"error": {"code": "unauthorized", "message": "this key is not known", "request_id": "mine"}})

    def locked(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            route.fulfill(status=401, content_type="application/json", body=refused)

    page = open_page(before=lambda page: page.route("**/v1/**", locked))
    dialog = page.get_by_role("dialog", name="This service asks for a key")
    for key in ("wrong", "sesame"):
        expect(page.get_by_role("textbox", name="Key")).to_be_focused()
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        if key == "wrong":
            expect(dialog).to_contain_text("This key is not known.")
    expect(dialog).to_be_hidden()
    show(page, photo(5))
    ids(page, ["item-005"])
    page.wait_for_function("() => document.querySelector('.card img').naturalWidth === 40")
    page.reload()
    expect(page.locator("#catalogue")).to_have_text("60 items")
    expect(dialog).to_be_hidden()


def test_nothing_but_a_keyboard_is_needed(open_page: Open, photo: Photo):
    page = open_page(before=choose(photo(5)))
    for _ in range(3):  # the name, the API's page, the button
        page.keyboard.press("Tab")
    expect(page.get_by_label("Choose a photo")).to_be_focused()
    page.keyboard.press("Enter")
    ids(page, ["item-005"])
    first = page.locator(".card").first
    page.keyboard.press("Tab")
    expect(first.locator("summary")).to_be_focused()
    page.keyboard.press("Enter")
    expect(first).to_contain_text("The item number 5", use_inner_text=True)
    page.keyboard.press("Tab")
    expect(first.get_by_role("button", name="More like this: Item 5")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="More like this")).to_be_visible()
    expect(page.locator("#results-title")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("settings", [{"viewport": {"width": 1280, "height": 860}}, PHONE], ids=["desktop", "phone"])
def test_every_state_is_accessible_and_fits(
    open_page: Open, axe_source: str, photo: Photo, scheme: str, settings: dict[str, Any]
):
    page = open_page(color_scheme=scheme, **settings)
    page.evaluate(axe_source)
    check(page)
    show(page, photo(5, size=(1200, 900)))
    ids(page, ["item-005"])
    page.get_by_role("button", name="Crop").click()
    page.locator("#filters").evaluate("filters => { filters.open = true; }")
    check(page)
    page.get_by_role("button", name="More like this: Item 5", exact=True).click()
    expect(page.get_by_role("heading", name="More like this")).to_be_visible()
    ids(page)
    check(page)
    show(page, b"not a picture", "notes.txt", "text/plain")
    expect(page.locator("#notice")).to_be_visible()
    check(page)


def check(page: Page) -> None:
    broken = page.evaluate("axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes[0].html]))")
    assert broken == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
