"""The local engine by itself: batches, cancellation, failures, and an event loop that stays free."""

import asyncio
import gc
import os
import signal
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semantic_ids.bundle import Bundle, publish
from semantic_ids.catalog_changes import CatalogItem, ItemChanges
from semantic_ids.filters import ItemFilter, RankBitmap
from semantic_ids.prompt import History
from service.engine.base import (
    Code,
    DecodeRequest,
    DecodeResult,
    EngineError,
    EngineUnavailableError,
    Forced,
    StepProgram,
    Think,
    UnsupportedProgramError,
    sid_program,
)
from service.engine.local import LocalEngine, LocalEngineConfig
from service.metrics import Metrics
from service.settings import Settings
from tests.service.running import running
from tests.service.world import ITEM_IDS, MAX_HISTORY, NUM_ITEMS, SPACE, VOCABULARY, make_parts

TOLERANCE = 1e-4


@asynccontextmanager
async def started(bundle: Bundle, **config: Any) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(bundle, LocalEngineConfig(**config), Metrics())
    await engine.start()
    yield engine
    await engine.stop()


def request(
    bundle: Bundle,
    history: Sequence[int] = (0, 50, 100),
    *,
    item_filter: ItemFilter | None = None,
    width: int = 10,
    program: StepProgram | None = None,
) -> DecodeRequest:
    return DecodeRequest(
        bundle.renderer.render(History.of(bundle.catalog, history)).token_ids,
        item_filter or ItemFilter.of(NUM_ITEMS),
        width,
        sid_program(SPACE) if program is None else program,
        bundle.catalog_id,
    )


def random_request(bundle: Bundle, rng: np.random.Generator) -> DecodeRequest:
    return request(
        bundle,
        rng.integers(0, NUM_ITEMS, rng.integers(0, MAX_HISTORY + 1)).tolist(),
        item_filter=ItemFilter.of(NUM_ITEMS, deny=rng.integers(0, NUM_ITEMS, rng.integers(0, 200))),
        width=int(rng.integers(1, 120)),
    )


async def made_anew(engine: LocalEngine, old_pid: int) -> None:
    """Wait until another process than the killed one decodes."""
    async with asyncio.timeout(20):
        while engine.problem is not None or engine.pid in (None, old_pid):  # noqa: ASYNC110 - no event says so
            await asyncio.sleep(0.01)


async def killed_and_made_anew(engine: LocalEngine) -> None:
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await made_anew(engine, pid)


def assert_same(one: DecodeResult, other: DecodeResult) -> None:
    assert one.ranks.tolist() == other.ranks.tolist()
    np.testing.assert_allclose(one.scores, other.scores, atol=TOLERANCE)


async def test_a_crowd_gets_the_answers_that_each_gets_alone(bundle: Bundle):
    rng = np.random.default_rng(1)
    requests = [random_request(bundle, rng) for _ in range(60)]
    async with started(bundle) as engine:
        alone = [await engine.decode(one) for one in requests]
        for one, crowded in zip(alone, await asyncio.gather(*map(engine.decode, requests)), strict=True):
            assert_same(one, crowded)


@pytest.mark.parametrize("prompt_cache_mb", [1, 0])
async def test_a_returning_user_pays_for_the_new_item_alone(bundle: Bundle, prompt_cache_mb: int):
    metrics = Metrics()

    async def tokens(*requests: DecodeRequest) -> tuple[float, ...]:
        before = [value(source) for source in ("cached", "computed")]
        await asyncio.gather(*map(engine.decode, requests))
        return tuple(value(source) - old for source, old in zip(("cached", "computed"), before, strict=True))

    def value(source: str) -> float:
        return metrics.registry.get_sample_value("sidrec_engine_prompt_tokens_total", {"from": source}) or 0.0

    history = [11, 140, 17, 90, 31, 77, 4, 60]
    one, more = request(bundle, history[:-1]), request(bundle, history)
    engine = LocalEngine(bundle, LocalEngineConfig(prompt_cache_mb=prompt_cache_mb), metrics)
    await engine.start()
    try:
        num_one, num_more = len(one.prompt), len(more.prompt)
        assert await tokens(one) == (0, num_one)
        if prompt_cache_mb == 0:
            assert await tokens(one, more) == (0, num_one + num_more)
            return
        assert await tokens(one) == (num_one, 0)
        assert await tokens(more) == (num_one, num_more - num_one)
        await killed_and_made_anew(engine)
        assert await tokens(more) == (0, num_more), "kept in the process that died"
    finally:
        await engine.stop()


