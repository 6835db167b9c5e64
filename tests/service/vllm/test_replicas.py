"""Supervision, routing and swaps of the vLLM engine, against scripted processes: no vLLM, no model, no waiting."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semantic_ids.bundle import Bundle
from semantic_ids.catalog_changes import ItemChanges
from semantic_ids.filters import ItemFilter, RankBitmap
from service.engine import vllm_engine as module
from service.engine.base import (
    DecodeRequest,
    DecodeResult,
    EngineError,
    EngineUnavailableError,
    Think,
    sid_program,
)
from service.engine.vllm_engine import AFFINITY_TOKENS, VllmEngine, VllmEngineConfig, affinity
from service.engine.wire import ErrorKind
from service.metrics import Metrics
from tests.service.thinking import CLOSE
from tests.service.vllm.bundles import with_continuous_steps, with_other_catalog
from tests.service.vllm.fake_llm import BABBLE, MAX_MODEL_LEN, FakeLLM, FakeProcesses, Hold
from tests.service.world import NUM_ITEMS, SPACE

NUM_OTHER_ITEMS = 40
PATIENCE_S = 4.0
"""Nothing here takes a tenth of it on an idle machine; what hangs fails after it."""
POLL_S = module._POLL_S
DIED = "the vLLM engine died and is being restarted"


@pytest.fixture(scope="module")
def other_bundle(vllm_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Another catalogue, the same model."""
    return with_other_catalog(vllm_bundle, tmp_path_factory.mktemp("other"), NUM_OTHER_ITEMS)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeProcesses]:
    """In place of vLLM's."""
    found = FakeProcesses()
    monkeypatch.setattr(module, "_make_llm", found.make)
    monkeypatch.setattr(module, "check_installation", lambda: None)
    monkeypatch.setattr(module, "_FIRST_BACK_OFF_S", 0.01)
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    yield found
    found.may_start.set()


class Stand:
    """An engine on scripted processes."""

    def __init__(self, bundle: Bundle, processes: FakeProcesses, **config: Any) -> None:
        self.metrics = Metrics()
        self.engine = VllmEngine(bundle, VllmEngineConfig(**config), self.metrics)
        self.processes = processes
        self._tasks: list[asyncio.Task[Any]] = []

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run it beside the test; it must have ended when the engine has."""
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    def ask(self, request: DecodeRequest) -> asyncio.Task[DecodeResult]:
        """Decode beside the test."""
        return self.spawn(self.engine.decode(request))

    async def ready(self) -> None:
        """Until every replica takes requests."""
        await eventually(lambda: all(one.problem is None for one in self.engine._replicas))

    def counted(self, name: str, **labels: str) -> float | None:
        """A sample of the metrics."""
        return self.metrics.registry.get_sample_value(f"sidrec_engine_{name}", labels)

    async def stop(self) -> None:
        """Stop; whatever is still under way is ended."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self.engine.stop()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def standing(bundle: Bundle, processes: FakeProcesses, **config: Any) -> AsyncIterator[Stand]:
    """Started; and stopped without leaving a task, an unheard error or a process."""
    loop, before, complaints = asyncio.get_running_loop(), asyncio.all_tasks(), []
    loop.set_exception_handler(lambda _loop, context: complaints.append(context))
    stand = Stand(bundle, processes, **config)
    try:
        await stand.engine.start()
        yield stand
    finally:
        processes.may_start.set()
        await stand.stop()
    await settled()
    assert asyncio.all_tasks() <= before
    assert complaints == []
    assert [llm.num_shutdowns for llm in processes.made] == [1] * len(processes.made)


async def eventually(happens: Callable[[], bool]) -> None:
    """Until it does; for what goes on in threads and of what nobody tells."""
    async with asyncio.timeout(PATIENCE_S):
        while not happens():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def settled() -> None:
    """Until every task that can go on has come to where it must wait."""
    for _ in range(50):
        await asyncio.sleep(0)


async def refused(task: asyncio.Task[DecodeResult]) -> EngineError:
    """What a request was refused with."""
    with pytest.raises(EngineError) as caught:
        async with asyncio.timeout(PATIENCE_S):
            await task
    return caught.value


def request(bundle: Bundle, number: int = 0, **changed: Any) -> DecodeRequest:
    """One of as many different prompts as there are numbers, too short to think of more than its head."""
    everything = ItemFilter.of(len(bundle.catalog))
    plain = DecodeRequest(np.full(20, number), everything, 5, sid_program(SPACE), bundle.catalog_id)
    return replace(plain, **changed)


def request_for(replica: int, replicas: int, bundle: Bundle, number: int = 0, **changed: Any) -> DecodeRequest:
    """A request whose prompt belongs to a replica; the same head for all numbers."""
    for token in range(1000):
        head = np.full(AFFINITY_TOKENS, token)
        if max(range(replicas), key=lambda number: affinity(head, number)) == replica:
            return request(bundle, prompt=np.append(head, [number]), **changed)
    raise AssertionError("no such head")


