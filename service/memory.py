"""A process's memory: cycles looked for while nobody waits, one heap, and what is free given back.

The heap is glibc's; with another library that part does nothing.
"""

import asyncio
import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

_M_ARENA_MAX = -8  # glibc's malloc.h

_THRESHOLDS = (30_000, 50, 20)
"""When Python looks for cycles by itself: after so many new objects, so many times that, and so on. What requests under
way hold is new, some 170 objects each. So with 10,000 it looked whenever sixty came together, in up to 23 ms for which
all of them waited, and found nothing; with Python's own 700, 10 and 10 it took a tenth of the time under load. So many
may wait in cycles, too; a connection that ended left 24 before `BoundedHttp.connection_lost` let its request go."""
_WORTH_A_LOOK = 100  # new objects


def settle() -> None:
    """All that is there now lives as long as the process: no collection looks at it again.

    Over modules, routes and a model a full one would stop every request: 35 ms measured without torch.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


def collect_new() -> None:
    """Free what stands in cycles among the new objects, where there are some: for a service that is idle.

    It takes half a millisecond for a thousand objects. New are also all answers that were kept since the last time.
    """
    new, young, _ = gc.get_count()
    if new >= _WORTH_A_LOOK:
        gc.collect(1 if young >= _THRESHOLDS[1] else 0)


@contextmanager
def collections_told(listener: Callable[[float], None]) -> Iterator[None]:
    """Tell `listener` of each collection, Python's own too, how many seconds all else stood still for it."""
    began_at = 0.0

    def hear(phase: str, _info: dict[str, int]) -> None:
        nonlocal began_at
        if phase == "start":
            began_at = time.perf_counter()
        else:
            listener(time.perf_counter() - began_at)

    gc.callbacks.append(hear)
    try:
        yield
    finally:
        gc.callbacks.remove(hear)


def keep_one_heap() -> None:
    """From now on threads make no heap of their own, each with holes of its own that nobody else fills.

    With them the service grew by .25 MB with each move of bundles (docs/benchmarks.md). Python's threads take turns, so
    they hardly ever wait for the one heap's lock.
    """
    if (mallopt := getattr(_libc(), "mallopt", None)) is not None:
        mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Collect what stands in cycles, and hand free pages to the system.

    A bundle leaves some two thousand objects in cycles, which would wait for a full collection, and under load there is
    hardly ever one (`settle`). It takes 10 to 40 ms, for which all requests wait: for the moves of bundles alone.
    """
    gc.collect()
    _trim()


async def keep_giving_back(every_s: float = 60.0) -> None:
    """Hand free pages to the system from time to time, as long as the application runs: .1 to .5 ms each time.

    What is free lies scattered between what lives long. Used again a little here and there, ever more of it stays with
    the process, which then seems to grow by a megabyte an hour although as much is in use as ever (docs/benchmarks.md).
    """
    while True:
        await asyncio.sleep(every_s)
        _trim()


def _trim() -> None:
    if (trim := getattr(_libc(), "malloc_trim", None)) is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
