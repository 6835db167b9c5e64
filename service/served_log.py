"""The log of what was served: every answer of `/recommend` with its propensities, and the events that name it.

It is what off-policy evaluation reads (`semantic_ids.off_policy`); `sidrec-serve export` joins its two streams. Off by
default. Written in the background (`background_writer`): an answer never waits for it, and under pressure its entries
are dropped and counted.

No user id is stored, only its keyed hash, as for experiments. A user's entries are listed by time under a key of their
own, so that `erase` can delete them; entries go at the age of `retention_s`, or when there are `max_length` newer ones.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.background_writer import BackgroundWriter
from service.experiments.exposures import ExposuresUnavailableError, deployment_unit_key
from service.experiments.runtime import unit_of
from service.redis_keys import DEFAULT_NAMESPACE, outcome_stream, served_entries_key, served_stream
from service.schemas import RecommendResponse

_PAGE = 1_000


class ServedLogUnavailableError(Exception):
    """Redis did not answer, or refused; the text names only the kind of failure."""


class ShownItem(BaseModel):
    """One item of an answer, at its place in the list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    item_id: str
    score: float | None
    propensity: float
    source: str


class ServedAnswer(BaseModel):
    """One answer of `/recommend`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recommendation_id: str
    tenant: str
    unit: str
    """The user's keyed hash; empty for a request without a user."""
    at: float  # seconds since 1970
    bundle: str
    catalog_epoch: int
    source: str
    reason: str | None
    experiment: str | None
    """`<experiment>/<variant>`."""
    items: tuple[ShownItem, ...]


class Outcome(BaseModel):
    """What a user did with an item of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recommendation_id: str
    tenant: str
    unit: str
    item_id: str
    event_type: str
    at: float  # seconds since 1970, as the event says


@dataclass(frozen=True)
class ServedLogSettings:
    """How much is kept, and for how long."""

    max_length: int
    """Answers, about, and as many outcomes; some 100 bytes an item. 0: nothing is logged."""
    retention_s: int = 30 * 86_400
    namespace: str = DEFAULT_NAMESPACE
    flush_interval_s: float = 0.2
    max_queued: int = 10_000


@dataclass(frozen=True)
class _QueuedAnswer:
    answer: RecommendResponse
    tenant: str
    user_id: str | None
    at: float


@dataclass(frozen=True)
class _QueuedOutcome:
    recommendation_id: str
    tenant: str
    user_id: str
    item_id: str
    event_type: str
    at: float


_Queued: TypeAlias = _QueuedAnswer | _QueuedOutcome


class ServedLog:
    """Writes the log, and deletes a user's part of it."""

    def __init__(
        self, redis: Redis, settings: ServedLogSettings, on_dropped: Callable[[int], None] | None = None
    ) -> None:
        self._redis = redis
        self._settings = settings
        self._unit_key: bytes | None = None
        self._writer: BackgroundWriter[_Queued] = BackgroundWriter(
            "served-log",
            self._write,
            max_queued=settings.max_queued,
            interval_s=settings.flush_interval_s,
            on_dropped=on_dropped,
        )

    @property
    def is_on(self) -> bool:
        """Whether anything is logged."""
        return self._settings.max_length > 0

    @property
    def num_dropped(self) -> int:
        """Answers and outcomes that were lost."""
        return self._writer.num_dropped

    async def start(self) -> None:
        """Begin to write, if the log is on."""
        if self.is_on:
            await self._writer.start()

    async def stop(self) -> None:
        """Write what waits."""
        await self._writer.stop()

    def answered(self, answer: RecommendResponse, tenant: str) -> None:
        """Note an answer."""
        if self.is_on:
            self._writer.put(_QueuedAnswer(answer, tenant, answer.user_id, time.time()))

    def happened(
        self, recommendation_id: str | None, tenant: str, user_id: str, item_id: str, event_type: str, at: float
    ) -> None:
        """Note a new event, if it names a recommendation; a repeated one must not come here."""
        if self.is_on and recommendation_id is not None:
            self._writer.put(_QueuedOutcome(recommendation_id, tenant, user_id, item_id, event_type, at))

    async def erase(self, tenant: str, user_id: str) -> int:
        """Delete the user's entries; how many there were. `ServedLogUnavailableError`."""
        await self._writer.forget(lambda queued: (queued.tenant, queued.user_id) == (tenant, user_id))
        with _typed_failure():
            listed = served_entries_key(self._settings.namespace, await self._unit(tenant, user_id))
            entries: dict[str, list[str]] = {}
            for member in await self._redis.zrange(listed, 0, -1):
                stream, _, entry_id = str(member).rpartition(" ")
                entries.setdefault(stream, []).append(entry_id)
            deleted = 0
            for stream, entry_ids in entries.items():
                for start in range(0, len(entry_ids), _PAGE):
                    deleted += await self._redis.xdel(stream, *entry_ids[start : start + _PAGE])
            await self._redis.unlink(listed)  # last: what failed before is found again
        return deleted

    async def _unit(self, tenant: str, user_id: str | None) -> str:
        if user_id is None:
            return ""
        if self._unit_key is None:
            self._unit_key = await deployment_unit_key(self._redis, self._settings.namespace)
        name = unit_of(tenant, user_id).encode("utf-8", "surrogatepass")
        return blake2b(name, digest_size=12, key=self._unit_key).hexdigest()

    async def _write(self, batch: Sequence[_Queued]) -> None:
        """The entries, then the lists by which users are erased."""
        settings, now = self._settings, time.time()
        oldest_ms = max(0, int(1_000 * (now - settings.retention_s)))
        streams = served_stream(settings.namespace), outcome_stream(settings.namespace)
        units = [await self._unit(queued.tenant, queued.user_id) for queued in batch]
        async with self._redis.pipeline(transaction=False) as pipeline:
            names = []
            for queued, unit in zip(batch, units, strict=True):
                entry = _served(queued, unit) if isinstance(queued, _QueuedAnswer) else _outcome(queued, unit)
                names.append(streams[isinstance(queued, _QueuedOutcome)])
                fields: dict[Any, Any] = {"json": entry.model_dump_json()}
                pipeline.xadd(names[-1], fields, maxlen=settings.max_length, approximate=True)
            for stream in streams:
                pipeline.xtrim(stream, minid=f"{oldest_ms}-0", approximate=True)
            entry_ids = await pipeline.execute()
        async with self._redis.pipeline(transaction=False) as pipeline:
            for unit, stream, entry_id in zip(units, names, entry_ids, strict=False):
                if unit:
                    listed = served_entries_key(settings.namespace, unit)
                    pipeline.zadd(listed, {f"{stream} {entry_id}": int(entry_id.partition("-")[0])})
                    pipeline.zremrangebyscore(listed, 0, f"({oldest_ms}")
                    pipeline.expire(listed, settings.retention_s)
            await pipeline.execute()


