"""User sequences, against plain lists of lists."""

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from training.sequences import Sequences

lists_of_items = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=8)


def as_lists(sequences: Sequences) -> list[list[int]]:
    return [items.tolist() for items in sequences]


def int64(values: list[int]) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


@given(lists_of_items)
def test_sequences_are_what_was_put_in(lists):
    sequences = Sequences.of(lists)
    assert len(sequences) == len(lists)
    assert as_lists(sequences) == lists
    assert [sequences[user].tolist() for user in range(len(lists))] == lists
    assert sequences.lengths.tolist() == [len(items) for items in lists]
    assert [str(column.dtype) for column in (sequences.offsets, sequences.items)] == ["int64", "int32"]


@given(lists_of_items, st.integers(0, 7))
def test_without_last_drops_the_newest_events(lists, count):
    expected = [items[: max(len(items) - count, 0)] for items in lists]
    assert as_lists(Sequences.of(lists).without_last(count)) == expected


@given(lists_of_items, st.data())
def test_slice_each_cuts_every_sequence_at_its_own_places(lists, data):
    start = [data.draw(st.integers(0, len(items))) for items in lists]
    stop = [data.draw(st.integers(0, len(items))) for items in lists]
    cut = Sequences.of(lists).slice_each(int64(start), int64(stop))
    assert as_lists(cut) == [items[low:high] for items, low, high in zip(lists, start, stop, strict=True)]


@given(lists_of_items.filter(bool), st.data())
def test_select_takes_users_in_any_order_and_more_than_once(lists, data):
    users = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=10))
    assert as_lists(Sequences.of(lists).select(int64(users))) == [lists[user] for user in users]


@given(lists_of_items, st.data())
def test_where_keeps_the_masked_events_of_every_sequence(lists, data):
    kept = [data.draw(st.lists(st.booleans(), min_size=len(items), max_size=len(items))) for items in lists]
    cut = Sequences.of(lists).where(np.array([one for mask in kept for one in mask], np.bool_))
    assert as_lists(cut) == [
        [item for item, is_kept in zip(items, mask, strict=True) if is_kept]
        for items, mask in zip(lists, kept, strict=True)
    ]
    assert [str(column.dtype) for column in (cut.offsets, cut.items)] == ["int64", "int32"]
