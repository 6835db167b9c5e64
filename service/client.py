"""A client of the service: `SidrecClient`, and `AsyncSidrecClient` for asyncio. `pip install sidrec[client]`.

SidrecError
├── SidrecProblem         the service answered with an error: `status`, `type`, `detail`, `errors`, `retry_after_s`
├── SidrecUnavailable     no answer: not reached, connection lost, too slow
└── SidrecInvalidAnswer   an answer that is none of this contract's, as of a wrong address

**Time.** One attempt may take what its `deadline_ms` says and `margin_s` more; a call as a whole `retry_for_s` longer.

**Retries.** Lost connections, time-outs, 429, 502, 503 and 504; after `Retry-After` where the service names it, else
with exponential back-off and jitter; never when the time left would not do, and never for another 4xx. Every call may
be repeated without harm (events carry ids, made here if need be and kept), except `rollback`, which goes one bundle
further back each time: it is repeated only when it was certainly not carried out. A stream is retried until its first
event has come.

Knows the contract from `service.schemas`, and nothing else of the service.
"""

import json
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from types import TracebackType
from typing import Any, Generic, Literal, NotRequired, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote
from uuid import uuid4

import httpx
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import to_jsonable_python
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception

from service.event_reader import EventReader, EventStreamError, ServerEvent
from service.problems import FieldError, ProblemDocument
from service.schemas import (
    BundleResponse,
    EventBody,
    EventsResponse,
    HealthResponse,
    HistoryEvent,
    HistoryResponse,
    ItemDeletedResponse,
    ItemFilterBody,
    ItemResponse,
    Reasoning,
    RecommendResponse,
    RerankResponse,
    VersionsResponse,
)

T = TypeVar("T", bound=BaseModel)

_RETRIED = frozenset({429, 502, 503, 504})
_NOT_CARRIED_OUT = frozenset({429, 503})
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_DEFAULT_DEADLINE_MS = 1_000
_ACTIVATION_S = 300.0  # a large model is loaded, and its engine answers a canary


class SidrecError(Exception):
    """Whatever a call of the client may raise."""

    retry_after_s: float | None = None
    may_pass = False
    """Whether the same call may succeed a little later."""


class SidrecProblem(SidrecError):  # noqa: N818 - RFC 9457's own word
    """The service answered with an error."""

    def __init__(self, document: ProblemDocument, retry_after_s: float | None = None) -> None:
        super().__init__(document)
        self.status = document.status
        self.type = document.type
        self.title = document.title
        self.detail = document.detail
        self.errors: list[FieldError] = document.errors
        self.request_id = document.request_id
        self.retry_after_s = retry_after_s
        self.may_pass = document.status in _RETRIED

    def __str__(self) -> str:
        fields = "".join(f"; {error.path}: {error.message}" for error in self.errors)
        return f"{self.status} {self.type}: {self.detail}{fields} (request {self.request_id or 'without id'})"


class SidrecUnavailable(SidrecError):  # noqa: N818 - says what is the case
    """No answer came."""

    may_pass = True

    def __init__(self, message: str, *, was_sent: bool = True) -> None:
        super().__init__(message)
        self.was_sent = was_sent
        """Whether the service may have carried the request out."""


class SidrecInvalidAnswer(SidrecError):  # noqa: N818 - says what is the case
    """An answer that is none of this contract's."""


@dataclass(frozen=True)
class Thought:
    """A piece of the thought that precedes an answer."""

    text: str


class UserOptions(TypedDict, total=False):
    """What `recommend` and `rerank` share. Absent: as the contract has it."""

    user_id: str | None
    history: Sequence[str | HistoryEvent | Mapping[str, Any]] | None
    reasoning: Reasoning
    include_rationale: bool
    deadline_ms: int


class RecommendOptions(UserOptions, total=False):
    """What `recommend` takes."""

    num_items: int
    filter: ItemFilterBody | Mapping[str, Sequence[str]]
    exclude_seen: bool
    diversity: float
    exploration: float


