"""Who gets in, and what the others are told."""

import asyncio
import time
from contextlib import ExitStack

import pytest

from semantic_ids.bundle import Bundle
from service.admission import Admission, EngineLine, Place
from service.background import ended
from service.engine.base import DecodeRequest, DecodeResult, ThoughtListener
from service.errors import UnavailableProblem
from service.metrics import Metrics
from service.settings import Settings
from service.turns import Turns
from tests.service.engines import SlowEngine, failing, slow
from tests.service.running import assert_problem, event, running, until
from tests.service.world import ITEM_IDS

BODY = {"history": list(ITEM_IDS[:3]), "deadline_ms": 60_000}


def test_slots_are_limited_and_come_back():
    metrics = Metrics()
    admission = Admission(2, metrics)
    for _ in range(3):
        with admission.slot(), admission.slot():
            assert metrics.registry.get_sample_value("sidrec_http_in_flight") == 2
            with pytest.raises(UnavailableProblem, match="2 requests are being answered"), admission.slot():
                pass
        assert metrics.registry.get_sample_value("sidrec_http_in_flight") == 0
    assert metrics.registry.get_sample_value("sidrec_shed_total", {"reason": "overload"}) == 3


def test_a_slot_comes_back_from_a_failure():
    admission = Admission(1, Metrics())
    for _ in range(3):
        with pytest.raises(RuntimeError, match="on purpose"), admission.slot():
            raise RuntimeError("on purpose")


