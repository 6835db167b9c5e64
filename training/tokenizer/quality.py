"""What SIDs are like, in numbers; and what is too bad to be used."""

import itertools

import numpy as np
import numpy.typing as npt

from semantic_ids.codes import Codes, SidSpace
from semantic_ids.quantizer import ResidualQuantizer, Vectors
from semantic_ids.trie import sid_keys
from training.stage import StageError

COLLAPSED_SHARE = 0.05
_BATCH = 8192


def refuse_collapse(space: SidSpace, codes: Codes, one_of_each: npt.NDArray[np.int64]) -> None:
    """`StageError` if a level fails to tell items apart that the levels before it left together.

    `codes` (N, L) are the nearest ones. The first level is judged on all items, a later one on those whose prefix is
    not theirs alone, identical listings counted once (`one_of_each`). The measure is the perplexity of their codes,
    which is how many are in even use: below 2, or below COLLAPSED_SHARE of those they could use, is a collapse. The
    lowest of LETTER's released SIDs is .28.
    """
    together = np.arange(len(codes))
    for level in range(space.num_levels):
        usable = min(space.codebook_size, len(together))
        at_level = codes[together, level]
        perplexity, used = perplexity_of(at_level), len(np.unique(at_level))
        least = max(2.0, COLLAPSED_SHARE * usable) if usable >= 8 else 0.0
        if len(together) >= 8 and (used < 2 or perplexity < least):
            raise StageError(
                f"the codebook of level {level} collapsed: {used} of {space.codebook_size} codes used for "
                f"{len(together)} items that it should tell apart, as many as {perplexity:.1f} in even use. "
                "If the items' texts are nearly all the same, give titles, categories or descriptions that tell them "
                "apart; else try another method or seed, a smaller tokenizer.codebook_size, or a lower "
                "tokenizer.learning_rate"
            )
        prefixes = codes[one_of_each, : level + 1]
        _, group, sizes = np.unique(prefixes, axis=0, return_inverse=True, return_counts=True)
        together = one_of_each[sizes[group.reshape(-1)] > 1]


def unique_share(space: SidSpace, codes: Codes) -> float:
    """Share of the items (N, L) whose SID no other item has."""
    _, counts = np.unique(sid_keys(space, codes), return_counts=True)
    return float((counts == 1).sum() / len(codes))


def perplexity_of(codes: npt.NDArray[np.uint16]) -> float:
    """exp of the entropy of one level's codes (N,): how many are in even use."""
    share = np.bincount(codes) / len(codes)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def conditional_bits(space: SidSpace, codes: Codes, weights: npt.NDArray[np.int64]) -> list[float]:
    """H(code | prefix) in bits by level, items weighted by their interactions (all alike where there are none)."""
    weights = weights if weights.sum() else np.ones_like(weights)
    entropies = [0.0]
    for level in range(1, space.num_levels + 1):
        _, inverse = np.unique(codes[:, :level], axis=0, return_inverse=True)
        share = np.bincount(inverse.reshape(-1), weights) / weights.sum()
        share = share[share > 0]
        entropies.append(float(-(share * np.log2(share)).sum()))
    return [max(0.0, after - before) for before, after in itertools.pairwise(entropies)]


def listings_of(vectors: Vectors) -> npt.NDArray[np.int64]:
    """Which listing each item is, (N,): items have the same number exactly if their vectors agree to the bit."""
    digests = (hash(np.ascontiguousarray(vectors[row]).tobytes()) for row in range(len(vectors)))
    _, listing = np.unique(np.fromiter(digests, np.int64, len(vectors)), return_inverse=True)
    return listing


def mean_move(
    quantizer: ResidualQuantizer, vectors: Vectors, nearest: Codes, codes: Codes, moved: npt.NDArray[np.int64]
) -> float:
    """How much farther from their SID the moved items are, in units of their mean distance to the nearest one."""
    if not len(moved):
        return 0.0
    before, after = 0.0, 0.0
    for start in range(0, len(moved), _BATCH):
        items = moved[start : start + _BATCH]
        read = np.asarray(vectors[items], np.float32)
        before += _distances(quantizer, read, nearest[items]).sum()
        after += _distances(quantizer, read, codes[items]).sum()
    return float((after - before) / max(before, 1e-12))


def _distances(quantizer: ResidualQuantizer, vectors: Vectors, codes: Codes) -> npt.NDArray[np.float32]:
    """How far each item's latent is from the sum of its codes, (n,)."""
    left_over = quantizer.last_residuals(vectors, codes) - quantizer.codebooks[-1][codes[:, -1]]
    distances: npt.NDArray[np.float32] = np.sqrt((left_over**2).sum(axis=1))
    return distances
