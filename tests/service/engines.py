"""Engines for tests and benchmarks of the HTTP half: they speak the protocol and run no model."""

import asyncio

import numpy as np

from semantic_ids.bundle import Bundle
from service.app import EngineFactory
from service.engine.base import DecodeRequest, DecodeResult, EngineUnavailableError, ThoughtListener
from service.metrics import Metrics
from service.settings import Settings


class InstantEngine:
    """Answers at once: the first eligible items by rank, each a little worse than the one before."""

    name = "instant"

    def __init__(self, _bundle: Bundle) -> None:
        self.problem: str | None = "starting"
        self.num_waiting = 0
        self.num_decoded = 0

    async def start(self) -> None:
        """There is nothing to load."""
        self.problem = None

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """At most `width` eligible items."""
        self.num_decoded += 1
        everything = np.arange(request.item_filter.num_items)
        ranks = everything[request.item_filter.contains(everything)][: request.width]
        return DecodeResult(ranks, -0.01 * np.arange(1, len(ranks) + 1, dtype=np.float32))

    async def use_catalog(self, bundle: Bundle) -> None:
        """A request's filter says all that it needs."""

    async def retire_catalog(self, catalog_id: str) -> None:
        """There is nothing to forget."""

    async def stop(self) -> None:
        """There is nothing to free."""
        self.problem = "stopped"


class SlowEngine(InstantEngine):
    """The same after `delay_s`."""

    name = "slow"

    def __init__(self, bundle: Bundle, delay_s: float) -> None:
        super().__init__(bundle)
        self.delay_s = delay_s

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """What the instant engine gives, late."""
        self.num_waiting += 1
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.num_waiting -= 1
        return await super().decode(request, on_thought)


class FailingEngine(InstantEngine):
    """Ready, and then raises `error` at every request."""

    name = "failing"

    def __init__(self, bundle: Bundle, error: Exception) -> None:
        super().__init__(bundle)
        self.error = error

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """Never an answer."""
        raise self.error


class UnreadyEngine(InstantEngine):
    """Starts, and is not ready."""

    async def start(self) -> None:
        """Stays as it is."""


def instant(bundle: Bundle, _settings: Settings, _metrics: Metrics) -> InstantEngine:
    """An engine factory."""
    return InstantEngine(bundle)


def slow(delay_s: float) -> EngineFactory:
    """An engine factory."""
    return lambda bundle, _settings, _metrics: SlowEngine(bundle, delay_s)


def failing(error: Exception | None = None) -> EngineFactory:
    """An engine factory; without `error` the engine is unavailable."""
    return lambda bundle, _settings, _metrics: FailingEngine(bundle, error or EngineUnavailableError("it is a test"))
