"""The local engine: torch in this process, for laptops, tests and small models. One thread decodes, in batches.

A request that thinks is a batch of its own: its thought is as long as the model makes it, and nobody else waits in it.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import structlog
import torch

from semantic_ids.bundle import Bundle
from semantic_ids.decoding.beam import BeamWork, constrained_beam
from semantic_ids.decoding.tree_decoder import TreeDecoder, TreeState
from semantic_ids.trie import SidTrie
from service.engine.base import (
    DecodeRequest,
    DecodeResult,
    EngineError,
    EngineUnavailableError,
    Plan,
    Think,
    ThoughtEnd,
    ThoughtListener,
    UnsupportedProgramError,
    canary,
    check_request,
    plan,
)
from service.engine.batching import Batcher, run_isolated
from service.metrics import Metrics

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LocalEngineConfig:
    """How the local engine runs."""

    threads: int = 1
    """OpenMP threads: with two on two cores decoding is 10 to 20 times slower under load (libgomp spins)."""
    max_batch: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"


class _GivenUpError(EngineError):
    """The caller of a thinking request is gone."""


@dataclass(eq=False)
class _Job:
    """One request on its way to the worker thread, and back with the tokens of its thought."""

    request: DecodeRequest
    trie: SidTrie
    plan: Plan
    loop: asyncio.AbstractEventLoop
    on_thought: ThoughtListener | None
    given_up: threading.Event = field(default_factory=threading.Event)

    @property
    def group(self) -> Hashable:
        """Jobs of one program and catalogue are a batch; a job that thinks is one by itself."""
        return (self.request.catalog_id, self.request.program) if self.plan.think is None else self

    def tell(self, token_id: int) -> None:
        """Let the listener hear a token of the thought; called in the worker thread."""
        if self.on_thought is not None:
            self.loop.call_soon_threadsafe(self._hear, token_id)

    def _hear(self, token_id: int) -> None:
        if self.on_thought is not None and not self.given_up.is_set():
            self.on_thought((token_id,))


@dataclass(frozen=True)
class _Thought:
    """A thought in the cache, and the state after its last token."""

    token_ids: tuple[int, ...]
    end: ThoughtEnd
    seconds: float
    state: TreeState


class LocalEngine:
    """A batcher round `semantic_ids.decoding`, bound to one bundle."""

    name = "local"

    def __init__(self, bundle: Bundle, config: LocalEngineConfig, metrics: Metrics) -> None:
        self._bundle = bundle
        self._config = config
        self._metrics = metrics
        self._tries = {bundle.catalog_id: bundle.catalog.trie}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._decoder: TreeDecoder | None = None
        self._batcher: Batcher[_Job, DecodeResult] = Batcher(
            "local engine",
            self._run,
            max_batch=config.max_batch,
            group=lambda job: job.group,
            on_batch=metrics.engine_batch_size.observe,
        )
        self._has_answered_canary = False

    @property
    def problem(self) -> str | None:
        """None once the canary was decoded, while the batcher runs."""
        if not self._has_answered_canary:
            return "the local engine is starting"
        return None if self._batcher.is_running else "the local engine has stopped"

    @property
    def num_waiting(self) -> int:
        """Requests not yet in a batch."""
        return self._batcher.num_waiting

    async def start(self) -> None:
        """Load the checkpoint and decode a canary in the worker thread."""
        self._decoder = await asyncio.get_running_loop().run_in_executor(self._executor, self._load)
        self._batcher.start()
        await canary(self.decode, self._bundle)
        self._has_answered_canary = True

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """Queue one request and wait for its batch."""
        check_request(request, self._tries.keys())
        steps = plan(request.program, self._bundle.catalog.space.num_levels)
        if steps.think is not None and self._decoder is not None and self._decoder.max_positions is not None:
            steps = replace(steps, think=_within(self._decoder.max_positions, request, steps, steps.think))
        job = _Job(request, self._tries[request.catalog_id], steps, asyncio.get_running_loop(), on_thought)
        try:
            batched = await self._batcher.submit(job)
        finally:
            job.given_up.set()  # by now, answered or not, nobody listens
        return replace(batched.answer, queue_s=batched.queue_s)

    async def use_catalog(self, bundle: Bundle) -> None:
        """Take requests of this epoch too."""
        self._tries[bundle.catalog_id] = bundle.catalog.trie

    async def retire_catalog(self, catalog_id: str) -> None:
        """Forget an epoch; jobs that are under way hold what they need."""
        if catalog_id != self._bundle.catalog_id:
            self._tries.pop(catalog_id, None)

    async def stop(self) -> None:
        """Let the running batch finish; whatever still waits gets `EngineUnavailableError`."""
        await self._batcher.stop()
        await asyncio.to_thread(self._executor.shutdown)

    def _load(self) -> TreeDecoder:
        torch.set_num_threads(self._config.threads)
        return TreeDecoder.load(self._bundle.model_folder, self._bundle.vocabulary, self._config.dtype)

    async def _run(self, jobs: Sequence[_Job]) -> Sequence[DecodeResult | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._decode_batch, jobs)

    def _decode_batch(self, jobs: Sequence[_Job]) -> list[DecodeResult | Exception]:
        """Runs in the worker thread; whatever fails must not take the batcher down."""
        return [self._failure(one) if isinstance(one, Exception) else one for one in run_isolated(self._decode, jobs)]

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, _GivenUpError):
            return error
        log.error("decode_failed", bundle=self._bundle.bundle_id, exc_info=error)
        failure = EngineUnavailableError(f"decoding failed: {type(error).__name__}")
        failure.__cause__ = error
        return failure

    def _decode(self, jobs: Sequence[_Job]) -> list[DecodeResult]:
        if self._decoder is None:
            raise EngineUnavailableError("the local engine is not loaded")
        start = time.monotonic()
        work = BeamWork()
        state = self._decoder.prefill([job.request.prompt for job in jobs])
        forced, thought = jobs[0].plan.forced, None
        if (think := jobs[0].plan.think) is not None:
            thought = _think(self._decoder, state, think, jobs[0].tell, jobs[0].given_up)
            state = thought.state
            forced = (think.close + forced[0], *forced[1:])
            self._metrics.count_thought(len(thought.token_ids), thought.end)
        answers = constrained_beam(
            self._decoder,
            jobs[0].trie,
            state,
            [job.request.item_filter for job in jobs],
            [job.request.width for job in jobs],
            forced=forced,
            work=work,
            exploration=[job.request.exploration for job in jobs],
        )
        seconds = time.monotonic() - start
        self._metrics.count_beam_work(work.steps, work.beams, work.closed_beams, work.masked_share)
        results = [DecodeResult(answer.ranks, answer.scores, answer.propensity, decode_s=seconds) for answer in answers]
        return results if thought is None else [_with_thought(results[0], thought)]


def _within(max_positions: int, request: DecodeRequest, steps: Plan, think: Think) -> Think:
    """The thought cut to what the model's positions leave beside prompt, close, forced tokens and SID."""
    beside = len(think.close) + sum(map(len, steps.forced)) + len(steps.forced)
    room = max_positions - len(request.prompt) - beside
    if room < 1:
        raise UnsupportedProgramError(
            f"a prompt of {len(request.prompt)} tokens leaves no room to think: the model has {max_positions} "
            f"positions, and {beside} are needed after the thought; shorten the history or do without the thought"
        )
    return replace(think, max_tokens=min(think.max_tokens, room))


