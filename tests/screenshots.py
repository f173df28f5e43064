"""Take the pictures of the search page that docs/ shows, from a running service. From the project's root:

.venv/bin/python -m tests.screenshots http://127.0.0.1:8000 workspace/emoji/data/photos/0d20de887d683807.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, FilePayload, Page

from tests.browser import chromium

DOCS = Path(__file__).parents[1] / "docs"
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 360, "height": 1100}, "has_touch": True, "is_mobile": True, "device_scale_factor": 1.5}
TEXT: FilePayload = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"not a picture"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="address of the service")
    parser.add_argument("photo", help="the photo to search for")
    arguments = parser.parse_args()
    with chromium() as browser:
        page = search(browser, arguments.url, arguments.photo, DESKTOP)
        take(page, "page.png")
        page.locator(".card").nth(2).get_by_role("button").click()
        settle(page)
        take(page, "page_alike.png")
        take(search(browser, arguments.url, arguments.photo, PHONE | {"color_scheme": "dark"}), "page_phone.png")
        take(search(browser, arguments.url, TEXT, DESKTOP), "page_error.png")


def search(browser: Browser, url: str, photo: str | FilePayload, settings: dict[str, Any]) -> Page:
    """Return the page with the answer to a photo."""
    page = browser.new_context(**settings).new_page()
    page.goto(url)
    page.locator("#filters:not([hidden])").wait_for(state="attached")
    page.locator("#pick").set_input_files(photo)
    settle(page)
    return page


def settle(page: Page) -> None:
    page.locator("#results[aria-busy=false] :is(.card:not(.blank), .notice:not([hidden]))").first.wait_for()
    page.wait_for_load_state("networkidle")


def take(page: Page, name: str) -> None:
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.screenshot(path=DOCS / name)
    print(DOCS / name, f"{(DOCS / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
