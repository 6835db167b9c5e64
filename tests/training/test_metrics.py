"""Ranking metrics: hand-derived numbers, ties, masking, and the bootstrap against its definition."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import metrics
from training.metrics import (
    NO_ITEM,
    bootstrap_mean,
    bootstrap_over_seeds,
    chance_prefix_recall,
    coverage,
    gini,
    holm,
    metrics_of_ranks,
    paired_bootstrap,
    prefix_recall,
    target_ranks,
    top_items,
)
from training.sequences import Sequences


def ranks_of(
    scores: npt.ArrayLike, targets: npt.ArrayLike, masked: Sequences | None = None, seed: int = 0
) -> npt.NDArray[np.int64]:
    return target_ranks(
        np.asarray(scores, np.float32), np.asarray(targets, np.int32), masked, generator=np.random.default_rng(seed)
    )


def test_rank_counts_the_strictly_better_items() -> None:
    """Scores 3 1 2: item 0 is first, item 2 second, item 1 third."""
    assert ranks_of([[3, 1, 2]] * 3, [0, 2, 1]).tolist() == [0, 1, 2]


def test_tied_target_takes_every_place_among_its_equals_equally_often() -> None:
    """One better item and four equals, the target among them: ranks 1..4, each for a quarter of the users."""
    ranks = ranks_of([[9, 5, 5, 5, 5]] * 20_000, [2] * 20_000)
    assert set(ranks.tolist()) == {1, 2, 3, 4}
    assert np.allclose(np.bincount(ranks)[1:] / 20_000, 0.25, atol=0.015)


def test_masked_items_leave_the_ranking_once_however_often_they_were_seen() -> None:
    """Items 0 and 1 beat target 2; item 0 was seen twice, so one better item is left."""
    assert ranks_of([[3, 2, 1, 0]], [2], Sequences.of([[0, 0, 3]])).tolist() == [1]


def test_masked_target_is_a_miss() -> None:
    ranks = ranks_of([[3, 2, 1]], [0], Sequences.of([[0]]))
    assert ranks.tolist() == [50], "beyond every cutoff, though there are only 3 items"
    assert ranks_of([[3, 2, 1]], [0]).tolist() == [0]
    of_many = ranks_of([np.arange(60)], [59], Sequences.of([[59]]))
    assert of_many.tolist() == [60]


def test_masked_equals_do_not_take_part_in_the_tie() -> None:
    """All equal, but everything except the target was seen: its rank is 0, whatever is drawn."""
    assert {int(ranks_of([[1, 1, 1, 1]], [2], Sequences.of([[0, 1, 3]]), seed)[0]) for seed in range(20)} == {0}


def test_nan_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        ranks_of([[1, np.nan, 2]], [0])


@given(st.integers(0, 2**32 - 1))
def test_ranks_equal_the_obvious_loop_and_do_not_depend_on_the_batch(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 4, (7, 9)).astype(np.float32)
    targets = generator.integers(0, 9, 7).astype(np.int32)
    seen = [generator.integers(0, 9, generator.integers(0, 6)).tolist() for _ in range(7)]
    draws = np.random.default_rng(3).random(7)
    expected: list[int] = []
    for user, target in enumerate(targets):
        rivals = [scores[user, item] for item in range(9) if item not in seen[user] and item != target]
        better = sum(score > scores[user, target] for score in rivals)
        equal = sum(score == scores[user, target] for score in rivals)
        expected.append(50 if target in seen[user] else better + int(draws[user] * (equal + 1)))
    assert ranks_of(scores, targets, Sequences.of(seen), seed=3).tolist() == expected

    one_generator = np.random.default_rng(3)
    in_two = [
        target_ranks(scores[part], targets[part], Sequences.of(seen[part]), generator=one_generator)
        for part in (slice(0, 3), slice(3, 7))
    ]
    assert np.concatenate(in_two).tolist() == expected


@given(st.integers(0, 2**32 - 1))
def test_permuting_item_indices_permutes_no_rank_and_no_list(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 4, (5, 8)).astype(np.float32)
    targets = generator.integers(0, 8, 5).astype(np.int32)
    tie_order = generator.permutation(8)
    renamed = generator.permutation(8)  # item i is now called renamed[i]
    scores_renamed = np.empty_like(scores)
    scores_renamed[:, renamed] = scores
    assert ranks_of(scores, targets).tolist() == ranks_of(scores_renamed, renamed[targets]).tolist()
    lists = top_items(scores, 3, tie_order=tie_order)
    assert top_items(scores_renamed, 3, tie_order=renamed[tie_order]).tolist() == renamed[lists].tolist()


def test_top_items_are_sorted_masked_and_filled_up() -> None:
    scores = np.asarray([[1, 4, 3, 2], [1, 4, 3, 2]], np.float32)
    lists = top_items(scores, 3, Sequences.of([[1], [1, 2, 3]]), tie_order=np.asarray([3, 1, 0, 2]))
    assert lists.tolist() == [[2, 3, 0], [0, NO_ITEM, NO_ITEM]]


def test_top_items_beyond_the_catalogue_are_no_items() -> None:
    assert top_items(np.asarray([[1, 2]], np.float32), 3, tie_order=np.arange(2)).tolist() == [[1, 0, NO_ITEM]]


def test_recall_and_ndcg_by_hand() -> None:
    """Ranks 0, 6, 60. NDCG@5: 1/log2(2) = 1, 0, 0. NDCG@10: 1, 1/log2(8) = 1/3, 0."""
    means = metrics_of_ranks(np.asarray([0, 6, 60])).means()
    assert means == {
        "recall@5": pytest.approx(1 / 3),
        "ndcg@5": pytest.approx(1 / 3),
        "recall@10": pytest.approx(2 / 3),
        "ndcg@10": pytest.approx((1 + 1 / 3) / 3),
        "recall@50": pytest.approx(2 / 3),
        "ndcg@50": pytest.approx((1 + 1 / 3) / 3),
    }


def test_metrics_of_some_users_are_their_own() -> None:
    metrics = metrics_of_ranks(np.array([0, 7, 3]))
    for users in (np.array([2, 0]), np.array([True, False, True])):
        assert metrics.select(users).means() == metrics_of_ranks(np.array([0, 3])).means()


PATHS = np.array([[0, 2], [0, 3], [0, 3], [1, 4], [1, 5]])
"""Five items, of which the first three share a first code, and two of these the whole SID."""


def test_prefix_recall_by_hand() -> None:
    """The first user's list shares a code with the target 2 and no SID, the second's is the target's twin, the third's
    has only a filler, which is no item though its number would be the last one's."""
    lists = np.array([[3, 0], [3, 1], [-1, -1]], np.int32)
    targets = np.array([2, 2, 4], np.int32)
    assert prefix_recall(PATHS, lists, targets) == [pytest.approx(2 / 3), pytest.approx(1 / 3)]


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_chance_is_the_mean_over_all_lists(length: int) -> None:
    lists = np.array(list(itertools.combinations(range(5), min(length, 5))), np.int32)
    for target in range(5):
        found = prefix_recall(PATHS, lists, np.full(len(lists), target, np.int32))
        assert chance_prefix_recall(PATHS, length, np.array([target], np.int32)) == pytest.approx(found)


