"""What is being served: bundles, each with an engine of its own, one of them current.

Beside the current one stand those that running experiments name: started in the background, however often that fails,
and let go when nobody names them any more. A bundle takes requests from the moment that its engine has answered its
canary until it is neither current nor named. So moving the pointer to one that does is done at once, and one that is
still named stays when the pointer moves away.

Activation starts the new bundle's engine beside the old one's, and only then moves the pointer: requests that began on
the old bundle end on it, then its engine stops. So nothing is dropped, at the price of two engines for a while. The
pointer is the `current` file of the bundles' folder, which every replica follows, so that a publication, the command
line and the admin API are one and the same, and a restart serves what was active.

Within every deployment the catalogue has epochs (`live_catalog`): a request is pinned to the one that was served when
it began, and an epoch goes when its last request has ended. The bundle, its model and its engine stay.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from semantic_ids.bundle import Bundle, BundleError, activate, current_id, previous_id
from semantic_ids.catalog import CatalogError
from service.background import ended
from service.engine.base import Engine, EngineError
from service.experiments.runtime import ServedBundles
from service.item_store import ItemStoreError
from service.live_catalog import LiveCatalog
from service.memory import give_back
from service.metrics import Metrics
from service.recommender import Recommender

log = structlog.get_logger(__name__)

_MAX_EPOCHS = 8
"""Epochs that may be alive in a deployment: 68 MB each at a million items."""
_LONGEST_PAUSE_S = 0.25
_RETRY_S = 1.0
_LONGEST_RETRY_S = 60.0
"""Of a bundle that an experiment names and that cannot be served: each try reads all of it."""
_MAX_CATCH_UPS = 3
"""Epochs that a bundle is taken through before its first request, if changes do not cease."""


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
    following: asyncio.Task[None] | None = None
    """Takes it to every further epoch, while it takes requests."""
    failed_epoch: int = 0
    """The latest one that could not be made of it."""
    is_abandoned: bool = False

    @property
    def bundle_id(self) -> str:
        """The bundle's, at every epoch."""
        return self.base.bundle_id

    @property
    def can_think(self) -> bool:
        """Whether its model can reason."""
        return self.base.renderer.thinking is not None

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
        """Until no request holds any epoch, or they are abandoned."""
        while not self.is_abandoned and any(epoch.num_leases for epoch in self.epochs):
            self.released.clear()
            await self.released.wait()

    def abandon(self) -> None:
        """The process ends: nobody waits for what still holds an epoch."""
        self.is_abandoned = True
        self.released.set()

    async def unfollow(self) -> None:
        """Stay at the present epoch."""
        following, self.following = self.following, None  # or they keep each other until a full collection
        if following is not None:
            await ended(following)

    async def stop(self) -> None:
        """Stop the engine; what is being decoded is answered."""
        await self.unfollow()
        await asyncio.gather(*self.background, return_exceptions=True)
        await self.engine.stop()


