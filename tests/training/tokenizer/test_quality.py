"""Collapse is told from what is merely uneven, and the numbers of moved items can be checked by hand."""

import numpy as np
import pytest

from semantic_ids.codes import SidSpace
from semantic_ids.quantizer import ResidualQuantizer
from training.stage import StageError
from training.tokenizer.quality import listings_of, mean_move, refuse_collapse


def refuse(codes: object) -> None:
    array = np.array(codes, np.uint16)
    refuse_collapse(SidSpace(array.shape[1], 16), array, np.arange(len(array)))


def test_a_later_level_that_tells_nothing_apart_is_a_collapse():
    """40 items on 4 first codes; the second level has one code for all of them, the third tells them apart."""
    with pytest.raises(StageError, match=r"level 1 collapsed: 1 of 16 codes used for 40 items .* 1\.0 in even use"):
        refuse([[item % 4, 7, item // 4] for item in range(40)])


def test_one_code_with_nearly_all_items_is_a_collapse_though_others_are_used():
    """97 of 100 items on one code, 3 on others: exp(H) = 1.18 codes in even use."""
    codes = [[max(0, item - 96), item % 16, item // 16] for item in range(100)]
    with pytest.raises(StageError, match=r"level 0 collapsed: 4 of 16 codes used .* 1\.2 in even use"):
        refuse(codes)


def test_a_level_with_nothing_left_to_tell_apart_may_have_one_code():
    refuse([[item % 16, item // 16, 0] for item in range(200)])


def test_identical_listings_do_not_count_as_a_collapse_of_later_levels():
    """Sixteen listings, each twenty times: the first level has told apart what can be."""
    codes = np.repeat([[item, 0, 0] for item in range(16)], 20, axis=0).astype(np.uint16)
    refuse_collapse(SidSpace(3, 16), codes, np.arange(0, 320, 20))


def test_a_move_is_measured_from_the_items_own_new_sid():
    """Codes 0 and 10, then 0 and 1. An item at 2 has 0+1, at distance 1; moved to 10+0 it is at distance 8: seven more.

    One at 0.5 goes from 0+0, distance 0.5, to 0+1, distance 0.5: nothing. (7 + 0) / (1 + 0.5) = 4.667.
    """
    codebooks = np.array([[[0.0], [10.0]], [[0.0], [1.0]]], np.float32)
    quantizer = ResidualQuantizer(np.zeros(1, np.float32), np.ones(1, np.float32), codebooks)
    vectors = np.array([[2.0], [0.5], [7.0]], np.float32)
    nearest, codes = np.array([[0, 1], [0, 0], [1, 0]], np.uint16), np.array([[1, 0], [0, 1], [1, 0]], np.uint16)
    assert mean_move(quantizer, vectors, nearest, codes, np.array([0, 1])) == pytest.approx(7 / 1.5)
    assert mean_move(quantizer, vectors, nearest, nearest, np.empty(0, np.int64)) == 0.0


def test_listings_are_the_same_exactly_where_vectors_are():
    vectors = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, np.nextafter(np.float32(2), 3)]], np.float32)
    first, second, third = listings_of(vectors)
    assert first == second != third
