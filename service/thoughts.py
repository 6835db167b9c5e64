"""Thoughts that were thought before: one for each user, in Redis, for every replica.

A thought is a pure function of bundle and prompt, since models think greedily. So the one of a user is used again for
the very same prompt (by its digest) and bundle: its tokens are put behind the prompt, and the items are those that a
request with time enough to think would get. A thought that was cut by its time is not kept: how far it came says more
of that moment's load than of the user. A thought cut by its number of tokens counts for the same limit only.

An entry is written only for the history that the user still has, in one script, so that none outlives an erasure.
Whatever is wrong with Redis or an entry, there is no thought: a miss.
"""

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from semantic_ids.bundle import Bundle
from semantic_ids.codes import TokenIds
from service.engine.base import DecodeResult
from service.metrics import Metrics
from service.redis_keys import user_keys

log = structlog.get_logger(__name__)

_MOST_WRITES = 64
"""That wait for Redis at once; further thoughts are not kept."""
_WRITE_TIMEOUT_S = 2.0

_PUT = """
-- KEYS  meta, thought: of one user
-- ARGV  entry, ttl in ms, history events when it was thought
-- Returns 1, or 0 if the history has moved since, or is gone. The entry goes with the user at the latest.
if tonumber(redis.call('HGET', KEYS[1], 'history') or 0) ~= tonumber(ARGV[3]) then return 0 end
local ttl, left = tonumber(ARGV[2]), redis.call('PTTL', KEYS[1])
if left > 0 and left < ttl then ttl = left end
redis.call('SET', KEYS[2], ARGV[1], 'PX', string.format('%d', ttl))
return 1
"""


class CachedThought(BaseModel):
    """A thought as it is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bundle: str
    prompt: str
    """Digest of the prompt's token ids."""
    max_tokens: int
    end: Literal["closed", "token_budget"]
    token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=4_096)]

    def answers(self, question: "ThoughtQuestion") -> bool:
        """Whether thinking would give the same again."""
        is_of_limit = self.max_tokens == question.max_tokens
        is_shorter = self.end == "closed" and len(self.token_ids) <= question.max_tokens
        return (
            (self.bundle, self.prompt) == (question.bundle.bundle_id, digest_of(question.prompt))
            and (is_of_limit or is_shorter)
            and max(self.token_ids, default=0) < question.bundle.vocabulary.vocab_size
        )


@dataclass(frozen=True)
class ThoughtQuestion:
    """Whose thought is wanted, and after which prompt."""

    tenant: str
    user_id: str
    num_events: int
    """Of the user's history, when the prompt was made."""
    bundle: Bundle
    prompt: TokenIds
    """That ends where the model is to think."""
    max_tokens: int


class Asks(Protocol):
    """Whoever sees to it that a user's thought is there when it is wanted (`think_ahead.ThinkAhead`)."""

    def ask(self, tenant: str, user_id: str, bundle_id: str) -> None:
        """Let a bundle's model think for the user. Returns at once."""
        ...


class Thoughts:
    """The cache. `ttl_s` 0: nothing is kept."""

    def __init__(self, redis: Redis, metrics: Metrics, *, ttl_s: float, ahead: Asks | None = None) -> None:
        self._redis = redis
        self._metrics = metrics
        self._ttl_s = ttl_s
        self._ahead = ahead
        self._writes: set[asyncio.Task[bool]] = set()

    async def get(self, question: ThoughtQuestion, timeout_s: float) -> CachedThought | None:
        """The thought, if it was thought before; one round trip."""
        if not self._ttl_s:
            return None
        outcome, thought = "miss", None
        try:
            async with asyncio.timeout(timeout_s):
                entry = await self._redis.get(user_keys(question.user_id, question.tenant).thought)
            if entry is not None:
                kept = CachedThought.model_validate_json(entry)
                if kept.answers(question):
                    outcome, thought = "hit", kept
        except (RedisError, OSError, TimeoutError, ValidationError, UnicodeError) as error:
            log.warning("thought_not_read", error=type(error).__name__)
            outcome = "failure"
        self._metrics.thought_cache.labels(outcome).inc()
        return thought

    async def put(self, question: ThoughtQuestion, result: DecodeResult) -> bool:
        """Keep the thought of a result; whether it is kept now. Nothing is raised."""
        if not self._ttl_s or result.thought_end is None or result.thought_end == "time_budget":
            return False
        entry = CachedThought(
            bundle=question.bundle.bundle_id,
            prompt=digest_of(question.prompt),
            max_tokens=question.max_tokens,
            end=result.thought_end,
            token_ids=list(result.thought),
        )
        keys = user_keys(question.user_id, question.tenant)
        arguments = entry.model_dump_json(), str(int(1000 * self._ttl_s)), str(question.num_events)
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                is_kept = bool(await self._redis.eval(_PUT, 2, keys.meta, keys.thought, *arguments))
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("thought_not_kept", error=type(error).__name__)
            self._metrics.thought_cache.labels("failure").inc()
            return False
        self._metrics.thought_cache.labels("write" if is_kept else "moved").inc()
        return is_kept

    def put_soon(self, question: ThoughtQuestion, result: DecodeResult) -> None:
        """The same in the background."""
        if len(self._writes) < _MOST_WRITES:
            task = asyncio.create_task(self.put(question, result))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    def ask_ahead(self, tenant: str, user_id: str, bundle_id: str) -> None:
        """Somebody may want the thought of this bundle about this user soon."""
        if self._ahead is not None:
            self._ahead.ask(tenant, user_id, bundle_id)

    async def stop(self) -> None:
        """Write what is being written."""
        await asyncio.gather(*self._writes, return_exceptions=True)


def prompt_after(question: ThoughtQuestion, thought: CachedThought) -> TokenIds:
    """The prompt that asks for a SID after this thought."""
    thinking = question.bundle.renderer.thinking
    if thinking is None:
        raise ValueError(f"bundle {question.bundle.bundle_id} cannot think: nothing stands after a thought")
    return np.concatenate((question.prompt, np.array([*thought.token_ids, *thinking.close], np.int64)))


def digest_of(prompt: TokenIds) -> str:
    """The same for equal token ids only."""
    return hashlib.sha256(prompt.astype("<i8").tobytes()).hexdigest()
