"""The process in which the local engine decodes, seen from the service: made, asked, watched, ended.

    call(message) ── pipe ──> local_worker, one after the other ── replies by number, tokens of a thought ──> futures

In a process of its own, decoding neither takes the event loop's turns nor, should it crash or be killed, the service
with it. It runs at a lower priority: to take a request, or to refuse it, comes before those that are being decoded. A
forkserver that has torch loaded makes such processes in a moment. This module loads no torch.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal, TypeAlias

from semantic_ids.codes import TokenIds
from service.engine.base import EngineError, EngineUnavailableError, Think, ThoughtEnd
from service.engine.wire import BeamReport, BeamRequest

_NICENESS = 10
_STOP_S = 5.0
_PRELOADED = ("service.engine.local_worker", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True)
class LocalEngineConfig:
    """How the local engine runs."""

    threads: int = 1
    """OpenMP threads: with two on two cores decoding is 10 to 20 times slower under load (libgomp spins)."""
    max_batch: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompt_cache_mb: int = 128
    """MiB of prompts' keys and values that the process keeps (`PromptCache`); 0: none."""


@dataclass(frozen=True)
class Decode:
    """A batch: prompts, searches, and perhaps a thought of the only one."""

    catalog_id: str
    prompts: list[TokenIds]
    requests: list[BeamRequest]
    forced: tuple[tuple[int, ...], ...]
    think: Think | None


@dataclass(frozen=True)
class Decoded:
    """What came of a batch."""

    report: BeamReport
    prompt_tokens: int
    known_prompt_tokens: int
    """Of them those that did not go through the model: its process had kept them."""
    thought: tuple[int, ...] = ()
    thought_end: ThoughtEnd | None = None
    think_s: float = 0.0


@dataclass(frozen=True)
class UseCatalog:
    """Map the trie of an epoch of the bundle's catalogue."""

    base_id: str
    catalog_id: str
    folder: Path


@dataclass(frozen=True)
class RetireCatalog:
    """Forget an epoch."""

    catalog_id: str


@dataclass(frozen=True)
class PutBitmap:
    """Keep a bitmap that filters will name."""

    catalog_id: str
    digest: str
    packed: bytes


@dataclass(frozen=True)
class GiveUp:
    """Nobody waits for the thought of this call any more."""

    number: int


Call: TypeAlias = Decode | UseCatalog | RetireCatalog | PutBitmap


@dataclass(frozen=True)
class Ready:
    """The process's first word."""

    catalog_id: str
    max_positions: int | None
    """Most tokens of one sequence; None where the model sets no limit."""


@dataclass(frozen=True)
class Token:
    """The next token of a call's thought."""

    number: int
    token_id: int


@dataclass(frozen=True)
class Reply:
    """The end of a call: what it gave, or the text of what failed."""

    number: int
    value: Any = None
    error: str | None = None


@dataclass(eq=False)
class _Pending:
    future: asyncio.Future[Any]
    on_token: Callable[[int], None] | None


