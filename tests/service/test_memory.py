"""`service.memory`: what a process does not use, it does not keep."""

import asyncio
import gc
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.background import ended
from service.memory import collect_new, collections_told, keep_giving_back
from service.metrics import Metrics
from service.settings import Settings
from tests.benchmarks.http import resident_kib
from tests.service.running import running, until

CHUNK, NUM_CHUNKS = 60_000, 1_000  # below what malloc maps by itself, so all of it is in the heap


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap, and /proc")
async def test_free_pages_between_what_lives_long_go_back():
    chunks = [bytearray(CHUNK) for _ in range(NUM_CHUNKS)]
    kept = chunks[::10] + chunks[-1:]  # holes between them, and the heap's top is in use
    full_kib = resident_kib(os.getpid())
    chunks.clear()
    holes_kib = 0.8 * CHUNK * NUM_CHUNKS / 1_024
    task = asyncio.create_task(keep_giving_back(every_s=0.05))
    try:
        await until(lambda: resident_kib(os.getpid()) < full_kib - holes_kib)
    finally:
        await ended(task)
    assert len(kept) > 0


class _Ring:
    """Stands in a cycle with itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def no_collections() -> Iterator[None]:
    """None but those that are asked for; what was there before is not looked at."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def test_cycles_are_looked_for_only_where_much_is_new(no_collections):
    rings = [_Ring()]
    gone = weakref.ref(rings[0])
    rings.clear()
    collect_new()
    assert gone() is not None  # a handful of objects is not worth it
    rings = [_Ring() for _ in range(2_000)]
    rings.clear()
    collect_new()
    assert gone() is None


def test_what_has_survived_some_looks_is_looked_at_again(no_collections):
    ring: _Ring | None = _Ring()
    gone = weakref.ref(ring)
    others: list[_Ring] = []

    def one_look() -> None:
        others.extend(_Ring() for _ in range(2_000))
        collect_new()

    one_look()
    ring = None  # it has survived a look, and stands in a cycle from now on
    one_look()
    assert gone() is not None
    for _ in range(50):
        one_look()
    assert gone() is None


def test_collections_are_told_with_their_length_until_nobody_listens(no_collections):
    metrics = Metrics()
    with collections_told(metrics.gc_pauses.add):
        gc.collect()
    gc.collect()
    value = metrics.registry.get_sample_value
    assert value("sidrec_gc_pause_seconds_count") == 1
    seconds = value("sidrec_gc_pause_seconds_sum")
    assert seconds is not None
    assert 0 < seconds < 60


async def test_the_service_looks_for_cycles_when_it_is_idle(bundles: Path, tmp_path: Path, no_collections):
    async with running(Settings(bundles=bundles, data_dir=tmp_path / "redis")) as service:
        rings = [_Ring() for _ in range(2_000)]
        gone = weakref.ref(rings[0])
        with service.state.admission.slot():  # as a request that takes long
            rings.clear()
            await asyncio.sleep(0.4)
            assert gone() is not None
        await until(lambda: gone() is None)
        count = service.state.metrics.registry.get_sample_value("sidrec_gc_pause_seconds_count")
        assert count is not None
        assert count >= 1
