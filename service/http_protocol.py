"""uvicorn's HTTP/1.1 on httptools, with bounds: alone it collects a request's head for as long as the head goes on.

What is no HTTP is answered with a problem document too, where nothing else is being answered on the connection. And the
head of a response leaves with the beginning of its body, in one packet: uvicorn writes them one after the other, each
of which wakes the client.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.problems import MEDIA_TYPE, ProblemDocument
from service.recommender import new_ulid
from service.request_limits import MAX_HEAD_BYTES

_HEAD_TIMEOUT_S = 10.0
"""From the first byte of a head, or from the connection, to the head's end."""
_CONTINUE = b"HTTP/1.1 100 "


class BoundedHttp(HttpToolsProtocol):
    """One connection; a head that is too long or too slow ends it."""

    _num_head_bytes = 0
    _is_over = False
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is awaited."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more, and nothing of the last request is held: it holds this connection.

        As a cycle the two would wait for a collection, a kilobyte or more of each connection (`service.memory`).
        """
        self._have_head()
        super().connection_lost(exc)
        self.cycle = None  # type: ignore[assignment]
        self.pipeline.clear()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._await_head()
        self._num_head_bytes = 1

    def on_headers_complete(self) -> None:
        """A head ends; its exact size is the middleware's to judge."""
        self._have_head()
        super().on_headers_complete()
        response = _HeadWithBody(self.transport, self.cycle.on_response)
        self.cycle.transport, self.cycle.on_response = response, response.end  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Refuse a head once more of it has come than a head may have."""
        if self._is_over:
            return
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, "headers-too-large", f"the address and the headers have more than {MAX_HEAD_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(400, "bad-request", msg)

    def _await_head(self) -> None:
        self._have_head()
        self._num_head_bytes = 0
        self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._is_late)

    def _have_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _is_late(self) -> None:
        if self._num_head_bytes == 0:
            self.transport.close()
        else:
            self._refuse(408, "request-timeout", f"the headers did not come whole within {_HEAD_TIMEOUT_S:g} seconds")

    def _refuse(self, status: int, kind: str, detail: str) -> None:
        """End the connection: whole requests before this one are answered first, and then nothing more is."""
        self._have_head()
        self._is_over = True
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        self.transport.write(_problem(status, kind, detail))
        self.transport.close()


class _HeadWithBody:
    """What one response is written to: its head is kept until the first bytes of its body come, or it ends without.

    Nobody reads what is written to a connection that has ended; uvloop takes it for an error. Of requests that came
    together uvicorn tells only the last that its client is gone.
    """

    def __init__(self, transport: asyncio.Transport, on_response: Callable[[], None]) -> None:
        self._transport = transport
        self._on_response = on_response
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        """The head first, once the client has been told to go on if it waits for that."""
        if self._head is None and not data.startswith(_CONTINUE):
            self._head = data
        else:
            self._send(data)

    def is_closing(self) -> bool:
        """Whether the connection is."""
        return self._transport.is_closing()

    def close(self) -> None:
        """End the connection."""
        self._flush()
        self._transport.close()

    def end(self) -> None:
        """The response is whole."""
        self._flush()
        self._on_response()

    def _flush(self) -> None:
        if self._head:
            self._send(b"")

    def _send(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        if not self._transport.is_closing():
            self._transport.write(data)


def _problem(status: int, kind: str, detail: str) -> bytes:
    """A whole response."""
    phrase = HTTPStatus(status).phrase
    request_id = new_ulid()
    document = ProblemDocument(
        type=f"urn:sidrec:{kind}", title=phrase, status=status, detail=detail, request_id=request_id
    )
    body = document.model_dump_json()
    head = (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {len(body.encode())}\r\n"
        f"x-request-id: {request_id}\r\nx-content-type-options: nosniff\r\ncache-control: no-store\r\n"
        "connection: close\r\n\r\n"
    )
    return (head + body).encode()
