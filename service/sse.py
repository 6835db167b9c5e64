"""Server-sent events: an answer while it is made, one `thought` after the other and then `answer` or `problem`.

    event: thought                              each piece of the thought, as it is written
    data: {"text": "You bought a kettle"}

    event: answer                               the same object as the plain answer
    data: {"recommendation_id": …}

The response begins with its first event: what fails before is an ordinary problem response, with its status. An event
is one line of JSON, which has no line breaks. Knows nothing of what the work is.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

import structlog
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import Problem, problem_document, request_id_of

log = structlog.get_logger(__name__)

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 10.0

Work: TypeAlias = Callable[[Callable[[str], None]], Awaitable[BaseModel]]
"""Makes an answer; what it is called with takes the pieces of its thought."""


def prefers_events(accept: Sequence[str]) -> bool:
    """Whether `Accept` headers name `text/event-stream` and like it no less than JSON.

    Of two that are liked alike the first one named is meant; a wildcard means JSON, unless events are named and liked
    as well.
    """
    accepted = ",".join(accept)
    if MEDIA_TYPE not in accepted.lower():
        return False
    wishes: dict[str, tuple[float, bool, int]] = {}  # quality, is named, the earlier the higher
    for place, part in enumerate(accepted.split(",")):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        wishes.setdefault(media_type, (_quality(parameters), not media_type.endswith("*"), -place))
    unnamed = (0.0, False, 0)
    events = wishes.get(MEDIA_TYPE, unnamed)
    plain = next((wishes[name] for name in ("application/json", "application/*", "*/*") if name in wishes), unnamed)
    return events[0] > 0 and events > plain


class EventStream(Response):
    """The response to one request. A client that leaves cancels the work, and `ClientDisconnect` is raised."""

    media_type = MEDIA_TYPE

    def __init__(self, request: Request, work: Work, *, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self._request = request
        self._keep_alive_s = keep_alive_s
        self._work = work
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI response, from the first event until the work has ended."""
        chunks: asyncio.Queue[bytes | None] = asyncio.Queue()  # None: the work has ended
        work = asyncio.ensure_future(self._work(lambda text: chunks.put_nowait(_event("thought", _json(text=text)))))
        work.add_done_callback(lambda _work: chunks.put_nowait(None))
        departure = asyncio.ensure_future(_departure(receive))
        departure.add_done_callback(lambda _departure: work.cancel())
        try:
            await self._relay(chunks, work, send)
        finally:
            departure.cancel()
            work.cancel()
            await asyncio.gather(departure, work, return_exceptions=True)

    async def _relay(
        self, chunks: "asyncio.Queue[bytes | None]", work: "asyncio.Future[BaseModel]", send: Send
    ) -> None:
        has_begun = False
        while (chunk := await self._next(chunks)) is not None:
            if not has_begun:
                await self._begin(send)
                has_begun = True
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        last = self._last_event(work, has_begun)
        if not has_begun:
            await self._begin(send)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _next(self, chunks: "asyncio.Queue[bytes | None]") -> bytes | None:
        """The next chunk, or after a silence a comment, so that nobody between here and the client hangs up."""
        try:
            async with asyncio.timeout(self._keep_alive_s):
                return await chunks.get()
        except TimeoutError:
            return b": keep-alive\n\n"

    async def _begin(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    def _last_event(self, work: "asyncio.Future[BaseModel]", has_begun: bool) -> bytes:
        try:
            return _event("answer", work.result().model_dump_json())
        except asyncio.CancelledError:
            raise ClientDisconnect from None
        except Exception as error:
            if not has_begun:
                raise
            if not isinstance(error, Problem):
                log.exception("unexpected_error", path=self._request.url.path, request_id=request_id_of(self._request))
            return _event("problem", problem_document(self._request, error).model_dump_json())


async def _departure(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()


def _json(**fields: str) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def _quality(parameters: Sequence[str]) -> float:
    """The `q` of a media type; one that is no number from 0 to 1 counts as 0."""
    given = next((text.removeprefix("q=") for text in parameters if text.startswith("q=")), "1")
    try:
        quality = float(given)
    except ValueError:
        return 0.0
    return quality if 0 <= quality <= 1 else 0.0