async def test_requests_over_the_limit_are_shed_at_once_and_the_others_answered(settings: Settings):
    async with running(settings.model_copy(update={"max_in_flight": 3}), slow(0.3)) as service:
        responses = await asyncio.gather(*(service.post("/recommend", BODY) for _ in range(10)))
        shed = [response for response in responses if response.status_code != 200]
        assert len(shed) == 7
        for response in shed:
            assert_problem(response, 503, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
        assert (await service.post("/recommend", BODY)).status_code == 200, "the slots are free again"


async def test_the_limit_covers_every_kind_of_work_but_not_operations(settings: Settings):
    async with running(settings.model_copy(update={"max_in_flight": 1}), slow(0.5)) as service:
        held = asyncio.ensure_future(service.post("/recommend", BODY))
        engine = service.state.engine
        assert isinstance(engine, SlowEngine)
        await until(lambda: engine.num_waiting == 1)
        for response in (
            await service.post("/rerank", {"candidates": [ITEM_IDS[0]]}),
            await service.post("/events", {"events": [event("u", ITEM_IDS[0])]}),
            await service.http.get("/recommend"),
        ):
            assert_problem(response, 503, "overloaded")
        for path in ("/health/live", "/health/ready", "/metrics", "/versions"):
            assert (await service.http.get(path)).status_code == 200
        assert (await held).status_code == 200


async def test_failed_and_cancelled_requests_give_their_slots_back(settings: Settings):
    one_slot = settings.model_copy(update={"max_in_flight": 1})
    async with running(one_slot, failing(RuntimeError("on purpose"))) as service:
        for _ in range(3):
            assert (await service.post("/recommend", BODY)).status_code == 500
            assert (await service.post("/recommend", {"num_items": 0})).status_code == 422
        assert (await service.recommend())["reason"] == "cold_start"

    async with running(one_slot, slow(30)) as service:
        for _ in range(3):
            waiting = asyncio.ensure_future(service.post("/recommend", BODY))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert (await service.recommend())["reason"] == "cold_start"
        assert service.state.metrics.registry.get_sample_value("sidrec_http_in_flight") == 0


def test_the_limit_falls_while_the_event_loop_lags_and_comes_back():
    metrics = Metrics()
    admission = Admission(256, metrics)
    for _ in range(20):
        admission.adapt(0.1)
    assert metrics.registry.get_sample_value("sidrec_http_in_flight_limit") == 64
    assert metrics.registry.get_sample_value("sidrec_event_loop_lag_seconds_sum") == pytest.approx(2.0)
    with ExitStack() as held:
        for _ in range(64):
            held.enter_context(admission.slot())
        with pytest.raises(UnavailableProblem):
            admission.check()
        admission.adapt(0.0)
        admission.check()
    for _ in range(200):
        admission.adapt(0.0)
    with ExitStack() as held:
        for _ in range(256):
            held.enter_context(admission.slot())
        with pytest.raises(UnavailableProblem, match="256 requests"):
            admission.check()
    assert metrics.registry.get_sample_value("sidrec_http_in_flight_limit") == 256


async def test_a_crowd_that_waits_for_its_turn_counts_as_lag():
    """Where turns keep every round short the loop itself is in time, however much there is to do."""
    metrics, turns = Metrics(), Turns(per_round=1)

    async def work() -> None:
        await turns.take(time.perf_counter())
        time.sleep(0.001)  # noqa: ASYNC251 - what costs the loop's time

    watch = asyncio.create_task(Admission(256, metrics).watch(turns))
    await asyncio.gather(*(work() for _ in range(100)))
    await until(lambda: metrics.registry.get_sample_value("sidrec_event_loop_lag_seconds_count") != 0)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    limit = metrics.registry.get_sample_value("sidrec_http_in_flight_limit")
    assert limit is not None
    assert limit < 256


async def test_idle_is_a_service_that_has_answered_nobody_for_a_while(monkeypatch):
    metrics, calls = Metrics(), list[None]()
    admission = Admission(256, metrics)

    def num_beats() -> float:
        return metrics.registry.get_sample_value("sidrec_event_loop_lag_seconds_count") or 0

    async def more_beats() -> None:
        enough = num_beats() + 3
        await until(lambda: num_beats() >= enough)

    with admission.slot():
        pass
    monkeypatch.setattr("service.admission._IDLE_S", 3_600)
    watch = asyncio.create_task(admission.watch(Turns(), when_idle=lambda: calls.append(None)))
    await more_beats()
    assert len(calls) == 0  # it has just answered
    monkeypatch.setattr("service.admission._IDLE_S", 0)
    await until(lambda: len(calls) > 0)
    with admission.slot():
        before = len(calls)
        await more_beats()
        assert len(calls) == before
    await ended(watch)


class Clock:
    """Time that stands until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class BatchedEngine:
    """Ten requests in 100 ms, whoever waits together; a line of its own, and a clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.line = EngineLine(self.metrics, "a bundle", self.clock)
        self.waiting: list[tuple[ExitStack, Place, float]] = []
        self.took: list[tuple[float, float]] = []  # what it took, and what it could have

    def arrive(self, deadline_s: float = 1.0) -> bool:
        """Whether a request is let in."""
        stack = ExitStack()
        try:
            place = stack.enter_context(self.line.place(deadline_s))
        except UnavailableProblem as problem:
            assert int(problem.headers["Retry-After"]) >= 1
            return False
        self.waiting.append((stack, place, deadline_s))
        return True

    def run_batch(self) -> None:
        """Answer the ten that came first."""
        batch, self.waiting = self.waiting[:10], self.waiting[10:]
        self.clock.now += 0.1
        for stack, place, deadline_s in batch:
            self.took.append((self.clock.now - place.since, deadline_s))
            place.answered()
            stack.close()

    def load(self, per_batch: int, batches: int) -> int:
        """How many are shed of so many arrivals for each batch."""
        shed = 0
        for _ in range(batches):
            shed += sum(not self.arrive() for _ in range(per_batch))
            self.run_batch()
        return shed


def test_below_capacity_nobody_is_shed():
    engine = BatchedEngine()
    assert engine.load(per_batch=8, batches=200) == 0


def test_over_capacity_the_excess_is_shed_and_whoever_is_let_in_is_in_time():
    engine = BatchedEngine()
    shed = engine.load(per_batch=20, batches=200)
    assert 0.4 < shed / 4000 < 0.55
    assert all(took <= deadline_s for took, deadline_s in engine.took)
    assert engine.metrics.registry.get_sample_value("sidrec_shed_total", {"reason": "predicted_wait"}) == shed
    standing = sorted(took for took, _ in engine.took[len(engine.took) // 2 :])
    assert standing[len(standing) // 2] < 0.65, "a standing queue is kept to half of the deadline"


def test_it_recovers_as_soon_as_the_line_is_short():
    engine = BatchedEngine()
    engine.load(per_batch=40, batches=100)
    while engine.waiting:
        engine.run_batch()
    assert engine.load(per_batch=8, batches=50) == 0


def test_a_burst_is_absorbed():
    engine = BatchedEngine()
    engine.load(per_batch=5, batches=50)
    assert sum(engine.arrive() for _ in range(40)) == 40
    while engine.waiting:
        engine.run_batch()
    assert all(took <= deadline_s for took, deadline_s in engine.took)


def test_who_allows_more_time_may_wait_longer():
    engine = BatchedEngine()
    engine.load(per_batch=30, batches=100)
    while engine.arrive(1.0):
        pass
    assert engine.arrive(10.0)
    assert not engine.arrive(0.2)


def test_who_finds_the_line_empty_is_let_in_whatever_was_learnt():
    engine = BatchedEngine()
    with engine.line.place(60.0) as place:
        engine.clock.now += 50.0
        place.answered()
    assert engine.arrive(0.01)


def test_a_thought_of_ones_own_is_no_wait():
    engine = BatchedEngine()
    with engine.line.place(60.0) as place:
        engine.clock.now += 5.1
        place.answered(thought_s=5.0)
    assert engine.line.predicted_s() == pytest.approx(0.1)


def test_places_are_given_back_once():
    engine = BatchedEngine()
    with engine.line.place(1.0) as place:
        place.answered()
        assert engine.line.num_ahead == 0
    with pytest.raises(RuntimeError), engine.line.place(1.0):
        raise RuntimeError
    with engine.line.place(1.0) as place:
        place.was_late()
    assert engine.line.num_ahead == 0


class OneAtATime(SlowEngine):
    """The slow engine, for one request after the other."""

    def __init__(self, bundle: Bundle, delay_s: float) -> None:
        super().__init__(bundle, delay_s)
        self.turn = asyncio.Semaphore(1)

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """When it is its turn."""
        async with self.turn:
            return await super().decode(request, on_thought)


async def test_requests_that_would_be_late_are_shed_at_once_and_the_others_are_in_time(settings: Settings):
    """One request at a time, 50 ms each: of 60 at once about ten can be answered within half a second."""
    body = {**BODY, "deadline_ms": 500}
    async with running(settings, lambda bundle, _settings, _metrics: OneAtATime(bundle, 0.05)) as service:
        for _ in range(5):
            assert (await service.post("/recommend", body)).status_code == 200
        await asyncio.gather(*(service.post("/recommend", BODY) for _ in range(12)))

        async def timed() -> tuple[int, float, dict[str, object]]:
            start = time.perf_counter()
            response = await service.post("/recommend", body)
            if response.status_code == 503:
                assert_problem(response, 503, "overloaded")
                assert int(response.headers["retry-after"]) >= 1
            return response.status_code, time.perf_counter() - start, response.json()

        outcomes = await asyncio.gather(*(timed() for _ in range(60)))
        answered = [answer for status, _, answer in outcomes if status == 200]
        assert 3 <= sum(answer["reason"] is None for answer in answered) <= 10
        assert len(answered) < 30
        assert max(seconds for _, seconds, _ in outcomes) < 0.8
        engine = {"dependency": "engine", "bundle": service.state.bundle.bundle_id}
        assert service.state.metrics.registry.get_sample_value("sidrec_breaker_state", engine) == 0
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert (await service.http.get(path)).status_code == 200
        assert (await service.recommend(history=BODY["history"]))["reason"] is None


async def test_what_would_be_late_is_refused_before_its_body_is_validated(settings: Settings):
    """What is wrong with these bodies is only said to those that could be answered in time, or need no engine."""
    wrong = {"history": BODY["history"], "num_items": 0}
    async with running(settings, lambda bundle, _settings, _metrics: OneAtATime(bundle, 0.05)) as service:
        assert_problem(await service.post("/recommend", {**wrong, "deadline_ms": 500}), 422, "invalid-request")
        held = [asyncio.ensure_future(service.post("/recommend", BODY)) for _ in range(40)]
        waits = {"bundle": service.state.bundle.bundle_id}
        sample = service.state.metrics.registry.get_sample_value
        await until(lambda: (sample("sidrec_predicted_wait_seconds", waits) or 0) > 0.8)
        for path, body in (("/recommend", wrong), ("/rerank", {"history": BODY["history"], "candidates": []})):
            assert_problem(await service.post(path, {**body, "deadline_ms": 500}), 503, "overloaded")
            assert_problem(await service.post(path, body, x_deadline_ms="500"), 503, "overloaded")
            assert_problem(await service.post(path, {**body, "deadline_ms": 60_000}), 422, "invalid-request")
            assert_problem(await service.post(path, {**body, "deadline_ms": "soon"}), 422, "invalid-request")
        assert_problem(await service.post("/recommend", {"num_items": 0, "deadline_ms": 500}), 422, "invalid-request")
        for task in held:
            assert (await task).status_code == 200
