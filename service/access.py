"""Who asks and what is asked, settled before a route runs: the key, its rate limit, the address, and then the body.

A body is read for known callers only. FastAPI alone would read and parse it first. And what the engine could not answer
in time is refused as soon as the JSON is read, before it is validated: a no must cost far less than an answer.
"""

from collections.abc import Callable, Coroutine, Sequence
from inspect import signature
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote_to_bytes

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.types import Receive, Scope, Send

from service import strict_json
from service.errors import MalformedProblem, UnsupportedMediaProblem
from service.schemas import DEFAULT_DEADLINE_MS, DeadlineMs, UserRequest
from service.security import Caller
from service.state import state_of

Handler: TypeAlias = Callable[[Request], Coroutine[Any, Any, Response]]
T = TypeVar("T")

_DEADLINE_MS: TypeAdapter[int] = TypeAdapter(DeadlineMs)

DEADLINE_HEADER = "x-deadline-ms"
_CALLER = "sidrec_caller"
_ENGINE_ENDPOINT = ("body", "request", "deadline")


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

    def get_route_handler(self) -> Handler:
        """The route's handler, behind the checks."""
        answer, has_body = self.get_answer(), self.body_field is not None

        async def checked(request: Request) -> Response:
            await _identify(request)
            _check_address(request.scope)
            if has_body:
                request = _StrictRequest(request.scope, request.receive)
                await request.json()  # here, because FastAPI would hide the reason of a failure
            return await answer(request)

        return checked

    def get_answer(self) -> Handler:
        """What comes behind the checks: FastAPI's own handler."""
        return super().get_route_handler()


class EngineRoute(StrictRoute):
    """A route that asks the engine: `endpoint(body, request, deadline)`, whose body is a `UserRequest`.

    What FastAPI does with an endpoint's signature and its answer is done here for just that signature: in general, it
    takes 120 µs of the event loop, a tenth of what an answer costs.
    """

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - FastAPI's own
        """FastAPI's arguments."""
        super().__init__(*args, **options)
        handler = self.get_route_handler()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await (await handler(Request(scope, receive, send)))(scope, receive, send)

        self.app = app  # in place of one that keeps stacks of dependencies' exits, of which there are none

    def get_answer(self) -> Handler:
        """Refuse what would be late; validate, ask, and write the answer.

        `TypeError` for an endpoint of another form, and where there are dependencies: nobody would resolve them.
        """
        if (form := tuple(signature(self.endpoint).parameters)) != _ENGINE_ENDPOINT or self.dependencies:
            raise TypeError(
                f"{self.path}: an EngineRoute's endpoint takes {_ENGINE_ENDPOINT} and no dependencies, "
                f"not {form} and {len(self.dependencies)}: make it a StrictRoute, which FastAPI serves"
            )
        body_type: TypeAdapter[UserRequest] = TypeAdapter(self.body_field.field_info.annotation)  # type: ignore[arg-type, union-attr]

        async def answer(request: Request) -> Response:
            value = await request.json()
            if (deadline_ms := _deadline_ms(value, request)) is not None:
                state_of(request).deployments.refuse_late(deadline_ms / 1000)
            errors: list[Any] = []
            header, deadline = request.headers.get(DEADLINE_HEADER), None
            if header is not None:
                deadline = _validated(_DEADLINE_MS, header, ("header", DEADLINE_HEADER), errors)
            body = _validated(body_type, value, ("body",), errors)
            if errors:
                raise RequestValidationError(errors, body=value)
            answered: BaseModel | Response = await self.endpoint(body, request, deadline)
            if isinstance(answered, Response):
                return answered
            return Response(answered.model_dump_json(), media_type="application/json")

        return answer


def _validated(kind: TypeAdapter[T], value: Any, place: Sequence[str], errors: list[Any]) -> T | None:  # noqa: ANN401 - any JSON
    """What `value` means; None, and what is wrong with it in `errors`, where it means nothing."""
    if value is None:
        errors.append({"type": "missing", "loc": place, "msg": "Field required", "input": None})
        return None
    try:
        return kind.validate_python(value, from_attributes=True)
    except ValidationError as invalid:
        errors += [one | {"loc": (*place, *one["loc"])} for one in invalid.errors(include_url=False)]
        return None


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
    given = body.get("deadline_ms", request.headers.get(DEADLINE_HEADER, DEFAULT_DEADLINE_MS))
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
