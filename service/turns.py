"""The event loop's costly work takes turns: some pieces in each of its rounds, in an order.

First what goes on to the engine, so that it never decodes two requests, at nearly the cost of ten, while thirty answers
are written and twenty requests wait to be sent. Then the oldest request.

What comes in is looked at between two rounds only, so a round must be short, or a request that is to be told no waits
for whatever others have come back from Redis and the engine meanwhile, and so does the engine for its next batch.
"""

import asyncio
from heapq import heappop, heappush
from itertools import count

_PER_ROUND = 4  # of about half a millisecond


class Turns:
    """One event loop's, shared by all requests that it works on."""

    def __init__(self, per_round: int = _PER_ROUND) -> None:
        self._per_round = per_round
        self._left = per_round
        self._waiting: list[tuple[bool, float, int, asyncio.Future[None]]] = []
        self._arrivals = count()  # of those that began at one time
        self._is_round_due = False

    async def take(self, began_at: float, *, to_engine: bool = False) -> None:
        """Wait for a turn: for nothing while there is little to do, else behind the requests that began before.

        What goes `to_engine` waits for its like alone.
        """
        loop = asyncio.get_running_loop()
        if not self._is_round_due:
            self._is_round_due = True
            loop.call_soon(self._round, loop)
        if self._left > 0 and not self._waiting:
            self._left -= 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        heappush(self._waiting, (not to_engine, began_at, next(self._arrivals), turn))
        await turn

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._per_round
        while self._left > 0 and self._waiting:
            *_, turn = heappop(self._waiting)
            if not turn.done():  # its request has not been given up
                turn.set_result(None)
                self._left -= 1
        self._is_round_due = self._left < self._per_round
        if self._is_round_due:
            loop.call_soon(self._round, loop)