async def test_a_crowd_shares_batches_of_at_most_the_maximum(bundle: Bundle):
    metrics = Metrics()
    engine = LocalEngine(bundle, LocalEngineConfig(max_batch=8), metrics)
    await engine.start()
    sample = metrics.registry.get_sample_value
    await asyncio.gather(*(engine.decode(request(bundle)) for _ in range(40)))
    assert sample("sidrec_engine_batch_size_sum") == 41  # with the canary
    assert sample("sidrec_engine_batch_size_bucket", {"le": "8.0"}) == sample("sidrec_engine_batch_size_count")
    batches = sample("sidrec_engine_batch_size_count")
    assert batches is not None
    assert batches <= 7
    await engine.stop()


async def test_the_result_tells_what_was_waited_and_what_was_worked(bundle: Bundle):
    async with started(bundle, max_batch=1) as engine:
        results = await asyncio.gather(*(engine.decode(request(bundle)) for _ in range(5)))
    assert all(result.decode_s > 0 for result in results)
    assert results[-1].queue_s > results[0].queue_s


async def test_answers_hold_every_eligible_item_of_a_wide_search(bundle: Bundle):
    only = ItemFilter.of(NUM_ITEMS, allow=np.array([3, 77, 120]))
    async with started(bundle) as engine:
        result = await engine.decode(request(bundle, item_filter=only))
    assert sorted(result.ranks.tolist()) == [3, 77, 120]


async def test_a_cancelled_request_gives_its_place_up(bundle: Bundle):
    async with started(bundle, max_batch=1) as engine:
        waiting = [asyncio.ensure_future(engine.decode(request(bundle))) for _ in range(20)]
        await asyncio.sleep(0)
        num_waiting = engine.num_waiting
        for place in (15, 17):
            waiting[place].cancel()
        await asyncio.gather(waiting[15], waiting[17], return_exceptions=True)
        assert engine.num_waiting <= num_waiting - 2
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [place for place, result in enumerate(results) if isinstance(result, BaseException)] == [15, 17]
        assert engine.num_waiting == 0


async def test_a_request_cancelled_within_its_batch_disturbs_nobody(bundle: Bundle):
    async with started(bundle, max_batch=8) as engine:
        batch = [asyncio.ensure_future(engine.decode(request(bundle))) for _ in range(8)]
        while engine.num_waiting == 0:  # noqa: ASYNC110 - one turn of the loop queues them all
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        batch[3].cancel()
        results = await asyncio.gather(*batch, return_exceptions=True)
        assert isinstance(results[3], asyncio.CancelledError)
        assert sum(isinstance(result, DecodeResult) for result in results) == 7
        assert isinstance(await engine.decode(request(bundle)), DecodeResult)


async def test_stop_answers_the_running_batch_and_fails_the_waiting(bundle: Bundle):
    engine = LocalEngine(bundle, LocalEngineConfig(max_batch=1), Metrics())
    await engine.start()
    waiting = [asyncio.ensure_future(engine.decode(request(bundle))) for _ in range(20)]
    await asyncio.sleep(0.002)
    await engine.stop()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    answered = [result for result in results if isinstance(result, DecodeResult)]
    refused = [result for result in results if isinstance(result, EngineUnavailableError)]
    assert answered
    assert refused
    assert len(answered) + len(refused) == 20
    assert engine.problem is not None
    with pytest.raises(EngineUnavailableError, match="not running"):
        await engine.decode(request(bundle))
    await engine.stop()


async def test_a_stopped_engine_and_its_bundle_and_process_go_at_once(bundles: Path):
    """Nothing of it waits for a full collection: each activation would leave open files behind."""
    bundle: Bundle | None = Bundle.load_current(bundles)
    assert bundle is not None
    async with started(bundle) as engine:
        await engine.decode(request(bundle))
        kept = [weakref.ref(one) for one in (engine, bundle, bundle.catalog.trie)]
        pid = engine.pid
    gc.disable()
    try:
        del engine
        bundle = None
        await asyncio.sleep(0)
        assert [one() for one in kept] == [None] * len(kept)
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        gc.enable()


