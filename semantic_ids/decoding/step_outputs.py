"""Listens to a beam: what stood before the codes of the items that it found.

The beam keeps no past; this keeps the tensors that it has at each level anyway, and copies nothing until it is asked.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from semantic_ids.quantizer import Vectors
from semantic_ids.trie import ROOT, Nodes, SidTrie


class StepOutputs:
    """`on_level` of one `constrained_beam`."""

    def __init__(self) -> None:
        self._levels: list[tuple[npt.NDArray[np.int64], Nodes, Tensor]] = []

    def __call__(self, request: npt.NDArray[np.int64], node: Nodes, hidden: Tensor) -> None:
        """The beams (M,) of the next level: their request, their prefix, and the output (M, D) that chooses a code."""
        self._levels.append((request, node, hidden))

    def of(self, trie: SidTrie, request: int, rank: int) -> list[Vectors | None]:
        """The output that chose each code of an item which `request` found, L entries.

        None where nothing was run, because the codes before leave one SID, and where no beam stood there.
        """
        prefixes = [ROOT, *trie.path_of_rank(np.array([rank]))[0, :-1].tolist()]
        return [self._before(trie, request, prefix, level) for level, prefix in enumerate(prefixes)]

    def _before(self, trie: SidTrie, request: int, prefix: int, level: int) -> Vectors | None:
        if level:
            first_leaf, end_leaf = trie.leaf_range(np.array([prefix]), level - 1)
            if end_leaf[0] - first_leaf[0] == 1:
                return None
        requests, nodes, hidden = self._levels[level]
        places = np.flatnonzero((requests == request) & (nodes == prefix))
        if not len(places):
            return None
        output: Vectors = hidden[int(places[0])].float().cpu().numpy()
        return output
