"""What is being served: bundles, each with an engine of its own, one of them current.

Activation starts the new bundle's engine beside the old one's, and only then moves the pointer: requests that began on
the old bundle end on it, then its engine stops. So nothing is dropped, at the price of two engines for a while. The
pointer is the `current` file of the bundles' folder, which every replica follows, so that a publication, the command
line and the admin API are one and the same, and a restart serves what was active.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from semantic_ids.bundle import Bundle, BundleError, activate, current_id, previous_id
from service.engine.base import Engine, EngineError
from service.metrics import Metrics
from service.recommender import Recommender

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Deployment:
    """One bundle on its engine."""

    bundle: Bundle
    engine: Engine
    recommender: Recommender
    num_leases: int = 0
    is_free: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def leased(self) -> AsyncIterator["Deployment"]:
        """Hold it for a request: it does not stop before the request has ended."""
        self.num_leases += 1
        self.is_free.clear()
        try:
            yield self
        finally:
            self.num_leases -= 1
            if self.num_leases == 0:
                self.is_free.set()

    async def drain(self) -> None:
        """Until no request holds it."""
        if self.num_leases:
            await self.is_free.wait()


class Deployments:
    """The bundles that are loaded; `current` answers whoever asks for none by name."""

    def __init__(
        self,
        root: Path,
        make_engine: Callable[[Bundle], Engine],
        make_recommender: Callable[[Bundle, Engine], Recommender],
        metrics: Metrics,
    ) -> None:
        self._root = root
        self._make_engine = make_engine
        self._make_recommender = make_recommender
        self._metrics = metrics
        self._current: Deployment | None = None
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> Deployment:
        """The one that is served."""
        if self._current is None:
            raise EngineError("no bundle is being served")
        return self._current

    async def start(self) -> None:
        """Serve what `current` names; `BundleError` or `EngineError` if that cannot be."""
        await self._serve(await asyncio.to_thread(Bundle.load_current, self._root))

    async def activate(self, bundle_id: str) -> Deployment:
        """Make a published bundle current, on disk and here; whatever fails leaves everything as it was."""
        async with self._changing:
            if self.current.bundle.bundle_id != bundle_id:
                await self._serve(await asyncio.to_thread(Bundle.load, self._root / bundle_id))
            await asyncio.to_thread(activate, self._root, bundle_id)
            return self.current

    async def rollback(self) -> Deployment:
        """Activate the bundle that was current before; `BundleError` if there was none."""
        return await self.activate(await asyncio.to_thread(previous_id, self._root))

    async def follow(self, every_s: float) -> None:
        """Serve whatever `current` comes to name. A bundle that fails is logged and left alone until it changes."""
        failed = ""
        while True:
            await asyncio.sleep(every_s)
            async with self._changing:  # an activation moves the engine first and the pointer then
                with suppress(BundleError):  # unreadable for a moment: what is served stays
                    named = await asyncio.to_thread(current_id, self._root)
                    if named not in (failed, self.current.bundle.bundle_id):
                        failed = "" if await self._serves(named) else named

    async def _serves(self, bundle_id: str) -> bool:
        """Try to serve a bundle; whether that went well."""
        try:
            await self._serve(await asyncio.to_thread(Bundle.load, self._root / bundle_id))
        except (BundleError, EngineError):
            self._metrics.activations.labels("failed").inc()
            log.exception("bundle_not_served", bundle=bundle_id, serving=self.current.bundle.bundle_id)
            return False
        return True

    async def stop(self) -> None:
        """Stop every engine; what is being decoded is answered."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        if self._current is not None:
            await self._current.engine.stop()

    async def _serve(self, bundle: Bundle) -> None:
        """Start the bundle's engine, point to it, and let the one before go when its requests have ended."""
        engine = self._make_engine(bundle)
        try:
            await engine.start()
        except BaseException:
            await engine.stop()
            raise
        before, self._current = self._current, Deployment(bundle, engine, self._make_recommender(bundle, engine))
        self._metrics.bundle.clear()
        self._metrics.bundle.labels(bundle.bundle_id).set(1)
        self._metrics.catalog_epoch.set(bundle.catalog.epoch)
        self._metrics.activations.labels("served").inc()
        log.info("serving", bundle=bundle.bundle_id, before=before.bundle.bundle_id if before else None)
        if before is not None:
            task = asyncio.create_task(self._retire(before), name=f"retire-{before.bundle.bundle_id}")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _retire(self, deployment: Deployment) -> None:
        try:
            await deployment.drain()
        finally:
            await deployment.engine.stop()
        log.info("retired", bundle=deployment.bundle.bundle_id)
