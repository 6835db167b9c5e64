"""Who gets in: at most `max_in_flight` requests at once, and of those that need the engine only who can be in time.

The rest are told at once when to come back. `Admission` looks at this process, for every kind of work, and `EarlyGate`
asks it before anything of a request is read; `EngineLine` looks at the engine, once a request's deadline is known, and
predicts how long an answer would take. A route asks the line as soon as it has read the JSON: what a body has to go
through after that costs three times as much as all before it.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import UnavailableProblem, problem_response
from service.metrics import Metrics
from service.turns import Turns

_SMOOTHING = 0.05  # of the means; about the last 20 requests count

_BURST_SHARE = 0.75
"""Of its deadline: what an answer may be predicted to take while the line is short or has just become long."""
_STANDING_SHARE = 0.5
"""The same once the line has been longer than that for `_STANDING_S`: a queue that stands helps nobody."""
_STANDING_S = 0.5
_SHORT_SHARE = 0.25
"""And only a line that has become as short as this is a burst when it grows again."""
_LEAST_STALL_S, _STALL_ANSWERS = 0.25, 3.0
"""An engine hangs that has answered nobody while a request waited so long, and for so many times the usual time."""
_LEAST_SLOPE = 0.25
"""Of a mean share of the work: what each request ahead costs at least. Requests that wait together share a batch."""


_MOST_LAG_S, _BEAT_S = 0.005, 0.01
"""Of the event loop, the wait for a turn included: with 20 ms more were refused at 80 % of what can be answered."""
_IDLE_S = 0.2
"""Without a request, and the service is idle."""
_LEAST_LIMIT, _CUT, _RAISE = 64, 0.7, 2
"""Requests that are let in however slow the loop is; the limit falls by a factor and rises by a number each beat."""


class Admission:
    """Counts the requests being answered and sheds what is over the limit, at once, with `Retry-After`.

    The limit is `max_in_flight`, and less while the event loop lags: what is in flight shares one loop with what comes
    in, and a loop that is late for everybody can neither keep deadlines nor say no in time.
    """

    def __init__(self, max_in_flight: int, metrics: Metrics) -> None:
        self._max_in_flight = max_in_flight
        self._limit = max_in_flight
        self._metrics = metrics
        self._in_flight = 0
        self._mean_s = 0.0
        self._last_answer_at = -math.inf
        metrics.in_flight_limit.set(max_in_flight)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a place while a request is answered; `UnavailableProblem` when there is none."""
        self.check()
        self._in_flight += 1
        self._metrics.in_flight.inc()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.dec()
            self._last_answer_at = time.perf_counter()
            self._mean_s += _SMOOTHING * (self._last_answer_at - start - self._mean_s)

    def check(self) -> None:
        """`UnavailableProblem` when there is no place."""
        if self._in_flight >= self._limit:
            self._metrics.shed.labels("overload").inc()
            # The queue ahead drains in about one mean service time, since the limit bounds how long that is.
            raise UnavailableProblem(
                f"{self._in_flight} requests are being answered, which is the limit; try again later",
                retry_after_s=max(1, math.ceil(self._mean_s)),
                kind="overloaded",
            )

    async def watch(self, turns: Turns, when_idle: Callable[[], None] = lambda: None) -> None:
        """Keep the limit to what the event loop can bear; runs as long as the application.

        `when_idle` is called at each beat before which no request was being answered for a while: for what none should
        wait for. A moment without any is not enough: under load the next one comes at once, and others behind it.
        """
        while True:
            due = time.perf_counter() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            await turns.take(due)  # behind everybody
            self.adapt(time.perf_counter() - due)
            if self._in_flight == 0 and time.perf_counter() - self._last_answer_at >= _IDLE_S:
                when_idle()

    def adapt(self, lag_s: float) -> None:
        """The event loop was so late."""
        if lag_s <= _MOST_LAG_S:
            self._limit = min(self._max_in_flight, self._limit + _RAISE)
        else:  # from what is in flight: a limit that nobody meets would have to fall for long before it does anything
            least = min(_LEAST_LIMIT, self._max_in_flight)
            self._limit = max(least, round(_CUT * min(self._limit, max(self._in_flight, least))))
        self._metrics.event_loop_lag.observe(lag_s)
        self._metrics.in_flight_limit.set(self._limit)


