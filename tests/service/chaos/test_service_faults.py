"""The service with its embedded Redis: Redis killed, its disk full, a bundle damaged, all of it killed at once."""

import asyncio
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
import structlog

from semantic_ids.bundle import MANIFEST, activate, current_id, publish
from tests.service.chaos.processes import ServiceProcess
from tests.service.chaos.traffic import BENIGN, Traffic, traffic
from tests.service.world import make_parts

log = structlog.get_logger(__name__)
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="/proc, PR_SET_PDEATHSIG and prlimit are Linux'"),
]


@dataclass(frozen=True)
class Scene:
    """A service that runs, on two bundles of which the first is current."""

    service: ServiceProcess
    bundles: Path
    data_dir: Path
    current: str
    other: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder = tmp_path_factory.mktemp("service-faults")
    first = current_id(bundles)
    shutil.copytree(bundles / first, folder / "bundles" / first)
    parts = make_parts(folder / "model", num_hidden_layers=1)
    other = publish(folder / "bundles", parts, lambda _bundle: None, activate_it=False)
    activate(folder / "bundles", first)
    service = ServiceProcess(folder, bundles=folder / "bundles", data_dir=folder / "redis")
    try:
        await service.start()
        yield Scene(service, folder / "bundles", folder / "redis", first, other.bundle_id)
    finally:
        await service.stop()


def only_histories_were_missing(flow: Traffic, since: float) -> Counter[tuple[str, int, str | None]]:
    outage = Counter(flow.seen_since(since))
    assert {reason for _, status, reason in outage if status == 200} <= {*BENIGN, "history_unavailable"}, outage
    assert {reason for _, status, reason in outage if status == 503} <= {"history-unavailable"}, outage
    return outage


async def test_its_redis_killed(scene: Scene):
    async with traffic(scene.service.url, seed=1) as flow:
        await flow.recovery_s(time.monotonic())
        recoveries = []
        for _ in range(2):
            [pid] = scene.service.redis_pids()
            os.kill(pid, signal.SIGKILL)
            killed_at = time.monotonic()
            recoveries.append(await flow.recovery_s(killed_at))
            assert list(scene.service.redis_pids()) != [pid]
            outage = only_histories_were_missing(flow, killed_at)
    log.info("recovered", fault="redis killed", recovery_s=recoveries, meanwhile=dict(outage))


async def test_the_disk_full_for_the_append_only_file(scene: Scene):
    """No process of the service may write a file beyond where the append-only file ends: as on a full disk."""
    async with traffic(scene.service.url, seed=2) as flow:
        await flow.recovery_s(time.monotonic())
        [pid] = scene.service.redis_pids()
        full_at = sum(path.stat().st_size for path in scene.data_dir.rglob("*.aof")) + 100
        unlimited = resource.prlimit(scene.service.pid, resource.RLIMIT_FSIZE)
        for one in (scene.service.pid, pid):  # the service's is that of every server it starts
            resource.prlimit(one, resource.RLIMIT_FSIZE, (full_at, unlimited[1]))
        await asyncio.sleep(0.5)
        full_since, num_acknowledged = time.monotonic(), flow.num_acknowledged
        await asyncio.sleep(3)
        outage = only_histories_were_missing(flow, full_since)
        assert outage["events", 503, "history-unavailable"] > 20
        assert flow.num_acknowledged == num_acknowledged, "what cannot be written is not acknowledged"
        resource.prlimit(scene.service.pid, resource.RLIMIT_FSIZE, unlimited)
        freed_at = time.monotonic()
        for one in scene.service.redis_pids():
            resource.prlimit(one, resource.RLIMIT_FSIZE, unlimited)
        recovery_s = await flow.recovery_s(freed_at)
    log.info("recovered", fault="disk full", recovery_s=recovery_s, meanwhile=dict(outage))


async def test_killed_with_events_in_flight(scene: Scene):
    async with traffic(scene.service.url, seed=3, num_users=12, pause_s=0.02) as flow:
        await flow.recovery_s(time.monotonic())
        flow.may_lose_connections = True
        await scene.service.kill()
        killed_at = time.monotonic()
        assert flow.num_acknowledged > 30
        start_s = await scene.service.start()
        ready_at = time.monotonic()
        recovery_s = await flow.recovery_s(ready_at)
        lost = sum(one.status == 0 for one in flow.outcomes)
        assert lost > 0
        assert Counter(flow.seen_since(killed_at))["events", 200, None] > 0
    log.info("recovered", fault="service killed", recovery_s=recovery_s, start_s=start_s, num_lost=lost)


async def test_a_bundle_damaged_on_disk_is_not_activated(scene: Scene):
    """Whatever of it is damaged: a 409, the old one is served on, `current` stays; and so after a restart."""
    damaged = scene.bundles / scene.other
    whole = scene.bundles.parent / "whole"
    shutil.copytree(damaged, whole)
    catalogue = max((damaged / "catalog").iterdir(), key=lambda path: path.stat().st_size)
    pointers = {path.name: path.read_bytes() for path in scene.bundles.iterdir() if path.is_file()}
    async with (
        traffic(scene.service.url, seed=4) as flow,
        httpx.AsyncClient(base_url=scene.service.url, timeout=60) as http,
    ):
        await flow.recovery_s(time.monotonic())
        begun_at = time.monotonic()
        for path, how in (
            (damaged / "model" / "model.safetensors", flip),
            (catalogue, flip),
            (catalogue, cut),
            (damaged / MANIFEST, flip),
            (damaged / MANIFEST, cut),
            (damaged / "model" / "config.json", Path.unlink),
        ):
            how(path)
            response = await http.post(f"/admin/bundles/{scene.other}/activate")
            assert response.status_code == 409, (path, response.text)
            assert response.headers["content-type"] == "application/problem+json"
            assert scene.other in response.json()["detail"]
            assert (await http.get("/versions")).json()["bundle"] == scene.current
            assert {name: (scene.bundles / name).read_bytes() for name in pointers} == pointers
            assert current_id(scene.bundles) == scene.current
            await asyncio.to_thread(shutil.copytree, whole, damaged, dirs_exist_ok=True)
        flip(catalogue)
        assert all(one.is_good for one in flow.outcomes if one.ended_at > begun_at)

        flow.may_lose_connections = True
        await scene.service.stop()
        await scene.service.start()
        await flow.recovery_s(time.monotonic())
        assert (await http.get("/versions")).json()["bundle"] == scene.current
        shutil.copytree(whole, damaged, dirs_exist_ok=True)
        response = await http.post(f"/admin/bundles/{scene.other}/activate")
        assert (response.status_code, response.json()["bundle"]) == (200, scene.other)
        await flow.recovery_s(time.monotonic())


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """The last byte is missing."""
    path.write_bytes(path.read_bytes()[:-1])
