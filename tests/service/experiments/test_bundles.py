"""Two bundles side by side for an experiment: who is answered from which, and what happens when they come and go."""

import asyncio
import shutil
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from semantic_ids.bundle import Bundle, activate, publish
from service.app import make_engine
from service.engine.base import DecodeRequest, DecodeResult, Engine, EngineUnavailableError, ThoughtListener
from service.errors import UnavailableProblem
from service.metrics import Metrics
from service.recommender import Recommender
from service.settings import Settings
from tests.service.engines import FailingEngine, InstantEngine, SlowEngine
from tests.service.running import Service, assert_problem, event, running
from tests.service.running import until as until_true
from tests.service.world import ITEM_IDS, ITEMS, ids_of, make_parts, scores_of

HISTORY = list(ITEM_IDS[:3])
ONLY_THERE = "only in the second bundle"
MISSING = "20200101T000000Z-0123456789ab"


class Backwards(InstantEngine):
    """Answers at once: the last eligible items by rank."""

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """The others' order, reversed, and cut to what was asked for."""
        whole = await super().decode(replace(request, width=request.item_filter.num_items))
        return DecodeResult(whole.ranks[::-1][: request.width], whole.scores[: request.width])


class Engines:
    """An engine factory: `make` by bundle, an instant engine for others; it remembers what it made, and when."""

    def __init__(self) -> None:
        self.make: dict[str, Callable[[Bundle], Engine]] = {}
        self.made: dict[str, list[Any]] = defaultdict(list)

    def __call__(self, bundle: Bundle, _settings: Settings, _metrics: Metrics) -> Engine:
        engine = self.make.get(bundle.bundle_id, InstantEngine)(bundle)
        self.made[bundle.bundle_id].append(engine)
        return engine


class World:
    """A folder with two bundles, the first current; the second has another model, and another first item."""

    def __init__(self, root: Path, first: str, second: str) -> None:
        self.root = root
        self.first = first
        self.second = second


