"""The search page for people at `/`: static files beside this module, nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response

from mixer_platform.serve.caching import cached

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CACHE_CONTROL = "no-cache"  # kept, but asked about each time: its parts must be of one release
SECURITY = {
    # blob: is how the page shows pictures that it fetched with a key, and the photo itself.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


def add_page(api: FastAPI) -> None:
    """Serve the page at `/` and its parts below `/page/`; the OpenAPI page does not mention them."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES}

    def reply(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        response = cached(request, files[name], MEDIA_TYPES[Path(name).suffix], CACHE_CONTROL)
        response.headers.update(SECURITY)
        return response

    @api.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return reply(request, "index.html")

    @api.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def part(request: Request, name: str) -> Response:
        return reply(request, name)
