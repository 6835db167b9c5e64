"""API keys: asked for where they are configured, and never told to anyone."""

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

from service.errors import UnauthorizedProblem
from service.security import ApiKeys, hash_key
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
