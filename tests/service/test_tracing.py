"""Traces of real requests, collected in memory: one tree a request, continued from the caller's, without secrets."""

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service import tracing
from tests.service.running import Service
from tests.service.world import ITEM_IDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


async def test_a_request_is_one_tree_from_the_callers_trace_to_the_engine(
    service: Service, collected: InMemorySpanExporter, user_id: str
):
    await service.clicks(user_id, ITEM_IDS[0])
    collected.clear()
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    await service.http.post("/recommend", json={"user_id": user_id, "deadline_ms": 60_000}, headers=headers)
    spans = by_name(collected)
    server = spans["POST /recommend"]
    assert set(spans) == {"POST /recommend", "history", "decode"}
    assert {format(span.context.trace_id, "032x") for span in spans.values() if span.context} == {TRACE}
    assert server.context is not None
    for stage in ("history", "decode"):
        parent = spans[stage].parent
        assert parent is not None
        assert parent.span_id == server.context.span_id
    assert server.attributes is not None
    assert server.attributes["http.response.status_code"] == 200
    assert server.attributes["http.route"] == "/recommend"


async def test_spans_name_no_user_and_no_key(service: Service, collected: InMemorySpanExporter):
    await service.http.get("/users/very-secret-user/history", headers={"x-api-key": "very-secret-key"})
    text = "".join(span.to_json() for span in collected.get_finished_spans())
    assert "GET /users/{user_id" in text
    assert "very-secret" not in text


async def test_without_a_collector_nothing_is_recorded(service: Service):
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    with tracing.span("stage"):
        assert not trace.get_current_span().is_recording()
    await service.recommend(history=[ITEM_IDS[0]])
