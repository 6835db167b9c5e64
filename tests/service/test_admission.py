"""Who gets in, and what the others are told."""

import asyncio

import pytest

from service.admission import Admission
from service.errors import UnavailableProblem
from service.metrics import Metrics
from service.settings import Settings
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
