"""The real application round an engine that answers at once: the server of `bench-http`, in a process of its own.

`python -m tests.benchmarks.instant_service FOLDER`, as `tests.benchmarks.serving` with another engine.
"""

import itertools
import sys
from functools import partial
from pathlib import Path

import numpy as np

from semantic_ids.bundle import Bundle
from service.app import create_app
from service.engine.base import DecodeRequest, DecodeResult, ThoughtListener
from service.metrics import Metrics
from service.settings import Settings
from tests.benchmarks.serving import serve


class InstantEngine:
    """The most popular items that a request may get. For requests whose only filter is the seen set."""

    name = "instant"
    problem: str | None = None
    num_waiting = 0

    def __init__(self, bundle: Bundle, _settings: Settings, _metrics: Metrics) -> None:
        self._by_popularity = bundle.catalog.by_popularity.tolist()
        self._scores = -np.arange(len(bundle.catalog), dtype=np.float32)

    async def start(self) -> None:
        """Nothing to load."""

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """The first `width` items that are not denied: some microseconds."""
        denied = set(request.item_filter.deny.tolist())
        eligible = (rank for rank in self._by_popularity if rank not in denied)
        ranks = np.fromiter(itertools.islice(eligible, request.width), np.int64)
        return DecodeResult(ranks, self._scores[: len(ranks)])

    async def use_catalog(self, bundle: Bundle) -> None:
        """Nothing here changes the catalogue."""

    async def retire_catalog(self, catalog_id: str) -> None:
        """Nothing here changes the catalogue."""

    async def stop(self) -> None:
        """Nothing to free."""


if __name__ == "__main__":
    serve(partial(create_app, engine_factory=InstantEngine), Path(sys.argv[1]))