class Deployments:
    """The bundles that take requests; `current` answers whoever asks for none by name."""

    def __init__(
        self,
        root: Path,
        make_engine: Callable[[Bundle], Engine],
        make_recommender: Callable[[Bundle, Engine], Recommender],
        metrics: Metrics,
        live: LiveCatalog,
        wanted: Callable[[], frozenset[str]] = frozenset,
        on_change: Callable[[ServedBundles], None] = lambda _served: None,
    ) -> None:
        """`wanted` says which bundles are to stand beside the current one. `on_change` hears which take requests, in
        the same turn of the event loop as one begins or ceases to, so that nobody is sent to a bundle that has gone.
        """
        self._root = root
        self._make_engine = make_engine
        self._make_recommender = make_recommender
        self._metrics = metrics
        self._live = live
        self._wanted = wanted
        self._on_change = on_change
        self._current: Deployment | None = None
        self._served: dict[str, Deployment] = {}  # by bundle
        self._ending: list[Deployment] = []
        self._next: str | None = None  # the bundle that is about to be pointed to
        self._starting: dict[str, asyncio.Task[Deployment]] = {}
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._problems: dict[str, str] = {}  # of wanted bundles
        self._has_moved = asyncio.Event()
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> Deployment:
        """The one that answers whoever is in no experiment with a bundle of its own."""
        if self._current is None:
            raise EngineError("no bundle is being served")
        return self._current

    @property
    def served(self) -> Sequence[Deployment]:
        """All that take requests, the current one included."""
        return tuple(self._served.values())

    def refuse_late(self, left_s: float) -> None:
        """`UnavailableProblem` if whoever needs an engine within `left_s` would wait in vain.

        Of several bundles side by side the user's variant tells which one answers, so nobody is refused here.
        """
        if len(self._served) == 1:
            self.current.recommender.refuse_late(left_s)

    @property
    def ending(self) -> Sequence[Deployment]:
        """Those that take no more requests, and answer their last ones."""
        return tuple(self._ending)

    def named(self, bundle_id: str | None) -> Deployment:
        """The deployment of a bundle, the current one for None; `EngineError` if that bundle takes no requests."""
        if bundle_id is None:
            return self.current
        if (deployment := self._served.get(bundle_id)) is None:
            raise EngineError(f"bundle {bundle_id} is not being served")
        return deployment

    def unknown_items(self, item_ids: Collection[str]) -> frozenset[str]:
        """Those of the items that no bundle knows which takes requests, deleted ones included."""
        unknown = frozenset(item_ids)
        for deployment in self._served.values():
            catalog = deployment.bundle.catalog
            _, missing = catalog.ranks_of(unknown)
            unknown &= self._live.deleted_since(catalog.epoch).union(missing)
            if not unknown:
                break
        return unknown

    async def start(self) -> None:
        """Serve what `current` names; `BundleError` or `EngineError` if that cannot be."""
        self._point_to(await self._started(await asyncio.to_thread(current_id, self._root)))

    async def activate(self, bundle_id: str) -> Deployment:
        """Make a published bundle current, on disk and here; whatever fails leaves everything as it was."""
        async with self._changing:
            with self._kept(bundle_id):
                deployment = await self._started(bundle_id)
                await asyncio.to_thread(activate, self._root, bundle_id)
                self._point_to(deployment)
            return self.current

    async def rollback(self) -> Deployment:
        """Activate the bundle that was current before; `BundleError` if there was none."""
        return await self.activate(await asyncio.to_thread(previous_id, self._root))

    async def follow(self, every_s: float) -> None:
        """Serve whatever `current` comes to name. A bundle that fails is logged and left alone until it changes."""
        failed = ""
        while True:
            await asyncio.sleep(every_s)
            async with self._changing:  # an activation moves the pointer on disk, and only then the one here
                with suppress(BundleError):  # unreadable for a moment: what is served stays
                    named = await asyncio.to_thread(current_id, self._root)
                    if named not in (failed, self.current.bundle_id):
                        failed = "" if await self._serves(named) else named

    async def follow_wanted(self, every_s: float) -> None:
        """Keep the wanted bundles beside the current one, and no others."""
        try:
            while True:
                for bundle_id in self._wanted() - self._served.keys() - self._keeping.keys():
                    self._keeping[bundle_id] = asyncio.create_task(self._start_wanted(bundle_id, every_s))
                self._let_go()
                await asyncio.sleep(every_s)
        finally:
            await asyncio.gather(*map(ended, list(self._keeping.values())))

    async def until_served(self, epoch: int, within_s: float) -> None:
        """Wait until every bundle is served at this epoch or a later one; `EpochNotServedError` if one is not."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while any(max(one.bundle.catalog.epoch, one.failed_epoch) < epoch for one in self._served.values()):
                    await self._has_moved.wait()
        behind = min(self._served.values(), key=lambda one: one.bundle.catalog.epoch)
        if (served := behind.bundle.catalog.epoch) < epoch:
            raise EpochNotServedError(
                f"the change is stored as epoch {epoch}, and epoch {served} of bundle {behind.bundle_id} is still "
                "served here"
            )

    async def stop(self) -> None:
        """Stop every engine; what is being decoded is answered."""
        starting = list(self._starting.values())
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        for deployment in self._ending:
            deployment.abandon()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await asyncio.gather(*(deployment.stop() for deployment in self._served.values()))

    async def _serves(self, bundle_id: str) -> bool:
        """Try to point to a bundle; whether that went well."""
        try:
            with self._kept(bundle_id):
                self._point_to(await self._started(bundle_id))
        except (BundleError, EngineError):
            self._metrics.activations.labels("failed").inc()
            log.exception("bundle_not_served", bundle=bundle_id, serving=self.current.bundle_id)
            return False
        return True

    async def _start_wanted(self, bundle_id: str, pause_s: float) -> None:
        """Start a bundle for as long as it is wanted, however often that fails."""
        try:
            while bundle_id in self._wanted() and bundle_id not in self._served:
                try:
                    await self._started(bundle_id)
                except Exception as error:  # whatever it is must not end the trying
                    self._metrics.activations.labels("failed").inc()
                    log.exception("bundle_not_served_beside", bundle=bundle_id, again_in_s=pause_s)
                    self._problems[bundle_id] = str(error)
                    self._tell()
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_RETRY_S)
                else:
                    self._metrics.activations.labels("served").inc()
                    log.info("serving_beside", bundle=bundle_id, current=self.current.bundle_id)
        finally:
            self._problems.pop(bundle_id, None)
            del self._keeping[bundle_id]

    async def _started(self, bundle_id: str) -> Deployment:
        """The bundle's deployment, started unless it takes requests; who wants the same one waits for the same start.

        `BundleError`, `EngineError`. A start that nobody waits for any more goes on, and is let go afterwards.
        """
        served = self._served.get(bundle_id)
        if served is not None and (served is self._current or served.engine.problem is None):
            return served
        task = self._starting.get(bundle_id)
        if task is None:
            # In no request's context: what it starts outlives the request that asked for it, in logs and traces too.
            task = self._starting[bundle_id] = asyncio.create_task(
                self._start(bundle_id), name=f"start-{bundle_id}", context=Context()
            )
            task.add_done_callback(lambda task: self._has_started(bundle_id, task))
        return await asyncio.shield(task)

    def _has_started(self, bundle_id: str, task: "asyncio.Task[Deployment]") -> None:
        del self._starting[bundle_id]
        if not task.cancelled():
            task.exception()  # looked at, also where nobody waits for it any more
        self._forget_series(bundle_id)  # of a start that failed

    async def _start(self, bundle_id: str) -> Deployment:
        bundle = await asyncio.to_thread(Bundle.load, self._root / bundle_id)
        await asyncio.to_thread(lambda: bundle.catalog.by_popularity)  # sorted once, for every epoch to come
        engine = self._make_engine(bundle)
        try:
            await engine.start()
            deployment = Deployment(bundle, [ServedEpoch(bundle, engine, self._make_recommender(bundle, engine))])
            await self._catch_up(deployment)
        except BaseException:
            await engine.stop()
            raise
        failed = self._served.get(bundle_id)
        self._served[bundle_id] = deployment
        deployment.following = asyncio.create_task(self._follow_catalog(deployment), name=f"follow-catalog-{bundle_id}")
        if failed is not None:
            self._retire(failed)
        self._tell()
        return deployment

    async def _catch_up(self, deployment: Deployment) -> None:
        """To the present epoch, before the first request."""
        for _ in range(_MAX_CATCH_UPS):
            if self._live.epoch <= deployment.bundle.catalog.epoch:
                return
            try:
                await deployment.move_to(await self._live.bundle_at_epoch(deployment.base))
            except CatalogError:  # every item was deleted: all of them are left out of every answer
                log.exception("epoch_not_served", bundle=deployment.bundle_id, epoch=self._live.epoch)
                return
            except ItemStoreError as error:
                raise EngineError(f"the item changes cannot be carried over: {error}") from error

    async def _follow_catalog(self, deployment: Deployment) -> None:
        """Serve every change of the catalogue; those that come while an epoch is made are in the next one."""
        while True:
            while self._live.epoch <= deployment.bundle.catalog.epoch:
                await self._until_moved()
            started_at = time.monotonic()
            try:
                await deployment.room()
                await deployment.move_to(await self._live.bundle_at_epoch(deployment.base))
            except Exception:  # whatever it is must not end the following
                log.exception("epoch_not_served", bundle=deployment.bundle_id, epoch=self._live.epoch)
                deployment.failed_epoch = self._live.epoch
                self._tell_waiters()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_S):
                        await self._until_moved()
                continue
            self._forget_deletions()
            self._tell_waiters()
            # A burst of changes may have half of a core, not all of it.
            await asyncio.sleep(min(_LONGEST_PAUSE_S, time.monotonic() - started_at))

    async def _until_moved(self) -> None:
        self._live.moved.clear()  # whoever waits already has been woken, and looks at the epoch before it waits again
        await self._live.moved.wait()

    def _forget_deletions(self) -> None:
        if not self._starting:  # a bundle that is being made ready may need them
            alive = [*self._served.values(), *self._ending]
            self._live.forget_deletions(min(epoch.bundle.catalog.epoch for one in alive for epoch in one.epochs))

    def _point_to(self, deployment: Deployment) -> None:
        """Make one that takes requests the current one; the one before goes, unless it is wanted."""
        if deployment is not self._current:
            before, self._current = self._current, deployment
            self._metrics.activations.labels("served").inc()
            log.info("serving", bundle=deployment.bundle_id, before=before.bundle_id if before else None)
        self._tell()
        self._let_go()

    @contextmanager
    def _kept(self, bundle_id: str) -> Iterator[None]:
        """Let a bundle not go that is about to be pointed to."""
        self._next = bundle_id
        try:
            yield
        finally:
            self._next = None
            self._let_go()

    def _let_go(self) -> None:
        """Give no more requests to what is neither current nor wanted."""
        kept = self._wanted() | {self.current.bundle_id, self._next}
        unwanted = [deployment for bundle_id, deployment in self._served.items() if bundle_id not in kept]
        for deployment in unwanted:
            del self._served[deployment.bundle_id]
            self._retire(deployment)
        if unwanted:
            self._tell()

    def _tell(self) -> None:
        """Whoever depends on which bundles take requests hears of it, before anything else happens."""
        if self._current is None:
            return
        named = self._current.bundle_id
        self._metrics.bundle.clear()
        self._metrics.bundle.labels(named).set(1)
        self._metrics.bundle_beside.clear()
        for bundle_id in self._served.keys() - {named}:
            self._metrics.bundle_beside.labels(bundle_id).set(1)
        can_think = {bundle_id: deployment.can_think for bundle_id, deployment in self._served.items()}
        self._on_change(ServedBundles(named, can_think, dict(self._problems)))
        self._tell_waiters()

    def _tell_waiters(self) -> None:
        """Whoever waits for an epoch looks again."""
        self._metrics.catalog_epoch.set(self.current.bundle.catalog.epoch)
        has_moved, self._has_moved = self._has_moved, asyncio.Event()
        has_moved.set()

    def _retire(self, deployment: Deployment) -> None:
        self._ending.append(deployment)
        task = asyncio.create_task(self._retired(deployment), name=f"retire-{deployment.bundle_id}")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retired(self, deployment: Deployment) -> None:
        """Stop it when its requests have ended."""
        await deployment.unfollow()
        await deployment.drain()
        self._ending.remove(deployment)
        await deployment.stop()
        give_back()
        self._forget_series(deployment.bundle_id)
        log.info("retired", bundle=deployment.bundle_id)

    def _forget_series(self, bundle_id: str) -> None:
        """The metrics of a bundle's engine go with its last deployment."""
        alive = {one.bundle_id for one in (*self._served.values(), *self._ending)} | self._starting.keys()
        if bundle_id not in alive:
            self._metrics.forget_bundle(bundle_id)
