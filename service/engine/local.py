"""The local engine: torch on the CPU, for laptops, tests and small models. One process decodes, in batches.

A request that thinks is a batch of its own: its thought is as long as the model makes it, and nobody else waits in it.
A process that dies takes the batch that it was decoding with it, and is made anew with back-off; one that hangs is
killed. Meanwhile the fallback answers.
"""

import asyncio
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from semantic_ids.bundle import Bundle
from service.engine.base import (
    DecodeRequest,
    DecodeResult,
    EngineError,
    EngineUnavailableError,
    Plan,
    Think,
    ThoughtListener,
    UnsupportedProgramError,
    canary,
    check_request,
    plan,
)
from service.engine.batching import Batcher
from service.engine.epochs import EpochFolders
from service.engine.local_process import Decode, Decoded, DecodeProcess, PutBitmap, RetireCatalog, UseCatalog
from service.engine.local_process import LocalEngineConfig as LocalEngineConfig  # noqa: PLC0414 - this engine's too
from service.engine.searches import Found, Search, answered
from service.engine.wire import BeamRequest, WireFilter
from service.metrics import Metrics

log = structlog.get_logger(__name__)

_FIRST_BACK_OFF_S, _MAX_BACK_OFF_S = 0.5, 30.0
HANG_S = 60.0
"""A process that has not answered a batch by then, beside its thought, hangs, and is made anew."""


@dataclass(eq=False)
class _Job:
    """One request on its way to the process, and back with the tokens of its thought."""

    request: DecodeRequest
    plan: Plan
    on_thought: ThoughtListener | None
    call: int | None = None
    """Its number while it is being decoded."""
    is_over: bool = False
    """Answered or given up: nobody listens."""

    @property
    def group(self) -> Hashable:
        """Jobs of one program and catalogue are a batch; a job that thinks is one by itself."""
        return (self.request.catalog_id, self.request.program) if self.plan.think is None else self

    @property
    def search(self) -> Search:
        """What the process searches for."""
        request = self.request
        item_filter = WireFilter.of(request.item_filter)
        beam = BeamRequest("", request.width, item_filter, request.exploration, request.wants_trace)
        return Search(beam, request.catalog_id, self.plan.forced, request.item_filter.bitmap)

    def hear(self, token_id: int) -> None:
        """Tell the listener a token of the thought."""
        if self.on_thought is not None and not self.is_over:
            self.on_thought((token_id,))


