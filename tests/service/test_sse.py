"""Answers as server-sent events, over raw ASGI and over a real socket, read by a parser of the test's own."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.types import Message, Scope

from semantic_ids.bundle import Bundle
from service.engine.base import DecodeRequest, DecodeResult, EngineUnavailableError, ThoughtListener
from service.recommender import ThinkingLimits
from service.security import hash_key
from service.settings import Settings
from service.sse import EventStream, Work, prefers_events
from tests.service.engines import InstantEngine, failing
from tests.service.running import PATIENT_MS, Service, assert_problem, running, until
from tests.service.thinking import PIECES, RATIONALE, THOUGHT_IDS, thinking_service
from tests.service.world import ITEM_IDS, ids_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

HISTORY = list(ITEM_IDS[:5])
EVENTS = "text/event-stream"
THINKING: dict[str, Any] = {
    "history": HISTORY, "reasoning": "on", "include_rationale": True, "deadline_ms": PATIENT_MS,
}  # fmt: skip
ASKED = [
    pytest.param("/recommend", THINKING, id="recommend"),
    pytest.param("/rerank", {**THINKING, "candidates": [*ITEM_IDS[:40], "gone"]}, id="rerank"),
]
Event = tuple[str, Any]


def parse(stream: str) -> list[Event]:
    """Names and JSON of the finished events of a stream, by the rules of the HTML standard, 9.2.6."""
    events: list[Event] = []
    name, data = "message", list[str]()
    for line in re.split("\r\n|\n|\r", stream):
        if line == "":
            if data:
                events.append((name, json.loads("\n".join(data))))
            name, data = "message", []
        key, _, value = line.partition(":")
        if key == "event":
            name = value.removeprefix(" ")
        elif key == "data":
            data.append(value.removeprefix(" "))
        else:
            assert key == "", "a comment or the end of an event"
    return events


@dataclass
class Exchange:
    """One request to an ASGI application, whose client can see what came so far, and leave."""

    messages: list[Message] = field(default_factory=list)
    has_left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages[1:]).decode()

    @property
    def events(self) -> list[Event]:
        return parse(self.text)

    @property
    def is_over(self) -> bool:
        return len(self.messages) > 1 and not self.messages[-1].get("more_body", False)


@asynccontextmanager
async def exchange(app: Any, path: str, body: Any) -> AsyncIterator[Exchange]:
    """Begin a request; on exit its application has ended."""
    one = Exchange()
    received: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Message:
        if received:
            return received.pop()
        await one.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        one.messages.append(message)

    task = asyncio.ensure_future(app(_scope(path), receive, send))
    try:
        yield one
    except BaseException:
        task.cancel()  # it may wait for what the test has not let happen
        raise
    await task


def _scope(path: str) -> Scope:
    headers = {"accept": EVENTS, "content-type": "application/json", "x-request-id": "mine"}
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "server": ("service", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip


async def stream(
    service: Service, path: str, body: dict[str, Any], **headers: str
) -> tuple[httpx.Response, list[Event]]:
    response = await service.post(path, body, accept=EVENTS, **headers)
    assert response.status_code == 200, response.text
    return response, parse(response.text)


def in_flight(service: Service) -> float | None:
    return service.state.metrics.registry.get_sample_value("sidrec_http_in_flight")


def num_requests(service: Service, status: int) -> float | None:
    labels = {"method": "POST", "route": "/recommend", "status": str(status)}
    return service.state.metrics.registry.get_sample_value("sidrec_http_requests_total", labels)


class GatedEngine(InstantEngine):
    """Tells a token of a thought each time it is let, and then answers, or raises `error`."""

    def __init__(self, bundle: Bundle, error: Exception | None = None) -> None:
        super().__init__(bundle)
        self.gate = asyncio.Semaphore(0)
        self.error = error
        self.was_cancelled = False

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """THOUGHT, token by token."""
        try:
            for token_id in THOUGHT_IDS:
                await self.gate.acquire()
                if on_thought is not None:
                    on_thought([token_id])
            await self.gate.acquire()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if self.error is not None:
            raise self.error
        return replace(await super().decode(request), thought=THOUGHT_IDS, thought_end="closed")

    def let(self, count: int) -> None:
        """Let so many steps happen: tokens, and then the answer."""
        for _ in range(count):
            self.gate.release()


@pytest.fixture
def thinking_settings(reciting: Bundle, tmp_path: Path) -> Settings:
    """Settings for a service of the test's own."""
    return Settings(bundles=reciting.path.parent, data_dir=tmp_path / "redis")


