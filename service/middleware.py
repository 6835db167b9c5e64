"""What surrounds every request: its id, its time, its count, its line in the log, the answer to a fault. Plain ASGI.

Whatever is logged while a request is worked on has its id (`structlog.contextvars`).
"""

import re
import time
from http import HTTPMethod

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors
from service.metrics import Metrics
from service.recommender import new_ulid

log = structlog.get_logger(__name__)

_GIVEN_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_METHODS = frozenset(HTTPMethod)
_POLICY = b"default-src 'none'; frame-ancestors 'none'"
_DOCS_POLICY = (  # FastAPI's page: Swagger UI from its CDN, started by a script in the page
    b"default-src 'none'; frame-ancestors 'none'; connect-src 'self'; img-src data: https://fastapi.tiangolo.com; "
    b"script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net"
)
_SECURE = {
    b"x-content-type-options": b"nosniff",
    b"content-security-policy": _POLICY,
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
_SECURE_DOCS = _SECURE | {b"content-security-policy": _DOCS_POLICY}
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that did not wait for its answer


class Instrumented:
    """Gives each request an id (the caller's `x-request-id`, if it is printable ASCII), and measures its answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics, *, logs_requests: bool = False) -> None:
        self._app = app
        self._metrics = metrics
        self._logs_requests = logs_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given.decode() if _GIVEN_ID.fullmatch(given) else new_ulid()
        scope["sidrec_request_id"] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)  # of this request's task
        timings: dict[str, float] = {}
        scope["sidrec_timings_ms"] = timings
        start = time.perf_counter()
        status, has_started = 500, False

        async def instrumented_send(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                status, has_started = message["status"], True
                stages = timings | {"total": 1000 * (time.perf_counter() - start)}
                shown = ", ".join(f"{name};dur={ms:.2f}" for name, ms in stages.items())
                own = [(b"x-request-id", request_id.encode()), (b"server-timing", shown.encode())]
                message["headers"] = _secured([*message["headers"], *own], scope["path"])
            await send(message)

        try:
            await self._app(scope, receive, instrumented_send)
        except ClientDisconnect:
            status = _CLIENT_CLOSED_REQUEST
        except Exception:
            log.exception("unexpected_error", path=scope["path"], request_id=request_id)
            if has_started:
                raise
            await errors.unexpected(Request(scope))(scope, receive, instrumented_send)
        finally:
            route = _route_of(scope)
            method = scope["method"] if scope["method"] in _METHODS else "other"  # a caller may invent methods
            seconds = time.perf_counter() - start
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            if self._logs_requests:  # the route, not the path: that names users
                stages = {f"{stage}_ms": ms for stage, ms in timings.items() if stage != "total"}
                log.info("request", method=method, route=route, status=status, ms=round(1000 * seconds, 3), **stages)
            structlog.contextvars.unbind_contextvars("request_id")


def _secured(headers: list[tuple[bytes, bytes]], path: str) -> list[tuple[bytes, bytes]]:
    """With what a browser may do with an answer: nothing. A page of ours sets its own policy, which is kept."""
    policies = _SECURE_DOCS if path == "/docs" else _SECURE
    present = {name for name, _ in headers}
    return headers + [one for one in policies.items() if one[0] not in present]


def _route_of(scope: Scope) -> str:
    """The route's template, so that ids in paths make no new label; one label for all that matches none."""
    route = scope.get("route")
    return str(getattr(route, "path_format", "unmatched"))
