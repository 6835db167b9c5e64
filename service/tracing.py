"""OpenTelemetry traces: one server span a request, one child for each stage (Redis, thought, engine).

Off until `SIDREC_OTLP_ENDPOINT` names a collector (OTLP over HTTP); without one the calls below do nothing. A caller's
`traceparent` is continued. Spans carry ids, never bodies, keys or user ids.
"""

from contextlib import AbstractContextManager, nullcontext

from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind, Status, StatusCode
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_tracer: trace.Tracer | None = None
_NO_SPAN: AbstractContextManager[None] = nullcontext()


def configure(endpoint: str, service_version: str) -> None:
    """Send spans to a collector from now on, in batches, in the background. Once a process."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": "sidrec", "service.version": service_version})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")))
    trace.set_tracer_provider(provider)
    global _tracer  # noqa: PLW0603 - the process has one
    _tracer = provider.get_tracer("sidrec")


def span(name: str) -> AbstractContextManager[object]:
    """A stage of the request at hand."""
    return _NO_SPAN if _tracer is None else _tracer.start_as_current_span(name)


class Traced:
    """A server span round every HTTP request, named by its route once that is known. Plain ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request; anything but HTTP passes through."""
        if scope["type"] != "http" or _tracer is None:
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with _tracer.start_as_current_span(
            scope["method"],
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "url.path": _known_path(scope)},
        ) as current:

            async def traced_send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    current.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        current.set_status(Status(StatusCode.ERROR))
                await send(message)

            try:
                await self._app(scope, receive, traced_send)
            finally:
                route = getattr(scope.get("route"), "path_format", None)
                if route is not None:
                    current.update_name(f"{scope['method']} {route}")
                    current.set_attribute("http.route", route)
                current.set_attribute("sidrec.request_id", str(scope.get("sidrec_request_id", "")))


def _known_path(scope: Scope) -> str:
    """The path without what may name a user or an item."""
    first = str(scope["path"]).split("/", 2)[1:2]
    return "/" + "".join(first)
