"""Rationales through the running service: what is cut, what is kept for next time, and who is asked to think ahead."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from semantic_ids.bundle import Bundle, BundleError
from service.app import EngineFactory
from service.engine.base import DecodeRequest, DecodeResult, Engine, Think, ThoughtEnd, ThoughtListener
from service.metrics import Metrics
from service.recommender import Recommender, ThinkingLimits
from service.redis_keys import user_keys
from service.security import hash_key
from service.settings import Settings
from service.think_ahead import ThinkAhead
from service.thinker import Thinker
from service.thoughts import Thoughts
from tests.service.engines import InstantEngine
from tests.service.running import PATIENT_MS, Service, running, until
from tests.service.test_sse import parse
from tests.service.thinking import encode, publish_thinking
from tests.service.world import BY_ID, ITEM_IDS, ITEMS, SPACE, ids_of, scores_of

EVENTS = "text/event-stream"
HISTORY = list(ITEM_IDS[:5])
KNOWN, FOREIGN = ITEMS[0], ITEMS[149]
WANTED: dict[str, Any] = {"reasoning": "on", "include_rationale": True, "deadline_ms": PATIENT_MS}


class ScriptedEngine(InstantEngine):
    """Thinks what it is told to."""

    def __init__(self, bundle: Bundle, thought: str, end: ThoughtEnd) -> None:
        super().__init__(bundle)
        self.thought = tuple(encode(thought))
        self.end = end
        self.prompts: list[list[int]] = []

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """What the instant engine gives, after the thought if there is to be one."""
        self.prompts.append(request.prompt.tolist())
        result = await super().decode(request)
        if not isinstance(request.program[0], Think):
            return result
        for token_id in self.thought:
            if on_thought is not None:
                on_thought((token_id,))
            await asyncio.sleep(0)
        return replace(result, thought=self.thought, thought_end=self.end)


def scripted(thought: str, end: ThoughtEnd = "closed") -> EngineFactory:
    return lambda bundle, _settings, _metrics: ScriptedEngine(bundle, thought, end)


@pytest.fixture
def reciting_settings(reciting: Bundle, tmp_path: Path) -> Settings:
    return Settings(bundles=reciting.path.parent, data_dir=tmp_path / "redis")


@pytest.fixture
def endless_settings(endless: Bundle, tmp_path: Path) -> Settings:
    return Settings(bundles=endless.path.parent, data_dir=tmp_path / "redis", think_max_tokens=60, think_max_seconds=60)


def sample(service: Service, name: str, **labels: str) -> float:
    return service.state.metrics.registry.get_sample_value(f"{name}_total", labels) or 0.0


def cache(service: Service) -> dict[str, float]:
    outcomes = ("hit", "miss", "write", "moved", "failure")
    return {one: count for one in outcomes if (count := sample(service, "sidrec_thought_cache", outcome=one))}


def thought_key(user_id: str, tenant: str = "default") -> str:
    return user_keys(user_id, tenant).thought


async def ask_and_keep(service: Service, user_id: str, **body: Any) -> dict[str, Any]:
    """An answer after thinking, whose thought is kept by now."""
    answer = await service.recommend(user_id=user_id, **{**WANTED, **body})
    await until(lambda: cache(service).get("write", 0) + cache(service).get("moved", 0) > 0)
    return answer


class TestChecked:
    """A rationale names only items of the history or of the answer."""

    THOUGHT = (
        f"You like {SPACE.format(KNOWN.codes)}. So take {{answer}}. Or <a_15><b_15><c_15>! "
        f"Or {FOREIGN.title}? Or the “Wonder Mixer”. That is all."
    )

    @pytest.mark.parametrize("path", ["/recommend", "/rerank"])
    async def test_inventions_are_cut_and_counted_and_the_stream_is_the_rationale(
        self, reciting_settings: Settings, path: str
    ):
        body: dict[str, Any] = {"history": HISTORY} | (
            {"candidates": list(ITEM_IDS[40:60])} if "rerank" in path else {}
        )
        async with running(reciting_settings, scripted("")) as service:
            shown = (await service.post(path, body)).json()["items"]
            assert FOREIGN.item_id not in ids_of({"items": shown})
            assert isinstance(service.state.engine, ScriptedEngine)
            answered = BY_ID[shown[0]["item_id"]]
            thought = self.THOUGHT.format(answer=SPACE.format(answered.codes))
            service.state.engine.thought = tuple(encode(thought))
            plain = (await service.post(path, {**body, **WANTED})).json()
            response = await service.post(path, {**body, **WANTED}, accept=EVENTS)
            cuts = {kind: sample(service, "sidrec_rationale_cuts", kind=kind) for kind in ("sid", "title", "quote")}
        events = parse(response.text)
        pieces = [data["text"] for name, data in events if name == "thought"]
        expected = [f"You like {KNOWN.title}.", f" So take {answered.title}. That is all."]
        assert pieces == expected
        assert plain["rationale"] == events[-1][1]["rationale"] == "".join(expected)
        assert cuts == {"sid": 2, "title": 2, "quote": 2}, "twice each: plain and streamed"

    async def test_nothing_left_is_null_and_nothing_streamed(self, reciting_settings: Settings):
        async with running(reciting_settings, scripted(" <a_1>. \n")) as service:
            response = await service.post("/recommend", {"history": HISTORY, **WANTED}, accept=EVENTS)
        ((name, answer),) = parse(response.text)
        assert (name, answer["rationale"], answer["source"]) == ("answer", None, "model")


class TestKept:
    """A thought is thought once for a user's state."""

    async def test_a_hit_gives_the_same_answer_much_quicker(self, endless_settings: Settings, user_id: str):
        async with running(endless_settings) as service:
            await service.clicks(user_id, *HISTORY)
            unthinking = scores_of(await service.recommend(user_id=user_id))
            first = await ask_and_keep(service, user_id)
            again = await service.recommend(user_id=user_id, **WANTED)
            auto = await service.recommend(user_id=user_id, include_rationale=True)
            reranked = await service.rerank(user_id=user_id, candidates=ids_of(first), reasoning="on")
            assert cache(service) == {"miss": 1, "write": 1, "hit": 3}
        for other in (again, auto):
            assert ids_of(other) == ids_of(first)
            assert scores_of(other) == pytest.approx(scores_of(first), abs=1e-4)
            assert other["rationale"] == first["rationale"]
            assert other["timings_ms"]["reasoning"] == 0
            assert other["timings_ms"]["total"] < 0.5 * first["timings_ms"]["total"]
        assert scores_of(reranked) == pytest.approx(scores_of(first), abs=1e-4)
        assert scores_of(first) != pytest.approx(unthinking, abs=1e-4)

    async def test_a_hit_is_streamed_at_once_and_the_same(self, reciting_settings: Settings, user_id: str):
        async with running(reciting_settings, scripted(f"A. B {KNOWN.title}! C")) as service:
            await service.clicks(user_id, *HISTORY)
            first = await ask_and_keep(service, user_id)
            response = await service.post("/recommend", {"user_id": user_id, **WANTED}, accept=EVENTS)
            assert cache(service)["hit"] == 1
            assert isinstance(service.state.engine, ScriptedEngine)
            assert len(service.state.engine.prompts) == 2
        events = parse(response.text)
        pieces = [data["text"] for name, data in events if name == "thought"]
        assert pieces == [f"A. B {KNOWN.title}!", " C"]
        assert "".join(pieces) == first["rationale"] == events[-1][1]["rationale"]

    async def test_who_wants_no_thought_reads_no_cache(self, reciting_settings: Settings, user_id: str):
        async with running(reciting_settings, scripted("A.")) as service:
            await service.clicks(user_id, *HISTORY)
            await ask_and_keep(service, user_id)
            before = cache(service)
            redis = service.state.redis
            reads = (await redis.info("commandstats")).get("cmdstat_get", {}).get("calls", 0)
            for body in ({}, {"reasoning": "off", "include_rationale": True}, {"reasoning": "auto"}):
                assert (await service.recommend(user_id=user_id, **body))["rationale"] is None
            anonymous = {"history": HISTORY, **WANTED}
            assert (await service.recommend(**anonymous))["rationale"] == "A."
            assert (await service.recommend(user_id=user_id, **anonymous))["rationale"] == "A."
            assert cache(service) == before
            assert (await redis.info("commandstats")).get("cmdstat_get", {}).get("calls", 0) == reads

    async def test_auto_without_a_thought_answers_at_once_without_a_rationale(
        self, endless_settings: Settings, user_id: str
    ):
        async with running(endless_settings) as service:
            await service.clicks(user_id, *HISTORY)
            plain = await service.recommend(user_id=user_id)
            answer = await service.recommend(user_id=user_id, include_rationale=True)
            assert cache(service) == {"miss": 1}
        assert (answer["rationale"], scores_of(answer)) == (None, scores_of(plain))

    async def test_a_changed_history_has_another_thought(self, reciting_settings: Settings, user_id: str):
        async with running(reciting_settings, scripted("A.")) as service:
            await service.clicks(user_id, *HISTORY)
            await ask_and_keep(service, user_id)
            await service.clicks(user_id, ITEM_IDS[9])
            assert (await service.recommend(user_id=user_id, include_rationale=True))["rationale"] is None
            assert cache(service) == {"miss": 2, "write": 1}

    async def test_one_cut_by_its_time_is_not_kept(self, reciting_settings: Settings, user_id: str):
        async with running(reciting_settings, scripted("A.", "time_budget")) as service:
            await service.clicks(user_id, *HISTORY)
            assert (await service.recommend(user_id=user_id, **WANTED))["rationale"] == "A."
            await asyncio.sleep(0.1)
            assert await service.state.redis.get(thought_key(user_id)) is None
            assert cache(service) == {"miss": 1}

    async def test_one_cut_by_another_number_of_tokens_is_none(self, reciting_settings: Settings, user_id: str):
        async with running(reciting_settings, scripted("A.", "token_budget")) as service:
            await service.clicks(user_id, *HISTORY)
            await ask_and_keep(service, user_id)
            redis = service.state.redis
            entry = json.loads(await redis.get(thought_key(user_id)) or "null")
            for change, rationale in (({"max_tokens": 7}, None), ({"max_tokens": 7, "end": "closed"}, "A.")):
                await redis.set(thought_key(user_id), json.dumps({**entry, **change}))
                answer = await service.recommend(user_id=user_id, include_rationale=True)
                assert answer["rationale"] == rationale

    @pytest.mark.parametrize(
        "spoilt",
        [
            lambda entry: "no JSON",
            lambda entry: "",
            lambda entry: json.dumps({**entry, "bundle": "another"}),
            lambda entry: json.dumps({**entry, "prompt": "0" * 64}),
            lambda entry: json.dumps({**entry, "token_ids": [-1]}),
            lambda entry: json.dumps({**entry, "token_ids": [10**6]}),
            lambda entry: json.dumps({**entry, "token_ids": ["1"]}),
            lambda entry: json.dumps({**entry, "end": "time_budget"}),
            lambda entry: json.dumps({**entry, "more": 1}),
        ],
    )
    async def test_a_spoilt_entry_is_a_miss(
        self, reciting_settings: Settings, user_id: str, spoilt: Callable[[dict[str, Any]], str]
    ):
        async with running(reciting_settings, scripted("A.")) as service:
            await service.clicks(user_id, *HISTORY)
            await ask_and_keep(service, user_id)
            redis = service.state.redis
            entry = json.loads(await redis.get(thought_key(user_id)) or "null")
            await redis.set(thought_key(user_id), spoilt(entry))
            answer = await service.recommend(user_id=user_id, include_rationale=True)
            assert (answer["rationale"], answer["degraded"]) == (None, False)
            await redis.delete(thought_key(user_id))
            await redis.hset(thought_key(user_id), "a", "hash")
            answer = await service.recommend(user_id=user_id, **WANTED)
            assert (answer["rationale"], answer["degraded"]) == ("A.", False)
            assert cache(service)["failure"] >= 1

    async def test_an_erased_user_has_none_even_if_it_is_thought_later(self, reciting_settings: Settings, user_id: str):
        async with running(reciting_settings, scripted("A.")) as service:
            await service.clicks(user_id, *HISTORY)
            await ask_and_keep(service, user_id)
            redis, engine = service.state.redis, service.state.engine
            entry = await redis.get(thought_key(user_id))
            assert entry is not None
            assert (await service.http.delete(f"/users/{user_id}")).status_code == 204
            assert await redis.keys(f"*{user_id}*") == []
            await service.clicks(user_id, *HISTORY)
            assert isinstance(engine, ScriptedEngine)
            released = asyncio.Event()
            decode = ScriptedEngine.decode

            async def late(request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
                await released.wait()
                return await decode(engine, request, on_thought)

            engine.decode = late  # type: ignore[method-assign]
            asking = asyncio.ensure_future(service.recommend(user_id=user_id, **WANTED))
            await until(lambda: sample(service, "sidrec_thought_cache", outcome="miss") == 2)
            assert (await service.http.delete(f"/users/{user_id}")).status_code == 204
            released.set()
            await asking
            await until(lambda: cache(service).get("moved") == 1)
            assert await redis.keys(f"*{user_id}*") == []

    async def test_another_tenant_never_gets_it(self, reciting_settings: Settings, user_id: str):
        keys = tuple(f"{hash_key(tenant)}:{tenant}" for tenant in ("one", "two"))
        settings = reciting_settings.model_copy(update={"api_key_hashes": keys})
        async with running(settings, scripted("A.")) as service:
            events = [
                {"event_id": str(n), "user_id": user_id, "item_id": one, "event_type": "click", "timestamp": n}
                for n, one in enumerate(HISTORY)
            ]
            for tenant in ("one", "two"):
                assert (await service.post("/events", {"events": events}, x_api_key=tenant)).status_code == 200
            body = {"user_id": user_id, **WANTED}
            assert (await service.post("/recommend", body, x_api_key="one")).json()["rationale"] == "A."
            await until(lambda: cache(service).get("write") == 1)
            body["reasoning"] = "auto"
            answers = {
                tenant: (await service.post("/recommend", body, x_api_key=tenant)).json()["rationale"]
                for tenant in ("one", "two")
            }
        assert answers == {"one": "A.", "two": None}

    async def test_it_expires_with_the_user_at_the_latest(self, reciting_settings: Settings, user_id: str):
        for days, ttl_s, longest in ((None, 50.0, 50), (1, 1e6, 86_400)):
            update = {"history_ttl_days": days, "thought_cache_ttl_s": ttl_s}
            async with running(reciting_settings.model_copy(update=update), scripted("A.")) as service:
                user = f"{user_id}-{days}"
                await service.clicks(user, *HISTORY)
                await ask_and_keep(service, user)
                assert longest - 20 < await service.state.redis.ttl(thought_key(user)) <= longest

    async def test_without_a_time_to_live_nothing_is_kept(self, reciting_settings: Settings, user_id: str):
        settings = reciting_settings.model_copy(update={"thought_cache_ttl_s": 0.0})
        async with running(settings, scripted("A.")) as service:
            await service.clicks(user_id, *HISTORY)
            await service.recommend(user_id=user_id, **WANTED)
            await asyncio.sleep(0.05)
            assert cache(service) == {}
            assert await service.state.redis.get(thought_key(user_id)) is None


class Sent:
    """Stands where the broker is."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.error: Exception | None = None

    def __call__(self, tenant: str, user_id: str, bundle_id: str) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append((tenant, user_id, bundle_id))


@asynccontextmanager
async def asking_ahead(settings: Settings, thought: str) -> AsyncIterator[tuple[Service, Sent]]:
    """The service, whose recommender sends its tasks to a list."""
    async with running(settings, scripted(thought)) as service:
        state, sent = service.state, Sent()
        ahead = ThinkAhead(state.redis, sent, state.metrics)
        thoughts = Thoughts(state.redis, state.metrics, ttl_s=60.0, ahead=ahead)
        served = state.deployments.current.current
        parts = served.bundle, served.engine, state.histories, state.metrics, settings.beam_width, ThinkingLimits()
        served.recommender = Recommender(*parts, thoughts=thoughts)
        task = asyncio.create_task(ahead.run())
        yield service, sent
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def ahead_of(service: Service, outcome: str) -> float:
    return sample(service, "sidrec_think_ahead", outcome=outcome)


class TestAhead:
    """Asking for thoughts before anybody waits."""

    async def test_events_of_a_history_and_a_missing_thought_ask_once(self, reciting_settings: Settings, user_id: str):
        async with asking_ahead(reciting_settings, "A.") as (service, sent):
            for kind in ("impression", "dislike", "hide"):
                event = {"event_id": kind, "user_id": user_id, "item_id": ITEM_IDS[0], "event_type": kind}
                await service.record({**event, "timestamp": 0.0})
            await service.clicks(user_id, *HISTORY)
            await until(lambda: ahead_of(service, "asked") == 1)
            await service.clicks(user_id, ITEM_IDS[9])
            await service.recommend(user_id=user_id, include_rationale=True)
            await until(lambda: ahead_of(service, "known") >= 1)
            assert sent.asked == [("default", user_id, service.state.bundle.bundle_id)]
            await service.state.redis.delete(user_keys(user_id).think_ahead)
            await service.recommend(user_id=user_id, include_rationale=True)
            await until(lambda: len(sent.asked) == 2)

    async def test_a_broker_that_is_down_is_no_error_of_a_request(self, reciting_settings: Settings, user_id: str):
        async with asking_ahead(reciting_settings, "A.") as (service, sent):
            sent.error = OSError("no broker")
            await service.clicks(user_id, *HISTORY)
            answer = await service.recommend(user_id=user_id, include_rationale=True)
            assert (answer["source"], answer["degraded"]) == ("model", False)
            await until(lambda: ahead_of(service, "dropped") == 1)
            assert await service.state.redis.get(user_keys(user_id).think_ahead) is None
            sent.error = None
            await service.clicks(user_id, ITEM_IDS[9])
            await until(lambda: sent.asked == [("default", user_id, service.state.bundle.bundle_id)])

    async def test_another_bundle_is_asked_too(self, reciting_settings: Settings, user_id: str):
        async with asking_ahead(reciting_settings, "A.") as (service, sent):
            await service.clicks(user_id, *HISTORY)
            ahead = ThinkAhead(service.state.redis, sent, Metrics())
            sending = asyncio.create_task(ahead.run())
            for bundle_id in ("one", "one", "other", "other"):
                ahead.ask("default", user_id, bundle_id)
                await asyncio.sleep(0.05)
            sending.cancel()
            assert [asked[-1] for asked in sent.asked] == [service.state.bundle.bundle_id, "one", "other"]

    async def test_what_does_not_fit_the_queue_is_dropped_and_counted(self):
        metrics = Metrics()
        ahead = ThinkAhead(None, Sent(), metrics)  # type: ignore[arg-type]
        for number in range(1_003):
            ahead.ask("default", f"u{number % 1_002}", "a bundle")
        assert metrics.registry.get_sample_value("sidrec_think_ahead_total", {"outcome": "dropped"}) == 2

    async def test_the_setting_sends_through_celery_and_a_dead_broker_delays_nobody(
        self, reciting_settings: Settings, user_id: str
    ):
        update = {"think_ahead": True, "celery_broker_url": "redis://127.0.0.1:1/1"}
        async with running(reciting_settings.model_copy(update=update), scripted("A.")) as service:
            await service.clicks(user_id, *HISTORY)
            answer = await service.recommend(user_id=user_id, include_rationale=True)
            assert answer["timings_ms"]["total"] < 1_000
            await until(lambda: ahead_of(service, "dropped") == 1)


class TestThinker:
    """What the worker does with a task."""

    @asynccontextmanager
    async def thinker(self, service: Service, settings: Settings) -> AsyncIterator[Thinker]:
        thinker = Thinker(settings, scripted("A."))
        try:
            yield thinker
        finally:
            await asyncio.to_thread(thinker.close)

    async def test_it_thinks_once_for_each_state_and_clears_the_mark(self, reciting_settings: Settings, user_id: str):
        async with (
            running(reciting_settings, scripted("B.")) as service,
            self.thinker(service, reciting_settings) as one,
        ):

            async def outcome(user: str = user_id) -> str:
                return await asyncio.to_thread(one.think, "default", user, service.state.bundle.bundle_id)

            assert await outcome("nobody") == "no_history"
            await service.clicks(user_id, *HISTORY)
            await service.state.redis.set(user_keys(user_id).think_ahead, "1")
            assert await outcome() == "thought"
            assert await service.state.redis.get(user_keys(user_id).think_ahead) is None
            assert await outcome() == "known"
            answer = await service.recommend(user_id=user_id, include_rationale=True)
            assert answer["rationale"] == "A.", "the prompt is the service's"
            await service.clicks(user_id, ITEM_IDS[9])
            assert await outcome() == "thought"

    async def test_it_follows_the_live_catalogue(self, reciting_settings: Settings, user_id: str):
        async with (
            running(reciting_settings, scripted("B.")) as service,
            self.thinker(service, reciting_settings) as one,
        ):
            await service.clicks(user_id, *HISTORY)
            assert await asyncio.to_thread(one.think, "default", user_id, service.state.bundle.bundle_id) == "thought"
            put = await service.http.put(f"/items/{HISTORY[0]}", json={"title": "Another Thing", "categories": []})
            assert put.status_code == 200
            assert (await service.recommend(user_id=user_id, include_rationale=True))["rationale"] is None
            assert await asyncio.to_thread(one.think, "default", user_id, service.state.bundle.bundle_id) == "thought"
            assert (await service.recommend(user_id=user_id, include_rationale=True))["rationale"] == "A."

    async def test_it_thinks_with_the_bundle_it_is_told_and_keeps_two_engines(
        self, reciting_settings: Settings, reciting: Bundle, tmp_path: Path, user_id: str
    ):
        root, made = tmp_path / "bundles", dict[str, Engine]()
        shutil.copytree(reciting.path, root / reciting.bundle_id)
        others = [publish_thinking(root, thought).bundle_id for thought in ("B.", "C.")]
        settings = reciting_settings.model_copy(update={"bundles": root})

        def make(bundle: Bundle, settings: Settings, metrics: Metrics) -> Engine:
            made[bundle.bundle_id] = scripted(bundle.bundle_id[-1])(bundle, settings, metrics)
            return made[bundle.bundle_id]

        async with running(settings, scripted("B.")) as service:
            await service.clicks(user_id, *HISTORY)
            one = Thinker(settings, make)
            try:
                for bundle_id in (reciting.bundle_id, others[0], reciting.bundle_id, others[1]):
                    assert await asyncio.to_thread(one.think, "default", user_id, bundle_id) == "thought"
                    kept = await service.state.redis.get(thought_key(user_id))
                    assert json.loads(kept or "{}")["bundle"] == bundle_id
                assert {bundle_id: engine.problem for bundle_id, engine in made.items()} == {
                    reciting.bundle_id: None, others[0]: "stopped", others[1]: None
                }  # fmt: skip
                with pytest.raises(ValueError, match="is not a bundle id"):
                    one.think("default", user_id, "../bundles")
                with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
                    await asyncio.to_thread(one.think, "default", user_id, "20200101T000000Z-0123456789ab")
            finally:
                await asyncio.to_thread(one.close)
            assert {engine.problem for engine in made.values()} == {"stopped"}

    async def test_it_looks_for_the_merged_catalogue_of_the_service(
        self, reciting_settings: Settings, reciting: Bundle, tmp_path: Path, user_id: str
    ):
        (tmp_path / "merged" / reciting.bundle_id / "1").mkdir(parents=True)  # one that is damaged: it has no files
        settings = reciting_settings.model_copy(update={"catalog_cache": tmp_path / "merged"})
        async with running(reciting_settings, scripted("B.")) as service, self.thinker(service, settings) as one:
            await service.clicks(user_id, *HISTORY)
            await service.http.put(f"/items/{HISTORY[0]}", json={"title": "Another Thing", "categories": []})
            with capture_logs() as logs:
                assert await asyncio.to_thread(one.think, "default", user_id, reciting.bundle_id) == "thought"
        (found,) = [entry for entry in logs if entry["event"] == "merged_catalog_left"]
        assert found["folder"] == str(tmp_path / "merged" / reciting.bundle_id / "1")

    async def test_a_bundle_that_cannot_think_is_left_alone(self, settings: Settings, user_id: str):
        async with running(settings, scripted("B.")) as service, self.thinker(service, settings) as one:
            await service.clicks(user_id, *HISTORY)
            assert (
                await asyncio.to_thread(one.think, "default", user_id, service.state.bundle.bundle_id) == "cannot_think"
            )
