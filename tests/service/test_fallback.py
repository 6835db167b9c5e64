"""The fallback policy: lists in order, each under the request's filter."""

from collections.abc import Iterator

import numpy as np
import pytest

from semantic_ids.bundle import Bundle
from semantic_ids.filters import ItemFilter
from semantic_ids.trie import Ranks
from service.fallback import POLICY, FallbackSource, fallback_ranks

NOBODY = np.empty(0, np.int64)


def everything(bundle: Bundle) -> ItemFilter:
    return ItemFilter.of(len(bundle.catalog))


def neighbours_of(bundle: Bundle, rank: int) -> list[int]:
    return [int(other) for other in bundle.neighbours.ranks[4 * rank : 4 * rank + 4]]


def test_what_goes_with_the_history_comes_first_then_what_is_popular(bundle: Bundle):
    close = neighbours_of(bundle, 17)
    popular = [rank for rank in bundle.catalog.by_popularity.tolist() if rank not in close]
    assert fallback_ranks(bundle, np.array([17]), everything(bundle), 10).tolist() == close + popular[:6]


def test_the_newest_item_of_the_history_counts_most(bundle: Bundle):
    # weights are 4, 3, 2, 1 by place; one step back counts 0.8: 4 > 3.2 > 3 > 2.4 > 2 > 1.6 > 1 > 0.8
    newest = next(
        rank for rank in range(4, 150) if not set(neighbours_of(bundle, 3)) & set(neighbours_of(bundle, rank))
    )
    old, new = neighbours_of(bundle, 3), neighbours_of(bundle, newest)
    expected = [rank for pair in zip(new, old, strict=True) for rank in pair]
    assert fallback_ranks(bundle, np.array([3, newest]), everything(bundle), 8).tolist() == expected


def test_nobody_known_gets_what_is_popular(bundle: Bundle):
    found = fallback_ranks(bundle, NOBODY, everything(bundle), 20)
    assert found.tolist() == bundle.catalog.by_popularity[:20].tolist()
    popularity = bundle.catalog.popularity[found]
    assert popularity.tolist() == sorted(popularity, reverse=True)


@pytest.mark.parametrize("seed", range(50))
def test_the_answer_is_full_eligible_and_without_repeats(bundle: Bundle, seed: int):
    rng = np.random.default_rng(seed)
    num_items = len(bundle.catalog)
    item_filter = ItemFilter.of(
        num_items,
        allow=rng.integers(0, num_items, rng.integers(1, 300)) if seed % 2 else None,
        deny=rng.integers(0, num_items, rng.integers(0, 300)),
    )
    history = rng.integers(0, num_items, rng.integers(0, 30))
    count = int(rng.integers(1, 501))
    found = fallback_ranks(bundle, history, item_filter, count)
    assert len(set(found.tolist())) == len(found) == min(count, item_filter.num_eligible)
    assert item_filter.contains(found).all()


def test_a_policy_is_data(bundle: Bundle):
    def last(_bundle: Bundle, _history: Ranks) -> Iterator[Ranks]:
        yield np.array([9, 8])
        yield np.array([8, 7, 6])

    policy = (FallbackSource("last", last), *POLICY)
    assert fallback_ranks(bundle, NOBODY, everything(bundle), 4, policy).tolist() == [9, 8, 7, 6]


def test_a_list_is_made_only_as_far_as_it_is_needed(bundle: Bundle):
    def endless(_bundle: Bundle, _history: Ranks) -> Iterator[Ranks]:
        yield np.array([5])
        raise AssertionError("nobody needs more")

    assert fallback_ranks(bundle, NOBODY, everything(bundle), 1, (FallbackSource("x", endless),)).tolist() == [5]
