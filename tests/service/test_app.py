"""The composition root: what runs in the background ends with the application, whatever it does with a cancellation."""

import asyncio
from contextlib import AsyncExitStack

from service.app import _run_in_background


async def test_background_work_ends_even_if_it_swallows_a_cancellation():
    async def stubborn() -> None:
        for _ in range(3):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue

    async with asyncio.timeout(5):
        async with AsyncExitStack() as stack:
            _run_in_background(stubborn(), "stubborn", stack)
            await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "stubborn"]


async def test_background_work_that_failed_does_not_fail_the_end():
    async def failing() -> None:
        raise RuntimeError("a disk is full")

    async with AsyncExitStack() as stack:
        _run_in_background(failing(), "failing", stack)
        await asyncio.sleep(0.01)