def thinking(plain: DecodeRequest, max_tokens: int = 20, max_seconds: float = 60.0) -> DecodeRequest:
    """The same request with a thought before its codes."""
    return replace(plain, program=(Think(max_tokens, max_seconds, CLOSE), *plain.program))


def prompt_of(asked: DecodeRequest, thought: Sequence[int] | None = None) -> list[int]:
    """What is prefilled."""
    return [*asked.prompt.tolist(), *([] if thought is None else [*thought, *CLOSE])]


# ── routing ──


async def test_the_same_head_goes_to_the_same_replica(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        for number in range(5):
            for replica in (0, 1):
                asked = request_for(replica, 2, vllm_bundle, number)
                await stand.engine.decode(asked)
                assert processes.answered(asked.prompt.tolist()) == [(replica, vllm_bundle.catalog_id)]


async def test_a_clearly_busier_replica_is_avoided(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        hold = processes.made[0].hold("sid_beam")
        asked = [request_for(0, 2, vllm_bundle, number) for number in range(3)]
        one = stand.ask(asked[0])
        await hold.arrived()
        two = stand.ask(asked[1])  # one more than the other has is no reason to leave the prefix behind
        await settled()
        await stand.engine.decode(asked[2])
        hold.release()
        await asyncio.gather(one, two)
        assert [processes.answered(each.prompt.tolist())[0][0] for each in asked] == [0, 0, 1]


async def test_a_dead_replica_is_avoided_while_the_other_answers(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        processes.may_start.clear()
        processes.made[0].kill()
        for number in range(3):
            asked = request_for(0, 2, vllm_bundle, number)
            await stand.engine.decode(asked)
            assert processes.answered(asked.prompt.tolist()) == [(1, vllm_bundle.catalog_id)]
            assert stand.engine.problem is None


async def test_no_request_is_taken_while_every_replica_is_dead(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        processes.may_start.clear()
        for llm in processes.made[:2]:
            llm.kill()
        for _ in range(2):  # as soon as it is dead, and when that was noticed
            assert stand.engine.problem == DIED
            with pytest.raises(EngineUnavailableError, match=DIED):
                await stand.engine.decode(request(vllm_bundle))
            await eventually(lambda: all(llm.num_shutdowns for llm in processes.made))
        processes.may_start.set()
        await stand.ready()
        assert len((await stand.engine.decode(request(vllm_bundle))).ranks) == 5


# ── death ──


async def test_a_beam_that_is_never_answered_ends_with_its_process(
    vllm_bundle: Bundle, processes: FakeProcesses, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_POLL_S", POLL_S)
    async with standing(vllm_bundle, processes) as stand:
        first = processes.made[0]
        hold = first.hold("sid_beam")
        under_way = [stand.ask(request(vllm_bundle, number)) for number in range(3)]
        await hold.arrived()
        first.kill()
        async with asyncio.timeout(0.5):
            errors = await asyncio.gather(*under_way, return_exceptions=True)
        assert [type(error) for error in errors] == [EngineUnavailableError] * 3
        await stand.ready()
        assert stand.counted("restarts_total") == 1
        assert len((await stand.engine.decode(request(vllm_bundle))).ranks) == 5
        assert len(processes.made) == 2


@pytest.mark.parametrize("point", ["think", "prefill"])
async def test_what_generates_hears_of_the_death(vllm_bundle: Bundle, processes: FakeProcesses, point: str):
    async with standing(vllm_bundle, processes) as stand:
        hold = processes.made[0].hold(point)
        under_way = stand.ask(thinking(request(vllm_bundle)))
        await hold.arrived()
        processes.made[0].kill()
        assert isinstance(await refused(under_way), EngineUnavailableError)
        await stand.ready()
        assert (await stand.engine.decode(thinking(request(vllm_bundle)))).thought == (BABBLE,) * 20


@pytest.mark.parametrize("point", ["sid_load", "prefill", "sid_check", "think", "sid_beam"])
async def test_a_process_that_dies_while_it_is_checked_is_made_again(
    vllm_bundle: Bundle, processes: FakeProcesses, point: str
):
    def dies(llm: FakeLLM) -> None:
        llm.deadly = point

    processes.scripts[1] = dies
    async with standing(vllm_bundle, processes) as stand:
        processes.made[0].kill()
        await stand.ready()
        assert len(processes.made) == 3
        assert stand.counted("restarts_total") == 1


@pytest.mark.parametrize("point", ["sid_load", "prefill", "sid_beam"])
async def test_a_process_that_dies_at_the_first_start_is_an_error(
    vllm_bundle: Bundle, processes: FakeProcesses, point: str
):
    def dies(llm: FakeLLM) -> None:
        llm.deadly = point

    processes.scripts[0] = dies
    with pytest.raises(EngineError):
        async with asyncio.timeout(PATIENCE_S), standing(vllm_bundle, processes):
            pass


@pytest.mark.parametrize("point", ["prefill", "sid_check", "think", "sid_beam"])
async def test_whatever_a_check_fails_with_the_restart_is_tried_again(
    vllm_bundle: Bundle, processes: FakeProcesses, point: str
):
    processes.scripts[1] = lambda llm: llm.failures.update({point: ValueError("vLLM's own")})
    async with standing(vllm_bundle, processes) as stand:
        processes.made[0].kill()
        await stand.ready()
        assert len(processes.made) == 3


async def test_restarts_that_fail_are_tried_again_after_growing_pauses(
    vllm_bundle: Bundle, processes: FakeProcesses, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_FIRST_BACK_OFF_S", 0.05)
    monkeypatch.setattr(module, "_MAX_BACK_OFF_S", 0.1)
    async with standing(vllm_bundle, processes) as stand:
        processes.errors.extend(RuntimeError(f"no memory, {number}") for number in range(4))
        processes.made[0].kill()
        text = "the vLLM engine does not restart: vLLM did not start: no memory, 0"
        await eventually(lambda: stand.engine.problem == text)
        with pytest.raises(EngineUnavailableError, match="no memory, 0"):
            await stand.engine.decode(request(vllm_bundle))
        await stand.ready()
        pauses = np.diff(processes.tries_at[1:])
        assert (pauses >= [0.05, 0.1, 0.1, 0.1]).all()
        assert pauses[3] < 0.4  # 0.05 * 2**3, were it not for the ceiling
        assert stand.counted("restarts_total") == 1
        await stand.engine.decode(request(vllm_bundle))


# ── swap ──


async def test_while_one_replica_is_swapped_the_other_answers(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        hold = processes.made[0].hold("sid_swap")
        swap = stand.spawn(stand.engine.swap(other_bundle))
        await hold.arrived()
        asked = [request_for(replica, 2, vllm_bundle, 0) for replica in (0, 1)]
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*map(stand.engine.decode, asked))
        hold.release()
        await swap
        for each in asked:
            assert processes.answered(each.prompt.tolist()) == [(1, vllm_bundle.catalog_id)]


async def test_during_a_swap_each_bundle_is_answered_by_the_replica_that_has_it(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes, replicas=3) as stand:
        hold = processes.made[1].hold("sid_swap")
        swap = stand.spawn(stand.engine.swap(other_bundle))
        await hold.arrived()
        for number in range(6):
            old, new = request(vllm_bundle, number), request(other_bundle, 100 + number)
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(stand.engine.decode(old), stand.engine.decode(new))
            assert processes.answered(old.prompt.tolist()) == [(2, vllm_bundle.catalog_id)]
            assert processes.answered(new.prompt.tolist()) == [(0, other_bundle.catalog_id)]
        hold.release()
        await swap


async def test_a_bundle_with_continuous_steps_is_not_swapped_in_and_the_old_one_goes_on(
    vllm_bundle: Bundle, processes: FakeProcesses, tmp_path: Path
):
    continuous = with_continuous_steps(vllm_bundle, tmp_path)
    async with standing(vllm_bundle, processes) as stand:
        with pytest.raises(EngineError, match=f"{continuous.bundle_id} has prompt version 5: its thinking steps are"):
            await stand.engine.swap(continuous)
        await stand.engine.decode(request(vllm_bundle))


async def test_after_a_swap_requests_of_the_old_bundle_are_refused_by_name(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        await stand.engine.swap(other_bundle)
        for replica in (0, 1):
            old, new = (request_for(replica, 2, one, 0) for one in (vllm_bundle, other_bundle))
            error = await refused(stand.ask(old))
            assert not isinstance(error, EngineUnavailableError)
            assert vllm_bundle.catalog_id in str(error)
            assert other_bundle.catalog_id in str(error)
            await stand.engine.decode(new)
            assert processes.answered(new.prompt.tolist()) == [(replica, other_bundle.catalog_id)]


async def test_a_request_that_waits_at_the_gate_is_answered_from_its_own_bundle_or_refused(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes) as stand:
        hold = processes.made[0].hold("sid_swap")
        swap = stand.spawn(stand.engine.swap(other_bundle))
        await hold.arrived()
        old, new = request(vllm_bundle, 1), request(other_bundle, 2)
        waiting, early = stand.ask(old), stand.ask(new)
        await settled()
        assert stand.engine.num_waiting == 2
        hold.release()
        await swap
        assert vllm_bundle.catalog_id in str(await refused(waiting))
        await early
        assert processes.answered(old.prompt.tolist()) == []
        assert processes.answered(new.prompt.tolist()) == [(0, other_bundle.catalog_id)]


@pytest.mark.parametrize("thinks", [False, True])
async def test_a_request_that_waits_for_a_place_when_a_swap_begins_is_never_answered_from_the_new_bundle(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses, thinks: bool
):
    async with standing(vllm_bundle, processes, max_in_engine=1) as stand:
        hold = processes.made[0].hold("sid_beam")
        inside = stand.ask(request(vllm_bundle, 1))
        await hold.arrived()
        asked = thinking(request(vllm_bundle, 2)) if thinks else request(vllm_bundle, 2)
        waiting = stand.ask(asked)
        await settled()
        swap = stand.spawn(stand.engine.swap(other_bundle))
        await settled()
        hold.release()
        await inside
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait((waiting,))
            await swap
        prompt = prompt_of(asked, (BABBLE,) * 20 if thinks else None)
        if (error := waiting.exception()) is None:
            assert processes.answered(prompt) == [(0, vllm_bundle.catalog_id)]
        else:
            assert vllm_bundle.catalog_id in str(error)
            assert processes.answered(prompt) == []


async def test_a_swap_waits_for_what_is_inside(vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        llm = processes.made[0]
        thought, beam = llm.hold("think", after=3), llm.hold("sid_beam")
        asked = [request(vllm_bundle, 1), thinking(request(vllm_bundle, 2))]
        inside = [stand.ask(each) for each in asked]
        await thought.arrived()
        await beam.arrived()
        swap = stand.spawn(stand.engine.swap(other_bundle))
        for hold in (thought, beam):
            await settled()
            assert llm.calls["pause_generation"] == llm.calls["sid_swap"] == 0
            hold.release()
        await asyncio.gather(*inside)
        await swap
        assert llm.catalog_ids == [vllm_bundle.catalog_id, other_bundle.catalog_id]
        assert processes.answered(prompt_of(asked[1], (BABBLE,) * 20)) == [(0, vllm_bundle.catalog_id)]


def cannot_swap(llm: FakeLLM) -> None:
    """The worker refuses the new weights."""
    llm.failures["sid_swap"] = ValueError("a tensor is missing")


def cannot_forget(llm: FakeLLM) -> None:
    """The prefix cache is in use."""
    llm.can_forget = False


def dies_when_paused(llm: FakeLLM) -> None:
    """And does not say so to whom it owes the pause."""
    llm.deadly = "pause_generation"


def dies_when_swapped(llm: FakeLLM) -> None:
    """Out of memory."""
    llm.deadly = "sid_swap"


def dies_when_resumed(llm: FakeLLM) -> None:
    """With the new weights already in place."""
    llm.deadly = "resume_generation"


@pytest.mark.parametrize("fault", [cannot_swap, cannot_forget, dies_when_paused, dies_when_swapped, dies_when_resumed])
async def test_a_swap_that_fails_on_the_second_replica_leaves_all_on_the_old_bundle(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses, fault: Callable[[FakeLLM], None]
):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        fault(processes.made[1])
        with pytest.raises(EngineError):
            async with asyncio.timeout(PATIENCE_S):
                await stand.engine.swap(other_bundle)
        first = processes.made[0]
        assert first.catalog_ids == [one.catalog_id for one in (vllm_bundle, other_bundle, vllm_bundle)]
        assert stand.engine.problem is None
        await stand.engine.decode(request_for(1, 2, vllm_bundle, 0))  # by the first, while the second restarts
        await stand.ready()
        assert [llm.bundle for llm in processes.made] == [vllm_bundle] * 3
        assert stand.counted("restarts_total") == 1
        for replica, process in ((0, 0), (1, 2)):
            asked = request_for(replica, 2, vllm_bundle, 1)
            await stand.engine.decode(asked)
            assert processes.answered(asked.prompt.tolist()) == [(process, vllm_bundle.catalog_id)]
        assert other_bundle.catalog_id in str(await refused(stand.ask(request(other_bundle))))


async def test_where_the_way_back_fails_as_well_new_processes_serve_the_old_bundle(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes, replicas=3) as stand:
        first, second, third = processes.made
        cannot_swap(third)
        hold = third.hold("sid_swap")
        swap = stand.spawn(stand.engine.swap(other_bundle))
        await hold.arrived()
        cannot_swap(first)
        hold.release()
        with pytest.raises(EngineError):
            await swap
        await stand.ready()
        assert second.catalog_ids[-1] == vllm_bundle.catalog_id
        assert [one.catalog_id for one in stand.engine._replicas] == [vllm_bundle.catalog_id] * 3


async def test_a_swap_that_is_cancelled_leaves_the_old_bundle(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        hold = processes.made[1].hold("sid_swap")
        swap = stand.spawn(stand.engine.swap(other_bundle))
        await hold.arrived()
        swap.cancel()
        with pytest.raises(asyncio.CancelledError):
            await swap
        await settled()
        await stand.ready()
        assert [one.catalog_id for one in stand.engine._replicas] == [vllm_bundle.catalog_id] * 2


async def test_a_swap_that_is_cancelled_while_it_waits_harms_nobody(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes) as stand:
        hold = processes.made[0].hold("sid_beam")
        inside = stand.ask(request(vllm_bundle))
        await hold.arrived()
        swap = stand.spawn(stand.engine.swap(other_bundle))
        await settled()
        swap.cancel()
        await settled()
        hold.release()
        assert len((await inside).ranks) == 5
        await stand.ready()
        await stand.engine.decode(request(vllm_bundle))
        assert len(processes.made) == 1


async def test_a_replica_that_dies_after_its_swap_restarts_with_the_new_bundle(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        hold = processes.made[1].hold("sid_swap")
        swap = stand.spawn(stand.engine.swap(other_bundle))
        await hold.arrived()
        processes.made[0].kill()
        await eventually(lambda: len(processes.made) == 3)
        hold.release()
        await swap
        await stand.ready()
        assert processes.made[2].bundle == other_bundle
        for replica in (0, 1):
            await stand.engine.decode(request_for(replica, 2, other_bundle))


@pytest.mark.parametrize("is_checked", [False, True], ids=["has no process", "is being checked"])
async def test_a_swap_while_a_replica_restarts_leaves_all_on_one_bundle(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses, is_checked: bool
):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        holds: list[Hold] = []
        if is_checked:
            processes.scripts[2] = lambda llm: holds.append(llm.hold("sid_check"))
        else:
            processes.may_start.clear()
        processes.made[1].kill()
        await eventually(lambda: len(processes.tries_at) == 3 and len(holds) == is_checked)
        for hold in holds:
            await hold.arrived()
        swap = stand.spawn(stand.engine.swap(other_bundle))
        await settled()
        processes.may_start.set()
        for hold in holds:
            hold.release()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait((swap,))
        error = swap.exception()
        await stand.ready()
        assert error is None or isinstance(error, EngineError)
        current = other_bundle if error is None else vllm_bundle
        assert [one.catalog_id for one in stand.engine._replicas] == [current.catalog_id] * 2
        for replica in (0, 1):
            await stand.engine.decode(request_for(replica, 2, current))
        assert stand.counted("restarts_total") == 1


async def test_a_second_swap_begins_when_the_first_has_ended(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes) as stand:
        llm = processes.made[0]
        hold = llm.hold("sid_swap")
        there = stand.spawn(stand.engine.swap(other_bundle))
        await hold.arrived()
        back = stand.spawn(stand.engine.swap(vllm_bundle))
        await settled()
        assert llm.calls["pause_generation"] == 1
        hold.release()
        await asyncio.gather(there, back)
        assert llm.catalog_ids[-1] == vllm_bundle.catalog_id
        await stand.engine.decode(request(vllm_bundle))


# ── stop ──


async def test_stopping_answers_what_is_inside_and_refuses_the_rest(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes, max_in_engine=1) as stand:
        hold = processes.made[0].hold("sid_beam")
        inside = stand.ask(request(vllm_bundle, 1))
        await hold.arrived()
        outside = [stand.ask(request(vllm_bundle, number)) for number in (2, 3)]
        await settled()
        stop = stand.spawn(stand.engine.stop())
        await settled()
        assert not inside.done()
        assert isinstance(await refused(stand.ask(request(vllm_bundle, 4))), EngineUnavailableError)
        hold.release()
        assert len((await inside).ranks) == 5
        for task in outside:
            assert str(await refused(task)) == "the vLLM engine has stopped"
        await stop
        with pytest.raises(EngineUnavailableError, match="has stopped"):
            await stand.engine.decode(request(vllm_bundle))
        assert stand.engine.problem == "the vLLM engine has stopped"
        assert processes.made[0].num_shutdowns == 1
        await settled()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_stopping_during_a_restart_leaves_no_process(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        processes.may_start.clear()
        processes.made[0].kill()
        await eventually(lambda: len(processes.tries_at) == 2)
        stop = stand.spawn(stand.engine.stop())
        await settled()
        processes.may_start.set()
        await stop
        await eventually(lambda: [llm.num_shutdowns for llm in processes.made] == [1, 1])


async def test_a_start_that_is_cancelled_leaves_no_process(vllm_bundle: Bundle, processes: FakeProcesses):
    processes.may_start.clear()
    stand = Stand(vllm_bundle, processes)
    start = stand.spawn(stand.engine.start())
    await eventually(lambda: len(processes.tries_at) == 1)
    start.cancel()
    await settled()
    processes.may_start.set()
    await asyncio.wait((start,), timeout=PATIENCE_S)
    await stand.stop()
    await eventually(lambda: [llm.num_shutdowns for llm in processes.made] == [1])


@pytest.mark.parametrize("point", ["think", "prefill", "sid_beam"])
async def test_a_process_that_dies_while_the_engine_stops_stays_down(
    vllm_bundle: Bundle, processes: FakeProcesses, point: str
):
    async with standing(vllm_bundle, processes) as stand:
        hold = processes.made[0].hold(point)
        inside = stand.ask(thinking(request(vllm_bundle)))
        await hold.arrived()
        stop = stand.spawn(stand.engine.stop())
        await settled()
        processes.made[0].kill()
        assert isinstance(await refused(inside), EngineUnavailableError)
        async with asyncio.timeout(PATIENCE_S):
            await stop
        assert len(processes.made) == 1
        with pytest.raises(EngineUnavailableError, match="has stopped"):
            await stand.engine.decode(request(vllm_bundle))


async def test_stopping_during_a_swap_ends_the_swap_and_refuses_what_waits_for_it(
    vllm_bundle: Bundle, other_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes) as stand:
        hold = processes.made[0].hold("sid_swap")
        swap = stand.spawn(stand.engine.swap(other_bundle))
        await hold.arrived()
        waiting = stand.ask(request(vllm_bundle))
        await settled()
        stop = stand.spawn(stand.engine.stop())
        await settled()
        hold.release()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(stop, swap, return_exceptions=True)
        assert isinstance(await refused(waiting), EngineError)


# ── bitmaps, errors ──


def with_bitmap(bundle: Bundle, number: int, bitmap: RankBitmap, **changed: Any) -> DecodeRequest:
    return request(bundle, number, item_filter=ItemFilter.of(NUM_ITEMS, bitmap=bitmap), **changed)


def every_third() -> RankBitmap:
    """A new object of the same content each time."""
    return RankBitmap.of(np.arange(NUM_ITEMS) % 3 == 0)


async def test_a_bitmap_is_sent_once(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        llm = processes.made[0]
        for number in range(3):
            result = await stand.engine.decode(with_bitmap(vllm_bundle, number, every_third()))
            assert result.ranks.tolist() == [0, 3, 6, 9, 12]
        assert llm.calls["sid_bitmap"] == 1
        assert llm.calls["sid_beam"] == 1 + (2 + 1 + 1)  # the canary's; asked again once
        assert stand.counted("request_errors_total", kind="unknown_bitmap") is None


async def test_a_restarted_process_is_sent_its_bitmaps_again(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        bitmap = every_third()
        await stand.engine.decode(with_bitmap(vllm_bundle, 0, bitmap))
        processes.made[0].kill()
        assert stand.engine.problem == DIED
        await stand.ready()
        assert len((await stand.engine.decode(with_bitmap(vllm_bundle, 1, bitmap))).ranks) == 5
        assert processes.made[1].calls["sid_bitmap"] == 1


async def in_one_batch(stand: Stand, requests: Sequence[DecodeRequest]) -> list[Any]:
    """The answers and errors of requests that gathered behind a beam that took its time."""
    llm = stand.processes.made[0]
    hold = llm.hold("sid_beam")
    slow = stand.ask(request(stand.engine._bundle, 999))
    await hold.arrived()
    tasks = [stand.ask(each) for each in requests]
    await settled()
    hold.release()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    await slow
    assert len(requests) in llm.batches
    return answers


# ── live epochs ──


def epoch_of(bundle: Bundle, number: int) -> Bundle:
    """The bundle without so many of its items."""
    gone = frozenset(bundle.catalog.item_ids[:number])
    return replace(bundle, catalog=bundle.catalog.with_changes(ItemChanges(deleted=gone, epoch=number)))


async def test_requests_of_one_moment_are_answered_each_from_its_epoch(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        epochs = [vllm_bundle, epoch_of(vllm_bundle, 100), epoch_of(vllm_bundle, 140)]
        for epoch in epochs[1:]:
            await stand.engine.use_catalog(epoch)
        asked = [request(epoch, number, width=NUM_ITEMS) for number, epoch in enumerate(epochs * 4)]
        answers = await asyncio.gather(*map(stand.engine.decode, asked))
        assert [len(one.ranks) for one in answers] == [NUM_ITEMS, NUM_ITEMS - 100, NUM_ITEMS - 140] * 4
        await stand.engine.retire_catalog(epochs[1].catalog_id)
        assert "the engine has" in str(await refused(stand.ask(request(epochs[1]))))
        assert len((await stand.engine.decode(request(epochs[2], width=NUM_ITEMS))).ranks) == NUM_ITEMS - 140


async def test_a_process_that_restarts_has_every_live_epoch_also_those_that_came_meanwhile(
    vllm_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes, replicas=2) as stand:
        early, retired, late = (epoch_of(vllm_bundle, number) for number in (1, 2, 3))
        await stand.engine.use_catalog(early)
        await stand.engine.use_catalog(retired)
        processes.may_start.clear()
        processes.made[0].kill()
        await stand.engine.use_catalog(late)
        await stand.engine.retire_catalog(retired.catalog_id)
        processes.may_start.set()
        await stand.ready()
        for epoch in (early, late):
            asked = request_for(0, 2, epoch)
            await stand.engine.decode(asked)
            assert processes.answered(asked.prompt.tolist())[-1] == (2, epoch.catalog_id), "the new process"
        assert processes.made[2].calls["sid_epoch"] == 2


async def test_an_epoch_that_cannot_be_sent_is_an_error_and_not_taken(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        processes.made[0].failures["sid_epoch"] = RuntimeError("no space")
        epoch = epoch_of(vllm_bundle, 1)
        with pytest.raises(EngineError, match="no space"):
            await stand.engine.use_catalog(epoch)
        assert "the engine has" in str(await refused(stand.ask(request(epoch))))


async def test_a_batch_sends_each_bitmap_once(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        halves = [RankBitmap.of(np.arange(NUM_ITEMS) % 2 == half) for half in (0, 1)]
        asked = [with_bitmap(vllm_bundle, number, every_third()) for number in range(3)]
        asked += [with_bitmap(vllm_bundle, 10 + number, halves[number % 2]) for number in range(4)]
        answers = await in_one_batch(stand, [*asked, request(vllm_bundle, 30)])
        for each, answer in zip(asked, answers[:-1], strict=True):
            assert len(answer.ranks) == 5
            assert each.item_filter.contains(answer.ranks).all()
        assert answers[-1].ranks.tolist() == [0, 1, 2, 3, 4]
        assert processes.made[0].calls["sid_bitmap"] == 3


async def test_a_bitmap_that_cannot_be_sent_fails_those_that_name_it_alone(
    vllm_bundle: Bundle, processes: FakeProcesses
):
    async with standing(vllm_bundle, processes) as stand:
        processes.made[0].failures["sid_bitmap"] = ValueError("too large")
        asked = [request(vllm_bundle, 1), with_bitmap(vllm_bundle, 2, every_third())]
        plain, named = await in_one_batch(stand, asked)
        assert isinstance(named, EngineUnavailableError)
        assert isinstance(plain, DecodeResult)


OURS: tuple[ErrorKind, ...] = ("internal", "unknown_capture", "unknown_catalog", "unknown_bitmap")
THEIRS: tuple[ErrorKind, ...] = ("bad_request", "empty_allowed_set", "unknown_prefix", "placeholder")


async def test_an_error_is_one_requests_and_counted_by_its_kind(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        asked = [request(vllm_bundle, number) for number in range(len(OURS + THEIRS) + 2)]
        for each, kind in zip(asked[1:-1], OURS + THEIRS, strict=True):
            processes.made[0].refusals[tuple(each.prompt.tolist())] = kind
        first, *errors, last = await in_one_batch(stand, asked)
        assert len(first.ranks) == len(last.ranks) == 5
        assert [type(error) for error in errors] == [EngineUnavailableError] * len(OURS) + [EngineError] * len(THEIRS)
        for error, kind in zip(errors, OURS + THEIRS, strict=True):
            assert str(error) == f"{kind}: as scripted"
            assert stand.counted("request_errors_total", kind=kind) == 1
        assert stand.engine.problem is None


async def test_a_call_that_fails_fails_its_batch_and_not_the_next(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        processes.made[0].failures["sid_beam"] = RuntimeError("no such method")
        with pytest.raises(EngineUnavailableError, match="sid_beam: no such method"):
            await stand.engine.decode(request(vllm_bundle))
        del processes.made[0].failures["sid_beam"]
        await stand.engine.decode(request(vllm_bundle))


@pytest.mark.parametrize("point", ["think", "prefill"])
async def test_what_vllm_fails_a_request_with_is_an_engine_error(
    vllm_bundle: Bundle, processes: FakeProcesses, point: str
):
    from vllm.v1.engine.exceptions import EngineGenerateError

    async with standing(vllm_bundle, processes) as stand:
        processes.made[0].failures[point] = EngineGenerateError("no blocks")
        with pytest.raises(EngineError):
            await stand.engine.decode(thinking(request(vllm_bundle)))
        assert stand.engine.problem is None


# ── start ──


@pytest.mark.parametrize("off", [0.5, math.nan])
async def test_a_model_that_cannot_be_continued_as_a_tree_is_refused_at_start(
    vllm_bundle: Bundle, processes: FakeProcesses, off: float
):
    def differs(llm: FakeLLM) -> None:
        llm.check = off

    processes.scripts[1] = differs
    with pytest.raises(EngineError, match="SIDREC_ENGINE=local"):
        async with standing(vllm_bundle, processes, replicas=2):
            pass
    assert [llm.num_shutdowns for llm in processes.made] == [1, 1]
    await settled()
    assert asyncio.all_tasks() == {asyncio.current_task()}


# ── thoughts ──


async def test_a_thought_that_closes_is_heard_to_its_close(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        llm = processes.made[0]
        llm.thought = [(11, 12), (), (13,), (14, CLOSE[0], 15)]
        asked = thinking(request(vllm_bundle))
        heard: list[tuple[int, ...]] = []
        result = await stand.engine.decode(asked, lambda new: heard.append(tuple(new)))
        assert (result.thought, result.thought_end) == ((11, 12, 13, 14), "closed")
        assert heard == [(11, 12), (13,), (14,)]
        assert llm.answered[-1] == (vllm_bundle.catalog_id, tuple(prompt_of(asked, result.thought)))
        await settled()
        assert llm.num_generating == 0
        assert stand.counted("thoughts_total", end="closed") == 1
        assert stand.counted("think_tokens_total") == 4


async def test_a_thought_ends_at_its_token_budget(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        processes.made[0].thought = [(11, 12), (13, 14), (15, 16)]
        asked = thinking(request(vllm_bundle), max_tokens=5)
        heard: list[int] = []
        result = await stand.engine.decode(asked, heard.extend)
        assert (result.thought, result.thought_end) == ((11, 12, 13, 14, 15), "token_budget")
        assert heard == list(result.thought)
        assert processes.answered(prompt_of(asked, result.thought)) == [(0, vllm_bundle.catalog_id)]


async def test_a_thought_leaves_room_for_its_close_the_codes_and_no_more(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        asked = thinking(request(vllm_bundle, prompt=np.full(400, 3)), max_tokens=400)
        result = await stand.engine.decode(asked)
        assert len(result.thought) == MAX_MODEL_LEN - 400 - len(CLOSE) - SPACE.num_levels - 1


async def test_a_slow_thought_ends_at_its_time_budget(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        llm = processes.made[0]
        llm.hold("think", after=3)
        asked = thinking(request(vllm_bundle), max_seconds=0.05)
        heard: list[int] = []
        began_at = time.monotonic()
        result = await stand.engine.decode(asked, heard.extend)
        assert (result.thought, result.thought_end) == ((BABBLE,) * 3, "time_budget")
        assert heard == list(result.thought)
        assert 0.05 <= result.think_s <= time.monotonic() - began_at
        assert (llm.num_generating, llm.num_aborted) == (0, 1)
        assert processes.answered(prompt_of(asked, result.thought)) == [(0, vllm_bundle.catalog_id)]


async def test_cancelling_a_thought_stops_it(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes, max_in_engine=1) as stand:
        llm = processes.made[0]
        hold = llm.hold("think", after=2)
        task = stand.ask(thinking(request(vllm_bundle)))
        await hold.arrived()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (llm.num_generating, llm.num_aborted) == (0, 1)
        await stand.engine.decode(request(vllm_bundle, 1))  # its place is free


async def test_a_listener_that_fails_stops_the_thought(vllm_bundle: Bundle, processes: FakeProcesses):
    def fails(_new: Sequence[int]) -> None:
        raise LookupError("the caller's")

    async with standing(vllm_bundle, processes) as stand:
        with pytest.raises(LookupError):
            await stand.engine.decode(thinking(request(vllm_bundle)), fails)
        await settled()
        assert processes.made[0].num_generating == 0
        await stand.engine.decode(request(vllm_bundle, 1))


# ── cancellation, places ──


@pytest.mark.parametrize("is_asked", [False, True], ids=["before its beam", "during its beam"])
async def test_a_prompt_whose_caller_gave_up_is_dropped(vllm_bundle: Bundle, processes: FakeProcesses, is_asked: bool):
    async with standing(vllm_bundle, processes) as stand:
        llm = processes.made[0]
        hold = llm.hold("sid_beam")
        tasks = [stand.ask(request(vllm_bundle, number)) for number in (1, 2)]
        await hold.arrived()
        await settled()
        place = 0 if is_asked else 1
        [key] = [key for key, prompt in llm.captures.items() if prompt[0] == place + 1]
        tasks[place].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[place]
        await settled()
        assert llm.dropped == [key]
        hold.release()
        await tasks[1 - place]
        assert llm.captures == {}


async def test_a_drop_that_is_never_answered_does_not_outlive_the_engine(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes) as stand:
        llm = processes.made[0]
        drop, beam = llm.hold("sid_drop"), llm.hold("sid_beam")
        task = stand.ask(request(vllm_bundle))
        await beam.arrived()
        task.cancel()
        await drop.arrived()
        beam.release()


async def test_no_more_than_allowed_are_inside(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes, max_in_engine=3) as stand:
        llm = processes.made[0]
        llm.peak = 0
        hold = llm.hold("prefill")
        tasks = [stand.ask(request(vllm_bundle, number)) for number in range(10)]
        await hold.arrived(3)
        await settled()
        assert (llm.num_generating, stand.engine.num_waiting) == (3, 7)
        assert stand.engine._replicas[0].load == 10
        hold.release()
        await asyncio.gather(*tasks)
        assert llm.peak == 3
        assert stand.engine.num_waiting == stand.engine._replicas[0].load == 0


async def test_who_gives_up_waiting_takes_no_place(vllm_bundle: Bundle, processes: FakeProcesses):
    async with standing(vllm_bundle, processes, max_in_engine=1) as stand:
        hold = processes.made[0].hold("prefill")
        tasks = [stand.ask(request(vllm_bundle, number)) for number in range(4)]
        await hold.arrived()
        await settled()
        for task in tasks[1:3]:
            task.cancel()
        await settled()
        assert stand.engine.num_waiting == 1
        hold.release()
        assert isinstance(await tasks[0], DecodeResult)
        assert isinstance(await tasks[3], DecodeResult)
