"""Exploration: some of an answer's items are drawn, not best, and the probability with which each was shown is known.

Stochastic beam search (Kool et al. 2019, arXiv 1903.06059). Every eligible SID i has a perturbed log-probability
G_i = φ_i + Gumbel noise, φ_i = log q(i), and what is drawn, without replacement, are the SIDs of the largest G. A
prefix carries the largest G of the SIDs under it, from the top down, so a beam of the largest prefixes finds them:

    policy       q(SID) = Π over levels of softmax(log p / temperature) over the children with an eligible item
    of a prefix  largest = Gumbel(0) at the root; below, Gumbel(φ) of the children, given that the best has the parent's
    of an item   propensity = P(G_i > κ) = 1 - exp(-exp(φ_i - κ)), κ: the G at which its place would have been taken

The noise of a node is a function of (seed, node) alone: the same in any batch, at any width. This module knows nothing
of models, and imports no torch: the service may name an `Exploration`. Derivations and figures: docs/exploration.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semantic_ids.trie import ROOT, Nodes

LogProbs = npt.NDArray[np.float64]
Seeds = npt.NDArray[np.uint64]

MAX_SEED = 2**64 - 1
_ROUNDING = 1e-9  # 0.1 of 30 places are 3, whatever 0.1 * 30 is
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class ExplorationError(ValueError):
    """An exploration that cannot be, or whose propensities would be false."""


class DiversityWithExplorationError(ExplorationError):
    """Diversity chooses again among what exploration has drawn: the propensities would no longer be those shown."""


@dataclass(frozen=True)
class Exploration:
    """How one request explores: the best `num_kept` items stay, the other places go to items that are drawn."""

    temperature: float  # of the policy: 1 = as often as the model believes
    seed: int
    num_items: int
    num_kept: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ExplorationError(f"a temperature is positive and finite, not {self.temperature}: 0 is no exploration")
        if not 0 <= self.seed <= MAX_SEED:
            raise ExplorationError(f"a seed has 64 bits, so it is 0 to {MAX_SEED}, not {self.seed}")
        if not 0 <= self.num_kept < self.num_items:
            raise ExplorationError(
                f"an exploring answer of {self.num_items} items keeps 0 to {self.num_items - 1}, not {self.num_kept}"
            )

    @classmethod
    def of_request(cls, exploration: float, num_items: int, seed: int) -> "Exploration | None":
        """A request's `exploration`, 0 to 1, is the share of places that are drawn, rounded up; None for 0."""
        if not 0 <= exploration <= 1:
            raise ExplorationError(f"exploration is 0 to 1, not {exploration}")
        num_drawn = math.ceil(exploration * num_items - _ROUNDING)
        return cls(1.0, seed, num_items, num_items - max(1, num_drawn)) if exploration else None

    @property
    def num_drawn(self) -> int:
        """Places that are drawn."""
        return self.num_items - self.num_kept

    @property
    def num_candidates(self) -> int:
        """SIDs that the draw must find: one more than items, for the threshold; further ones would change nothing."""
        return self.num_items + 1

    def num_beams(self, width: int) -> int:
        """Beams that a search of `width` has at most while it explores: what is kept is found beside what is drawn."""
        return self.num_candidates + (width if self.num_kept else 0)


def refuse_both(diversity: float, exploration: float) -> None:
    """`DiversityWithExplorationError` where a request asks for both; nothing otherwise."""
    if diversity and exploration:
        raise DiversityWithExplorationError(
            f"diversity {diversity} and exploration {exploration} together would log false propensities: set one to 0"
        )


