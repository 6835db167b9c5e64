"""What experiments did, in Redis: who was exposed to which variant, and what the exposed did then.

recommend ─ record_exposure ┐                      ┌ stream of exposures (for whoever wants to look at each)
                            ├ queue ─ every 200 ms ┼ link: recommendation → its variants, for the attribution window
events ──── record_outcome ─┘                      ├ counts by user, and sums over users, in shards
                                                   └ latency histogram and degraded answers
                                                                   report ← `tallies`

- **Never on the critical path.** `record_*` put into a bounded queue and return; a task writes batches, two round trips
  each. What does not fit, or Redis refuses, is dropped and counted: no request waits for it or fails by it. So the
  counts are at most once, and a loss strikes all variants alike.
- **O(1) for each event, and for each report.** An outcome finds its variants by its recommendation's link. One script
  changes a user's counts and, by the differences, the sums over users that the delta method needs; a report reads the
  sums, never the users.
- **Redis Cluster.** A user's counts and the sums that they are in share a tag: `{namespace:experiment:name:shard}`.
- **No user id is stored**, only its keyed hash, the key being the deployment's. `erase` removes a user's counts; links
  name no user; totals and the hash in the stream remain, the latter for `retention_s` at most.

An outcome counts where it comes within the attribution window, from a user who was exposed to that variant; each call
counts, so the caller drops repeated events first (`Histories.record` says which are new).
"""

import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil, log
from typing import Any, Literal, TypeAlias

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from service.background_writer import BackgroundWriter
from service.experiments.assignment import Assignment
from service.redis_keys import (
    DEFAULT_NAMESPACE,
    experiment_guardrails_key,
    experiment_names_key,
    experiment_shard_keys,
    exposure_link_key,
    exposure_stream,
    unit_key_name,
)

Outcome: TypeAlias = Literal["click", "purchase"]

_NUM_SHARDS = 16
"""Of an experiment's users: spreads a busy experiment over a cluster; a report reads one hash of each."""
_BUCKET_GROWTH = 1.02
"""A latency is known within 2 %."""
_SHORTEST_MS, _LONGEST_MS = 0.01, 1e7

_COUNT = """
-- KEYS  units, sums: of one shard of one experiment
-- ARGV  ttl_s; then for each step: exposure, click or purchase; variant; unit
-- A unit is `<variant> <exposures> <clicks> <purchases>`. Sums of squares and products grow by the differences:
-- (n + 1)² - n² = 2n + 1, and (n + 1)x - nx = x. Returns how many outcomes were of a unit without exposure.
local units, sums = KEYS[1], KEYS[2]
local num_unmatched = 0
for i = 2, #ARGV, 3 do
  local step, variant, unit = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local function add(name, by) redis.call('HINCRBY', sums, variant .. ':' .. name, by) end
  local known, n, x, c = string.match(redis.call('HGET', units, unit) or '', '^(%S+) (%d+) (%d+) (%d+)$')
  n, x, c = tonumber(n or 0), tonumber(x or 0), tonumber(c or 0)
  if known and known ~= variant then
    add('crossed', 1)
  elseif not known and step ~= 'exposure' then
    num_unmatched = num_unmatched + 1
  else
    if step == 'exposure' then
      if not known then add('units', 1) end
      add('exposures', 1)
      add('exposures_squared', 2 * n + 1)
      add('clicks_times_exposures', x)
      n = n + 1
    elseif step == 'click' then
      add('clicks', 1)
      add('clicks_squared', 2 * x + 1)
      add('clicks_times_exposures', n)
      x = x + 1
    else
      add('purchases', 1)
      if c == 0 then add('conversions', 1) end
      c = c + 1
    end
    redis.call('HSET', units, unit, string.format('%s %d %d %d', variant, n, x, c))
  end
end
redis.call('EXPIRE', units, ARGV[1])
redis.call('EXPIRE', sums, ARGV[1])
return num_unmatched
"""


class ExposuresUnavailableError(Exception):
    """Redis did not answer, or refused; `__cause__` has the rest."""


@dataclass(frozen=True)
class Exposure:
    """One answer that a user got under experiments."""

    recommendation_id: str
    user_id: str
    assignments: tuple[Assignment, ...]
    at: float
    """Seconds since 1970."""
    latency_ms: float
    degraded: bool
    num_items: int


@dataclass(frozen=True)
class ExposureSettings:
    """How much is kept, and for how long."""

    namespace: str = DEFAULT_NAMESPACE
    max_queued: int = 10_000
    """Exposures and outcomes that wait for Redis; more are dropped."""
    flush_interval_s: float = 0.2
    max_batch: int = 100
    """To write one keeps the event loop from others for some milliseconds."""
    stream_max_length: int = 1_000_000
    """Entries, about; some 200 bytes each."""
    attribution_s: int = 7 * 86_400
    """An outcome later than this after its recommendation does not count."""
    retention_s: int = 180 * 86_400
    """Stream entries go at this age; an experiment's counts, so long after its last exposure or outcome."""


