"""API keys: asked for where they are configured, and never told to anyone."""

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog
from fastapi.routing import APIRoute

from service.access import StrictRoute
from service.errors import ForbiddenProblem, UnauthorizedProblem
from service.logs import redacted
from service.security import ApiKeys, Caller, hash_key
from service.settings import Settings
from tests.service.engines import failing, instant
from tests.service.running import Service, assert_problem, event, running
from tests.service.world import ITEM_IDS

on_the_modules_loop = pytest.mark.asyncio(loop_scope="module")

KEY, OTHER_KEY = "correct-horse-battery", "staple"
PROTECTED = [
    ("POST", "/recommend", {}),
    ("GET", "/recommend", None),
    ("POST", "/rerank", {"candidates": [ITEM_IDS[0]]}),
    ("POST", "/events", {"events": [event("u", ITEM_IDS[0])]}),
    ("GET", "/users/u/history", None),
    ("DELETE", "/users/u", None),
    ("GET", "/versions", None),
]
OPEN = ["/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/metrics"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyed_service(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    settings = Settings(
        bundles=bundles,
        data_dir=tmp_path_factory.mktemp("redis"),
        api_key_hashes=(hash_key(KEY), hash_key(OTHER_KEY)),
        host="0.0.0.0",
    )
    async with running(settings, instant) as service:
        yield service


@on_the_modules_loop
@pytest.mark.parametrize(("method", "path", "body"), PROTECTED)
async def test_without_a_key_or_with_a_wrong_one_nothing_is_answered(
    keyed_service: Service, method: str, path: str, body: object
):
    presented = [
        {},
        {b"x-api-key": b""},
        {b"x-api-key": b"wrong"},
        {b"x-api-key": KEY.upper().encode()},
        {b"x-api-key": f"{KEY} {OTHER_KEY}".encode()},
        {b"x-api-key": hash_key(KEY).encode()},
        {b"x-api-key": "schlüssel".encode()},
        {b"authorization": f"Bearer {KEY}".encode()},
    ]
    for headers in presented:
        response = await keyed_service.http.request(method, path, json=body, headers=headers)
        assert_problem(response, 401, "unauthorized")
        assert KEY not in response.text
    response = await keyed_service.http.request(method, path, json={"unknown": 1})
    assert_problem(response, 401, "unauthorized")


@on_the_modules_loop
@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
@pytest.mark.parametrize(("method", "path", "body"), PROTECTED)
async def test_each_configured_key_opens_everything(
    keyed_service: Service, method: str, path: str, body: object, key: str
):
    response = await keyed_service.http.request(method, path, json=body, headers={"x-api-key": key})
    assert response.status_code in {200, 204}
    assert key not in response.text
    assert key not in str(response.headers)


@on_the_modules_loop
@pytest.mark.parametrize("path", OPEN)
async def test_health_and_metrics_are_open(keyed_service: Service, path: str):
    response = await keyed_service.http.get(path)
    assert response.status_code == 200
    assert KEY not in response.text
    assert hash_key(KEY) not in response.text


@on_the_modules_loop
async def test_unknown_callers_take_no_slot_and_store_nothing(keyed_service: Service):
    await keyed_service.post("/events", {"events": [event("burglar", ITEM_IDS[0])]})
    answer = await keyed_service.http.get("/users/burglar/history", headers={"x-api-key": KEY})
    assert answer.json()["events"] == []


@on_the_modules_loop
async def test_a_key_is_never_logged_not_even_by_a_fault(settings: Settings, capfd: pytest.CaptureFixture[str]):
    with_keys = settings.model_copy(update={"api_key_hashes": (hash_key(KEY),)})
    with structlog.testing.capture_logs() as logs:
        async with running(with_keys, failing(RuntimeError("on purpose"))) as service:
            response = await service.post("/recommend", {"history": [ITEM_IDS[0]]}, x_api_key=KEY)
            assert_problem(response, 500, "internal-error")
            assert_problem(await service.post("/recommend", {}, x_api_key="nearly-right"), 401, "unauthorized")
    assert logs
    written = f"{logs}{capfd.readouterr()}{response.text}"
    assert KEY not in written
    assert "nearly-right" not in written


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_in_the_log_shows_no_variables(log_format: str):
    code = f"""
import structlog
from service.logs import configure
configure("info", "{log_format}")
def request(headers):
    raise RuntimeError("on purpose")
try:
    request([(b"x-api-key", b"{KEY}")][:])
except RuntimeError:
    structlog.get_logger().exception("failed")
"""
    # the program comes on stdin, so that a traceback cannot quote it
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, check=True)
    assert "on purpose" in done.stderr
    assert "Traceback" in done.stderr
    assert KEY not in done.stderr
    assert done.stdout == ""


def test_without_configured_keys_any_caller_is_accepted():
    ApiKeys(()).check(None)
    ApiKeys(()).check("whatever")


def test_the_empty_key_is_not_the_absent_one():
    with pytest.raises(UnauthorizedProblem):
        ApiKeys((hash_key(""),)).check(None)


def test_the_accepted_keys_have_a_tenant_a_right_and_an_id():
    keys = ApiKeys((hash_key(KEY), f"{hash_key(OTHER_KEY)}:shop"), (f"{hash_key('admin')}:shop",))
    assert keys.check(KEY) == Caller("default", is_admin=False, key_id=hash_key(KEY)[:12])
    assert keys.check(OTHER_KEY) == Caller("shop", is_admin=False, key_id=hash_key(OTHER_KEY)[:12])
    assert (
        keys.check("admin") == keys.check_admin("admin") == Caller("shop", is_admin=True, key_id=hash_key("admin")[:12])
    )
    with pytest.raises(ForbiddenProblem):
        keys.check_admin(OTHER_KEY)
    for other in (None, "", "shop", f"{KEY}:shop", hash_key(KEY)):
        with pytest.raises(UnauthorizedProblem):
            keys.check(other)


def test_a_key_listed_twice_is_an_administrators():
    assert ApiKeys((hash_key(KEY),), (hash_key(KEY),)).check(KEY).is_admin


@on_the_modules_loop
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/versions", 200),
        ("POST", "/recommend", 401),
        ("GET", "/health/live", 200),
        ("GET", "/metrics", 200),
        ("GET", "/nope", 404),
        ("DELETE", "/recommend", 405),
        ("GET", "/openapi.json", 200),
    ],
)
async def test_a_browser_is_told_to_do_nothing_with_an_answer(
    keyed_service: Service, method: str, path: str, status: int
):
    headers = {"x-api-key": KEY} if status == 200 else {}
    response = await keyed_service.http.request(method, path, headers=headers)
    assert response.status_code == status
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-store"
    assert "server" not in response.headers


