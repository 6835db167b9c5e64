"""Codebooks from vectors, level by level, and codebooks from codes that somebody else gave."""

import numpy as np
import numpy.typing as npt
import pytest

from semantic_ids.codes import SidSpace
from semantic_ids.quantizer import ResidualQuantizer, squared_distances
from training.tokenizer.kmeans import codebooks_of_codes, residual_codebooks
from training.tokenizer.methods import Initialisation
from training.tokenizer.standardised import Standardised

Vectors = npt.NDArray[np.float32]
BOTH: tuple[Initialisation, ...] = ("kmeans++", "constrained")


def codebooks_of(latents: Vectors, space: SidSpace, initialisation: Initialisation = "kmeans++", seed: int = 0):
    return residual_codebooks(latents, space, initialisation, restarts=2, threads=1, seed=seed)


def encode(latents: Vectors, codebooks: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    width = latents.shape[1]
    return ResidualQuantizer(np.zeros(width, np.float32), np.ones(width, np.float32), codebooks).encode(latents)


def normal(*shape: int, seed: int = 0) -> Vectors:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("initialisation", BOTH)
def test_each_level_quantises_what_the_levels_before_left_over(initialisation):
    """Two far pairs of two near points: the first level finds the pairs, the second tells a pair's points apart."""
    latents = np.array([[-10.5], [-9.5], [9.5], [10.5]], np.float32)
    codebooks = codebooks_of(latents, SidSpace(2, 2), initialisation)
    assert sorted(codebooks[0].ravel().tolist()) == [-10, 10]
    assert sorted(codebooks[1].ravel().tolist()) == [-0.5, 0.5]


@pytest.mark.parametrize("initialisation", BOTH)
def test_every_further_level_describes_the_latents_better(initialisation):
    latents = normal(300, 5)
    codebooks = codebooks_of(latents, SidSpace(3, 8), initialisation)
    residual, errors = latents, []
    for level, codes in enumerate(encode(latents, codebooks).T):
        residual = residual - codebooks[level][codes]
        errors.append(float((residual**2).mean()))
    assert errors[0] < 0.7
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("initialisation", BOTH)
@pytest.mark.parametrize("num_distinct", [1, 3, 8])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_codes_beyond_the_distinct_residuals_repeat_the_first_and_are_never_nearest(
    initialisation, num_distinct, scale
):
    latents = np.repeat(scale * normal(num_distinct, 4), 5, axis=0)
    codebooks = codebooks_of(latents, SidSpace(2, 16), initialisation)
    assert np.isfinite(codebooks).all()
    assert (codebooks[0, num_distinct:] == codebooks[0, 0]).all()
    codes = encode(latents, codebooks)
    assert codes[:, 0].max() < num_distinct
    assert squared_distances(latents, codebooks[0]).argmin(axis=1).max() < num_distinct


def test_enough_codes_for_every_distinct_point_describe_all_of_them():
    latents = np.repeat(normal(6, 4), 5, axis=0)
    codebooks = codebooks_of(latents, SidSpace(1, 16))
    codes = encode(latents, codebooks)
    assert codebooks[0][codes[:, 0]] == pytest.approx(latents, abs=1e-5)


def test_a_constrained_start_gives_every_code_its_share_of_an_uneven_catalogue():
    """90 % of the points are one heap, which plain k-means leaves to few codes: here no code starts without items."""
    heap, others = 0.1 * normal(288, 3), 100 * normal(32, 3, seed=1)
    latents = np.concatenate([heap, others])

    def in_heap(initialisation: Initialisation) -> int:
        codebooks = codebooks_of(latents, SidSpace(1, 8), initialisation)
        return len(np.unique(encode(heap, codebooks)))

    assert in_heap("constrained") > in_heap("kmeans++")


@pytest.mark.parametrize("initialisation", BOTH)
def test_codebooks_follow_from_latents_and_seed(initialisation):
    latents, space = normal(100, 3), SidSpace(2, 4)
    one, two, other = (codebooks_of(latents, space, initialisation, seed=seed) for seed in (0, 0, 1))
    assert (one == two).all()
    assert (one != other).any()


# -- codebooks of given codes


def test_the_codebooks_of_given_codes_are_mean_residuals_by_hand():
    """First level: code 0 has 1 and 3, so 2; code 2 has 10. They leave -1, 1, 0. Second: code 1 has -1 and 0, so -½."""
    items = Standardised(np.array([[1], [3], [10]], np.float32), np.zeros(1, np.float32), np.ones(1, np.float32))
    codes = np.array([[0, 1], [0, 0], [2, 1]], np.uint16)
    codebooks = codebooks_of_codes(items, codes, SidSpace(2, 3))
    assert codebooks[0, [0, 2], 0].tolist() == [2, 10]
    assert codebooks[1, [0, 1], 0].tolist() == [1, -0.5]


@pytest.mark.parametrize("step", [3e-1, 1e-3])
def test_given_codes_are_what_their_codebooks_encode_to_where_items_are_well_separated(step):
    """Ten pairs of near twins: the pair is the first code, which twin the second; unused codes lie among the used ones.

    However near the twins are to each other (of what the first level leaves, `step` is all there is), unused codes
    must not lie so far off that rounding blurs the used ones.
    """
    vectors = np.repeat(normal(10, 64), 2, axis=0)
    vectors[1::2, 0] += step
    codes = np.stack([np.arange(20) // 2 + 3, np.arange(20) % 2 * 4 + 1], axis=1).astype(np.uint16)
    items = Standardised.of(vectors)
    quantizer = ResidualQuantizer(items.mean, items.scale, codebooks_of_codes(items, codes, SidSpace(2, 16)))
    assert (quantizer.encode(vectors) == codes).all()


def test_a_code_that_no_item_has_is_nearest_to_nothing_like_the_items():
    vectors = normal(200, 8)
    codes = np.random.default_rng(1).choice([1, 4, 6], (200, 3)).astype(np.uint16)
    items = Standardised.of(vectors)
    quantizer = ResidualQuantizer(items.mean, items.scale, codebooks_of_codes(items, codes, SidSpace(3, 8)))
    assert set(np.unique(quantizer.encode(3 * normal(1000, 8, seed=2)))) == {1, 4, 6}


def test_given_codes_of_identical_items_still_have_finite_codebooks():
    items = Standardised.of(np.ones((4, 3), np.float32))
    codebooks = codebooks_of_codes(items, np.array([[0, 1]] * 4, np.uint16), SidSpace(2, 4))
    quantizer = ResidualQuantizer(items.mean, items.scale, codebooks)
    assert quantizer.encode(np.ones((1, 3), np.float32)).tolist() == [[0, 1]]
