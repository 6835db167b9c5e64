"""Who gets which code when not everybody can have the nearest: balanced clusters, Sinkhorn, and unique SIDs.

Everything here depends on distances and the given order of items alone, never on their ids.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from semantic_ids.codes import Codes, SidError
from semantic_ids.quantizer import ResidualQuantizer, Vectors, squared_distances
from semantic_ids.trie import SidTrie, sid_keys
from training.tokenizer.methods import Repair

SMALLEST_EPSILON = 0.0015  # exp(1 / 0.0014) is beyond float64
SINKHORN_ROUNDS = 20  # of the published repair (LETTER's code)


@torch.no_grad()
def sinkhorn(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes (B,) of a balanced transport plan for distances (B, K): every code is wanted about equally often.

    Sinkhorn-Knopp on distances centred and scaled to [-1, 1], as in LETTER's code (ε 0.003, 50 iterations).
    """
    if epsilon < SMALLEST_EPSILON:
        raise ValueError(f"Sinkhorn's epsilon {epsilon} is below {SMALLEST_EPSILON}: its exponentials would overflow")
    distances = distances.double()  # exp(1 / 0.003) is beyond float32
    low, high = distances.min(), distances.max()
    middle, reach = (high + low) / 2, ((high - low) / 2).clamp(min=1e-12)
    plan = torch.exp(-(distances - middle) / reach / epsilon)
    num_items, num_codes = plan.shape
    plan = plan / plan.sum()
    for _ in range(iterations):
        plan = plan / plan.sum(dim=0, keepdim=True).clamp(min=1e-300) / num_codes
        plan = plan / plan.sum(dim=1, keepdim=True).clamp(min=1e-300) / num_items
    return plan.argmax(dim=1)


def assign_within_sizes(costs: npt.NDArray[np.floating], min_size: int, max_size: int) -> npt.NDArray[np.int64]:
    """The cheapest assignment of rows to columns, (n, C) → (n,), that gives each column min_size to max_size rows.

    Exact (scipy's Hungarian solver on one slot per place). ValueError where no assignment can keep the sizes.
    """
    num_rows, num_columns = costs.shape
    if not min_size * num_columns <= num_rows <= max_size * num_columns:
        raise ValueError(f"{num_rows} rows cannot fill {num_columns} columns with {min_size} to {max_size} each")
    # Places that must be filled are so much cheaper than the others that all of them are taken.
    must_fill = costs - num_rows * (np.ptp(costs) + 1.0)
    slots = np.concatenate([np.tile(must_fill, (1, min_size)), np.tile(costs, (1, max_size - min_size))], axis=1)
    rows, columns = linear_sum_assignment(slots)
    assigned = np.empty(num_rows, np.int64)
    assigned[rows] = columns % num_columns
    return assigned


@dataclass(frozen=True)
class Clusters:
    """k-means' answer."""

    centres: Vectors  # (C, d)
    labels: npt.NDArray[np.int64]  # (n,)


def balanced_kmeans(
    points: Vectors, num_clusters: int, *, min_size: int, max_size: int, seed: int, iterations: int = 10
) -> Clusters:
    """k-means whose clusters have min_size to max_size of the points (n, d) each; k-means++ start."""
    from sklearn.cluster import kmeans_plusplus

    centres, _ = kmeans_plusplus(points, num_clusters, random_state=seed)
    labels = np.full(len(points), -1)
    for _ in range(iterations):
        before = labels
        labels = assign_within_sizes(squared_distances(points, centres).astype(np.float64), min_size, max_size)
        if (labels == before).all():
            break
        sums = np.zeros((num_clusters, points.shape[1]))
        np.add.at(sums, labels, points)
        sizes = np.bincount(labels, minlength=num_clusters)[:, None]
        centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres).astype(np.float32)
    return Clusters(centres, labels)


def make_unique(repair: Repair, quantizer: ResidualQuantizer, vectors: Vectors, codes: Codes, seed: int) -> Codes:
    """Codes (N, L) with as few shared SIDs as the repair leaves; only last codes of crowded prefixes change.

    "hungarian": exact, least total distance. "random": all but one item of a shared SID get a random free last code
    (GR2). With both, what a prefix of more than K items cannot hold goes to the nearest prefix with room, as a new item
    would. "sinkhorn": LETTER's published rounds; what still collides after 20 keeps its shared SID.
    """
    if repair == "none":
        return codes
    if repair == "sinkhorn":
        return _sinkhorn_rounds(quantizer, vectors, codes)
    repaired = codes.copy()
    generator = np.random.default_rng(seed)
    for members in _crowded_prefixes(quantizer, codes):
        if repair == "random":
            repaired[members, -1] = _random_free(codes[members, -1], quantizer.space.codebook_size, generator)
        else:
            distances = last_distances(quantizer, vectors, codes, members)
            repaired[members, -1] = _cheapest_distinct(distances)
    return _moved_out_of_full_prefixes(quantizer, vectors, repaired)


