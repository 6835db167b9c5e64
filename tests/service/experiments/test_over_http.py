"""Experiments through the whole service: assigned, answered differently, counted, reported, erased."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from service.experiments.config import ExperimentsConfigError
from service.redis_server import EmbeddedRedis
from service.settings import Settings
from tests.service.engines import InstantEngine
from tests.service.running import Service, assert_problem, event, running
from tests.service.world import ITEM_IDS

WIDE = {
    "name": "wide",
    "traffic": [0.0, 1.0],
    "variants": [{"name": "control", "control": True}, {"name": "wide", "overrides": {"beam_width": 77}}],
}


class Recording(InstantEngine):
    """An instant engine that notes how wide each search was to be."""

    def __init__(self, bundle: Any) -> None:
        super().__init__(bundle)
        self.widths: list[int] = []

    async def decode(self, request: Any, on_thought: Any = None) -> Any:
        self.widths.append(request.width)
        return await super().decode(request, on_thought)


def recording(bundle: Any, _settings: Any, _metrics: Any) -> Recording:
    return Recording(bundle)


@pytest_asyncio.fixture
async def redis(tmp_path: Path) -> AsyncIterator[str]:
    server = EmbeddedRedis(tmp_path / "redis")
    yield await server.start()
    await server.stop()


@pytest_asyncio.fixture
async def service(bundles: Path, redis: str) -> AsyncIterator[Service]:
    settings = Settings(bundles=bundles, redis_url=redis, follow_experiments_s=0.05)
    async with running(settings, recording) as running_service:
        yield running_service


async def put(service: Service, experiment: dict[str, Any], layer: str = "default") -> Any:
    return await service.http.put(f"/experiments/{experiment['name']}", params={"layer": layer}, json=experiment)


async def until(service: Service, exposures: int, clicks: int = 0, name: str = "wide") -> dict[str, Any]:
    """The report, once that much has been written."""
    async with asyncio.timeout(10):
        while True:
            report: dict[str, Any] = (await service.http.get(f"/experiments/{name}/report")).json()
            counted = [(one["exposures"], one["clicks"]) for one in report["variants"]]
            if tuple(map(sum, zip(*counted, strict=True))) >= (exposures, clicks):
                return report
            await asyncio.sleep(0.05)


async def test_users_are_assigned_answered_counted_and_reported(service: Service):
    assert (await put(service, WIDE)).status_code == 200
    engine: Any = service.state.engine
    seen: dict[str, set[str]] = {"control": set(), "wide": set()}
    for number in range(40):
        for _ in range(2):
            answer = await service.recommend(user_id=f"u{number}", history=[ITEM_IDS[0]])
            assert answer["experiment"]["name"] == "wide"
            assert engine.widths[-1] == (77 if answer["experiment"]["variant"] == "wide" else 20)
            seen[answer["experiment"]["variant"]].add(f"u{number}")
        await service.record(event(f"u{number}", ITEM_IDS[3], recommendation_id=answer["recommendation_id"]))
    assert len(seen["control"]) > 5
    assert len(seen["wide"]) > 5
    assert not seen["control"] & seen["wide"]  # sticky
    report = await until(service, 80, 40)
    for variant in report["variants"]:
        assert variant["exposures"] == 2 * len(seen[variant["name"]])
        assert variant["clicks"] == len(seen[variant["name"]])
    assert (await service.http.get("/experiments")).json()["layers"][0]["experiments"][0]["name"] == "wide"


async def test_a_repeated_event_counts_once_and_a_strangers_not_at_all(service: Service):
    await put(service, WIDE)
    answer = await service.recommend(user_id="u1", history=[ITEM_IDS[0]])
    click = event("u1", ITEM_IDS[3], recommendation_id=answer["recommendation_id"])
    for _ in range(3):
        await service.record(click)
    await service.record(event("u2", ITEM_IDS[3], recommendation_id=answer["recommendation_id"]))
    await until(service, 1, 1)
    await asyncio.sleep(0.5)
    report = await until(service, 1, 1)
    assert sum(variant["clicks"] for variant in report["variants"]) == 1


@pytest.mark.parametrize("wish", [{"user_id": None}, {"reasoning": "off"}, {"diversity": 0.0}, {"exploration": 0.2}])
async def test_who_is_anonymous_or_has_a_wish_of_its_own_is_in_no_experiment(service: Service, wish: dict[str, Any]):
    await put(service, WIDE)
    answer = await service.recommend(**{"user_id": "u1", "history": [ITEM_IDS[0]]} | wish)
    assert answer["experiment"] is None
    engine: Any = service.state.engine
    assert engine.widths[-1] == 20


async def test_another_replica_follows_and_both_agree_on_every_user(service: Service, bundles: Path, redis: str):
    async with running(Settings(bundles=bundles, redis_url=redis, follow_experiments_s=0.05), recording) as other:
        await put(service, WIDE)
        async with asyncio.timeout(5):
            while not (await other.http.get("/experiments")).json()["layers"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        for number in range(20):
            asked = {"user_id": f"u{number}", "history": [ITEM_IDS[0]]}
            assert (await service.recommend(**asked))["experiment"] == (await other.recommend(**asked))["experiment"]


async def test_an_erased_user_leaves_no_count(service: Service):
    await put(service, WIDE)
    await service.recommend(user_id="u1", history=[ITEM_IDS[0]])
    await until(service, 1)
    units = [key async for key in service.state.redis.scan_iter("sidrec:*:units")]
    assert sum([await service.state.redis.hlen(key) for key in units]) == 1
    assert (await service.http.delete("/users/u1")).status_code == 204
    assert sum([await service.state.redis.hlen(key) for key in units]) == 0


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"variants": [{"name": "control", "control": True}]}, "variants"),
        ({"traffic": [0.5, 0.2]}, ""),
        (
            {"variants": [{"name": "a", "control": True}, {"name": "b", "overrides": {"bundle": "x"}}]},
            "variants.1.overrides.bundle",
        ),
    ],
)
async def test_what_breaks_a_rule_is_refused_by_field(service: Service, change: dict[str, Any], path: str):
    document = assert_problem(await put(service, WIDE | change), 422, "invalid-request")
    assert any(path in error["path"] for error in document["errors"])
    assert (await service.http.get("/experiments")).json() == {"layers": []}


async def test_a_change_that_would_move_users_is_refused(service: Service):
    await put(service, WIDE | {"traffic": [0.0, 0.5]})
    assert (await put(service, WIDE)).status_code == 200  # a ramp
    document = assert_problem(await put(service, WIDE | {"traffic": [0.0, 0.2]}), 422, "invalid-request")
    assert "traffic" in document["errors"][0]["path"]
    assert (await service.http.delete("/experiments/wide")).status_code == 204
    assert_problem(await service.http.delete("/experiments/wide"), 404, "not-found")
    assert_problem(await service.http.get("/experiments/wide/report"), 404, "not-found")


async def test_a_file_decides_and_is_followed(bundles: Path, redis: str, tmp_path: Path):
    path = tmp_path / "experiments.yaml"
    path.write_text(json.dumps({"layers": [{"name": "default", "experiments": [WIDE]}]}))
    settings = Settings(bundles=bundles, redis_url=redis, experiments=path, follow_experiments_s=0.05)
    async with running(settings, recording) as service:
        assert (await service.recommend(user_id="u1", history=[ITEM_IDS[0]]))["experiment"]["name"] == "wide"
        assert "change it there" in assert_problem(await put(service, WIDE), 409, "conflict")["detail"]
        path.write_text("layers: [")  # half written: the old one stays
        await asyncio.sleep(0.2)
        assert (await service.recommend(user_id="u1", history=[ITEM_IDS[0]]))["experiment"]["name"] == "wide"
        path.write_text("layers: []")
        async with asyncio.timeout(5):
            while (await service.recommend(user_id="u1", history=[ITEM_IDS[0]]))["experiment"] is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_a_file_that_is_no_configuration_stops_the_start(bundles: Path, redis: str, tmp_path: Path):
    path = tmp_path / "experiments.yaml"
    path.write_text("layers: 7")
    with pytest.raises(ExperimentsConfigError, match=r"experiments\.yaml"):
        async with running(Settings(bundles=bundles, redis_url=redis, experiments=path), recording):
            pass
