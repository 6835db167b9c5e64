"""The score: a code's log-probability among the *legal* codes, the children of its prefix in the trie.

A SID's score is the sum over levels. A filter does not enter here, so it can never change a score; a node with one
child gives it exactly 0, so a forced code costs nothing. Training's loss is the same function.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from semantic_ids.trie import Children, Nodes, SidTrie


class EmptyAllowedSetError(RuntimeError):
    """A node without children, or a request without an eligible item, reached decoding. Never "no constraint"."""


@dataclass(frozen=True)
class LegalCodes:
    """The children of M nodes of one level, flat and as a dense mask."""

    children: Children
    mask: Tensor  # (M, K) bool

    @classmethod
    def of(cls, trie: SidTrie, nodes: Nodes, device: torch.device) -> "LegalCodes":
        """What may follow each of M nodes (M,) of one level."""
        children = trie.children(nodes)
        mask = np.zeros((len(nodes), trie.space.codebook_size), np.bool_)
        mask[children.parent, children.code] = True
        return cls(children, torch.from_numpy(mask).to(device))


def legal_log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities over the legal codes of each row, float32; illegal ones are -inf. (M, K), (M, K) → (M, K)."""
    if not bool(mask.any(dim=-1).all()):
        raise EmptyAllowedSetError("a prefix without any legal code reached the model")
    return logits.float().masked_fill(~mask, float("-inf")).log_softmax(dim=-1)
