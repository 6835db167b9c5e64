"""Every error is a problem document, and nothing of an exception leaves the service."""

import asyncio
from typing import Any

import pytest
import structlog

from service.engine.base import EngineUnavailableError
from service.errors import UnavailableProblem
from service.settings import Settings
from tests.service.engines import failing
from tests.service.running import Service, assert_problem, running
from tests.service.world import ITEM_IDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "postgres://admin:hunter2@db/sidrec:{default:u}:seen"


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ({"colour": "red"}, ["colour"]),
        ({"filter": {"colour": []}}, ["filter.colour"]),
        ({"user_id": 7}, ["user_id"]),
        ({"user_id": ""}, ["user_id"]),
        ({"user_id": "x" * 129}, ["user_id"]),
        ({"num_items": 0}, ["num_items"]),
        ({"num_items": 501}, ["num_items"]),
        ({"num_items": "10"}, ["num_items"]),
        ({"num_items": 10.0}, ["num_items"]),
        ({"num_items": True}, ["num_items"]),
        ({"num_items": None}, ["num_items"]),
        ({"exclude_seen": 1}, ["exclude_seen"]),
        ({"exclude_seen": "true"}, ["exclude_seen"]),
        ({"include_rationale": 0}, ["include_rationale"]),
        ({"reasoning": "maybe"}, ["reasoning"]),
        ({"diversity": 1.5}, ["diversity"]),
        ({"exploration": "0"}, ["exploration"]),
        ({"deadline_ms": 1e3}, ["deadline_ms"]),
        ({"filter": {"include_items": "B1"}}, ["filter.include_items"]),
        ({"filter": {"include_items": [1]}}, ["filter.include_items.0"]),
        ({"filter": {"any_categories": ["ok", ""]}}, ["filter.any_categories.1"]),
        ({"filter": None}, ["filter"]),
        ({"num_items": 0, "colour": 1, "deadline_ms": 5}, ["deadline_ms", "num_items", "colour"]),
    ],
)
async def test_a_bad_field_is_named(instant_service: Service, body: dict[str, Any], paths: list[str]):
    document = assert_problem(await instant_service.post("/recommend", body), 422, "invalid-request")
    assert sorted(error["path"] for error in document["errors"]) == sorted(f"body.{path}" for path in paths)
    assert all(error["message"] for error in document["errors"])


@pytest.mark.parametrize(
    "history",
    [[1], [""], [None], [["B1"]], "B1", [{"item": "B1"}], [{"item_id": "B1", "event_type": "buy"}], ["x"] * 10_001],
)
async def test_a_bad_history_is_refused(instant_service: Service, history: Any):
    document = assert_problem(await instant_service.post("/recommend", {"history": history}), 422, "invalid-request")
    assert all(error["path"].startswith("body.history") for error in document["errors"])


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (b"{", 422, "invalid-request"),
        (b"", 422, "invalid-request"),
        (b"null", 422, "invalid-request"),
        (b"[]", 422, "invalid-request"),
        (b'"text"', 422, "invalid-request"),
        (b'{"user_id": "\\ud800"}', 422, "invalid-request"),
        (b'{"\\ud800": 1}', 422, "invalid-request"),
        (b'{"diversity": NaN}', 422, "invalid-request"),
        (b'{"user_id": "\xff"}', 400, "bad-request"),
        (b"[" * 100_000, 400, "bad-request"),
        (b'{"num_items": ' + b"1" * 5_000 + b"}", 422, "invalid-request"),
    ],
)
async def test_what_is_not_json_is_refused(instant_service: Service, content: bytes, status: int, kind: str):
    for path in ("/recommend", "/rerank", "/events"):
        response = await instant_service.http.post(path, content=content, headers={"content-type": "application/json"})
        assert_problem(response, status, kind)


async def test_a_bad_query_is_named(instant_service: Service):
    for query, path in (
        ("num_items=0", "num_items"),
        ("num_items=ten", "num_items"),
        ("user_id=", "user_id"),
        (f"user_id={'x' * 129}", "user_id"),
    ):
        response = await instant_service.http.get(f"/recommend?{query}")
        document = assert_problem(response, 422, "invalid-request")
        assert [error["path"] for error in document["errors"]] == [f"query.{path}"]


async def test_unknown_paths_and_methods(instant_service: Service):
    assert_problem(await instant_service.http.get("/nope"), 404, "not-found")
    assert_problem(await instant_service.http.get("/nope", headers={"host": "["}), 404, "not-found")
    for method, path in (("DELETE", "/recommend"), ("GET", "/events"), ("POST", "/metrics"), ("BREW", "/rerank")):
        response = await instant_service.http.request(method, path)
        assert_problem(response, 405, "method-not-allowed")
        assert response.headers["allow"]


