"""The co-occurrence table against hand-derived sums."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.neighbours import Neighbours
from tests.semantic_ids.factories import is_mapped, random_neighbours

# 0 → 1 (0.5), 2 (0.4); 1 → 2 (0.3); 2 → nothing; 3 → 0 (1.0)
TABLE = Neighbours(
    np.array([0, 2, 3, 3, 4]), np.array([1, 2, 2, 0], np.uint32), np.array([0.5, 0.4, 0.3, 1.0], np.float32)
)


def test_neighbours_stand_by_their_summed_weight():
    """History 0, 1: item 2 gets 0.4 · 0.8 + 0.3 = 0.62, item 1 gets 0.5 · 0.8 = 0.40."""
    assert TABLE.of_history(np.array([0, 1])).tolist() == [2, 1]


def test_the_newest_item_counts_most():
    """0 then 3: item 0 gets 1.0, item 1 0.40. 3 then 0 at decay 0.1: item 1 gets 0.5, 2 0.4, 0 0.1."""
    assert TABLE.of_history(np.array([0, 3])).tolist() == [0, 1, 2]
    assert TABLE.of_history(np.array([3, 0]), decay=0.1).tolist() == [1, 2, 0]


def test_only_the_last_items_count():
    assert TABLE.of_history(np.array([0, 3]), last=1).tolist() == [0]


def test_no_history_or_no_neighbour_gives_nothing():
    assert TABLE.of_history(np.array([], np.int64)).tolist() == []
    assert TABLE.of_history(np.array([2])).tolist() == []


@given(st.lists(st.integers(0, 14), max_size=25), st.integers(0, 1000))
def test_the_order_is_that_of_the_sums_taken_one_by_one(history: list[int], seed: int):
    table = random_neighbours(15, seed)
    sums: dict[int, float] = {}
    for age, rank in enumerate(reversed(history[-20:])):
        for place in range(table.offsets[rank], table.offsets[rank + 1]):
            neighbour = int(table.ranks[place])
            sums[neighbour] = sums.get(neighbour, 0.0) + float(table.weights[place]) * 0.8**age
    answer = table.of_history(np.array(history, np.int64)).tolist()
    assert sorted(answer) == sorted(sums)
    found = np.array([sums[rank] for rank in answer])
    assert (np.diff(found) <= 1e-6).all()


def test_a_saved_table_comes_back_mapped(tmp_path: Path):
    TABLE.save(tmp_path / "neighbours")
    loaded = Neighbours.load(tmp_path / "neighbours")
    assert is_mapped(loaded.ranks)
    assert loaded.of_history(np.array([0, 1])).tolist() == [2, 1]


def test_a_table_without_any_pair_can_be_saved(tmp_path: Path):
    Neighbours(np.zeros(4, np.int64), np.empty(0, np.uint32), np.empty(0, np.float32)).save(tmp_path)
    assert Neighbours.load(tmp_path).of_history(np.array([0, 2])).tolist() == []
