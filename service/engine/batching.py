"""Whatever waits together is one batch: dynamic batching with no timer, for every engine.

    submit() → queue → batch of what waits (equal `group`, at most `max_batch`) → run(batch) → futures

While one batch runs the next one gathers, so a lone job waits for nothing and a crowd shares the work.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.engine.base import EngineUnavailableError

JobT = TypeVar("JobT")
AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True)
class Batched(Generic[AnswerT]):
    """An answer and how long its job waited for its batch."""

    answer: AnswerT
    queue_s: float


@dataclass(eq=False)
class _Entry(Generic[JobT, AnswerT]):
    job: JobT
    group: Hashable
    future: asyncio.Future[Batched[AnswerT]]
    queued_at: float


class Batcher(Generic[JobT, AnswerT]):
    """Runs jobs, one batch at a time. `run` answers every job of a batch, with an exception for one that failed."""

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[JobT]], Awaitable[Sequence[AnswerT | Exception]]],
        *,
        max_batch: int,
        group: Callable[[JobT], Hashable],
        on_batch: Callable[[int], None],
    ) -> None:
        self._name = name
        self._run = run
        self._max_batch = max_batch
        self._group = group
        self._on_batch = on_batch
        self._waiting: list[_Entry[JobT, AnswerT]] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False

    @property
    def is_running(self) -> bool:
        """Whether jobs are taken."""
        return self._task is not None and not self._task.done() and not self._is_stopping

    @property
    def num_waiting(self) -> int:
        """Jobs not yet in a batch."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to take jobs."""
        self._task = asyncio.create_task(self._serve(), name=self._name)
        self._task.add_done_callback(lambda _task: self._refuse_waiting())

    async def submit(self, job: JobT) -> Batched[AnswerT]:
        """Queue one job and wait for its batch. Cancelling it before then gives its place up."""
        if not self.is_running:
            raise EngineUnavailableError(f"the {self._name} is not running")
        future: asyncio.Future[Batched[AnswerT]] = asyncio.get_running_loop().create_future()
        entry = _Entry(job, self._group(job), future, time.monotonic())
        self._waiting.append(entry)
        self._wake.set()
        try:
            return await future
        finally:
            if entry in self._waiting:  # the caller gave up before its batch began
                self._waiting.remove(entry)

    async def stop(self) -> None:
        """Let the running batch finish; whatever still waits gets `EngineUnavailableError`."""
        self._is_stopping = True
        self._wake.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        # Its frames hold the last batch, and `run` is a method of whoever owns this: they would keep each other, and a
        # model, until a rare full collection.
        self._task, self._run = None, _ended

    async def _serve(self) -> None:
        while not self._is_stopping:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting and not self._is_stopping:
                await self._serve_batch(self._next_batch())

    async def _serve_batch(self, batch: Sequence[_Entry[JobT, AnswerT]]) -> None:
        # No task of its own and no shield: each would be one more round of the event loop, all of which the engine is
        # idle, between its answer and its next batch.
        started_at = time.monotonic()
        self._on_batch(len(batch))
        try:
            answers = await self._run([entry.job for entry in batch])
        except Exception as error:  # whatever fails must not take the batcher down
            answers = [error] * len(batch)
        except BaseException:  # the event loop ends
            _refuse(batch, self._name)
            raise
        for entry, answer in zip(batch, answers, strict=True):
            if entry.future.done():  # cancelled by its caller
                continue
            if isinstance(answer, Exception):
                entry.future.set_exception(answer)
            else:
                entry.future.set_result(Batched(answer, started_at - entry.queued_at))

    def _next_batch(self) -> list[_Entry[JobT, AnswerT]]:
        """The oldest job and those behind it of the same group."""
        group = self._waiting[0].group
        batch = [entry for entry in self._waiting if entry.group == group][: self._max_batch]
        chosen = set(map(id, batch))
        self._waiting = [entry for entry in self._waiting if id(entry) not in chosen]
        return batch

    def _refuse_waiting(self) -> None:
        _refuse(self._waiting, self._name)
        self._waiting.clear()


def _refuse(entries: Sequence[_Entry[JobT, AnswerT]], name: str) -> None:
    for entry in entries:
        if not entry.future.done():
            entry.future.set_exception(EngineUnavailableError(f"the {name} has stopped"))


async def _ended(_jobs: Sequence[object]) -> Sequence[Exception]:
    """What a batcher that has stopped runs: nothing."""
    return [EngineUnavailableError("the batcher has stopped") for _ in _jobs]


def run_isolated(run: Callable[[Sequence[JobT]], Sequence[AnswerT]], jobs: Sequence[JobT]) -> list[AnswerT | Exception]:
    """Run jobs together; if that fails, one by one, so that only the culprit fails, with its own exception."""
    if not jobs:
        return []
    try:
        return list(run(jobs))
    except Exception as error:
        return [error] if len(jobs) == 1 else [run_isolated(run, [job])[0] for job in jobs]
