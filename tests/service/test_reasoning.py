"""Thinking before the SID: its budgets, what it changes in an answer, and who is told of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semantic_ids.bundle import Bundle
from semantic_ids.filters import ItemFilter
from semantic_ids.prompt import History
from service.engine.base import (
    Code,
    DecodeRequest,
    DecodeResult,
    Forced,
    Think,
    ThoughtListener,
    UnsupportedProgramError,
    sid_program,
)
from service.engine.local import LocalEngine, LocalEngineConfig
from service.metrics import Metrics
from service.recommender import ThinkingLimits
from service.settings import Settings
from tests.service.engines import InstantEngine, failing, slow
from tests.service.running import Service, assert_problem, running
from tests.service.thinking import (
    CLOSE,
    RATIONALE,
    THOUGHT_IDS,
    publish_thinking,
    thinking_service,
)
from tests.service.world import ITEM_IDS, NUM_ITEMS, SPACE, ids_of, scores_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

HISTORY = list(ITEM_IDS[:5])
TOLERANCE = 1e-4
FOREVER_S = 60.0


@asynccontextmanager
async def started(bundle: Bundle, metrics: Metrics | None = None) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(bundle, LocalEngineConfig(), metrics or Metrics())
    await engine.start()
    yield engine
    await engine.stop()


def request(
    bundle: Bundle,
    think: Think | None,
    history: Sequence[int] = (0, 50, 100),
    *,
    item_filter: ItemFilter | None = None,
    width: int = 10,
) -> DecodeRequest:
    return DecodeRequest(
        bundle.renderer.render(History.of(bundle.catalog, history), thinking=think is not None).token_ids,
        item_filter or ItemFilter.of(NUM_ITEMS),
        width,
        sid_program(SPACE) if think is None else (think, *sid_program(SPACE)),
        bundle.catalog_id,
    )


def assert_same(one: DecodeResult, other: DecodeResult) -> None:
    assert one.ranks.tolist() == other.ranks.tolist()
    np.testing.assert_allclose(one.scores, other.scores, atol=TOLERANCE)


def thoughts(metrics: Metrics) -> dict[str, float]:
    """How many thoughts ended how."""
    ends = ("closed", "token_budget", "time_budget")
    sample = metrics.registry.get_sample_value
    return {end: number for end in ends if (number := sample("sidrec_engine_thoughts_total", {"end": end}))}


class TestBudgets:
    """What ends a thought, and that an answer follows whatever it was."""

    async def test_no_thought_has_more_tokens_than_its_budget(self, endless: Bundle):
        rng = np.random.default_rng(1)
        metrics = Metrics()
        async with started(endless, metrics) as engine:
            for max_tokens in rng.integers(1, 60, 25).tolist():
                width = int(rng.integers(1, 120))
                deny = ItemFilter.of(NUM_ITEMS, deny=rng.integers(0, NUM_ITEMS, rng.integers(0, 200)))
                history = rng.integers(0, NUM_ITEMS, rng.integers(0, 16)).tolist()
                think = Think(max_tokens, FOREVER_S, CLOSE)
                result = await engine.decode(request(endless, think, history, item_filter=deny, width=width))
                assert (len(result.thought), result.thought_end) == (max_tokens, "token_budget")
                assert not set(result.thought) & {CLOSE[0]}
                assert len(result.ranks) >= min(width, deny.num_eligible)
                assert deny.contains(result.ranks).all()
                assert np.isfinite(result.scores).all()
        assert thoughts(metrics) == {"token_budget": 25}

    @pytest.mark.parametrize("max_seconds", [0.05, 0.2, 0.5])
    async def test_no_thought_is_longer_than_its_time(self, endless: Bundle, max_seconds: float):
        async with started(endless) as engine:
            result = await engine.decode(request(endless, Think(5_000, max_seconds, CLOSE)))
        assert result.thought_end == "time_budget"
        assert 0 < len(result.thought) < 5_000
        assert 0.5 * max_seconds < result.think_s < max_seconds + 0.1
        assert len(result.ranks) >= 10

    async def test_without_time_there_is_an_empty_thought_and_an_answer(self, endless: Bundle):
        async with started(endless) as engine:
            result = await engine.decode(request(endless, Think(100, 0.0, CLOSE)))
        assert (result.thought, result.thought_end) == ((), "time_budget")
        assert len(result.ranks) >= 10

    async def test_a_model_ends_its_thought_itself(self, reciting: Bundle):
        metrics = Metrics()
        async with started(reciting, metrics) as engine:
            for max_tokens in (len(THOUGHT_IDS), 100):
                result = await engine.decode(request(reciting, Think(max_tokens, FOREVER_S, CLOSE)))
                assert (result.thought, result.thought_end) == (THOUGHT_IDS, "closed")
            cut = await engine.decode(request(reciting, Think(len(THOUGHT_IDS) - 1, FOREVER_S, CLOSE)))
            assert (cut.thought, cut.thought_end) == (THOUGHT_IDS[:-1], "token_budget")
        assert thoughts(metrics) == {"closed": 2, "token_budget": 1}
        tokens = metrics.registry.get_sample_value("sidrec_engine_think_tokens_total")
        assert tokens == 3 * len(THOUGHT_IDS) - 1

    async def test_a_thought_is_cut_to_the_models_positions(self, tmp_path: Path):
        bundle = publish_thinking(tmp_path, None, max_positions=600)
        wanted = request(bundle, Think(5_000, FOREVER_S, CLOSE))
        room = 600 - len(wanted.prompt) - len(CLOSE) - SPACE.num_levels
        async with started(bundle) as engine:
            result = await engine.decode(wanted)
            assert (len(result.thought), result.thought_end) == (room, "token_budget")
            prompt = np.resize(wanted.prompt, len(wanted.prompt) + room)
            with pytest.raises(UnsupportedProgramError, match=f"{len(prompt)} tokens .* 600 positions, and 6 are"):
                await engine.decode(replace(wanted, prompt=prompt))
            assert isinstance(await engine.decode(replace(wanted, prompt=prompt[:-1])), DecodeResult)


class TestEngine:
    """The local engine's own promises."""

    @pytest.mark.parametrize("between", [(), (7, 9)])
    async def test_the_answer_is_that_of_a_prompt_that_ends_with_the_thought(
        self, endless: Bundle, between: tuple[int, ...]
    ):
        thinking = request(endless, Think(40, FOREVER_S, CLOSE), width=60)
        thinking = replace(thinking, program=(thinking.program[0], Forced(between), *thinking.program[1:]))
        async with started(endless) as engine:
            thought = await engine.decode(thinking)
            whole = np.concatenate((thinking.prompt, thought.thought, CLOSE, between)).astype(np.int64)
            in_one_piece = await engine.decode(replace(thinking, prompt=whole, program=sid_program(SPACE)))
            unthinking = await engine.decode(replace(thinking, program=sid_program(SPACE)))
        assert_same(thought, in_one_piece)
        assert thought.ranks.tolist() != unthinking.ranks.tolist()

    async def test_a_thought_is_what_the_model_writes_greedily(self, endless: Bundle):
        """Against the whole sequence run anew for every token."""
        import torch
        from transformers import AutoModelForCausalLM

        wanted = request(endless, Think(20, FOREVER_S, CLOSE))
        async with started(endless) as engine:
            thought = (await engine.decode(wanted)).thought
        model = AutoModelForCausalLM.from_pretrained(endless.model_folder).eval()
        sequence = wanted.prompt.tolist()
        for token_id in thought:
            with torch.inference_mode():
                logits = model(torch.tensor([sequence])).logits[0, -1]
            assert logits[token_id] >= logits.max() - TOLERANCE
            sequence.append(token_id)

    async def test_each_token_is_heard_once_in_order_and_before_the_answer(self, endless: Bundle):
        heard: list[int] = []
        async with started(endless) as engine:
            wanted = request(endless, Think(50, FOREVER_S, CLOSE))
            result = await engine.decode(wanted, heard.extend)
            assert tuple(heard) == result.thought
            await asyncio.sleep(0.05)
            assert len(heard) == 50

    async def test_a_cancelled_thought_stops_and_is_heard_no_more(self, endless: Bundle):
        heard: list[int] = []
        metrics = Metrics()
        async with started(endless, metrics) as engine:
            first = asyncio.Event()

            def hear(token_ids: Sequence[int]) -> None:
                heard.extend(token_ids)
                first.set()

            thinking = asyncio.ensure_future(engine.decode(request(endless, Think(6_000, FOREVER_S, CLOSE)), hear))
            await first.wait()
            thinking.cancel()
            start = time.monotonic()
            num_heard = len(heard)
            assert isinstance(await engine.decode(request(endless, None)), DecodeResult)
            assert time.monotonic() - start < 1.0, "the worker thread is free"
            assert len(heard) == num_heard
            assert thinking.cancelled()
            assert engine.problem is None
        assert thoughts(metrics) == {}

    async def test_thinkers_and_others_in_a_crowd_get_the_answers_that_each_gets_alone(self, endless: Bundle):
        metrics = Metrics()
        thinking = [request(endless, Think(length, FOREVER_S, CLOSE), [length]) for length in (5, 5, 9)]
        crowd = [*thinking, *(request(endless, None, [rank]) for rank in range(12))] * 2
        async with started(endless, metrics) as engine:
            alone = [await engine.decode(one) for one in crowd]
            before = metrics.registry.get_sample_value("sidrec_engine_batch_size_bucket", {"le": "1.0"})
            together = await asyncio.gather(*map(engine.decode, crowd))
            after = metrics.registry.get_sample_value("sidrec_engine_batch_size_bucket", {"le": "1.0"})
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other)
            assert one.thought == other.thought
        assert before is not None
        assert after is not None
        assert after - before >= 6, "a thinker is a batch of its own"

    async def test_its_times_are_told_apart(self, endless: Bundle):
        async with started(endless) as engine:
            start = time.monotonic()
            long = await engine.decode(request(endless, Think(5_000, 0.3, CLOSE)))
            elapsed_s = time.monotonic() - start
            plain = await engine.decode(request(endless, None))
        assert long.think_s > 0.15
        assert 0 < long.decode_s < 0.3
        assert long.think_s + long.decode_s <= elapsed_s
        assert (plain.think_s, plain.thought, plain.thought_end) == (0.0, (), None)

    async def test_a_thought_that_is_under_way_ends_before_the_engine_does(self, endless: Bundle):
        async with started(endless) as engine:
            first = asyncio.Event()
            wanted = request(endless, Think(200, FOREVER_S, CLOSE))
            thinking = asyncio.ensure_future(engine.decode(wanted, lambda _token_ids: first.set()))
            await first.wait()
        assert len((await thinking).thought) == 200

    async def test_thoughts_in_other_places_are_refused(self, endless: Bundle):
        think = Think(5, FOREVER_S, CLOSE)
        async with started(endless) as engine:
            for program in ((Code(0), think, Code(1), Code(2)), (think, think, *sid_program(SPACE)), (think,)):
                with pytest.raises(UnsupportedProgramError):
                    await engine.decode(replace(request(endless, None), program=program))


