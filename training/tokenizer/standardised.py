"""Item vectors with zero mean and unit variance per dimension, read from disk as they are needed.

Raw unit-norm text vectors collapse to one code under every optimiser; standardised ones do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semantic_ids.quantizer import Vectors

_BATCH = 8192


@dataclass(frozen=True)
class Standardised:
    """Vectors (N, D), perhaps memory-mapped, seen through their own mean and standard deviation."""

    vectors: Vectors
    mean: npt.NDArray[np.float32]  # (D,)
    scale: npt.NDArray[np.float32]  # (D,)

    @classmethod
    def of(cls, vectors: Vectors) -> "Standardised":
        """Take the statistics, batch by batch; a dimension that never varies is left at zero."""
        total, squares = np.zeros(vectors.shape[1]), np.zeros(vectors.shape[1])
        for rows in _batches(len(vectors)):
            total += np.asarray(vectors[rows], np.float64).sum(axis=0)
        mean = total / len(vectors)
        for rows in _batches(len(vectors)):
            squares += ((np.asarray(vectors[rows], np.float64) - mean) ** 2).sum(axis=0)
        scale = np.maximum(np.sqrt(squares / len(vectors)), 1e-6)
        return cls(vectors, mean.astype(np.float32), scale.astype(np.float32))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    def rows(self, rows: "npt.NDArray[np.int64] | slice") -> Vectors:
        """These items' vectors, all dimensions."""
        return (np.asarray(self.vectors[rows], np.float32) - self.mean) / self.scale

    def columns(self, columns: slice) -> Vectors:
        """These dimensions of all items."""
        return (np.asarray(self.vectors[:, columns], np.float32) - self.mean[columns]) / self.scale[columns]

    def batches(self) -> Iterator[slice]:
        """Slices that cover all items."""
        return _batches(len(self))


def _batches(count: int) -> Iterator[slice]:
    return (slice(start, start + _BATCH) for start in range(0, count, _BATCH))
