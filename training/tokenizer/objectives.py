"""The tokenizer's loss terms and its one change of distance, as pure functions of tensors.

`B` is this process's share of a batch and `G` the whole batch (the same where there is one process). Contrastive terms
take their negatives from all of `G` and are means over the anchors of all of it, so that the sum over the processes
does not depend on how a batch is shared out. The others are means over their `B` items.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from training.tokenizer.methods import Similarity


def quantisation(residual: Tensor, code_vector: Tensor, commitment: float, *, learns_codes: bool) -> Tensor:
    """One level's `mse(e, sg(r)) + μ mse(sg(e), r)` (LETTER, L_RQ-VAE), of residuals and their codes (B, d).

    Codebooks that move by EMA have no gradient: for them (`learns_codes` off) only the commitment is left.
    """
    loss = commitment * functional.mse_loss(residual, code_vector.detach())
    return loss + functional.mse_loss(code_vector, residual.detach()) if learns_codes else loss


def contrastive(
    anchors: Tensor, candidates: Tensor, positive: Tensor, usable: Tensor, similarity: Similarity, temperature: float
) -> Tensor:
    """`-mean log softmax_j(sim(a_i, c_j))[positive_i]` over anchors (B, d) and candidates (G, d).

    `positive` (B,) names each anchor's own candidate. `usable` (G,) says which candidates count at all; an anchor
    whose own does not is left out. The mean is over the usable candidates, each of which is some process's anchor;
    with none it is 0. "dot" is the published collaborative alignment
    (LETTER, L_CF): raw products and no temperature; "cosine" normalises both sides and divides by the temperature.
    """
    if similarity == "cosine":
        anchors, candidates = functional.normalize(anchors, dim=1), functional.normalize(candidates, dim=1)
    logits = anchors @ candidates.T / (temperature if similarity == "cosine" else 1.0)  # (B, G)
    logits = logits.masked_fill(~usable, -torch.inf)
    counted = usable[positive]
    if not counted.any():
        return anchors.sum() * 0.0
    return functional.cross_entropy(logits[counted], positive[counted], reduction="sum") / usable.sum()


@dataclass(frozen=True)
class CodeClusters:
    """Clusters of one level's codes, laid out so that a code's companion is one look-up."""

    members: Tensor  # (K,) codes, cluster after cluster
    start: Tensor  # (K,) where the cluster of code k begins in `members`
    size: Tensor  # (K,) how many codes that cluster has, at least 2
    place: Tensor  # (K,) where code k stands within its cluster

    @classmethod
    def of(cls, labels: Tensor) -> "CodeClusters":
        """From the cluster of each code, (K,). A cluster of one code has no companion to offer: ValueError."""
        sizes = torch.bincount(labels)
        if (sizes == 1).any():
            raise ValueError(f"clusters of codes have sizes {sizes.tolist()}: each needs two members or more")
        members = torch.argsort(labels, stable=True)
        start = (sizes.cumsum(0) - sizes)[labels]
        place = torch.empty_like(labels)
        place[members] = torch.arange(len(labels), device=labels.device) - start[members]
        return cls(members, start, sizes[labels], place)

    def companions(self, codes: Tensor, uniform: Tensor) -> Tensor:
        """A random *other* code of the same cluster for each code (B,), from numbers (B,) uniform in [0, 1)."""
        size = self.size[codes]
        pick = (uniform * (size - 1)).long().clamp(max=size - 2)
        pick = pick + (pick >= self.place[codes]).long()
        return self.members[self.start[codes] + pick]


def diversity(codebook: Tensor, codes: Tensor, companions: Tensor) -> Tensor:
    """`-mean log softmax_{j≠c}(e_c · e_j)[companion]` (LETTER, L_Div), of a codebook (K, d) and codes (B,).

    Codes of one cluster attract and all others repel. The gradient reaches the codebook only.
    """
    logits = codebook[codes] @ codebook.T  # (B, K)
    return functional.cross_entropy(logits.scatter(1, codes[:, None], -torch.inf), companions)


def uniformity(codebook: Tensor, threshold: float) -> Tensor:
    """`mean_{i≠j} relu(δ - ‖e_i - e_j‖)²` (S²GR's CoBa): codes (K, d) nearer than the threshold repel each other."""
    num_codes = len(codebook)
    distances = functional.pdist(codebook)  # each pair once; its gradient at distance 0 is 0, not NaN
    return 2.0 * functional.relu(threshold - distances).square().sum() / (num_codes * (num_codes - 1))


def load_balanced(distances: Tensor, counts: Tensor, strength: float, bound: float) -> Tensor:
    """Distances (B, K) with rare codes brought nearer and frequent ones moved away (S²GR's CoBa).

    `d · clip(1 + g log((n_j + 1) / (mean(n) + 1)), 1 - ρ, 1 + ρ)` with g `strength`, ρ `bound`, n `counts` (K,).
    """
    factor = 1.0 + strength * torch.log((counts + 1.0) / (counts.mean() + 1.0))
    return distances * factor.clamp(1.0 - bound, 1.0 + bound)
