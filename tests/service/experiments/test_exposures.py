"""`service.experiments.exposures` against the real embedded Redis, and its counts against obvious ones."""

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from service.experiments.assignment import Assigner, Assignment
from service.experiments.config import ExperimentsConfig, VariantOverrides
from service.experiments.exposures import (
    Exposure,
    ExposureLog,
    ExposureSettings,
    ExposuresUnavailableError,
    Outcome,
    VariantTally,
    deployment_unit_key,
)
from service.histories import connect
from service.redis_keys import exposure_stream, unit_key_name
from tests.service.running import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = b"k" * 32
CONTROL = Assignment("layer", "exp", "control", VariantOverrides())
TREATMENT = replace(CONTROL, variant="new")
namespaces = (f"experiments-{number}" for number in count())
ids = (f"recommendation-{number}" for number in count())


@pytest.fixture
def settings() -> ExposureSettings:
    return ExposureSettings(namespace=next(namespaces), flush_interval_s=0.01)


@asynccontextmanager
async def started(redis: Redis, settings: ExposureSettings) -> AsyncIterator[ExposureLog]:
    """A log; what was recorded is in Redis when the block ends."""
    log = ExposureLog(redis, KEY, settings)
    await log.start()
    try:
        yield log
    finally:
        await log.stop()


def exposure(
    user_id: str = "u", *assignments: Assignment, latency_ms: float = 10.0, degraded: bool = False
) -> Exposure:
    return Exposure(next(ids), user_id, assignments or (CONTROL,), 1_000.5, latency_ms, degraded, 10)


async def tallies_after(redis: Redis, settings: ExposureSettings, record: Callable[[ExposureLog], None]):
    async with started(redis, settings) as log:
        record(log)
    assert log.num_dropped == 0
    return await log.tallies("exp")


async def test_an_unknown_experiment_has_no_tallies(redis: Redis, settings: ExposureSettings):
    assert await ExposureLog(redis, KEY, settings).tallies("exp") == {}


async def test_one_user_by_hand(redis: Redis, settings: ExposureSettings):
    """2 exposures, then 3 clicks and 2 purchases, then a third exposure: squares 9 and 9, product 9."""

    def record(log: ExposureLog) -> None:
        first, second, third = (exposure() for _ in range(3))
        for one in (first, second):
            log.record_exposure(one)
        outcomes: list[Outcome] = ["click", "click", "purchase", "click", "purchase"]
        for outcome in outcomes:
            log.record_outcome(first.recommendation_id, "u", outcome)
        log.record_exposure(third)

    found = (await tallies_after(redis, settings, record))["control"]
    assert replace(found, latency_ms={}) == VariantTally(
        units=1,
        exposures=3,
        clicks=3,
        purchases=2,
        conversions=1,
        exposures_squared=9,
        clicks_squared=9,
        clicks_times_exposures=9,
    )


async def test_sums_are_those_of_the_users(redis: Redis, settings: ExposureSettings):
    rng = random.Random(0)
    n: Counter[tuple[str, str]] = Counter()
    x: Counter[tuple[str, str]] = Counter()
    buyers: defaultdict[str, set[str]] = defaultdict(set)
    degraded: Counter[str] = Counter()

    def record(log: ExposureLog) -> None:
        shown: list[tuple[Exposure, str]] = []
        for _ in range(1_500):
            if not shown or rng.random() < 0.5:
                number = int(rng.paretovariate(0.5)) % 60  # few users with many exposures
                assignment = TREATMENT if number % 3 == 0 else CONTROL
                one = exposure(f"user-{number}", assignment, degraded=rng.random() < 0.2)
                shown.append((one, assignment.variant))
                log.record_exposure(one)
                n[assignment.variant, one.user_id] += 1
                degraded[assignment.variant] += one.degraded
            else:
                one, variant = rng.choice(shown)
                outcome: Outcome = rng.choice(["click", "click", "purchase"])
                log.record_outcome(one.recommendation_id, one.user_id, outcome)
                if outcome == "click":
                    x[variant, one.user_id] += 1
                else:
                    buyers[variant].add(one.user_id)

    found = await tallies_after(redis, settings, record)
    assert set(found) == {"control", "new"}
    for variant, tally in found.items():
        users = [user for name, user in n if name == variant]
        exposures = np.array([n[variant, user] for user in users])
        clicks = np.array([x[variant, user] for user in users])
        assert (tally.units, tally.exposures, tally.clicks) == (len(users), exposures.sum(), clicks.sum())
        assert tally.exposures_squared == (exposures**2).sum()
        assert tally.clicks_squared == (clicks**2).sum()
        assert tally.clicks_times_exposures == (exposures * clicks).sum()
        assert tally.conversions == len(buyers[variant])
        assert tally.degraded == degraded[variant]
        assert tally.crossed == 0


