"""Addresses as they are sent: ids in a path are percent-encoded, so an id may hold slashes and means nothing else.

`DELETE /users/u%2Fhistory` erases the user `u/history`; `DELETE /users/u/history` is no address of this service. So
routes are found by the encoded path, and `{user_id:any_text}` decodes its part. Importing this registers the convertor.
"""

from urllib.parse import quote, unquote_to_bytes

from starlette.convertors import Convertor, register_url_convertor
from starlette.types import ASGIApp, Receive, Scope, Send


class _AnyText(Convertor[str]):
    """One segment of an encoded path, whatever text it stands for. That it is UTF-8 is checked later (`access`)."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote_to_bytes(value.encode("latin-1")).decode(errors="replace")

    def to_string(self, value: str) -> str:
        return quote(value, safe="")


register_url_convertor("any_text", _AnyText())


class EncodedPaths:
    """Gives an application the path as it was sent, where ASGI's `path` is decoded. Plain ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request; anything but HTTP passes through."""
        if scope["type"] == "http":
            sent: bytes | None = scope.get("raw_path")
            scope = {**scope, "path": quote(scope["path"]) if sent is None else sent.decode("latin-1")}
        await self._app(scope, receive, send)
