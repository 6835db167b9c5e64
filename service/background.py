"""Background work that ends when it is told to."""

import asyncio
from typing import Any

_ASK_AGAIN_S = 0.2


async def ended(task: "asyncio.Task[Any]") -> None:
    """Cancel a task and wait until it is over, however that went."""
    while not task.done():  # redis-py swallows a cancellation that comes as an answer does
        task.cancel()
        await asyncio.wait((task,), timeout=_ASK_AGAIN_S)
