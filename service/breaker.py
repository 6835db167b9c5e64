"""Circuit breakers round the engine and Redis: what failed several times running is left alone for some seconds.

    closed ── `threshold` failures running ──> open ── after `open_s` ──> half-open ── a probe: good ──> closed
                                                ^─────────────────────────── bad ────────┘

The state machine is purgatory's. Added here: one probe at a time, outcomes that say nothing (a caller that left), and
metrics. While a breaker is open nobody waits out a deadline for what is known to be down.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import structlog
from purgatory.domain.model import CLOSED, HALF_OPENED, OPENED, Context, OpenedState
from redis.asyncio import Redis

from service.histories import (
    Event,
    EventType,
    Histories,
    HistoryEntry,
    HistoryTimeoutError,
    HistoryUnavailableError,
    UserState,
)
from service.last_known import Hidden, LastKnown
from service.metrics import Metrics

log = structlog.get_logger(__name__)

_SLOW_S = 0.1
"""A call to Redis that was given up after so long counts as a failure; a good one takes a millisecond."""

_LEVELS = {CLOSED: 0, HALF_OPENED: 1, OPENED: 2}


class BreakerOpenError(Exception):
    """Not tried: it failed too often of late."""


class Breaker:
    """One dependency's breaker. Outcomes are counted as they come in, whatever the order of the calls."""

    def __init__(self, name: str, metrics: Metrics, *, threshold: int, open_s: float, bundle_id: str = "") -> None:
        """`bundle_id` is whose engine it is, where it is one's."""
        self._name = name
        self._bundle_id = bundle_id
        self._metrics = metrics
        self._context = Context(name, threshold, open_s)
        self._is_probing = False
        self._level = metrics.breaker_state.labels(name, bundle_id)
        self._published = ""
        self._publish()

    @property
    def is_closed(self) -> bool:
        """Whether everybody is let through."""
        return self._context.state == CLOSED

    @contextmanager
    def attempt(self, is_failure: Callable[[BaseException], bool | None]) -> Iterator[None]:
        """Let a call through, or raise `BreakerOpenError`. `is_failure` judges what it raises; None: it says nothing.

        A call that raises what is no failure, such as a refusal of this one request, counts as a success.
        """
        is_probe = self._enter()
        outcome: bool | None = None
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure, outcome = error, is_failure(error)
            raise
        else:
            outcome = False
        finally:
            self._leave(is_probe, outcome, failure)

    def _enter(self) -> bool:
        """Whether this call is the probe; `BreakerOpenError` if it may not be made."""
        if self.is_closed:
            return False
        try:
            self._context.handle_new_request()
        except OpenedState as opened:
            raise BreakerOpenError(f"{self._name} failed too often of late") from opened
        finally:
            self._publish()
        if self._is_probing:
            raise BreakerOpenError(f"{self._name} failed too often of late, and is being tried by another request")
        self._is_probing = True
        return True

    def _leave(self, is_probe: bool, outcome: bool | None, failure: BaseException | None) -> None:
        if is_probe:
            self._is_probing = False
        elif not self.is_closed:  # a call from before: while it is open, only the probe decides
            return
        if outcome is None:
            return
        if outcome:
            self._context.handle_exception(failure or RuntimeError())
            if self._context.state == OPENED:
                self._metrics.breaker_opened.labels(self._name).inc()
                log.warning("breaker_opened", **self._named(), open_s=self._context.ttl, error=str(failure))
        else:
            if not self.is_closed:
                log.info("breaker_closed", **self._named())
            self._context.handle_end_request()
        self._publish()

    def _named(self) -> dict[str, str]:
        return {"dependency": self._name} | ({"bundle": self._bundle_id} if self._bundle_id else {})

    def _publish(self) -> None:
        self._context.messages.clear()
        if (state := self._context.state) != self._published:
            self._published = state
            self._level.set(_LEVELS[state])


class GuardedHistories(Histories):
    """Histories that answer `HistoryUnavailableError` at once while Redis is known to be down, and know a little."""

    def __init__(
        self,
        breaker: Breaker,
        redis: Redis,
        *,
        max_stored: int,
        ttl_s: int | None,
        last_known: LastKnown | None = None,
    ) -> None:
        super().__init__(redis, max_stored=max_stored, ttl_s=ttl_s)
        self._breaker = breaker
        self._last_known = LastKnown() if last_known is None else last_known
        self._last_answer_at = [-math.inf]  # shared by the views of all tenants

    async def record(self, events: Sequence[Event]) -> list[bool]:
        """As `Histories.record`."""
        with self._guarded():
            stored = await super().record(events)
        of_user: dict[str, list[tuple[EventType, str]]] = {}
        for event in events:  # also those stored before: their acknowledgement may have been lost
            of_user.setdefault(event.user_id, []).append((event.event_type, event.item_id))
        for user_id, done in of_user.items():
            self._last_known.tell((self._namespace, user_id), done)
        return stored

    async def load(self, user_id: str, *, last: int | None = None, timeout_s: float | None = None) -> UserState:
        """As `Histories.load`."""
        num_told = self._last_known.num_told
        with self._guarded():
            state = await super().load(user_id, last=last, timeout_s=timeout_s)
        self._last_known.put((self._namespace, user_id), state.hidden_json, num_told)
        return state

    def last_known(self, user_id: str) -> Hidden:
        """As `Histories.last_known`."""
        return self._last_known.get((self._namespace, user_id))

    async def history(self, user_id: str) -> list[HistoryEntry]:
        """As `Histories.history`."""
        with self._guarded():
            return await super().history(user_id)

    async def erase(self, user_id: str) -> int:
        """As `Histories.erase`."""
        with self._guarded():
            num_keys = await super().erase(user_id)
        self._last_known.forget((self._namespace, user_id))
        return num_keys

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        start = time.monotonic()

        def is_failure(error: BaseException) -> bool | None:
            if self._last_answer_at[0] > start:  # it answers others: this process is too busy to hear it in time
                return None
            if isinstance(error, asyncio.CancelledError | HistoryTimeoutError):  # a client that left, or a deadline
                return True if time.monotonic() - start > _SLOW_S else None
            return True if isinstance(error, HistoryUnavailableError) else None

        try:
            with self._breaker.attempt(is_failure):
                yield
                self._last_answer_at[0] = time.monotonic()
        except BreakerOpenError as error:
            raise HistoryUnavailableError(f"the history store is unavailable ({error})") from error