@asynccontextmanager
async def gated(settings: Settings, error: Exception | None = None) -> AsyncIterator[tuple[Service, GatedEngine]]:
    async with running(settings, lambda bundle, _settings, _metrics: GatedEngine(bundle, error)) as service:
        engine = service.state.engine
        assert isinstance(engine, GatedEngine)
        yield service, engine


async def thought_then_failure(service: Service, engine: GatedEngine) -> Exchange:
    """The engine fails when all of its thought has been told: nothing is, before the index of titles is there."""
    async with exchange(service.app, "/recommend", THINKING) as one:
        engine.let(len(THOUGHT_IDS))
        await until(lambda: "".join(data["text"] for _, data in one.events) == RATIONALE)
        engine.let(1)
    return one


class TestEvents:
    """What is in a stream, and when."""

    @pytest.mark.parametrize(("path", "body"), ASKED)
    async def test_the_thoughts_come_first_and_together_are_the_rationale(
        self, thinking: Service, path: str, body: dict[str, Any]
    ):
        response, events = await stream(thinking, path, body)
        names = [name for name, _ in events]
        assert names == ["thought"] * (len(names) - 1) + ["answer"]
        assert all(set(data) == {"text"} and data["text"] for name, data in events if name == "thought")
        pieces = [data["text"] for _, data in events[:-1]]
        assert pieces == list(PIECES), "each sentence as it comes, and without the last one, which invents a SID"
        answer = events[-1][1]
        assert answer["rationale"] == RATIONALE
        plain = (await thinking.post(path, body)).json()
        assert set(answer) == set(plain)
        assert answer["items"] == plain["items"]
        assert answer["timings_ms"]["reasoning"] > 0
        assert response.headers["content-type"].split(";")[0] == EVENTS

    async def test_the_headers_keep_it_from_being_stored_or_buffered(self, thinking: Service):
        response, _ = await stream(thinking, "/recommend", THINKING, x_request_id="mine")
        for name, value in {"cache-control": "no-store", "x-accel-buffering": "no", "x-request-id": "mine"}.items():
            assert response.headers[name] == value
        assert "content-length" not in response.headers
        assert "total;dur=" in response.headers["server-timing"]

    @pytest.mark.parametrize("reasoning", ["auto", "off"])
    async def test_without_reasoning_there_is_just_the_answer(self, thinking: Service, reasoning: str):
        body = {"history": HISTORY, "reasoning": reasoning, "deadline_ms": PATIENT_MS}
        _, events = await stream(thinking, "/recommend", body)
        assert [name for name, _ in events] == ["answer"]
        assert events[0][1]["source"] == "model"

    async def test_a_bundle_that_cannot_think_streams_its_answer(self, instant_service: Service):
        _, events = await stream(instant_service, "/rerank", {"history": HISTORY, "candidates": HISTORY})
        assert [name for name, _ in events] == ["answer"]
        assert sorted(ids_of(events[0][1])) == sorted(HISTORY)

    async def test_the_first_thought_is_sent_when_there_is_one(self, thinking_settings: Settings):
        async with gated(thinking_settings) as (service, engine), exchange(service.app, "/recommend", THINKING) as one:
            for number in (1, 2):
                engine.let(4)  # a sentence is over when white space follows
                await until(lambda number=number: len(one.events) == number)  # type: ignore[misc]
                assert one.events[-1] == ("thought", {"text": PIECES[number - 1]})
                assert in_flight(service) == 1
            engine.let(len(THOUGHT_IDS))
            await until(lambda: one.is_over)
            assert one.events[-1][0] == "answer"
            await until(lambda: in_flight(service) == 0)

    async def test_it_is_one_request_to_the_metrics_with_all_its_time(self, thinking_settings: Settings):
        async with gated(thinking_settings) as (service, engine):
            async with exchange(service.app, "/recommend", THINKING) as one:
                engine.let(4)
                await until(lambda: one.status is not None)
                await asyncio.sleep(0.3)
                assert num_requests(service, 200) is None
                engine.let(len(THOUGHT_IDS))
            assert num_requests(service, 200) == 1
            labels = {"route": "/recommend"}
            sample = service.state.metrics.registry.get_sample_value
            assert sample("sidrec_http_request_seconds_count", labels) == 1
            seconds = sample("sidrec_http_request_seconds_sum", labels)
            assert seconds is not None
            assert seconds > 0.3

    async def test_a_fallback_ends_the_stream_like_any_answer(self, thinking_settings: Settings):
        async with gated(thinking_settings, EngineUnavailableError("it is a test")) as (service, engine):
            one = await thought_then_failure(service, engine)
        assert "".join(data["text"] for _, data in one.events[:-1]) == RATIONALE
        assert (one.events[-1][0], one.events[-1][1]["reason"]) == ("answer", "engine_unavailable")
        assert one.events[-1][1]["rationale"] is None


