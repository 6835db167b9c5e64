"""How often one key may ask: a token bucket in Redis, so that all replicas count together.

GCRA: of each key one number is kept, the time at which its bucket is full again. A request moves it by the interval
between two requests; one that would move it further ahead than the burst is refused. One script, one round trip.

When Redis does not answer, or not in time, the request passes: a limit guards the service against its own customers,
and refusing all of them because the counter is gone would be the worse outage. The failures are counted and the first
of a row is logged.
"""

import asyncio
import math
from hashlib import sha1

import structlog
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from service.errors import RateLimitedProblem
from service.metrics import Metrics
from service.redis_keys import rate_limit_key
from service.security import Caller

log = structlog.get_logger(__name__)

_TIMEOUT_S = 0.05  # what a request pays at most for a Redis that does not answer

_TAKE = """
-- KEYS  when the bucket is full again (microseconds)
-- ARGV  microseconds between two requests, requests that the bucket holds
-- Returns 0 for a request that may pass, or the microseconds until one may.
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local wait = full_at + interval - burst * interval - now
if wait > 0 then return math.ceil(wait) end
full_at = full_at + interval
redis.call('SET', KEYS[1], string.format('%.0f', full_at), 'PX', math.ceil((full_at - now) / 1000) + 1)
return 0
"""
_TAKE_SHA = sha1(_TAKE.encode(), usedforsecurity=False).hexdigest()


class RateLimits:
    """A bucket of `burst` requests for each key, filled by `per_s` a second; `per_s` of 0 limits nobody."""

    def __init__(self, redis: Redis, metrics: Metrics, *, per_s: float, burst: int) -> None:
        self._redis = redis
        self._metrics = metrics
        self._per_s = per_s
        self._burst = burst
        self._is_failing = False

    async def take(self, caller: Caller) -> None:
        """Count one request; `RateLimitedProblem` when the caller's bucket is empty."""
        if self._per_s == 0:
            return
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                wait_us = await self._wait_us(rate_limit_key(caller.key_id))
        except (RedisError, OSError, TimeoutError) as error:
            self._metrics.rate_limit_failures.inc()
            if not self._is_failing:
                log.warning(
                    "rate_limits_unavailable", error=type(error).__name__, consequence="requests pass unlimited"
                )
            self._is_failing = True
            return
        if self._is_failing:
            log.info("rate_limits_available")
        self._is_failing = False
        if wait_us > 0:
            self._metrics.rate_limited.labels(caller.key_id).inc()
            raise RateLimitedProblem(
                f"this key may ask {self._per_s:g} times a second, {self._burst} at once; try again later",
                retry_after_s=max(1, math.ceil(wait_us / 1e6)),
            )

    async def _wait_us(self, key: str) -> int:
        args = [key, str(1e6 / self._per_s), str(self._burst)]
        try:
            return int(await self._redis.evalsha(_TAKE_SHA, 1, *args))
        except NoScriptError:
            return int(await self._redis.eval(_TAKE, 1, *args))
