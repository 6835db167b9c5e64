"""What answers when the model does not: a policy, as data, of item lists, all under the request's own filter.

    the model's last answer to this user → what goes with the history → what is popular in its categories → in general

Whatever a list holds, an item of it is taken only if the request may get it: none is illegal, filtered out or seen.
"""

import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from semantic_ids.bundle import Bundle
from semantic_ids.filters import ItemFilter
from semantic_ids.trie import Ranks

CACHE = "cache"
"""Name of the source whose items were the model's once."""

_CHUNK = 4096  # popular items looked at in one go; a narrow filter takes several
_DECAY, _LAST = 0.8, 20  # of the history's categories, as `Neighbours.of_history` has them
_MAX_CATEGORIES = 8
_TOP_OF_CATEGORY = 500  # as many as an answer may hold; where a filter leaves fewer, popularity follows
_MAX_KEPT_CATEGORIES = 1_000


def _nothing() -> Ranks:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Asked:
    """What the lists are made from."""

    bundle: Bundle
    history: Ranks
    """Oldest first."""
    cached: Ranks = field(default_factory=_nothing)
    """The model's last answer to the same user, best first."""
    popular_in: "PopularByCategory | None" = None


@dataclass(frozen=True)
class FallbackSource:
    """One list of the policy: ranks by preference, in chunks, made only as far as they are needed."""

    name: str
    ranks: Callable[[Asked], Iterator[Ranks]]


@dataclass(frozen=True)
class FallbackItem:
    """One item, and the name of the list it is from."""

    rank: int
    source: str


class PopularByCategory:
    """The most popular items of each category path, made when they are first asked for."""

    def __init__(self, bundle: Bundle) -> None:
        self._catalog = bundle.catalog
        self._top: OrderedDict[str, Ranks] = OrderedDict()

    def __call__(self, category: str) -> Ranks:
        """At most `_TOP_OF_CATEGORY`, the most popular first."""
        top = self._top.get(category)
        if top is None:
            ranks = self._catalog.ranks_in_category(category)
            popularity = self._catalog.popularity[ranks].astype(np.int64)
            if len(ranks) > _TOP_OF_CATEGORY:  # a linear selection before the sort: a category may hold most items
                best = np.argpartition(-popularity, _TOP_OF_CATEGORY)[:_TOP_OF_CATEGORY]
                ranks, popularity = ranks[best], popularity[best]
            top = self._top[category] = ranks[np.lexsort((ranks, -popularity))]
            if len(self._top) > _MAX_KEPT_CATEGORIES:
                self._top.popitem(last=False)
        return top


def _cached(asked: Asked) -> Iterator[Ranks]:
    yield asked.cached


def _neighbours(asked: Asked) -> Iterator[Ranks]:
    yield asked.bundle.neighbours.of_history(asked.history, _DECAY, _LAST)


def _category_popularity(asked: Asked) -> Iterator[Ranks]:
    """Places go to the categories in proportion to their weight in the history (highest averages, after D'Hondt)."""
    weights: Counter[str] = Counter()
    for age, rank in enumerate(asked.history[-_LAST:][::-1].tolist()):
        for path in asked.bundle.catalog.categories_of(rank):
            weights[path] += _DECAY**age  # type: ignore[assignment]
    popular_in = asked.popular_in or PopularByCategory(asked.bundle)
    tops = [(popular_in(path), weight) for path, weight in weights.most_common(_MAX_CATEGORIES)]
    if tops:
        turns = np.concatenate([np.arange(1, len(ranks) + 1) / weight for ranks, weight in tops])
        yield np.concatenate([ranks for ranks, _ in tops])[np.argsort(turns, kind="stable")]


def _popularity(asked: Asked) -> Iterator[Ranks]:
    order = asked.bundle.catalog.by_popularity
    for start in range(0, len(order), _CHUNK):
        yield order[start : start + _CHUNK]


POLICY: tuple[FallbackSource, ...] = (
    FallbackSource(CACHE, _cached),
    FallbackSource("cooccurrence", _neighbours),
    FallbackSource("category_popularity", _category_popularity),
    FallbackSource("popularity", _popularity),
)
"""Asked in this order until the answer is full."""


def fallback_items(
    asked: Asked,
    item_filter: ItemFilter,
    count: int,
    policy: tuple[FallbackSource, ...] = POLICY,
    already: Ranks | None = None,
) -> list[FallbackItem]:
    """The first `count` eligible items of the policy, none twice, none of `already`; fewer only if fewer are left."""
    taken = set(already.tolist()) if already is not None else set()
    chosen: list[FallbackItem] = []
    if count < 1:
        return chosen
    for source in policy:
        for ranks in source.ranks(asked):
            for rank in ranks[item_filter.contains(ranks)].tolist():
                if rank in taken:
                    continue
                taken.add(rank)
                chosen.append(FallbackItem(rank, source.name))
                if len(chosen) == count:
                    return chosen
    return chosen


@dataclass(frozen=True)
class _Kept:
    item_ids: tuple[str, ...]
    until: float


class AnswerCache:
    """The model's last answer to each user (or inline history), the least recently used ones dropped.

    Item ids, and not ranks: those change their meaning with every epoch of the catalogue. What a user did since is the
    caller's to say: by the filter of a request, and by `withdraw` for when no filter can know it (Redis is down).
    """

    def __init__(
        self, max_answers: int = 10_000, ttl_s: float = 3_600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_answers = max_answers
        self._ttl_s = ttl_s
        self._clock = clock
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: bytes, item_ids: Iterable[str]) -> None:
        """Keep an answer, best first."""
        self._kept[key] = _Kept(tuple(item_ids), self._clock() + self._ttl_s)
        self._kept.move_to_end(key)
        while len(self._kept) > self._max_answers:
            self._kept.popitem(last=False)

    def get(self, key: bytes) -> tuple[str, ...]:
        """The answer kept; empty if there is none, or it is too old."""
        kept = self._kept.get(key)
        if kept is None:
            return ()
        if self._clock() >= kept.until:
            del self._kept[key]
            return ()
        self._kept.move_to_end(key)
        return kept.item_ids

    def withdraw(self, key: bytes, item_ids: Collection[str]) -> None:
        """Take these items out of an answer."""
        kept = self._kept.get(key)
        if kept is not None:
            left = tuple(item_id for item_id in kept.item_ids if item_id not in item_ids)
            self._kept[key] = _Kept(left, kept.until)

    def forget(self, key: bytes) -> None:
        """Drop an answer."""
        self._kept.pop(key, None)


def cache_key(tenant: str, user_id: str | None, inline_history: Sequence[str] | None) -> bytes:
    """The tenant's user; for an inline history, that history itself."""
    digest = hashlib.blake2b(digest_size=16)
    names = ("user", tenant, user_id) if user_id is not None and inline_history is None else ("history", tenant)
    for name in (*names, *(inline_history or ())):
        digest.update(b"%d:" % len(name) + name.encode("utf-8", "surrogatepass"))
    return digest.digest()
