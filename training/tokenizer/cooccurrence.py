"""What users did together, as a graph of items, and item vectors mixed along it. Training interactions only."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap
from scipy import sparse

from semantic_ids.quantizer import Vectors
from training.collaborative import forward_cooccurrence
from training.sequences import Sequences
from training.tokenizer.standardised import Standardised

_COLUMNS_AT_ONCE = 32  # of the vectors: bounds the memory of propagation at 32 floats an item, a few times over


def item_graph(train: Sequences, num_items: int, window: int) -> sparse.csr_array:
    """Symmetric counts (N, N): how often two items came within `window` events of each other; no self-loops."""
    forward = forward_cooccurrence(train, num_items, window, distance_power=0.0)
    graph = sparse.csr_array(forward + forward.T)
    graph.setdiag(0)
    graph.eliminate_zeros()
    return graph


def hop_weights(alpha: float, hops: int) -> npt.NDArray[np.float64]:
    """β_k = α(1-α)^k / Σ_j α(1-α)^j of S²GR, for k = 0 … hops."""
    weights: npt.NDArray[np.float64] = (1.0 - alpha) ** np.arange(hops + 1, dtype=np.float64)
    return np.asarray(weights / weights.sum())


def propagate(items: Standardised, graph: sparse.csr_array, *, alpha: float, hops: int, path: Path) -> Vectors:
    """The items' vectors (N, D) mixed along the graph, standardised anew, memory-mapped at `path`.

    S²GR: H⁰ = X, Hᵏ = (1-α) Â Hᵏ⁻¹ + α X, result Σ βₖ Hᵏ. Â has self-loops and rows that sum to 1, where the paper
    divides by both degrees, so that isolated items do not shrink and hubs do not grow. (A mean of many unrelated
    vectors is still shorter than one of few: for random ones by a tenth at most, from the least to the most connected
    fifth.) Averaging shrinks the variance, which is brought back to 1 per dimension over the items with edges; an
    item without an edge keeps its own vector, exactly as a new item will have it.
    """
    looped = sparse.csr_array(graph + sparse.eye_array(graph.shape[0], format="csr"))
    normalised = sparse.csr_array(sparse.diags_array(1.0 / looped.sum(axis=1)) @ looped).astype(np.float32)
    has_edge = np.diff(graph.indptr) > 0
    weights = hop_weights(alpha, hops)
    shape = (len(items), items.width)
    mixed: np.memmap[Any, np.dtype[np.float32]] = open_memmap(path, mode="w+", dtype=np.float32, shape=shape)  # type: ignore[no-untyped-call]
    for start in range(0, items.width, _COLUMNS_AT_ONCE):
        columns = slice(start, start + _COLUMNS_AT_ONCE)
        own = items.columns(columns)
        reached, total = own, weights[0] * own
        for weight in weights[1:]:
            reached = (1.0 - alpha) * (normalised @ reached) + alpha * own
            total = total + weight * reached
        if has_edge.any():
            connected = total[has_edge]
            total = (total - connected.mean(axis=0)) / np.maximum(connected.std(axis=0), 1e-6)
        mixed[:, columns] = np.where(has_edge[:, None], total, own)
    mixed.flush()
    return np.asarray(mixed)


class Partners:
    """Draws, for an item, another that users touched near it, in proportion to how often they did."""

    def __init__(self, graph: sparse.csr_array) -> None:
        self._graph = graph
        self._cumulative = np.concatenate(([0.0], np.cumsum(graph.data)))

    def has_any(self, items: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which items have a neighbour at all."""
        has_neighbour: npt.NDArray[np.bool_] = self._graph.indptr[items + 1] > self._graph.indptr[items]
        return has_neighbour

    def draw(self, items: npt.NDArray[np.int64], uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """One neighbour for each item, from numbers uniform in [0, 1); an item without neighbours gets itself."""
        first, end = self._graph.indptr[items], self._graph.indptr[items + 1]
        low, high = self._cumulative[first], self._cumulative[end]
        edge = np.searchsorted(self._cumulative, low + uniform * (high - low), side="right") - 1
        edge = np.clip(edge, first, np.maximum(end - 1, first))
        has_any = end > first
        return np.where(has_any, self._graph.indices[np.where(has_any, edge, 0)] if len(self._graph.data) else 0, items)