class RerankOptions(UserOptions):
    """What `rerank` takes."""

    candidates: Sequence[str]


class NewEvent(TypedDict):
    """An event; without an `event_id` it is given one."""

    user_id: str
    item_id: str
    event_type: Literal["impression", "click", "purchase", "like", "dislike", "hide"]
    timestamp: float
    event_id: NotRequired[str]
    recommendation_id: NotRequired[str | None]


@dataclass(frozen=True)
class _Call(Generic[T]):
    """One call, before it is sent."""

    method: str
    path: str
    answer: type[T] | None  # None: the answer has no body
    attempt_s: float
    body: bytes | None = None
    is_repeatable: bool = True
    is_retried: bool = True

    def may_follow(self, error: BaseException) -> bool:
        """Whether another attempt may follow this outcome."""
        if not (self.is_retried and isinstance(error, SidrecError) and error.may_pass):
            return False
        if self.is_repeatable:
            return True
        if isinstance(error, SidrecProblem):
            return error.status in _NOT_CARRIED_OUT
        return isinstance(error, SidrecUnavailable) and not error.was_sent


class _Contract:
    """Method by method, the calls that the contract knows; and where, with what key, and how patiently."""

    def __init__(self, base_url: str, *, api_key: str | None, margin_s: float, retry_for_s: float) -> None:
        self._base_url = httpx.URL(base_url)
        self._auth = _ApiKey(api_key)
        self._margin_s = margin_s
        self._retry_for_s = retry_for_s

    def __repr__(self) -> str:
        url = self._base_url.copy_with(userinfo=b"", query=None, fragment=None)
        return f"{type(self).__name__}({str(url)!r})"

    def _question(self, path: str, answer: type[T], body: Mapping[str, Any]) -> _Call[T]:
        deadline_ms = body.get("deadline_ms", _DEFAULT_DEADLINE_MS)
        return _Call("POST", path, answer, deadline_ms / 1000 + self._margin_s, _json(body))

    def _events(self, events: Iterable[EventBody | NewEvent]) -> _Call[EventsResponse]:
        named = [event if isinstance(event, EventBody) else {"event_id": str(uuid4()), **event} for event in events]
        return self._plain("POST", "/events", EventsResponse, _json({"events": named}))

    def _plain(self, method: str, path: str, answer: type[T] | None, body: bytes | None = None) -> _Call[T]:
        return _Call(method, path, answer, _DEFAULT_DEADLINE_MS / 1000 + self._margin_s, body)

    def _item(self, item_id: str) -> _Call[ItemResponse]:
        return self._plain("GET", f"/items/{_segment(item_id)}", ItemResponse)

    def _item_put(self, item_id: str, title: str, categories: Sequence[str], sid: str | None) -> _Call[ItemResponse]:
        body = _json({"title": title, "categories": categories, "sid": sid})
        return self._plain("PUT", f"/items/{_segment(item_id)}", ItemResponse, body)

    def _item_deletion(self, item_id: str) -> _Call[ItemDeletedResponse]:
        return self._plain("DELETE", f"/items/{_segment(item_id)}", ItemDeletedResponse)

    def _health(self, probe: Literal["ready", "live"]) -> _Call[HealthResponse]:
        return replace(self._plain("GET", f"/health/{probe}", HealthResponse), is_retried=False)

    def _activation(self, bundle_id: str) -> _Call[BundleResponse]:
        return _Call("POST", f"/admin/bundles/{_segment(bundle_id)}/activate", BundleResponse, _ACTIVATION_S)

    def _rollback(self) -> _Call[BundleResponse]:
        return _Call("POST", "/admin/rollback", BundleResponse, _ACTIVATION_S, is_repeatable=False)

    def _request(self, call: _Call[Any], clock: "_Clock", accept: str) -> dict[str, Any]:
        """httpx's arguments for the next attempt."""
        headers = {"accept": accept} | ({"content-type": "application/json"} if call.body is not None else {})
        timeout = httpx.Timeout(clock.next_attempt_s())
        return {"content": call.body, "headers": headers, "auth": self._auth, "timeout": timeout}


