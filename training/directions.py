"""Item vectors brought to one length, or to the directions in which they vary most."""

import numpy as np

from semantic_ids.quantizer import Vectors


def unit(vectors: Vectors) -> Vectors:
    """Rows (N, D) of length 1; zeros stay zeros."""
    scaled: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return scaled


def strongest_directions(vectors: Vectors, width: int) -> Vectors:
    """Centred vectors (N, D) in the `width` directions in which they vary most, (N, min(D, width))."""
    centred = np.asarray(vectors, np.float32) - vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    strongest: Vectors = centred @ directions[:, : -width - 1 : -1]
    return strongest