async def test_each_layer_counts_the_exposure_and_its_outcome(redis: Redis, settings: ExposureSettings):
    other = Assignment("other", "second", "b", VariantOverrides())
    async with started(redis, settings) as log:
        one = exposure("u", TREATMENT, other)
        log.record_exposure(one)
        log.record_outcome(one.recommendation_id, "u", "click")
    assert (await log.tallies("exp"))["new"].clicks == 1
    assert (await log.tallies("second"))["b"].clicks == 1


async def test_an_answer_outside_every_experiment_leaves_nothing(redis: Redis, settings: ExposureSettings):
    async with started(redis, settings) as log:
        log.record_exposure(Exposure("r", "u", (), 0.0, 1.0, degraded=False, num_items=1))
        assert log.num_waiting == 0


async def test_an_outcome_of_no_exposure_or_of_another_user_does_not_count(redis: Redis, settings: ExposureSettings):
    async with started(redis, settings) as log:
        one = exposure("u")
        log.record_exposure(one)
        log.record_outcome("no-such-recommendation", "u", "click")
        log.record_outcome(one.recommendation_id, "stranger", "click")
    assert log.num_unmatched == 2
    tally = (await log.tallies("exp"))["control"]
    assert (tally.units, tally.clicks) == (1, 0)


async def test_a_user_in_two_variants_counts_in_the_first_and_is_reported(redis: Redis, settings: ExposureSettings):
    def record(log: ExposureLog) -> None:
        for assignment in (CONTROL, TREATMENT, CONTROL):
            one = exposure("u", assignment)
            log.record_exposure(one)
            log.record_outcome(one.recommendation_id, "u", "click")

    found = await tallies_after(redis, settings, record)
    assert (found["control"].exposures, found["control"].clicks, found["control"].crossed) == (2, 2, 0)
    assert (found["new"].exposures, found["new"].clicks, found["new"].crossed) == (0, 0, 2)


async def test_latencies_are_known_within_two_percent(redis: Redis, settings: ExposureSettings):
    latencies = sorted([0.0, 0.5, 1.0, 3.14, 50.0, 999.0, 61_000.0])

    def record(log: ExposureLog) -> None:
        for latency_ms in latencies:
            log.record_exposure(exposure(latency_ms=latency_ms))

    found = (await tallies_after(redis, settings, record))["control"].latency_ms
    assert list(found.values()) == [1] * len(latencies)
    for stored, latency_ms in zip(found, latencies, strict=True):
        assert max(latency_ms, 0.01) <= stored * 1.000001 <= 1.0201 * max(latency_ms, 0.01)


async def test_the_stream_tells_each_exposure(redis: Redis, settings: ExposureSettings):
    async with started(redis, settings) as log:
        one = exposure("u", CONTROL, replace(TREATMENT, experiment="second"), latency_ms=12.5, degraded=True)
        log.record_exposure(one)
    stored: Any = await redis.xrange(exposure_stream(settings.namespace))
    assert [entry for _, entry in stored] == [
        {
            "recommendation_id": one.recommendation_id,
            "variants": "exp/control second/new",
            "unit": log.unit("u"),
            "at": "1000.5",
            "latency_ms": "12.500",
            "degraded": "1",
            "num_items": "10",
        }
    ]