def _think(
    decoder: TreeDecoder,
    state: TreeState,
    think: Think,
    tell: Callable[[int], None],
    given_up: threading.Event,
) -> _Thought:
    """Write greedily on from the one prompt in `state`; `_GivenUpError` as soon as the caller is gone."""
    start = time.monotonic()
    token_ids: list[int] = []
    longest_step_s = elapsed_s = 0.0
    rows, hidden = state.root, state.last_hidden
    parents = torch.zeros((1, 1), dtype=torch.long, device=decoder.device)
    while True:
        token_id = int(decoder.token_logits(hidden[0]).argmax())
        end = _end(think, token_id, len(token_ids), elapsed_s + longest_step_s)
        if end is not None:
            return _Thought(tuple(token_ids), end, elapsed_s, TreeState(state.cache, rows, hidden))
        if given_up.is_set():
            raise _GivenUpError("the caller of a thinking request is gone")
        token_ids.append(token_id)
        tell(token_id)
        hidden, rows = decoder.extend(state, rows, parents, torch.full_like(parents, token_id))
        before_s, elapsed_s = elapsed_s, time.monotonic() - start
        longest_step_s = max(longest_step_s, elapsed_s - before_s)


def _end(think: Think, next_token_id: int, num_tokens: int, seconds: float) -> ThoughtEnd | None:
    """Whether the thought ends before its next token, whose step would be over after `seconds`."""
    if next_token_id == think.close[0]:
        return "closed"
    if num_tokens >= think.max_tokens:
        return "token_budget"
    return "time_budget" if seconds >= think.max_seconds else None


def _with_thought(result: DecodeResult, thought: _Thought) -> DecodeResult:
    return replace(
        result,
        thought=thought.token_ids,
        thought_end=thought.end,
        think_s=thought.seconds,
        decode_s=result.decode_s - thought.seconds,
    )
