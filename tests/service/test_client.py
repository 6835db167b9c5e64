"""The Python client: against the real service on a socket, and against one that fails as it is told to."""

import asyncio
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any, TypeAlias

import httpx
import pytest

from semantic_ids.bundle import Bundle
from service.app import create_app
from service.client import (
    AsyncSidrecClient,
    NewEvent,
    RecommendOptions,
    RerankOptions,
    SidrecClient,
    SidrecError,
    SidrecInvalidAnswer,
    SidrecProblem,
    SidrecUnavailable,
    Thought,
)
from service.schemas import (
    EventBody,
    HistoryEvent,
    ItemFilterBody,
    RecommendRequest,
    RecommendResponse,
    RerankRequest,
    RerankResponse,
)
from service.settings import Settings
from tests.service.contract import served
from tests.service.engines import instant
from tests.service.running import PATIENT_MS, running
from tests.service.thinking import RATIONALE
from tests.service.world import ITEM_IDS, SPACE

HISTORY = list(ITEM_IDS[:5])
KEY = "hunter2-the-key"

Call: TypeAlias = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    """`call(url, method, *arguments, client={options}, …)` with a client of either kind; of a stream, its list."""

    def sync(url: str, method: str, *arguments: Any, client: dict[str, Any] | None = None, **options: Any) -> Any:
        with SidrecClient(url, **client or {}) as one:
            answer = getattr(one, method)(*arguments, **options)
            return list(answer) if isinstance(answer, Iterator) else answer

    async def once(url: str, method: str, arguments: Any, client: dict[str, Any], options: dict[str, Any]) -> Any:
        async with AsyncSidrecClient(url, **client) as one:
            answer = getattr(one, method)(*arguments, **options)
            return [piece async for piece in answer] if isinstance(answer, AsyncIterator) else await answer

    def asynchronous(
        url: str, method: str, *arguments: Any, client: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        return asyncio.run(once(url, method, arguments, client or {}, options))

    return sync if request.param == "sync" else asynchronous


@pytest.fixture(scope="module")
def url(reciting: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real service, whose model can reason."""
    settings = Settings(bundles=reciting.path.parent, data_dir=tmp_path_factory.mktemp("redis"))
    with served(create_app(settings)) as address:
        yield address


# Against the real service.


def test_recommend(call: Call, url: str):
    answer = call(
        url, "recommend", history=HISTORY, num_items=7, filter={"exclude_items": [ITEM_IDS[9]]}, deadline_ms=PATIENT_MS
    )
    assert isinstance(answer, RecommendResponse)
    assert len(answer.items) == 7
    assert answer.source == "model"
    assert not {item.item_id for item in answer.items} & {*HISTORY, ITEM_IDS[9]}


def test_a_request_may_be_made_of_models(call: Call, url: str):
    history = [HistoryEvent(item_id=HISTORY[0], timestamp=1.0), HISTORY[1]]
    item_filter = ItemFilterBody(include_items=list(ITEM_IDS[20:30]))
    answer = call(url, "recommend", history=history, filter=item_filter, num_items=3, deadline_ms=PATIENT_MS)
    assert {item.item_id for item in answer.items} <= set(ITEM_IDS[20:30])


def test_rerank(call: Call, url: str):
    answer = call(url, "rerank", history=HISTORY, candidates=[*ITEM_IDS[10:14], "gone"], deadline_ms=PATIENT_MS)
    assert isinstance(answer, RerankResponse)
    assert {item.item_id for item in answer.items[:4]} == set(ITEM_IDS[10:14])
    assert not answer.items[4].known


@pytest.mark.parametrize(
    ("method", "more", "answer_type"),
    [("recommend_stream", {}, RecommendResponse), ("rerank_stream", {"candidates": HISTORY}, RerankResponse)],
)
def test_a_stream_gives_the_thought_and_then_the_answer(
    call: Call, url: str, method: str, more: dict[str, Any], answer_type: type
):
    asked = {"history": HISTORY, "reasoning": "on", "include_rationale": True, "deadline_ms": PATIENT_MS}
    *thoughts, answer = call(url, method, **asked, **more)
    assert all(isinstance(thought, Thought) for thought in thoughts)
    assert "".join(thought.text for thought in thoughts).strip() == RATIONALE
    assert isinstance(answer, answer_type)


@pytest.mark.parametrize("user_id", ["u42", ".", "..", "a/b", "../versions", "ü 品", "a?b#c%2F", "x" * 128])
def test_events_are_stored_read_and_erased_whatever_the_user_is_called(call: Call, url: str, user_id: str):
    call(url, "erase_user", user_id)
    event: NewEvent = {"user_id": user_id, "item_id": ITEM_IDS[0], "event_type": "click", "timestamp": 5.0}
    assert call(url, "record_events", [event]).accepted == 1
    [stored] = call(url, "history", user_id).events
    assert (stored.item_id, stored.timestamp) == (ITEM_IDS[0], 5.0)
    assert call(url, "erase_user", user_id) is None
    assert call(url, "history", user_id).events == []


@pytest.mark.parametrize("item_id", ["new", "..", "a/b", "ü 品?#%2F"])
def test_items_are_put_read_and_deleted_whatever_they_are_called(call: Call, url: str, item_id: str):
    sid = SPACE.format([0, 0, 0])
    put = call(url, "put_item", item_id, title="A new thing", categories=["Toys"], sid=sid)
    assert (put.item_id, put.title, put.categories, put.sid) == (item_id, "A new thing", ["Toys"], sid)
    assert call(url, "item", item_id) == put
    assert call(url, "delete_item", item_id).catalog_epoch > put.catalog_epoch
    for method in ("item", "delete_item"):
        with pytest.raises(SidrecProblem) as caught:
            call(url, method, item_id)
        assert caught.value.status == 404


def test_operations(call: Call, url: str, reciting: Bundle):
    assert call(url, "health").status == "ready"
    assert call(url, "health", "live").status == "live"
    assert call(url, "versions").bundle == reciting.bundle_id
    assert call(url, "activate_bundle", reciting.bundle_id).bundle == reciting.bundle_id
    with pytest.raises(SidrecProblem) as caught:
        call(url, "rollback")
    assert caught.value.status == 409


def test_a_refusal_names_its_fields(call: Call, url: str):
    for method in ("recommend", "recommend_stream"):
        with pytest.raises(SidrecProblem) as caught:
            call(url, method, user_id="u", num_items=0)
        problem = caught.value
        assert (problem.status, problem.type) == (422, "urn:sidrec:invalid-request")
        assert [error.path for error in problem.errors] == ["body.num_items"]
        assert problem.request_id in str(problem)
        assert "body.num_items" in str(problem)


def test_threads_share_a_client(url: str):
    with SidrecClient(url) as client, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(client.history, f"u{number}") for number in range(64)]
        assert [one.result().user_id for one in asked] == [f"u{number}" for number in range(64)]


async def test_over_asgi(settings: Settings):
    async with (
        running(settings, instant) as service,
        AsyncSidrecClient("http://service", transport=httpx.ASGITransport(service.app)) as client,
    ):
        assert len((await client.recommend(history=HISTORY, num_items=3)).items) == 3
        pieces = [piece async for piece in client.recommend_stream(history=HISTORY, num_items=3)]
        assert isinstance(pieces[-1], RecommendResponse)


# Against a server that follows a script.

VERSIONS = {
    "service": "1", "engine": "local", "bundle": "b", "catalog_epoch": 0, "prompt": 1, "num_items": 1, "metrics": {},
}  # fmt: skip
EVENTS = {"accepted": 1, "duplicates": 0, "rejected": []}
BUNDLE = {"bundle": "b", "catalog_epoch": 0}
ANSWER: dict[str, Any] = {
    "recommendation_id": "r", "user_id": None, "rationale": None, "ignored_items": [], "source": "model",
    "degraded": False, "reason": None, "experiment": None, "timings_ms": {}, "items": [],
    "versions": {"bundle": "b", "catalog_epoch": 0, "prompt": 1},
}  # fmt: skip
DROP = b""


def response(status: int, body: object = "", content_type: str = "application/json", **headers: object) -> bytes:
    """A whole HTTP response."""
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"content-type: {content_type}", f"content-length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode() + content


def problem(status: int, **headers: object) -> bytes:
    """An error of the service."""
    document = {"type": "urn:sidrec:x", "title": "X", "status": status, "detail": "no", "request_id": "r7"}
    return response(status, document, "application/problem+json", **headers)


def stream(*events: tuple[str, object]) -> bytes:
    """An event stream that ends with its connection."""
    text = ": hello\n\n" + "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    return f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{text}".encode()


@dataclass
class Scripted:
    """What the server will say, and what it was asked: the head and the body of each request, and when."""

    url: str
    script: list[bytes]
    heads: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)


@contextmanager
def scripted(*script: bytes) -> Iterator[Scripted]:
    """A server that gives each request the next of these answers, and then hangs up."""

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            head = b""
            while not head.endswith(b"\r\n\r\n") and (line := self.rfile.readline()):
                head += line
            if not head:
                return
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            plan.bodies.append(self.rfile.read(int(length[1])) if length else b"")
            plan.heads.append(head.decode())
            plan.times_s.append(time.monotonic())
            self.wfile.write(plan.script.pop(0))

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        plan = Scripted(f"http://127.0.0.1:{server.server_address[1]}", list(script))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield plan
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("first", [DROP, problem(503), problem(429, Retry_After=0), response(502, "<html>")])
def test_what_may_pass_is_tried_again(call: Call, first: bytes):
    with scripted(first, first, response(200, VERSIONS)) as server:
        assert call(server.url, "versions").bundle == "b"
    assert len(server.heads) == 3


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(call: Call, status: int):
    with scripted(problem(status, Retry_After=1), response(200, VERSIONS)) as server:
        call(server.url, "versions")
    assert 1.0 <= server.times_s[1] - server.times_s[0] < 2.0


def test_a_longer_retry_after_than_there_is_time_is_an_error_at_once(call: Call):
    start = time.monotonic()
    with scripted(problem(503, Retry_After=3600)) as server, pytest.raises(SidrecProblem) as caught:
        call(server.url, "versions")
    assert time.monotonic() - start < 2
    assert caught.value.retry_after_s == 3600


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 500])
def test_nothing_else_is_tried_again(call: Call, status: int):
    with scripted(problem(status, Retry_After=0)) as server, pytest.raises(SidrecProblem) as caught:
        call(server.url, "versions")
    assert len(server.heads) == 1
    assert (caught.value.status, caught.value.request_id) == (status, "r7")


def test_it_gives_up_when_its_time_is_over(call: Call):
    start = time.monotonic()
    with scripted(*[DROP] * 50) as server, pytest.raises(SidrecUnavailable, match="RemoteProtocolError"):
        call(server.url, "versions", client={"retry_for_s": 0.5, "margin_s": 0.1})
    assert 3 <= len(server.heads) < 50
    assert time.monotonic() - start < 3


def test_a_lost_answer_to_events_is_asked_for_with_the_same_ids(call: Call):
    events = [
        {"user_id": "u", "item_id": "B1", "event_type": "click", "timestamp": 1.0},
        EventBody(event_id="mine", user_id="u", item_id="B1", event_type="like", timestamp=2.0),  # type: ignore[arg-type]
    ]
    with scripted(DROP, problem(503), response(200, EVENTS)) as server:
        call(server.url, "record_events", events)
    assert len(set(server.bodies)) == 1
    first, second = json.loads(server.bodies[0])["events"]
    assert len(first["event_id"]) == 36
    assert second["event_id"] == "mine"


def test_a_rollback_that_may_have_happened_is_not_repeated(call: Call):
    for lost in (DROP, response(502, "<html>")):
        with scripted(lost, response(200, BUNDLE)) as server, pytest.raises(SidrecError):
            call(server.url, "rollback")
        assert len(server.heads) == 1
    with scripted(problem(503, Retry_After=0), response(200, BUNDLE)) as server:
        assert call(server.url, "rollback").bundle == "b"


def test_nobody_there(call: Call):
    with pytest.raises(SidrecUnavailable, match="ConnectError"):
        call("http://127.0.0.1:1", "health")


def test_a_slow_service_is_left(call: Call):
    class Slow(StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            over.wait(10)

    over = threading.Event()
    with ThreadingTCPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        start = time.monotonic()
        with pytest.raises(SidrecUnavailable, match="ReadTimeout"):
            address = f"http://127.0.0.1:{server.server_address[1]}"
            call(address, "recommend", user_id="u", deadline_ms=100, client={"margin_s": 0.2, "retry_for_s": 0.2})
        assert 0.25 < time.monotonic() - start < 2
        over.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("answer", [response(200, {"bundle": 1}), response(200, "<html>"), response(200, "")])
def test_an_answer_of_something_else_is_named(call: Call, answer: bytes):
    with scripted(answer) as server, pytest.raises(SidrecInvalidAnswer, match="VersionsResponse"):
        call(server.url, "versions")


def test_an_error_of_something_else_is_a_problem_too(call: Call):
    with scripted(response(404, "<html>nginx</html>", "text/html")) as server, pytest.raises(SidrecProblem) as caught:
        call(server.url, "versions")
    assert (caught.value.status, caught.value.title) == (404, "Not Found")


THOUGHTS = [("thought", {"text": "a"}), ("thought", {"text": "🍵"})]


def test_a_stream_is_tried_again_until_it_has_begun(call: Call):
    with scripted(DROP, problem(503, Retry_After=0), stream(), stream(*THOUGHTS, ("answer", ANSWER))) as server:
        *thoughts, answer = call(server.url, "recommend_stream", user_id="u")
    assert thoughts == [Thought("a"), Thought("🍵")]
    assert answer.recommendation_id == "r"
    assert len(server.heads) == 4


def test_a_stream_that_breaks_off_is_an_error_and_not_repeated(call: Call):
    with scripted(stream(*THOUGHTS)) as server, pytest.raises(SidrecUnavailable, match="before its answer"):
        call(server.url, "recommend_stream", user_id="u")


def test_a_stream_that_ends_in_a_problem_raises_it(call: Call):
    document = {"type": "urn:sidrec:x", "title": "X", "status": 500, "detail": "no", "request_id": "r7"}
    with scripted(stream(*THOUGHTS, ("problem", document))) as server, pytest.raises(SidrecProblem) as caught:
        call(server.url, "recommend_stream", user_id="u")
    assert caught.value.status == 500


def test_unknown_events_are_passed_over(call: Call):
    with scripted(stream(("weather", {"sun": 1}), ("answer", ANSWER))) as server:
        [answer] = call(server.url, "recommend_stream", user_id="u")
    assert isinstance(answer, RecommendResponse)


def test_a_plain_answer_instead_of_a_stream_is_named(call: Call):
    with scripted(response(200, ANSWER)) as server, pytest.raises(SidrecInvalidAnswer, match="asked for events"):
        call(server.url, "recommend_stream", user_id="u")


def test_a_stream_may_be_left():
    with scripted(stream(*THOUGHTS, ("answer", ANSWER))) as server, SidrecClient(server.url) as client:
        for _ in client.recommend_stream(user_id="u"):
            break


def test_the_key_is_sent_and_never_shown(call: Call, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    with scripted(problem(401)) as server, pytest.raises(SidrecProblem) as caught:
        call(server.url, "versions", client={"api_key": KEY})
    assert f"x-api-key: {KEY}" in server.heads[0]
    client = SidrecClient("http://user:secret@host/sidrec", api_key=KEY)
    shown = [repr(caught.value), str(caught.value), caplog.text, repr(client), repr(vars(client)), repr(client._http)]
    assert not [text for text in shown if KEY in text]
    assert repr(client) == "SidrecClient('http://host/sidrec')"
    client.close()


def test_a_service_under_a_path(call: Call):
    with scripted(response(200, VERSIONS)) as server:
        call(f"{server.url}/sidrec", "versions")
    assert server.heads[0].startswith("GET /sidrec/versions ")


# The module itself.


def test_the_options_are_the_contract_s():
    assert set(RecommendOptions.__annotations__) == set(RecommendRequest.model_fields)
    assert set(RerankOptions.__annotations__) == set(RerankRequest.model_fields)
    assert set(NewEvent.__annotations__) == set(EventBody.model_fields)


def test_it_needs_neither_web_framework_nor_redis():
    forbidden = ["fastapi", "starlette", "redis", "torch", "transformers", "celery", "prometheus_client", "uvicorn"]
    program = f"""
import sys
for name in {forbidden}:
    sys.modules[name] = None  # whoever imports it fails
import service.client
service.client.SidrecClient("http://127.0.0.1:1").close()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_the_documentation_s_examples_run(url: str, capsys: pytest.CaptureFixture[str]):
    text = (Path(__file__).parents[2] / "docs/client.md").read_text(encoding="utf-8")
    examples = re.findall("```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(example.replace("http://127.0.0.1:8000", url), {"item_id": ITEM_IDS[12]})
    shown = capsys.readouterr().out
    assert "5 items" in shown
    assert "422 urn:sidrec:invalid-request ['body.num_items']" in shown
