"""Codes under competition: exact or balanced as promised, and nobody moved needlessly."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.codes import Codes
from semantic_ids.quantizer import ResidualQuantizer
from training.tokenizer.assignment import (
    assign_within_sizes,
    balanced_kmeans,
    last_distances,
    make_unique,
    sinkhorn,
)
from training.tokenizer.methods import Repair

Vectors = npt.NDArray[np.float32]

REPAIRS: tuple[Repair, ...] = ("hungarian", "sinkhorn", "random")
EPSILON, ITERATIONS = 0.003, 50


def flat_quantizer(codebook: list[float], prefix_codes: int = 0) -> ResidualQuantizer:
    """One dimension, nothing standardised; with `prefix_codes`, a first level of zeros before the codebook."""
    levels = [np.zeros(len(codebook))] * (prefix_codes > 0) + [np.array(codebook)]
    codebooks = np.stack(levels)[..., None].astype(np.float32)
    return ResidualQuantizer(np.zeros(1, np.float32), np.ones(1, np.float32), codebooks)


def column(*values: float) -> Vectors:
    return np.array(values, np.float32)[:, None]


def crowded_catalogue(seed: int = 0) -> tuple[ResidualQuantizer, Vectors]:
    """Three levels of eight codes. Under 14 prefixes six items crowd around one or two last codes, under 6 two do not.

    No prefix holds more than K items; the levels' scales are so far apart that nobody is drawn to another prefix.
    """
    rng = np.random.default_rng(seed)
    codebooks = np.stack([scale * rng.normal(size=(8, 4)) for scale in (10_000, 100, 1)])
    prefixes = rng.permutation(64)[:20]
    codes = [(prefix // 8, prefix % 8, last) for prefix in prefixes[:14] for last in rng.choice([2, 5], 6)]
    codes += [(prefix // 8, prefix % 8, last) for prefix in prefixes[14:] for last in (1, 6)]
    vectors = sum(codebooks[level][np.array(codes)[:, level]] for level in range(3))
    noisy = (vectors + 0.1 * rng.normal(size=(len(codes), 4))).astype(np.float32)
    return ResidualQuantizer(np.zeros(4, np.float32), np.ones(4, np.float32), codebooks.astype(np.float32)), noisy


def holders(codes: Codes) -> npt.NDArray[np.int64]:
    """How many items have each item's SID, (N,)."""
    _, sid, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return np.asarray(counts[sid.reshape(-1)])


# -- Sinkhorn


def test_sinkhorn_sends_those_away_who_lose_least():
    """Four items all nearest to code 0, farther from code 1 by 1, 2, 3 and 4: two go, and it is the first two.

    The published 50 rounds end before the plan is balanced; with ten times as many it is.
    """
    distances = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]])
    assert sinkhorn(distances, EPSILON, 10 * ITERATIONS).tolist() == [1, 1, 0, 0]
    assert sinkhorn(distances, EPSILON, ITERATIONS).tolist() == [1, 0, 0, 0]


def test_sinkhorn_is_the_nearest_code_where_that_is_balanced():
    home = torch.arange(24) % 6
    distances = torch.full((24, 6), 100.0).scatter(1, home[:, None], 0.0)
    assert (sinkhorn(distances, EPSILON, ITERATIONS) == home).all()


