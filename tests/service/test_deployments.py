"""Hot activation and rollback: nothing dropped, nothing half done, the pointer on disk and in the service one."""

import asyncio
import gc
import shutil
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

from semantic_ids.bundle import Bundle, BundleError, activate, current_id, previous_id, publish
from service.app import make_engine
from service.engine.base import EngineError
from service.engine.local import LocalEngine
from service.metrics import Metrics
from service.settings import Settings
from tests.service.engines import InstantEngine, SlowEngine
from tests.service.running import Service, assert_problem, running, until
from tests.service.world import ITEM_IDS, make_parts


class Engines:
    """An engine factory that remembers what it made."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.made: dict[str, InstantEngine] = {}
        self.refuses: str | None = None
        self.may_start: asyncio.Event | None = None

    def __call__(self, bundle: Bundle, _settings: Settings, _metrics: Metrics) -> InstantEngine:
        if bundle.bundle_id == self.refuses:
            return _Refusing(bundle)
        engine = SlowEngine(bundle, self.delay_s) if self.delay_s else InstantEngine(bundle)
        if self.may_start is not None:
            engine = _Waiting(bundle, self.may_start)
        self.made[bundle.bundle_id] = engine
        return engine


class _Waiting(InstantEngine):
    def __init__(self, bundle: Bundle, may_start: asyncio.Event) -> None:
        super().__init__(bundle)
        self.may_start = may_start

    async def start(self) -> None:
        await self.may_start.wait()
        await super().start()


class _Refusing(InstantEngine):
    async def start(self) -> None:
        raise EngineError("no memory")


@pytest.fixture
def two_bundles(bundle: Bundle, tmp_path: Path) -> tuple[Path, str, str]:
    """A folder with the session's bundle, current, and another one; their ids."""
    root = tmp_path / "bundles"
    shutil.copytree(bundle.path, root / bundle.bundle_id)
    other = publish(root, make_parts(tmp_path / "model", weight=0.5), lambda _bundle: None, activate_it=False)
    activate(root, bundle.bundle_id)
    return root, bundle.bundle_id, other.bundle_id


@pytest_asyncio.fixture
async def engines() -> Engines:
    return Engines()


@pytest_asyncio.fixture
async def switching(two_bundles: tuple[Path, str, str], engines: Engines, tmp_path: Path) -> AsyncIterator[Service]:
    settings = Settings(bundles=two_bundles[0], data_dir=tmp_path / "redis", follow_bundles_s=0.05)
    async with running(settings, engines) as service:
        yield service


async def served(service: Service) -> str:
    answer = await service.recommend(history=[ITEM_IDS[0]])
    return str(answer["versions"]["bundle"])


async def test_activation_and_rollback_change_what_is_served_and_the_pointer(
    switching: Service, two_bundles: tuple[Path, str, str], engines: Engines
):
    root, first, second = two_bundles
    assert await served(switching) == first
    response = await switching.post(f"/admin/bundles/{second}/activate", {})
    assert (response.status_code, response.json()) == (200, {"bundle": second, "catalog_epoch": 0})
    assert await served(switching) == second
    assert (current_id(root), previous_id(root)) == (second, first)
    assert (await switching.post("/admin/rollback", {})).json()["bundle"] == first
    assert await served(switching) == first
    assert (current_id(root), previous_id(root)) == (first, second)
    metrics = (await switching.http.get("/metrics")).text
    assert f'sidrec_bundle{{bundle="{first}"}} 1.0' in metrics
    assert f'sidrec_breaker_state{{bundle="{first}",dependency="engine"}} 0.0' in metrics
    await until(lambda: second.encode() not in switching.state.metrics.exposition())


