"""`service.http_protocol` on uvicorn's own protocol: what is written to a connection, and in how many pieces."""

import asyncio
import gc
import weakref
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from service.http_protocol import BoundedHttp
from tests.service.running import until

LENGTH = b"content-length: 2\r\n"


class Wire(asyncio.Transport):
    """A connection that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("127.0.0.1", 1), "peername": ("127.0.0.1", 2)})
        self.pieces: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.pieces.append(bytes(data))
        assert not self.is_closed

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def two(request: Request) -> Response:
    with suppress(ClientDisconnect):
        assert await request.body() in (b"", b"hi")
    return PlainTextResponse("ok")


async def stream(_request: Request) -> Response:
    async def chunks() -> Any:
        for chunk in (b"HTTP/1.1 200 first", b"second"):
            yield chunk

    return StreamingResponse(chunks())


async def nothing(_request: Request) -> Response:
    return Response(status_code=204)


class Broken(Response):
    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        raise RuntimeError("in mid-response")


async def broken(_request: Request) -> Response:
    return Broken("ok")


def connect() -> tuple[BoundedHttp, Wire]:
    """A connection to an application, and its wire."""
    routes = [Route("/two", two, methods=["GET", "POST"])]
    routes += [Route(f"/{one.__name__}", one) for one in (stream, nothing, broken)]
    config = uvicorn.Config(
        Starlette(routes=routes), http=BoundedHttp, lifespan="off", log_config=None, access_log=False
    )
    config.load()
    protocol, wire = BoundedHttp(config=config, server_state=ServerState(), app_state={}), Wire()
    protocol.connection_made(wire)
    return protocol, wire


@pytest.fixture
async def connection() -> tuple[BoundedHttp, Wire]:
    return connect()


async def written(connection: tuple[BoundedHttp, Wire], request: bytes) -> list[bytes]:
    """The pieces of what is written in answer to whole requests."""
    protocol, wire = connection
    protocol.data_received(request)
    await until(lambda: not protocol.tasks)
    for timer in (protocol._head_timer, protocol.timeout_keep_alive_task):
        if timer is not None:
            timer.cancel()
    return wire.pieces


def asked(path: str, method: str = "GET", headers: str = "", body: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n{body}".encode()


async def test_head_and_body_are_one_piece(connection: tuple[BoundedHttp, Wire]):
    (piece,) = await written(connection, asked("/two"))
    assert piece.startswith(b"HTTP/1.1 200 OK\r\n")
    assert LENGTH in piece
    assert piece.endswith(b"\r\n\r\nok")


async def test_a_stream_begins_with_its_head_and_goes_on_in_its_own_pieces(connection: tuple[BoundedHttp, Wire]):
    first, second, last = await written(connection, asked("/stream"))
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\n12\r\nHTTP/1.1 200 first\r\n")
    assert (second, last) == (b"6\r\nsecond\r\n", b"0\r\n\r\n")


@pytest.mark.parametrize(("request_", "status"), [(asked("/two", "HEAD"), b"200"), (asked("/nothing"), b"204")])
async def test_a_response_without_a_body_is_its_head(
    connection: tuple[BoundedHttp, Wire], request_: bytes, status: bytes
):
    (piece,) = await written(connection, request_)
    assert piece.startswith(b"HTTP/1.1 " + status)
    assert piece.endswith(b"\r\n\r\n")


async def test_a_last_response_is_whole_before_the_connection_ends(connection: tuple[BoundedHttp, Wire]):
    (piece,) = await written(connection, asked("/two", headers="connection: close\r\n"))
    assert b"connection: close\r\n" in piece
    assert piece.endswith(b"ok")
    assert connection[1].is_closed


async def test_who_waits_for_our_consent_gets_it_at_once(connection: tuple[BoundedHttp, Wire]):
    head = asked("/two", "POST", "content-length: 2\r\nexpect: 100-continue\r\n")
    protocol, wire = connection
    protocol.data_received(head)
    await until(lambda: len(wire.pieces) == 1)
    consent, answer = await written(connection, b"hi")
    assert consent == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer.endswith(b"ok")


async def test_requests_that_came_together_are_answered_in_turn(connection: tuple[BoundedHttp, Wire]):
    first, second = await written(connection, asked("/two") + asked("/nothing"))
    assert first.endswith(b"ok")
    assert second.startswith(b"HTTP/1.1 204")


async def test_what_breaks_off_has_sent_its_head(connection: tuple[BoundedHttp, Wire]):
    (piece,) = await written(connection, asked("/broken"))
    assert piece.startswith(b"HTTP/1.1 200 OK\r\n")
    assert LENGTH in piece
    assert connection[1].is_closed


@pytest.mark.parametrize("path", ["/two", "/stream", "/nothing", "/broken"])
async def test_who_leaves_with_answers_to_come_is_written_nothing_more(connection: tuple[BoundedHttp, Wire], path: str):
    protocol, wire = connection
    protocol.data_received(asked(path) + asked("/two"))
    lose(protocol, wire)
    await until(lambda: not protocol.tasks)
    assert wire.pieces == []


@pytest.mark.parametrize(
    "requests",
    [asked("/two"), asked("/two") + asked("/nothing"), asked("/two", "POST", "content-length: 2\r\n"), b"no HTTP", b""],
    ids=["one", "two together", "one without its body", "no HTTP", "none"],
)
@pytest.mark.parametrize("waits", [True, False])
async def test_a_connection_that_ended_waits_for_no_collection(requests: bytes, waits: bool):
    gc.collect()
    gc.disable()
    try:
        protocol, wire = connect()
        if requests:
            protocol.data_received(requests)
        if waits:
            await asyncio.sleep(0.05)
        lose(protocol, wire)
        tasks = protocol.tasks
        await until(lambda: not tasks)
        ended = weakref.ref(protocol)
        del protocol, wire
        await asyncio.sleep(0)
        assert ended() is None
    finally:
        gc.enable()


def lose(protocol: BoundedHttp, wire: Wire) -> None:
    """The client is gone."""
    wire.is_closed = True
    protocol.connection_lost(None)
