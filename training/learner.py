"""A generator and all that changes it: the loss of a batch, what supervises it, optimiser, schedule, average."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from training.distillation import Continuations, TeacherLists
from training.examples import Batch, Examples
from training.item_memory import KnownItems
from training.likelihood import bake, embed, hidden_states, scores_of_targets
from training.moving_average import MovingAverage
from training.sft_config import SftConfig
from training.stepwise import GlobalInterest, StepClusters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Teaching:
    """What a model may learn from beside the sequences, by catalogue rank; each where a setting asks for it."""

    known: KnownItems | None = None  # item_memory
    lists: TeacherLists | None = None  # distillation: one for each event of the training sequences
    continuations: Continuations | None = None
    codebooks: npt.NDArray[np.float32] | None = None  # step_clusters: (L, K, d) of the quantiser


NOTHING_ELSE = Teaching()


class Learner:
    """A model and all that changes it, step by step."""

    def __init__(
        self, config: SftConfig, model: "PreTrainedModel", examples: "Examples", teaching: Teaching, total_steps: int
    ) -> None:
        self._config = config
        self._model = model
        self._examples = examples
        self._supervision = _Supervision.of(config, model, examples, teaching)
        self._trained = model if self._supervision is None else nn.ModuleList([model, self._supervision])
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(self._trained, config), lr=config.learning_rate, betas=(0.9, 0.98), fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _warmup_cosine(step, total_steps, config.warmup_share)
        )
        parameters = self._trained.parameters()
        self._average = MovingAverage(parameters, config.moving_average) if config.moving_average else None

    def step(self, batch: "Batch", lists: TeacherLists | None, lesson: "tuple[Batch, TeacherLists] | None") -> float:
        """Learn from a batch, its teacher's lists and a lesson; the batch's mean loss.

        A loss that is no number changes nothing.
        """
        self._optimizer.zero_grad()
        bake(self._model)
        with self._autocast():
            hidden = hidden_states(self._model, batch)
            log_likelihood, expected = self._log_likelihoods(hidden, batch, lists)
            loss = -log_likelihood.mean()
            if not math.isfinite(loss.item()):
                return loss.item()
            total = torch.lerp(loss, -expected.mean(), self._config.distillation)
            if self._supervision is not None:
                total = total + self._supervision(self._model, self._examples, hidden, batch)
            if lesson is not None:
                batch, lists = lesson
                _, expected = self._log_likelihoods(hidden_states(self._model, batch), batch, lists)
                total = total - expected.mean()
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(self._trained.parameters(), self._config.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        if self._average is not None:
            self._average.update()
        return loss.item()

    def kept_weights(self) -> AbstractContextManager[None]:
        """The model has the weights that are validated and kept: the average, where there is one."""
        return self._average.in_place() if self._average is not None else nullcontext()

    def save(self, path: Path, epoch: int, progress: dict[str, Any]) -> None:
        """A checkpoint after an epoch."""
        average = {"moving_average": self._average.state()} if self._average is not None else {}
        save_checkpoint(
            path,
            model=self._trained,
            optimizer=self._optimizer,
            scheduler=self._schedule,
            step=epoch,
            extra=progress | average,
        )

    def load(self, path: Path) -> Checkpoint | None:
        """Go on from a checkpoint, if there is one."""
        state = load_checkpoint(path, model=self._trained, optimizer=self._optimizer, scheduler=self._schedule)
        if state is not None and self._average is not None:
            self._average.load_state(state.extra.pop("moving_average"))
        return state

    def _autocast(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = torch.autocast(
            "cpu", torch.bfloat16, enabled=self._config.dtype == "bfloat16"
        )
        return context

    def _log_likelihoods(self, hidden: Tensor, batch: "Batch", lists: TeacherLists | None) -> tuple[Tensor, Tensor]:
        return scores_of_targets(hidden, self._model, self._examples.catalog, self._examples.vocabulary, batch, lists)


class _Supervision(nn.Module):
    """The losses of thinking steps, beside that of the codes."""

    def __init__(self, clusters: StepClusters | None, interest: GlobalInterest | None) -> None:
        super().__init__()
        self.clusters, self.interest = clusters, interest

    @classmethod
    def of(
        cls, config: SftConfig, model: "PreTrainedModel", examples: "Examples", teaching: Teaching
    ) -> "_Supervision | None":
        """What the settings ask for; None if that is nothing."""
        clusters = None
        if config.step_clusters and teaching.codebooks is not None:
            clusters = StepClusters(
                np.asarray(teaching.codebooks),
                examples.catalog.codes,
                config.step_clusters,
                config.steps,
                config.hidden_size,
                is_shuffled=config.step_clusters_shuffled,
                seed=config.seed,
            )
        interest = GlobalInterest(model, config.global_interest) if config.global_interest else None
        return None if clusters is None and interest is None else cls(clusters, interest)

    def forward(self, model: "PreTrainedModel", examples: "Examples", hidden: Tensor, batch: "Batch") -> Tensor:
        """What is to be added to the loss of a batch whose outputs are `hidden` (B, T, D)."""
        before_codes = hidden[batch.rows[:, None], batch.positions]  # (items, L, D)
        codes = torch.from_numpy(examples.catalog.codes[batch.ranks].astype(np.int64))
        losses = [] if self.clusters is None else [self.clusters(before_codes, codes)]
        if self.interest is not None:
            backbone = batch.token_ids[:, : batch.tree.num_backbone] if batch.tree is not None else batch.token_ids
            tokens = torch.from_numpy(examples.vocabulary.token_ids(examples.catalog.codes[batch.ranks]))
            losses.append(
                self.interest(
                    embed(model, backbone),
                    batch.rows,
                    batch.anchors,
                    before_codes[:, 0],
                    embed(model, tokens).mean(dim=1),
                    torch.from_numpy(batch.ranks),
                )
            )
        return torch.stack(losses).sum()


def _parameter_groups(model: nn.Module, config: SftConfig) -> list[dict[str, object]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _warmup_cosine(step: int, total: int, warmup_share: float) -> float:
    warmup = max(1, round(total * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
