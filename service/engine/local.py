"""The local engine: torch in this process, for laptops, tests and small models. One thread decodes, in batches.

    decode() → queue → batch of whatever waits (at most `max_batch`) → worker thread: prefill, beam → futures

While a batch runs the next one gathers, so a lone request waits for nothing and a crowd shares the work.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import structlog
import torch

from semantic_ids.bundle import Bundle
from semantic_ids.decoding.beam import BeamWork, constrained_beam
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import ItemFilter
from service.engine.base import (
    Code,
    DecodeRequest,
    DecodeResult,
    EngineError,
    EngineUnavailableError,
    Forced,
    StepProgram,
    UnsupportedProgramError,
    sid_program,
)
from service.metrics import Metrics

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LocalEngineConfig:
    """How the local engine runs."""

    threads: int = 1
    """OpenMP threads: with two on two cores decoding is 10 to 20 times slower under load (libgomp spins)."""
    max_batch: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(eq=False)
class _Job:
    request: DecodeRequest
    future: asyncio.Future[DecodeResult]
    queued_at: float


class LocalEngine:
    """A dynamic batcher round `semantic_ids.decoding`, bound to one bundle."""

    name = "local"

    def __init__(self, bundle: Bundle, config: LocalEngineConfig, metrics: Metrics) -> None:
        self._bundle = bundle
        self._config = config
        self._metrics = metrics
        self._waiting: list[_Job] = []
        self._wake = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._decoder: TreeDecoder | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._is_ready = False

    @property
    def is_ready(self) -> bool:
        """Whether the canary was decoded and the batcher runs."""
        return self._is_ready and self._loop_task is not None and not self._loop_task.done()

    @property
    def num_waiting(self) -> int:
        """Requests not yet in a batch."""
        return len(self._waiting)

    async def start(self) -> None:
        """Load the checkpoint and decode a canary in the worker thread."""
        loop = asyncio.get_running_loop()
        self._decoder = await loop.run_in_executor(self._executor, self._load)
        self._loop_task = asyncio.create_task(self._run(), name="local-engine")
        self._loop_task.add_done_callback(lambda _task: self._refuse_waiting("the local engine has stopped"))
        space = self._bundle.manifest.space
        everything = ItemFilter.of(len(self._bundle.catalog))
        prompt = self._bundle.renderer.render([]).token_ids
        canary = DecodeRequest(prompt, everything, 1, sid_program(space), self._bundle.catalog.epoch)
        answer = await self.decode(canary)
        if len(answer.ranks) == 0 or not np.isfinite(answer.scores).all():
            raise EngineError(f"bundle {self._bundle.bundle_id}: the canary request was answered with {answer}")
        self._is_ready = True

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        """Queue one request and wait for its batch."""
        if self._loop_task is None or self._loop_task.done():
            raise EngineUnavailableError("the local engine is not running")
        self._check(request)
        job = _Job(request, asyncio.get_running_loop().create_future(), time.monotonic())
        self._waiting.append(job)
        self._wake.set()
        try:
            return await job.future
        finally:
            if job in self._waiting:  # the caller gave up before its batch began
                self._waiting.remove(job)

    async def stop(self) -> None:
        """Let the running batch finish; whatever still waits gets `EngineUnavailableError`."""
        self._is_ready = False
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        await asyncio.to_thread(self._executor.shutdown)

    def _refuse_waiting(self, why: str) -> None:
        for job in self._waiting:
            if not job.future.done():
                job.future.set_exception(EngineUnavailableError(why))
        self._waiting.clear()

    def _load(self) -> TreeDecoder:
        torch.set_num_threads(self._config.threads)
        return TreeDecoder.load(self._bundle.model_folder, self._bundle.vocabulary, self._config.dtype)

    def _check(self, request: DecodeRequest) -> None:
        """Refuse alone what would fail a whole batch."""
        catalog = self._bundle.catalog
        if request.catalog_epoch != catalog.epoch:
            raise EngineError(f"request for catalogue epoch {request.catalog_epoch}, the engine has {catalog.epoch}")
        if request.item_filter.num_eligible == 0:
            raise EngineError("a filter that leaves no item reached the engine")
        if not len(request.prompt) or request.width < 1:
            raise EngineError(
                f"a prompt of {len(request.prompt)} tokens and a width of {request.width} cannot be decoded"
            )
        forced_before(request.program, catalog.space.num_levels)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch = self._next_batch()
                self._metrics.engine_batch_size.observe(len(batch))
                work = loop.run_in_executor(self._executor, self._decode_batch, [job.request for job in batch])
                try:
                    results = await asyncio.shield(work)
                except asyncio.CancelledError:  # stopping: what is being decoded is still answered
                    _answer(batch, await work)
                    raise
                _answer(batch, results)

    def _next_batch(self) -> list[_Job]:
        """The oldest request and those behind it with the same program."""
        program = self._waiting[0].request.program
        batch = [job for job in self._waiting if job.request.program == program][: self._config.max_batch]
        chosen = set(map(id, batch))
        self._waiting = [job for job in self._waiting if id(job) not in chosen]
        return batch

    def _decode_batch(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult | Exception]:
        """Decode together; if that fails, one by one, so that only the culprit fails. Runs in the worker thread."""
        try:
            return list(self._decode(requests))
        except Exception as error:  # whatever fails must not take the batcher down
            if len(requests) > 1:
                return [self._decode_batch([request])[0] for request in requests]
            log.exception("decode_failed", bundle=self._bundle.bundle_id)
            failure = EngineUnavailableError(f"decoding failed: {type(error).__name__}")
            failure.__cause__ = error
            return [failure]

    def _decode(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        if self._decoder is None:
            raise EngineUnavailableError("the local engine is not loaded")
        start = time.monotonic()
        trie = self._bundle.catalog.trie
        work = BeamWork()
        state = self._decoder.prefill([request.prompt for request in requests])
        answers = constrained_beam(
            self._decoder,
            trie,
            state,
            [request.item_filter for request in requests],
            [request.width for request in requests],
            forced=forced_before(requests[0].program, trie.space.num_levels),
            work=work,
        )
        seconds = time.monotonic() - start
        self._metrics.count_beam_work(work.steps, work.beams, work.closed_beams)
        return [DecodeResult(answer.ranks, answer.scores, decode_s=seconds) for answer in answers]


def forced_before(program: StepProgram, num_levels: int) -> list[tuple[int, ...]]:
    """The forced tokens before each code; `UnsupportedProgramError` for what this engine cannot run."""
    forced: list[tuple[int, ...]] = []
    pending: tuple[int, ...] = ()
    for step in program:
        if isinstance(step, Forced):
            pending += step.token_ids
        elif isinstance(step, Code) and step.level == len(forced):
            forced.append(pending)
            pending = ()
        else:
            raise UnsupportedProgramError(f"the local engine cannot run {step} after {len(forced)} codes")
    if len(forced) != num_levels or pending:
        raise UnsupportedProgramError(
            f"a program ends with the code of level {num_levels - 1}; this one has {len(forced)} codes"
        )
    return forced


def _answer(batch: Sequence[_Job], results: Sequence[DecodeResult | Exception]) -> None:
    now = time.monotonic()
    for job, result in zip(batch, results, strict=True):
        if job.future.done():  # cancelled by its caller
            continue
        if isinstance(result, Exception):
            job.future.set_exception(result)
        else:
            queue_s = max(0.0, now - job.queued_at - result.decode_s)
            job.future.set_result(DecodeResult(result.ranks, result.scores, result.thought, queue_s, result.decode_s))