def last_distances(
    quantizer: ResidualQuantizer, vectors: Vectors, codes: Codes, items: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Squared distances (len(items), K) of these items' last residuals to the last level's codes."""
    residuals = quantizer.last_residuals(np.asarray(vectors[items], np.float32), codes[items])
    return np.maximum(squared_distances(residuals, quantizer.codebooks[-1]), 0.0)


def _crowded_prefixes(quantizer: ResidualQuantizer, codes: Codes) -> list[npt.NDArray[np.int64]]:
    """For each prefix of L-1 codes under which some SID is shared: all its items, ascending."""
    space = quantizer.space
    _, sid, counts = np.unique(sid_keys(space, codes), return_inverse=True, return_counts=True)
    if space.num_levels > 1:
        _, group = np.unique(codes[:, :-1], axis=0, return_inverse=True)
        group = group.reshape(-1)
    else:
        group = np.zeros(len(codes), np.int64)
    members_of = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    return [members_of[prefix] for prefix in np.unique(group[counts[sid] > 1])]


def _cheapest_distinct(distances: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Distinct codes (n,) at the least total distance (n, K); with n > K every code is taken ⌊n/K⌋ or ⌈n/K⌉ times."""
    num_items, num_codes = distances.shape
    return assign_within_sizes(distances.astype(np.float64), num_items // num_codes, -(-num_items // num_codes))


def _moved_out_of_full_prefixes(quantizer: ResidualQuantizer, vectors: Vectors, codes: Codes) -> Codes:
    """Of the items that still share a SID all but the nearest move on, where anything is free under their L-2 codes."""
    space = quantizer.space
    keys = sid_keys(space, codes)
    _, sid, counts = np.unique(keys, return_inverse=True, return_counts=True)
    sharing = np.flatnonzero(counts[sid] > 1)
    if not len(sharing):
        return codes
    distances = last_distances(quantizer, vectors, codes, sharing)[np.arange(len(sharing)), codes[sharing, -1]]
    by_distance = sharing[np.argsort(distances, kind="stable")]
    _, nearest = np.unique(keys[by_distance], return_index=True)
    leaving = np.sort(np.delete(by_distance, nearest))
    moved = codes.copy()
    _, group = np.unique(codes[leaving, : max(space.num_levels - 2, 0)], axis=0, return_inverse=True)
    for members in (leaving[group.reshape(-1) == number] for number in range(int(group.max()) + 1)):
        taken = SidTrie.build(space, np.delete(moved, members, axis=0))
        with contextlib.suppress(SidError):  # nothing is free there: they go on sharing, and are counted
            moved[members] = quantizer.assign_new(np.asarray(vectors[members], np.float32), taken)
    return moved


def _random_free(
    last_codes: npt.NDArray[np.uint16], codebook_size: int, generator: np.random.Generator
) -> npt.NDArray[np.uint16]:
    """One random holder of each code keeps it; the others draw among the free ones, as far as these reach."""
    order = generator.permutation(len(last_codes))
    _, first = np.unique(last_codes[order], return_index=True)
    is_displaced = np.ones(len(last_codes), np.bool_)
    is_displaced[order[first]] = False
    free = generator.permutation(np.setdiff1d(np.arange(codebook_size), last_codes))
    displaced = generator.permutation(np.flatnonzero(is_displaced))[: len(free)]
    drawn = last_codes.copy()
    drawn[displaced] = free[: len(displaced)]
    return drawn


def _sinkhorn_rounds(quantizer: ResidualQuantizer, vectors: Vectors, codes: Codes) -> Codes:
    """LETTER's repair: the items that collide are assigned anew with Sinkhorn on the last level, round after round."""
    codes = codes.copy()
    for _ in range(SINKHORN_ROUNDS):
        _, sid, counts = np.unique(sid_keys(quantizer.space, codes), return_inverse=True, return_counts=True)
        colliding = np.flatnonzero(counts[sid] > 1)
        if not len(colliding):
            break
        for group in np.split(colliding[np.argsort(sid[colliding], kind="stable")], np.cumsum(counts[counts > 1])[:-1]):
            distances = torch.from_numpy(last_distances(quantizer, vectors, codes, group))
            codes[group, -1] = sinkhorn(distances, epsilon=0.003, iterations=50).numpy()
    return codes