def test_metrics_of_nobody_are_refused() -> None:
    with pytest.raises(ValueError, match="no user to evaluate"):
        metrics_of_ranks(np.empty(0, np.int64))


def test_bootstrap_interval_has_the_normal_width() -> None:
    """10,000 users with standard deviation 2: the mean's standard error is 0.02, the 95 % interval ± 0.0392."""
    values = np.random.default_rng(0).normal(1, 2, 10_000)
    interval = bootstrap_mean(values, seed=1)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.02, rel=0.1)


def test_paired_bootstrap_of_a_constant_difference_is_exact() -> None:
    b = np.random.default_rng(0).random(500)
    interval = paired_bootstrap(b + 0.25, b, samples=100, seed=0)
    assert [interval.difference, interval.low, interval.high] == pytest.approx([0.25] * 3)


def test_paired_bootstrap_refuses_other_users() -> None:
    with pytest.raises(ValueError, match="same users"):
        paired_bootstrap(np.zeros(3), np.zeros(4), seed=0)


def test_bootstrap_in_chunks_equals_resampling_in_one_go() -> None:
    values = np.random.default_rng(0).random(3000)
    assert 2000 * len(values) > metrics.RESAMPLED_VALUES_AT_ONCE
    drawn = np.random.default_rng(2).integers(0, 3000, (2000, 3000))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    interval = bootstrap_mean(values, samples=2000, seed=2)
    assert [interval.low, interval.high] == pytest.approx([low, high])


def test_bootstrap_over_seeds_draws_seeds_as_well_as_users() -> None:
    """All users are 0 with one seed and 1 with the other: samples are 0, ½, 1 in ¼, ½, ¼ of the draws.

    So the interval is 0 … 1, and as k is the quarter of samples that are 0, p is ½.
    """
    values = np.tile(np.asarray([[[0.0], [1.0]]]), (5, 1, 1))  # (U, S, Q)
    (test,) = bootstrap_over_seeds(values, samples=20_000, seed=0)
    assert [test.mean, test.low, test.high] == [0.5, 0, 1]
    assert test.p_value == pytest.approx(0.5, abs=0.02)


def test_bootstrap_over_one_seed_is_the_bootstrap_over_users_for_every_quantity() -> None:
    values = np.random.default_rng(0).normal(size=(300, 1, 2))
    for number, test in enumerate(bootstrap_over_seeds(values, samples=400, seed=5)):
        expected = bootstrap_mean(values[:, 0, number], samples=400, seed=5)
        assert [test.mean, test.low, test.high] == pytest.approx([expected.mean, expected.low, expected.high])


def test_bootstrap_p_value_agrees_with_the_normal_test() -> None:
    """900 users whose mean is 2 standard errors from 0: p = 2 Φ(−2) = 0.0455."""
    values = np.random.default_rng(0).normal(size=900)
    values += 2 * values.std() / 30 - values.mean()
    (test,) = bootstrap_over_seeds(values[:, None, None], samples=20_000, seed=1)
    assert test.p_value == pytest.approx(0.0455, abs=0.006)
    (mirrored,) = bootstrap_over_seeds(-values[:, None, None], samples=20_000, seed=1)
    assert mirrored.p_value == test.p_value


def test_bootstrap_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing to resample: values of shape \(0, 2, 3\)"):
        bootstrap_over_seeds(np.empty((0, 2, 3)), seed=0)


def test_holm_by_hand() -> None:
    """Ascending .005 .01 .03 .04 times 4 3 2 1 are .02 .03 .06 .04; the last is lifted to the .06 before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert holm([0.02]).tolist() == [0.02]


def test_coverage_and_gini_by_hand() -> None:
    """Exposures 0 0 1 3: half of the items; Gini = (−3·0 − 1·0 + 1·1 + 3·3) / (4 · 4) = 10/16."""
    recommended = np.asarray([[3, 2], [3, NO_ITEM], [3, NO_ITEM]], np.int32)
    assert coverage(recommended, 4) == 0.5
    assert gini(recommended, 4) == 10 / 16


def test_gini_is_zero_for_equal_exposures() -> None:
    assert gini(np.arange(6, dtype=np.int32).reshape(3, 2), 6) == 0