@on_the_modules_loop
async def test_the_policy_of_the_docs_allows_what_their_page_loads(keyed_service: Service):
    response = await keyed_service.http.get("/docs")
    rules = (rule.split() for rule in response.headers["content-security-policy"].split(";"))
    policy = {name: sources for name, *sources in rules}
    assert policy["default-src"] == policy["frame-ancestors"] == ["'none'"]
    for pattern, directive in (
        (r'<script src="(https://[^/"]+)', "script-src"),
        (r'<link[^>]+stylesheet"[^>]+href="(https://[^/"]+)', "style-src"),
        (r'<link rel="shortcut icon" href="(https://[^/"]+)', "img-src"),
    ):
        (loaded,) = re.findall(pattern, response.text)
        assert loaded in policy[directive]


@on_the_modules_loop
async def test_a_key_in_the_wrong_place_opens_nothing_and_is_not_repeated(keyed_service: Service):
    http = keyed_service.http
    with structlog.testing.capture_logs() as logs:
        responses = [
            await http.get("/versions", params={"x-api-key": KEY}),
            await http.get("/versions", headers={"authorization": f"Bearer {KEY}"}),
            await http.get("/versions", headers={"cookie": f"x-api-key={KEY}"}),
            await http.post("/recommend", json={"x-api-key": KEY}),
            await http.post("/recommend", json={"x-api-key": KEY}, headers={"x-api-key": KEY}),
            await http.post("/recommend", json={"num_items": KEY}, headers={"x-api-key": KEY}),
            await http.post("/recommend", json={"reasoning": KEY}, headers={"x-api-key": KEY}),
            await http.get(f"/recommend?num_items={KEY}", headers={"x-api-key": KEY}),
            await http.get("/versions", headers={"x-api-key": KEY, "x-deadline-ms": KEY}),
            await http.get("/nope", params={"key": KEY}, headers={"x-api-key": KEY}),
            await http.post("/admin/rollback", headers={"x-api-key": KEY}),
        ]
        metrics = await http.get("/metrics")
    statuses = [response.status_code for response in responses]
    assert statuses == [401, 401, 401, 401, 422, 422, 422, 422, 200, 404, 403]
    written = "".join(f"{response.text}{response.headers}" for response in responses) + f"{logs}{metrics.text}"
    assert KEY not in written
    assert hash_key(KEY) not in written


@pytest.mark.parametrize(
    "event",
    [
        {"x-api-key": KEY},
        {"X_API_KEY": KEY},
        {"headers": {"Authorization": f"Bearer {KEY}", "host": "s"}},
        {"headers": [(b"host", b"s"), (b"x-api-key", KEY.encode())]},
        {"request": {"headers": [["authorization", KEY]]}},
        {"detail": f"sent x-api-key: {KEY} to the service"},
        {"detail": f"headers={{'x-api-key': '{KEY}', 'host': 's'}}"},
        {"detail": f"[(b'authorization', b'Bearer {KEY}')]"},
        {"exception": f"Traceback\n  Authorization: Bearer {KEY}\n"},
    ],
)
def test_a_logged_key_is_redacted(event: dict[str, Any]):
    done = redacted(None, "info", {"event": "request", **event})
    assert KEY not in str(done)
    assert "[redacted]" in str(done)
    assert done["event"] == "request"


def test_nothing_else_is_redacted():
    event = {
        "event": "ready",
        "items": 3,
        "pair": ("host", "s"),
        "none": None,
        "text": "the header x-api-key is needed",
    }
    assert redacted(None, "info", dict(event)) == event | {"pair": ["host", "s"]}


@on_the_modules_loop
async def test_every_route_that_needs_a_key_reads_strictly(keyed_service: Service):
    """A body is read for known callers only, and by the strict reader."""
    routes = [route for route in keyed_service.app.routes if isinstance(route, APIRoute)]
    lax = {route.path for route in routes if not isinstance(route, StrictRoute)}
    assert lax == {*OPEN, "/console", "/console/console.css", "/console/console.js"}
    assert not [route.path for route in routes if route.path in lax and route.body_field is not None]
