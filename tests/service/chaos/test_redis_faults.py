"""A Redis of its own server, killed and slow, under traffic on the real service with its local engine."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
import structlog

from service.redis_server import EmbeddedRedis
from tests.service.chaos.processes import RedisProxy, ServiceProcess
from tests.service.chaos.traffic import BENIGN, Traffic, traffic
from tests.service.world import ITEM_IDS

log = structlog.get_logger(__name__)
pytestmark = pytest.mark.asyncio(loop_scope="module")
DELETED = frozenset((ITEM_IDS[20], ITEM_IDS[60], ITEM_IDS[100]))


@dataclass(frozen=True)
class Scene:
    """A service, and the server and proxy that it reaches its Redis by."""

    service: ServiceProcess
    redis: EmbeddedRedis
    proxy: RedisProxy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder = tmp_path_factory.mktemp("redis-faults")
    redis = EmbeddedRedis(folder / "redis")  # stands for any server: nobody restarts it but the tests
    proxy = RedisProxy(redis)
    proxy.socket_path = (await redis.start()).removeprefix("unix://")
    async with proxy.listening() as url:
        service = ServiceProcess(folder, bundles=bundles, redis_url=url)
        try:
            await service.start()
            async with httpx.AsyncClient(base_url=service.url, timeout=30) as http:
                for item_id in DELETED:
                    assert (await http.delete(f"/items/{item_id}")).status_code in (200, 204)
            yield Scene(service, redis, proxy)
        finally:
            await service.stop()
    await redis.stop()


def seen(flow: Traffic, since: float) -> Counter[tuple[str, int, str | None]]:
    return Counter(flow.seen_since(since))


def reasons(flow: Traffic, since: float) -> set[str | None]:
    """Of the 200s of /recommend and /rerank."""
    return {reason for endpoint, status, reason in flow.seen_since(since) if endpoint[:2] == "re" and status == 200}


async def test_killed_and_brought_back(scene: Scene):
    async with traffic(scene.service.url, deleted=DELETED, seed=1) as flow:
        await flow.recovery_s(time.monotonic())
        assert scene.redis.pid is not None
        os.kill(scene.redis.pid, signal.SIGKILL)
        await asyncio.sleep(0.3)
        broken_at = time.monotonic()
        await asyncio.sleep(3)
        outage = seen(flow, broken_at)
        assert reasons(flow, broken_at) - BENIGN == {"history_unavailable"}, outage
        assert {status for endpoint, status, _ in outage if endpoint in ("events", "history")} == {503}, outage
        assert {one[1] for one in outage} == {200, 503}
        await scene.redis.start()
        recovery_s = await flow.recovery_s(time.monotonic())
    log.info("recovered", fault="redis killed", recovery_s=recovery_s, meanwhile=dict(outage))


async def test_slow_by_200_ms(scene: Scene):
    """Whoever has time gets the usual answer; whoever has not, one without Redis or none; every event is taken."""
    async with traffic(scene.service.url, deleted=DELETED, seed=2) as flow:
        await flow.recovery_s(time.monotonic())
        scene.proxy.delay_s = 0.2
        await asyncio.sleep(0.5)
        slow_at = time.monotonic()
        await asyncio.sleep(2)
        assert {(status, reason) for _, status, reason in flow.seen_since(slow_at)} <= {(200, one) for one in BENIGN}
        flow.hurried_ms, slow_at = 150, time.monotonic()
        await asyncio.sleep(2)
        assert reasons(flow, slow_at) - BENIGN == {"history_unavailable"}
        # A wait that is foreseen to be too long is refused at once: Redis' part of it counts as well.
        refused = {(endpoint, why) for endpoint, status, why in flow.seen_since(slow_at) if status == 503}
        assert refused <= {("recommend", "overloaded"), ("rerank", "overloaded")}, seen(flow, slow_at)
        flow.hurried_ms, scene.proxy.delay_s = None, 0.0
        recovery_s = await flow.recovery_s(time.monotonic())
    log.info("recovered", fault="redis slow by 200 ms", recovery_s=recovery_s)


async def test_slow_beyond_its_time_out(scene: Scene):
    """Then nothing is acknowledged, although it may be stored: sent again, it is there once."""
    async with traffic(scene.service.url, deleted=DELETED, seed=3) as flow:
        await flow.recovery_s(time.monotonic())
        scene.proxy.delay_s = 2.0
        await asyncio.sleep(1.5)
        broken_at = time.monotonic()
        await asyncio.sleep(3)
        outage = seen(flow, broken_at)
        assert reasons(flow, broken_at) - BENIGN == {"history_unavailable"}, outage
        assert {status for endpoint, status, _ in outage if endpoint in ("events", "history")} == {503}, outage
        scene.proxy.delay_s = 0.0
        recovery_s = await flow.recovery_s(time.monotonic())
    log.info("recovered", fault="redis slow by 2 s", recovery_s=recovery_s, meanwhile=dict(outage))
