"""Who asks and what is asked, settled before a route runs: the key, its rate limit, the address, and then the body.

A body is read for known callers only. FastAPI alone would read and parse it first. And what the engine could not answer
in time is refused as soon as the JSON is read, before it is validated: a no must cost far less than an answer.
"""

from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.types import Scope

from service import strict_json
from service.errors import MalformedProblem, UnsupportedMediaProblem
from service.schemas import DEFAULT_DEADLINE_MS, DeadlineMs, UserRequest
from service.security import Caller
from service.state import state_of

_DEADLINE_MS: TypeAdapter[int] = TypeAdapter(DeadlineMs)


_CALLER = "sidrec_caller"


def caller_of(request: Request) -> Caller:
    """Whose request it is, on a `StrictRoute`."""
    caller: Caller = request.scope[_CALLER]
    return caller


async def _identify(request: Request) -> None:
    """By its key, counted against the key's rate limit."""
    state = state_of(request)
    caller = state.api_keys.check(request.headers.get("x-api-key"))
    await state.rate_limits.take(caller)
    request.scope[_CALLER] = caller


class StrictRoute(APIRoute):
    """A route for callers with a key, where keys are configured, whose body is strict JSON."""

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - FastAPI's own
        """FastAPI's arguments; the key is the operation's security in the schema."""
        super().__init__(*args, **options)
        self.openapi_extra = (self.openapi_extra or {}) | {"security": [{"ApiKey": []}]}

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind the checks."""
        answer = super().get_route_handler()
        body_type = None if self.body_field is None else self.body_field.field_info.annotation
        asks_engine = isinstance(body_type, type) and issubclass(body_type, UserRequest)

        async def checked(request: Request) -> Response:
            await _identify(request)
            _check_address(request.scope)
            if body_type is not None:
                request = _StrictRequest(request.scope, request.receive)
                value = await request.json()  # here, because FastAPI would hide the reason of a failure
                if asks_engine and (deadline_ms := _deadline_ms(value, request)) is not None:
                    state_of(request).deployments.refuse_late(deadline_ms / 1000)
            return await answer(request)

        return checked


class _StrictRequest(Request):
    """A request whose JSON is read strictly, once."""

    async def json(self) -> Any:  # noqa: ANN401 - any JSON
        """The value of the body; of an empty one None."""
        if not hasattr(self, "_json"):
            body = await self.body()
            if body:
                _check_media(self)
            self._json = strict_json.parse(body) if body else None
        return self._json


def _deadline_ms(body: Any, request: Request) -> int | None:  # noqa: ANN401 - any JSON
    """What a request to the engine leaves for its answer; None of one that needs none, or that is invalid anyway."""
    if not isinstance(body, dict) or not (body.get("user_id") or body.get("history")):
        return None
    given = body.get("deadline_ms", request.headers.get("x-deadline-ms", DEFAULT_DEADLINE_MS))
    try:
        return _DEADLINE_MS.validate_python(given)
    except ValidationError:
        return None


def _check_media(request: Request) -> None:
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise UnsupportedMediaProblem("compressed bodies are not accepted: send it as it is")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise UnsupportedMediaProblem("the body must be JSON: send it with content-type: application/json")


def _check_address(scope: Scope) -> None:
    """Two addresses that differ mean two things: what is no UTF-8 would be read as one replacement character."""
    address = scope.get("raw_path", b"") + b"?" + scope["query_string"]
    if b"%" not in address:
        return
    meant = unquote_to_bytes(address)
    try:
        meant.decode()
    except UnicodeDecodeError:
        raise MalformedProblem("the address is not UTF-8") from None
    if b"\0" in meant:
        raise MalformedProblem("the address holds a NUL")