class SidrecClient(_Contract):
    """The service from ordinary code; may be shared by threads. Close it, or use it in a `with`."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        margin_s: float = 2.0,
        retry_for_s: float = 10.0,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key=api_key, margin_s=margin_s, retry_for_s=retry_for_s)
        self._http = httpx.Client(base_url=self._base_url, verify=verify, transport=transport)

    def recommend(self, **request: Unpack[RecommendOptions]) -> RecommendResponse:
        """The items a user will most likely choose next."""
        return self._ask(self._question("/recommend", RecommendResponse, request))

    def recommend_stream(self, **request: Unpack[RecommendOptions]) -> Iterator[Thought | RecommendResponse]:
        """The thought piece by piece as it is written, and last the answer."""
        return self._stream(self._question("/recommend", RecommendResponse, request))

    def rerank(self, **request: Unpack[RerankOptions]) -> RerankResponse:
        """Candidates in the order in which the user will most likely choose them."""
        return self._ask(self._question("/rerank", RerankResponse, request))

    def rerank_stream(self, **request: Unpack[RerankOptions]) -> Iterator[Thought | RerankResponse]:
        """The thought piece by piece as it is written, and last the answer."""
        return self._stream(self._question("/rerank", RerankResponse, request))

    def record_events(self, events: Iterable[EventBody | NewEvent]) -> EventsResponse:
        """Store what users did; after a retry, what the lost attempt had stored counts as duplicates."""
        return self._ask(self._events(events))

    def history(self, user_id: str) -> HistoryResponse:
        """The stored history, oldest first; an unknown user's is empty."""
        return self._ask(self._plain("GET", f"/users/{_segment(user_id)}/history", HistoryResponse))

    def erase_user(self, user_id: str) -> None:
        """Erase every trace of the user."""
        self._send(self._plain("DELETE", f"/users/{_segment(user_id)}", None))

    def item(self, item_id: str) -> ItemResponse:
        """An item as it is recommended now."""
        return self._ask(self._item(item_id))

    def put_item(
        self, item_id: str, *, title: str, categories: Sequence[str] = (), sid: str | None = None
    ) -> ItemResponse:
        """Add or replace an item; without a `sid` the service finds one."""
        return self._ask(self._item_put(item_id, title, categories, sid))

    def delete_item(self, item_id: str) -> ItemDeletedResponse:
        """Never recommend an item again. After a retry a 404 may mean that the lost attempt did it."""
        return self._ask(self._item_deletion(item_id))

    def versions(self) -> VersionsResponse:
        """What is being served."""
        return self._ask(self._plain("GET", "/versions", VersionsResponse))

    def activate_bundle(self, bundle_id: str) -> BundleResponse:
        """Serve a published bundle from now on; takes as long as its model takes to load."""
        return self._ask(self._activation(bundle_id))

    def rollback(self) -> BundleResponse:
        """Serve the bundle that was current before."""
        return self._ask(self._rollback())

    def health(self, probe: Literal["ready", "live"] = "ready") -> HealthResponse:
        """Whether the service is ready, or at least lives; if not, its problem at once, without a retry."""
        return self._ask(self._health(probe))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, call: _Call[T]) -> T:
        return _answer(call, self._send(call))

    def _send(self, call: _Call[T]) -> httpx.Response:
        clock = _Clock(call, self._retry_for_s)

        def attempt() -> httpx.Response:
            try:
                request = self._request(call, clock, "application/json")
                return _checked(self._http.request(call.method, call.path, **request))
            except httpx.RequestError as error:
                raise _unavailable(self, error) from error

        return Retrying(**_patience(call, clock))(attempt)

    def _stream(self, call: _Call[T]) -> Iterator[Thought | T]:
        clock = _Clock(call, self._retry_for_s)

        def attempt() -> tuple[ExitStack, Iterator[ServerEvent], ServerEvent]:
            """An open response, its events, and the first of them."""
            with ExitStack() as stack:
                try:
                    request = self._request(call, clock, "text/event-stream")
                    response = stack.enter_context(self._http.stream(call.method, call.path, **request))
                    if not _is_event_stream(response):
                        response.read()
                        _refuse_stream(response)
                except httpx.RequestError as error:
                    raise _unavailable(self, error) from error
                events = self._events_of(response, clock)
                first = next(events)
                _raise_problem(first)
                return stack.pop_all(), events, first

        stack, events, event = Retrying(**_patience(call, clock))(attempt)
        with stack:
            while not isinstance(piece := _piece(call, event), BaseModel):
                if piece is not None:
                    yield piece
                event = next(events)
            yield piece

    def _events_of(self, response: httpx.Response, clock: "_Clock") -> Iterator[ServerEvent]:
        """The events of a stream; it never just ends."""
        reader = EventReader()
        try:
            for chunk in response.iter_bytes():
                yield from _read(reader, chunk)
                clock.check()
        except httpx.RequestError as error:
            raise _unavailable(self, error) from error
        raise SidrecUnavailable(_BROKEN_OFF)