async def test_the_old_engine_stops_when_its_last_request_has_ended(two_bundles: tuple[Path, str, str], tmp_path: Path):
    root, first, second = two_bundles
    engines = Engines(delay_s=0.3)
    async with running(Settings(bundles=root, data_dir=tmp_path / "redis"), engines) as service:
        under_way = [asyncio.ensure_future(served(service)) for _ in range(5)]
        await asyncio.sleep(0.1)
        await service.post(f"/admin/bundles/{second}/activate", {})
        assert engines.made[first].problem is None
        assert await served(service) == second
        assert await asyncio.gather(*under_way) == [first] * 5
        async with asyncio.timeout(2):
            while engines.made[first].problem is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert engines.made[second].problem is None


async def test_no_request_of_a_crowd_is_dropped_by_many_switches(
    switching: Service, two_bundles: tuple[Path, str, str]
):
    _, first, second = two_bundles
    seen: set[str] = set()
    is_over = asyncio.Event()

    async def ask() -> None:
        while not is_over.is_set():
            answer = await switching.recommend(history=[ITEM_IDS[0]])
            await asyncio.sleep(0)  # nothing in such a request waits, so it would never let go
            assert answer["source"] == "model"
            seen.add(answer["versions"]["bundle"])

    crowd = [asyncio.ensure_future(ask()) for _ in range(8)]
    for bundle_id in [second, first] * 5:
        assert (await switching.post(f"/admin/bundles/{bundle_id}/activate", {})).status_code == 200
    is_over.set()
    await asyncio.gather(*crowd)
    assert seen == {first, second}


async def test_switching_on_and_on_leaves_no_process_file_or_mapping(
    two_bundles: tuple[Path, str, str], tmp_path: Path, request: pytest.FixtureRequest
):
    """With the local engine. What the first round opens for good, such as the forkserver, does not count, nor does a
    connection to Redis that comes or goes: something left by each switch would be three more at least. It goes by
    itself: a full collection is rare, and may be hours away.
    """
    root, first, second = two_bundles

    def held() -> tuple[int, int]:
        return len([*Path("/proc/self/fd").iterdir()]), Path("/proc/self/maps").read_text().count(str(root))

    async with running(Settings(bundles=root, data_dir=tmp_path / "redis"), make_engine) as service:
        pids, counts = set[int](), list[tuple[int, int]]()
        for bundle_id in [second, first] * 4:
            assert (await service.post(f"/admin/bundles/{bundle_id}/activate", {})).status_code == 200
            assert await served(service) == bundle_id
            await until(lambda: not service.state.deployments.ending)
            sid = service.state.bundle.catalog.sid(0)
            put = await service.http.put("/items/new", json={"title": f"For {bundle_id}", "sid": sid})
            assert put.status_code == 200, put.text
            engine = service.state.engine
            assert isinstance(engine, LocalEngine)
            assert engine.pid is not None
            await until(lambda engine=engine: {pid for pid in pids if is_alive(pid)} <= {engine.pid})  # type: ignore[misc]
            pids.add(engine.pid)
            counts.append(held())
            if len(counts) == 2:
                gc.collect()
                request.addfinalizer(gc.enable)
                gc.disable()
        assert len(pids) == 8
        least = [min(of_one_kind) for of_one_kind in zip(*counts[2:4], strict=True)]
        # What the last switch holds for a moment goes; what each one leaves does not.
        await until(lambda: all(now <= then + 2 for now, then in zip(held(), least, strict=True)))
    await until(lambda: not any(map(is_alive, pids)))


async def test_what_a_bundle_leaves_in_cycles_is_collected_when_it_goes(
    switching: Service, two_bundles: tuple[Path, str, str], request: pytest.FixtureRequest
):
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    request.addfinalizer(gc.enable)
    gc.disable()
    left = weakref.ref(Cycle())
    assert left() is not None
    activated = await switching.post(f"/admin/bundles/{two_bundles[2]}/activate", {})
    assert activated.status_code == 200, activated.text
    await until(lambda: left() is None)


