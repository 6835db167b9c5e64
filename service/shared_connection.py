"""One connection to Redis for many small questions: each is written at once, and the answers come in their order.

A pool gives every question a connection of its own: to find one, to look whether it lives, to bound its write and its
read and to give it back is a tenth of what a recommendation costs the event loop.

    ask() ── written at once ──> Redis ── answers in order ──> listener ──> whoever asked

Nothing is asked twice here: if the connection is lost, so are the questions on it, and their askers are told.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError


@dataclass(eq=False)
class _Open:
    """A connection, and who waits for an answer on it: since when, in the order of the questions."""

    connection: AbstractConnection
    asked: deque[tuple[float, asyncio.Future[Any]]] = field(default_factory=deque)
    listener: asyncio.Task[None] | None = None
    is_lost: bool = False

    def is_silent(self, timeout_s: float | None) -> bool:
        """Whether its oldest question has had no answer for so long."""
        return timeout_s is not None and bool(self.asked) and time.monotonic() - self.asked[0][0] > timeout_s


class ConnectionLostError(RedisConnectionError):
    """The connection ended between a question and its answer."""

    def __init__(self, cause: BaseException | None = None) -> None:
        super().__init__("the connection to Redis was lost before the answer")
        self.__cause__ = cause


class SharedConnection:
    """Of a client's pool, taken by the first question and again after each loss; ended by the client's end."""

    def __init__(self, redis: Redis) -> None:
        self._pool = redis.connection_pool
        self.timeout_s: float | None = self._pool.connection_kwargs.get("socket_timeout")
        """Of the pool's sockets. Who asks waits as long as they like; a connection silent for so long is given up."""
        self._open: _Open | None = None
        self._opening: asyncio.Task[_Open] | None = None

    async def ask(self, command: bytes) -> Any:  # noqa: ANN401 - as Redis answers
        """The answer to one command, as `packed` wrote it.

        `ResponseError` if Redis refuses it, `ConnectionLostError` if the connection ends before the answer, another
        `RedisError` or `OSError` if none can be opened.
        """
        line = self._open
        if line is not None and line.is_silent(self.timeout_s):
            self._lose(line)
            line = None
        if line is None:
            line = await self._opened()
        if line.is_lost or not line.connection.is_connected:
            raise ConnectionLostError
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        line.asked.append((time.monotonic(), answer))
        try:  # it writes before it waits for anything, so the order is that of `asked`
            await line.connection.send_packed_command(command, check_health=False)
        except BaseException:
            answer.cancel()
            raise
        return await answer

    async def _opened(self) -> _Open:
        """The open connection; whoever finds none takes it, and the others wait for that."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._connect(), name="redis-connect")
            self._opening.add_done_callback(self._has_opened)
        # Who gives up does not end it for the others.
        return await asyncio.shield(self._opening)

    async def _connect(self) -> _Open:
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        connection.socket_timeout = None  # of each write and read: who asks has a time-out
        line = self._open = _Open(connection)
        line.listener = asyncio.create_task(self._listen(line), name="redis-answers")
        return line

    def _has_opened(self, opening: "asyncio.Task[_Open]") -> None:
        self._opening = None
        if not opening.cancelled():
            opening.exception()  # perhaps nobody waits for it any more

    async def _listen(self, line: _Open) -> None:
        """Hand out the answers until the connection ends."""
        why: BaseException | None = None
        try:
            while not line.is_lost:
                _hand_out(await _next_reply(line.connection), line)
        except (RedisError, OSError, ValueError) as error:  # an answer that is not UTF-8 ends redis-py's connection too
            why = error
        finally:
            self._lose(line, why)
            await line.connection.disconnect()
            line.connection.socket_timeout = self.timeout_s
            await self._pool.release(line.connection)

    def _lose(self, line: _Open, why: BaseException | None = None) -> None:
        """Nothing more is asked on a connection, and nothing on it is answered."""
        line.is_lost = True
        if self._open is line:
            self._open = None
        for _, answer in line.asked:
            if not answer.done():
                answer.set_exception(ConnectionLostError(why))
        line.asked.clear()
        if line.listener is not None and line.listener is not asyncio.current_task():
            line.listener.cancel()


def packed(words: Sequence[str]) -> bytes:
    """A command as Redis reads it (RESP)."""
    encoded = [word.encode() for word in words]
    return b"".join([b"*%d\r\n" % len(encoded), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)])


async def _next_reply(connection: AbstractConnection) -> Any:  # noqa: ANN401 - as Redis answers
    """The next answer; a refusal is one too."""
    try:
        return await connection.read_response(timeout=math.inf)
    except ResponseError as refusal:
        return refusal


def _hand_out(reply: Any, line: _Open) -> None:  # noqa: ANN401 - as Redis answers
    """Give an answer to who has waited longest, unless they have given up."""
    if not line.asked:  # lost while the answer came, or never asked: what belongs to whom is not known any more
        raise ConnectionLostError
    _, answer = line.asked.popleft()
    if answer.done():
        return
    if isinstance(reply, ResponseError):
        answer.set_exception(reply)
    else:
        answer.set_result(reply)