class TestFailures:
    """Before the stream an ordinary problem, in it a `problem` event."""

    async def test_a_fault_before_the_first_event_is_an_ordinary_500(self, thinking_settings: Settings):
        async with running(thinking_settings, failing(RuntimeError("secret"))) as service:
            response = await service.post("/recommend", THINKING, accept=EVENTS)
            assert_problem(response, 500, "internal-error")
            assert "secret" not in response.text
            assert in_flight(service) == 0

    async def test_a_fault_in_the_stream_is_its_last_event(self, thinking_settings: Settings):
        async with gated(thinking_settings, RuntimeError("secret")) as (service, engine):
            one = await thought_then_failure(service, engine)
            name, document = one.events[-1]
            assert {name for name, _ in one.events[:-1]} == {"thought"}
            assert (name, document["status"], document["type"]) == ("problem", 500, "urn:sidrec:internal-error")
            assert set(document) == {"type", "title", "status", "detail", "request_id", "errors"}
            assert document["request_id"] == "mine"
            assert "secret" not in one.text
            assert in_flight(service) == 0

    async def test_validation_keys_and_admission_come_before_the_stream(self, thinking_settings: Settings):
        settings = thinking_settings.model_copy(update={"max_in_flight": 1, "api_key_hashes": (hash_key("key"),)})
        async with gated(settings) as (service, engine):
            wrong = await service.post("/recommend", {"num_items": 0}, accept=EVENTS, x_api_key="key")
            assert_problem(wrong, 422, "invalid-request")
            assert_problem(await service.post("/recommend", THINKING, accept=EVENTS), 401, "unauthorized")
            held = asyncio.ensure_future(service.post("/recommend", THINKING, accept=EVENTS, x_api_key="key"))
            await until(lambda: in_flight(service) == 1)
            shed = await service.post("/recommend", THINKING, accept=EVENTS, x_api_key="key")
            assert_problem(shed, 503, "overloaded")
            engine.let(len(THOUGHT_IDS) + 1)
            assert (await held).status_code == 200