@pytest.fixture(scope="module")
def published(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("pair")
    root = folder / "bundles"
    shutil.copytree(bundle.path, root / bundle.bundle_id)
    items = [*ITEMS[:-1], replace(ITEMS[-1], item_id=ONLY_THERE)]
    parts = make_parts(folder / "model", items=items, hidden_size=48)
    second = publish(root, parts, lambda _bundle: None, activate_it=False)
    activate(root, bundle.bundle_id)
    return World(root, bundle.bundle_id, second.bundle_id)


@pytest.fixture
def world(published: World, tmp_path: Path) -> World:
    """A copy of it, to be damaged."""
    shutil.copytree(published.root, tmp_path / "bundles")
    return World(tmp_path / "bundles", published.first, published.second)


@pytest_asyncio.fixture
async def engines(world: World) -> Engines:
    found = Engines()
    found.make[world.second] = Backwards
    return found


@pytest.fixture
def settings(world: World, tmp_path: Path) -> Settings:
    return Settings(bundles=world.root, data_dir=tmp_path / "redis", follow_bundles_s=0.05, follow_experiments_s=0.05)


@pytest_asyncio.fixture
async def service(settings: Settings, engines: Engines) -> AsyncIterator[Service]:
    async with running(settings, engines) as running_service:
        yield running_service


def experiment(new: str | dict[str, Any], control: str | None = None, **more: Any) -> dict[str, Any]:
    """`new` against the current bundle, or against `control`."""
    overrides = {"bundle": new} if isinstance(new, str) else new
    return {
        "name": "models",
        "traffic": [0.0, 1.0],
        "variants": [
            {"name": "control", "control": True, "overrides": {} if control is None else {"bundle": control}},
            {"name": "new", "overrides": overrides},
        ],
        **more,
    }


async def put(service: Service, content: dict[str, Any], layer: str = "default") -> None:
    response = await service.http.put(f"/experiments/{content['name']}", params={"layer": layer}, json=content)
    assert response.status_code == 200, response.text


async def waiting_for(service: Service, name: str = "models") -> str | None:
    layers = (await service.http.get("/experiments")).json()["layers"]
    (found,) = [one["waiting_for"] for layer in layers for one in layer["experiments"] if one["name"] == name]
    return None if found is None else str(found)


async def eventually(condition: Callable[[], Awaitable[bool]], within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)


async def in_force(service: Service) -> None:
    async def is_in_force() -> bool:
        return await waiting_for(service) is None

    await eventually(is_in_force)


async def begin(service: Service, content: dict[str, Any]) -> dict[str, str]:
    """Put the experiment, wait until it is in force, and name one user of each variant."""
    await put(service, content)
    await in_force(service)
    users: dict[str, str] = {}
    for number in range(100):
        answer = await service.recommend(user_id=f"probe{number}", history=HISTORY)
        users.setdefault(answer["experiment"]["variant"], f"probe{number}")
        if len(users) == 2:
            break
    return users


async def versions(service: Service) -> dict[str, Any]:
    answer: dict[str, Any] = (await service.http.get("/versions")).json()
    return answer


def sample(service: Service, name: str, **labels: str) -> float | None:
    return service.state.metrics.registry.get_sample_value(name, labels)


async def test_every_user_is_answered_from_the_bundle_of_its_variant_and_stays(settings: Settings, world: World):
    """With the real engines: the answers are those that each bundle gives alone."""
    asked = {"history": HISTORY, "num_items": 8}
    alone = {}
    for bundle_id in (world.second, world.first):
        activate(world.root, bundle_id)
        async with running(settings, make_engine) as service:
            alone[bundle_id] = (
                await service.recommend(**asked),
                await service.rerank(history=HISTORY, candidates=list(ITEM_IDS[5:25])),
            )
    assert ids_of(alone[world.first][0]) != ids_of(alone[world.second][0])
    async with running(settings, make_engine) as service:
        await put(service, experiment(world.second))
        await in_force(service)
        seen: Counter[str] = Counter()
        for number in range(30):
            user_id = f"u{number}"
            answer = await service.recommend(user_id=user_id, **asked)
            variant = answer["experiment"]["variant"]
            bundle_id = world.second if variant == "new" else world.first
            reranked = await service.rerank(user_id=user_id, history=HISTORY, candidates=list(ITEM_IDS[5:25]))
            for one, other in ((answer, alone[bundle_id][0]), (reranked, alone[bundle_id][1])):
                assert one["experiment"] == {"name": "models", "variant": variant}
                assert one["versions"]["bundle"] == bundle_id
                assert ids_of(one) == ids_of(other)
                assert scores_of(one) == pytest.approx(scores_of(other), abs=1e-4)
            seen[variant] += 1
        assert min(seen["control"], seen["new"]) > 3
        (beside,) = (await versions(service))["beside"]
        assert (beside["bundle"], beside["role"], beside["is_ready"]) == (world.second, "experiment", True)
        assert sample(service, "sidrec_bundle_beside", bundle=world.second) == 1

        async def are_counted() -> bool:
            report = (await service.http.get("/experiments/models/report")).json()
            return {one["name"]: one["exposures"] for one in report["variants"]} == {
                variant: 2 * count for variant, count in seen.items()
            }

        await eventually(are_counted)


async def test_nobody_is_assigned_before_the_bundle_is_served_so_the_split_is_as_planned(
    service: Service, world: World, engines: Engines
):
    """The engine starts only when it is let: until then neither arm has anybody, however many ask."""
    may_start = asyncio.Event()

    class Waiting(Backwards):
        async def start(self) -> None:
            await may_start.wait()
            await super().start()

    engines.make[world.second] = Waiting
    await put(service, experiment(world.second))
    await until_true(lambda: bool(engines.made[world.second]))
    for number in range(200):
        answer = await service.recommend(user_id=f"u{number}", history=HISTORY)
        assert (answer["experiment"], answer["versions"]["bundle"]) == (None, world.first)
    assert await waiting_for(service) == f"bundle {world.second} is not served here yet"
    assert sample(service, "sidrec_experiment_waits", experiment="models") == 1
    may_start.set()
    await in_force(service)
    assert sample(service, "sidrec_experiment_waits", experiment="models") is None
    for number in range(600):
        answer = await service.recommend(user_id=f"u{number}", history=HISTORY)
        assert (answer["versions"]["bundle"] == world.second) == (answer["experiment"]["variant"] == "new")

    async def all_are_counted() -> bool:
        report = (await service.http.get("/experiments/models/report")).json()
        return sum(one["exposures"] for one in report["variants"]) == 600 and not report["warnings"]

    await eventually(all_are_counted)


async def test_the_bundle_of_an_arm_becomes_current_at_once_and_back(service: Service, world: World, engines: Engines):
    users = await begin(service, experiment(world.second, control=world.first))
    for activated, other in ((world.second, world.first), (world.first, world.second)) * 3:
        response = await service.post(f"/admin/bundles/{activated}/activate", {})
        assert response.json()["bundle"] == activated
        assert (await service.recommend(history=HISTORY))["versions"]["bundle"] == activated
        assert [one["bundle"] for one in (await versions(service))["beside"]] == [other]
        for variant, bundle_id in (("control", world.first), ("new", world.second)):
            answer = await service.recommend(user_id=users[variant], history=HISTORY)
            assert (answer["experiment"]["variant"], answer["versions"]["bundle"]) == (variant, bundle_id)
    assert [len(engines.made[one]) for one in (world.first, world.second)] == [1, 1]
    activate(world.root, world.second)  # by the command line
    await until_true(lambda: service.state.bundle.bundle_id == world.second)
    assert [len(engines.made[one]) for one in (world.first, world.second)] == [1, 1]


async def test_an_activation_and_an_experiment_wait_for_one_engine(service: Service, world: World, engines: Engines):
    may_start = asyncio.Event()

    class Waiting(Backwards):
        async def start(self) -> None:
            await may_start.wait()
            await super().start()

    engines.make[world.second] = Waiting
    await put(service, experiment(world.second))
    await until_true(lambda: bool(engines.made[world.second]))
    activation = asyncio.ensure_future(service.post(f"/admin/bundles/{world.second}/activate", {}))
    await asyncio.sleep(0.1)
    may_start.set()
    assert (await activation).status_code == 200
    await in_force(service)
    assert len(engines.made[world.second]) == 1


async def test_an_experiment_that_stops_lets_its_engine_go_when_its_requests_have_ended(
    service: Service, world: World, engines: Engines
):
    engines.make[world.second] = lambda bundle: SlowEngine(bundle, 0.4)
    users = await begin(service, experiment(world.second))
    (engine,) = engines.made[world.second]
    under_way = [asyncio.ensure_future(service.recommend(user_id=users["new"], history=HISTORY)) for _ in range(5)]
    await until_true(lambda: engine.num_waiting == 5)
    await put(service, experiment(world.second, status="stopped"))
    assert (await service.recommend(user_id=users["new"], history=HISTORY))["versions"]["bundle"] == world.first
    await until_true(lambda: not service.state.deployments.served[1:])
    assert [(one["bundle"], one["role"]) for one in (await versions(service))["beside"]] == [(world.second, "ending")]
    assert engine.problem is None
    answers = await asyncio.gather(*under_way)
    assert {(answer["source"], answer["versions"]["bundle"]) for answer in answers} == {("model", world.second)}
    await until_true(lambda: engine.problem == "stopped")
    assert (await versions(service))["beside"] == []
    assert sample(service, "sidrec_bundle_beside", bundle=world.second) is None


def damage(path: Path) -> Callable[[], None]:
    """A changed file; call what is returned to repair it."""
    file = path / "model" / "config.json"
    content = file.read_bytes()
    file.write_text("{}")

    def repair() -> None:
        file.write_bytes(content)

    return repair


def remove(path: Path) -> Callable[[], None]:
    """A bundle that is not there yet."""
    elsewhere = path.parent / ".elsewhere"
    path.rename(elsewhere)

    def repair() -> None:
        elsewhere.rename(path)

    return repair


@pytest.mark.parametrize(
    ("spoil", "why"), [(damage, "was changed after publication"), (remove, "manifest.json cannot be read")]
)
async def test_a_bundle_that_cannot_be_served_is_waited_for(
    service: Service, world: World, spoil: Callable[[Path], Callable[[], None]], why: str
):
    repair = spoil(world.root / world.second)
    await put(service, experiment(world.second))

    async def says_why() -> bool:
        return why in (await waiting_for(service) or "")

    await eventually(says_why)
    for number in range(20):
        answer = await service.recommend(user_id=f"u{number}", history=HISTORY)
        assert (answer["experiment"], answer["source"], answer["degraded"]) == (None, "model", False)
    assert (sample(service, "sidrec_bundle_activations_total", outcome="failed") or 0) >= 1
    assert (await service.http.get("/health/ready")).status_code == 200
    repair()
    await in_force(service)
    bundles = {
        (await service.recommend(user_id=f"u{number}", history=HISTORY))["versions"]["bundle"] for number in range(20)
    }
    assert bundles == {world.first, world.second}


async def test_the_pause_between_tries_grows(service: Service, world: World):
    await put(service, experiment(MISSING))
    await asyncio.sleep(1.2)  # 0.05, 0.1, 0.2, 0.4: four pauses
    assert 2 <= (sample(service, "sidrec_bundle_activations_total", outcome="failed") or 0) <= 6
    await service.http.delete("/experiments/models")
    assert (await service.recommend(history=HISTORY))["source"] == "model"


async def test_an_arm_whose_engine_dies_degrades_and_is_counted_there(service: Service, world: World, engines: Engines):
    engines.make[world.second] = lambda bundle: FailingEngine(bundle, EngineUnavailableError("it is a test"))
    users = await begin(service, experiment(world.second))
    answer = await service.recommend(user_id=users["new"], history=HISTORY)
    assert (answer["reason"], answer["versions"]["bundle"]) == ("engine_unavailable", world.second)
    assert answer["experiment"]["variant"] == "new"
    assert not (await service.recommend(user_id=users["control"], history=HISTORY))["degraded"]


async def test_each_engine_has_its_own_breaker_and_line_which_go_with_it(
    service: Service, world: World, engines: Engines
):
    """The arm's engine fails until its breaker opens, and is stopped, and made anew."""

    def breaker(bundle_id: str) -> float | None:
        return sample(service, "sidrec_breaker_state", dependency="engine", bundle=bundle_id)

    def predicted_s(bundle_id: str) -> float | None:
        return sample(service, "sidrec_predicted_wait_seconds", bundle=bundle_id)

    engines.make[world.second] = lambda bundle: FailingEngine(bundle, EngineUnavailableError("it is a test"))
    users = await begin(service, experiment(world.second))
    for _ in range(5):
        await service.recommend(user_id=users["new"], history=HISTORY)
    assert (breaker(world.first), breaker(world.second)) == (0, 2)
    assert (predicted_s(world.first) or 0) > 0
    assert predicted_s(world.second) == 0, "it has answered nobody"
    await put(service, experiment(world.second, status="stopped"))
    await until_true(lambda: breaker(world.second) is None and predicted_s(world.second) is None)
    assert breaker(world.first) == 0
    engines.make[world.second] = Backwards
    await put(service, experiment(world.second) | {"name": "again"})
    await until_true(lambda: breaker(world.second) == 0)


async def test_with_bundles_side_by_side_nobody_is_refused_before_it_is_known_which_one_answers(
    service: Service, world: World, monkeypatch: pytest.MonkeyPatch
):
    """A body that is wrong tells which came first: the engine's line, or validation."""

    def is_full(_recommender: Recommender, _left_s: float) -> None:
        raise UnavailableProblem("on purpose", kind="overloaded")

    monkeypatch.setattr(Recommender, "refuse_late", is_full)
    wrong = {"history": HISTORY, "num_items": 0}
    assert_problem(await service.post("/recommend", wrong), 503, "overloaded")
    await begin(service, experiment(world.second))
    assert_problem(await service.post("/recommend", wrong), 422, "invalid-request")


async def test_an_item_is_put_and_deleted_in_both_arms(service: Service, world: World):
    users = await begin(service, experiment(world.second))

    async def shown(variant: str, item_id: str) -> list[str]:
        asked = {"user_id": users[variant], "history": HISTORY, "filter": {"include_items": [item_id]}}
        answer = await service.recommend(**asked)
        assert answer["experiment"]["variant"] == variant
        return ids_of(answer)

    body = {"title": "New", "categories": [], "sid": "<a_0><b_7><c_15>"}
    for _ in range(3):
        response = await service.http.put("/items/new", json=body)
        assert response.status_code == 200, response.text
        assert [await shown(variant, "new") for variant in users] == [["new"], ["new"]]
        assert (await service.http.delete("/items/new")).status_code == 200
        assert [await shown(variant, "new") for variant in users] == [[], []]
    (beside,) = (await versions(service))["beside"]
    assert beside["catalog_epoch"] == (await versions(service))["catalog_epoch"] == 6


@pytest.mark.parametrize("held", ["start", "use_catalog"])
async def test_a_deletion_while_an_arm_starts_holds_from_its_first_answer(
    service: Service, world: World, engines: Engines, held: str
):
    """The engine waits before its canary, or before it takes the epoch that it is brought to."""
    may_go, waits = asyncio.Event(), asyncio.Event()

    class Waiting(Backwards):
        async def start(self) -> None:
            await self._wait("start")
            await super().start()

        async def use_catalog(self, bundle: Bundle) -> None:
            await self._wait("use_catalog")

        async def _wait(self, where: str) -> None:
            if where == held:
                waits.set()
                await may_go.wait()

    async def change(item_id: str) -> None:
        body = {"title": "New", "categories": [], "sid": "<a_0><b_7><c_15>"}
        assert (await service.http.put(f"/items/{item_id}", json=body)).status_code == 200

    engines.make[world.second] = Waiting
    deleted = ITEM_IDS[60]
    await change("before")
    await put(service, experiment(world.second))
    await waits.wait()
    await change("meanwhile")
    assert (await service.http.delete(f"/items/{deleted}")).status_code == 200
    await change("after")  # and the current bundle forgets a deletion that all of its epochs have
    is_over = asyncio.Event()
    answered: Counter[str] = Counter()

    async def ask(user_id: str) -> None:
        while not is_over.is_set():
            asked = {"user_id": user_id, "history": HISTORY, "filter": {"include_items": [deleted, "before"]}}
            answer = await service.recommend(**asked)
            assert ids_of(answer) == ["before"]
            answered[answer["versions"]["bundle"]] += 1
            await asyncio.sleep(0)

    crowd = [asyncio.ensure_future(ask(f"u{number}")) for number in range(8)]
    await asyncio.sleep(0.1)
    may_go.set()
    await in_force(service)
    await until_true(lambda: answered[world.second] > 10)
    is_over.set()
    await asyncio.gather(*crowd)


async def test_a_put_is_answered_when_every_arm_has_the_item(service: Service, world: World, engines: Engines):
    may_move = asyncio.Event()

    class Reluctant(Backwards):
        async def use_catalog(self, bundle: Bundle) -> None:
            await may_move.wait()

    engines.make[world.second] = Reluctant
    await begin(service, experiment(world.second))
    body = {"title": "New", "categories": [], "sid": "<a_0><b_7><c_15>"}
    put_item = asyncio.ensure_future(service.http.put("/items/new", json=body))
    await until_true(lambda: service.state.bundle.catalog.epoch == 1)
    await asyncio.sleep(0.1)
    assert not put_item.done()
    may_move.set()
    assert (await put_item).status_code == 200


async def test_an_item_that_only_an_arm_knows_is_known(service: Service, world: World):
    unknown = await service.record(event("u", ONLY_THERE))
    assert unknown["rejected"] == [{"index": 0, "reason": "unknown_item"}]
    users = await begin(service, experiment(world.second))
    found = await service.record(event("u", ONLY_THERE), event("u", ITEM_IDS[-1]), event("u", "nowhere"))
    assert (found["accepted"], found["rejected"]) == (2, [{"index": 2, "reason": "unknown_item"}])
    asked = {"user_id": users["new"], "history": HISTORY, "filter": {"include_items": [ONLY_THERE]}}
    assert ids_of(await service.recommend(**asked)) == [ONLY_THERE]
    assert (await service.http.delete(f"/items/{ONLY_THERE}")).status_code == 200
    assert ids_of(await service.recommend(**asked)) == []
    assert (await service.record(event("u", ONLY_THERE)))["accepted"] == 0


async def test_no_request_is_dropped_or_answered_from_another_bundle_by_any_move(
    service: Service, world: World, engines: Engines
):
    """A crowd asks while the experiment begins and stops, bundles are activated and items change."""
    answered: Counter[tuple[str | None, str]] = Counter()
    is_over = asyncio.Event()

    async def ask(user_id: str | None) -> None:
        while not is_over.is_set():
            asked = {"history": HISTORY} if user_id is None else {"history": HISTORY, "user_id": user_id}
            answer = await service.recommend(**asked, num_items=4)
            await asyncio.sleep(0)  # nothing in such a request waits, so it would never let go
            assert (answer["source"], answer["degraded"], len(answer["items"])) == ("model", False, 4)
            bundle_id = answer["versions"]["bundle"]
            sids = [item["sid"] for item in answer["items"]]
            assert (sids == sorted(sids)) == (bundle_id == world.first)  # the second engine answers backwards
            variant = None if answer["experiment"] is None else answer["experiment"]["variant"]
            if variant is not None:
                assert bundle_id == {"control": world.first, "new": world.second}[variant]
            answered[variant, bundle_id] += 1

    crowd = [asyncio.ensure_future(ask(None if number % 4 == 0 else f"u{number}")) for number in range(12)]
    for round_ in range(2):
        await put(service, experiment(world.second, control=world.first) | {"name": f"models{round_}"})
        for bundle_id in (world.second, world.first, world.second):
            await asyncio.sleep(0.1)
            assert (await service.post(f"/admin/bundles/{bundle_id}/activate", {})).status_code == 200
            body = {"title": "New", "categories": [], "sid": "<a_0><b_7><c_15>"}
            assert (await service.http.put("/items/new", json=body)).status_code == 200
        await service.http.delete(f"/experiments/models{round_}")
        await asyncio.sleep(0.1)
        assert (await service.post("/admin/rollback", {})).status_code == 200
    is_over.set()
    await asyncio.gather(*crowd)
    assert set(answered) == {
        ("control", world.first), ("new", world.second), (None, world.first), (None, world.second)
    }  # fmt: skip
    await until_true(lambda: not service.state.deployments.ending)
    alive = [engine for made in engines.made.values() for engine in made if engine.problem is None]
    assert len(alive) == 1


class TestThinking:
    """Variants that think wait until whatever answers them can."""

    async def test_a_variant_that_thinks_waits_for_a_bundle_that_can(
        self, service: Service, world: World, reciting: Bundle
    ):
        shutil.copytree(reciting.path, world.root / reciting.bundle_id)
        await put(service, experiment({"reasoning": True}))
        assert world.first in (await waiting_for(service) or "")
        assert (await service.recommend(user_id="u", history=HISTORY))["experiment"] is None
        await service.post(f"/admin/bundles/{reciting.bundle_id}/activate", {})
        assert await waiting_for(service) is None
        assert (await service.recommend(user_id="u", history=HISTORY))["experiment"] is not None
        await service.post("/admin/rollback", {})
        assert world.first in (await waiting_for(service) or "")

    async def test_a_bundle_of_its_own_that_can_think_is_enough(self, service: Service, world: World, reciting: Bundle):
        shutil.copytree(reciting.path, world.root / reciting.bundle_id)
        await begin(service, experiment({"reasoning": True, "bundle": reciting.bundle_id}))

    async def test_a_bundle_of_another_layer_s_experiment_must_be_able_to_think_too(
        self, service: Service, world: World, reciting: Bundle
    ):
        shutil.copytree(reciting.path, world.root / reciting.bundle_id)
        await service.post(f"/admin/bundles/{reciting.bundle_id}/activate", {})
        await put(service, experiment({"reasoning": True}) | {"name": "thought"}, layer="thinking")
        assert await waiting_for(service, "thought") is None
        await begin(service, experiment(world.second))
        assert world.second in (await waiting_for(service, "thought") or "")
        await service.http.delete("/experiments/models")
        assert await waiting_for(service, "thought") is None
