"""Circuit breakers: what is left alone, for how long, and what is no reason to."""

import asyncio
import time
from pathlib import Path

import pytest

from service.breaker import Breaker, BreakerOpenError
from service.engine.base import DecodeRequest, DecodeResult, ThoughtListener
from service.metrics import Metrics
from service.redis_server import EmbeddedRedis
from service.settings import Settings
from tests.service.engines import InstantEngine, SlowEngine, failing, instant, slow
from tests.service.running import Service, assert_problem, event, running
from tests.service.test_recommend import kill
from tests.service.world import ITEM_IDS, ids_of

HISTORY = list(ITEM_IDS[:5])
OPEN_S = 0.2


class SomethingError(Exception):
    """A failure."""


def judged(error: BaseException) -> bool | None:
    """Failures count, cancellations say nothing, the rest is somebody else's fault."""
    return None if isinstance(error, asyncio.CancelledError) else isinstance(error, SomethingError)


def call(breaker: Breaker, error: BaseException | None = None) -> None:
    """One call that ends so."""
    with breaker.attempt(judged):
        if error is not None:
            raise error


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(SomethingError):
            call(breaker, SomethingError())


def state_of(metrics: Metrics, dependency: str = "it", bundle_id: str = "") -> float | None:
    labels = {"dependency": dependency, "bundle": bundle_id}
    return metrics.registry.get_sample_value("sidrec_breaker_state", labels)


def state_of_engine(service: Service) -> float | None:
    return state_of(service.state.metrics, "engine", service.state.bundle.bundle_id)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def breaker(metrics: Metrics) -> Breaker:
    return Breaker("it", metrics, threshold=3, open_s=OPEN_S)


def test_it_opens_after_failures_running_and_closes_after_a_good_probe(breaker: Breaker, metrics: Metrics):
    fail(breaker, 2)
    call(breaker)
    fail(breaker, 2)
    assert state_of(metrics) == 0, "a success in between starts the count anew"
    fail(breaker)
    assert state_of(metrics) == 2
    with pytest.raises(BreakerOpenError, match="failed too often"):
        call(breaker)
    time.sleep(OPEN_S)
    call(breaker)
    assert state_of(metrics) == 0
    fail(breaker, 2)
    assert breaker.is_closed
    assert metrics.registry.get_sample_value("sidrec_breaker_opened_total", {"dependency": "it"}) == 1


def test_a_bad_probe_opens_it_again(breaker: Breaker):
    fail(breaker, 3)
    time.sleep(OPEN_S)
    fail(breaker)
    with pytest.raises(BreakerOpenError):
        call(breaker)


def test_one_probe_at_a_time(breaker: Breaker, metrics: Metrics):
    fail(breaker, 3)
    time.sleep(OPEN_S)
    with breaker.attempt(judged):
        assert state_of(metrics) == 1
        with pytest.raises(BreakerOpenError, match="being tried"):
            call(breaker)
    assert breaker.is_closed


def test_a_probe_that_says_nothing_makes_room_for_the_next(breaker: Breaker):
    fail(breaker, 3)
    time.sleep(OPEN_S)
    with pytest.raises(asyncio.CancelledError):
        call(breaker, asyncio.CancelledError())
    assert not breaker.is_closed
    call(breaker)
    assert breaker.is_closed


def test_what_is_no_failure_does_not_open_it(breaker: Breaker):
    for _ in range(9):
        with pytest.raises(KeyError):
            call(breaker, KeyError())
        with pytest.raises(asyncio.CancelledError):
            call(breaker, asyncio.CancelledError())
    assert breaker.is_closed


def test_calls_from_before_it_opened_decide_nothing_afterwards(breaker: Breaker):
    late = breaker.attempt(judged)
    late.__enter__()
    fail(breaker, 3)
    late.__exit__(None, None, None)
    assert not breaker.is_closed


def quick(settings: Settings) -> Settings:
    """Breakers that open soon and not for long."""
    names = ("breaker_failures", "redis_breaker_failures")
    return settings.model_copy(update=dict.fromkeys(names, 3) | {"breaker_open_s": 0.3, "redis_breaker_open_s": 0.3})


class HangingEngine(InstantEngine):
    """Answers nobody while it hangs."""

    hangs = True

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        if self.hangs:
            await asyncio.sleep(60)
        return await super().decode(request, on_thought)


