"""The live catalogue of this process: what has changed since the bundles were published, and bundles with the changes.

It reads every change once, follows the stream, and makes from a bundle as published (the *base*) one at the present
epoch. A deletion counts from the moment it is heard, before any epoch has it: `deleted_since` is what a request leaves
out beside its filter.

Items belong to the bundle that they were put for. In another one
- what was deleted stays deleted;
- what was put before that bundle was made, and is in it, is the bundle's affair;
- any other put holds: under the bundle's own SID where it has the item, else under a new one from its quantiser, on
  which all replicas agree.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from semantic_ids.bundle import Bundle
from semantic_ids.catalog import Catalog
from semantic_ids.catalog_changes import CatalogItem, ItemChanges, translated
from semantic_ids.codes import SidError
from semantic_ids.text_encoder import TextEncoderError, item_text
from service.encoding import encode_texts
from service.item_store import ItemChange, ItemPut, ItemStore
from service.merged_catalogs import MergedCatalogs
from service.metrics import Metrics

log = structlog.get_logger(__name__)

_RETRY_S = 0.2
_NEXT_SIDS_S = 60.0
"""After a bundle gave no SIDs, until it is asked for them again: epochs do not wait for what is not there."""
_NOTHING: frozenset[str] = frozenset()


class SidsUnavailableError(Exception):
    """New items cannot get SIDs here: the text says why."""


@dataclass(frozen=True)
class NewItem:
    """What a SID is made from."""

    title: str
    categories: tuple[str, ...]


class LiveCatalog:
    """The changes that this process knows."""

    def __init__(self, store: ItemStore, metrics: Metrics, merged: MergedCatalogs | None = None) -> None:
        self._store = store
        self._merged = merged
        self._metrics = metrics
        self._changes: dict[str, ItemChange] = {}
        self._position: str | None = None  # in the stream; None: read everything first
        self._deleted: dict[str, int] = {}  # item → epoch; those that some live epoch may still hold
        self._sids: dict[tuple[str, int], tuple[int, ...]] = {}  # (bundle, change) → codes
        self._no_sids_until: dict[str, float] = {}  # by bundle
        self.epoch = 0
        self.is_loaded = False
        self.moved = asyncio.Event()
        """Set whenever the epoch has risen; whoever builds clears it."""

    async def load(self) -> None:
        """Read everything; `ItemStoreError`."""
        snapshot = await self._store.snapshot()
        if snapshot.epoch < self.epoch:  # Redis has lost what it had acknowledged: what is known here is served on
            log.error("catalog_changes_lost", stored_epoch=snapshot.epoch, epoch=self.epoch)
        else:
            self._changes = {}
            for change in snapshot.changes:
                self._note(change)
            self.epoch = snapshot.epoch
            if self._merged is not None:
                self._merged.doubt()
            self.moved.set()
        self._position = snapshot.position
        self.is_loaded = True

    async def catch_up(self) -> bool:
        """Read everything if anything has changed, for who does not follow; whether it has. `ItemStoreError`."""
        if self.is_loaded and await self._store.epoch() == self.epoch:
            return False
        await self.load()
        return True

    async def follow(self) -> None:
        """Hear every change; while Redis is away, what is known is served on."""
        is_away = False
        while True:
            try:
                if self._position is None:
                    await self.load()
                await self._hear()
                is_away = False
            except Exception as error:  # whatever it is must not end the following
                if not is_away:
                    log.warning("catalog_changes_not_read", error=str(error))
                is_away, self._position = True, None
                await asyncio.sleep(_RETRY_S)

    def deleted_since(self, epoch: int) -> frozenset[str]:
        """Items that a catalogue of this epoch may hold and that were deleted after it."""
        if not self._deleted:
            return _NOTHING
        return frozenset(item_id for item_id, at in self._deleted.items() if at > epoch)

    def forget_deletions(self, epoch: int) -> None:
        """No catalogue of an earlier epoch is served any more."""
        self._deleted = {item_id: at for item_id, at in self._deleted.items() if at > epoch}

    async def put(self, bundle: Bundle, item: CatalogItem, *, is_assigned: bool = False) -> int:
        """Store an item for a bundle; the change's epoch. `CatalogError` if it cannot hold it, `ItemStoreError`.

        A SID that was assigned is one that nobody has in this epoch of the bundle: `SidTakenError` if somebody has got
        it since.
        """
        bundle.catalog.check_item(item)
        put = ItemPut(
            title=item.title,
            categories=item.categories,
            codes=item.codes,
            bundle=bundle.bundle_id,
            at=time.time(),
        )
        free_at = bundle.catalog.epoch if is_assigned else None
        epoch = await self._store.put(item.item_id, put, epoch=self.epoch, free_at=free_at)
        self._metrics.catalog_changes.labels("put").inc()
        return epoch

    async def delete(self, item_id: str, *, is_known: bool) -> int | None:
        """Store a deletion, in force here when this returns; None if there is no such item. `ItemStoreError`."""
        epoch = await self._store.delete(item_id, epoch=self.epoch, is_known=is_known)
        if epoch is not None:
            self._metrics.catalog_changes.labels("delete").inc()
            if epoch > self.epoch:  # else it was heard, and perhaps the item was put again since
                self._deleted[item_id] = epoch
        return epoch

    async def bundle_at_epoch(self, base: Bundle) -> Bundle:
        """A bundle as published → the same with every change known now.

        `CatalogError` if nothing would be left, `ItemStoreError` if replicas cannot agree on a SID.
        """
        if self.epoch == 0:
            return base
        started_at = time.perf_counter()
        epoch, changes = self.epoch, dict(self._changes)
        merged = None if self._merged is None else await self._merged.latest(base, changes, epoch)
        origin = base.catalog if merged is None else merged.catalog
        later = [one for one in changes.values() if one.epoch > origin.epoch]
        foreign = [one for one in later if one.put is not None and one.put.bundle != base.bundle_id]
        sids = await self._foreign_sids(base, foreign) if foreign else {}
        bundle, is_whole = await asyncio.to_thread(_with_changes, base, origin, epoch, later, sids)
        self._metrics.catalog_build_seconds.observe(time.perf_counter() - started_at)
        if self._merged is not None and is_whole:
            self._merged.offer(base, bundle.catalog, changes, len(later))
        return bundle

    async def _hear(self) -> None:
        changes, position = await self._store.changes_after(self._position or "0-0")
        for change in changes:
            if change.epoch <= self.epoch:
                continue
            if change.epoch > self.epoch + 1:  # the stream was trimmed before this was read
                self._position = None
                return
            self._note(change)
            self.epoch = change.epoch
        self._position = position
        if changes:
            self.moved.set()

    def _note(self, change: ItemChange) -> None:
        self._changes[change.item_id] = change
        if change.put is None and change.epoch > self.epoch:
            self._deleted[change.item_id] = change.epoch
        elif change.put is not None:
            self._deleted.pop(change.item_id, None)

    async def _foreign_sids(self, base: Bundle, foreign: Sequence[ItemChange]) -> dict[int, tuple[int, ...]]:
        """Codes in `base`, by the epochs of changes, of items that it does not have; who cannot get any is missing."""
        name = base.bundle_id
        known = await asyncio.to_thread(base.catalog.ranks_of, [change.item_id for change in foreign])
        unknown = set(known[1])
        foreign = [change for change in foreign if change.item_id in unknown]
        missing = [change for change in foreign if (name, change.epoch) not in self._sids]
        found = await self._store.sids(name, [change.epoch for change in missing])
        missing = [change for change in missing if change.epoch not in found]
        if missing and time.monotonic() >= self._no_sids_until.get(name, 0.0):
            missing.sort(key=lambda change: change.arrival)
            new = [NewItem(one.put.title, one.put.categories) for one in missing if one.put is not None]
            try:
                codes = await asyncio.to_thread(sids_for, base, new)
            except SidsUnavailableError as error:
                if name not in self._no_sids_until:
                    log.warning("items_not_carried_over", bundle=name, items=len(missing), error=str(error))
                self._no_sids_until[name] = time.monotonic() + _NEXT_SIDS_S
            else:
                self._no_sids_until.pop(name, None)
                epochs = [change.epoch for change in missing]
                found |= await self._store.agree_on_sids(name, dict(zip(epochs, codes, strict=True)))
        # Of an earlier change nobody asks again, but for those that are asked for now.
        latest = {change.epoch for change in (*self._changes.values(), *foreign)}
        self._sids = {key: codes for key, codes in self._sids.items() if key[1] in latest}
        self._sids |= {(name, epoch): codes for epoch, codes in found.items()}
        sids = {change.epoch: self._sids.get((name, change.epoch)) for change in foreign}
        return {epoch: codes for epoch, codes in sids.items() if codes is not None}


def sids_for(bundle: Bundle, items: Sequence[NewItem]) -> list[tuple[int, ...]]:
    """Codes that no item of the bundle's catalogue has, and no two alike. Blocks: seconds at first, then a moment."""
    try:
        vectors = encode_texts(
            bundle.manifest.text_encoder, [item_text(item.title, item.categories, {}) for item in items]
        )
        codes = bundle.quantizer.assign_new(vectors, bundle.catalog.trie)
    except (TextEncoderError, SidError, ImportError, OSError) as error:
        raise SidsUnavailableError(f"the bundle's text encoder and quantiser give no SID here: {error}") from error
    return [tuple(row) for row in codes.tolist()]


