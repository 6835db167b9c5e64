"""The trie against a dictionary of prefixes."""

from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.codes import SidError, SidSpace
from semantic_ids.trie import ROOT, SidTrie, UnknownPrefixError, sid_keys

Sid = tuple[int, ...]
Case = tuple[SidSpace, list[Sid]]


@st.composite
def sid_lists(draw: st.DrawFn) -> Case:
    """One to five levels, tiny and largest codebooks, codes from few values so that prefixes and SIDs repeat."""
    num_levels = draw(st.integers(1, 5))
    codebook_size = draw(st.sampled_from([2, 3, 8, 255, 256, 4096, 65_536] if num_levels < 5 else [2, 5, 256, 4096]))
    code = st.sampled_from(sorted({0, 1, codebook_size // 2, codebook_size - 1}))
    sid = st.tuples(*[code] * num_levels)
    return SidSpace(num_levels, codebook_size), draw(st.lists(sid, min_size=1, max_size=30))


class DictTrie:
    """The obvious one: every prefix with the set of codes that follow it."""

    def __init__(self, sids: list[Sid]) -> None:
        self.sids = sorted(sids)
        self.children: dict[Sid, set[int]] = {}
        for sid in sids:
            for depth in range(len(sid)):
                self.children.setdefault(sid[:depth], set()).add(sid[depth])

    def ranks(self, prefix: Sid) -> tuple[int, int]:
        low = bisect_left(self.sids, prefix)
        return low, low + sum(sid[: len(prefix)] == prefix for sid in self.sids)

    def num_leaves(self, prefix: Sid) -> int:
        return len({sid for sid in self.sids if sid[: len(prefix)] == prefix})


@given(sid_lists())
def test_children_of_every_prefix_are_those_of_a_dict_trie(case: Case):
    space, sids = case
    trie, reference = SidTrie.build(space, np.array(sids)), DictTrie(sids)
    for prefix, codes in reference.children.items():
        node = trie.walk(prefix)
        children = trie.children(np.array([node]))
        assert children.code.tolist() == sorted(codes)
        assert children.parent.tolist() == [0] * len(codes)
        assert children.node.tolist() == [trie.walk((*prefix, code)) for code in sorted(codes)]
        assert children.node.tolist() == [trie.step(node, code) for code in sorted(codes)]


@given(sid_lists())
def test_ranges_of_every_prefix_are_those_of_the_sorted_sids(case: Case):
    space, sids = case
    trie, reference = SidTrie.build(space, np.array(sids)), DictTrie(sids)
    assert (trie.num_items, trie.num_leaves) == (len(sids), len(set(sids)))
    for prefix in [*reference.children, *reference.sids]:
        node = np.array([trie.walk(prefix)])
        low, high = trie.rank_range(node, len(prefix) - 1)
        assert (low[0], high[0]) == reference.ranks(prefix)
        first, end = trie.leaf_range(node, len(prefix) - 1)
        assert end[0] - first[0] == reference.num_leaves(prefix)


@given(sid_lists(), st.data())
def test_children_of_many_nodes_are_the_children_of_each(case: Case, data: st.DataObject):
    space, sids = case
    trie, reference = SidTrie.build(space, np.array(sids)), DictTrie(sids)
    depth = data.draw(st.integers(0, space.num_levels - 1))
    prefixes = sorted(prefix for prefix in reference.children if len(prefix) == depth)
    asked = data.draw(st.lists(st.sampled_from(prefixes), max_size=8))  # in any order, with repeats, or none
    children = trie.children(np.array([trie.walk(prefix) for prefix in asked], np.int64))
    expected = [(place, code) for place, prefix in enumerate(asked) for code in sorted(reference.children[prefix])]
    assert list(zip(children.parent.tolist(), children.code.tolist(), strict=True)) == expected
    assert children.node.tolist() == [trie.walk((*asked[place], code)) for place, code in expected]


@given(sid_lists())
def test_path_of_rank_passes_every_prefix_of_the_item(case: Case):
    space, sids = case
    trie = SidTrie.build(space, np.array(sids))
    paths = trie.path_of_rank(np.arange(len(sids)))
    for rank, sid in enumerate(sorted(sids)):
        assert paths[rank].tolist() == [trie.walk(sid[: depth + 1]) for depth in range(space.num_levels)]


@given(sid_lists(), st.data())
def test_a_prefix_that_no_item_has_raises(case: Case, data: st.DataObject):
    space, sids = case
    trie = SidTrie.build(space, np.array(sids))
    known = {sid[:depth] for sid in sids for depth in range(space.num_levels + 1)}
    code = st.integers(-1, space.codebook_size) | st.sampled_from([code for sid in sids for code in sid])
    prefix = tuple(data.draw(st.lists(code, max_size=space.num_levels + 1)))
    if prefix in known:
        assert trie.walk(prefix) >= ROOT
    else:
        with pytest.raises(UnknownPrefixError):
            trie.walk(prefix)


@given(sid_lists(), st.randoms(use_true_random=False))
def test_the_order_of_the_sids_does_not_matter(case: Case, random):
    space, sids = case
    shuffled = random.sample(sids, len(sids))
    tries = [
        SidTrie.build(space, np.array(sids)),
        SidTrie.build(space, np.array(shuffled)),
        SidTrie.from_sorted(space, np.array(sorted(sids))),
    ]
    for name in ("level_starts", "tokens", "first_child", "leaf_rank"):
        first, *others = [getattr(trie, name) for trie in tries]
        assert all(np.array_equal(first, other) and first.dtype == other.dtype for other in others)


@given(sid_lists(), st.data())
def test_packed_keys_order_like_the_sids(case: Case, data: st.DataObject):
    space, sids = case
    one, other = data.draw(st.sampled_from(sids)), data.draw(st.sampled_from(sids))
    keys = sid_keys(space, np.array([one, other]))
    assert (bool(keys[0] < keys[1]), bool(keys[0] == keys[1])) == (one < other, one == other)


def test_the_layout_of_a_small_trie_is_the_one_that_the_module_draws():
    """Items (0,1) (0,1) (0,3) (2,0): edges 0 and 1 are codes 0 and 2; edges 2, 3, 4 their children 1, 3 and 0."""
    trie = SidTrie.build(SidSpace(2, 4), np.array([[2, 0], [0, 3], [0, 1], [0, 1]]))
    assert trie.level_starts.tolist() == [0, 2, 5]
    assert trie.tokens.tolist() == [0, 2, 1, 3, 0]
    assert trie.first_child.tolist() == [2, 4, 5]
    assert trie.leaf_rank.tolist() == [0, 2, 3, 4]


def test_a_leaf_has_no_next_code():
    trie = SidTrie.build(SidSpace(2, 4), np.array([[0, 1]]))
    with pytest.raises(UnknownPrefixError, match="leaf"):
        trie.step(trie.walk([0, 1]), 0)
    with pytest.raises(UnknownPrefixError, match="longer than the 2 levels"):
        trie.walk([0, 1, 0])


def test_no_sids_unsorted_sids_and_too_many_bits_are_refused():
    space = SidSpace(2, 4)
    empty = np.empty((0, 2), np.int64)
    with pytest.raises(SidError, match="at least one"):
        SidTrie.build(space, empty)
    with pytest.raises(SidError, match="at least one"):
        SidTrie.from_sorted(space, empty)
    with pytest.raises(SidError, match="not sorted"):
        SidTrie.from_sorted(space, np.array([[1, 0], [0, 3]]))
    with pytest.raises(SidError, match="65 bits"):
        SidTrie.build(SidSpace(5, 4097), np.zeros((1, 5), np.int64))


def test_a_million_random_sids_take_at_most_ten_bytes_an_item():
    codes = np.random.default_rng(0).integers(0, 256, (1_000_000, 4), dtype=np.uint16)
    trie = SidTrie.build(SidSpace(4, 256), codes)
    assert trie.num_items == 1_000_000
    assert trie.nbytes == trie.tokens.nbytes + trie.first_child.nbytes <= 10 * len(codes)