class DecodeProcess:
    """One process, until it dies or is stopped; never used again after either."""

    def __init__(self, process: ForkServerProcess, connection: Connection) -> None:
        self._process = process
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, _Pending] = {}
        self._numbers = count(1)
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self.died = asyncio.Event()
        self.max_positions: int | None = None
        self._loop.add_reader(connection.fileno(), self._read)

    @classmethod
    async def start(cls, bundle_path: Path, catalog_id: str, config: LocalEngineConfig) -> "DecodeProcess":
        """A process with the bundle's model loaded; `EngineError` if it does not come to that."""
        process, connection = await asyncio.to_thread(_make, bundle_path, config)
        started = cls(process, connection)
        try:
            await started._until_ready(catalog_id)
        except BaseException:
            await started.stop()
            raise
        return started

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid or 0

    def begin(self, message: Call, on_token: Callable[[int], None] | None = None) -> tuple[int, asyncio.Future[Any]]:
        """Send a call; its number and its answer to come: `EngineUnavailableError` if the process dies first."""
        number = next(self._numbers)
        future: asyncio.Future[Any] = self._loop.create_future()
        if not self._send((number, message)):
            future.set_exception(_death())
        else:
            self._pending[number] = _Pending(future, on_token)
        return number, future

    async def call(self, message: Call) -> Any:  # noqa: ANN401 - as the message says
        """The answer to a call."""
        return await self.begin(message)[1]

    def give_up(self, number: int) -> None:
        """End the thought of a call that nobody waits for."""
        self._send((0, GiveUp(number)))

    def kill(self) -> None:
        """End the process now, whatever it is at; `died` follows."""
        self._process.kill()

    async def stop(self) -> None:
        """End the process: at once where it is idle; what it is decoding is lost."""
        self._close()
        await asyncio.to_thread(_end, self._process)

    async def _until_ready(self, catalog_id: str) -> None:
        ready = await self._ready
        if ready.catalog_id != catalog_id:
            raise EngineError(f"the folder holds catalogue {ready.catalog_id!r}, and {catalog_id!r} is to be served")
        self.max_positions = ready.max_positions

    def _send(self, message: tuple[int, Call | GiveUp]) -> bool:
        # Short, or to a process that reads: one batch is under way at a time. So a full pipe does not block for long.
        if self.died.is_set():
            return False
        try:
            self._connection.send(message)
        except OSError:
            self._close()
            return False
        return True

    def _read(self) -> None:
        """What the process has said since."""
        try:
            while self._connection.poll():
                self._hear(self._connection.recv())
        except (EOFError, OSError):
            self._close()

    def _hear(self, message: Ready | Token | Reply) -> None:
        if isinstance(message, Ready):
            self._ready.set_result(message)
        elif isinstance(message, Token):
            pending = self._pending.get(message.number)
            if pending is not None and pending.on_token is not None:
                pending.on_token(message.token_id)
        elif message.number == 0:
            self._ready.set_exception(EngineError(f"the model cannot be loaded: {message.error}"))
        elif (pending := self._pending.pop(message.number, None)) is not None and not pending.future.done():
            if message.error is not None:
                pending.future.set_exception(EngineError(message.error))
            else:
                pending.future.set_result(message.value)

    def _close(self) -> None:
        """The process is gone, or is to go."""
        if self.died.is_set():
            return
        self.died.set()
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
        if not self._ready.done():
            self._ready.set_exception(EngineError(f"the process that decodes ended at once: {self._exit()}"))
            self._ready.exception()  # perhaps nobody waits for it
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(_death())
        self._pending.clear()

    def _exit(self) -> str:
        code = self._process.exitcode
        return f"exit code {code}; its own message is in the log" if code is not None else "it closed its pipe"


def _death() -> EngineUnavailableError:
    return EngineUnavailableError("the process that decodes died while it worked")


def _make(bundle_path: Path, config: LocalEngineConfig) -> tuple[ForkServerProcess, Connection]:
    """Start a process. Blocks: for seconds the first time, while the forkserver loads torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED])
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, bundle_path, config), name="sidrec-decode", daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _run(connection: Connection, bundle_path: Path, config: LocalEngineConfig) -> None:
    """The process."""
    from service.engine.local_worker import LocalWorker
    from service.logs import configure
    from service.memory import settle

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which ends this one
    os.nice(_NICENESS)
    if hasattr(os, "SCHED_BATCH"):  # Linux: a call that wakes it does not give it the caller's core at once
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    configure("info", "json")  # this process has no settings, and its output is the service's
    try:
        worker = LocalWorker(connection, bundle_path, config)
    except Exception as error:
        connection.send(Reply(0, error=f"{type(error).__name__}: {error}"))
        return
    settle()
    with contextlib.suppress(EOFError, BrokenPipeError):  # the service is gone
        worker.serve()


def _end(process: ForkServerProcess) -> None:
    """Wait for the process's end, then force it."""
    process.join(_STOP_S)
    if process.exitcode is None:
        process.kill()
        process.join()
    process.close()