def holds_in(base: Bundle, item_id: str, put: ItemPut) -> bool:
    """Whether a put is in force in a bundle: in one that was made later and has the item, it is the bundle's affair."""
    is_newer = put.bundle == base.bundle_id or put.at > base.manifest.created_at.timestamp()
    return is_newer or base.catalog.rank_of(item_id) is None


def _with_changes(
    base: Bundle,
    origin: Catalog,
    epoch: int,
    later: Sequence[ItemChange],
    foreign_sids: dict[int, tuple[int, ...]],
) -> tuple[Bundle, bool]:
    """`origin`, the catalogue as published or a merged one of it, with what changed since.

    And whether all has its final form: an item that cannot get a SID now may get one later.
    """
    items, deleted, num_without = [], set(), 0
    for change in sorted(later, key=lambda change: change.arrival):
        if change.put is None:
            deleted.add(change.item_id)
        elif (item := _item(base, change, change.put, foreign_sids)) is not None:
            items.append(item)
        else:
            deleted.add(change.item_id)
            num_without += 1
    catalog = origin.with_changes(ItemChanges(tuple(items), frozenset(deleted), epoch))
    _ = catalog.by_popularity  # made here, in a thread: a fallback reads it on the event loop
    bundle = replace(base, catalog=catalog, neighbours=translated(base.neighbours, catalog.translation))
    return bundle, num_without == 0


def _item(
    base: Bundle, change: ItemChange, put: ItemPut, foreign_sids: dict[int, tuple[int, ...]]
) -> CatalogItem | None:
    """The item as it is in `base` after the change; None where it cannot be there for want of a SID."""
    catalog, item_id = base.catalog, change.item_id
    codes: tuple[int, ...] | None
    if put.bundle == base.bundle_id:
        codes = put.codes
    elif (rank := catalog.rank_of(item_id)) is None:
        codes = foreign_sids.get(change.epoch)
    else:
        codes = tuple(catalog.codes[rank].tolist())
        if not holds_in(base, item_id, put):  # as published, whatever an earlier change made of it
            title, categories = catalog.titles[rank], tuple(catalog.categories_of(rank))
            return CatalogItem(item_id, title, categories, codes, arrival=change.arrival)
    return None if codes is None else CatalogItem(item_id, put.title, put.categories, codes, arrival=change.arrival)
