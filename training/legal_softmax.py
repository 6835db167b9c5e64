"""Training's softmax over the legal codes: `semantic_ids.decoding.legal`'s score, computed for the children alone.

Decoding masks all K codes of a level. Training scores thousands of prefixes at a time, most of them with few children,
so here only the children's rows of the head are multiplied: a level of one code per item costs no more than another.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semantic_ids.decoding.legal import EmptyAllowedSetError
from semantic_ids.trie import Nodes, SidTrie

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def set_temperature(model: "PreTrainedModel", temperature: float) -> None:
    """Train `model` by a softmax at temperature τ: LETTER's ranking-guided generation loss (arXiv 2405.07314).

    What is saved has it in its head (`item_memory.plain_state`), so that whoever decodes it ranks by what was trained.
    """
    model.get_output_embeddings().sid_temperature = temperature


def temperature_of(model: "PreTrainedModel") -> float:
    """τ of a model in training; 1 of any other."""
    return float(getattr(model.get_output_embeddings(), "sid_temperature", 1.0))


@dataclass(frozen=True)
class ChildLogProbs:
    """Log-probabilities over the children of P prefixes of one level; a child's column is its node less the first's."""

    log_probs: Tensor  # (P, M) float32; -inf behind a prefix's last child
    first_child: Nodes  # (P,)

    def of(self, nodes: Nodes) -> Tensor:
        """The log-probability of one child of each prefix, (P,) → (P,)."""
        column = torch.from_numpy(nodes - self.first_child).to(self.log_probs.device)
        return self.log_probs.gather(1, column[:, None])[:, 0]


def child_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trie: SidTrie,
    prefix: Nodes,
    row_of_code: Tensor | None = None,
    temperature: float = 1.0,
) -> ChildLogProbs:
    """Softmax over the children of each prefix, of logits divided by `temperature`.

    `hidden` (P, D) predicts the code behind `prefix` (P,), nodes of one level, from a head, `weight` (R, D) and `bias`
    (R,), in which the next level's codes stand at `row_of_code` (K,); absent: at themselves. Prefixes are taken
    together, so that each one's rows are read once.
    """
    distinct, group = np.unique(prefix, return_inverse=True)
    codes, is_legal, first_child = _padded_children(trie, distinct, hidden.device)
    num_prefixes, most_children = codes.shape
    place, most_rows = _places(group, num_prefixes)
    place, group_of_row = place.to(hidden.device), torch.from_numpy(group).to(hidden.device)
    padded = hidden.new_zeros(num_prefixes * most_rows, hidden.shape[1]).index_copy_(0, place, hidden)
    codes = codes if row_of_code is None else row_of_code[codes]
    rows = weight.index_select(0, codes.ravel()).view(num_prefixes, most_children, -1)
    vectors = padded.view(num_prefixes, most_rows, -1).transpose(1, 2)
    # Rows first: so their gradient, the largest tensor here, comes as they lie and is not copied.
    logits = torch.bmm(rows, vectors).transpose(1, 2)  # (prefixes, rows, children)
    if bias is not None:
        logits = logits + bias[codes][:, None]
    chosen = logits.flatten(0, 1).index_select(0, place).float()  # (P, M)
    chosen = chosen if temperature == 1 else chosen / temperature
    log_probs = chosen.masked_fill(~is_legal[group_of_row], float("-inf")).log_softmax(dim=-1)
    return ChildLogProbs(log_probs, first_child[group])


def _padded_children(trie: SidTrie, nodes: Nodes, device: torch.device) -> tuple[Tensor, Tensor, Nodes]:
    """Codes of the children of U nodes (U, M), which of them are real, and each node's first child (U,)."""
    children = trie.children(nodes)
    counts = np.bincount(children.parent, minlength=len(nodes))
    if not counts.all():
        raise EmptyAllowedSetError("a prefix without any legal code reached the model")
    start = np.cumsum(counts) - counts
    column = np.arange(len(children.parent)) - start[children.parent]
    codes, is_legal = np.zeros((len(nodes), counts.max()), np.int64), np.zeros((len(nodes), counts.max()), np.bool_)
    codes[children.parent, column], is_legal[children.parent, column] = children.code, True
    return torch.from_numpy(codes).to(device), torch.from_numpy(is_legal).to(device), children.node[start]


def _places(group: npt.NDArray[np.intp], num_groups: int) -> tuple[Tensor, int]:
    """Where each row stands when every group is padded to the largest, (P,), and that size."""
    sizes = np.bincount(group, minlength=num_groups)
    order = np.argsort(group, kind="stable")
    place = np.empty(len(group), np.int64)
    place[order] = group[order] * sizes.max() + np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group[order]]
    return torch.from_numpy(place), int(sizes.max())