@dataclass(frozen=True)
class VariantTally:
    """What is counted of one variant. A unit is a user."""

    units: int = 0
    exposures: int = 0
    clicks: int = 0
    purchases: int = 0
    conversions: int = 0
    """Units with a purchase."""
    exposures_squared: int = 0
    """Sum over units, as the next two."""
    clicks_squared: int = 0
    clicks_times_exposures: int = 0
    crossed: int = 0
    """Exposures and outcomes left out because their unit was in another variant before: must be 0."""
    degraded: int = 0
    latency_ms: Mapping[float, int] = field(default_factory=dict)
    """How many answers took at most so long, and longer than the next shorter one."""


@dataclass(frozen=True)
class _QueuedExposure:
    exposure: Exposure
    unit: str


@dataclass(frozen=True)
class _QueuedOutcome:
    recommendation_id: str
    outcome: Outcome
    unit: str


_Queued: TypeAlias = _QueuedExposure | _QueuedOutcome


@dataclass(frozen=True)
class _Step:
    experiment: str
    variant: str
    step: str
    unit: str


async def deployment_unit_key(redis: Redis, namespace: str = DEFAULT_NAMESPACE) -> bytes:
    """The key of the hashes of user ids: random, made once, the same for every replica on this Redis."""
    with _typed_failure():
        await redis.set(unit_key_name(namespace), secrets.token_hex(32), nx=True)
        stored = await redis.get(unit_key_name(namespace))
    return bytes.fromhex(str(stored))