@pytest.fixture
def endless_settings(endless: Bundle, tmp_path: Path) -> Settings:
    """Settings of a service on a model that never ends a thought."""
    return Settings(bundles=endless.path.parent, data_dir=tmp_path / "redis")


ASKED = [
    pytest.param("/recommend", {"history": HISTORY}, id="recommend"),
    pytest.param("/rerank", {"history": HISTORY, "candidates": [*ITEM_IDS[:40], "gone"]}, id="rerank"),
]


async def ask(service: Service, path: str, body: dict[str, Any], **more: Any) -> dict[str, Any]:
    return await service.recommend(**body, **more) if path == "/recommend" else await service.rerank(**body, **more)


class TestOverHttp:
    """`reasoning` and `include_rationale`."""

    @pytest.mark.parametrize(("path", "body"), ASKED)
    async def test_on_thinks_and_gives_the_thought_where_asked(
        self, thinking: Service, path: str, body: dict[str, Any]
    ):
        answer = await ask(thinking, path, body, reasoning="on", include_rationale=True)
        assert answer["rationale"] == RATIONALE
        assert (answer["source"], answer["degraded"], answer["versions"]["prompt"]) == ("model", False, 3)
        timings = answer["timings_ms"]
        assert timings["reasoning"] > 0
        assert timings["decode"] > 0
        assert timings["history"] + timings["reasoning"] + timings["decode"] <= timings["total"]
        without = await ask(thinking, path, body, reasoning="on")
        assert without["rationale"] is None
        assert without["timings_ms"]["reasoning"] > 0
        assert ids_of(without) == ids_of(answer)

    @pytest.mark.parametrize(("path", "body"), ASKED)
    @pytest.mark.parametrize("reasoning", ["off", "auto"])
    async def test_off_and_auto_do_not(self, thinking: Service, path: str, body: dict[str, Any], reasoning: str):
        answer = await ask(thinking, path, body, reasoning=reasoning, include_rationale=True)
        assert answer["rationale"] is None
        assert answer["timings_ms"]["reasoning"] == 0
        assert answer["source"] == "model"

    async def test_rerank_and_recommend_agree_after_a_thought(self, endless_settings: Settings):
        async with thinking_service(endless_settings, ThinkingLimits(30, FOREVER_S)) as service:
            body = {"history": HISTORY, "reasoning": "on"}
            recommended = scores_of(await service.recommend(**body, num_items=20))
            reranked = scores_of(await service.rerank(**body, candidates=list(recommended)))
            plain = scores_of(await service.rerank(history=HISTORY, candidates=list(recommended)))
        assert recommended == pytest.approx(reranked, abs=TOLERANCE)
        assert recommended != pytest.approx(plain, abs=TOLERANCE)

    async def test_the_settings_limit_a_thought(self, endless_settings: Settings):
        for change, end in (({"think_max_tokens": 9}, "token_budget"), ({"think_max_seconds": 0.01}, "time_budget")):
            async with running(endless_settings.model_copy(update=change)) as service:
                assert (await service.recommend(history=HISTORY, reasoning="on"))["source"] == "model"
                assert thoughts(service.state.metrics) == {end: 1}

    async def test_the_metrics_tell_of_thoughts(self, endless_settings: Settings):
        async with thinking_service(endless_settings, ThinkingLimits(7, FOREVER_S)) as service:
            await service.recommend(history=HISTORY, reasoning="on")
            await service.recommend(history=HISTORY)
            text = (await service.http.get("/metrics")).text
        assert "sidrec_engine_think_tokens_total 7.0" in text
        assert 'sidrec_engine_thoughts_total{end="token_budget"} 1.0' in text
        assert 'sidrec_stage_seconds_count{stage="reasoning"} 1.0' in text
        assert 'sidrec_stage_seconds_count{stage="decode"} 2.0' in text

    @pytest.mark.parametrize(("path", "body"), ASKED)
    async def test_a_bundle_that_cannot_think_refuses(self, instant_service: Service, path: str, body: dict[str, Any]):
        for headers in ({}, {"accept": "text/event-stream"}):
            response = await instant_service.post(path, {**body, "reasoning": "on"}, **headers)
            (error,) = assert_problem(response, 422, "invalid-request")["errors"]
            assert error["path"] == "body.reasoning"

    async def test_nobody_known_needs_no_thought(self, thinking: Service):
        answer = await thinking.recommend(reasoning="on", include_rationale=True)
        assert (answer["reason"], answer["rationale"]) == ("cold_start", None)


