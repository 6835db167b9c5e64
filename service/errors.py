"""Errors as RFC 9457 problem documents. Nothing else of an exception ever leaves the service.

Problem                     status  type
├── BadRequestProblem          422  invalid-request
├── UnauthorizedProblem        401  unauthorized
├── ForbiddenProblem           403  forbidden
├── NotFoundProblem            404  not-found
├── ConflictProblem            409  conflict
└── UnavailableProblem         503  unavailable, overloaded, history-unavailable   (with Retry-After)
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"


class FieldError(BaseModel):
    """One bad field."""

    path: str
    message: str


class ProblemDocument(BaseModel):
    """The body of every error."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[FieldError] = []


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


class UnavailableProblem(Problem):
    """Try again later: the header says when."""

    status, type, title = 503, "unavailable", "Service unavailable"

    def __init__(self, detail: str, *, retry_after_s: int = 1, kind: str = "unavailable") -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)})
        self.type = kind


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem document; unforeseen ones are `unexpected`, answered by the middleware."""

    async def on_problem(request: Request, problem: Problem) -> JSONResponse:
        return _respond(problem_document(request, problem), problem.headers)

    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [_field_error(one) for one in error.errors()]
        detail = f"{len(errors)} field{'s' if len(errors) > 1 else ''} of the request cannot be accepted; see errors"
        return _respond(_document(request, 422, "invalid-request", "Invalid request", detail, errors))

    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        title = HTTPStatus(error.status_code).phrase
        kind = title.lower().replace(" ", "-")
        detail = f"{request.method} {request.scope['path']}: {error.detail}"
        return _respond(_document(request, error.status_code, kind, title, detail), error.headers)

    app.add_exception_handler(Problem, on_problem)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, on_http)  # type: ignore[arg-type]


def unexpected(request: Request) -> JSONResponse:
    """The answer to a fault of our own."""
    return _respond(_unexpected(request))


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
    return FieldError(path=path, message=str(error["msg"]))


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
