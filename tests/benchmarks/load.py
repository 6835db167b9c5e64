"""Load on a loopback HTTP server: keep-alive connections, a closed and an open loop, latencies without omissions.

A lean client of its own, so that on two cores the server's time is measured and not the client's.
"""

import asyncio
import itertools
import re
import selectors
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TIMEOUT_S = 30.0
_PROBE = b"GET /health/live HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"


@dataclass(frozen=True)
class Response:
    """An HTTP answer."""

    status: int
    body: bytes


@dataclass
class Measured:
    """What a load saw. Latencies in seconds, in the order of the answers."""

    latencies: list[float] = field(default_factory=list)
    num_errors: int = 0
    elapsed_s: float = 0.0

    @classmethod
    def pooled(cls, parts: "Sequence[Measured]") -> "Measured":
        """Several loads as if they were one."""
        latencies = [latency for part in parts for latency in part.latencies]
        return cls(latencies, sum(part.num_errors for part in parts), sum(part.elapsed_s for part in parts))

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the latencies."""
        return 1000 * float(np.percentile(self.latencies, percent))

    @property
    def per_second(self) -> float:
        """Good answers a second."""
        return (len(self.latencies) - self.num_errors) / self.elapsed_s


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self) -> None:
        self._received = b""
        self._answer: asyncio.Future[Response] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's: the connection is there."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        """asyncio's: a part of an answer."""
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or (length := _CONTENT_LENGTH.search(head)) is None or len(body) < int(length[1]):
            return
        self._received = b""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Response(int(head[9:12]), body))

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's: the server hung up."""
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(f"the server closed the connection: {exc}"))

    async def request(self, message: bytes) -> Response:
        """Send a whole HTTP request; its answer."""
        if self._transport is None:
            raise ConnectionError("the server has closed this connection")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        return await self._answer

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()


class Load:
    """Sends `messages` one after the other, from the first again after the last; `is_good` judges the answers.

    Every loop opens connections of its own: a server hangs up those that were idle for some seconds.
    """

    def __init__(self, port: int, messages: Sequence[bytes], is_good: Callable[[Response], bool]) -> None:
        self._port = port
        self._messages = messages
        self._is_good = is_good
        self._next = 0

    async def closed_loop(
        self, concurrency: int, *, seconds: float = float("inf"), num_requests: int | None = None
    ) -> Measured:
        """`concurrency` clients, each of which sends its next request when it has its answer."""
        measured = Measured()
        numbers = itertools.count() if num_requests is None else iter(range(num_requests))

        async def client(connection: Connection) -> None:
            while time.perf_counter() - begin < seconds and next(numbers, None) is not None:
                await self._one(connection, time.perf_counter(), measured)

        async with connections(self._port, concurrency) as opened, asyncio.TaskGroup() as clients:
            begin = time.perf_counter()
            for connection in opened:
                clients.create_task(client(connection))
        measured.elapsed_s = time.perf_counter() - begin
        return measured

    async def open_loop(self, arrivals_s: npt.NDArray[np.float64], num_connections: int) -> Measured:
        """Requests at set times, whatever the server does; a latency counts from the *scheduled* arrival.

        When every connection is busy a request waits here, and that wait counts too. The connections take turns, so
        none is idle for long.
        """
        measured = Measured()
        idle: asyncio.Queue[Connection] = asyncio.Queue()

        async def one(due: float) -> None:
            connection = await idle.get()
            await self._one(connection, due, measured)
            idle.put_nowait(connection)

        async with connections(self._port, num_connections) as opened, asyncio.TaskGroup() as requests:
            for connection in opened:
                idle.put_nowait(connection)
            begin = time.perf_counter()
            for arrival in arrivals_s.tolist():
                await asyncio.sleep(begin + arrival - time.perf_counter())
                requests.create_task(one(begin + arrival))
        measured.elapsed_s = time.perf_counter() - begin
        return measured

    async def _one(self, connection: Connection, due: float, measured: Measured) -> None:
        message = self._messages[self._next % len(self._messages)]
        self._next += 1
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                response = await connection.request(message)
            good = self._is_good(response)
        except (OSError, TimeoutError):
            good = False
        measured.latencies.append(time.perf_counter() - due)
        measured.num_errors += not good


@asynccontextmanager
async def connections(port: int, count: int) -> AsyncIterator[list[Connection]]:
    """Open connections to a loopback port, each of which the service has answered on; closed at the end."""
    opened: list[Connection] = []
    try:
        for _ in range(count):
            _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
            opened.append(connection)
            await connection.request(_PROBE)  # until then it may only be in the kernel's queue
        yield opened
    finally:
        for connection in opened:
            connection.close()


def post(path: str, body: bytes) -> bytes:
    """A whole HTTP/1.1 request with a JSON body."""
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def poisson_arrivals(rate: float, seconds: float, seed: int) -> npt.NDArray[np.float64]:
    """Arrival times in [0, seconds)."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))


def precise_event_loop() -> asyncio.AbstractEventLoop:
    """select() sleeps to the microsecond; epoll and uvloop round to a millisecond, as long as a whole request."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())