async def test_a_killed_process_fails_its_batch_alone_and_is_made_anew(bundle: Bundle):
    async with started(bundle, max_batch=1) as engine:
        expected = await engine.decode(request(bundle))
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        caught = asyncio.ensure_future(engine.decode(request(bundle)))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineUnavailableError, match="died while it worked"):
            await caught
        assert engine.problem is not None
        with pytest.raises(EngineUnavailableError):
            await engine.decode(request(bundle))
        await made_anew(engine, pid)
        assert_same(await engine.decode(request(bundle)), expected)


async def test_a_process_that_hangs_is_killed_and_made_anew(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    async with started(bundle) as engine:
        pid = engine.pid
        assert pid is not None
        monkeypatch.setattr("service.engine.local.HANG_S", 0.2)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineUnavailableError, match="hung"):
            await engine.decode(request(bundle))
        monkeypatch.setattr("service.engine.local.HANG_S", 60.0)
        await made_anew(engine, pid)
        assert isinstance(await engine.decode(request(bundle)), DecodeResult)


async def test_a_new_process_knows_the_epochs_of_the_old_one(bundle: Bundle):
    item = CatalogItem("new", "New", (), tuple(bundle.catalog.codes[0].tolist()))
    later = replace(bundle, catalog=bundle.catalog.with_changes(ItemChanges((item,), frozenset(), 1)))
    asked = replace(request(bundle), catalog_id=later.catalog_id, item_filter=ItemFilter.of(len(later.catalog)))
    async with started(bundle) as engine:
        await engine.use_catalog(later)
        expected = await engine.decode(asked)
        await killed_and_made_anew(engine)
        assert_same(await engine.decode(asked), expected)
        await engine.retire_catalog(later.catalog_id)
        with pytest.raises(EngineError, match="the engine has"):
            await engine.decode(asked)


async def test_a_category_bitmap_is_sent_once_and_again_to_a_new_process(bundle: Bundle):
    bitmap = RankBitmap.of(np.arange(NUM_ITEMS) % 3 == 0)
    filtered = request(bundle, item_filter=ItemFilter.of(NUM_ITEMS, bitmap=bitmap), width=NUM_ITEMS)
    metrics = Metrics()
    engine = LocalEngine(bundle, LocalEngineConfig(), metrics)
    await engine.start()

    def unknown() -> float:
        return metrics.registry.get_sample_value("sidrec_engine_request_errors_total", {"kind": "unknown_bitmap"}) or 0

    for _ in range(2):
        result = await engine.decode(filtered)
        assert sorted(result.ranks.tolist()) == list(range(0, NUM_ITEMS, 3))
    assert unknown() == 0  # what is mended is no error
    await killed_and_made_anew(engine)
    assert sorted((await engine.decode(filtered)).ranks.tolist()) == list(range(0, NUM_ITEMS, 3))
    await engine.stop()


async def test_before_its_start_it_is_not_ready_and_refuses(bundle: Bundle):
    engine = LocalEngine(bundle, LocalEngineConfig(), Metrics())
    assert engine.problem is not None
    with pytest.raises(EngineUnavailableError, match="not running"):
        await engine.decode(request(bundle))
    await engine.stop()
    async with started(bundle) as running_engine:
        assert running_engine.problem is None


async def test_a_request_that_fails_does_not_take_its_batch_down(bundle: Bundle):
    bad = replace(request(bundle), prompt=np.array([1, VOCABULARY.vocab_size + 7]))
    async with started(bundle) as engine:
        expected = await engine.decode(request(bundle))
        crowd = [request(bundle)] * 5 + [bad] + [request(bundle)] * 5
        results = await asyncio.gather(*map(engine.decode, crowd), return_exceptions=True)
        failure = results.pop(5)
        assert isinstance(failure, EngineUnavailableError)
        assert str(failure) == "internal: decoding failed: IndexError"
        for result in results:
            assert isinstance(result, DecodeResult)
            assert_same(result, expected)
        assert engine.problem is None


