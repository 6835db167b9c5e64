"""Filters against set algebra."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidSpace
from semantic_ids.filters import FilterCompiler, FilterSpec, ItemFilter, RankBitmap
from tests.semantic_ids.factories import CATEGORIES, random_catalog


@st.composite
def filters_and_sets(draw: st.DrawFn) -> tuple[ItemFilter, set[int]]:
    """A filter of any form, and the set of ranks that it means."""
    num_items = draw(st.integers(1, 30))
    ranks = st.none() | st.lists(st.integers(0, num_items - 1), max_size=40)  # unsorted, with repeats
    member = draw(st.none() | st.lists(st.booleans(), min_size=num_items, max_size=num_items))
    allow, deny = draw(ranks), draw(ranks)
    expected = set(range(num_items))
    if member is not None:
        expected &= {rank for rank, is_member in enumerate(member) if is_member}
    if allow is not None:
        expected &= set(allow)
    expected -= set(deny or ())
    item_filter = ItemFilter.of(
        num_items,
        bitmap=None if member is None else RankBitmap.of(np.array(member)),
        allow=None if allow is None else np.array(allow, np.int64),
        deny=None if deny is None else np.array(deny, np.int64),
    )
    return item_filter, expected


@given(filters_and_sets(), st.data())
def test_count_is_the_size_of_the_set_within_each_interval(case: tuple[ItemFilter, set[int]], data: st.DataObject):
    item_filter, expected = case
    bound = st.integers(0, item_filter.num_items)
    bounds = [sorted(pair) for pair in data.draw(st.lists(st.tuples(bound, bound), max_size=20))]
    low, high = np.array(bounds, np.int64).reshape(-1, 2).T
    assert item_filter.count(low, high).tolist() == [sum(a <= rank < b for rank in expected) for a, b in bounds]


@given(filters_and_sets())
def test_contains_and_num_eligible_are_membership_and_size(case: tuple[ItemFilter, set[int]]):
    item_filter, expected = case
    everything = np.arange(item_filter.num_items)
    assert set(everything[item_filter.contains(everything)].tolist()) == expected
    assert item_filter.num_eligible == len(expected)
    assert item_filter.contains(everything[::-1]).tolist() == item_filter.contains(everything)[::-1].tolist()


def items_by_hand(catalog: Catalog, spec: FilterSpec, deny: Sequence[str]) -> set[str]:
    def is_in(rank: int, names: frozenset[str]) -> bool:
        return any(
            path == name or path.startswith(f"{name} > ") for path in catalog.categories_of(rank) for name in names
        )

    return {
        catalog.item_ids[rank]
        for rank in range(len(catalog))
        if (not spec.include_items or catalog.item_ids[rank] in spec.include_items)
        and catalog.item_ids[rank] not in spec.exclude_items | set(deny)
        and (not spec.any_categories or is_in(rank, spec.any_categories))
        and not is_in(rank, spec.none_categories)
    }


CATALOG = random_catalog(num_items=30)
COMPILER = FilterCompiler(CATALOG, cache_bytes=0)  # the smallest cache, so that examples evict one another's bitmaps
IDS = st.frozensets(st.sampled_from([*CATALOG.item_ids, "unknown", ""]), max_size=12)
NAMES = st.frozensets(st.sampled_from([*CATEGORIES, "Hair", "Unknown", "Beauty > "]), max_size=3)


@given(st.builds(FilterSpec, IDS, IDS, NAMES, NAMES), IDS)
def test_a_compiled_filter_holds_the_items_that_its_names_mean(spec: FilterSpec, deny: frozenset[str]):
    item_filter = COMPILER.compile(spec, deny)
    eligible = np.flatnonzero(item_filter.contains(np.arange(len(CATALOG))))
    assert {CATALOG.item_ids[rank] for rank in eligible} == items_by_hand(CATALOG, spec, sorted(deny))
    assert item_filter.num_eligible == len(eligible)


def compiled(paths: list[list[str]], **fields: frozenset[str]) -> list[str]:
    catalog = Catalog.build(
        SidSpace(1, 8),
        [f"i{row}" for row in range(len(paths))],
        np.arange(len(paths))[:, None],
        np.zeros(len(paths), int),
        [""] * len(paths),
        paths,
    )
    item_filter = FilterCompiler(catalog).compile(FilterSpec(**fields))
    return [catalog.item_ids[rank] for rank in np.flatnonzero(item_filter.contains(np.arange(len(catalog))))]


PATHS = [["A"], ["A > B"], ["B"], ["A > B > C", "D"], []]


@pytest.mark.parametrize(
    ("name", "matches"),
    [
        ("A", ["i0", "i1", "i3"]),
        ("A > B", ["i1", "i3"]),
        ("B", ["i2"]),
        ("D", ["i3"]),
        ("C", []),
        ("a", []),  # names are exact
    ],
)
def test_a_category_matches_paths_that_begin_with_it(name: str, matches: list[str]):
    assert compiled(PATHS, any_categories=frozenset({name})) == matches
    others = [item for item in ["i0", "i1", "i2", "i3", "i4"] if item not in matches]
    assert compiled(PATHS, none_categories=frozenset({name})) == others


def test_an_item_under_both_an_asked_for_and_a_barred_category_is_barred():
    fields = {"any_categories": frozenset({"A"}), "none_categories": frozenset({"D"})}
    assert compiled(PATHS, **fields) == ["i0", "i1"]


def test_empty_fields_restrict_nothing():
    assert compiled(PATHS) == ["i0", "i1", "i2", "i3", "i4"]


def test_unknown_names_leave_nothing_where_asked_for_and_bar_nothing():
    assert compiled(PATHS, include_items=frozenset({"nobody"})) == []
    assert compiled(PATHS, any_categories=frozenset({"Nowhere"})) == []
    assert len(compiled(PATHS, exclude_items=frozenset({"nobody"}), none_categories=frozenset({"Nowhere"}))) == 5


def test_an_excluded_item_is_out_even_if_included():
    assert compiled(PATHS, include_items=frozenset({"i1", "i2"}), exclude_items=frozenset({"i2"})) == ["i1"]


def test_filters_of_the_same_categories_share_one_bitmap(catalog: Catalog):
    compiler = FilterCompiler(catalog)
    spec = FilterSpec(any_categories=frozenset({"Beauty", "Books"}))
    one = compiler.compile(spec, deny=[catalog.item_ids[0]])
    other = compiler.compile(FilterSpec(any_categories=frozenset({"Books", "Beauty"})))
    assert one.bitmap is other.bitmap is not None
    assert compiler.compile(FilterSpec(none_categories=spec.any_categories)).bitmap is not one.bitmap
