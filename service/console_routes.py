"""`GET /console`: the page that tries the service out and watches it, and its style and script.

They are three files that need no key; whatever the page shows, its script asks the API for with the key that is typed
into it. Everything comes from this service: the policy lets a browser load nothing else and run no text as code.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

_FOLDER = Path(__file__).parent / "console"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter(tags=["operations"])


@dataclass(frozen=True)
class _File:
    """One file of the page, with the name of its content."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, name: str, media_type: str) -> "_File":
        content = (_FOLDER / name).read_bytes()
        return cls(content, f"{media_type}; charset=utf-8", f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def answer(self, request: Request) -> Response:
        """The file, or a 304 where the browser's copy is the same; it asks each time, so no copy is ever old."""
        headers = {"etag": self.etag, "cache-control": "no-cache", "content-security-policy": _POLICY}
        known = ",".join(request.headers.getlist("if-none-match")).split(",")
        if self.etag in {one.strip().removeprefix("W/") for one in known}:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


_PAGE = _File.read("index.html", "text/html")
_STYLE = _File.read("console.css", "text/css")
_SCRIPT = _File.read("console.js", "text/javascript")


@router.get("/console", response_class=HTMLResponse)
async def console(request: Request) -> Response:
    """A page to try the service out: recommendations, users, what is served, experiments."""
    return _PAGE.answer(request)


@router.get("/console/console.css", include_in_schema=False)
async def style(request: Request) -> Response:
    """The page's style."""
    return _STYLE.answer(request)


@router.get("/console/console.js", include_in_schema=False)
async def script(request: Request) -> Response:
    """The page's script."""
    return _SCRIPT.answer(request)
