"""Items that go together: the co-occurrence table a bundle carries for fallbacks, by catalogue rank."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from semantic_ids.columns import map_array, save_array
from semantic_ids.trie import Ranks


@dataclass(frozen=True)
class Neighbours:
    """Per item, the ranks that followed or accompanied it in training histories, strongest first."""

    offsets: npt.NDArray[np.int64]  # (N + 1,)
    ranks: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.float32]

    def of_history(self, history: Ranks, decay: float = 0.8, last: int = 20) -> Ranks:
        """Ranks by their summed weight over the last items of `history` (oldest first), the newest counting most."""
        recent = history[-last:][::-1]
        if not len(recent):
            return np.empty(0, np.int64)
        slices = [slice(self.offsets[rank], self.offsets[rank + 1]) for rank in recent]
        ranks = np.concatenate([self.ranks[piece] for piece in slices]).astype(np.int64)
        weights = np.concatenate([self.weights[piece] * decay**age for age, piece in enumerate(slices)])
        unique, place = np.unique(ranks, return_inverse=True)
        return unique[np.argsort(-np.bincount(place, weights, minlength=len(unique)), kind="stable")]

    def save(self, folder: Path) -> None:
        """Write the three columns."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("offsets", "ranks", "weights"):
            save_array(folder, name, getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> "Neighbours":
        """Map a saved table."""
        return cls(*(map_array(folder, name) for name in ("offsets", "ranks", "weights")))
