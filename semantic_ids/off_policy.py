"""Off-policy evaluation: what a log of explored answers says of items, or of another policy, that it did not serve.

Each item shown in a round (an answer) was shown with a known probability, its propensity (`decoding.exploration`). Its
reward counts 1 / propensity times, for all the rounds in which it could have been shown and was not. The sum over a
round is then unbiased for the sum over all items that could have been shown, whatever the propensity was conditioned
on, as long as the reward of an item depends neither on the noise nor on what else is shown: each term's expectation,
given the other SIDs' noise, is its reward (Vieira 2017; Kool et al. 2019, section 4.2; Duffield et al. 2007).

It stands in the contract because it and the propensity are two halves of one definition: the service writes the one,
reports and training read it with the other.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


class OffPolicyError(ValueError):
    """A log from which nothing can be estimated."""


@dataclass(frozen=True)
class Estimate:
    """A mean over rounds."""

    value: float
    standard_error: float  # over rounds, which must be independent: a seed of its own for each
    num_rounds: int
    largest_weight: float  # of one item; where it carries the sum, the standard error is too small

    def interval(self, num_errors: float = 1.96) -> tuple[float, float]:
        """The normal confidence interval; of 95 % by default."""
        return self.value - num_errors * self.standard_error, self.value + num_errors * self.standard_error


def ips_estimate(
    reward: npt.ArrayLike,
    propensity: npt.ArrayLike,
    round_of: npt.ArrayLike,
    num_rounds: int,
    *,
    target: npt.ArrayLike | None = None,
    max_weight: float | None = None,
) -> Estimate:
    """The expected sum of `target` · reward over all eligible items of a round (Horvitz-Thompson).

    One entry an item shown: its reward, its propensity, and the round, 0 to `num_rounds` - 1, that showed it; rounds
    without an entry count as 0. `target` is the probability with which another policy shows the item in that round: the
    estimate is then that policy's expected reward a round. Without it, it is the sum over all eligible items.

    `max_weight` cuts 1 / propensity there: less variance, and for rewards that are not negative an estimate that is too
    small on average. Off by default.
    """
    rewards, weights, rounds = _log(reward, propensity, round_of, num_rounds, target, max_weight)
    per_round = _per_round(rounds, weights * rewards, num_rounds)
    return Estimate(float(per_round.mean()), _standard_error(per_round), num_rounds, float(weights.max(initial=0.0)))


def self_normalised_estimate(
    reward: npt.ArrayLike,
    propensity: npt.ArrayLike,
    round_of: npt.ArrayLike,
    num_rounds: int,
    *,
    target: npt.ArrayLike | None = None,
    max_weight: float | None = None,
) -> Estimate:
    """The expected reward of *one* item, by `target` or of all eligible ones alike (Swaminathan and Joachims 2015).

    The sum of weighted rewards by the sum of weights. It stays within the rewards seen, has as a rule the smaller
    error, and a bias that vanishes with the number of rounds. The standard error is the delta method's.
    """
    rewards, weights, rounds = _log(reward, propensity, round_of, num_rounds, target, max_weight)
    per_round = _per_round(rounds, weights * rewards, num_rounds)
    weight = _per_round(rounds, weights, num_rounds)
    if weight.sum() == 0:
        raise OffPolicyError("no item of the log has a chance under the target policy: it says nothing of its reward")
    value = per_round.sum() / weight.sum()
    error = _standard_error(per_round - value * weight) / weight.mean()
    return Estimate(float(value), float(error), num_rounds, float(weights.max()))


def _log(
    reward: npt.ArrayLike,
    propensity: npt.ArrayLike,
    round_of: npt.ArrayLike,
    num_rounds: int,
    target: npt.ArrayLike | None,
    max_weight: float | None,
) -> tuple[Values, Values, npt.NDArray[np.int64]]:
    """Rewards, weights and rounds of the items shown, checked, (n,) each."""
    rewards, shown_with = np.asarray(reward, np.float64), np.asarray(propensity, np.float64)
    rounds = np.asarray(round_of)
    targets = np.ones_like(rewards) if target is None else np.asarray(target, np.float64)
    if rewards.ndim != 1 or not rewards.shape == shown_with.shape == rounds.shape == targets.shape:
        shapes = [rewards.shape, shown_with.shape, rounds.shape, targets.shape]
        raise OffPolicyError(f"reward, propensity, round and target have shapes {shapes}: one entry an item shown")
    if num_rounds < 2 or (rounds.size and not 0 <= rounds.min() <= rounds.max() < num_rounds):
        raise OffPolicyError(f"rounds are 0 to {num_rounds - 1}, at least two of them: an error needs a spread")
    if not bool(((shown_with > 0) & (shown_with <= 1)).all()):
        raise OffPolicyError("a propensity is above 0 and at most 1: what was shown had a chance to be shown")
    if not bool((np.isfinite(rewards) & np.isfinite(targets) & (targets >= 0)).all()):
        raise OffPolicyError("rewards are finite, and target probabilities are finite and not negative")
    if max_weight is not None and not max_weight >= 1:
        raise OffPolicyError(f"weights begin at 1, the weight of what is always shown: none can end at {max_weight}")
    inverse = 1 / shown_with
    return (
        rewards,
        targets * (inverse if max_weight is None else np.minimum(inverse, max_weight)),
        rounds.astype(np.int64),
    )


def _per_round(rounds: npt.NDArray[np.int64], values: Values, num_rounds: int) -> Values:
    """The sum of each round, (R,)."""
    return np.bincount(rounds, values, minlength=num_rounds).astype(np.float64, copy=False)


def _standard_error(per_round: Values) -> float:
    return float(per_round.std(ddof=1) / np.sqrt(len(per_round)))