@given(st.integers(0, 2**31), st.sampled_from([1.0, 1e-12, 1e12, 1e35]), st.sampled_from([0.0, 1e3]))
def test_sinkhorn_spreads_items_that_distances_tell_apart(seed, scale, offset):
    """64 items, 8 codes, distances that all have the same distribution: no code is left out or has half of the items.

    Neither the distances' scale nor their offset counts.
    """
    drawn = torch.rand((64, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shares = torch.bincount(sinkhorn((drawn + offset) * scale, EPSILON, ITERATIONS), minlength=8)
    assert shares.sum() == 64
    assert shares.min() >= 1
    assert shares.max() <= 24


def test_items_that_distances_do_not_tell_apart_get_one_code():
    """The plan is spread, but each of its rows is the same; so Sinkhorn separates no identical listings."""
    assert len(set(sinkhorn(torch.full((16, 4), 3.0), EPSILON, ITERATIONS).tolist())) == 1
    twins = torch.rand((1, 8), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    assert len(set(sinkhorn(twins, EPSILON, ITERATIONS).tolist())) == 1


@pytest.mark.parametrize(
    "distances", [torch.rand(1, 8), torch.rand(8, 1), torch.zeros(3, 3), torch.tensor([[0.0, 1e38]] * 3)]
)
def test_sinkhorn_answers_at_the_edges(distances):
    codes = sinkhorn(distances, EPSILON, ITERATIONS)
    assert codes.shape == (len(distances),)
    assert ((codes >= 0) & (codes < distances.shape[1])).all()


def test_two_items_with_different_favourites_get_them():
    assert sinkhorn(torch.tensor([[5.0, 1.0], [1.0, 5.0]]), EPSILON, ITERATIONS).tolist() == [1, 0]


# -- assignment within sizes


@given(
    st.integers(1, 3).flatmap(
        lambda num_columns: st.tuples(
            st.lists(
                st.lists(st.integers(-50, 50), min_size=num_columns, max_size=num_columns), min_size=1, max_size=5
            ),
            st.integers(0, 2),
            st.integers(0, 3),
        )
    )
)
def test_assignment_within_sizes_is_the_cheapest_of_all(case):
    rows, min_size, more = case
    costs = np.array(rows, np.float64)
    num_rows, num_columns = costs.shape
    max_size = min_size + more

    def sizes(columns: tuple[int, ...]) -> npt.NDArray[np.int64]:
        return np.bincount(columns, minlength=num_columns)

    allowed = [
        columns
        for columns in itertools.product(range(num_columns), repeat=num_rows)
        if (sizes(columns) >= min_size).all() and (sizes(columns) <= max_size).all()
    ]
    if not allowed:
        with pytest.raises(ValueError, match="rows cannot fill"):
            assign_within_sizes(costs, min_size, max_size)
        return
    chosen = tuple(assign_within_sizes(costs, min_size, max_size).tolist())
    assert chosen in allowed
    every = np.arange(num_rows)
    assert costs[every, chosen].sum() == min(costs[every, columns].sum() for columns in allowed)


@pytest.mark.parametrize(("min_size", "max_size"), [(0, 1), (3, 9)])
def test_sizes_that_cannot_be_kept_are_refused_with_their_numbers(min_size, max_size):
    with pytest.raises(ValueError, match=f"5 rows cannot fill 2 columns with {min_size} to {max_size} each"):
        assign_within_sizes(np.zeros((5, 2)), min_size, max_size)


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 6), st.floats(-8, 8))
def test_sizes_are_kept_at_every_scale_of_costs(seed, num_rows, num_columns, exponent):
    """Places that must be filled are preferred by a margin that grows with the costs."""
    costs = np.random.default_rng(seed).normal(size=(num_rows, num_columns)) * 10**exponent
    low, high = num_rows // num_columns, -(-num_rows // num_columns)
    sizes = np.bincount(assign_within_sizes(costs, low, high), minlength=num_columns)
    assert sizes.min() >= low
    assert sizes.max() <= high


# -- balanced k-means


def test_balanced_clusters_keep_their_sizes_where_the_points_are_uneven():
    """45 points in one heap and 5 far away, in 5 clusters of 8 to 12."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(45, 3)), 100 + rng.normal(size=(5, 3))]).astype(np.float32)
    clusters = balanced_kmeans(points, 5, min_size=8, max_size=12, seed=0)
    sizes = np.bincount(clusters.labels, minlength=5)
    assert sizes.sum() == 50
    assert sizes.min() >= 8
    assert sizes.max() <= 12


def test_centres_are_the_means_of_their_clusters():
    points = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    clusters = balanced_kmeans(points, 4, min_size=5, max_size=20, seed=0, iterations=100)
    means = np.stack([points[clusters.labels == label].mean(axis=0) for label in range(4)])
    assert clusters.centres == pytest.approx(means, abs=1e-6)
    assert clusters.centres.dtype == np.float32


def test_well_separated_clusters_are_found():
    rng = np.random.default_rng(0)
    home = rng.permutation(np.repeat(np.arange(4), 10))
    points = (np.eye(4)[home] * 50 + rng.normal(size=(40, 4))).astype(np.float32)
    labels = balanced_kmeans(points, 4, min_size=5, max_size=20, seed=0).labels
    assert len({(one, other) for one, other in zip(home.tolist(), labels.tolist(), strict=True)}) == 4


@pytest.mark.parametrize("num_distinct", [1, 3])
def test_balanced_clusters_of_points_that_repeat(num_distinct):
    points = np.repeat(np.arange(num_distinct), 12 // num_distinct)[:, None].astype(np.float32)
    clusters = balanced_kmeans(points, 6, min_size=2, max_size=2, seed=0)
    assert np.bincount(clusters.labels, minlength=6).tolist() == [2] * 6
    assert np.isfinite(clusters.centres).all()


def test_a_cluster_without_points_keeps_its_centre():
    """Three distinct points leave one of five clusters empty; its centre stays among them, far from the origin."""
    points = 50 + np.tile(np.arange(3), 2)[:, None].astype(np.float32)
    clusters = balanced_kmeans(points, 5, min_size=0, max_size=2, seed=0)
    assert np.bincount(clusters.labels, minlength=5).min() == 0
    assert (clusters.centres >= 50).all()


def test_balanced_clusters_follow_from_points_and_seed():
    points = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    one, two, other = (balanced_kmeans(points, 6, min_size=4, max_size=20, seed=seed) for seed in (0, 0, 1))
    assert (one.labels == two.labels).all()
    assert (one.centres == two.centres).all()
    assert (one.centres != other.centres).any()


# -- unique SIDs


def test_no_repair_changes_nothing():
    quantizer, vectors = crowded_catalogue()
    nearest = quantizer.encode(vectors)
    assert (make_unique("none", quantizer, vectors, nearest, seed=0) == nearest).all()


@pytest.mark.parametrize("repair", REPAIRS)
def test_a_repair_moves_last_codes_only_and_only_under_prefixes_with_a_collision(repair):
    quantizer, vectors = crowded_catalogue()
    nearest = quantizer.encode(vectors)
    given_codes = nearest.copy()
    codes = make_unique(repair, quantizer, vectors, nearest, seed=0)
    crowded = {tuple(prefix) for prefix in nearest[holders(nearest) > 1][:, :-1].tolist()}
    moved = (codes != nearest).any(axis=1)
    assert moved.any()
    assert (codes[:, :-1] == nearest[:, :-1]).all()
    assert {tuple(prefix) for prefix in nearest[moved][:, :-1].tolist()} <= crowded
    assert crowded < {tuple(prefix) for prefix in nearest[:, :-1].tolist()}  # some prefix had to be left alone
    assert (nearest == given_codes).all()
    assert codes.dtype == nearest.dtype


@pytest.mark.parametrize("repair", ["hungarian", "random"])
def test_a_repair_leaves_no_shared_sid_where_every_prefix_has_room(repair):
    quantizer, vectors = crowded_catalogue()
    nearest = quantizer.encode(vectors)
    assert holders(nearest).max() > 1
    assert np.unique(nearest[:, :-1], axis=0, return_counts=True)[1].max() <= 8
    assert (holders(make_unique(repair, quantizer, vectors, nearest, seed=0)) == 1).all()


def test_the_published_rounds_resolve_most_collisions_of_items_that_differ():
    quantizer, vectors = crowded_catalogue()
    nearest = quantizer.encode(vectors)
    before, after = (
        int((holders(codes) > 1).sum())
        for codes in (nearest, make_unique("sinkhorn", quantizer, vectors, nearest, seed=0))
    )
    assert after < 0.5 * before


def test_the_published_rounds_stop_when_nothing_collides():
    """Two items want code 0; the plan sends the one away that loses less. One round, and it is done."""
    quantizer, vectors = flat_quantizer([0.0, 1.0], prefix_codes=1), column(0.0, 0.4)
    nearest = quantizer.encode(vectors)
    assert nearest[:, 1].tolist() == [0, 0]
    assert make_unique("sinkhorn", quantizer, vectors, nearest, seed=0)[:, 1].tolist() == [0, 1]


def test_the_published_rounds_leave_identical_items_together():
    quantizer, vectors = flat_quantizer([0.0, 1.0, 2.0], prefix_codes=1), column(0.3, 0.3)
    codes = make_unique("sinkhorn", quantizer, vectors, quantizer.encode(vectors), seed=0)
    assert holders(codes).tolist() == [2, 2]


def test_of_a_shared_sid_the_random_repair_moves_all_items_but_one():
    quantizer = flat_quantizer([0.0, 1.0, 2.0, 50.0, 60.0], prefix_codes=1)
    vectors = column(0.0, 0.1, 0.2, 1.0, 2.0)
    nearest = quantizer.encode(vectors)
    assert nearest[:, 1].tolist() == [0, 0, 0, 1, 2]
    outcomes = {
        tuple(make_unique("random", quantizer, vectors, nearest, seed=seed)[:, 1].tolist()) for seed in range(100)
    }
    for codes in outcomes:
        assert sorted(codes) == [0, 1, 2, 3, 4]
        assert codes[3:] == (1, 2)
    assert len(outcomes) == 6  # three keepers, and the free codes 3 and 4 in two orders


@pytest.mark.parametrize("num_items", [5, 7, 8, 9, 21])
def test_a_prefix_with_more_items_than_codes_is_shared_evenly(num_items):
    """All items are nearest to code 0: each of 4 codes still gets ⌊n/4⌋ or ⌈n/4⌉ of them."""
    quantizer = flat_quantizer([0.0, 50.0, 100.0, 1000.0])
    vectors = column(*np.linspace(0, 1, num_items))
    codes = make_unique("hungarian", quantizer, vectors, quantizer.encode(vectors), seed=0)
    shares = np.bincount(codes[:, 0], minlength=4)
    assert shares.sum() == num_items
    assert shares.max() - shares.min() <= 1


def test_the_random_repair_of_a_full_prefix_uses_every_code_once_and_leaves_the_rest_where_they_were():
    quantizer, vectors = flat_quantizer([0.0, 50.0, 100.0]), column(*np.linspace(0, 1, 7))
    codes = make_unique("random", quantizer, vectors, quantizer.encode(vectors), seed=0)
    assert np.bincount(codes[:, 0]).tolist() == [5, 1, 1]


def test_the_published_rounds_of_a_full_prefix_use_every_code():
    quantizer, vectors = flat_quantizer([0.0, 1.0, 2.0]), column(*np.linspace(0, 0.4, 7))
    codes = make_unique("sinkhorn", quantizer, vectors, quantizer.encode(vectors), seed=0)
    assert set(codes[:, 0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("repair", ["hungarian", "sinkhorn"])
def test_a_repair_by_distances_gives_each_item_the_same_sid_in_any_order_of_items(repair):
    quantizer, vectors = crowded_catalogue()
    nearest = quantizer.encode(vectors)
    plain = make_unique(repair, quantizer, vectors, nearest, seed=0)
    order = np.random.default_rng(1).permutation(len(vectors))
    shuffled = make_unique(repair, quantizer, vectors[order], nearest[order], seed=5)
    assert (shuffled == plain[order]).all()


def test_the_random_repair_follows_from_its_seed():
    quantizer, vectors = crowded_catalogue()
    nearest = quantizer.encode(vectors)
    one, two, other = (make_unique("random", quantizer, vectors, nearest, seed=seed) for seed in (0, 0, 1))
    assert (one == two).all()
    assert (one != other).any()


@given(
    st.integers(2, 5).flatmap(
        lambda size: st.tuples(
            st.lists(st.integers(-20, 20), min_size=size, max_size=size, unique=True),
            st.lists(st.integers(-20, 20), min_size=2, max_size=size),
        )
    )
)
def test_repair_is_the_cheapest_of_all_distinct_assignments(codebook_and_items):
    codebook, values = codebook_and_items
    quantizer, vectors = flat_quantizer([float(code) for code in codebook], prefix_codes=1), column(*values)
    nearest = quantizer.encode(vectors)
    repaired = make_unique("hungarian", quantizer, vectors, nearest, seed=0)

    def cost(codes: tuple[int, ...]) -> int:
        return sum((value - codebook[code]) ** 2 for value, code in zip(values, codes, strict=True))

    chosen = tuple(repaired[:, -1].tolist())
    assert len(set(chosen)) == len(values)
    assert cost(chosen) == min(map(cost, itertools.permutations(range(len(codebook)), len(values))))


def test_repair_on_a_hand_made_prefix():
    """Four items for the codes 0, 1, 10 and 30, so one gets 30. The items at 0 and 0.4 both want 0.

    The one at 0.4 to 30 costs 29.6² = 876. If everybody moves up by one it is 0.6² + 9² + 20² = 481: the optimum,
    though only one item then keeps its nearest code.
    """
    quantizer = flat_quantizer([0.0, 1.0, 10.0, 30.0], prefix_codes=1)
    vectors = column(0.0, 0.4, 1.0, 10.0)
    nearest = quantizer.encode(vectors)
    assert nearest[:, 1].tolist() == [0, 0, 1, 2]
    assert make_unique("hungarian", quantizer, vectors, nearest, seed=0)[:, 1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("prefix_codes", [0, 1])
def test_a_prefix_without_a_collision_keeps_its_nearest_codes(repair, prefix_codes):
    quantizer = flat_quantizer([0.0, 1.0, 10.0], prefix_codes)
    vectors = column(0.1, 0.9, 9.0)
    nearest = quantizer.encode(vectors)
    assert (make_unique(repair, quantizer, vectors, nearest, seed=0) == nearest).all()


def test_last_distances_by_hand():
    """The prefix takes 10 off the item at 12; what is left, 2, is 4, 1 and 64 from 0, 1 and 10, squared."""
    codebooks = np.array([[[0.0], [10.0], [20.0]], [[0.0], [1.0], [10.0]]], np.float32)
    quantizer = ResidualQuantizer(np.zeros(1, np.float32), np.ones(1, np.float32), codebooks)
    codes = np.array([[0, 0], [1, 1]], np.uint16)
    distances = last_distances(quantizer, column(0.0, 12.0), codes, np.array([1]))
    assert distances.tolist() == [pytest.approx([4.0, 1.0, 64.0])]


@pytest.mark.parametrize("repair", ["hungarian", "random"])
def test_what_a_full_prefix_cannot_hold_goes_to_the_nearest_prefix_with_room(repair: Repair):
    """Prefixes at 0, 10 and 100, each with 3 last codes. Six items want the prefix at 0, which holds three of them.

    The other three go to the prefix at 10, not to the one at 100, whose own item stays where it was.
    """
    codebooks = np.array([[[0.0], [10.0], [100.0]], [[0.0], [1.0], [1.0]]], np.float32)
    quantizer = ResidualQuantizer(np.zeros(1, np.float32), np.ones(1, np.float32), codebooks)
    vectors = np.array([[0.0], [0.1], [0.9], [1.2], [2.0], [2.1], [100.0]], np.float32)
    nearest = quantizer.encode(vectors)
    assert nearest[:, 0].tolist() == [0, 0, 0, 0, 0, 0, 2]
    unique = make_unique(repair, quantizer, vectors, nearest, seed=0)
    assert len(np.unique(unique, axis=0)) == len(vectors)
    assert sorted(unique[:, 0].tolist()) == [0, 0, 0, 1, 1, 1, 2]
    assert unique[6].tolist() == nearest[6].tolist()