async def test_what_an_activation_starts_does_not_log_as_its_request(
    switching: Service, two_bundles: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
):
    _, _, second = two_bundles
    activated = await switching.post(f"/admin/bundles/{second}/activate", {}, x_request_id="activation")
    assert activated.status_code == 200, activated.text

    async def no_epoch(_base: object) -> None:
        raise RuntimeError("it is a test")

    monkeypatch.setattr(switching.state.live, "bundle_at_epoch", no_epoch)
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        body = {"title": "New", "sid": switching.state.bundle.catalog.sid(0)}
        put = await switching.http.put("/items/new", json=body, headers={"x-request-id": "put"})
    assert put.status_code == 503, put.text
    failures = [entry for entry in logs if entry["event"] == "epoch_not_served"]
    assert failures
    assert not any("request_id" in entry for entry in failures)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_what_becomes_current_on_disk_is_served_without_a_call(
    switching: Service, two_bundles: tuple[Path, str, str]
):
    root, first, second = two_bundles
    activate(root, second)
    async with asyncio.timeout(5):
        while await served(switching) != second:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    activate(root, first)
    async with asyncio.timeout(5):
        while await served(switching) != first:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_bundle_whose_engine_does_not_start_changes_nothing(
    switching: Service, two_bundles: tuple[Path, str, str], engines: Engines
):
    root, first, second = two_bundles
    engines.refuses = second
    response = await switching.post(f"/admin/bundles/{second}/activate", {})
    assert "no memory" in assert_problem(response, 503, "unavailable")["detail"]
    assert (current_id(root), await served(switching)) == (first, first)
    activate(root, second)  # by the command line: the service tries it once, and serves the old one on
    await asyncio.sleep(0.3)
    assert await served(switching) == first
    sample = switching.state.metrics.registry.get_sample_value
    assert sample("sidrec_bundle_activations_total", {"outcome": "failed"}) == 1


async def test_a_pointer_that_cannot_be_written_changes_nothing(
    switching: Service, two_bundles: tuple[Path, str, str], engines: Engines
):
    root, first, second = two_bundles
    (root / "current").unlink()
    (root / "current").mkdir()
    response = await switching.post(f"/admin/bundles/{second}/activate", {})
    assert "cannot be written" in assert_problem(response, 409, "conflict")["detail"]
    assert await served(switching) == first
    async with asyncio.timeout(2):
        while engines.made[second].problem is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert engines.made[first].problem is None


async def test_a_start_that_its_caller_gave_up_leaves_no_engine(
    switching: Service, two_bundles: tuple[Path, str, str], engines: Engines
):
    root, first, second = two_bundles
    may_start = asyncio.Event()
    engines.may_start = may_start
    activation = asyncio.ensure_future(switching.state.deployments.activate(second))
    async with asyncio.timeout(5):
        while second not in engines.made:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    activation.cancel()
    await asyncio.gather(activation, return_exceptions=True)
    may_start.set()
    async with asyncio.timeout(5):
        while engines.made[second].problem != "stopped":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (current_id(root), await served(switching)) == (first, first)


async def test_a_damaged_or_unknown_bundle_is_refused_by_name(switching: Service, two_bundles: tuple[Path, str, str]):
    root, first, second = two_bundles
    (root / second / "model" / "config.json").write_text("{}")
    response = await switching.post(f"/admin/bundles/{second}/activate", {})
    assert "was changed after publication" in assert_problem(response, 409, "conflict")["detail"]
    response = await switching.post("/admin/bundles/..%2Fother/activate", {})
    assert response.status_code in (404, 409)
    response = await switching.post("/admin/bundles/20200101T000000Z-0123456789ab/activate", {})
    assert_problem(response, 409, "conflict")
    assert await served(switching) == first


async def test_a_rollback_without_a_previous_bundle_says_so(switching: Service, two_bundles: tuple[Path, str, str]):
    with pytest.raises(BundleError, match="nothing was current before"):
        previous_id(two_bundles[0])
    response = await switching.post("/admin/rollback", {})
    assert "nothing was current before" in assert_problem(response, 409, "conflict")["detail"]