async def test_a_failing_engine_is_left_alone(settings: Settings):
    async with running(quick(settings), failing()) as service:
        for _ in range(6):
            answer = await service.recommend(history=HISTORY, num_items=7)
            assert (answer["source"], answer["reason"], len(answer["items"])) == ("fallback", "engine_unavailable", 7)
        assert state_of_engine(service) == 2
        assert (await service.rerank(history=HISTORY, candidates=ITEM_IDS[9:12]))["reason"] == "engine_unavailable"


async def test_a_hanging_engine_costs_a_few_deadlines_and_not_everybodys(settings: Settings):
    async with running(quick(settings), lambda bundle, _settings, _metrics: HangingEngine(bundle)) as service:
        engine = service.state.engine
        assert isinstance(engine, HangingEngine)
        for _ in range(3):
            assert (await service.recommend(history=HISTORY, deadline_ms=400))["reason"] == "deadline"
        start = time.perf_counter()
        answer = await service.recommend(history=HISTORY, deadline_ms=400)
        assert answer["reason"] == "engine_unavailable"
        assert time.perf_counter() - start < 0.2
        engine.hangs = False
        await asyncio.sleep(0.31)
        assert (await service.recommend(history=HISTORY, deadline_ms=400))["reason"] is None
        assert state_of_engine(service) == 0


async def test_late_answers_of_a_busy_engine_do_not_open_it(settings: Settings):
    """Answers keep coming, for whoever allows more time: nothing is broken."""
    async with running(quick(settings), slow(0.2)) as service:
        assert isinstance(service.state.engine, SlowEngine)

        async def patient() -> None:
            for _ in range(5):
                assert (await service.recommend(history=HISTORY))["reason"] is None

        async def hurried() -> None:
            for _ in range(12):
                response = await service.post("/recommend", {"history": HISTORY, "deadline_ms": 50})
                assert response.status_code == 503 or response.json()["reason"] == "deadline"

        await asyncio.gather(patient(), hurried())
        assert state_of_engine(service) == 0


async def test_a_redis_that_hangs_costs_a_few_deadlines_and_not_everybodys(bundles: Path, tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    settings = quick(Settings(bundles=bundles, redis_url=await server.start(), redis_timeout_s=20))
    async with running(settings, instant) as service:
        await service.clicks("u", *HISTORY)
        usual = await service.recommend(user_id="u")
        await service.state.redis.client_pause(1_500)
        for _ in range(3):
            await expect_history_unavailable(service, usual, within_s=1.0)
        for _ in range(3):
            await expect_history_unavailable(service, usual, within_s=0.1)
            start = time.perf_counter()
            response = await service.post("/events", {"events": [event("u", ITEM_IDS[20])]})
            assert_problem(response, 503, "history-unavailable")
            assert int(response.headers["retry-after"]) >= 1
            assert time.perf_counter() - start < 0.1
        give_up_at = time.monotonic() + 10
        while (await service.recommend(user_id="u"))["reason"] is not None:
            assert time.monotonic() < give_up_at
            await asyncio.sleep(0.05)
        assert state_of(service.state.metrics, "redis") == 0
    await server.stop()


async def test_a_deadline_too_short_for_redis_says_nothing_of_it(bundles: Path, tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    settings = quick(Settings(bundles=bundles, redis_url=await server.start()))
    async with running(settings, instant) as service:
        await service.clicks("u", *HISTORY)
        await service.recommend(user_id="u")
        await service.state.redis.client_pause(2_500)
        for _ in range(4):  # one more than failures that open it
            assert (await service.recommend(user_id="u", deadline_ms=50))["reason"] == "history_unavailable"
        assert state_of(service.state.metrics, "redis") == 0
    await server.stop()


async def expect_history_unavailable(service: Service, usual: dict[str, object], within_s: float) -> None:
    """The answer of before, from the cache."""
    start = time.perf_counter()
    answer = await service.recommend(user_id="u", deadline_ms=300)
    assert time.perf_counter() - start < within_s
    assert (answer["source"], answer["reason"]) == ("cache", "history_unavailable")
    assert ids_of(answer) == ids_of(usual)


async def test_a_killed_redis_opens_it_and_its_return_closes_it(bundles: Path, tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    settings = quick(Settings(bundles=bundles, redis_url=await server.start()))
    async with running(settings, instant) as service:
        await service.clicks("u", *HISTORY)
        await kill(server.pid)
        for _ in range(4):
            assert_problem(await service.http.get("/users/u/history"), 503, "history-unavailable")
        assert state_of(service.state.metrics, "redis") == 2
        await server.start()
        await asyncio.sleep(0.31)
        assert await service.history("u") == HISTORY
        assert state_of(service.state.metrics, "redis") == 0
    await server.stop()