@dataclass(frozen=True)
class Perturbed:
    """M prefixes under the sampling policy; both are -inf where a prefix takes no part in a draw."""

    log_policy: LogProbs  # (M,) φ: the log-probability that a draw of one SID begins so
    largest: LogProbs  # (M,) the largest perturbed log-probability G of the eligible SIDs that begin so

    @classmethod
    def roots(cls, explorations: Sequence[Exploration | None]) -> "Perturbed":
        """The empty prefix of each request: a draw begins so with certainty, φ = 0."""
        seeds = _seeds(explorations)
        explores = np.array([one is not None for one in explorations])
        nothing = np.where(explores, 0.0, -np.inf)
        return cls(nothing, gumbel(seeds, np.full(len(seeds), ROOT)) + nothing)

    @property
    def is_drawn(self) -> npt.NDArray[np.bool_]:
        """Which take part in a draw, (M,)."""
        return self.largest > -np.inf

    def children(
        self,
        parent: npt.NDArray[np.int64],
        node: Nodes,
        log_prob: npt.NDArray[np.floating],
        request: npt.NDArray[np.int64],
        explorations: Sequence[Exploration | None],
    ) -> "Perturbed":
        """All eligible children (C,) of parents that take part in a draw; they stand by `parent`, a place in these.

        An only child is its parent: φ and the largest G are the same to the last bit.
        """
        first = np.flatnonzero(np.append(True, parent[1:] != parent[:-1]))
        family = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(parent))))
        logits = log_prob / _temperatures(explorations)[request]
        logits -= np.maximum.reduceat(logits, first)[family]
        log_policy = self.log_policy[parent] + logits - np.log(np.add.reduceat(np.exp(logits), first))[family]
        free = log_policy + gumbel(_seeds(explorations)[request], node)
        largest_free = np.maximum.reduceat(free, first)[family]
        return Perturbed(log_policy, _conditioned(free, largest_free, self.largest[parent]))

    def take(self, places: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> "Perturbed":
        """Those at these places."""
        return Perturbed(self.log_policy[places], self.largest[places])

    def scattered(self, places: npt.NDArray[np.int64], length: int) -> "Perturbed":
        """These at so many places of `length`."""
        log_policy, largest = np.full((2, length), -np.inf)
        log_policy[places], largest[places] = self.log_policy, self.largest
        return Perturbed(log_policy, largest)


def gumbel(seeds: Seeds, nodes: Nodes) -> LogProbs:
    """Standard Gumbel noise of each (seed, node), (M,), (M,) → (M,).

    SplitMix64 (Steele, Lea and Flood 2014): the seed, mixed, starts a generator, and `ROOT` has its first output.
    """
    bits = _mixed(_mixed(seeds) + (nodes + 2).astype(np.uint64) * _GOLDEN_GAMMA)
    uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # 52 bits: never rounds to 1
    noise: LogProbs = -np.log(-np.log(uniform))
    return noise


def propensities(sids: Perturbed, num_eligible: npt.NDArray[np.int64], num_drawn: int) -> npt.NDArray[np.float64]:
    """The probability with which each item drawn is drawn, given the perturbed log-probabilities of all other SIDs.

    `sids` and the eligible items of each, (M,), stand largest G first: all that there are, or enough of them to hold
    more than `num_drawn` items beside those of any one. Their items are taken in this order until there are
    `num_drawn`, so item t (from 0) of SID i is drawn iff the SIDs above i have at most `num_drawn` - 1 - t. Hence its
    threshold κ: the G of the SID at which the *other* SIDs, largest first, reach `num_drawn` - t items; none if they
    never do, and then it was certain. Returns (n,), in the order in which they are drawn.
    """
    reached = np.cumsum(num_eligible)
    item = np.arange(min(num_drawn, int(reached[-1])))
    place = np.searchsorted(reached, item, side="right")  # (n,) the SID of each item
    within = item - (reached - num_eligible)[place]
    # The SIDs above i alone do not reach so many items, or this one were not drawn: the threshold is behind i.
    behind = np.searchsorted(reached, num_drawn - within + num_eligible[place])
    threshold = np.append(sids.largest, -np.inf)[behind]
    above = np.minimum(sids.log_policy[place] - threshold, 700.0)  # no overflow; from 4 on it is 1 all the same
    drawn: npt.NDArray[np.float64] = -np.expm1(-np.exp(above))
    return drawn


def _seeds(explorations: Sequence[Exploration | None]) -> Seeds:
    return np.array([one.seed if one is not None else 0 for one in explorations], np.uint64)


def _temperatures(explorations: Sequence[Exploration | None]) -> npt.NDArray[np.float64]:
    return np.array([one.temperature if one is not None else 1.0 for one in explorations])


def _conditioned(free: LogProbs, largest_free: LogProbs, largest: LogProbs) -> LogProbs:
    """Free Gumbels given that the largest of their family is `largest`, in the stable form of the paper's appendix."""
    with np.errstate(divide="ignore"):  # log 0 of the largest itself, which becomes `largest` exactly
        v = largest - free + np.log(-np.expm1(free - largest_free))
    conditioned: LogProbs = largest - np.maximum(v, 0.0) - np.log1p(np.exp(-np.abs(v)))
    return conditioned


def _mixed(bits: Seeds) -> Seeds:
    """SplitMix64's finaliser (variant 13 of Stafford)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
