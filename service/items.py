"""Items of the live catalogue, read and changed by id: from a request to what every replica serves.

A change is stored first and served then. `put` answers when this process serves it; a deletion is in force here from
the moment it is stored. New items that wait for a SID together get them together, so that no two get the same.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from semantic_ids.bundle import Bundle
from semantic_ids.catalog_changes import CatalogItem
from service.deployments import Deployments, EpochNotServedError
from service.engine.batching import Batcher
from service.item_store import SidTakenError
from service.live_catalog import LiveCatalog, NewItem, SidsUnavailableError, sids_for

_MAX_BATCH = 64
_MAX_ATTEMPTS = 8
"""To place items while other replicas place theirs: of those that meet, one succeeds each time."""
_WAIT_S = 10.0
"""For an epoch to be served: at a million items it takes some tenths of a second, if the machine is not overloaded."""


class UnknownItemError(Exception):
    """The catalogue does not hold such an item."""


@dataclass(frozen=True)
class LiveItem:
    """An item as it is served, or is about to be."""

    item_id: str
    title: str
    categories: tuple[str, ...]
    sid: str
    catalog_epoch: int


@dataclass(frozen=True)
class _Unplaced:
    item_id: str
    title: str
    categories: tuple[str, ...]


class Items:
    """Reads and changes items of the bundle that is current."""

    def __init__(self, live: LiveCatalog, deployments: Deployments) -> None:
        self._live = live
        self._deployments = deployments
        self._placing: Batcher[_Unplaced, LiveItem] = Batcher(
            "assignment of SIDs",
            self._place,
            max_batch=_MAX_BATCH,
            group=lambda _item: None,
            on_batch=lambda _size: None,
        )

    def start(self) -> None:
        """Begin to take items without a SID."""
        self._placing.start()

    async def stop(self) -> None:
        """Finish those that are being placed."""
        await self._placing.stop()

    def get(self, item_id: str) -> LiveItem:
        """The item; `UnknownItemError` if it is not there, or is deleted."""
        catalog = self._bundle.catalog
        rank = None if item_id in self._live.deleted_since(catalog.epoch) else catalog.rank_of(item_id)
        if rank is None:
            raise UnknownItemError(f"the catalogue has no item {item_id!r}")
        categories = tuple(catalog.categories_of(rank))
        return LiveItem(item_id, catalog.titles[rank], categories, catalog.sid(rank), catalog.epoch)

    async def put(self, item_id: str, title: str, categories: Sequence[str], sid: str | None) -> LiveItem:
        """Put an item and serve it. Without a SID a known item keeps its own, and a new one gets a free one.

        `SidError` or `CatalogError` where the catalogue cannot hold it, `SidsUnavailableError`, `ItemStoreError`;
        `EpochNotServedError` if it is stored and not served in time.
        """
        paths = tuple(categories)
        if sid is not None:
            codes = self._bundle.catalog.space.parse(sid)
        elif (known := self._codes_of(item_id)) is not None:
            codes = known
        else:
            self._bundle.catalog.check_item(
                CatalogItem(item_id, title, paths, (0,) * self._bundle.catalog.space.num_levels)
            )
            placed = await self._placing.submit(_Unplaced(item_id, title, paths))
            return placed.answer
        item = await self._store(self._bundle, CatalogItem(item_id, title, paths, codes))
        await self._deployments.until_served(item.catalog_epoch, _WAIT_S)
        return item

    async def delete(self, item_id: str) -> int:
        """Never recommend an item again, from now on; the epoch without it. `UnknownItemError`, `ItemStoreError`."""
        is_known = any(one.bundle.catalog.rank_of(item_id) is not None for one in self._deployments.served)
        epoch = await self._live.delete(item_id, is_known=is_known)
        if epoch is None:
            raise UnknownItemError(f"the catalogue has no item {item_id!r}")
        with suppress(EpochNotServedError):  # it is left out of every answer all the same
            await self._deployments.until_served(epoch, _WAIT_S)
        return epoch

    @property
    def _bundle(self) -> Bundle:
        return self._deployments.current.bundle

    def _codes_of(self, item_id: str) -> tuple[int, ...] | None:
        catalog = self._bundle.catalog
        if item_id in self._live.deleted_since(catalog.epoch):
            return None
        rank = catalog.rank_of(item_id)
        return None if rank is None else tuple(catalog.codes[rank].tolist())

    async def _store(self, bundle: Bundle, item: CatalogItem, *, is_assigned: bool = False) -> LiveItem:
        epoch = await self._live.put(bundle, item, is_assigned=is_assigned)
        return LiveItem(item.item_id, item.title, item.categories, bundle.catalog.space.format(item.codes), epoch)

    async def _place(self, items: Sequence[_Unplaced]) -> list[LiveItem | Exception]:
        """SIDs for what waits, all stored, then served: the next ones see which SIDs are taken."""
        distinct = {item.item_id: item for item in items}  # put twice at once: the later one counts
        stored: dict[str, LiveItem | Exception] = {}
        waiting = list(distinct)
        for _ in range(_MAX_ATTEMPTS):
            stored |= await self._placed([distinct[item_id] for item_id in waiting])
            # What others have taken is seen in the epoch that holds it.
            last = max((_epoch_of(one) for one in stored.values()), default=0)
            try:
                await self._deployments.until_served(last, _WAIT_S)
            except EpochNotServedError as error:
                stored |= dict.fromkeys((name for name, one in stored.items() if _epoch_of(one)), error)
                break
            waiting = [item_id for item_id, one in stored.items() if isinstance(one, SidTakenError)]
            if not waiting:
                break
        crowded = SidsUnavailableError(f"others took the SIDs {_MAX_ATTEMPTS} times; send the request again")
        return [crowded if isinstance(one := stored[item.item_id], SidTakenError) else one for item in items]

    async def _placed(self, items: Sequence[_Unplaced]) -> dict[str, LiveItem | Exception]:
        """Each stored under a SID that was free, or why not."""
        bundle = self._bundle
        try:
            codes = await asyncio.to_thread(sids_for, bundle, [NewItem(item.title, item.categories) for item in items])
        except SidsUnavailableError as error:
            return dict.fromkeys((item.item_id for item in items), error)
        stored: dict[str, LiveItem | Exception] = {}
        for item, one in zip(items, codes, strict=True):
            put = CatalogItem(item.item_id, item.title, item.categories, one)
            try:
                stored[item.item_id] = await self._store(bundle, put, is_assigned=True)
            except Exception as error:  # its caller is told; the others go on
                stored[item.item_id] = error
        return stored


def _epoch_of(stored: LiveItem | Exception) -> int:
    """The epoch that shows what came of a put; 0 if none does."""
    if isinstance(stored, LiveItem):
        return stored.catalog_epoch
    return stored.epoch if isinstance(stored, SidTakenError) else 0