async def test_the_stream_is_cut(redis: Redis, settings: ExposureSettings):
    short = replace(settings, stream_max_length=100)
    async with started(redis, short) as log:
        for _ in range(1_000):
            log.record_exposure(exposure())
    # approximate: Redis cuts whole nodes of 100 entries
    assert 100 <= await redis.xlen(exposure_stream(short.namespace)) <= 200


async def test_everything_but_names_and_key_ends_by_itself(redis: Redis, settings: ExposureSettings):
    limited = replace(settings, attribution_s=100, retention_s=1_000)
    async with started(redis, limited) as log:
        log.record_exposure(exposure())
    ends = {key: await redis.ttl(key) async for key in redis.scan_iter(f"*{settings.namespace}*")}
    links = {key: ttl for key, ttl in ends.items() if ":exposure:" in key}
    assert len(links) == 1
    assert all(90 < ttl <= 100 for ttl in links.values())
    without_end = {key for key, ttl in ends.items() if ttl == -1}
    assert without_end == {exposure_stream(settings.namespace), f"sidrec:experiments:{settings.namespace}:names"}
    assert all(900 < ttl <= 1_000 for key, ttl in ends.items() if key not in links | dict.fromkeys(without_end))


async def test_old_stream_entries_go(redis: Redis, settings: ExposureSettings):
    stream = exposure_stream(settings.namespace)
    for number in range(1, 301):
        await redis.xadd(stream, {"old": "1"}, id=f"{number}-0")
    async with started(redis, settings) as log:
        log.record_exposure(exposure())
    assert await redis.xlen(stream) <= 101  # approximate, as above


async def test_keys_that_a_script_touches_share_a_slot_and_experiments_do_not(redis: Redis, settings: ExposureSettings):
    async with started(redis, settings) as log:
        for number in range(400):
            log.record_exposure(exposure(f"u{number}"))
    units = [key async for key in redis.scan_iter(f"*{settings.namespace}:*:units")]
    assert len(units) == 16
    for key in units:
        assert await redis.exists(key.replace(":units", ":sums"))
        assert key_slot(key.encode()) == key_slot(key.replace(":units", ":sums").encode())
    assert len({key_slot(key.encode()) for key in units}) > 10


async def test_no_key_and_no_value_names_the_user(redis: Redis, settings: ExposureSettings):
    name = "somebody@example.com"
    async with started(redis, settings) as log:
        one = exposure(name)
        log.record_exposure(one)
        log.record_outcome(one.recommendation_id, name, "click")
    found = await everything(redis, settings)
    assert any(log.unit(name) in text for text in found.values())
    assert not any("somebody" in key + text for key, text in found.items())


async def everything(redis: Redis, settings: ExposureSettings) -> dict[str, str]:
    """Every key of the namespace with what it holds."""
    read: dict[str, Any] = {
        "string": redis.get,
        "hash": redis.hgetall,
        "set": redis.smembers,
        "stream": redis.xrange,
    }
    found = {}
    async for key in redis.scan_iter(f"*{settings.namespace}*"):
        found[key] = repr(await read[str(await redis.type(key))](key))
    return found


async def test_erasing_a_user_leaves_their_hash_in_no_key_but_the_stream(redis: Redis, settings: ExposureSettings):
    async with started(redis, settings) as log:
        shown = [exposure(user, CONTROL, replace(TREATMENT, experiment="second")) for user in ("gone", "stays")]
        for one in shown:
            log.record_exposure(one)
    before = await log.tallies("exp")
    assert await log.erase("gone") == 2
    assert await log.erase("gone") == 0

    found = await everything(redis, settings)
    assert [key for key, text in found.items() if log.unit("gone") in text] == [exposure_stream(settings.namespace)]
    assert await log.tallies("exp") == before, "totals name nobody"

    async with started(redis, settings) as log:  # late outcomes bring nobody back
        for one in shown:
            log.record_outcome(one.recommendation_id, one.user_id, "click")
    assert log.num_unmatched == 2
    assert (await log.tallies("exp"))["control"].clicks == 1