class AsyncSidrecClient(_Contract):
    """The service from asyncio. Close it with `aclose`, or use it in an `async with`."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        margin_s: float = 2.0,
        retry_for_s: float = 10.0,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key=api_key, margin_s=margin_s, retry_for_s=retry_for_s)
        self._http = httpx.AsyncClient(base_url=self._base_url, verify=verify, transport=transport)

    async def recommend(self, **request: Unpack[RecommendOptions]) -> RecommendResponse:
        """The items a user will most likely choose next."""
        return await self._ask(self._question("/recommend", RecommendResponse, request))

    def recommend_stream(self, **request: Unpack[RecommendOptions]) -> AsyncIterator[Thought | RecommendResponse]:
        """The thought piece by piece as it is written, and last the answer."""
        return self._stream(self._question("/recommend", RecommendResponse, request))

    async def rerank(self, **request: Unpack[RerankOptions]) -> RerankResponse:
        """Candidates in the order in which the user will most likely choose them."""
        return await self._ask(self._question("/rerank", RerankResponse, request))

    def rerank_stream(self, **request: Unpack[RerankOptions]) -> AsyncIterator[Thought | RerankResponse]:
        """The thought piece by piece as it is written, and last the answer."""
        return self._stream(self._question("/rerank", RerankResponse, request))

    async def record_events(self, events: Iterable[EventBody | NewEvent]) -> EventsResponse:
        """Store what users did; after a retry, what the lost attempt had stored counts as duplicates."""
        return await self._ask(self._events(events))

    async def history(self, user_id: str) -> HistoryResponse:
        """The stored history, oldest first; an unknown user's is empty."""
        return await self._ask(self._plain("GET", f"/users/{_segment(user_id)}/history", HistoryResponse))

    async def erase_user(self, user_id: str) -> None:
        """Erase every trace of the user."""
        await self._send(self._plain("DELETE", f"/users/{_segment(user_id)}", None))

    async def item(self, item_id: str) -> ItemResponse:
        """An item as it is recommended now."""
        return await self._ask(self._item(item_id))

    async def put_item(
        self, item_id: str, *, title: str, categories: Sequence[str] = (), sid: str | None = None
    ) -> ItemResponse:
        """Add or replace an item; without a `sid` the service finds one."""
        return await self._ask(self._item_put(item_id, title, categories, sid))

    async def delete_item(self, item_id: str) -> ItemDeletedResponse:
        """Never recommend an item again. After a retry a 404 may mean that the lost attempt did it."""
        return await self._ask(self._item_deletion(item_id))

    async def versions(self) -> VersionsResponse:
        """What is being served."""
        return await self._ask(self._plain("GET", "/versions", VersionsResponse))

    async def activate_bundle(self, bundle_id: str) -> BundleResponse:
        """Serve a published bundle from now on; takes as long as its model takes to load."""
        return await self._ask(self._activation(bundle_id))

    async def rollback(self) -> BundleResponse:
        """Serve the bundle that was current before."""
        return await self._ask(self._rollback())

    async def health(self, probe: Literal["ready", "live"] = "ready") -> HealthResponse:
        """Whether the service is ready, or at least lives; if not, its problem at once, without a retry."""
        return await self._ask(self._health(probe))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _ask(self, call: _Call[T]) -> T:
        return _answer(call, await self._send(call))

    async def _send(self, call: _Call[T]) -> httpx.Response:
        clock = _Clock(call, self._retry_for_s)

        async def attempt() -> httpx.Response:
            try:
                request = self._request(call, clock, "application/json")
                return _checked(await self._http.request(call.method, call.path, **request))
            except httpx.RequestError as error:
                raise _unavailable(self, error) from error

        return await AsyncRetrying(**_patience(call, clock))(attempt)

    async def _stream(self, call: _Call[T]) -> AsyncIterator[Thought | T]:
        clock = _Clock(call, self._retry_for_s)

        async def attempt() -> tuple[AsyncExitStack, AsyncGenerator[ServerEvent, None], ServerEvent]:
            """An open response, its events, and the first of them."""
            async with AsyncExitStack() as stack:
                try:
                    request = self._request(call, clock, "text/event-stream")
                    response = await stack.enter_async_context(self._http.stream(call.method, call.path, **request))
                    if not _is_event_stream(response):
                        await response.aread()
                        _refuse_stream(response)
                except httpx.RequestError as error:
                    raise _unavailable(self, error) from error
                events = self._events_of(response, clock)
                stack.push_async_callback(events.aclose)
                first = await anext(events)
                _raise_problem(first)
                return stack.pop_all(), events, first

        opened: tuple[AsyncExitStack, AsyncGenerator[ServerEvent, None], ServerEvent]
        opened = await AsyncRetrying(**_patience(call, clock))(attempt)
        stack, events, event = opened
        async with stack:
            while not isinstance(piece := _piece(call, event), BaseModel):
                if piece is not None:
                    yield piece
                event = await anext(events)
            yield piece

    async def _events_of(self, response: httpx.Response, clock: "_Clock") -> AsyncGenerator[ServerEvent, None]:
        """The events of a stream; it never just ends."""
        reader = EventReader()
        try:
            async for chunk in response.aiter_bytes():
                for event in _read(reader, chunk):
                    yield event
                clock.check()
        except httpx.RequestError as error:
            raise _unavailable(self, error) from error
        raise SidrecUnavailable(_BROKEN_OFF)