class ExposureLog:
    """Writes exposures and outcomes in the background, and reads what they add up to.

    `redis` decodes responses. `start()`, then `record_*` from the event loop; `stop()` writes what still waits.
    `on_dropped` hears of how many records were lost.
    """

    def __init__(
        self,
        redis: Redis,
        unit_key: bytes,
        settings: ExposureSettings | None = None,
        on_dropped: Callable[[int], None] | None = None,
    ) -> None:
        self._redis = redis
        self._unit_key = unit_key
        self._settings = settings or ExposureSettings()
        self._writer: BackgroundWriter[_Queued] = BackgroundWriter(
            "exposure-log",
            self._write,
            max_queued=self._settings.max_queued,
            max_batch=self._settings.max_batch,
            interval_s=self._settings.flush_interval_s,
            on_dropped=on_dropped,
        )
        self.num_unmatched = 0
        """Outcomes that belong to no exposure: no or an old recommendation, or another user's."""

    async def start(self) -> None:
        """Begin to write."""
        await self._writer.start()

    async def stop(self) -> None:
        """Write what waits, for a few seconds at most, and end."""
        await self._writer.stop()

    @property
    def num_dropped(self) -> int:
        """Exposures and outcomes that were lost: the queue was full, or Redis failed."""
        return self._writer.num_dropped

    @property
    def num_waiting(self) -> int:
        """Exposures and outcomes not yet taken up."""
        return self._writer.num_waiting

    def record_exposure(self, exposure: Exposure) -> None:
        """Note an answer under experiments; of no assignments, nothing."""
        if exposure.assignments:
            self._writer.put(_QueuedExposure(exposure, self.unit(exposure.user_id)))

    def record_outcome(self, recommendation_id: str, user_id: str, outcome: Outcome) -> None:
        """Note a new event that names a recommendation; a repeated one must not come here."""
        self._writer.put(_QueuedOutcome(recommendation_id, outcome, self.unit(user_id)))

    def unit(self, user_id: str) -> str:
        """The keyed hash that stands for a user."""
        return blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=12, key=self._unit_key).hexdigest()

    async def erase(self, user_id: str) -> int:
        """Forget the user in every experiment; returns in how many there was one. Raises ExposuresUnavailableError."""
        unit = self.unit(user_id)
        await self._writer.forget(lambda queued: queued.unit == unit)
        with _typed_failure():
            names = sorted(map(str, await self._redis.smembers(experiment_names_key(self._settings.namespace))))
            async with self._redis.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.hdel(self._shard_keys(name, unit)[0], unit)
                return sum(await pipeline.execute())

    async def tallies(self, experiment: str) -> dict[str, VariantTally]:
        """What is counted of an experiment, by variant. Raises ExposuresUnavailableError."""
        namespace = self._settings.namespace
        with _typed_failure():
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.hgetall(experiment_guardrails_key(namespace, experiment))
                for shard in range(_NUM_SHARDS):
                    pipeline.hgetall(experiment_shard_keys(namespace, experiment, shard)[1])
                guardrails, *shards = await pipeline.execute()
        sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
        latencies: defaultdict[str, dict[float, int]] = defaultdict(dict)
        for shard_sums in shards:
            for variant, name, count in _counts(shard_sums):
                sums[variant][name] += count
        for variant, name, count in _counts(guardrails):
            if name == "degraded":
                sums[variant][name] += count
            else:
                latencies[variant][_bucket_end_ms(int(name))] = count
        return {
            variant: VariantTally(**sums[variant], latency_ms=dict(sorted(latencies[variant].items())))
            for variant in sorted(sums.keys() | latencies.keys())
        }

    async def _write(self, batch: Sequence[_Queued]) -> None:
        """Exposures and links first, then the counts in the order in which things came."""
        outcomes = [queued for queued in batch if isinstance(queued, _QueuedOutcome)]
        exposures = [queued for queued in batch if isinstance(queued, _QueuedExposure)]
        namespace = self._settings.namespace
        async with self._redis.pipeline(transaction=False) as pipeline:
            self._append(pipeline, exposures)
            for outcome in outcomes:
                pipeline.get(exposure_link_key(namespace, outcome.recommendation_id))
            replies = await pipeline.execute()
        links: Iterator[str | None] = iter(replies[len(replies) - len(outcomes) :])
        async with self._redis.pipeline(transaction=False) as pipeline:
            for (experiment, shard), steps in self._by_shard(self._steps(batch, links)).items():
                args = [text for one in steps for text in (one.step, one.variant, one.unit)]
                keys = experiment_shard_keys(namespace, experiment, shard)
                pipeline.eval(_COUNT, len(keys), *keys, str(self._settings.retention_s), *args)
            self.num_unmatched += sum(await pipeline.execute())

    def _append(self, pipeline: Pipeline, exposures: Sequence[_QueuedExposure]) -> None:
        """Add to the pipeline: stream entries, links, names and guardrails."""
        if not exposures:
            return
        settings, stream = self._settings, exposure_stream(self._settings.namespace)
        guardrails: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for queued in exposures:
            exposure = queued.exposure
            variants = " ".join(f"{one.experiment}/{one.variant}" for one in exposure.assignments)
            pipeline.set(
                exposure_link_key(settings.namespace, exposure.recommendation_id), variants, ex=settings.attribution_s
            )
            entry = _stream_entry(queued, variants)
            pipeline.xadd(stream, entry, maxlen=settings.stream_max_length, approximate=True)
            for assignment in exposure.assignments:
                counts = guardrails[assignment.experiment]
                counts[f"{assignment.variant}:{_bucket(exposure.latency_ms)}"] += 1
                if exposure.degraded:
                    counts[f"{assignment.variant}:degraded"] += 1
        oldest_ms = int(1000 * (time.time() - settings.retention_s))
        pipeline.xtrim(stream, minid=f"{max(0, oldest_ms)}-0", approximate=True)
        pipeline.sadd(experiment_names_key(settings.namespace), *guardrails)
        for experiment, counts in guardrails.items():
            key = experiment_guardrails_key(settings.namespace, experiment)
            for name, count in counts.items():
                pipeline.hincrby(key, name, count)
            pipeline.expire(key, settings.retention_s)

    def _steps(self, batch: Iterable[_Queued], links: Iterator[str | None]) -> Iterator[_Step]:
        """What is to be counted; `links` are those of the outcomes in the batch."""
        for queued in batch:
            if isinstance(queued, _QueuedExposure):
                for assignment in queued.exposure.assignments:
                    yield _Step(assignment.experiment, assignment.variant, "exposure", queued.unit)
                continue
            link = next(links)
            if link is None:
                self.num_unmatched += 1
                continue
            for part in link.split(" "):
                experiment, _, variant = part.partition("/")
                yield _Step(experiment, variant, queued.outcome, queued.unit)

    def _by_shard(self, steps: Iterable[_Step]) -> dict[tuple[str, int], list[_Step]]:
        grouped: defaultdict[tuple[str, int], list[_Step]] = defaultdict(list)
        for step in steps:
            grouped[step.experiment, _shard(step.unit)].append(step)
        return grouped

    def _shard_keys(self, experiment: str, unit: str) -> tuple[str, str]:
        return experiment_shard_keys(self._settings.namespace, experiment, _shard(unit))


@contextmanager
def _typed_failure() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        raise ExposuresUnavailableError(f"the exposures are unavailable ({type(error).__name__})") from error


def _stream_entry(queued: _QueuedExposure, variants: str) -> dict[Any, Any]:
    exposure = queued.exposure
    return {
        "recommendation_id": exposure.recommendation_id,
        "variants": variants,
        "unit": queued.unit,
        "at": repr(exposure.at),
        "latency_ms": f"{exposure.latency_ms:.3f}",
        "degraded": int(exposure.degraded),
        "num_items": exposure.num_items,
    }


def _counts(stored: Mapping[str, str]) -> Iterator[tuple[str, str, int]]:
    """(variant, name, count) of a hash."""
    for name, count in stored.items():
        variant, _, what = name.partition(":")
        yield variant, what, int(count)


def _shard(unit: str) -> int:
    return int(unit[:8], 16) % _NUM_SHARDS


def _bucket(latency_ms: float) -> int:
    return ceil(log(min(max(latency_ms, _SHORTEST_MS), _LONGEST_MS)) / log(_BUCKET_GROWTH))


def _bucket_end_ms(bucket: int) -> float:
    return float(_BUCKET_GROWTH**bucket)
