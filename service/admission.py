"""Who gets in: at most `max_in_flight` requests at once; the rest are told when to come back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import UnavailableProblem
from service.metrics import Metrics

_SMOOTHING = 0.05  # of the mean service time; about the last 20 requests count


class Admission:
    """Counts the requests being answered and sheds what is over the limit, at once, with `Retry-After`."""

    def __init__(self, max_in_flight: int, metrics: Metrics) -> None:
        self._max_in_flight = max_in_flight
        self._metrics = metrics
        self._in_flight = 0
        self._mean_s = 0.0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a place while a request is answered; `UnavailableProblem` when there is none."""
        if self._in_flight >= self._max_in_flight:
            self._metrics.shed.labels("overload").inc()
            # The queue ahead drains in about one mean service time, since the limit bounds how long that is.
            raise UnavailableProblem(
                f"{self._in_flight} requests are being answered, which is the limit; try again later",
                retry_after_s=max(1, round(self._mean_s)),
                kind="overloaded",
            )
        self._in_flight += 1
        self._metrics.in_flight.inc()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.dec()
            self._mean_s += _SMOOTHING * (time.perf_counter() - start - self._mean_s)
