"""The local engine: torch in this process, for laptops, tests and small models. One thread decodes, in batches."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import structlog
import torch

from semantic_ids.bundle import Bundle
from semantic_ids.decoding.beam import BeamWork, constrained_beam
from semantic_ids.decoding.tree_decoder import TreeDecoder
from service.engine.base import (
    DecodeRequest,
    DecodeResult,
    EngineUnavailableError,
    ThoughtListener,
    UnsupportedProgramError,
    canary,
    check_request,
    plan,
)
from service.engine.batching import Batcher
from service.metrics import Metrics

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LocalEngineConfig:
    """How the local engine runs."""

    threads: int = 1
    """OpenMP threads: with two on two cores decoding is 10 to 20 times slower under load (libgomp spins)."""
    max_batch: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"


class LocalEngine:
    """A batcher round `semantic_ids.decoding`, bound to one bundle."""

    name = "local"

    def __init__(self, bundle: Bundle, config: LocalEngineConfig, metrics: Metrics) -> None:
        self._bundle = bundle
        self._config = config
        self._metrics = metrics
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._decoder: TreeDecoder | None = None
        self._batcher: Batcher[DecodeRequest, DecodeResult] = Batcher(
            "local engine",
            self._run,
            max_batch=config.max_batch,
            group=lambda request: request.program,
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
        await canary(self, self._bundle)
        self._has_answered_canary = True

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """Queue one request and wait for its batch."""
        check_request(request, self._bundle.catalog)
        if plan(request.program, self._bundle.catalog.space.num_levels).think is not None:
            raise UnsupportedProgramError("the local engine does not think")
        batched = await self._batcher.submit(request)
        return replace(batched.answer, queue_s=batched.queue_s)

    async def stop(self) -> None:
        """Let the running batch finish; whatever still waits gets `EngineUnavailableError`."""
        await self._batcher.stop()
        await asyncio.to_thread(self._executor.shutdown)

    def _load(self) -> TreeDecoder:
        torch.set_num_threads(self._config.threads)
        return TreeDecoder.load(self._bundle.model_folder, self._bundle.vocabulary, self._config.dtype)

    async def _run(self, requests: Sequence[DecodeRequest]) -> Sequence[DecodeResult | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._decode_batch, requests)

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
            forced=plan(requests[0].program, trie.space.num_levels).forced,
            work=work,
        )
        seconds = time.monotonic() - start
        self._metrics.count_beam_work(work.steps, work.beams, work.closed_beams)
        return [DecodeResult(answer.ranks, answer.scores, decode_s=seconds) for answer in answers]
