"""Asking for thoughts before anybody waits for them: users in, tasks for the `think` queue out, in the background.

A user is asked for once until a worker begins (`sidrec.think_ahead` clears the mark before it reads the history), or
until another bundle is to answer, so a burst of events is one thought, and the last event is never left out. Nothing
here delays or fails a request: what does not fit the queue, or does not reach Redis or the broker, is dropped and
counted.
"""

import asyncio
from collections.abc import Callable

import structlog
from celery import Celery
from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.celery_app import THINK_AHEAD
from service.metrics import Metrics
from service.redis_keys import user_keys

log = structlog.get_logger(__name__)

ASKED_FOR_S = 120
"""How long a task may wait for a worker; then it is not worth doing, and the user may be asked for again."""
_MOST_WAITING = 1_000
_PAUSE_S = 1.0  # after a failure, while the queue fills up and overflows
_REDIS_TIMEOUT_S = 2.0

_MARK = """
-- KEYS  meta, mark: of one user;  ARGV  bundle, seconds
-- Returns 1 if the user is to be asked for: is known, and is not marked with this bundle yet.
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('GET', KEYS[2]) == ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
return 1
"""

Send = Callable[[str, str, str], None]
"""Sends the task for a tenant's user and a bundle; blocks, and raises whatever it likes."""


class ThinkAhead:
    """The queue between requests and the broker; `run` empties it."""

    def __init__(self, redis: Redis, send: Send, metrics: Metrics) -> None:
        self._redis = redis
        self._send = send
        self._metrics = metrics
        self._waiting: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue(_MOST_WAITING)
        self._queued: set[tuple[str, str, str]] = set()

    def ask(self, tenant: str, user_id: str, bundle_id: str) -> None:
        """Let a worker think for this user with this bundle's model, soon. Returns at once."""
        asked = (tenant, user_id, bundle_id)
        if asked in self._queued:
            return
        try:
            self._waiting.put_nowait(asked)
            self._queued.add(asked)
        except asyncio.QueueFull:
            self._metrics.think_ahead.labels("dropped").inc()

    async def run(self) -> None:
        """Send what is asked, for ever."""
        while True:
            asked = await self._waiting.get()
            self._queued.discard(asked)
            try:
                outcome = await self._sent(*asked)
            except Exception as error:  # whatever a broker raises must not end the sending
                log.warning("think_ahead_dropped", error=type(error).__name__)
                self._metrics.think_ahead.labels("dropped").inc()
                await asyncio.sleep(_PAUSE_S)
            else:
                self._metrics.think_ahead.labels(outcome).inc()

    async def _sent(self, tenant: str, user_id: str, bundle_id: str) -> str:
        keys = user_keys(user_id, tenant)
        async with asyncio.timeout(_REDIS_TIMEOUT_S):
            if not await self._redis.eval(_MARK, 2, keys.meta, keys.think_ahead, bundle_id, str(ASKED_FOR_S)):
                return "known"
        try:
            await asyncio.to_thread(self._send, tenant, user_id, bundle_id)
        except Exception:
            await forget_asked(self._redis, tenant, user_id)
            raise
        return "asked"


async def forget_asked(redis: Redis, tenant: str, user_id: str) -> None:
    """From now on the user may be asked for again."""
    try:
        async with asyncio.timeout(_REDIS_TIMEOUT_S):
            await redis.unlink(user_keys(user_id, tenant).think_ahead)
    except (RedisError, OSError, TimeoutError) as error:
        log.warning("think_ahead_mark_left", error=type(error).__name__)


def sender(celery: Celery) -> Send:
    """Sends through Celery, once: a broker that is away is no reason to wait."""

    def send(tenant: str, user_id: str, bundle_id: str) -> None:
        celery.send_task(
            THINK_AHEAD, (tenant, user_id, bundle_id), expires=ASKED_FOR_S, retry=False, ignore_result=True
        )

    return send
