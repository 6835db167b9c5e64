"""The method `clustered`: alike items share a first code, in clusters of like size, and each has its own second."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.directions import strongest_directions
from training.stage import StageError
from training.tokenizer.clustered import (
    _stable_assignment,
    capped_clusters,
    clustered_codes,
    default_num_clusters,
)
from training.tokenizer.config import TokenizerConfig


def blobs(sizes: list[int], width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points in tight groups of these sizes, and the group of each."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = rng.normal(size=(len(sizes), width))
    return (centres[group] + 0.01 * rng.normal(size=(len(group), width))).astype(np.float32), group


def first_codes(text: np.ndarray, collaborative: np.ndarray | None) -> np.ndarray:
    _, codes = clustered_codes(text, collaborative, 1.4, threads=1, seed=0)
    return np.array(codes[:, 0])


def together(labels: np.ndarray) -> np.ndarray:
    same: np.ndarray = labels[:, None] == labels[None]
    return same


class TestCodes:
    """Two codes for each item."""

    def test_alike_items_share_the_first_code_and_every_item_has_a_second_of_its_own(self):
        text, group = blobs([16] * 16, width=8)
        space, codes = clustered_codes(text, None, 1.4, threads=1, seed=0)
        assert (space.num_levels, space.codebook_size) == (2, 256)
        assert sorted(codes[:, 1].tolist()) == list(range(256))
        assert (together(codes[:, 0]) == together(group)).all()
        by_own_code = codes[np.argsort(codes[:, 1]), 0]
        assert (np.diff(by_own_code.astype(int)) >= 0).all(), "the items of a cluster have codes in a row"

    def test_sasrecs_vectors_decide_where_text_says_nothing_and_zeros_leave_it_to_the_text(self):
        learnt, group = blobs([16] * 16, width=8)
        text, other_group = blobs([16] * 16, width=8, seed=1)
        assert (together(first_codes(np.zeros((256, 8), np.float32), learnt)) == together(group)).all()
        assert (together(first_codes(text, np.zeros_like(learnt))) == together(other_group)).all()

    def test_more_items_than_codes_are_refused(self):
        with pytest.raises(StageError, match=r"at most 65,536, and here are 65,537 items: take another"):
            clustered_codes(np.zeros((65_537, 2), np.float32), None, 1.4, threads=1, seed=0)

    @pytest.mark.parametrize(("num_items", "clusters"), [(1, 1), (9, 4), (5_000, 64), (12_101, 128)])
    def test_a_level_has_about_as_many_choices_as_the_other(self, num_items, clusters):
        assert default_num_clusters(num_items) == clusters

    def test_the_smallest_catalogues(self):
        for num_items in (1, 2, 3):
            _, codes = clustered_codes(np.eye(num_items, 4, dtype=np.float32), None, 1.4, threads=1, seed=0)
            assert len(np.unique(codes, axis=0)) == num_items


def test_no_cluster_is_much_larger_than_the_mean():
    points, _ = blobs([900, 20, 20, 20, 20, 20], width=4)
    sizes = np.bincount(capped_clusters(points, 10, threads=1, seed=0), minlength=10)
    assert sizes.max() <= 170


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_deferred_acceptance_is_stable(num_rows, num_columns, seed):
    distances = np.random.default_rng(seed).random((num_rows, num_columns)).astype(np.float32)
    most = -(-num_rows // num_columns) + 1
    assigned = _stable_assignment(distances, most)
    sizes = np.bincount(assigned, minlength=num_columns)
    assert sizes.max() <= most
    for row, mine in enumerate(assigned):
        for column in np.flatnonzero(distances[row] < distances[row, mine]):
            kept = distances[assigned == column, column]
            assert sizes[column] == most
            assert kept.max() <= distances[row, column]


def test_the_strongest_directions_come_first_and_keep_the_distances():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(50, 6)) * [1, 5, 2, 4, 3, 0.1] + 7).astype(np.float32)
    strongest = strongest_directions(vectors, 6)
    assert (np.diff(strongest.std(axis=0)) <= 0).all()
    assert np.allclose(np.linalg.norm(strongest[0] - strongest[1]), np.linalg.norm(vectors[0] - vectors[1]), rtol=1e-4)
    assert strongest_directions(vectors, 2).shape == (50, 2)
    assert np.allclose(np.abs(strongest_directions(vectors, 2)), np.abs(strongest[:, :2]))


@pytest.mark.parametrize("settings", [{"num_levels": 3}, {"codebook_size": 64}])
def test_the_shape_of_its_sids_cannot_be_set(settings):
    with pytest.raises(ValueError, match="the method clustered has 2 levels and a codebook of its own size"):
        TokenizerConfig.model_validate({"method": "clustered", **settings})
    assert TokenizerConfig.model_validate({"method": "clustered", "num_levels": 2}).levels == 2
