"""Records that are written in the background: nobody waits for them, and what cannot be written is dropped and counted.

`put` is for the event loop and costs nothing; a task hands batches to `write`. When the queue is full, or `write`
fails, records are lost: their loss is the price of never delaying or failing an answer.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")

_STOP_TIMEOUT_S = 5.0


class BackgroundWriter(Generic[T]):
    """A bounded queue and the task that empties it. `start()`, `put(…)`, `stop()`."""

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[T]], Awaitable[None]],
        *,
        max_queued: int = 10_000,
        max_batch: int = 100,
        interval_s: float = 0.2,
        on_dropped: Callable[[int], None] | None = None,
    ) -> None:
        self._name = name
        self._write = write
        self._max_queued = max_queued
        self._max_batch = max_batch
        self._interval_s = interval_s
        self._on_dropped = on_dropped
        self._queue: deque[T] = deque()
        self._stopping = asyncio.Event()
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.num_dropped = 0
        """Records that were lost."""

    async def start(self) -> None:
        """Begin to write."""
        self._stopping.clear()
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def stop(self) -> None:
        """Write what waits, for a few seconds at most, and end."""
        self._stopping.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_STOP_TIMEOUT_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._drop(len(self._queue))
        self._queue.clear()

    @property
    def num_waiting(self) -> int:
        """Records that are not yet taken up."""
        return len(self._queue)

    def put(self, record: T) -> None:
        """Leave a record to be written, if there is room."""
        if len(self._queue) >= self._max_queued:
            self._drop(1)
        else:
            self._queue.append(record)

    async def forget(self, is_unwanted: Callable[[T], bool]) -> None:
        """Take back what waits; when this returns, what was being written is written."""
        self._queue = deque(record for record in self._queue if not is_unwanted(record))
        async with self._writing:
            pass

    def _drop(self, number: int) -> None:
        self.num_dropped += number
        if number and self._on_dropped is not None:
            self._on_dropped(number)

    async def _run(self) -> None:
        is_last = False
        while not is_last:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._stopping.wait()
            is_last = self._stopping.is_set()
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
                try:
                    async with self._writing:
                        await self._write(batch)
                except asyncio.CancelledError:
                    self._drop(len(batch))
                    raise
                except Exception as error:  # whatever it is, the next batch may fare better
                    self._drop(len(batch))
                    log.warning("records_dropped", of=self._name, number=len(batch), error=type(error).__name__)
