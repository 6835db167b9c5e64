"""Diversity: maximal marginal relevance over what a beam found, best first.

Carbonell and Goldstein 1998: the next item is the one with the largest

    (1 - diversity) · relevance - diversity · (its largest similarity to an item already chosen)

Two items are as similar as their SIDs' common prefix is long, or, where vectors are given, as the cosine of these. Only
the order changes, and so which items are the first `num_items`: scores and the filter are not touched.
"""

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float32]


class DiversityError(ValueError):
    """Arguments that cannot be diversified."""


def mmr(
    scores: npt.NDArray[np.floating],
    codes: npt.NDArray[np.integer],
    num_items: int,
    diversity: float,
    *,
    vectors: npt.NDArray[np.floating] | None = None,
) -> npt.NDArray[np.int64]:
    """Which candidates to show, in this order: min(`num_items`, W) places, each once.

    Candidates stand best first: scores (W,), codes (W, L), vectors (W, D). `diversity` is 0 to 1: 0 is the order as
    given, 1 looks at similarity alone, after the first. Of equal candidates the first as given is chosen.
    """
    if not 0 <= diversity <= 1:
        raise DiversityError(f"diversity is 0 to 1, not {diversity}")
    if num_items < 1 or len(codes) != len(scores) or (vectors is not None and len(vectors) != len(scores)):
        raise DiversityError(
            f"{num_items} of {len(scores)} scores, {len(codes)} SIDs and "
            f"{'no' if vectors is None else len(vectors)} vectors cannot be chosen: all need one length"
        )
    num_shown = min(num_items, len(scores))
    if diversity == 0 or num_shown < 2:
        return np.arange(num_shown)
    similarity = common_prefix_share(codes) if vectors is None else cosine_similarity(vectors)  # (W, W)
    relevance = np.float32(1 - diversity) * relevance_of(scores)
    # relevance - largest penalty = the smallest of relevance - penalty: one row to take the minimum with per choice.
    marginal = relevance - np.float32(diversity) * similarity
    gain = relevance.copy()
    order = np.empty(num_shown, np.int64)
    for place in range(num_shown):
        chosen = gain.argmax()
        order[place] = chosen
        np.minimum(gain, marginal[chosen], out=gain)
        gain[chosen] = -np.inf
    return order


def relevance_of(scores: npt.NDArray[np.floating]) -> Weights:
    """Scores, log-probabilities, on a line from 0, the worst candidate, to 1, the best; 1 for all if all are equal."""
    scores = scores.astype(np.float32)
    spread = scores.max() - scores.min()
    relevance: Weights = (scores - scores.min()) / spread if spread > 0 else np.ones_like(scores)
    return relevance


def common_prefix_share(codes: npt.NDArray[np.integer]) -> Weights:
    """The length of the common prefix of each two SIDs, as a share of L: (W, L) → (W, W); 1 for equal SIDs."""
    num_items, num_levels = codes.shape
    alike = np.ones((num_items, num_items), np.bool_)
    length = np.zeros((num_items, num_items), np.float32)
    for level in range(num_levels):
        column = codes[:, level]
        alike &= column[:, None] == column
        length += alike
    return length / np.float32(num_levels)


def cosine_similarity(vectors: npt.NDArray[np.floating]) -> Weights:
    """The cosine of each two vectors, 0 where it is negative or one of them is nought: (W, D) → (W, W)."""
    vectors = vectors.astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.where(norms > 0, norms, 1)
    similarity: Weights = np.maximum(units @ units.T, 0)
    return similarity