class TestDeparture:
    """A client that leaves is worked for no longer."""

    @pytest.mark.parametrize("num_events", [0, 2])
    async def test_it_cancels_the_work_and_frees_the_slot(self, thinking_settings: Settings, num_events: int):
        async with gated(thinking_settings) as (service, engine):
            async with exchange(service.app, "/recommend", THINKING) as one:
                await until(lambda: in_flight(service) == 1)
                for number in range(1, num_events + 1):
                    engine.let(4)
                    await until(lambda number=number: len(one.events) == number)  # type: ignore[misc]
                one.has_left.set()
            assert engine.was_cancelled
            assert in_flight(service) == 0
            assert (num_requests(service, 499), num_requests(service, 200)) == (1, None)
            assert not one.is_over

    async def test_a_thought_of_the_local_engine_stops(self, endless: Bundle, tmp_path: Path):
        settings = Settings(bundles=endless.path.parent, data_dir=tmp_path / "redis")
        async with thinking_service(settings, ThinkingLimits(7_000, 50.0)) as service:
            async with exchange(service.app, "/recommend", THINKING) as one:
                await until(lambda: in_flight(service) == 1)
                await asyncio.sleep(0.3)  # it thinks, and nothing of what it thinks may be shown
                one.has_left.set()
            async with asyncio.timeout(2):
                answer = await service.recommend(history=HISTORY)
            assert answer["source"] == "model"
            sample = service.state.metrics.registry.get_sample_value
            assert sample("sidrec_engine_thoughts_total", {"end": "time_budget"}) is None
            assert sample("sidrec_engine_think_tokens_total") == 0

    async def test_over_a_real_socket(self, thinking_settings: Settings):
        async with gated(thinking_settings) as (service, engine), listening(service.app) as url:
            async with httpx.AsyncClient(base_url=url) as client:
                engine.let(4)
                async with client.stream("POST", "/recommend", json=THINKING, headers={"accept": EVENTS}) as response:
                    first = await anext(response.aiter_text())
                    assert parse(first) == [("thought", {"text": PIECES[0]})]
                await until(lambda: engine.was_cancelled)
                await until(lambda: in_flight(service) == 0)
                engine.let(100)
                answer = await client.post("/recommend", json=THINKING, headers={"accept": EVENTS})
            assert parse(answer.text)[-1][0] == "answer"


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[str]:
    """The application, whose lifespan is entered already, on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
        task = asyncio.ensure_future(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await task


class Text(BaseModel):
    """An answer."""

    text: str


def app_of(work: Work, keep_alive_s: float = 10.0) -> Any:
    async def app(scope: Scope, receive: Any, send: Any) -> None:
        await receive()
        await EventStream(Request(scope), work, keep_alive_s=keep_alive_s)(scope, receive, send)

    return app


class TestFraming:
    """The wire format."""

    async def test_no_text_breaks_an_event(self):
        texts = ["a\nb", "\r\n\r\n", "\u2028\u2029\x85\x0b\x0c", 'data: "x"\n\nevent: answer', "品🍵", "\x00"]

        async def work(on_thought: Any) -> Text:
            for text in texts:
                on_thought(text)
            return Text(text="".join(texts))

        async with exchange(app_of(work), "/", None) as one:
            pass
        assert one.events == [*(("thought", {"text": text}) for text in texts), ("answer", {"text": "".join(texts)})]
        assert [message.get("more_body") for message in one.messages] == [None, *[True] * len(texts), False]

    async def test_a_silent_stream_is_kept_alive_by_comments(self):
        async def work(on_thought: Any) -> Text:
            await asyncio.sleep(0.5)
            on_thought("late")
            return Text(text="late")

        async with exchange(app_of(work, keep_alive_s=0.05), "/", None) as one:
            await until(lambda: one.text.count(": keep-alive\n\n") > 2)
            assert (one.status, one.events) == (200, [])
        assert one.events == [("thought", {"text": "late"}), ("answer", {"text": "late"})]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ([], False),
        ([""], False),
        (["*/*"], False),
        (["application/json"], False),
        (["text/*"], False),
        (["text/event-stream"], True),
        (["Text/Event-Stream; charset=utf-8"], True),
        (["text/event-stream;q=0"], False),
        (["text/event-stream;q=0.0, application/json;q=0"], False),
        (["text/event-stream;q=0.1"], True),
        (["text/event-stream; q=much"], False),
        (["text/event-stream;q=nan"], False),
        (["text/event-stream;q=2"], False),
        (["text/event-stream, application/json"], True),
        (["application/json, text/event-stream"], False),
        (["application/json;q=0.9, text/event-stream"], True),
        (["text/event-stream;q=0.9, application/json"], False),
        (["application/json", "text/event-stream"], False),
        (["application/json;q=0.5", "text/event-stream"], True),
        (["*/*, text/event-stream"], True),
        (["text/event-stream;q=0.5, */*"], False),
        (["text/event-stream;q=0.5, */*;q=0.1"], True),
        (["text/event-stream;q=0.5, */*;q=0.1, application/json"], False),
        (["text/event-stream, application/*;q=0.5, */*"], True),
        (["text/html, text/event-stream;q=0.5"], True),
    ],
)
async def test_events_are_sent_to_whom_prefers_them(accept: Sequence[str], expected: bool):
    assert prefers_events(accept) is expected


async def test_the_schema_names_the_stream(instant_service: Service):
    schema = (await instant_service.http.get("/openapi.json")).json()
    for path, answer in (("/recommend", "RecommendResponse"), ("/rerank", "RerankResponse")):
        success = schema["paths"][path]["post"]["responses"]["200"]
        assert set(success["content"]) == {"application/json", EVENTS}
        assert success["content"]["application/json"]["schema"]["$ref"].endswith(answer)
        assert "`answer` event" in success["description"]
