"""Which items a request may get, as exact counts over rank intervals.

A trie node covers an interval of item ranks, so a node holds an eligible item iff `filter.count(low, high) > 0`. Two
forms, each where it is cheap: a *bitmap* with prefix sums for what many requests share (categories), compiled once and
cached by content; *sorted ranks* for what is one request's own (included, excluded, seen items), counted by bisection.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt

from semantic_ids.catalog import Catalog
from semantic_ids.trie import Ranks


class EmptyFilterError(ValueError):
    """A filter that leaves no item. Decoding with it is an error; it never means "no filter"."""


@dataclass(frozen=True)
class FilterSpec:
    """What a request asks for, by name. An empty field means "no such restriction"."""

    include_items: frozenset[str] = frozenset()
    exclude_items: frozenset[str] = frozenset()
    any_categories: frozenset[str] = frozenset()
    none_categories: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class RankBitmap:
    """A set of ranks with constant-time interval counts."""

    member: npt.NDArray[np.bool_]  # (N,)
    prefix: npt.NDArray[np.uint32]  # (N + 1,): members below each rank

    @classmethod
    def of(cls, member: npt.NDArray[np.bool_]) -> "RankBitmap":
        """The bitmap with its prefix sums."""
        prefix = np.zeros(len(member) + 1, np.uint32)
        np.cumsum(member, out=prefix[1:])
        return cls(member, prefix)

    @cached_property
    def digest(self) -> str:
        """A name for its content, the same in every process."""
        return hashlib.blake2b(np.packbits(self.member).tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ItemFilter:
    """The eligible ranks of one request: `allow` (or the bitmap, or all) less `deny`.

    `allow` and `deny` are sorted and unique; `allow` is already cut to the bitmap and holds nothing of `deny`, and
    `deny` holds only ranks of the bitmap, so that counting is a subtraction.
    """

    num_items: int
    bitmap: RankBitmap | None = None
    allow: Ranks | None = None
    deny: Ranks = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def of(
        cls, num_items: int, *, bitmap: RankBitmap | None = None, allow: Ranks | None = None, deny: Ranks | None = None
    ) -> "ItemFilter":
        """Compose a filter from a shared bitmap and a request's own ranks, in any order, with repeats."""
        denied = np.unique(deny) if deny is not None else np.empty(0, np.int64)
        if allow is None:
            if bitmap is not None:
                denied = denied[bitmap.member[denied]]
            return cls(num_items, bitmap, None, denied)
        allowed = np.setdiff1d(allow, denied)
        if bitmap is not None:
            allowed = allowed[bitmap.member[allowed]]
        return cls(num_items, None, allowed)

    def count(self, low: Ranks, high: Ranks) -> npt.NDArray[np.int64]:
        """Eligible items in each rank interval [low, high), (M,) → (M,)."""
        if self.allow is not None:
            return np.searchsorted(self.allow, high) - np.searchsorted(self.allow, low)
        if self.bitmap is not None:
            counts = self.bitmap.prefix[high].astype(np.int64) - self.bitmap.prefix[low]
        else:
            counts = high - low
        if len(self.deny):
            counts = counts - (np.searchsorted(self.deny, high) - np.searchsorted(self.deny, low))
        return counts

    def contains(self, ranks: Ranks) -> npt.NDArray[np.bool_]:
        """Whether each rank is eligible, (M,) → (M,)."""
        if self.allow is not None:
            return _stand_in(self.allow, ranks)
        denied = _stand_in(self.deny, ranks)
        return ~denied if self.bitmap is None else self.bitmap.member[ranks] & ~denied

    @cached_property
    def num_eligible(self) -> int:
        """How many items the filter leaves."""
        if self.allow is not None:
            return len(self.allow)
        return (self.num_items if self.bitmap is None else int(self.bitmap.prefix[-1])) - len(self.deny)


def _stand_in(members: Ranks, ranks: Ranks) -> npt.NDArray[np.bool_]:
    """Whether each rank is one of the sorted `members`, (M,) → (M,)."""
    if not len(members):
        return np.zeros(len(ranks), np.bool_)
    found: npt.NDArray[np.bool_] = members.take(members.searchsorted(ranks), mode="clip") == ranks
    return found


class FilterCompiler:
    """Turns names into an `ItemFilter` over one catalogue epoch, keeping the category bitmaps by content."""

    def __init__(self, catalog: Catalog, cache_bytes: int = 1 << 28) -> None:
        self.catalog = catalog
        self._max_cached = max(8, cache_bytes // (5 * len(catalog)))  # a bitmap and its prefix sums: 5 bytes an item
        self._bitmaps: OrderedDict[tuple[frozenset[str], frozenset[str]], RankBitmap] = OrderedDict()

    def compile(self, spec: FilterSpec, deny: Iterable[str] = ()) -> ItemFilter:
        """The filter of one request; `deny` are further ids to leave out (seen, disliked), in any order, repeated."""
        allow = self.catalog.ranks_of(spec.include_items)[0] if spec.include_items else None
        denied, _ = self.catalog.ranks_of(chain(spec.exclude_items, deny))
        return ItemFilter.of(len(self.catalog), bitmap=self._bitmap(spec), allow=allow, deny=denied)

    def _bitmap(self, spec: FilterSpec) -> RankBitmap | None:
        if not spec.any_categories and not spec.none_categories:
            return None
        key = (spec.any_categories, spec.none_categories)
        bitmap = self._bitmaps.get(key)
        if bitmap is None:
            member = np.full(len(self.catalog), not spec.any_categories)
            for name in spec.any_categories:
                member[self.catalog.ranks_in_category(name)] = True
            for name in spec.none_categories:
                member[self.catalog.ranks_in_category(name)] = False
            bitmap = self._bitmaps[key] = RankBitmap.of(member)
            if len(self._bitmaps) > self._max_cached:
                self._bitmaps.popitem(last=False)
        self._bitmaps.move_to_end(key)
        return bitmap
