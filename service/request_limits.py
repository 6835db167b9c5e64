"""How large a request may be, and how long it may take to arrive. Plain ASGI.

A body is refused by its declared length before any of it is read, or as soon as what came is too much; one that does
not end in time is given up. The refusal is this module's, whatever the application makes of its broken body.
"""

import asyncio
import time
from contextlib import suppress

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    HeadersTooLargeProblem,
    Problem,
    RequestTimeoutProblem,
    TooLargeProblem,
    problem_response,
)

MAX_HEAD_BYTES = 32_768
"""Of the address and all headers; proxies allow 8 to 32 kB."""
_LINGER_S = 1.0  # how long a refused body is read on, so that its sender reads the refusal and not a reset


class RequestLimits:
    """Refuses bodies over `max_body_bytes`, and those that have not come whole within `body_timeout_s`."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._max_body_bytes, self._body_timeout_s)
        body.problem = self._problem_of_head(scope)
        has_begun = False

        async def send_unless_refused(message: Message) -> None:
            nonlocal has_begun
            if has_begun or body.problem is None:
                has_begun = True
                await send(message)

        if body.problem is None:
            with suppress(_RefusedError):
                await self._app(scope, body.receive, send_unless_refused)
        if body.problem is not None and not has_begun:
            await _refuse(body.problem, scope, receive, send)

    def _problem_of_head(self, scope: Scope) -> Problem | None:
        headers = scope["headers"]
        num_bytes = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if num_bytes + sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES:
            return HeadersTooLargeProblem(f"the address and the headers have more than {MAX_HEAD_BYTES} bytes")
        declared = next((value for name, value in headers if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared[:20]) > self._max_body_bytes:
            return _too_large(self._max_body_bytes)
        return None


class _RefusedError(Exception):
    """What the application meets in place of the rest of its body."""


class _Body:
    """The body of one request as it comes in, and why it was refused."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._num_bytes = 0
        self._is_whole = False
        self.problem: Problem | None = None

    async def receive(self) -> Message:
        """ASGI's `receive`; once the body is whole it only tells when the client leaves, and has no time limit."""
        if self._is_whole:
            return await self._receive()
        if self.problem is not None:
            raise _RefusedError
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            self.problem = RequestTimeoutProblem(f"the body did not come whole within {self._timeout_s:g} seconds")
            raise _RefusedError from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._num_bytes > self._max_bytes:
                self.problem = _too_large(self._max_bytes)
                raise _RefusedError
        return message


def _too_large(max_bytes: int) -> TooLargeProblem:
    return TooLargeProblem(f"the body has more than {max_bytes} bytes (SIDREC_MAX_BODY_BYTES): send less at once")


async def _refuse(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    response = problem_response(Request(scope), problem)
    response.headers["connection"] = "close"
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    waits = any(name == b"expect" for name, _ in scope["headers"])  # for our consent, which it does not get
    if isinstance(problem, TooLargeProblem) and not waits:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
