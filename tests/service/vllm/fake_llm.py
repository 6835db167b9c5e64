"""A scripted stand-in for vLLM's `AsyncLLM` and the worker behind it: held, slow, failing or killed at a named point.

It answers from the real `SidStore`, so filters and catalogues are exact; only the model is missing: the answer to any
prompt is the first eligible ranks. The points that can be held or made to fail are the worker's methods, those of
`AsyncLLM` that a swap calls, `prefill` (of a prompt) and `think` (of one piece of a thought).
"""

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from semantic_ids.bundle import Bundle
from service.engine import vllm_engine
from service.engine.store import SidStore
from service.engine.vllm_engine import VllmEngineConfig
from service.engine.wire import (
    CAPTURE_ARG,
    SCORE_DTYPE,
    BeamReport,
    BeamRequest,
    ErrorKind,
    SidRequestError,
    pack_ranks,
)

MAX_MODEL_LEN = 512
BABBLE = 7
"""The token of a thought that nobody scripted."""


class Hold:
    """A point of the process where work stands still until it is released."""

    def __init__(self, let_pass: int) -> None:
        self.let_pass = let_pass  # calls, counted since the process began
        self.released = asyncio.Event()
        self._arrivals = asyncio.Semaphore(0)

    async def arrived(self, count: int = 1) -> None:
        """Until `count` more calls stand here."""
        for _ in range(count):
            await self._arrivals.acquire()

    def release(self) -> None:
        """Let everything pass, now and later."""
        self.released.set()

    async def stand(self) -> None:
        """Stand here."""
        self._arrivals.release()
        await self.released.wait()