@pytest.mark.parametrize(
    "program",
    [
        (),
        (Code(0), Code(1)),
        (Code(1), Code(0), Code(2)),
        (Code(0), Code(1), Code(2), Code(2)),
        (Code(0), Code(1), Code(2), Forced((1,))),
        (Code(0), Think(10, 1.0, (5,)), Code(1), Code(2)),
        (Think(10, 1.0, (5,)), Think(10, 1.0, (5,)), Code(0), Code(1), Code(2)),
    ],
)
async def test_a_program_that_it_cannot_run_is_refused(bundle: Bundle, program: StepProgram):
    async with started(bundle) as engine:
        with pytest.raises(UnsupportedProgramError):
            await engine.decode(request(bundle, program=program))
        assert isinstance(await engine.decode(request(bundle)), DecodeResult)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"catalog_id": "another@1"}, "another@1"),
        ({"item_filter": ItemFilter.of(NUM_ITEMS, allow=np.empty(0, np.int64))}, "no item"),
        ({"prompt": np.empty(0, np.int64)}, "prompt of 0 tokens"),
        ({"width": 0}, "width of 0"),
    ],
)
async def test_what_would_fail_a_batch_is_refused_alone(bundle: Bundle, change: dict[str, Any], message: str):
    async with started(bundle) as engine:
        with pytest.raises(EngineError, match=message):
            await engine.decode(replace(request(bundle), **change))


async def test_forced_tokens_are_as_if_they_ended_the_prompt_and_score_nothing(bundle: Bundle):
    plain = request(bundle)
    forced = replace(plain, program=(Forced((2,)), Forced((5, 2)), *plain.program))
    as_prompt = replace(plain, prompt=np.append(plain.prompt, [2, 5, 2]))
    async with started(bundle) as engine:
        results = await asyncio.gather(*map(engine.decode, (forced, as_prompt, plain)))
    assert_same(results[0], results[1])
    assert results[0].ranks.tolist() != results[2].ranks.tolist()


async def test_requests_of_different_programs_may_come_together(bundle: Bundle):
    plain = request(bundle)
    between = replace(plain, program=(Code(0), Forced((2,)), Code(1), Code(2)))
    async with started(bundle) as engine:
        alone = [await engine.decode(plain), await engine.decode(between)]
        together = await asyncio.gather(*map(engine.decode, [plain, between] * 6))
    for place, result in enumerate(together):
        assert_same(result, alone[place % 2])


async def test_a_model_without_finite_scores_fails_its_canary(tmp_path: Path):
    broken = publish(tmp_path, make_parts(tmp_path / "parts", weight=float("nan")), lambda bundle: None)
    engine = LocalEngine(broken, LocalEngineConfig(), Metrics())
    with pytest.raises(EngineError, match="canary"):
        await engine.start()
    assert engine.problem is not None
    await engine.stop()


async def test_bfloat16_ranks_nearly_alike(bundle: Bundle):
    wide = request(bundle, width=500)
    async with started(bundle) as exact, started(bundle, dtype="bfloat16") as rough:
        one, other = await exact.decode(wide), await rough.decode(wide)
    assert set(one.ranks) == set(other.ranks)
    assert len(set(one.ranks[:20]) & set(other.ranks[:20])) >= 15


async def test_the_event_loop_stays_free_while_it_decodes(settings: Settings):
    async with running(settings) as service:
        worst = min([await _worst_lag_of_fifty_requests(service.recommend) for _ in range(3)])
    # of three rounds the best: a machine that is busy elsewhere is not what is measured
    assert worst < 0.1


async def _worst_lag_of_fifty_requests(recommend: Any) -> float:
    lags: list[float] = []

    async def measure() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - start - 0.001)

    measuring = asyncio.ensure_future(measure())
    history = list(ITEM_IDS[:MAX_HISTORY])
    requests = []
    for _ in range(50):
        requests.append(asyncio.ensure_future(recommend(history=history, num_items=100)))
        await asyncio.sleep(0.002)  # 50 clients that start within one turn of the loop would be measured themselves
    answers = await asyncio.gather(*requests)
    measuring.cancel()
    assert {answer["source"] for answer in answers} == {"model"}
    assert len(lags) > 20
    return max(lags)
