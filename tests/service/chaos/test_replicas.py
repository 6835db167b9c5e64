"""Two replicas on one Redis: what one has acknowledged, the other knows, and nothing is there twice."""

import time
from contextlib import ExitStack
from pathlib import Path

import structlog

from service.redis_server import EmbeddedRedis
from tests.service.chaos.traffic import traffic
from tests.service.served import serving

log = structlog.get_logger(__name__)
NUM_USERS, NUM_EACH = 64, 157


async def test_10000_interleaved_requests_over_two_replicas(bundles: Path, tmp_path: Path):
    """Every request goes to either replica, at random, and is checked against all that its user was told before."""
    redis = EmbeddedRedis(tmp_path / "redis")
    url = await redis.start()
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(serving(tmp_path / f"{name}.log", bundles=bundles, redis_url=url)) for name in "ab"
        ]
        urls = [f"http://127.0.0.1:{replica.port}" for replica in replicas]
        begin = time.monotonic()
        async with traffic(*urls, num_users=NUM_USERS, num_each=NUM_EACH, pause_s=0.0) as flow:
            pass
        elapsed_s = time.monotonic() - begin
        answered = [one for one in flow.outcomes if one.is_good]
        assert len(answered) == len(flow.outcomes) >= 10_000
        assert flow.num_acknowledged > 4_000
    await redis.stop()
    log.info("interleaved", num_requests=len(answered), num_events=flow.num_acknowledged, elapsed_s=elapsed_s)
