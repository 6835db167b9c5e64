"""The graph of items that users touched together, vectors mixed along it, and partners drawn from it."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from training.sequences import Sequences
from training.tokenizer.cooccurrence import Partners, hop_weights, item_graph, propagate
from training.tokenizer.standardised import Standardised

Vectors = npt.NDArray[np.float32]
GRAPH = sparse.csr_array(np.array([[0, 2, 0, 0], [2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], np.float64))
"""A path 0 - 1 - 2 with counts 2 and 1; nobody touched 3."""


def as_they_are(vectors: Vectors) -> Standardised:
    width = vectors.shape[1]
    return Standardised(vectors, np.zeros(width, np.float32), np.ones(width, np.float32))


def normal(*shape: int, seed: int = 0) -> Vectors:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def walks(num_items: int, num_users: int, seed: int = 0) -> Sequences:
    """Users who touch popular items more: degrees differ a hundredfold. The last tenth of the items nobody touches."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, num_items + 1)
    share[-(num_items // 10) :] = 0
    return Sequences.of([rng.choice(num_items, 12, p=share / share.sum()).tolist() for _ in range(num_users)])


# -- the graph


def test_counts_by_hand():
    """Within 2 events: 0-1, 1-2, 2-0 at distance 1 and 0-2, 1-0 at distance 2, of the first user; 3-1 of the second."""
    graph = item_graph(Sequences.of([[0, 1, 2, 0], [3, 1], [4]]), 5, window=2)
    counts = np.zeros((5, 5))
    for one, other, count in ((0, 1, 2), (1, 2, 1), (0, 2, 2), (1, 3, 1)):
        counts[one, other] = counts[other, one] = count
    assert (graph.toarray() == counts).all()


def test_an_item_touched_again_is_no_neighbour_of_itself():
    graph = item_graph(Sequences.of([[0, 0, 1, 0]]), 2, window=5)
    assert graph.toarray().tolist() == [[0, 3], [3, 0]]
    assert graph.nnz == 2


@pytest.mark.parametrize("sequences", [[], [[]], [[0], [1]], [[2, 2, 2]]])
def test_users_with_nothing_in_common_make_no_edges(sequences):
    assert item_graph(Sequences.of(sequences), 3, window=5).nnz == 0


def test_events_farther_apart_than_the_window_are_not_together():
    graph = item_graph(Sequences.of([[0, 2, 2, 1]]), 3, window=2)
    assert graph[0, 1] == 0
    assert item_graph(Sequences.of([[0, 2, 2, 1]]), 3, window=3)[0, 1] == 1


# -- propagation


def test_hop_weights_by_hand():
    """α = ½: ½, ¼, ⅛ in proportion 4 : 2 : 1. α = 1: the item's own vector alone."""
    assert hop_weights(0.5, 2) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert hop_weights(1.0, 2).tolist() == [1, 0, 0]


def test_one_hop_on_a_path_by_hand(tmp_path):
    """x = 3, 0, -3 on the path 0 - 1 - 2 with counts 2 and 1; with self-loops Â has rows (1, 2, 0)/3, (2, 1, 1)/4 and
    (0, 1, 1)/2, so Âx = 1, ¾, -3/2. α = ½: H¹ = ½Âx + ½x = 2, ⅜, -9/4. β = ⅔, ⅓: ⅔x + ⅓H¹ = 8/3, 1/8, -11/4.
    Then zero mean and unit variance over these three.
    """
    mixed = propagate(
        as_they_are(np.array([[3], [0], [-3], [7]], np.float32)), GRAPH, alpha=0.5, hops=1, path=tmp_path / "mixed"
    )
    by_hand = np.array([8 / 3, 1 / 8, -11 / 4])
    assert mixed[:3, 0] == pytest.approx((by_hand - by_hand.mean()) / by_hand.std(), abs=1e-6)


def test_two_hops_on_a_path_by_hand(tmp_path):
    """H¹ = 2, ⅜, -9/4 as with one hop; ÂH¹ = (2 + ¾)/3, (4 + ⅜ - 9/4)/4, (⅜ - 9/4)/2 = 11/12, 17/32, -15/16.

    H² = ½ÂH¹ + ½x = 47/24, 17/64, -63/32, and β = 4/7, 2/7, 1/7.
    """
    mixed = propagate(
        as_they_are(np.array([[3], [0], [-3], [7]], np.float32)), GRAPH, alpha=0.5, hops=2, path=tmp_path / "mixed"
    )
    x, one, two = np.array([3, 0, -3]), np.array([2, 3 / 8, -9 / 4]), np.array([47 / 24, 17 / 64, -63 / 32])
    by_hand = (4 * x + 2 * one + two) / 7
    assert mixed[:3, 0] == pytest.approx((by_hand - by_hand.mean()) / by_hand.std(), abs=1e-6)


def test_an_item_without_an_edge_keeps_its_vector_to_the_bit(tmp_path):
    items = Standardised.of(normal(50, 40))
    graph = item_graph(walks(50, 30), 50, window=3)
    mixed = propagate(items, graph, alpha=0.5, hops=2, path=tmp_path / "mixed")
    isolated = np.diff(graph.indptr) == 0
    assert isolated.sum() >= 5
    assert (mixed[isolated] == items.rows(slice(None))[isolated]).all()
    assert (mixed[~isolated] != items.rows(slice(None))[~isolated]).any(axis=1).all()


def test_without_any_edge_nothing_is_mixed(tmp_path):
    items = Standardised.of(normal(20, 3))
    nothing = item_graph(Sequences.of([]), 20, window=5)
    assert (propagate(items, nothing, alpha=0.5, hops=2, path=tmp_path / "mixed") == items.rows(slice(None))).all()


def test_mixed_vectors_of_connected_items_have_zero_mean_and_unit_variance(tmp_path):
    graph = item_graph(walks(200, 150), 200, window=3)
    mixed = propagate(Standardised.of(normal(200, 5)), graph, alpha=0.3, hops=3, path=tmp_path / "mixed")
    connected = mixed[np.diff(graph.indptr) > 0]
    assert connected.mean(axis=0) == pytest.approx(0, abs=1e-5)
    assert connected.std(axis=0) == pytest.approx(1, abs=1e-5)


def test_an_own_share_of_one_mixes_nothing(tmp_path):
    """α = 1: of connected items only their standardisation is anew."""
    vectors = np.concatenate([normal(30, 3), -normal(30, 3)])
    ring = item_graph(Sequences.of([[*range(60), 0]]), 60, window=1)
    mixed = propagate(Standardised.of(vectors), ring, alpha=1.0, hops=2, path=tmp_path / "mixed")
    assert mixed == pytest.approx(Standardised.of(vectors).rows(slice(None)), abs=1e-5)


def test_items_of_one_community_move_towards_each_other(tmp_path):
    community = np.arange(60) % 3
    rng = np.random.default_rng(0)
    train = Sequences.of([rng.choice(np.flatnonzero(community == user % 3), 10).tolist() for user in range(60)])
    items = Standardised.of(normal(3, 16, seed=1)[community] + normal(60, 16))
    mixed = propagate(items, item_graph(train, 60, window=5), alpha=0.5, hops=2, path=tmp_path / "mixed")

    def within_over_all(vectors: Vectors) -> float:
        within = np.mean([vectors[community == label].var(axis=0).sum() for label in range(3)])
        return float(within / vectors.var(axis=0).sum())

    assert within_over_all(mixed) < 0.9 * within_over_all(items.rows(slice(None)))


def test_where_neighbours_agree_an_items_degree_leaves_no_trace_in_its_norm(tmp_path):
    """All items of a component have one vector. Rows that sum to 1 keep it whatever the degree; the paper's
    normalisation by both degrees gives a hub more than a leaf.
    """
    component = np.arange(100) % 2
    direction = np.where(component == 0, 1.0, -1.0)[:, None] * np.ones((1, 4))
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 51)
    train = Sequences.of([(2 * rng.choice(50, 8, p=share / share.sum()) + user % 2).tolist() for user in range(200)])
    graph = item_graph(train, 100, window=2)
    degrees = np.asarray(graph.sum(axis=1)).ravel()
    assert degrees.max() > 20 * degrees[degrees > 0].min()
    mixed = propagate(as_they_are(direction.astype(np.float32)), graph, alpha=0.5, hops=2, path=tmp_path / "mixed")
    norms = np.linalg.norm(mixed, axis=1)[degrees > 0]
    assert norms.std() < 0.02 * norms.mean()


def test_where_neighbours_are_unrelated_an_items_degree_leaves_little_trace_in_its_norm(tmp_path):
    """A mean of many unrelated vectors is shorter than one of few: nothing but the own share bounds that.

    Measured over graphs of this kind: the norms of the fifth with least and with most edges differ by 2 to 7 %.
    """
    graph = item_graph(walks(300, 150), 300, window=3)
    mixed = propagate(Standardised.of(normal(300, 384)), graph, alpha=0.5, hops=2, path=tmp_path / "mixed")
    degrees = np.asarray(graph.sum(axis=1)).ravel()
    norms, connected = np.linalg.norm(mixed, axis=1), degrees > 0
    low, high = np.quantile(degrees[connected], [0.2, 0.8])
    few, many = norms[connected & (degrees <= low)].mean(), norms[degrees >= high].mean()
    assert abs(few / many - 1) < 0.1
    assert norms[~connected].mean() == pytest.approx(norms[connected].mean(), rel=0.05)


@given(st.integers(1, 80), st.integers(0, 3), st.integers(0, 2**31))
def test_blocks_of_columns_give_what_all_columns_at_once_give(tmp_path_factory, width, hops, seed):
    items = Standardised.of(normal(25, width, seed=seed))
    graph = item_graph(walks(25, 10, seed), 25, window=2)
    mixed = propagate(items, graph, alpha=0.4, hops=hops, path=tmp_path_factory.mktemp("mixed") / "mixed")
    looped = graph.toarray() + np.eye(25)
    normalised, own = looped / looped.sum(axis=1, keepdims=True), items.rows(slice(None)).astype(np.float64)
    reached, total = own, hop_weights(0.4, hops)[0] * own
    for weight in hop_weights(0.4, hops)[1:]:
        reached = 0.6 * normalised @ reached + 0.4 * own
        total = total + weight * reached
    has_edge = np.diff(graph.indptr) > 0
    expected = np.where(has_edge[:, None], (total - total[has_edge].mean(axis=0)) / total[has_edge].std(axis=0), own)
    assert mixed == pytest.approx(expected, abs=2e-4)


def test_the_mixed_vectors_lie_in_the_file(tmp_path):
    mixed = propagate(Standardised.of(normal(4, 70)), GRAPH, alpha=0.5, hops=2, path=tmp_path / "mixed")
    assert (np.load(tmp_path / "mixed") == mixed).all()


# -- partners


def test_partners_are_drawn_as_often_as_they_were_touched_together():
    """Item 1 met item 0 twice and item 2 once: of 300 evenly spaced numbers 200 give 0 and 100 give 2."""
    uniform = (np.arange(300) + 0.5) / 300
    drawn = Partners(GRAPH).draw(np.full(300, 1), uniform)
    assert np.bincount(drawn, minlength=4).tolist() == [200, 0, 100, 0]


def test_an_item_that_met_nobody_is_its_own_partner():
    partners = Partners(GRAPH)
    assert partners.has_any(np.arange(4)).tolist() == [True, True, True, False]
    assert partners.draw(np.array([3, 0, 3]), np.array([0.0, 0.5, 0.99])).tolist() == [3, 1, 3]


def test_without_any_edge_everybody_is_their_own_partner():
    partners = Partners(item_graph(Sequences.of([]), 3, window=5))
    assert partners.draw(np.arange(3), np.full(3, 0.5)).tolist() == [0, 1, 2]
    assert not partners.has_any(np.arange(3)).any()


@given(st.integers(0, 2**31), st.sampled_from([0.0, 5e-324, 0.5, 1 - 2**-53]))
def test_a_partner_is_a_neighbour_at_the_ends_of_the_interval_too(seed, uniform):
    graph = item_graph(walks(30, 8, seed), 30, window=3)
    partners, items = Partners(graph), np.arange(30)
    drawn = partners.draw(items, np.full(30, uniform))
    has_any = partners.has_any(items)
    assert (graph.toarray()[items[has_any], drawn[has_any]] > 0).all()
    assert (drawn[~has_any] == items[~has_any]).all()


def test_the_ends_of_the_interval_are_the_first_and_the_last_neighbour():
    """Of item 1's three meetings two were with 0: up to but not including ⅔ it is 0."""
    drawn = Partners(GRAPH).draw(np.full(4, 1), np.array([0.0, 0.66, 2 / 3, 1 - 2**-53]))
    assert drawn.tolist() == [0, 0, 2, 2]
