"""A key asks so often and no more, whichever replica it asks, and a lost Redis limits nobody."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
from redis.asyncio import Redis

from service.errors import RateLimitedProblem
from service.histories import connect
from service.metrics import Metrics
from service.rate_limits import RateLimits
from service.redis_keys import rate_limit_key
from service.redis_server import EmbeddedRedis
from service.security import Caller, hash_key
from service.settings import Settings
from tests.service.engines import instant
from tests.service.running import Service, assert_problem, running
from tests.service.world import ITEM_IDS

ONE, OTHER = "one-key", "other-key"
CALLER = Caller("default", is_admin=False, key_id="0123456789ab")


@pytest_asyncio.fixture
async def redis(tmp_path: Path) -> AsyncIterator[Redis]:
    server = EmbeddedRedis(tmp_path / "limits")
    client = connect(await server.start(), timeout_s=1.0, max_connections=8)
    yield client
    await client.aclose()
    await server.stop()


async def passed(limits: RateLimits, count: int, caller: Caller = CALLER) -> int:
    async def passes() -> bool:
        try:
            await limits.take(caller)
        except RateLimitedProblem:
            return False
        return True

    return sum([await passes() for _ in range(count)])


async def test_a_burst_passes_and_then_the_rate(redis: Redis):
    limits = RateLimits(redis, Metrics(), per_s=20, burst=5)
    start = time.monotonic()
    allowed = await passed(limits, 30)
    spent = time.monotonic() - start
    assert 5 <= allowed <= 5 + 1 + int(20 * spent)
    await asyncio.sleep(0.11)
    assert 2 <= await passed(limits, 5) <= 4, "a tenth of a second fills in two"
    await asyncio.sleep(0.5)
    assert 5 <= await passed(limits, 10) <= 7, "never more than the burst is saved up"


async def test_the_wait_is_told_in_whole_seconds(redis: Redis):
    limits = RateLimits(redis, Metrics(), per_s=0.4, burst=1)
    await limits.take(CALLER)
    with pytest.raises(RateLimitedProblem, match=r"0\.4 times a second, 1 at once") as refusal:
        await limits.take(CALLER)
    assert refusal.value.headers == {"Retry-After": "3"}


async def test_a_full_bucket_leaves_nothing_behind(redis: Redis):
    limits = RateLimits(redis, Metrics(), per_s=50, burst=2)
    await limits.take(CALLER)
    assert await redis.pttl(rate_limit_key(CALLER.key_id)) <= 30
    await asyncio.sleep(0.05)
    assert await redis.exists(rate_limit_key(CALLER.key_id)) == 0


async def test_without_a_rate_redis_is_not_asked(redis: Redis):
    await redis.aclose()
    assert await passed(RateLimits(redis, Metrics(), per_s=0, burst=1), 100) == 100
    assert await redis.dbsize() == 0


async def test_without_redis_requests_pass_soon_and_the_log_says_so_once(tmp_path: Path):
    server = EmbeddedRedis(tmp_path / "limits")
    client = connect(await server.start(), timeout_s=1.0, max_connections=8)
    metrics = Metrics()
    limits = RateLimits(client, metrics, per_s=0.001, burst=1)
    await limits.take(CALLER)
    await server.stop()
    with structlog.testing.capture_logs() as logs:
        start = time.monotonic()
        assert await passed(limits, 5) == 5
        assert time.monotonic() - start < 5 * 0.1
    assert [entry["event"] for entry in logs] == ["rate_limits_unavailable"]
    assert metrics.registry.get_sample_value("sidrec_rate_limit_failures_total") == 5
    await client.aclose()


async def test_a_redis_that_hangs_costs_a_twentieth_of_a_second():
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = connect(f"redis://127.0.0.1:{port}", timeout_s=5.0, max_connections=8)
    limits = RateLimits(client, Metrics(), per_s=0.001, burst=1)
    start = time.monotonic()
    assert await passed(limits, 3) == 3
    assert time.monotonic() - start < 3 * 0.08
    await client.aclose()
    server.close()


@pytest_asyncio.fixture
async def replicas(bundles: Path, tmp_path: Path) -> AsyncIterator[tuple[Service, Service]]:
    server = EmbeddedRedis(tmp_path / "shared")
    settings = Settings(
        bundles=bundles,
        redis_url=await server.start(),
        api_key_hashes=(hash_key(ONE), hash_key(OTHER)),
        rate_limit_per_s=0.01,
        rate_limit_burst=10,
    )
    async with running(settings, instant) as first, running(settings, instant) as second:
        yield first, second
    await server.stop()


async def test_replicas_share_a_bucket_and_keys_do_not(replicas: tuple[Service, Service]):
    first, second = replicas
    responses = []
    for turn in range(7):
        for service in (first, second):
            key = {"x-api-key": ONE}
            if turn % 2:
                responses.append(await service.http.get("/versions", headers=key))
            else:
                responses.append(await service.http.post("/recommend", json={"history": [ITEM_IDS[0]]}, headers=key))
    assert [response.status_code for response in responses] == [200] * 10 + [429] * 4
    document = assert_problem(responses[-1], 429, "rate-limited")
    assert ONE not in str(document)
    assert 1 <= int(responses[-1].headers["retry-after"]) <= 100
    assert (await first.http.get("/versions", headers={"x-api-key": OTHER})).status_code == 200
    for service in replicas:
        key_id = hash_key(ONE)[:12]
        counted = service.state.metrics.registry.get_sample_value("sidrec_rate_limited_total", {"key": key_id})
        assert counted == 2
        for path in ("/health/live", "/health/ready", "/metrics"):
            response = await service.http.get(path, headers={"x-api-key": ONE})
            assert response.status_code == 200, "operations are not limited"
            assert ONE not in response.text


async def test_a_refused_caller_pays_nothing_and_its_body_is_not_read(replicas: tuple[Service, Service]):
    first, _ = replicas
    for _ in range(10):
        await first.http.get("/versions", headers={"x-api-key": ONE})
    assert_problem(await first.post("/recommend", {"num_items": 0}, x_api_key=ONE), 429, "rate-limited")
    for _ in range(20):
        assert_problem(await first.post("/recommend", {}, x_api_key="wrong"), 401, "unauthorized")
    assert (await first.post("/recommend", {}, x_api_key=OTHER)).status_code == 200
