"""What is being served: bundles, each with an engine of its own, one of them current.

Activation starts the new bundle's engine beside the old one's, and only then moves the pointer: requests that began on
the old bundle end on it, then its engine stops. So nothing is dropped, at the price of two engines for a while. The
pointer is the `current` file of the bundles' folder, which every replica follows, so that a publication, the command
line and the admin API are one and the same, and a restart serves what was active.

Within a deployment the catalogue has epochs (`live_catalog`): a request is pinned to the one that was served when it
began, and an epoch goes when its last request has ended. The bundle, its model and its engine stay.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from semantic_ids.bundle import Bundle, BundleError, activate, current_id, previous_id
from semantic_ids.catalog import CatalogError
from service.engine.base import Engine, EngineError
from service.item_store import ItemStoreError
from service.live_catalog import LiveCatalog
from service.metrics import Metrics
from service.recommender import Recommender

log = structlog.get_logger(__name__)

_MAX_EPOCHS = 8
"""Epochs that may be alive in a deployment: 68 MB each at a million items."""
_LONGEST_PAUSE_S = 0.25
_RETRY_S = 1.0


class EpochNotServedError(Exception):
    """A change is stored, and is not served here within the time that its caller waits."""


@dataclass(eq=False)
class ServedEpoch:
    """A bundle at one epoch of its catalogue, on its engine: what a request is pinned to."""

    bundle: Bundle
    engine: Engine
    recommender: Recommender
    num_leases: int = 0


@dataclass(eq=False)
class Deployment:
    """One bundle on its engine, at the epochs of its catalogue that requests still hold, the newest last."""

    base: Bundle
    """As published."""
    epochs: list[ServedEpoch]
    released: asyncio.Event = field(default_factory=asyncio.Event)
    background: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def current(self) -> ServedEpoch:
        """What a request that begins now is pinned to."""
        return self.epochs[-1]

    @property
    def bundle(self) -> Bundle:
        """At the current epoch."""
        return self.current.bundle

    @property
    def engine(self) -> Engine:
        """The one of all epochs."""
        return self.current.engine

    @property
    def recommender(self) -> Recommender:
        """At the current epoch."""
        return self.current.recommender

    @asynccontextmanager
    async def leased(self) -> AsyncIterator[ServedEpoch]:
        """Hold the current epoch for a request: neither it nor the engine stops before the request has ended."""
        epoch = self.current
        epoch.num_leases += 1
        try:
            yield epoch
        finally:
            epoch.num_leases -= 1
            if epoch.num_leases == 0:
                self.released.set()
                if epoch is not self.current:
                    task = asyncio.create_task(self.retire_epochs())
                    self.background.add(task)
                    task.add_done_callback(self.background.discard)

    async def move_to(self, bundle: Bundle) -> None:
        """Serve another epoch; requests under way end on theirs. `EngineError` if the engine does not take it."""
        await self.engine.use_catalog(bundle)
        self.epochs.append(ServedEpoch(bundle, self.engine, self.recommender.on(bundle)))
        await self.retire_epochs()

    async def retire_epochs(self) -> None:
        """Let go of the epochs that no request holds."""
        unused = [epoch for epoch in self.epochs[:-1] if epoch.num_leases == 0]
        self.epochs = [epoch for epoch in self.epochs if epoch not in unused]
        for epoch in unused:
            await self.engine.retire_catalog(epoch.bundle.catalog_id)

    async def room(self) -> None:
        """Until another epoch may come to life."""
        while len(self.epochs) >= _MAX_EPOCHS:
            self.released.clear()
            await self.retire_epochs()
            if len(self.epochs) >= _MAX_EPOCHS:
                await self.released.wait()

    async def drain(self) -> None:
        """Until no request holds any epoch."""
        while any(epoch.num_leases for epoch in self.epochs):
            self.released.clear()
            await self.released.wait()


class Deployments:
    """The bundles that are loaded; `current` answers whoever asks for none by name."""

    def __init__(
        self,
        root: Path,
        make_engine: Callable[[Bundle], Engine],
        make_recommender: Callable[[Bundle, Engine], Recommender],
        metrics: Metrics,
        live: LiveCatalog,
    ) -> None:
        self._root = root
        self._make_engine = make_engine
        self._make_recommender = make_recommender
        self._metrics = metrics
        self._live = live
        self._current: Deployment | None = None
        self._alive: list[Deployment] = []
        self._failed_epoch = 0
        self._has_moved = asyncio.Condition()
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

    async def follow_catalog(self) -> None:
        """Serve every change of the catalogue; those that come while an epoch is made are in the next one."""
        while True:
            await self._until_behind()
            started_at = time.monotonic()
            deployment = self.current
            try:
                await deployment.room()
                bundle = await self._live.bundle_at_epoch(deployment.base)
                await deployment.move_to(bundle)
            except Exception:  # whatever it is must not end the following
                log.exception("epoch_not_served", bundle=deployment.base.bundle_id, epoch=self._live.epoch)
                self._failed_epoch = self._live.epoch
                await self._tell_waiters()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._live.moved.wait(), _RETRY_S)
                continue
            self._forget_deletions()
            await self._tell_waiters()
            # A burst of changes may have half of a core, not all of it.
            await asyncio.sleep(min(_LONGEST_PAUSE_S, time.monotonic() - started_at))

    async def until_served(self, epoch: int, within_s: float) -> None:
        """Wait until the current bundle is served at this epoch or a later one; `EpochNotServedError` if it is not."""
        try:
            async with asyncio.timeout(within_s), self._has_moved:
                await self._has_moved.wait_for(
                    lambda: max(self.current.bundle.catalog.epoch, self._failed_epoch) >= epoch
                )
        except TimeoutError:
            pass
        if (served := self.current.bundle.catalog.epoch) < epoch:
            raise EpochNotServedError(f"the change is stored as epoch {epoch}, and epoch {served} is still served here")

    async def _until_behind(self) -> None:
        while self._live.epoch <= self.current.bundle.catalog.epoch:
            self._live.moved.clear()
            await self._live.moved.wait()
        self._live.moved.clear()

    async def _tell_waiters(self) -> None:
        self._metrics.catalog_epoch.set(self.current.bundle.catalog.epoch)
        async with self._has_moved:
            self._has_moved.notify_all()

    def _forget_deletions(self) -> None:
        self._live.forget_deletions(min(e.bundle.catalog.epoch for one in self._alive for e in one.epochs))

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
            await asyncio.gather(*self._current.background, return_exceptions=True)
            await self._current.engine.stop()

    async def _serve(self, bundle: Bundle) -> None:
        """Start the bundle's engine, point to it, and let the one before go when its requests have ended."""
        engine = self._make_engine(bundle)
        try:
            await engine.start()
            present = await self._at_epoch(bundle)
            if present is not bundle:
                await engine.use_catalog(present)
        except BaseException:
            await engine.stop()
            raise
        served = ServedEpoch(present, engine, self._make_recommender(present, engine))
        before, self._current = self._current, Deployment(bundle, [served])
        self._alive.append(self._current)
        self._metrics.bundle.clear()
        self._metrics.bundle.labels(bundle.bundle_id).set(1)
        self._metrics.catalog_epoch.set(present.catalog.epoch)
        self._live.moved.set()  # whatever changed while it was made
        self._metrics.activations.labels("served").inc()
        log.info("serving", bundle=bundle.bundle_id, before=before.bundle.bundle_id if before else None)
        if before is not None:
            task = asyncio.create_task(self._retire(before), name=f"retire-{before.bundle.bundle_id}")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _at_epoch(self, base: Bundle) -> Bundle:
        await asyncio.to_thread(lambda: base.catalog.by_popularity)  # sorted once, for every epoch to come
        try:
            return await self._live.bundle_at_epoch(base)
        except CatalogError:  # every item was deleted: all of them are left out of every answer
            log.exception("epoch_not_served", bundle=base.bundle_id, epoch=self._live.epoch)
            return base
        except ItemStoreError as error:
            raise EngineError(f"the item changes cannot be carried over: {error}") from error

    async def _retire(self, deployment: Deployment) -> None:
        try:
            await deployment.drain()
        finally:
            self._alive.remove(deployment)
            await deployment.engine.stop()
        log.info("retired", bundle=deployment.bundle.bundle_id)
