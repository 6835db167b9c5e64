"""Ranking metrics and their uncertainty, from scores or ranks that somebody else computed; knows no model and no file.

Equal scores are common (popularity counts, a neighbourhood without evidence), and item indices often follow release
order, so a tie is never broken by index: the target takes a uniformly drawn place among its equals.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.sequences import Sequences

CUTOFFS = (5, 10, 50)

NO_ITEM = -1
"""Fills a recommendation list where no item is left to recommend."""

RESAMPLED_VALUES_AT_ONCE = 4_000_000
"""Bounds the bootstrap's memory: about 64 MB of indices and drawn values."""

FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class RankingMetrics:
    """Recall and NDCG of each user, by cutoff: `recall[10]` is an array of one number per user, in the users' order."""

    recall: dict[int, npt.NDArray[np.float64]]
    ndcg: dict[int, npt.NDArray[np.float64]]

    def means(self) -> dict[str, float]:
        """The mean over users under the names "recall@5", "ndcg@5", "recall@10", …"""
        return {
            f"{name}@{cutoff}": float(values[cutoff].mean())
            for cutoff in CUTOFFS
            for name, values in (("recall", self.recall), ("ndcg", self.ndcg))
        }

    def select(self, users: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> "RankingMetrics":
        """Of these users."""
        of_users = [{cutoff: of[cutoff][users] for cutoff in CUTOFFS} for of in (self.recall, self.ndcg)]
        return RankingMetrics(*of_users)


@dataclass(frozen=True)
class Interval:
    """A mean difference between two systems over users, with its 95 % bootstrap interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class MeanInterval:
    """A mean over users, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class MeanTest(MeanInterval):
    """A mean over users and seeds, and the two-sided bootstrap p-value of its being 0."""

    p_value: float


def target_ranks(
    scores: npt.NDArray[np.float32],
    targets: npt.NDArray[np.int32],
    masked: Sequences | None = None,
    *,
    generator: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """Rank of each user's target among all items, 0 the best, (B,).

    `scores` (B, N), `targets` (B,). The rank is the number of strictly better items plus a uniform draw from
    0 … number of other items with the target's score. One number per user leaves the generator, in order, so the
    size of the batches changes no rank. With `masked`, sequence b's items leave user b's ranking; a target among
    them is a miss. A score that is not a number raises ValueError.
    """
    num_users, num_items = scores.shape
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {scores.size} scores are NaN: they cannot be ranked")
    users = np.arange(num_users)
    target_scores = scores[users, targets]  # (B,)
    num_better = (scores > target_scores[:, None]).sum(1)
    num_equal = (scores == target_scores[:, None]).sum(1) - 1
    is_masked_target = np.zeros(num_users, np.bool_)
    if masked is not None:
        rows, items = _masked_cells(masked, num_items)
        is_target = items == targets[rows]
        is_masked_target[rows[is_target]] = True
        rows, items = rows[~is_target], items[~is_target]
        masked_scores = scores[rows, items]
        num_better -= np.bincount(rows[masked_scores > target_scores[rows]], minlength=num_users)
        num_equal -= np.bincount(rows[masked_scores == target_scores[rows]], minlength=num_users)
    ranks = num_better + (generator.random(num_users) * (num_equal + 1)).astype(np.int64)
    return np.where(is_masked_target, rank_of_a_miss(num_items), ranks)


def rank_of_a_miss(num_items: int) -> int:
    """The rank of a target that cannot be recommended: behind every item, and beyond every cutoff."""
    return max(num_items, *CUTOFFS)


def top_items(
    scores: npt.NDArray[np.float32], k: int, masked: Sequences | None = None, *, tie_order: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """Each user's k best items, the best first, (B, k); NO_ITEM where fewer are left after masking.

    Equal scores are taken in an order that depends on `tie_order`, a shuffle of all items (N,), and never on the
    items' own indices.
    """
    num_items = scores.shape[1]
    shuffled = scores[:, tie_order]  # (B, N)
    if masked is not None:
        rows, items = _masked_cells(masked, num_items)
        place = np.empty(num_items, np.int64)
        place[tie_order] = np.arange(num_items)
        shuffled[rows, place[items]] = -np.inf
    num_kept = min(k, num_items)
    best = np.argpartition(-shuffled, num_kept - 1, axis=1)[:, :num_kept]
    best_scores = np.take_along_axis(shuffled, best, 1)
    by_score = np.argsort(-best_scores, axis=1, kind="stable")
    items_of_best = tie_order[np.take_along_axis(best, by_score, 1)].astype(np.int32)
    items_of_best[np.take_along_axis(best_scores, by_score, 1) == -np.inf] = NO_ITEM
    recommended = np.full((len(scores), k), NO_ITEM, np.int32)
    recommended[:, :num_kept] = items_of_best
    return recommended


def metrics_of_ranks(ranks: npt.NDArray[np.int64]) -> RankingMetrics:
    """Recall@k = 1 if rank < k; NDCG@k = 1 / log2(rank + 2) if rank < k: with one relevant item the ideal gain is 1."""
    if not len(ranks):
        raise ValueError("no user to evaluate: ranks are empty")
    gains = 1 / np.log2(ranks + 2.0)
    return RankingMetrics(
        recall={cutoff: (ranks < cutoff).astype(np.float64) for cutoff in CUTOFFS},
        ndcg={cutoff: np.where(ranks < cutoff, gains, 0.0) for cutoff in CUTOFFS},
    )


def prefix_recall(
    paths: npt.NDArray[np.int64], lists: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]
) -> list[float]:
    """How often some item of a user's list shares the first 1, 2, … L nodes of the target's path; L shares of users.

    `paths` (N, L): each item's node at each level, which says all of its prefix; `lists` (U, k), NO_ITEM where shorter.
    """
    is_item = lists != NO_ITEM
    return [
        float(((nodes[lists] == nodes[targets][:, None]) & is_item).any(axis=1).mean())
        for nodes in np.ascontiguousarray(paths.T)
    ]


def chance_prefix_recall(paths: npt.NDArray[np.int64], length: int, targets: npt.NDArray[np.int32]) -> list[float]:
    """What `prefix_recall` is on average for lists of `length` different items drawn from all N."""
    num_items = len(paths)
    drawn = np.arange(min(length, num_items))
    expected = []
    for nodes in paths.T:
        sharing = np.unique(nodes, return_inverse=True, return_counts=True)
        num_sharing = sharing[2][sharing[1]][targets]  # (U,)
        missed = np.clip(num_items - drawn - num_sharing[:, None], 0, None) / (num_items - drawn)
        expected.append(float(1 - missed.prod(axis=1).mean()))
    return expected


def paired_bootstrap(a: FloatArray, b: FloatArray, *, samples: int = 2000, seed: int) -> Interval:
    """The mean of `a - b` over users, with the 95 % percentile interval over resampled users; both (U,), same users."""
    if a.shape != b.shape:
        raise ValueError(f"paired values must be of the same users, got shapes {a.shape} and {b.shape}")
    over_users = bootstrap_mean(a.astype(np.float64) - b, samples=samples, seed=seed)
    return Interval(over_users.mean, over_users.low, over_users.high)


def bootstrap_mean(values: FloatArray, *, samples: int = 2000, seed: int) -> MeanInterval:
    """The mean of one value per user, (U,), with its 95 % percentile interval over resampled users."""
    if not len(values):
        raise ValueError("no user to resample: values are empty")
    means = np.concatenate(list(_resampled_means(values, samples, np.random.default_rng(seed))))
    low, high = np.quantile(means, (0.025, 0.975))
    return MeanInterval(float(values.mean()), float(low), float(high))


def bootstrap_over_seeds(values: FloatArray, *, samples: int = 2000, seed: int) -> list[MeanTest]:
    """Each quantity's mean over users and seeds, tested against 0; `values` (U, S, Q) of Q quantities → Q tests.

    A sample draws U users with replacement and, independently, S seeds with replacement, and averages the drawn users'
    values in the drawn seeds; all quantities share the draws. The interval is the 95 % percentile interval; the p-value
    is min(1, 2 (1 + k) / (samples + 1)), with k the fewer of the samples ≤ 0 and the samples ≥ 0. With one seed only
    users are drawn, and the interval is `bootstrap_mean`'s. With few seeds the part of the interval that comes from
    seeds is too narrow by √((S − 1) / S): 0.71 of its width at S = 2, 0.82 at S = 3.
    """
    num_users, num_seeds, num_quantities = values.shape
    if not values.size:
        raise ValueError(f"nothing to resample: values of shape {values.shape} are empty")
    generator = np.random.default_rng(seed)
    by_seed = np.concatenate(list(_resampled_means(values.reshape(num_users, -1), samples, generator)))
    drawn = generator.integers(0, num_seeds, (samples, num_seeds))
    of_sample = by_seed.reshape(samples, num_seeds, num_quantities)
    means = np.take_along_axis(of_sample, drawn[:, :, None], axis=1).mean(1)  # (samples, Q)
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    beyond = np.minimum((means <= 0).sum(0), (means >= 0).sum(0))
    p_values = np.minimum(1.0, 2 * (1 + beyond) / (samples + 1))
    columns = (values.mean((0, 1), dtype=np.float64), low, high, p_values)
    return [MeanTest(*map(float, row)) for row in zip(*columns, strict=True)]


def holm(p_values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Holm's step-down adjustment of m p-values, (m,): the i-th smallest times m − i + 1, at least those before it."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(order), 0, -1))
    return np.minimum(adjusted, 1.0)


def coverage(recommended: npt.NDArray[np.int32], num_items: int) -> float:
    """Share of the catalogue that at least one list recommends; `recommended` (U, k), NO_ITEM ignored."""
    return float(np.count_nonzero(_exposures(recommended, num_items)) / num_items)


def gini(recommended: npt.NDArray[np.int32], num_items: int) -> float:
    """Gini coefficient of the items' exposures in `recommended` (U, k): 0 all equal, near 1 all on one item.

    Items that are never recommended count with exposure 0.
    """
    exposures = np.sort(_exposures(recommended, num_items))
    if not exposures[-1]:
        raise ValueError("no item is recommended to anybody: exposures have no distribution")
    weights = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float((weights * exposures).sum() / (num_items * exposures.sum()))


def _masked_cells(masked: Sequences, num_items: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and items of the masked cells, each cell once though a history may repeat an item."""
    rows = np.repeat(np.arange(len(masked)), masked.lengths)
    cells: npt.NDArray[np.int64] = np.unique(rows * num_items + masked.items.astype(np.int64))
    return cells // num_items, cells % num_items


def _resampled_means(
    values: FloatArray, samples: int, generator: np.random.Generator
) -> Iterator[npt.NDArray[np.float64]]:
    """Means over drawn users of `values`, (U,) or (U, C), in parts: (samples,) or (samples, C) in all."""
    num_users = len(values)
    at_once = max(1, RESAMPLED_VALUES_AT_ONCE // num_users)
    for start in range(0, samples, at_once):
        part = min(at_once, samples - start)
        drawn = generator.integers(0, num_users, (part, num_users)) + num_users * np.arange(part)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=part * num_users).reshape(part, num_users)
        yield counts.astype(np.float64) @ values / num_users


def _exposures(recommended: npt.NDArray[np.int32], num_items: int) -> npt.NDArray[np.int64]:
    """How often each item is recommended, (N,)."""
    return np.bincount(recommended[recommended != NO_ITEM], minlength=num_items)