async def read_answers(redis: Redis, namespace: str = DEFAULT_NAMESPACE) -> AsyncIterator[list[ServedAnswer]]:
    """Every answer of the log, the oldest first, by pages; `RedisError`."""
    async for texts in _pages(redis, served_stream(namespace)):
        yield [ServedAnswer.model_validate_json(text) for text in texts]


async def read_outcomes(redis: Redis, namespace: str = DEFAULT_NAMESPACE) -> AsyncIterator[list[Outcome]]:
    """Every outcome of the log, the oldest first, by pages; `RedisError`."""
    async for texts in _pages(redis, outcome_stream(namespace)):
        yield [Outcome.model_validate_json(text) for text in texts]


async def _pages(redis: Redis, stream: str) -> AsyncIterator[list[str]]:
    position = "-"
    while True:
        entries: Any = await redis.xrange(stream, min=position, count=_PAGE)
        if not entries:
            return
        yield [fields["json"] for _entry_id, fields in entries]
        position = f"({entries[-1][0]}"


def _served(queued: _QueuedAnswer, unit: str) -> ServedAnswer:
    answer = queued.answer
    return ServedAnswer(
        recommendation_id=answer.recommendation_id,
        tenant=queued.tenant,
        unit=unit,
        at=queued.at,
        bundle=answer.versions.bundle,
        catalog_epoch=answer.versions.catalog_epoch,
        source=answer.source,
        reason=answer.reason,
        experiment=None if answer.experiment is None else f"{answer.experiment.name}/{answer.experiment.variant}",
        items=tuple(
            ShownItem(item_id=one.item_id, score=one.score, propensity=one.propensity, source=one.source)
            for one in answer.items
        ),
    )


def _outcome(queued: _QueuedOutcome, unit: str) -> Outcome:
    return Outcome(
        recommendation_id=queued.recommendation_id,
        tenant=queued.tenant,
        unit=unit,
        item_id=queued.item_id,
        event_type=queued.event_type,
        at=queued.at,
    )


@contextmanager
def _typed_failure() -> Iterator[None]:
    try:
        yield
    except (ExposuresUnavailableError, RedisError, OSError) as error:
        raise ServedLogUnavailableError(f"the log of answers is unavailable ({type(error).__name__})") from error
