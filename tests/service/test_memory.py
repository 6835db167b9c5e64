"""`service.memory`: what a process does not use, it does not keep."""

import asyncio
import os
import sys

import pytest

from service.background import ended
from service.memory import keep_giving_back
from tests.benchmarks.http import resident_kib
from tests.service.running import until

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
