"""Maximal marginal relevance: against the definition written out, and by hand."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.diversity import DiversityError, common_prefix_share, cosine_similarity, mmr, relevance_of


def candidates(
    num_candidates: int, num_levels: int, codebook_size: int, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16], npt.NDArray[np.float32]]:
    """Scores, best first, with ties; SIDs, some of them equal; vectors, the first of them nought."""
    generator = np.random.default_rng(seed)
    scores = -np.sort(generator.integers(0, 2 * num_candidates, num_candidates) / 4).astype(np.float32)
    codes = generator.integers(0, codebook_size, (num_candidates, num_levels)).astype(np.uint16)
    vectors = generator.normal(size=(num_candidates, 5)).astype(np.float32)
    vectors[0] = 0
    return scores, codes, vectors


def reference(
    scores: npt.NDArray[np.float32], similarity: npt.NDArray[np.float32], num_items: int, diversity: float
) -> list[int]:
    """The definition, one candidate after the other, in the arithmetic of float32."""
    relevance = np.float32(1 - diversity) * relevance_of(scores)
    chosen: list[int] = []
    while len(chosen) < min(num_items, len(scores)):
        gains = {}
        for place in range(len(scores)):
            if place not in chosen:
                alike = [np.float32(diversity) * similarity[other, place] for other in chosen]
                gains[place] = relevance[place] - max(alike, default=np.float32(0))
        chosen.append(max(gains, key=lambda place: (gains[place], -place)))
    return chosen


CANDIDATES = st.builds(
    candidates, st.integers(1, 25), st.integers(1, 4), st.sampled_from([2, 3, 8]), st.integers(0, 2**32 - 1)
)
DIVERSITIES = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]) | st.floats(0, 1)


@given(CANDIDATES, st.integers(1, 30), DIVERSITIES, st.booleans())
def test_the_order_is_that_of_the_definition(
    case: tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16], npt.NDArray[np.float32]],
    num_items: int,
    diversity: float,
    by_vectors: bool,
):
    scores, codes, vectors = case
    similarity = cosine_similarity(vectors) if by_vectors else common_prefix_share(codes)
    order = mmr(scores, codes, num_items, diversity, vectors=vectors if by_vectors else None)
    assert order.tolist() == reference(scores, similarity, num_items, diversity)


@given(CANDIDATES, st.integers(1, 30), DIVERSITIES)
def test_as_many_as_asked_for_are_chosen_and_none_twice_and_the_best_is_first(
    case: tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16], npt.NDArray[np.float32]],
    num_items: int,
    diversity: float,
):
    scores, codes, _ = case
    order = mmr(scores, codes, num_items, diversity).tolist()
    assert len(set(order)) == len(order) == min(num_items, len(scores))
    assert set(order) <= set(range(len(scores)))
    assert order[0] == 0


@given(CANDIDATES, st.integers(1, 30))
def test_no_diversity_is_the_order_as_given(
    case: tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16], npt.NDArray[np.float32]], num_items: int
):
    scores, codes, vectors = case
    expected = list(range(min(num_items, len(scores))))
    assert mmr(scores, codes, num_items, 0).tolist() == expected
    assert mmr(scores, codes, num_items, 0.0, vectors=vectors).tolist() == expected


def test_the_first_items_are_less_alike_the_more_diversity_is_asked_for():
    """Of candidates whose SIDs come in order, so that the best are all alike."""
    scores, codes, _ = candidates(200, 3, 4, 1)
    codes = codes[np.lexsort(codes.T[::-1])]
    alike = []
    for diversity in (0.0, 0.2, 0.5, 0.8, 1.0):
        order = mmr(scores, codes, 10, diversity)
        alike.append(common_prefix_share(codes[order])[np.triu_indices(10, 1)].mean())
    assert alike == sorted(alike, reverse=True)
    assert alike[-1] < alike[0] / 2


def test_a_choice_by_hand():
    """Relevance 1, 0.9, 0.5, 0 and diversity 1/2; the second has the first's SID, the third shares one code of two.

    First 0. Then 1: 0.45 - 0.5 = -0.05, 2: 0.25 - 0.25 = 0, 3: 0 - 0 = 0, of which the earlier. Then 1: -0.05, 3: 0.
    """
    scores = np.array([-1.0, -1.1, -1.5, -2.0], np.float32)
    codes = np.array([[4, 2], [4, 2], [4, 7], [5, 2]])
    assert mmr(scores, codes, 4, 0.5).tolist() == [0, 2, 3, 1]
    assert mmr(scores, codes, 2, 0.5).tolist() == [0, 2]
    assert mmr(scores, codes, 4, 0.1).tolist() == [0, 1, 2, 3]


def test_the_common_prefix_ends_at_the_first_code_that_differs():
    codes = np.array([[1, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 4], [9, 2, 3, 4]], np.uint16)
    assert common_prefix_share(codes)[0].tolist() == [1.0, 0.5, 1.0, 0.0]


def test_vectors_in_opposite_directions_are_as_different_as_orthogonal_ones():
    vectors = np.array([[1, 0], [2, 0], [0, 3], [-1, 0], [0, 0], [1, 1]])
    assert cosine_similarity(vectors)[0] == pytest.approx([1, 1, 0, 0, 0, 0.5**0.5])


def test_equal_scores_are_equally_relevant():
    assert relevance_of(np.full(3, -4.0)).tolist() == [1, 1, 1]
    assert mmr(np.full(3, -4.0), np.array([[0, 0], [0, 0], [1, 0]]), 3, 0.5).tolist() == [0, 2, 1]


def test_nothing_to_choose_from_is_nothing_chosen():
    assert mmr(np.empty(0, np.float32), np.empty((0, 3), np.uint16), 5, 0.5).tolist() == []


@pytest.mark.parametrize("diversity", [-0.1, 1.1, float("nan")])
def test_a_diversity_beyond_nought_to_one_is_refused(diversity: float):
    with pytest.raises(DiversityError, match="diversity is 0 to 1"):
        mmr(np.zeros(2), np.zeros((2, 3), np.uint16), 1, diversity)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(DiversityError, match="1 of 2 scores, 3 SIDs and no vectors"):
        mmr(np.zeros(2), np.zeros((3, 3), np.uint16), 1, 0.5)
    with pytest.raises(DiversityError, match="1 of 2 scores, 2 SIDs and 1 vectors"):
        mmr(np.zeros(2), np.zeros((2, 3), np.uint16), 1, 0.5, vectors=np.zeros((1, 4)))
    with pytest.raises(DiversityError, match="0 of 2 scores"):
        mmr(np.zeros(2), np.zeros((2, 3), np.uint16), 0, 0.5)