class TestDeadline:
    """A thought takes what the deadline leaves, and no more."""

    @pytest.mark.parametrize(("path", "body"), ASKED)
    async def test_a_thought_is_cut_so_that_the_model_still_answers(
        self, endless_settings: Settings, path: str, body: dict[str, Any]
    ):
        async with thinking_service(endless_settings, ThinkingLimits(5_000, FOREVER_S)) as service:
            asked = {**body, "reasoning": "on", "include_rationale": True, "deadline_ms": 1_500}
            for _ in range(3):
                start = time.perf_counter()
                answer = (await service.post(path, asked)).json()
                assert time.perf_counter() - start < 1.5
                assert (answer["source"], answer["reason"]) == ("model", None)
                assert answer["timings_ms"]["reasoning"] > 500
            assert thoughts(service.state.metrics) == {"time_budget": 3}

    async def test_only_a_late_beam_leaves_the_answer_to_the_fallback(self, endless_settings: Settings):
        async with thinking_service(endless_settings, None, slow(30.0)) as service:
            answer = await service.recommend(
                history=HISTORY, reasoning="on", include_rationale=True, deadline_ms=150, num_items=7
            )
        assert (answer["source"], answer["reason"], answer["rationale"]) == ("fallback", "deadline", None)
        assert len(answer["items"]) == 7

    async def test_a_failing_engine_leaves_it_to_the_fallback_too(self, endless_settings: Settings):
        async with thinking_service(endless_settings, None, failing()) as service:
            answer = await service.recommend(history=HISTORY, reasoning="on", include_rationale=True)
        assert (answer["source"], answer["reason"], answer["rationale"]) == ("fallback", "engine_unavailable", None)

    async def test_what_is_kept_for_the_beam_is_learnt(self, endless_settings: Settings):
        """0.1 s are kept at first, twice as much each time that an answer is late: enough for 0.25 s the third time."""
        async with thinking_service(
            endless_settings, None, lambda bundle, _settings, _metrics: ThinkingEngine(bundle, beam_s=0.25)
        ) as service:
            asked = {"history": HISTORY, "reasoning": "on", "deadline_ms": 1_000}
            answers = [(await service.post("/recommend", asked)).json() for _ in range(8)]
        reasons = [answer["reason"] for answer in answers]
        assert reasons[:2] == ["deadline", "deadline"]
        assert set(reasons[2:]) == {None}
        assert answers[-1]["timings_ms"]["reasoning"] > 300


class ThinkingEngine(InstantEngine):
    """Thinks for as long as it may, and then needs `beam_s`."""

    def __init__(self, bundle: Bundle, beam_s: float) -> None:
        super().__init__(bundle)
        self._beam_s = beam_s

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """What the instant engine gives, after a thought of nothing."""
        think_s = sum(step.max_seconds for step in request.program if isinstance(step, Think))
        await asyncio.sleep(think_s + self._beam_s)
        return replace(await super().decode(request), think_s=think_s, thought_end="time_budget")
