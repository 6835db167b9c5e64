"""The method `clustered`: what an item is like as the first code, and the item itself as the second.

The first code is one of C k-means clusters of text and SASRec vectors side by side, none much larger than the others;
the second is the item's own, which no other item has. A model so has one row for each item, as SASRec has, and still
reads and writes two codes: P(item) = P(cluster) · P(item | cluster). Its codebook is as large as the catalogue.
"""

import numpy as np
import numpy.typing as npt

from semantic_ids.codes import MAX_CODEBOOK_SIZE, Codes, SidSpace
from semantic_ids.quantizer import Vectors, squared_distances
from training.directions import strongest_directions, unit
from training.stage import StageError

NUM_LEVELS = 2
TEXT_WIDTH = 64
"""Of the text vectors' strongest directions: as many as SASRec's vectors have."""

_RESTARTS = 2
_LARGEST_CLUSTER = 1.7  # times the mean size: a level of a few large clusters would say little


def clustered_codes(
    text: Vectors, collaborative: Vectors | None, weight: float, threads: int, seed: int
) -> tuple[SidSpace, Codes]:
    """Codes (N, 2) of N items by text vectors (N, D) and, times `weight`, SASRec's (N, any width); zeros: not known.

    `StageError` for more items than a codebook can have.
    """
    num_items = len(text)
    if num_items > MAX_CODEBOOK_SIZE:
        raise StageError(
            f"the method clustered gives every item a code of its own, at most {MAX_CODEBOOK_SIZE:,}, and here are "
            f"{num_items:,} items: take another tokenizer.method"
        )
    points = unit(strongest_directions(text, TEXT_WIDTH))
    if collaborative is not None:
        points = np.concatenate([points, weight * unit(collaborative)], axis=1)
    cluster = capped_clusters(points, default_num_clusters(num_items), threads, seed)
    codes = np.empty((num_items, NUM_LEVELS), np.uint16)
    codes[:, 0] = cluster
    codes[np.argsort(cluster, kind="stable"), 1] = np.arange(num_items)  # neighbours in a table are in one cluster
    return SidSpace(NUM_LEVELS, max(2, num_items)), codes


def default_num_clusters(num_items: int) -> int:
    """The power of two next to √N: then a level has about as many choices as the other."""
    return int(min(num_items, 2 ** round(np.log2(np.sqrt(num_items)))))


def capped_clusters(points: Vectors, num_clusters: int, threads: int, seed: int) -> npt.NDArray[np.int64]:
    """k-means clusters (N,) of points (N, d), each of at most 1.7 times the mean size.

    Where a cluster would be larger it keeps its nearest points, and the others go to the next nearest one with room.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads):
        centres = KMeans(num_clusters, n_init=_RESTARTS, random_state=seed).fit(points).cluster_centers_
    distances = squared_distances(points, centres.astype(np.float32))
    return _stable_assignment(distances, int(np.ceil(_LARGEST_CLUSTER * len(points) / num_clusters)))


def _stable_assignment(distances: npt.NDArray[np.float32], most: int) -> npt.NDArray[np.int64]:
    """Deferred acceptance: rows (N, C) propose to columns from the nearest on, a column keeps its `most` nearest.

    No row is nearer to another column that keeps a farther one. Equal distances by the rows' order.
    """
    num_rows, num_columns = distances.shape
    preference = np.argsort(distances, axis=1, kind="stable")
    next_choice = np.zeros(num_rows, np.int64)
    assigned = np.full(num_rows, -1)
    while len(free := np.flatnonzero(assigned < 0)):
        assigned[free] = preference[free, next_choice[free]]
        next_choice[free] += 1
        order = np.lexsort((distances[np.arange(num_rows), assigned], assigned))
        start = np.searchsorted(assigned[order], np.arange(num_columns))
        place = np.arange(num_rows) - start[assigned[order]]
        assigned[order[place >= most]] = -1
    return assigned
