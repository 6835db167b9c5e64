"""What answers when the model does not: a policy, as data, of item lists, all under the request's own filter."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from semantic_ids.bundle import Bundle
from semantic_ids.filters import ItemFilter
from semantic_ids.trie import Ranks

_CHUNK = 4096  # popular items looked at in one go; a narrow filter takes several


@dataclass(frozen=True)
class FallbackSource:
    """One list of the policy: ranks by preference, in chunks, made only as far as they are needed."""

    name: str
    ranks: Callable[[Bundle, Ranks], Iterator[Ranks]]


def _neighbours(bundle: Bundle, history: Ranks) -> Iterator[Ranks]:
    yield bundle.neighbours.of_history(history)


def _popularity(bundle: Bundle, _history: Ranks) -> Iterator[Ranks]:
    order = bundle.catalog.by_popularity
    for start in range(0, len(order), _CHUNK):
        yield order[start : start + _CHUNK]


POLICY: tuple[FallbackSource, ...] = (
    FallbackSource("cooccurrence", _neighbours),
    FallbackSource("popularity", _popularity),
)
"""Asked in this order until the answer is full: what goes with the history, then what is popular."""


def fallback_ranks(
    bundle: Bundle, history: Ranks, item_filter: ItemFilter, count: int, policy: tuple[FallbackSource, ...] = POLICY
) -> Ranks:
    """The first `count` eligible ranks of the policy, none twice; fewer only if fewer are eligible."""
    chosen: dict[int, None] = {}
    for source in policy:
        for ranks in source.ranks(bundle, history):
            for rank in ranks[item_filter.contains(ranks)]:
                chosen[int(rank)] = None
                if len(chosen) == count:
                    return np.fromiter(chosen, np.int64, len(chosen))
    return np.fromiter(chosen, np.int64, len(chosen))
