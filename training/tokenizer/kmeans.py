"""Residual k-means: the codebooks of the plain method, and the start of every learned one."""

import numpy as np
import numpy.typing as npt

from semantic_ids.codes import Codes, SidSpace
from semantic_ids.quantizer import Vectors, squared_distances
from training.tokenizer.assignment import balanced_kmeans
from training.tokenizer.methods import Initialisation
from training.tokenizer.standardised import Standardised

_BALANCED_SAMPLE = 8  # points per cluster: exact balanced assignment costs the cube of the points
_FAR = 32.0  # of the longest residual: where a code lies that no item has (much farther, float32 blurs the others)


def residual_codebooks(
    latents: Vectors, space: SidSpace, initialisation: Initialisation, restarts: int, threads: int, seed: int
) -> npt.NDArray[np.float32]:
    """k-means on latents (n, d), then on what each level leaves over: codebooks (L, K, d).

    With fewer distinct residuals than codes, the codes left over repeat the first one and are never the nearest.
    """
    residual = latents
    codebooks = np.empty((space.num_levels, space.codebook_size, latents.shape[1]), np.float32)
    for level in range(space.num_levels):
        num_clusters = min(space.codebook_size, len(np.unique(residual.round(5), axis=0)))
        codebooks[level, :num_clusters] = _centres(
            residual, num_clusters, initialisation, restarts, threads, seed + level
        )
        codebooks[level, num_clusters:] = codebooks[level, 0]
        nearest = squared_distances(residual, codebooks[level]).argmin(axis=1)
        residual = residual - codebooks[level][nearest]
    return codebooks


def codebooks_of_codes(items: Standardised, codes: Codes, space: SidSpace) -> npt.NDArray[np.float32]:
    """Codebooks (L, K, D) that describe given codes (N, L): the mean residual of the items with each code.

    So SIDs from elsewhere get a quantiser, and with it SIDs for new items. A code that no item has is put far away.
    """
    codebooks = np.empty((space.num_levels, space.codebook_size, items.width), np.float32)
    for level in range(space.num_levels):
        sums, longest = np.zeros((space.codebook_size, items.width)), 0.0
        for rows in items.batches():
            residual = items.rows(rows)
            for above in range(level):
                residual = residual - codebooks[above][codes[rows, above]]
            np.add.at(sums, codes[rows, level], residual)
            longest = max(longest, float(np.linalg.norm(residual, axis=1).max()))
        counts = np.bincount(codes[:, level], minlength=space.codebook_size)
        codebooks[level] = _FAR * max(longest, 1e-6) / np.sqrt(items.width)
        codebooks[level, counts > 0] = sums[counts > 0] / counts[counts > 0, None]
    return codebooks


def _centres(
    points: Vectors, num_clusters: int, initialisation: Initialisation, restarts: int, threads: int, seed: int
) -> Vectors:
    if initialisation == "constrained":
        chosen = np.random.default_rng(seed).permutation(len(points))[: _BALANCED_SAMPLE * num_clusters]
        share = len(chosen) / num_clusters
        return balanced_kmeans(
            points[chosen], num_clusters, min_size=int(share / 2), max_size=int(np.ceil(2 * share)), seed=seed
        ).centres
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads):
        centres: Vectors = KMeans(num_clusters, n_init=restarts, random_state=seed).fit(points).cluster_centers_
    return centres
