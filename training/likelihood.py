"""The score of items under a model in training: what serving ranks by, with a gradient.

Per code, the log-softmax over the legal codes of its prefix; so what is trained is exactly the likelihood of the item.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidVocabulary
from semantic_ids.trie import ROOT
from training.distillation import TeacherLists, teacher_log_likelihood
from training.examples import Batch, Examples, TargetSplit, prompt_windows
from training.item_memory import memory_of, rows_of
from training.legal_softmax import child_log_probs, temperature_of
from training.processes import Processes
from training.sft_config import SftConfig
from training.stepwise import run_in_passes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def item_log_likelihood(model: "PreTrainedModel", catalog: Catalog, vocabulary: SidVocabulary, batch: Batch) -> Tensor:
    """Score of each target item, (items,): the sum over levels of its code's log-probability among the legal codes."""
    return log_likelihoods(model, catalog, vocabulary, batch)[0]


def log_likelihoods(
    model: "PreTrainedModel",
    catalog: Catalog,
    vocabulary: SidVocabulary,
    batch: Batch,
    teacher: TeacherLists | None = None,
) -> tuple[Tensor, Tensor]:
    """Score of each target item, (items,), and of what the teacher expects along its path; 0 without a teacher."""
    before_codes = batch.before_codes(hidden_states(model, batch))
    return scores_of_targets(before_codes, model, catalog, vocabulary, batch.ranks, teacher)


def hidden_states(model: "PreTrainedModel", batch: Batch) -> Tensor:
    """The model's outputs over a batch's rows, (B, T, D), with the tables as they were baked last (`bake`)."""
    embedded, tree = embed(model, batch.token_ids), batch.tree
    if tree is not None and len(tree.ends) > 1:
        return run_in_passes(model, embedded, tree)
    seen = {} if tree is None else {"attention_mask": tree.visible[:, None], "position_ids": tree.position_ids}
    hidden: Tensor = model.base_model(inputs_embeds=embedded, use_cache=False, **seen).last_hidden_state
    return hidden


def bake(model: "PreTrainedModel") -> None:
    """Make tables that come from an item memory what its parameters are now; those of others need nothing."""
    if (memory := memory_of(model)) is not None:
        memory.bake(model)


def scores_of_targets(
    before_codes: Tensor,
    model: "PreTrainedModel",
    catalog: Catalog,
    vocabulary: SidVocabulary,
    ranks: npt.NDArray[np.int64],
    teacher: TeacherLists | None = None,
) -> tuple[Tensor, Tensor]:
    """As `log_likelihoods`, of targets (items,) whose outputs (items, L, D) are there already."""
    path = catalog.trie.path_of_rank(ranks)  # (items, L)
    all_paths = catalog.trie.path_of_rank(np.arange(len(catalog))) if teacher is not None else path  # (N, L)
    head = model.get_output_embeddings()
    total, expected = torch.zeros(2, len(path), device=before_codes.device)
    for level, hidden in enumerate(before_codes.unbind(dim=1)):
        prefix = path[:, level - 1] if level else np.full(len(path), ROOT)
        open_items = np.flatnonzero(~catalog.trie.has_one_child(prefix))  # what is forced adds exactly 0
        if not len(open_items):
            continue
        block = vocabulary.block(level)
        places = torch.from_numpy(open_items).to(hidden.device)
        prefix, node = prefix[open_items], path[open_items, level]
        scores = child_log_probs(
            hidden.index_select(0, places),
            head.weight,
            getattr(head, "bias", None),
            catalog.trie,
            prefix,
            rows_of(model, torch.arange(block.start, block.stop, device=hidden.device)),
            temperature_of(model),
        )
        total = total.index_add(0, places, scores.of(node))
        if teacher is not None:
            of_teacher = teacher_log_likelihood(scores, teacher.select(open_items), all_paths, prefix, level, node)
            expected = expected.index_add(0, places, of_teacher)
    return total, expected


@torch.inference_mode()
def mean_target_log_likelihood(
    model: "PreTrainedModel", examples: Examples, split: TargetSplit, config: SftConfig, processes: Processes
) -> float:
    """Mean score of the split's targets after the prompts that serving would make; processes share the users."""
    model.train(False)
    bake(model)
    windows = prompt_windows(split.histories, split.targets, examples.renderer.spec.max_history)
    total = torch.zeros((), dtype=torch.float64)
    for users in np.array_split(
        np.argsort(windows.lengths, kind="stable"), max(1, -(-len(windows) // config.batch_size))
    ):
        mine = users[processes.share(len(users))]
        # Of a model in shards no process may leave a batch out: it gives its part to the others.
        batch = examples.batch_of_last(windows.select(mine if len(mine) else users[:1])).to(model.device)
        scores = item_log_likelihood(model, examples.catalog, examples.vocabulary, batch)
        total += float(scores.sum()) if len(mine) else 0.0
    return float(processes.sum(total)) / len(windows)


def embed(model: "PreTrainedModel", token_ids: Tensor) -> Tensor:
    """The input rows of tokens, (…) → (…, D), with what a model's training does to them."""
    embedded: Tensor = model.get_input_embeddings()(rows_of(model, token_ids))
    return embedded
