"""Errors as RFC 9457 problem documents. Nothing else of an exception ever leaves the service.

Problem                     status  type
├── MalformedProblem           400  bad-request
├── BadRequestProblem          422  invalid-request
├── UnauthorizedProblem        401  unauthorized
├── ForbiddenProblem           403  forbidden
├── NotFoundProblem            404  not-found
├── RequestTimeoutProblem      408  request-timeout
├── ConflictProblem            409  conflict
├── TooLargeProblem            413  content-too-large
├── UnsupportedMediaProblem    415  unsupported-media-type
├── RateLimitedProblem         429  rate-limited                                   (with Retry-After)
├── HeadersTooLargeProblem     431  headers-too-large
└── UnavailableProblem         503  unavailable, overloaded, history-unavailable   (with Retry-After)
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.problems import MEDIA_TYPE
from service.problems import FieldError as FieldError  # noqa: PLC0414 - a word of this module's too
from service.problems import ProblemDocument as ProblemDocument  # noqa: PLC0414 - a word of this module's too

_MAX_FIELD_ERRORS, _MAX_PATH = 100, 500  # a refusal is not to be longer than what it refuses


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """An error that a client is told of."""

    status = 500
    type = "internal-error"
    title = "Internal error"

    def __init__(
        self, detail: str, *, errors: Sequence[FieldError] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})


class BadRequestProblem(Problem):
    """The request breaks a rule that its fields alone do not show."""

    status, type, title = 422, "invalid-request", "Invalid request"


class MalformedProblem(Problem):
    """The request cannot be read at all."""

    status, type, title = 400, "bad-request", "Bad request"


class UnauthorizedProblem(Problem):
    """No key, or a wrong one."""

    status, type, title = 401, "unauthorized", "Unauthorized"


class ForbiddenProblem(Problem):
    """A key of ours that may not do this."""

    status, type, title = 403, "forbidden", "Forbidden"


class ConflictProblem(Problem):
    """What is asked for cannot be done in the present state."""

    status, type, title = 409, "conflict", "Conflict"


class NotFoundProblem(Problem):
    """No such thing."""

    status, type, title = 404, "not-found", "Not found"


class RequestTimeoutProblem(Problem):
    """The request did not come whole in time."""

    status, type, title = 408, "request-timeout", "Request timeout"


class TooLargeProblem(Problem):
    """More bytes than we read."""

    status, type, title = 413, "content-too-large", "Content too large"


class UnsupportedMediaProblem(Problem):
    """A body of a kind that we do not read."""

    status, type, title = 415, "unsupported-media-type", "Unsupported media type"


class HeadersTooLargeProblem(Problem):
    """Headers of more bytes than we read."""

    status, type, title = 431, "headers-too-large", "Headers too large"


class RateLimitedProblem(Problem):
    """This key asks too often: the header says when it may again."""

    status, type, title = 429, "rate-limited", "Too many requests"

    def __init__(self, detail: str, *, retry_after_s: int) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)})


class UnavailableProblem(Problem):
    """Try again later: the header says when."""

    status, type, title = 503, "unavailable", "Service unavailable"

    def __init__(self, detail: str, *, retry_after_s: int = 1, kind: str = "unavailable") -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)})
        self.type = kind


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem document; unforeseen ones are `unexpected`, answered by the middleware."""

    async def on_problem(request: Request, problem: Problem) -> JSONResponse:
        return problem_response(request, problem)

    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()
        errors = [_field_error(one) for one in found[:_MAX_FIELD_ERRORS]]
        detail = f"{len(found)} field{'s' if len(found) > 1 else ''} of the request cannot be accepted; see errors"
        return _respond(_document(request, 422, "invalid-request", "Invalid request", detail, errors))

    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        title = HTTPStatus(error.status_code).phrase
        kind = title.lower().replace(" ", "-")
        detail = f"{request.method} {request.scope['path']}: {error.detail}"
        headers = {"Allow": _allowed(request)} if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED else error.headers
        return _respond(_document(request, error.status_code, kind, title, detail), headers)

    app.add_exception_handler(Problem, on_problem)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, on_http)  # type: ignore[arg-type]


def _allowed(request: Request) -> str:
    """The methods of all routes of this path; the framework names those of the first one."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in getattr(route, "methods", None) or ()}))


def unexpected(request: Request) -> JSONResponse:
    """The answer to a fault of our own."""
    return _respond(_unexpected(request))


def problem_response(request: Request, problem: Problem) -> JSONResponse:
    """The answer to what went wrong."""
    return _respond(problem_document(request, problem), problem.headers)


def problem_document(request: Request, error: Exception) -> ProblemDocument:
    """What a client is told of `error`: of anything but a `Problem`, only that it happened."""
    if isinstance(error, Problem):
        return _document(request, error.status, error.type, error.title, error.detail, error.errors)
    return _unexpected(request)


def request_id_of(request: Request) -> str:
    """The id that the request middleware gave this request."""
    return str(request.scope.get("sidrec_request_id", ""))


def _field_error(error: Mapping[str, Any]) -> FieldError:
    path = ".".join(str(part) for part in error["loc"])
    return FieldError(path=path[:_MAX_PATH], message=str(error["msg"]))


def _unexpected(request: Request) -> ProblemDocument:
    return _document(
        request, 500, "internal-error", "Internal error", "The service failed; its log has the request id."
    )


def _document(
    request: Request, status: int, kind: str, title: str, detail: str, errors: Sequence[FieldError] = ()
) -> ProblemDocument:
    return ProblemDocument(
        type=f"urn:sidrec:{kind}",
        title=title,
        status=status,
        detail=detail,
        request_id=request_id_of(request),
        errors=list(errors),
    )


def _respond(document: ProblemDocument, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(document.model_dump(), document.status, dict(headers or {}), media_type=MEDIA_TYPE)