class FakeLLM:
    """One process."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.model_config = SimpleNamespace(max_model_len=MAX_MODEL_LEN)
        self.output_handler: asyncio.Task[None] | None = None
        self.errored = False
        self.num_shutdowns = 0
        self.calls: Counter[str] = Counter()
        self.failures: dict[str, Exception] = {}
        """What a point raises, every time."""
        self.deadly = ""
        """The point that kills the process."""
        self.check = 0.0
        """What `sid_check` answers."""
        self.can_forget = True
        """What `reset_prefix_cache` answers."""
        self.thought: Sequence[Sequence[int]] = ()
        """The pieces of every thought, and after them babble without end."""
        self.refusals: dict[tuple[int, ...], ErrorKind] = {}
        """The errors that some prompts are answered with."""
        self.answered: list[tuple[str, tuple[int, ...]]] = []
        """Catalogue id and prompt of every answer with items."""
        self.batches: list[int] = []
        self.dropped: list[str] = []
        self.catalog_ids: list[str] = []
        self.captures: dict[str, tuple[int, ...]] = {}
        self.num_generating = 0
        self.num_aborted = 0
        self.peak = 0
        """The most prompts generating and captured at a time."""
        self._store = SidStore()
        self._holds: dict[str, Hold] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_resumed = asyncio.Event()
        self._is_resumed.set()

    def hold(self, point: str, *, after: int = 0) -> Hold:
        """Stop whatever comes to `point`, but for the next `after` calls."""
        found = self._holds[point] = Hold(self.calls[point] + after)
        return found

    def kill(self) -> None:
        """`kill -9`: whatever generates hears of it, whoever waits for a call does not."""
        self.errored = True
        for hold in self._holds.values():
            hold.release()
        self._is_idle.clear()
        self._is_resumed.set()

    def shutdown(self) -> None:
        """Count; the calls that are under way are not answered any more."""
        self.num_shutdowns += 1

    # ── what `AsyncLLM` does ──

    async def generate(
        self,
        prompt: Mapping[str, Any],
        sampling_params: Any,
        request_id: str,
    ) -> AsyncGenerator[Any, None]:
        """A prefill that captures, or a thought piece by piece."""
        self._raise_if_dead()
        await self._is_resumed.wait()
        self._raise_if_dead()
        token_ids = tuple(prompt["prompt_token_ids"])
        self.num_generating += 1
        self._is_idle.clear()
        self._note_peak()
        try:
            extra = sampling_params.extra_args or {}
            if CAPTURE_ARG in extra:
                await self._reach("prefill")
                self._raise_if_dead()
                self.captures[extra[CAPTURE_ARG]["key"]] = token_ids
                yield _output([0], num_cached_tokens=len(token_ids) // 2)
                return
            left, stops = sampling_params.max_tokens, set(sampling_params.stop_token_ids or ())
            for piece in chain(self.thought, repeat((BABBLE,))):
                await self._reach("think")
                self._raise_if_dead()
                stop = next((place for place, token in enumerate(piece) if token in stops), None)
                new = list(piece)[:left] if stop is None else list(piece)[: min(left, stop + 1)]
                left -= len(new)
                yield _output(new)
                if left == 0 or (stop is not None and new[-1] in stops):
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.num_aborted += 1
            raise
        finally:
            self.num_generating -= 1
            if self.num_generating == 0:
                self._is_idle.set()

    async def collective_rpc(self, method: str, *, args: Sequence[Any] = ()) -> list[Any]:
        """The worker's method; no answer ever comes from a dead process."""
        await self._reach(method)
        if self.errored or self.num_shutdowns:
            await _forever()
        return [getattr(self, f"_{method}")(*args)]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        """Take nothing new; wait for what generates."""
        assert (mode, clear_cache) == ("wait", True)
        self._is_resumed.clear()
        await self._reach("pause_generation")
        await self._is_idle.wait()
        if self.errored or self.num_shutdowns:
            await _forever()

    async def resume_generation(self) -> None:
        """Take what came meanwhile."""
        await self._reach("resume_generation")
        if self.errored or self.num_shutdowns:
            await _forever()
        self._is_resumed.set()

    async def reset_prefix_cache(self) -> bool:
        """As scripted."""
        await self._reach("reset_prefix_cache")
        if self.errored or self.num_shutdowns:
            await _forever()
        return self.can_forget

    # ── what the worker does ──

    def _sid_load(self, bundle_path: str) -> str:
        catalog_id = self._store.load(Path(bundle_path))
        self._store.keep_only(catalog_id)
        self.captures.clear()
        self.catalog_ids.append(catalog_id)
        return catalog_id

    _sid_swap = _sid_load

    def _sid_check(self, key: str, extended_key: str, token_ids: Sequence[int]) -> float:
        assert self.captures.pop(extended_key) == (*self.captures.pop(key), *token_ids)
        return self.check

    def _sid_epoch(self, base_id: str, catalog_id: str, folder: str) -> None:
        self._store.load_epoch(base_id, catalog_id, Path(folder))

    def _sid_retire(self, catalog_id: str) -> None:
        self._store.forget(catalog_id)

    def _sid_bitmap(self, catalog_id: str, digest: str, packed: bytes) -> None:
        self._store.put_bitmap(catalog_id, digest, packed)

    def _sid_drop(self, key: str) -> None:
        self.dropped.append(key)
        self.captures.pop(key, None)

    def _sid_beam(
        self, catalog_id: str, forced: Sequence[Sequence[int]], requests: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        assert all(isinstance(level, list) for level in forced)
        self.batches.append(len(requests))
        answers = []
        for wire in requests:
            try:
                answers.append(self._answer(catalog_id, BeamRequest.parse(wire)))
            except SidRequestError as error:
                answers.append(error.as_wire())
        return BeamReport(answers, 3, 10, 1, 0.5, len(self.captures), 0.001).as_wire()

    def _answer(self, catalog_id: str, request: BeamRequest) -> dict[str, Any]:
        prompt = self.captures.get(request.key)
        if prompt is None:
            raise SidRequestError("unknown_capture", f"no prompt was captured under {request.key!r}")
        if (kind := self.refusals.get(prompt)) is not None:
            raise SidRequestError(kind, "as scripted")
        snapshot = self._store.snapshot(catalog_id)
        item_filter = self._store.item_filter(snapshot, request.item_filter)
        del self.captures[request.key]
        everything = np.arange(len(snapshot.catalog))
        ranks = everything[item_filter.contains(everything)][: request.width]
        self.answered.append((catalog_id, prompt))
        scores = (-ranks).astype(SCORE_DTYPE).tobytes()
        return {"ranks": pack_ranks(ranks), "scores": scores, "propensity": None, "trace": None}

    # ── the script ──

    async def _reach(self, point: str) -> None:
        self.calls[point] += 1
        if point == self.deadly:
            self.kill()
        hold = self._holds.get(point)
        if hold is None or self.calls[point] <= hold.let_pass:
            await asyncio.sleep(0)
        else:
            await hold.stand()
        if point in self.failures:
            raise self.failures[point]

    def _raise_if_dead(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        if self.errored:
            raise EngineDeadError()

    def _note_peak(self) -> None:
        self.peak = max(self.peak, self.num_generating + len(self.captures))


class FakeProcesses:
    """Takes `_make_llm`'s place: what was made, and how the next ones will be."""

    def __init__(self) -> None:
        self.made: list[FakeLLM] = []
        self.tries_at: list[float] = []
        self.errors: deque[Exception] = deque()
        """What the next tries fail with."""
        self.scripts: dict[int, Callable[[FakeLLM], object]] = {}
        """By number of the process, counted from 0: what is done to it before it runs."""
        self.may_start = threading.Event()
        self.may_start.set()

    def make(self, bundle: Bundle, config: VllmEngineConfig) -> FakeLLM:
        """Called in a thread, as the real one."""
        vllm_engine._set_environment(config.threads)  # before vLLM's first import, also in a run of these tests alone
        self.tries_at.append(time.monotonic())
        self.may_start.wait(10)
        if self.errors:
            raise self.errors.popleft()
        llm = FakeLLM(bundle)
        if (script := self.scripts.get(len(self.made))) is not None:
            script(llm)
        self.made.append(llm)
        return llm

    def answered(self, prompt: Sequence[int]) -> list[tuple[int, str]]:
        """By which processes, from which catalogues, a prompt was answered."""
        return [
            (number, catalog_id)
            for number, llm in enumerate(self.made)
            for catalog_id, answered in llm.answered
            if answered == tuple(prompt)
        ]


def _output(token_ids: list[int], num_cached_tokens: int | None = None) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=token_ids)], num_cached_tokens=num_cached_tokens)


async def _forever() -> NoReturn:
    while True:
        await asyncio.Event().wait()
