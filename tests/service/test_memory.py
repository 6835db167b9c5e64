"""`service.memory`: what a process does not use, it does not keep."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from service.background import ended
from service.memory import keep_giving_back
from tests.service.running import until

CHUNK, NUM_CHUNKS = 60_000, 1_000  # below what malloc maps by itself, so all of it is in the heap


def resident_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1_024 * int(re.findall(r"^Rss: +(\d+) kB$", rollup, re.MULTILINE)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap, and /proc")
async def test_free_pages_between_what_lives_long_go_back():
    chunks = [bytearray(CHUNK) for _ in range(NUM_CHUNKS)]
    kept = chunks[::10] + chunks[-1:]  # holes between them, and the heap's top is in use
    full = resident_bytes()
    chunks.clear()
    holes = 0.8 * CHUNK * NUM_CHUNKS
    task = asyncio.create_task(keep_giving_back(every_s=0.05))
    try:
        await until(lambda: resident_bytes() < full - holes)
    finally:
        await ended(task)
    assert len(kept) > 0
