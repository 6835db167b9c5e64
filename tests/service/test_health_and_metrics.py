"""Health, metrics and versions: what operations see."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from semantic_ids.bundle import Bundle, BundleError, publish
from service.app import create_app
from service.engine.base import EngineError
from service.redis_server import EmbeddedRedis
from service.settings import Settings
from tests.service.engines import InstantEngine, UnreadyEngine, failing, instant
from tests.service.running import Service, assert_problem, event, running
from tests.service.world import ITEM_IDS, NUM_ITEMS, make_parts

pytestmark = pytest.mark.asyncio(loop_scope="module")

HISTORY = {"history": list(ITEM_IDS[:3])}


async def samples(service: Service) -> dict[tuple[str, ...], float]:
    """Name and sorted label values → value, through Prometheus' own parser."""
    response = await service.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


@pytest.mark.parametrize("prefix", ["", "/v2"])
async def test_a_running_service_is_live_and_ready(service: Service, prefix: str):
    for what in ("live", "ready"):
        response = await service.http.get(f"{prefix}/health/{what}")
        assert (response.status_code, response.json()) == (200, {"status": what})


async def test_not_ready_says_what_is_missing(bundles: Path, tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    settings = Settings(bundles=bundles, redis_url=await server.start())
    async with running(settings, lambda bundle, _settings, _metrics: UnreadyEngine(bundle)) as service:
        document = assert_problem(await service.http.get("/health/ready"), 503, "not-ready")
        assert document["detail"] == "starting"
        await server.stop()
        response = await service.http.get("/v2/health/ready")
        detail = assert_problem(response, 503, "not-ready")["detail"]
        assert detail == "starting; Redis does not answer (ConnectionError)"
        assert response.headers["retry-after"]
        assert (await service.http.get("/health/live")).status_code == 200


async def test_versions_name_what_is_served(service: Service, bundle: Bundle):
    assert (await service.http.get("/versions")).json() == {
        "service": "0.1.0",
        "engine": "local",
        "bundle": bundle.bundle_id,
        "catalog_epoch": 0,
        "prompt": 1,
        "num_items": NUM_ITEMS,
        "metrics": {"recall@10": 0.125},
        "beside": [],
    }


async def test_metrics_count_every_status_by_route_not_by_path(settings: Settings):
    async with running(settings, instant) as service:
        await service.recommend(**HISTORY)
        await service.recommend(**HISTORY)
        await service.http.get("/recommend")
        await service.post("/recommend", {"num_items": 0})
        await service.http.delete("/users/someone")
        await service.http.get("/users/someone/history")
        await service.http.get("/users/someone-else/history")
        await service.http.get("/nope")
        await service.http.get("/nope-either")
        await service.http.request("BREW", "/rerank")
        found = {
            key[1:]: value for key, value in (await samples(service)).items() if key[0] == "sidrec_http_requests_total"
        }
    assert found == {
        ("POST", "/recommend", "200"): 2,
        ("GET", "/recommend", "200"): 1,
        ("POST", "/recommend", "422"): 1,
        ("DELETE", "/users/{user_id}", "204"): 1,
        ("GET", "/users/{user_id}/history", "200"): 2,
        ("GET", "unmatched", "404"): 2,
        ("other", "/rerank", "405"): 1,
    }


async def test_metrics_count_answers_events_stages_and_failures(bundles: Path, tmp_path: Path):
    server = EmbeddedRedis(tmp_path)
    async with running(Settings(bundles=bundles, redis_url=await server.start()), instant) as service:
        await service.recommend(**HISTORY)
        await service.recommend()
        await service.rerank(candidates=[ITEM_IDS[0]], **HISTORY)
        one = event("u", ITEM_IDS[0])
        await service.record(one, one, event("u", "gone"))
        await server.stop()
        await service.recommend(user_id="u")
        await service.post("/events", {"events": [one]})
        found = await samples(service)
        assert found["sidrec_answers_total", "recommend", "", "model"] == 1
        assert found["sidrec_answers_total", "recommend", "cold_start", "fallback"] == 1
        assert found["sidrec_answers_total", "recommend", "history_unavailable", "fallback"] == 1
        assert found["sidrec_answers_total", "rerank", "", "model"] == 1
        assert {name: found["sidrec_events_total", name] for name in ("accepted", "duplicate", "rejected")} == {
            "accepted": 1,
            "duplicate": 1,
            "rejected": 1,
        }
        assert found["sidrec_history_failures_total",] == 2
        assert found["sidrec_stage_seconds_count", "decode"] == 2
        assert found["sidrec_stage_seconds_count", "history"] == 4
        assert found["sidrec_http_requests_total", "POST", "/events", "503"] == 1
        assert found["sidrec_http_request_seconds_count", "/events"] == 2


async def test_metrics_know_the_bundle_and_the_engine(service: Service, bundle: Bundle):
    before = await samples(service)
    await asyncio.gather(*(service.recommend(**HISTORY) for _ in range(20)))
    after = await samples(service)
    assert after["sidrec_bundle", bundle.bundle_id] == 1
    assert after["sidrec_catalog_epoch",] == 0
    assert after["sidrec_engine_ready",] == 1
    assert after["sidrec_engine_waiting",] == 0
    assert after["sidrec_engine_batch_size_sum",] - before["sidrec_engine_batch_size_sum",] == 20
    assert 2 <= after["sidrec_engine_batch_size_count",] - before["sidrec_engine_batch_size_count",] <= 20
    assert after["sidrec_engine_steps_total",] > before["sidrec_engine_steps_total",]
    assert after["sidrec_engine_beams_total",] > before["sidrec_engine_beams_total",]


async def test_every_metric_has_the_prefix_and_a_help_text(service: Service):
    text = (await service.http.get("/metrics")).text
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("sidrec_")
        assert family.documentation.endswith(".")


async def test_two_applications_in_one_process_count_apart(settings: Settings, tmp_path: Path):
    other = settings.model_copy(update={"data_dir": tmp_path / "other"})
    async with running(settings, instant) as one, running(other, instant) as two:
        await one.recommend(**HISTORY)
        assert ("sidrec_answers_total", "recommend", "", "model") in await samples(one)
        assert ("sidrec_answers_total", "recommend", "", "model") not in await samples(two)


class TestStart:
    """A service that cannot start says why, and leaves nothing running."""

    async def test_no_bundle(self, tmp_path: Path):
        app = create_app(Settings(bundles=tmp_path, data_dir=tmp_path / "redis"))
        with pytest.raises(BundleError, match="no bundle is published"):
            async with app.router.lifespan_context(app):
                pass
        assert isinstance(app.state.startup_error, BundleError)

    async def test_an_engine_whose_canary_fails(self, tmp_path: Path):
        publish(tmp_path, make_parts(tmp_path / "parts", weight=float("nan")), lambda bundle: None)
        app = create_app(Settings(bundles=tmp_path, data_dir=tmp_path / "redis"))
        with pytest.raises(EngineError, match="canary"):
            async with app.router.lifespan_context(app):
                pass
        assert isinstance(app.state.startup_error, EngineError)
        again = EmbeddedRedis(tmp_path / "redis")
        await again.start()
        assert again.is_owner, "the Redis of the failed start was stopped"
        await again.stop()

    async def test_an_engine_that_cannot_start(self, settings: Settings):
        class Broken(InstantEngine):
            stopped = False

            async def start(self) -> None:
                raise EngineError("no such device")

            async def stop(self) -> None:
                Broken.stopped = True

        with pytest.raises(EngineError, match="no such device"):
            async with running(settings, lambda bundle, _settings, _metrics: Broken(bundle)):
                pass
        assert Broken.stopped

    async def test_a_failing_request_does_not_make_the_service_unready(self, settings: Settings):
        async with running(settings, failing()) as service:
            await service.recommend(**HISTORY)
            assert (await service.http.get("/health/ready")).status_code == 200