async def test_a_fault_of_ours_says_nothing_but_its_request_id(settings: Settings):
    async with running(settings, failing(RuntimeError(SECRET))) as service:
        with structlog.testing.capture_logs() as logs:
            response = await service.post("/recommend", {"history": [ITEM_IDS[0]]}, x_request_id="trace-1")
        document = assert_problem(response, 500, "internal-error")
        assert document["request_id"] == "trace-1"
        for told in ("RuntimeError", "hunter2", "sidrec:{", "Traceback", "recommender"):
            assert told not in response.text
        (entry,) = [entry for entry in logs if entry["event"] == "unexpected_error"]
        assert (entry["request_id"], entry["path"], entry["log_level"]) == ("trace-1", "/recommend", "error")
        counted = {"method": "POST", "route": "/recommend", "status": "500"}
        assert service.state.metrics.registry.get_sample_value("sidrec_http_requests_total", counted) == 1
        assert (await service.http.get("/health/live")).status_code == 200, "the service lives on"


async def test_what_a_request_logs_has_its_id(settings: Settings):
    logged = settings.model_copy(update={"request_log": True})
    async with running(logged, failing(EngineUnavailableError("it is a test"))) as service:
        with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
            answers = [
                service.post("/recommend", {"user_id": "u/secret", "history": [ITEM_IDS[0]]}, x_request_id=f"trace-{n}")
                for n in range(2)
            ]
            await asyncio.gather(*answers)
            await service.http.get("/users/u%2Fsecret/history", headers={"x-request-id": "trace-2"})
    failed = [entry["request_id"] for entry in logs if entry["event"] == "engine_failed"]
    assert sorted(failed) == ["trace-0", "trace-1"]
    lines = {entry["request_id"]: entry for entry in logs if entry["event"] == "request"}
    assert sorted(lines) == ["trace-0", "trace-1", "trace-2"]
    assert (lines["trace-0"]["method"], lines["trace-0"]["route"], lines["trace-0"]["status"]) == (
        "POST", "/recommend", 200,
    )  # fmt: skip
    assert lines["trace-0"]["ms"] >= lines["trace-0"]["history_ms"] >= 0
    assert lines["trace-2"]["route"] == "/users/{user_id}/history"
    assert "secret" not in str(lines)


async def test_requests_are_logged_only_where_that_is_asked_for(settings: Settings):
    async with running(settings) as service:
        with structlog.testing.capture_logs() as logs:
            await service.post("/recommend", {"history": [ITEM_IDS[0]]})
    assert "request" not in {entry["event"] for entry in logs}


async def test_a_problem_from_the_depths_is_answered_as_what_it_is(settings: Settings):
    async with running(settings, failing(UnavailableProblem("come back", retry_after_s=7))) as service:
        response = await service.post("/recommend", {"history": [ITEM_IDS[0]]})
        assert assert_problem(response, 503, "unavailable")["detail"] == "come back"
        assert response.headers["retry-after"] == "7"


async def test_a_given_request_id_comes_back_on_every_answer(instant_service: Service):
    for method, path, status in (
        ("GET", "/recommend", 200),
        ("GET", "/metrics", 200),
        ("GET", "/nope", 404),
        ("POST", "/recommend", 422),
        ("DELETE", "/users/u", 204),
    ):
        response = await instant_service.http.request(method, path, headers={"x-request-id": "req-1:a/b=c"})
        assert (response.status_code, response.headers["x-request-id"]) == (status, "req-1:a/b=c")
        assert response.headers["server-timing"].split(", ")[-1].startswith("total;dur=")


@pytest.mark.parametrize("hostile", [b"", b"a b", b"\xc3\xa9", b"a\tb", b'{"a": 1}\x7f', b"x" * 129, b"\x01"])
async def test_a_hostile_request_id_is_replaced(instant_service: Service, hostile: bytes):
    response = await instant_service.http.get("/recommend", headers=[(b"x-request-id", hostile)])
    made = response.headers["x-request-id"]
    assert len(made) == 26
    assert made.isalnum()


async def test_made_request_ids_differ(instant_service: Service):
    made = {(await instant_service.http.get("/health/live")).headers["x-request-id"] for _ in range(50)}
    assert len(made) == 50


async def test_stage_times_are_in_the_headers(service: Service):
    response = await service.post("/recommend", {"history": [ITEM_IDS[0]], "deadline_ms": 60_000})
    stages = [part.split(";dur=")[0] for part in response.headers["server-timing"].split(", ")]
    assert stages == ["history", "reasoning", "decode", "total"]


async def test_the_schema_names_every_field_and_the_problem_documents(instant_service: Service):
    schema = (await instant_service.http.get("/openapi.json")).json()
    assert schema["components"]["schemas"]["RecommendRequest"]["additionalProperties"] is False
    for path in ("/recommend", "/rerank", "/events"):
        responses = schema["paths"][path]["post"]["responses"]
        assert responses["422"]["content"]["application/problem+json"]["schema"]["$ref"].endswith("/ProblemDocument")
    assert "/users/{user_id}/history" in schema["paths"]