class EarlyGate:
    """Sheds what has no place before its body, key or path is looked at: a no must cost far less than an answer."""

    _PATHS = ("/recommend", "/rerank", "/events")

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request; operations, and anything but HTTP, pass through."""
        if scope["type"] == "http" and scope["path"] in self._PATHS:
            try:
                scope["app"].state.sidrec.admission.check()
            except UnavailableProblem as problem:
                await problem_response(Request(scope), problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class EngineLine:
    """The requests on their way through one engine, and how long a further one would take.

    Learnt is how long answers took against how many requests were ahead of them, as a line through the recent means;
    nothing of it depends on how the engine batches. The slope is held between a quarter of what it would be if every
    request had the engine to itself, and just that. Below the mean the prediction is proportional, so that it falls as
    fast as the line empties; and whoever finds the line empty is let in, so that it cannot stay shut.
    """

    def __init__(self, metrics: Metrics, bundle_id: str, clock: Callable[[], float] = time.perf_counter) -> None:
        """`bundle_id` is whose engine it is."""
        self._metrics = metrics
        self._predicted = metrics.predicted_wait.labels(bundle_id)
        self._clock = clock
        self._num_ahead = 0
        self._mean_s = self._mean_ahead = self._variance = self._covariance = 0.0
        self._mean_answered_s = 0.0  # without those that were late, so that a hanging engine does not seem a slow one
        self._is_long = False
        self._long_since = 0.0
        self._last_progress_at = -math.inf

    @property
    def num_ahead(self) -> int:
        """Requests in the line."""
        return self._num_ahead

    def is_stalled_for(self, place: "Place") -> bool:
        """Whether the engine has answered nobody since the request took its place, and for far longer than usual.

        A line that is merely long moves meanwhile.
        """
        now = self._clock()
        has_moved = self._last_progress_at > place.since
        stalled_s = now - self._last_progress_at
        return (
            not has_moved and now - place.since > _LEAST_STALL_S and stalled_s > _STALL_ANSWERS * self._mean_answered_s
        )

    def predicted_s(self) -> float:
        """How long an answer would take a request that came now."""
        share = self._mean_s / (1 + self._mean_ahead)
        beyond = self._num_ahead - self._mean_ahead
        if beyond <= 0:
            return share * (1 + self._num_ahead)
        # One request squared, at the least slope, stands for what is not known yet.
        learnt = (self._covariance + _LEAST_SLOPE * share) / (self._variance + 1)
        return self._mean_s + beyond * min(share, max(_LEAST_SLOPE * share, learnt))

    @contextmanager
    def place(self, left_s: float, *, unconditional: bool = False) -> Iterator["Place"]:
        """Stand in line; `UnavailableProblem` if the answer would come too late for a deadline of `left_s`."""
        if not unconditional:
            self.check(left_s)
        if self._num_ahead == 0:
            self._last_progress_at = self._clock()  # who has nothing to do does not stall
        place = Place(self, self._num_ahead, since=self._clock())
        self._num_ahead += 1
        try:
            yield place
        finally:
            place.leave()

    def check(self, left_s: float) -> None:
        """`UnavailableProblem` if an answer would come too late for a deadline of `left_s`."""
        predicted_s = self.predicted_s()
        self._predicted.set(predicted_s)
        now = self._clock()
        if predicted_s <= _SHORT_SHARE * left_s or self._num_ahead == 0:
            self._is_long = False
        if predicted_s <= _STANDING_SHARE * left_s or self._num_ahead == 0:
            return
        if not self._is_long:
            self._is_long, self._long_since = True, now
        is_standing = now - self._long_since > _STANDING_S
        if not is_standing and predicted_s <= _BURST_SHARE * left_s:
            return
        self._metrics.shed.labels("predicted_wait").inc()
        raise UnavailableProblem(
            f"{self._num_ahead} requests are ahead, and an answer would take about {1000 * predicted_s:.0f} of the "
            f"{1000 * left_s:.0f} ms that its deadline leaves; try again later or allow more time",
            retry_after_s=max(1, math.ceil(predicted_s)),
            kind="overloaded",
        )

    def _left(self) -> None:
        self._num_ahead -= 1
        self._predicted.set(self.predicted_s())

    def _answered(self, num_ahead: int, seconds: float) -> None:
        self._last_progress_at = self._clock()
        weight = _SMOOTHING if self._mean_answered_s else 1.0
        self._mean_answered_s += weight * (seconds - self._mean_answered_s)
        self._took(num_ahead, seconds)

    def _took(self, num_ahead: int, seconds: float) -> None:
        """An answer took so long with so many requests ahead."""
        weight = _SMOOTHING if self._mean_s else 1.0
        over_s, over_ahead = seconds - self._mean_s, num_ahead - self._mean_ahead
        self._mean_s += weight * over_s
        self._mean_ahead += weight * over_ahead
        if weight < 1:
            self._variance = (1 - weight) * (self._variance + weight * over_ahead**2)
            self._covariance = (1 - weight) * (self._covariance + weight * over_ahead * over_s)


class Place:
    """One request's place in the line, from its admission until the engine has answered it."""

    def __init__(self, line: EngineLine, num_ahead: int, since: float) -> None:
        self._line = line
        self._num_ahead = num_ahead
        self.since = since
        self._is_in_line = True

    def leave(self) -> None:
        """The engine has nothing to do with this request any more."""
        if self._is_in_line:
            self._is_in_line = False
            self._line._left()

    def answered(self, thought_s: float = 0.0) -> None:
        """The engine has answered, and thought for so long: its own thought is not what a request waits for."""
        self._line._answered(self._num_ahead, max(0.0, self._line._clock() - self.since - thought_s))
        self.leave()

    def was_late(self) -> None:
        """The deadline has passed before the engine answered: at least so long it would have taken."""
        waited_s = self._line._clock() - self.since
        if waited_s > self._line.predicted_s():
            self._line._took(self._num_ahead, waited_s)
        self.leave()