async def test_erasing_forgets_what_still_waits(redis: Redis, settings: ExposureSettings):
    log = ExposureLog(redis, KEY, settings)
    log.record_exposure(exposure("gone"))
    log.record_exposure(exposure("stays"))
    await log.erase("gone")
    assert log.num_waiting == 1


async def test_a_full_queue_drops_and_says_so(redis: Redis, settings: ExposureSettings):
    heard: list[int] = []
    log = ExposureLog(redis, KEY, replace(settings, max_queued=3), heard.append)
    for _ in range(5):
        log.record_exposure(exposure())
    assert (log.num_waiting, log.num_dropped, heard) == (3, 2, [1, 1])
    await log.start()
    await log.stop()
    assert (await log.tallies("exp"))["control"].exposures == 3


async def test_without_redis_recording_costs_nothing_and_is_counted(tmp_path, settings: ExposureSettings):
    client = connect(f"unix://{tmp_path / 'none.sock'}", timeout_s=0.2, max_connections=2)
    log = ExposureLog(client, KEY, settings)
    await log.start()
    started_at = time.perf_counter()
    for _ in range(600):
        log.record_exposure(exposure())
    assert time.perf_counter() - started_at < 0.5
    await until(lambda: log.num_dropped == 600)
    log.record_outcome("r", "u", "click")
    await log.stop()
    assert log.num_dropped == 601
    for attempt in (log.tallies("exp"), log.erase("u"), deployment_unit_key(client)):
        with pytest.raises(ExposuresUnavailableError, match=r"^the exposures are unavailable \(ConnectionError\)$"):
            await attempt
    await client.aclose()


async def test_a_failure_of_redis_ends_nothing(redis: Redis, settings: ExposureSettings):
    async with started(redis, settings) as log:
        await redis.config_set("maxmemory", 1)
        try:
            log.record_exposure(exposure())
            await until(lambda: log.num_dropped == 1)
        finally:
            await redis.config_set("maxmemory", 0)
        log.record_exposure(exposure())
        await until(lambda: log.num_waiting == 0)
    assert (await log.tallies("exp"))["control"].exposures == 1


async def test_waiting_records_are_written_soon(redis: Redis, settings: ExposureSettings):
    async with started(redis, settings) as log:
        log.record_exposure(exposure())
        await until(lambda: log.num_waiting == 0)
    assert (await log.tallies("exp"))["control"].exposures == 1


async def test_all_replicas_have_one_unit_key(redis: Redis, settings: ExposureSettings):
    keys = await asyncio.gather(*(deployment_unit_key(redis, settings.namespace) for _ in range(5)))
    assert len(set(keys)) == 1
    assert len(keys[0]) == 32
    assert await redis.exists(unit_key_name(settings.namespace))
    assert await deployment_unit_key(redis, f"{settings.namespace}-other") != keys[0]


async def test_assigned_users_are_counted_by_their_weights(redis: Redis, settings: ExposureSettings):
    content = {
        "layers": [
            {
                "name": "layer",
                "experiments": [
                    {
                        "name": "exp",
                        "traffic": [0.0, 0.5],
                        "variants": [{"name": "control", "control": True}, {"name": "new", "weight": 3}],
                    }
                ],
            }
        ]
    }
    assigner = Assigner(ExperimentsConfig.model_validate(content))

    def record(log: ExposureLog) -> None:
        for number in range(2_000):
            user = f"user-{number}"
            log.record_exposure(Exposure(next(ids), user, assigner.assign(user), 0.0, 1.0, degraded=False, num_items=1))

    found = await tallies_after(redis, settings, record)
    assert found["control"].units + found["new"].units == pytest.approx(1_000, rel=0.1)
    assert found["new"].units == pytest.approx(750, rel=0.1)