class LocalEngine:
    """A batcher in front of a process, bound to one bundle."""

    name = "local"

    def __init__(self, bundle: Bundle, config: LocalEngineConfig, metrics: Metrics) -> None:
        self._bundle = bundle
        self._config = config
        self._metrics = metrics
        self._process: DecodeProcess | None = None
        self._watch: asyncio.Task[None] | None = None
        self._folders = EpochFolders()
        self._epochs: dict[str, Path] = {}
        self._batcher: Batcher[_Job, DecodeResult] = Batcher(
            "local engine",
            self._run,
            max_batch=config.max_batch,
            group=lambda job: job.group,
            on_batch=metrics.engine_batch_size.observe,
        )
        self._state: str | None = "the local engine is starting"

    @property
    def problem(self) -> str | None:
        """None once the canary was decoded, while the process lives."""
        if self._state is None and (self._process is None or self._process.died.is_set()):
            return "the process that decodes died and is being restarted"
        return self._state

    @property
    def num_waiting(self) -> int:
        """Requests not yet in a batch."""
        return self._batcher.num_waiting

    @property
    def pid(self) -> int | None:
        """Of the process that decodes; None while there is none."""
        return None if self._process is None or self._process.died.is_set() else self._process.pid

    async def start(self) -> None:
        """Start the process with the checkpoint, and decode a canary."""
        self._batcher.start()
        await self._make()
        self._watch = asyncio.create_task(self._supervise(), name="local-engine")

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """Queue one request and wait for its batch."""
        check_request(request, (self._bundle.catalog_id, *self._epochs))
        steps = plan(request.program, self._bundle.catalog.space.num_levels)
        if steps.think is not None and self._process is not None and self._process.max_positions is not None:
            steps = replace(steps, think=_within(self._process.max_positions, request, steps, steps.think))
        job = _Job(request, steps, on_thought)
        try:
            batched = await self._batcher.submit(job)
        finally:
            job.is_over = True
            if job.call is not None and steps.think is not None and self._process is not None:
                self._process.give_up(job.call)
        return replace(batched.answer, queue_s=batched.queue_s)

    async def use_catalog(self, bundle: Bundle) -> None:
        """The process maps the epoch's trie from a folder on this machine; one that is down does when it is back."""
        folder = await self._folders.write(bundle)
        self._epochs[bundle.catalog_id] = folder
        try:
            await self._map_epoch(bundle.catalog_id, folder)
        except EngineError:
            if self.problem is None:  # it lives, and does not take the epoch
                await self.retire_catalog(bundle.catalog_id)
                raise

    async def retire_catalog(self, catalog_id: str) -> None:
        """Forget an epoch."""
        if self._epochs.pop(catalog_id, None) is not None:
            if self._process is not None:
                with suppress(EngineError):
                    await self._process.call(RetireCatalog(catalog_id))
            await self._folders.remove(catalog_id)

    async def stop(self) -> None:
        """Let the running batch finish; whatever still waits gets `EngineUnavailableError`."""
        self._state = "the local engine has stopped"
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
        await self._batcher.stop()
        if self._process is not None:
            await self._process.stop()
            self._process = None
        await self._folders.close()

    # ── its process ──

    async def _make(self) -> None:
        """A new process, with every live epoch, checked."""
        self._process = await DecodeProcess.start(self._bundle.path, self._bundle.catalog_id, self._config)
        sent: set[str] = set()
        while missing := self._epochs.keys() - sent:  # those too that come meanwhile
            for catalog_id in missing:
                sent.add(catalog_id)
                with suppress(KeyError):  # it was retired
                    await self._map_epoch(catalog_id, self._epochs[catalog_id])
        await canary(self.decode, self._bundle)
        self._state = None
        log.info("local_engine_ready", bundle=self._bundle.bundle_id, pid=self._process.pid)

    async def _supervise(self) -> None:
        """Make the process anew whenever it dies, waiting longer after each try that fails."""
        while True:
            if self._process is not None:
                await self._process.died.wait()
            self._state = "the process that decodes died and is being restarted"
            log.error("local_engine_died", bundle=self._bundle.bundle_id)
            failures = 0
            while self._state is not None:
                if self._process is not None:
                    await self._process.stop()
                try:
                    await self._make()
                    self._metrics.engine_restarts.inc()
                except Exception as error:
                    self._state = f"the process that decodes does not restart: {error}"
                    log.exception("local_engine_not_restarted", bundle=self._bundle.bundle_id, failures=failures)
                    await asyncio.sleep(min(_MAX_BACK_OFF_S, _FIRST_BACK_OFF_S * 2**failures))
                    failures += 1

    async def _map_epoch(self, catalog_id: str, folder: Path) -> None:
        await self._living().call(UseCatalog(self._bundle.catalog_id, catalog_id, folder))

    def _living(self) -> DecodeProcess:
        if self._process is None or self._process.died.is_set():
            raise EngineUnavailableError("the process that decodes is being restarted")
        return self._process

    # ── one batch ──

    async def _run(self, jobs: Sequence[_Job]) -> Sequence[DecodeResult | Exception]:
        process, searches, think = self._living(), [job.search for job in jobs], jobs[0].plan.think
        decoded: list[Decoded] = []

        async def ask(places: Sequence[int]) -> list[dict[str, Any]]:
            batch = Decode(
                searches[0].catalog_id,
                [jobs[place].request.prompt for place in places],
                [searches[place].request for place in places],
                searches[0].forced,
                think,
            )
            jobs[0].call, answer = process.begin(batch, jobs[0].hear if think is not None else None)
            if think is not None and jobs[0].is_over:
                process.give_up(jobs[0].call)
            try:
                async with asyncio.timeout(HANG_S + (think.max_seconds if think is not None else 0.0)):
                    decoded.append(await answer)
            except TimeoutError:
                process.kill()
                raise EngineUnavailableError("the process that decodes hung and was killed") from None
            self._count(decoded[-1])
            return decoded[-1].report.answers

        async def send_bitmap(catalog_id: str, digest: str, packed: bytes) -> None:
            await process.call(PutBitmap(catalog_id, digest, packed))

        found = await answered(searches, ask, send_bitmap, self._metrics)
        return [_result(one, decoded[-1]) if isinstance(one, Found) else one for one in found]

    def _count(self, decoded: Decoded) -> None:
        report = decoded.report
        self._metrics.count_beam_work(report.steps, report.beams, report.closed_beams, report.masked_share)
        self._metrics.count_prompt_tokens(decoded.prompt_tokens, decoded.known_prompt_tokens)
        if decoded.thought_end is not None:
            self._metrics.count_thought(len(decoded.thought), decoded.thought_end)


def _result(found: Found, decoded: Decoded) -> DecodeResult:
    return DecodeResult(
        found.ranks,
        found.scores,
        found.propensity,
        thought=decoded.thought,
        thought_end=decoded.thought_end,
        think_s=decoded.think_s,
        decode_s=decoded.report.seconds - decoded.think_s,
        trace=found.trace,
    )


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
