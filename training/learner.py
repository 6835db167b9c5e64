"""A generator and all that changes it: the loss of a batch, what supervises it, optimiser, schedule, average."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semantic_ids.step_reader import StepReader
from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from training.distillation import Continuations, TeacherLists
from training.examples import Batch, Examples, Lesson
from training.item_memory import KnownItems
from training.likelihood import bake, embed, hidden_states, scores_of_targets
from training.moving_average import MovingAverage
from training.processes import Processes
from training.sft_config import SftConfig
from training.sharding import gathered
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
    """A model and all that changes it, step by step; on several processes their gradients' mean."""

    def __init__(
        self,
        config: SftConfig,
        model: "PreTrainedModel",
        examples: Examples,
        teaching: Teaching,
        total_steps: int,
        processes: Processes,
    ) -> None:
        self._config = config
        self._processes = processes
        self._supervision = _Supervision.of(config, model, examples, teaching)
        self._trained = model if self._supervision is None else nn.ModuleList([model, self._supervision])
        self._trained.to(model.device)
        self._objective = processes.prepare(_Objective(config, model, examples, self._supervision), _parts_of(model))
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(self._trained, config), lr=config.learning_rate, betas=(0.9, 0.98), fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _warmup_cosine(step, total_steps, config.warmup_share)
        )
        parameters = self._trained.parameters()
        self._average = MovingAverage(parameters, config.moving_average) if config.moving_average else None

    def step(self, lesson: Lesson, further: Lesson | None) -> float:
        """Learn from a batch of sequences and one of continuations; the former's mean loss, of all processes.

        A loss that is no number changes nothing.
        """
        self._optimizer.zero_grad()
        loss, total = self._objective(lesson, further)
        whole_loss = float(self._processes.sum(lesson.weight / self._processes.count * loss.detach()))
        if not math.isfinite(whole_loss):
            return whole_loss
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(self._trained.parameters(), self._config.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        if self._average is not None:
            self._average.update()
        return whole_loss

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """The model has the weights that are validated and kept: the average, where there is one.

        All processes enter, and run and save it together.
        """
        with self._average.in_place() if self._average is not None else nullcontext(), gathered(self._objective):
            yield

    @property
    def step_reader(self) -> StepReader | None:
        """What reads the steps of the model as it is now; None where it has none, or clusters that mean nothing."""
        clusters = None if self._supervision is None else self._supervision.clusters
        is_readable = any(self._config.steps) and not self._config.step_clusters_shuffled
        return clusters.reader() if clusters is not None and is_readable else None

    def save(self, path: Path, epoch: int, progress: dict[str, Any]) -> None:
        """A checkpoint after an epoch, which the first process writes; all are to call it."""
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


class _Objective(nn.Module):
    """The loss of a step. One module, so that whatever joins the processes' gradients sees all that has any."""

    def __init__(
        self, config: SftConfig, model: "PreTrainedModel", examples: Examples, supervision: "_Supervision | None"
    ) -> None:
        super().__init__()
        self.model, self.supervision = model, supervision
        self._config, self._examples = config, examples

    def forward(self, lesson: Lesson, further: Lesson | None) -> tuple[Tensor, Tensor]:
        """The mean loss of the lesson's targets, and what is to be minimised: this part of all that is learnt."""
        bake(self.model)
        device = self.model.device
        lesson, further = lesson.to(device), further and further.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._config.dtype == "bfloat16"):
            hidden = hidden_states(self.model, lesson.batch)
            log_likelihood, expected, expected_further = self._scores(hidden, lesson, further)
            loss = -log_likelihood.mean()
            total = torch.lerp(loss, -expected.mean(), self._config.distillation)
            if self.supervision is not None:
                total = total + self.supervision(self.model, self._examples, hidden, lesson.batch)
            total = lesson.weight * total
            if further is not None:
                total = total - further.weight * expected_further.mean()
        return loss, total

    def _scores(self, hidden: Tensor, lesson: Lesson, further: Lesson | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of the lesson's targets the scores and what is expected of them, and the latter of the further lesson's.

        Together, as every pass through the tables costs a gradient of their size.
        """
        before_codes, ranks, lists = lesson.batch.before_codes(hidden), lesson.batch.ranks, lesson.lists
        if further is not None:
            before_further = further.batch.before_codes(hidden_states(self.model, further.batch))
            before_codes = torch.cat((before_codes, before_further))
            ranks = np.concatenate((ranks, further.batch.ranks))
            lists = _lists_of(lesson).followed_by(_lists_of(further))
        catalog, vocabulary = self._examples.catalog, self._examples.vocabulary
        scores, expected = scores_of_targets(before_codes, self.model, catalog, vocabulary, ranks, lists)
        count = len(lesson.batch.ranks)
        return scores[:count], expected[:count], expected[count:]


def _lists_of(lesson: Lesson) -> TeacherLists:
    """With no teacher, lists that expect nothing."""
    return TeacherLists.empty(len(lesson.batch.ranks)) if lesson.lists is None else lesson.lists


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
        before_codes = batch.before_codes(hidden)
        codes = torch.from_numpy(examples.catalog.codes[batch.ranks].astype(np.int64)).to(hidden.device)
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
                    embed(model, tokens.to(hidden.device)).mean(dim=1),
                    torch.from_numpy(batch.ranks).to(hidden.device),
                )
            )
        return torch.stack(losses).sum()


def _parts_of(model: "PreTrainedModel") -> list[nn.Module]:
    """The model's layers: what can be in shards each by itself."""
    kinds = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in kinds]


def _parameter_groups(model: nn.Module, config: SftConfig) -> list[dict[str, object]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _warmup_cosine(step: int, total: int, warmup_share: float) -> float:
    warmup = max(1, round(total * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