class _ApiKey(httpx.Auth):
    """Adds the key to each request, so that it is in no headers that anything else holds or shows."""

    def __init__(self, key: str | None) -> None:
        self._key = SecretStr(key) if key is not None else None

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        """httpx's way to complete a request."""
        if self._key is not None:
            request.headers["x-api-key"] = self._key.get_secret_value()
        yield request


class _Clock:
    """The time that a call has, all its attempts together."""

    def __init__(self, call: _Call[Any], retry_for_s: float) -> None:
        self._attempt_s = call.attempt_s
        self._end_s = time.monotonic() + call.attempt_s + retry_for_s

    def left_s(self) -> float:
        """Seconds that are left."""
        return self._end_s - time.monotonic()

    def next_attempt_s(self) -> float:
        """What an attempt that begins now may take."""
        return max(min(self._attempt_s, self.left_s()), 0.001)

    def check(self) -> None:
        """`SidrecUnavailable` when nothing is left."""
        if self.left_s() <= 0:
            raise SidrecUnavailable("the stream lasted longer than the call may take, although it was kept alive")


def _patience(call: _Call[Any], clock: _Clock) -> dict[str, Any]:
    """tenacity's arguments: after which outcomes to wait for how long, and when to give up."""

    def pause_s(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        named_s = error.retry_after_s if isinstance(error, SidrecError) else None
        if named_s is not None:
            return named_s + random.uniform(0, 0.1)  # not all clients at the same moment
        doubled_s: float = _FIRST_PAUSE_S * 2 ** (state.attempt_number - 1)
        return random.uniform(0.5, 1.0) * min(doubled_s, _LONGEST_PAUSE_S)

    return {
        "retry": retry_if_exception(call.may_follow),
        "wait": pause_s,
        "stop": lambda state: state.upcoming_sleep >= clock.left_s(),
        "reraise": True,
    }


_BROKEN_OFF = "the stream ended before its answer"


def _unavailable(client: _Contract, error: httpx.RequestError) -> SidrecUnavailable:
    return SidrecUnavailable(
        f"{client!r}: no answer ({type(error).__name__}: {error})", was_sent=not isinstance(error, _NEVER_SENT)
    )


def _checked(response: httpx.Response) -> httpx.Response:
    """A response that is no error."""
    if response.is_success:
        return response
    retry_after_s = _seconds(response.headers.get("retry-after"))
    try:
        document = ProblemDocument.model_validate_json(response.content)
    except ValidationError:  # of a proxy, say, and not of the service
        document = _foreign_problem(response)
    raise SidrecProblem(document.model_copy(update={"status": response.status_code}), retry_after_s)


def _foreign_problem(response: httpx.Response) -> ProblemDocument:
    return ProblemDocument(
        type="about:blank",
        title=HTTPStatus(response.status_code).phrase if response.status_code in set(HTTPStatus) else "Unknown status",
        status=response.status_code,
        detail="the answer is no problem document of the service: is something else between, or at this address?",
        request_id=response.headers.get("x-request-id", ""),
    )


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After`, which is a number of seconds or a date."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _answer(call: _Call[T], response: httpx.Response) -> T:
    if call.answer is None:
        raise TypeError(f"{call.method} {call.path} has no answer to read")
    return _parse(call.answer, response.content)


def _parse(model: type[T], content: bytes | str) -> T:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise SidrecInvalidAnswer(f"the answer is no {model.__name__}: {error}") from error


def _is_event_stream(response: httpx.Response) -> bool:
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return response.is_success and media_type == "text/event-stream"


def _refuse_stream(response: httpx.Response) -> None:
    _checked(response)
    raise SidrecInvalidAnswer(f"asked for events, got {response.headers.get('content-type')!r}")


def _read(reader: EventReader, chunk: bytes) -> Iterator[ServerEvent]:
    try:
        yield from reader.feed(chunk)
    except EventStreamError as error:
        raise SidrecInvalidAnswer(str(error)) from error


def _piece(call: _Call[T], event: ServerEvent) -> Thought | T | None:
    """What an event tells; None if it is one that this client does not know."""
    _raise_problem(event)
    if event.name == "thought":
        return Thought(_parse(_ThoughtData, event.data).text)
    if event.name == "answer" and call.answer is not None:
        return _parse(call.answer, event.data)
    return None


def _raise_problem(event: ServerEvent) -> None:
    if event.name == "problem":
        raise SidrecProblem(_parse(ProblemDocument, event.data))


class _ThoughtData(BaseModel):
    text: str


def _json(body: Mapping[str, Any]) -> bytes:
    """JSON; what is not given is left out, so that the service's defaults hold."""
    return json.dumps(to_jsonable_python(body), ensure_ascii=True, allow_nan=False).encode()


def _segment(name: str) -> str:
    """One segment of a path, whatever it holds: `.` and `..` too are names here, not steps."""
    return quote(name, safe="").replace(".", "%2E")
