"""What has changed in a catalogue since it was published: items put and deleted, and where that moves the ranks.

`ItemChanges` are data: a service keeps them, sends them, and gives them to `Catalog.with_changes`, which makes an epoch
of the catalogue. `RankMap` is the arithmetic behind it: the epoch's rows are the base's, less those that were deleted
or replaced, with the items that were put between them. Nothing here knows a catalogue's columns.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from semantic_ids.neighbours import Neighbours
from semantic_ids.trie import Ranks

SortKeys = tuple[npt.NDArray[Any], ...]
"""One array (M,) for each key of a lexicographic order, the first deciding."""


class ItemChangesError(ValueError):
    """What cannot be a set of changes: the message has the value and the rule."""


@dataclass(frozen=True)
class CatalogItem:
    """An item as it is put. `Catalog.check_item` says whether a catalogue can hold it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    item_id: str
    title: str
    categories: tuple[str, ...]
    codes: tuple[int, ...]  # (L,)
    popularity: int | None = None
    """Training interactions; None: what the base says of this id, 0 where it does not know it."""
    arrival: int | None = None
    """A number that is greater than those of all items that came before; None: its place among the items of a change
    of the catalogue as published."""


@dataclass(frozen=True)
class ItemChanges:
    """Everything that is different from the base, and how many changes made it so.

    An id is put or deleted, never both; `ItemChangesError` otherwise. Deleted ids need not be in the base.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    items: tuple[CatalogItem, ...] = ()
    """In the order in which their ids came, or came back after they were deleted."""
    deleted: frozenset[str] = frozenset()
    epoch: int = 0
    """0 is the catalogue as published."""

    def __post_init__(self) -> None:
        ids = {item.item_id for item in self.items}
        if len(ids) != len(self.items):
            raise ItemChangesError(f"{len(self.items)} items have {len(ids)} ids: an id is put once")
        if both := ids & self.deleted:
            raise ItemChangesError(f"{min(both)!r} is both put and deleted: the later change alone counts")
        if self.epoch < 0:
            raise ItemChangesError(f"epoch {self.epoch} is negative: epochs count changes from 0")

    def with_put(self, *items: CatalogItem) -> "ItemChanges":
        """These changes and then `items`, one change each. An item put again keeps its place in the order."""
        by_id = {item.item_id: item for item in (*self.items, *items)}
        return ItemChanges(tuple(by_id.values()), self.deleted - by_id.keys(), self.epoch + len(items))

    def with_deleted(self, *item_ids: str) -> "ItemChanges":
        """These changes and then the items' deletion, one change each."""
        gone = frozenset(item_ids)
        left = tuple(item for item in self.items if item.item_id not in gone)
        return ItemChanges(left, self.deleted | gone, self.epoch + len(item_ids))

    def to_json(self) -> str:
        """The one way to write these changes down."""
        content = {
            "epoch": self.epoch,
            "items": [vars(item) for item in self.items],
            "deleted": sorted(self.deleted),
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "ItemChanges":
        """Changes as `to_json` writes them; `ItemChangesError` names what is missing, unknown or of another type."""
        try:
            return _ITEM_CHANGES.validate_json(text)
        except ValidationError as error:
            raise ItemChangesError(f"this is no set of item changes: {error}") from error


_ITEM_CHANGES = TypeAdapter(ItemChanges)


@dataclass(frozen=True, eq=False)
class RankMap:
    """Ranks of the base (N items) ⇄ ranks of an epoch of it (E items, of which A were put)."""

    epoch_ranks: npt.NDArray[np.int32]  # (N,) the rank in the epoch of each base item, -1 where it was deleted
    sources: npt.NDArray[np.int32]  # (E,) the base row that each row is, or N + its place among the items put
    dropped: Ranks  # sorted base rows that were deleted or replaced
    places: Ranks  # (A,) base rows, dropped ones too, that stand before each item put; ascending
    replaced: Ranks  # (A,) the base rank of each item put, -1 for a new one

    @classmethod
    def of(cls, num_base: int, deleted: Ranks, places: Ranks, replaced: Ranks) -> "RankMap":
        """The map when the base rows `deleted` go and A items are put at `places`."""
        known = replaced >= 0
        dropped = np.union1d(deleted, replaced[known])
        put_ranks = _put_ranks(dropped, places)
        is_put = np.zeros(num_base - len(dropped) + len(places), np.bool_)
        is_put[put_ranks] = True
        kept = np.delete(np.arange(num_base, dtype=np.int32), dropped)
        sources = np.empty(len(is_put), np.int32)
        sources[~is_put] = kept
        sources[put_ranks] = num_base + np.arange(len(places))
        epoch_ranks = np.full(num_base, -1, np.int32)
        epoch_ranks[kept] = np.flatnonzero(~is_put)
        epoch_ranks[replaced[known]] = put_ranks[known]
        return cls(epoch_ranks, sources, dropped, places, replaced)

    @cached_property
    def put_ranks(self) -> Ranks:
        """The rank of each item put, (A,)."""
        return _put_ranks(self.dropped, self.places)

    def base_ranks(self, ranks: Ranks) -> Ranks:
        """The base rank of each item of the epoch, (M,) → (M,); -1 for items that the base does not have."""
        rows = self.sources[ranks].astype(np.int64)
        is_put = rows >= len(self.epoch_ranks)
        rows[is_put] = self.replaced[rows[is_put] - len(self.epoch_ranks)]
        return rows

    def column(self, base: npt.NDArray[Any], put: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A column of the epoch, (E, …), from the base's and that of the items put."""
        column: npt.NDArray[Any] = np.concatenate((base, put)).take(self.sources, axis=0)
        return column

    def listing(
        self, base: npt.NDArray[np.integer], places: Ranks, put_ranks: Ranks
    ) -> tuple[npt.NDArray[np.uint32], Ranks]:
        """A list of base ranks in the epoch's ranks, with `put_ranks` inserted before its entries `places` (ascending).

        Also the places of the entries that went because their rows were dropped.
        """
        kept = self.epoch_ranks.copy()
        kept[self.dropped] = -1
        ranks = kept.take(base)
        gone = np.flatnonzero(ranks < 0)
        return spliced(ranks.view(np.uint32), gone, places, put_ranks), gone


def _put_ranks(dropped: Ranks, places: Ranks) -> Ranks:
    return places - np.searchsorted(dropped, places) + np.arange(len(places))


def spliced(values: npt.NDArray[Any], gone: Ranks, places: Ranks, put: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`values` without its entries `gone` (sorted), and with `put` before its entries `places` (ascending)."""
    return np.insert(np.delete(values, gone), places - np.searchsorted(gone, places), put)


def insertion_places(num_rows: int, keys_of: Callable[[Ranks], SortKeys], keys: SortKeys) -> Ranks:
    """How many of the sorted rows come before each of M others, by bisection of all M at once: log₂(rows) rounds.

    `keys_of` gives the sort keys of rows, (M,) each; `keys` are those of the others.
    """
    low, high = np.zeros(len(keys[0]), np.int64), np.full(len(keys[0]), num_rows, np.int64)
    while (is_open := low < high).any():
        middle = np.minimum((low + high) // 2, num_rows - 1)
        is_before = _precedes(keys_of(middle), keys)
        low = np.where(is_open & is_before, middle + 1, low)
        high = np.where(is_open & ~is_before, middle, high)
    return low


def _precedes(keys: SortKeys, others: SortKeys) -> npt.NDArray[np.bool_]:
    precedes = np.zeros(len(keys[0]), np.bool_)
    for key, other in zip(reversed(keys), reversed(others), strict=True):
        precedes = (key < other) | ((key == other) & precedes)
    return precedes


class Translation(Protocol):
    """Ranks of the catalogue as published ⇄ ranks of an epoch of it."""

    @property
    def epoch_ranks(self) -> npt.NDArray[np.int32]:
        """The rank in the epoch of each published item, -1 where it is not there."""

    def base_ranks(self, ranks: Ranks) -> Ranks:
        """The published rank of each item of the epoch, (M,) → (M,); -1 for those that were not published."""


@dataclass(frozen=True, eq=False)
class Origins:
    """A `Translation` of an epoch whose base is not the catalogue as published."""

    origins: npt.NDArray[np.int32]  # (E,) the published rank of each row, -1 for those that were not published
    epoch_ranks: npt.NDArray[np.int32]  # (N,)

    @classmethod
    def of(cls, num_published: int, origins: npt.NDArray[np.int32]) -> "Origins":
        """The translation of rows whose published ranks are `origins`."""
        epoch_ranks = np.full(num_published, -1, np.int32)
        kept = np.flatnonzero(origins >= 0)
        epoch_ranks[origins[kept]] = kept
        return cls(origins, epoch_ranks)

    def base_ranks(self, ranks: Ranks) -> Ranks:
        """As `Translation` says."""
        return self.origins[ranks].astype(np.int64)


@dataclass(frozen=True)
class TranslatedNeighbours(Neighbours):
    """A base's neighbours, asked and answering in an epoch's ranks; the columns stay the base's."""

    rank_map: Translation

    def of_history(self, history: Ranks, decay: float = 0.8, last: int = 20) -> Ranks:
        """As of the base: items that are new have no neighbours but do age the others; those deleted are nobody's."""
        # A new item's base rank, -1, has the empty slice [offsets[-1], offsets[0]).
        found = self.rank_map.epoch_ranks[super().of_history(self.rank_map.base_ranks(history), decay, last)]
        return found[found >= 0].astype(np.int64)


def translated(neighbours: Neighbours, rank_map: Translation) -> TranslatedNeighbours:
    """The base's `neighbours` for an epoch; nothing is copied."""
    return TranslatedNeighbours(neighbours.offsets, neighbours.ranks, neighbours.weights, rank_map)
