"""S²GR's thinking steps in training (arXiv 2601.18664): the SID that is asked for is a *branch*.

A history is a plain backbone. Behind each of its prefixes hangs a branch with the steps and the codes of the item that
came next; a mask lets it see its prefix and itself, and nothing sees it. So all items of a sequence are learnt at once,
and a history looks the same whether its model thinks or not.

    backbone   bos a1 b1 a2 b2 a3 b3
    branch 2               +-- step a2 step        sees bos a1 b1; its last tokens predict a2 and b2

In the discrete form all tokens are run at once. In the continuous one a step's input has in it the output at the token
before, so there are passes: the backbone first, then from step to step, all branches together.

What a step is supervised with: which cluster of its level's codes the target's code is in (`StepClusters`), and for the
first step what the user wants in general (`GlobalInterest`). Both are training's alone; a checkpoint is a plain model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from semantic_ids.codes import Codes, TokenIds
from semantic_ids.quantizer import Vectors
from semantic_ids.step_reader import NO_CLUSTER, StepReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPERATURE = 0.1
"""Of the cosines, for clusters and for the general interest."""


@dataclass(frozen=True)
class Tree:
    """Which tokens of a row see which, and where they stand."""

    visible: Tensor  # (B, T, T) bool
    position_ids: Tensor  # (B, T)
    num_backbone: int  # the first tokens of each row, before its branches
    ends: tuple[int, ...]  # of the passes in which tokens are run; of the last one, T
    sources: Tensor  # (B, T) whose output is fed back into each token, of an earlier pass; -1: nobody's

    def to(self, device: torch.device) -> "Tree":
        """The same on a device."""
        names = ("visible", "position_ids", "sources")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True)
class Branches:
    """Rows with a branch for each of their target items."""

    token_ids: Tensor  # (B, T)
    positions: Tensor  # (items, L): whose output predicts each code
    tree: Tree


def with_branches(
    token_ids: Tensor,
    rows: npt.NDArray[np.int64],
    anchors: npt.NDArray[np.int64],
    targets: TokenIds,
    forced: Sequence[Sequence[int]],
    fed_back: Sequence[int] = (),
) -> Branches:
    """Hang a branch on every target: its row (items,), ascending; the last token that it sees there; its codes' tokens.

    `token_ids` (B, T) are the backbones, padded on the right, `anchors` (items,) places in them, `targets` (items, L);
    `forced` and `fed_back` are the prompts'. A row has its backbone, then every pass's part of every branch.
    """
    pattern, predictors = _pattern(targets.shape[1], forced)
    width, num_backbone = len(pattern), token_ids.shape[1]
    is_fed = np.array([token_id in fed_back for _, token_id in pattern])
    pass_of = np.cumsum(is_fed)  # (width,)
    widths = np.bincount(pass_of)  # of a branch, by pass
    number = np.arange(len(rows)) - np.searchsorted(rows, rows)  # of a branch within its row
    ends = num_backbone + int(number.max(initial=-1) + 1) * np.cumsum(widths)
    starts = np.append(num_backbone, ends[:-1])
    within = np.arange(width) - (np.cumsum(widths) - widths)[pass_of]
    places = starts[pass_of] + number[:, None] * widths[pass_of] + within  # (items, width)
    num_slots = int(ends[-1])
    shape = (len(token_ids), num_slots)
    tokens, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    tokens[:, :num_backbone] = token_ids.numpy()
    position_ids[:, :num_backbone] = np.arange(num_backbone)
    for column, (level, token_id) in enumerate(pattern):
        tokens[rows, places[:, column]] = targets[:, level] if token_id is None else token_id
    position_ids[rows[:, None], places] = anchors[:, None] + 1 + np.arange(width)
    visible = np.zeros((*shape, num_slots), np.bool_)
    visible[:, np.arange(num_slots), np.arange(num_slots)] = True  # padding too: what sees nothing is no number
    visible[:, :num_backbone, :num_backbone] = np.tri(num_backbone, dtype=np.bool_)
    visible[rows[:, None], places, :num_backbone] = (np.arange(num_backbone) <= anchors[:, None])[:, None]
    visible[rows[:, None, None], places[:, :, None], places[:, None]] = np.tri(width, dtype=np.bool_)
    predicting = np.where(predictors >= 0, places[:, predictors], anchors[:, None])
    sources = np.full(shape, -1)
    sources[rows[:, None], places[:, is_fed]] = np.column_stack((anchors, places))[:, :-1][:, is_fed]
    tree = Tree(
        torch.from_numpy(visible),
        torch.from_numpy(position_ids),
        num_backbone,
        tuple(ends.tolist()),
        torch.from_numpy(sources),
    )
    return Branches(torch.from_numpy(tokens), torch.from_numpy(predicting), tree)


def _pattern(
    num_levels: int, forced: Sequence[Sequence[int]]
) -> tuple[list[tuple[int, int | None]], npt.NDArray[np.int64]]:
    """A branch's tokens as (level, step token; None: that level's code), and which of them predicts each code.

    -1: the backbone's last token, where no step stands before the first code.
    """
    pattern: list[tuple[int, int | None]] = []
    predictors = []
    for level in range(num_levels):
        pattern += [(level, token_id) for token_id in forced[level]]
        predictors.append(len(pattern) - 1)
        if level + 1 < num_levels:
            pattern.append((level, None))
    return pattern, np.array(predictors, np.int64)


def run_in_passes(model: "PreTrainedModel", embedded: Tensor, tree: Tree) -> Tensor:
    """The outputs (B, T, D) of rows whose tokens are fed those of earlier passes, with the gradient through them all.

    `embedded` (B, T, D) are the tokens' rows.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)  # of keys and values with their graph
    hidden = embedded[:, :0]
    for start, end in pairwise((0, *tree.ends)):
        inputs, sources = embedded[:, start:end], tree.sources[:, start:end, None]
        if start:
            inputs = inputs + hidden.take_along_dim(sources.clamp(min=0), dim=1) * (sources >= 0)
        output = model.base_model(
            inputs_embeds=inputs,
            attention_mask=tree.visible[:, None, start:end, :end],
            position_ids=tree.position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        hidden = torch.cat((hidden, output.last_hidden_state), dim=1)
    return hidden


class StepClusters(nn.Module):
    """Cluster supervision: L_align = -mean log softmax_k(cos(t_l, c_lk) / τ) at the cluster of the target's code.

    The centres come once from k-means over a level's used codes and stay; what stands before a code, a step's output
    or, without steps, whatever predicts the code, is projected to where they are, level by level.
    """

    centres: Tensor  # (L, C, d), unit length
    cluster_of_code: Tensor  # (L, K)

    def __init__(
        self,
        codebooks: npt.NDArray[np.float32],
        codes: Codes,
        num_clusters: int,
        steps: Sequence[int],
        width: int,
        *,
        is_shuffled: bool,
        seed: int,
    ) -> None:
        """`codebooks` (L, K, d), `codes` (N, L) of the catalogue; `steps` as in the prompt. Shuffled: the control."""
        super().__init__()
        num_levels, codebook_size, latent_width = codebooks.shape
        centres = np.zeros((num_levels, num_clusters, latent_width), np.float32)
        cluster_of_code = np.full((num_levels, codebook_size), NO_CLUSTER, np.int64)
        generator = np.random.default_rng((seed, 6))
        for level in range(num_levels):
            used = np.unique(codes[:, level])
            labels = _clusters(np.asarray(codebooks[level][used]), num_clusters, seed, into=centres[level])
            cluster_of_code[level, used] = generator.permutation(labels) if is_shuffled else labels
        self._levels = [level for level in range(num_levels) if not any(steps) or steps[level]]
        self.projection = nn.Parameter(torch.randn(num_levels, width, latent_width) / width**0.5)
        self.register_buffer("centres", functional.normalize(torch.from_numpy(centres), dim=-1), persistent=False)
        self.register_buffer("cluster_of_code", torch.from_numpy(cluster_of_code), persistent=False)

    def forward(self, before_codes: Tensor, codes: Tensor) -> Tensor:
        """The sum over supervised levels of the mean loss: `before_codes` (items, L, D), `codes` (items, L)."""
        losses = []
        for level in self._levels:
            projected = functional.normalize(before_codes[:, level] @ self.projection[level], dim=-1)
            logits = projected @ self.centres[level].T / TEMPERATURE
            losses.append(functional.cross_entropy(logits, self.cluster_of_code[level][codes[:, level]]))
        return torch.stack(losses).sum()

    def reader(self) -> StepReader:
        """What serving reads the steps of the trained model with."""
        return StepReader(
            self.centres.cpu().numpy(),
            self.projection.detach().clone().cpu().numpy(),
            self.cluster_of_code.cpu().numpy().astype(np.int16),
            np.array([TEMPERATURE], np.float32),
        )


class GlobalInterest(nn.Module):
    """What a light decoder over the history says of the next item, and the first step's nearness to that.

    L_InfoNCE of its output with the mean row of the target's codes, among the batch's other items, and
    L_reg = 1 - cos(t_1, sg(v_g)), weighted. Half as deep as the model, and gone after training.
    """

    def __init__(self, model: "PreTrainedModel", weight: float) -> None:
        super().__init__()
        from transformers import AutoModel

        lighter = {"num_hidden_layers": max(1, model.config.num_hidden_layers // 2), "layer_types": None}
        without_words = {"vocab_size": 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
        config = type(model.config)(**model.config.to_dict() | lighter | without_words)
        self.decoder = AutoModel.from_config(config)
        del self.decoder.embed_tokens  # it reads the model's own rows
        self._weight = weight

    def forward(
        self, backbone: Tensor, rows: Tensor, anchors: Tensor, first_step: Tensor, targets: Tensor, ranks: Tensor
    ) -> Tensor:
        """Of embedded backbones (B, T, D), and by item: row, anchor, first step's output, target's row and rank."""
        interest = self.decoder(inputs_embeds=backbone, use_cache=False).last_hidden_state[rows, anchors]  # (items, D)
        logits = functional.normalize(interest, dim=-1) @ functional.normalize(targets, dim=-1).T / TEMPERATURE
        itself = torch.arange(len(ranks), device=ranks.device)
        is_same_item = (ranks[:, None] == ranks) & (itself[:, None] != itself)
        contrast = functional.cross_entropy(logits.masked_fill(is_same_item, float("-inf")), itself)
        nearness = functional.cosine_similarity(first_step, interest.detach(), dim=-1).mean()
        total: Tensor = contrast + self._weight * (1 - nearness)
        return total


def _clusters(vectors: Vectors, num_clusters: int, seed: int, *, into: Vectors) -> npt.NDArray[np.int64]:
    """k-means labels (n,); the centres go to the first rows of `into`. Fewer codes than clusters: each its own."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        fitted = KMeans(min(num_clusters, len(vectors)), n_init=3, random_state=seed).fit(vectors)
    into[: len(fitted.cluster_centers_)] = fitted.cluster_centers_
    labels: npt.NDArray[np.int64] = fitted.labels_.astype(np.int64)
    return labels
