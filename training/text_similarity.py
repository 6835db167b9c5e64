"""What the items' text alone recommends: a baseline for items that nobody has met. Knows vectors, no SID, no model."""

import numpy as np
import numpy.typing as npt
from scipy import sparse

from training.collaborative import last_of_each
from training.directions import unit
from training.sequences import Sequences

LAST_ITEMS = 5
"""Of a history: few enough that one taste is meant, and more than one listing's wording."""


class TextSimilarity:
    """Every item's score is the cosine of its text vector and the mean of those of the history's last items."""

    def __init__(self, vectors: npt.NDArray[np.float32]) -> None:
        """`vectors` (N, D), of any length; an item of vector 0 is like no other."""
        self._unit = unit(np.asarray(vectors, np.float32))

    def scores(self, histories: Sequences) -> npt.NDArray[np.float32]:
        """Cosines (B, N); all 0 for an empty history."""
        recent = last_of_each(histories, LAST_ITEMS)
        shape = (len(recent), len(self._unit))
        weights = sparse.csr_array((np.ones(len(recent.items), np.float32), recent.items, recent.offsets), shape=shape)
        scores: npt.NDArray[np.float32] = unit(weights @ self._unit) @ self._unit.T
        return scores
