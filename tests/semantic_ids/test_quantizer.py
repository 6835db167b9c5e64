"""The quantiser against a per-item reference, and new items against everything already taken."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.codes import SidError, SidSpace
from semantic_ids.quantizer import ResidualQuantizer, squared_distances
from semantic_ids.trie import SidTrie
from tests.semantic_ids.factories import eighths, is_mapped, random_codes, random_quantizer

# One dimension, two levels: tens, then units.
TENS_AND_UNITS = ResidualQuantizer(
    mean=np.array([100.0], np.float32),
    scale=np.array([2.0], np.float32),
    codebooks=np.array([[[0.0], [10.0], [20.0]], [[-1.0], [0.0], [2.0]]], np.float32),
)


def raw(*standardised: float) -> np.ndarray:
    """Vectors that `TENS_AND_UNITS` standardises to these values."""
    return (np.array(standardised, np.float32)[:, None] * 2) + 100


def trie_of(*sids: tuple[int, ...], space: SidSpace = TENS_AND_UNITS.space) -> SidTrie:
    return SidTrie.build(space, np.array(sids))


def encoded_one_by_one(quantizer: ResidualQuantizer, vectors: np.ndarray) -> list[list[int]]:
    sids = []
    for vector in vectors:
        residual, sid = (vector - quantizer.mean) / quantizer.scale, []
        for codebook in quantizer.codebooks:
            code = min(range(len(codebook)), key=lambda k: float(((residual - codebook[k]) ** 2).sum()))
            sid.append(code)
            residual = residual - codebook[code]
        sids.append(sid)
    return sids


def test_encode_takes_the_nearest_code_and_passes_on_what_is_left():
    """11.5: tens 10 (code 1), 1.5 left, units 2 (code 2). 19: tens 20 (2), -1 left (0). -7: tens 0 (0), -1 (0)."""
    assert TENS_AND_UNITS.encode(raw(11.5, 19, -7)).tolist() == [[1, 2], [2, 0], [0, 0]]


@given(st.integers(1, 5), st.sampled_from([2, 3, 16]), st.integers(1, 6), st.integers(0, 20), st.integers(0, 10_000))
def test_encode_equals_the_reference_item_by_item(
    num_levels: int, codebook_size: int, dimension: int, num_items: int, seed: int
):
    quantizer = random_quantizer(SidSpace(num_levels, codebook_size), dimension, seed)
    vectors = eighths(np.random.default_rng(seed + 1).normal(size=(num_items, dimension)))
    codes = quantizer.encode(vectors, batch=7)
    assert codes.shape == (num_items, num_levels)
    assert codes.tolist() == encoded_one_by_one(quantizer, vectors)


def test_squared_distances_are_those_of_pythagoras():
    """(0,0) and (3,4) are 5 apart, (1,1) and (3,4) √13."""
    distances = squared_distances(np.array([[0, 0], [1, 1]], np.float32), np.array([[3, 4], [1, 1]], np.float32))
    assert distances.tolist() == [[25, 2], [13, 0]]


def test_vectors_of_another_width_are_refused():
    with pytest.raises(SidError, match=r"\(2, 3\); this quantiser takes \(N, 1\)"):
        TENS_AND_UNITS.encode(np.zeros((2, 3), np.float32))


def test_a_new_item_whose_sid_is_free_gets_the_nearest_one():
    assert TENS_AND_UNITS.assign_new(raw(11.5), trie_of((0, 0))).tolist() == [[1, 2]]


def test_a_taken_sid_passes_on_to_the_next_nearest_last_code():
    """11.5 leaves 1.5: units 2, 0 and -1 are 0.5, 1.5 and 2.5 away."""
    assert TENS_AND_UNITS.assign_new(raw(11.5), trie_of((1, 2))).tolist() == [[1, 1]]
    assert TENS_AND_UNITS.assign_new(raw(11.5), trie_of((1, 2), (1, 1))).tolist() == [[1, 0]]


def test_a_full_prefix_passes_on_to_the_next_nearest_one():
    """11.5 under the full 10: 20 is 8.5 away, 0 is 11.5 away; under 20 it leaves -8.5, nearest unit -1."""
    full = [(1, 0), (1, 1), (1, 2)]
    assert TENS_AND_UNITS.assign_new(raw(11.5), trie_of(*full)).tolist() == [[2, 0]]


def test_equal_new_items_get_different_sids_in_their_order():
    new = TENS_AND_UNITS.assign_new(raw(11.5, 11.5, 11.5, 11.5), trie_of((0, 0)))
    assert new.tolist() == [[1, 2], [1, 1], [1, 0], [2, 0]]


def test_a_full_space_raises_and_says_what_to_do():
    everything = [(tens, unit) for tens in range(3) for unit in range(3)]
    with pytest.raises(SidError, match="train a larger codebook"):
        TENS_AND_UNITS.assign_new(raw(11.5), trie_of(*everything))
    with pytest.raises(SidError, match="no SID is free"):
        TENS_AND_UNITS.assign_new(raw(1, 2), trie_of(*everything[1:]))  # the second finds nothing any more


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 12), st.integers(0, 10_000))
def test_new_sids_are_free_and_as_near_as_can_be(num_levels: int, num_taken: int, num_new: int, seed: int):
    space = SidSpace(num_levels, 4)
    quantizer = random_quantizer(space, 3, seed)
    taken = {tuple(sid) for sid in random_codes(space, num_taken, seed).tolist()}
    vectors = eighths(np.random.default_rng(seed + 1).normal(size=(num_new, 3)))
    nearest = encoded_one_by_one(quantizer, vectors)
    trie = trie_of(*taken, space=space)
    changeable = min(2, num_levels)  # the last two codes
    expected: list[tuple[int, ...]] = []
    for vector, sid in zip(vectors, nearest, strict=True):
        free = [
            candidate
            for candidate in np.ndindex(*[4] * num_levels)
            if list(candidate[: num_levels - changeable]) == sid[: num_levels - changeable]
            and candidate not in taken
            and candidate not in expected
        ]
        if not free:
            with pytest.raises(SidError, match="no SID is free"):
                quantizer.assign_new(vectors, trie)
            return
        expected.append(min(free, key=lambda candidate: residuals(quantizer, vector, candidate)[-changeable:]))
    new = [tuple(sid) for sid in quantizer.assign_new(vectors, trie).tolist()]
    assert new == expected
    assert len(set(new)) == len(new)
    assert not taken & set(new)


def residuals(quantizer: ResidualQuantizer, vector: np.ndarray, sid: tuple[int, ...]) -> list[tuple[float, int]]:
    """What is left after each level, squared, with the code that decides between equals."""
    rest, lengths = (vector - quantizer.mean) / quantizer.scale, []
    for level, code in enumerate(sid):
        rest = rest - quantizer.codebooks[level][code]
        lengths.append((float((rest**2).sum()), code))
    return lengths


def test_a_saved_quantiser_encodes_alike(tmp_path: Path):
    TENS_AND_UNITS.save(tmp_path / "quantizer")
    loaded = ResidualQuantizer.load(tmp_path / "quantizer")
    assert is_mapped(loaded.codebooks)
    assert loaded.space == TENS_AND_UNITS.space == SidSpace(2, 3)
    assert loaded.encode(raw(11.5, 19)).tolist() == [[1, 2], [2, 0]]
