"""Stage `sft`: teach a causal LM to write the next item's SID, on whole user sequences with a loss at every item.

From scratch (a small Llama or Qwen3 over SID tokens, compact prompts) or from a base model (its vocabulary extended by
the SID block, chat prompts, with a think block where the model shall learn to think later).
The loss is the negative score that serving uses: per code, the log-softmax over the legal codes of its prefix, so what
is trained is exactly the likelihood of the item.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional

from semantic_ids.bundle import load_text_tokenizer
from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidVocabulary, TokenIds
from semantic_ids.decoding.tree_decoder import TreeDecoder, level_head
from semantic_ids.prompt import (
    CHAT_VERSION,
    COMPACT_SPECIAL_TOKENS,
    COMPACT_VERSION,
    STEPWISE_VERSION,
    THINKING_VERSION,
    HistoryItem,
    PromptRenderer,
    PromptSpec,
    make_renderer,
    window_start,
)
from semantic_ids.trie import ROOT
from training.base_model import extend_pretrained
from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from training.distillation import Continuations, TeacherLists, teacher_log_likelihood
from training.item_memory import ItemMemory, KnownItems, memory_of, plain_state
from training.legal_softmax import child_log_probs
from training.moving_average import MovingAverage
from training.sequences import Sequences
from training.stage import THREADS, StageConfig, StageError, StageFolder, Summary, progress_bar, write_atomically
from training.stepwise import GlobalInterest, StepClusters, Tree, with_branches

if TYPE_CHECKING:  # transformers takes seconds to load, and a finished pipeline needs none of it
    from transformers import LlamaConfig, PreTrainedModel, Qwen3Config

CHECKPOINT = "checkpoint.pt"
MODEL = "model"
SPEC = "prompt.json"

_PAD_TOKEN_ID = COMPACT_SPECIAL_TOKENS.index("<pad>")
_BATCHES_PER_BUCKET = 20  # rows of like length share a batch; lengths are compared within so many batches


class SftConfig(StageConfig):
    """The model and how it is trained."""

    added_later = frozenset(
        {"continuations", "moving_average", "steps", "step_clusters", "step_clusters_shuffled", "global_interest"}
    )

    base_model: str | None = Field(
        None, description="a checkpoint's folder, a hub name or smollm2-135m; absent: from scratch"
    )
    architecture: Literal["llama", "qwen3"] = "llama"
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    intermediate_size: PositiveInt = 384
    dropout: float = Field(0.2, ge=0, lt=1, description="of embeddings and of each block's output; not for base_model")
    max_history: PositiveInt = Field(50, description="most items in a prompt")
    item_memory: bool = Field(
        False, description="one row per code for input and output, from text and SASRec's vectors; from scratch only"
    )
    distillation: float = Field(
        0.0, ge=0, lt=1, description="share of the loss that is a teacher's: the item-kNN without the user's own doing"
    )
    continuations: int = Field(
        0, ge=0, description="sequences that SASRec and the item-kNN continue, to learn from what they expect there"
    )
    moving_average: float = Field(
        0.0, ge=0, lt=1, description="decay a step of the weights' average, which is then what is validated and kept"
    )
    steps: tuple[int, ...] = Field(
        (), description="S²GR's thinking steps before each code, such as [1,1,1] or [3,0,0]; from scratch only"
    )
    step_clusters: int = Field(
        0, ge=0, description="clusters of a level's codes that its step learns to tell apart; 0: steps are mere pauses"
    )
    step_clusters_shuffled: bool = Field(False, description="control: clusters that mean nothing")
    global_interest: float = Field(
        0.0, ge=0, description="weight of the first step's nearness to what a light decoder expects (λ); 0: none"
    )
    thinking: bool = Field(False, description="prompts with a think block, empty in this stage; for base_model only")
    batch_size: PositiveInt = 32
    max_epochs: PositiveInt = 30
    patience: PositiveInt = Field(4, description="epochs without a better validation loss before it stops")
    keep: Literal["best", "last"] = Field(
        "best", description="best: of validation loss, until patience ends; last: all of max_epochs (ranking gains on)"
    )
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_share: float = Field(0.05, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the forward pass (autocast)")
    threads: PositiveInt = Field(1, description=THREADS)
    seed: int = Field(0, ge=0)

    @property
    def learns_from_more(self) -> bool:
        """Whether text vectors and the baselines are read, and not sequences alone."""
        return self.item_memory or self.distillation > 0 or self.continuations > 0

    @field_validator("item_memory")
    @classmethod
    def _needs_tables_of_its_own(cls, item_memory: bool, others: ValidationInfo) -> bool:
        if item_memory and others.data.get("base_model") is not None:
            raise ValueError("a base model brings its tables with it: leave sft.item_memory or sft.base_model out")
        return item_memory

    @field_validator("steps", "step_clusters", "global_interest")
    @classmethod
    def _steps_are_learnt_from_scratch(
        cls, value: tuple[int, ...] | float, others: ValidationInfo
    ) -> tuple[int, ...] | float:
        if value and others.data.get("base_model") is not None:
            raise ValueError("thinking steps are for models from scratch: leave it or sft.base_model out")
        if value and others.field_name == "global_interest" and not any(others.data.get("steps", ())[:1]):
            raise ValueError("the general interest is what the step before the first code learns: give sft.steps too")
        return value

    @field_validator("thinking")
    @classmethod
    def _needs_words_to_think_in(cls, thinking: bool, others: ValidationInfo) -> bool:
        if thinking and others.data.get("base_model") is None:
            raise ValueError("a model from scratch knows SIDs only and cannot think: give sft.base_model too")
        return thinking


class SftSummary(Summary):
    """How training went; log-likelihoods are nats per item over the legal codes."""

    num_parameters: int
    epochs: int
    best_epoch: int
    train_log_likelihood: float
    validation_log_likelihood: float
    tokens_per_s: float
    seconds: float


@dataclass(frozen=True)
class TargetSplit:
    """Histories with the item to predict after each, in catalogue ranks."""

    histories: Sequences
    targets: npt.NDArray[np.int32]


@dataclass(frozen=True)
class TrainedModel:
    """A finished stage: the checkpoint, its SID block and its prompts."""

    folder: Path
    vocabulary: SidVocabulary
    renderer: PromptRenderer

    @classmethod
    def load(cls, path: Path, catalog: Catalog) -> "TrainedModel":
        """Read a finished sft stage."""
        spec = PromptSpec.model_validate_json((path / SPEC).read_bytes())
        vocab_size = json.loads((path / MODEL / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        vocabulary = SidVocabulary(catalog.space, vocab_size - catalog.space.num_tokens, vocab_size)
        return cls(path / MODEL, vocabulary, make_renderer(spec, vocabulary, load_text_tokenizer(path / MODEL)))

    def load_decoder(self) -> TreeDecoder:
        """The model, ready to decode, in float32."""
        return TreeDecoder.load(self.folder, self.vocabulary)


@dataclass(frozen=True)
class Teaching:
    """What a model may learn from beside the sequences, by catalogue rank; each where a setting asks for it."""

    known: KnownItems | None = None  # item_memory
    lists: TeacherLists | None = None  # distillation: one for each event of the training sequences
    continuations: Continuations | None = None
    codebooks: npt.NDArray[np.float32] | None = None  # step_clusters: (L, K, d) of the quantiser


NOTHING_ELSE = Teaching()


def run(
    config: SftConfig,
    catalog: Catalog,
    train: Sequences,
    validation: TargetSplit,
    folder: StageFolder,
    teaching: Teaching = NOTHING_ELSE,
) -> SftSummary:
    """Train, keep the epoch with the best validation loss or the last, write a transformers checkpoint into `model/`.

    Sequences and targets are catalogue ranks. Resumes after the last finished epoch, bit for bit.
    """
    _require_inputs(config, validation, teaching)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model, vocabulary, renderer = build_model(config, catalog, folder.path, teaching.known)
    examples = Examples(catalog, vocabulary, renderer)
    numbered = Sequences(train.offsets, np.arange(len(train.items), dtype=np.int32))
    batches_per_epoch = len(list(epoch_batches(train, config, epoch=0)))
    learner = _Learner(config, model, examples, teaching, total_steps=batches_per_epoch * config.max_epochs)
    state = learner.load(folder.path / CHECKPOINT)
    progress = state.extra if state else {"best": -math.inf, "best_epoch": 0, "train": 0.0, "tokens": 0, "seconds": 0.0}
    epoch = state.step if state else 0
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    title = f"sft: {num_parameters / 1e6:.1f}M parameters"
    with progress_bar(title, batches_per_epoch * config.max_epochs, batches_per_epoch * epoch) as bar:
        while epoch < config.max_epochs and epoch - progress["best_epoch"] < config.patience:
            start, tokens, total, num_items = time.monotonic(), 0, 0.0, 0
            model.train()
            lessons = _lessons(teaching.continuations, examples, config, epoch)
            for events in epoch_batches(numbered, config, epoch):
                batch = examples.batch(Sequences(events.offsets, train.items[events.items]))
                lists = teaching.lists.select(events.items) if teaching.lists is not None else None
                loss = learner.step(batch, lists, next(lessons))
                _refuse_non_finite(loss, epoch + 1, config)
                tokens += int(batch.token_ids.numel())
                total, num_items = total - loss * len(batch.ranks), num_items + len(batch.ranks)
                bar.advance()
            epoch += 1
            with learner.kept_weights():
                validated = mean_target_log_likelihood(model, examples, validation, config)
                _refuse_non_finite(-validated, epoch, config)
                progress |= {"train": total / num_items, "tokens": progress["tokens"] + tokens}
                progress["seconds"] += time.monotonic() - start
                if config.keep == "last" or validated > progress["best"]:
                    progress |= {"best": validated, "best_epoch": epoch}
                    _save_model(model, folder.path / MODEL)
            learner.save(folder.path / CHECKPOINT, epoch, progress)
            bar.note(f"epoch {epoch}: {-progress['train']:.3f} train, {-validated:.3f} validation nats/item")
    write_atomically(folder.path / SPEC, renderer.spec.model_dump_json().encode())
    summary = SftSummary(
        num_parameters=num_parameters,
        epochs=epoch,
        best_epoch=progress["best_epoch"],
        train_log_likelihood=progress["train"],
        validation_log_likelihood=progress["best"],
        tokens_per_s=progress["tokens"] / max(progress["seconds"], 1e-9),
        seconds=progress["seconds"],
    )
    folder.finish(summary)
    (folder.path / CHECKPOINT).unlink(missing_ok=True)
    return summary


class _Learner:
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
        _bake(self._model)
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
                    _embed(model, backbone),
                    batch.rows,
                    batch.anchors,
                    before_codes[:, 0],
                    _embed(model, tokens).mean(dim=1),
                    torch.from_numpy(batch.ranks),
                )
            )
        return torch.stack(losses).sum()


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, padded on the right, with every item that is a target."""

    token_ids: Tensor  # (B, T)
    ranks: npt.NDArray[np.int64]  # (items,) catalogue rank of each target item
    positions: Tensor  # (items, L): positions whose output predicts each code
    rows: Tensor  # (items,)
    anchors: Tensor  # (items,) the last token of what comes before each target
    tree: Tree | None = None  # where targets are branches

    def where(self, is_target: npt.NDArray[np.bool_]) -> "Batch":
        """The same rows, of whose target items (items,) only these are targets."""
        kept = torch.from_numpy(is_target)
        return replace(
            self,
            ranks=self.ranks[is_target],
            positions=self.positions[kept],
            rows=self.rows[kept],
            anchors=self.anchors[kept],
        )


class Examples:
    """Windows of sequences → batches, through the one prompt renderer."""

    def __init__(self, catalog: Catalog, vocabulary: SidVocabulary, renderer: PromptRenderer) -> None:
        self.catalog = catalog
        self.vocabulary = vocabulary
        self.renderer = renderer
        self._items = history_items(catalog)

    def batch(self, windows: Sequences) -> Batch:
        """Every item of each window is a target."""
        rows = [self.renderer.training_row([self._items[rank] for rank in window]) for window in windows]
        num_levels = self.vocabulary.space.num_levels
        places = [np.flatnonzero(row.levels >= 0).reshape(-1, num_levels) for row in rows]
        return self._with_steps(_batch([row.token_ids for row in rows], places, list(windows)))

    def batch_of_last(self, windows: Sequences) -> Batch:
        """Only the last item of each window is a target, after the very prompt that serving makes of the others."""
        token_ids, places = [], []
        for window in windows:
            prompt = self.renderer.render([self._items[rank] for rank in window[:-1]]).token_ids
            target = self.vocabulary.token_ids(self.catalog.codes[window[-1]])
            token_ids.append(np.concatenate((prompt, target)))
            places.append(len(prompt) + np.arange(len(target))[None])
        return self._with_steps(_batch(token_ids, places, [window[-1:] for window in windows]))

    def _with_steps(self, plain: Batch) -> Batch:
        """The same targets, each behind its thinking steps, where prompts have any."""
        if not self.renderer.forced:
            return plain
        targets = self.vocabulary.token_ids(self.catalog.codes[plain.ranks])
        branches = with_branches(
            plain.token_ids, plain.rows.numpy(), plain.anchors.numpy(), targets, self.renderer.forced
        )
        return replace(plain, token_ids=branches.token_ids, positions=branches.positions, tree=branches.tree)


def _lessons(
    continuations: Continuations | None, examples: Examples, config: SftConfig, epoch: int
) -> Iterator[tuple[Batch, TeacherLists] | None]:
    """Batches of continuations without end, half as large as those of sequences, beside which they are learnt.

    All come before any comes again; None where there are none. A pure function of (seed, epoch).
    """
    if continuations is None or not len(continuations.sequences):
        yield from repeat(None)
        return
    rng = np.random.default_rng((config.seed, epoch, 1))
    sequences, list_of_event = continuations.sequences, continuations.list_of_event()
    numbered = Sequences(sequences.offsets, np.arange(len(sequences.items), dtype=np.int32))
    size = max(1, config.batch_size // 2)
    while True:
        for places in _batches_of_like_length(numbered.lengths, rng.permutation(len(numbered)), size, rng):
            events = numbered.select(places)
            lists = list_of_event[events.items]
            batch = examples.batch(Sequences(events.offsets, sequences.items[events.items]))
            yield batch.where(lists >= 0), continuations.lists.select(lists[lists >= 0])


def _batch(token_ids: list[TokenIds], places: list[npt.NDArray[np.int64]], ranks: list[npt.NDArray[np.int32]]) -> Batch:
    """Pad rows; `places` (items, L) are the positions of each row's target codes, `ranks` (items,) the targets."""
    padded = np.full((len(token_ids), max(map(len, token_ids))), _PAD_TOKEN_ID)
    for number, row in enumerate(token_ids):
        padded[number, : len(row)] = row
    positions = torch.from_numpy(np.concatenate(places) - 1)  # the output before predicts
    return Batch(
        token_ids=torch.from_numpy(padded),
        ranks=np.concatenate(ranks).astype(np.int64),
        positions=positions,
        anchors=positions[:, 0],
        rows=torch.from_numpy(np.repeat(np.arange(len(places)), [len(place) for place in places])),
    )


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
    return scores_of_targets(hidden_states(model, batch), model, catalog, vocabulary, batch, teacher)


def hidden_states(model: "PreTrainedModel", batch: Batch) -> Tensor:
    """The model's outputs over a batch's rows, (B, T, D), with the tables as they were baked last (`_bake`)."""
    tree = batch.tree
    seen = {} if tree is None else {"attention_mask": tree.visible[:, None], "position_ids": tree.position_ids}
    output = model.base_model(inputs_embeds=_embed(model, batch.token_ids), use_cache=False, **seen)
    hidden: Tensor = output.last_hidden_state
    return hidden


def _bake(model: "PreTrainedModel") -> None:
    """Make tables that come from an item memory what its parameters are now; those of others need nothing."""
    if (memory := memory_of(model)) is not None:
        memory.bake(model)


def scores_of_targets(
    hidden: Tensor,
    model: "PreTrainedModel",
    catalog: Catalog,
    vocabulary: SidVocabulary,
    batch: Batch,
    teacher: TeacherLists | None = None,
) -> tuple[Tensor, Tensor]:
    """As `log_likelihoods`, of outputs (B, T, D) that are there already."""
    path = catalog.trie.path_of_rank(batch.ranks)  # (items, L)
    all_paths = catalog.trie.path_of_rank(np.arange(len(catalog))) if teacher is not None else path  # (N, L)
    total, expected = torch.zeros(len(path)), torch.zeros(len(path))
    for level in range(vocabulary.space.num_levels):
        prefix = path[:, level - 1] if level else np.full(len(path), ROOT)
        open_items = np.flatnonzero(~catalog.trie.has_one_child(prefix))  # what is forced adds exactly 0
        if not len(open_items):
            continue
        places, prefix, node = torch.from_numpy(open_items), prefix[open_items], path[open_items, level]
        scores = child_log_probs(
            hidden[batch.rows[places], batch.positions[places, level]],
            *level_head(model, vocabulary, level),
            catalog.trie,
            prefix,
        )
        total = total.index_add(0, places, scores.of(node))
        if teacher is not None:
            of_teacher = teacher_log_likelihood(scores, teacher.select(open_items), all_paths, prefix, level, node)
            expected = expected.index_add(0, places, of_teacher)
    return total, expected


@torch.inference_mode()
def mean_target_log_likelihood(
    model: "PreTrainedModel", examples: Examples, split: TargetSplit, config: SftConfig
) -> float:
    """Mean score of the split's targets after the prompts that serving would make."""
    model.train(False)
    _bake(model)
    windows = prompt_windows(split.histories, split.targets, examples.renderer.spec.max_history)
    total = 0.0
    for users in np.array_split(
        np.argsort(windows.lengths, kind="stable"), max(1, -(-len(windows) // config.batch_size))
    ):
        batch = examples.batch_of_last(windows.select(users))
        total += float(item_log_likelihood(model, examples.catalog, examples.vocabulary, batch).sum())
    return total / len(windows)


def history_items(catalog: Catalog) -> list[HistoryItem]:
    """Every item as prompts show it, by rank."""
    columns = zip(np.asarray(catalog.codes), catalog.titles, strict=True)
    return [HistoryItem(codes, title) for codes, title in columns]


def prompt_windows(histories: Sequences, targets: npt.NDArray[np.int32], max_history: int) -> Sequences:
    """Each history cut as serving cuts it, with the target behind it."""
    start = np.array([window_start(int(length), max_history) for length in histories.lengths], np.int64)
    cut = histories.slice_each(start, histories.lengths)
    items = np.insert(cut.items, cut.offsets[1:], targets)
    return Sequences(cut.offsets + np.arange(len(cut.offsets)), items.astype(np.int32))


def epoch_batches(train: Sequences, config: SftConfig, epoch: int) -> Iterator[Sequences]:
    """Every event of every sequence once, in windows of a full history and its target, cut at a random phase.

    A pure function of (seed, epoch). Rows of like length share a batch.
    """
    rng = np.random.default_rng((config.seed, epoch))
    longest = config.max_history + 1
    users, starts, stops = [], [], []
    for user, length in enumerate(train.lengths):
        phase = int(rng.integers(longest)) if length > longest else 0
        edges = [0, *range(phase or longest, int(length), longest), int(length)]
        users += [user] * (len(edges) - 1)
        starts += edges[:-1]
        stops += edges[1:]
    windows = train.select(np.array(users, np.int64)).slice_each(np.array(starts, np.int64), np.array(stops, np.int64))
    order = rng.permutation(np.flatnonzero(windows.lengths > 0))
    for places in _batches_of_like_length(windows.lengths, order, config.batch_size, rng):
        yield windows.select(places)


def _batches_of_like_length(
    lengths: npt.NDArray[np.int64], order: npt.NDArray[np.int64], size: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """The places in `order` in batches, whose order is drawn; lengths are compared within some batches only."""
    batches = []
    for bucket_start in range(0, len(order), size * _BATCHES_PER_BUCKET):
        bucket = order[bucket_start : bucket_start + size * _BATCHES_PER_BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[start : start + size] for start in range(0, len(bucket), size)]
    for place in rng.permutation(len(batches)):
        yield batches[place]


def build_model(
    config: SftConfig, catalog: Catalog, folder: Path, known: KnownItems | None = None
) -> tuple["PreTrainedModel", SidVocabulary, PromptRenderer]:
    """A fresh or extended model with its SID block and its prompts; a base model's tokenizer goes into `model/`.

    `known`, by catalogue rank, is for `item_memory`.
    """
    from transformers import AutoModelForCausalLM

    if config.base_model is None:
        vocabulary = compact_vocabulary(catalog)
        model = AutoModelForCausalLM.from_config(_fresh_config(config, vocabulary))
        _add_dropout(model, config.dropout)
        if config.item_memory:
            if known is None:
                raise StageError("sft.item_memory=true needs what is known of the items, and nothing was given")
            ItemMemory(catalog, vocabulary, known, config.hidden_size).install(model)
        version = STEPWISE_VERSION if any(config.steps) else COMPACT_VERSION
        steps = config.steps if any(config.steps) else ()
        spec = PromptSpec(version=version, max_history=config.max_history, steps=steps)
        return model, vocabulary, make_renderer(spec, vocabulary)
    extended = extend_pretrained(config.base_model, catalog.space, config.seed)
    extended.tokenizer.save_pretrained(folder / MODEL)
    version = THINKING_VERSION if config.thinking else CHAT_VERSION
    spec = PromptSpec(version=version, max_history=config.max_history)
    return extended.model, extended.vocabulary, make_renderer(spec, extended.vocabulary, extended.text_tokenizer)


def compact_vocabulary(catalog: Catalog) -> SidVocabulary:
    """The vocabulary of a model trained from scratch: the special tokens, then the SID block."""
    first = len(COMPACT_SPECIAL_TOKENS)
    return SidVocabulary(catalog.space, first, first + catalog.space.num_tokens)


def _fresh_config(config: SftConfig, vocabulary: SidVocabulary) -> "LlamaConfig | Qwen3Config":
    from transformers import LlamaConfig, Qwen3Config

    if config.hidden_size % config.num_heads:
        raise StageError(f"sft.hidden_size={config.hidden_size} is not a multiple of sft.num_heads={config.num_heads}")
    kind = LlamaConfig if config.architecture == "llama" else Qwen3Config
    longest = 1 + (config.max_history + 1) * vocabulary.space.num_levels + sum(config.steps)
    return kind(
        vocab_size=vocabulary.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=1 << (longest - 1).bit_length(),
        tie_word_embeddings=False,
        pad_token_id=_PAD_TOKEN_ID,
        bos_token_id=COMPACT_SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=COMPACT_SPECIAL_TOKENS.index("<eos>"),
    )


def _add_dropout(model: "PreTrainedModel", share: float) -> None:
    """Dropout on every attention and MLP output. Hooks, so that the checkpoint stays a plain Llama or Qwen3."""

    def drop(module: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(output, tuple):
            return functional.dropout(output[0], share, module.training), *output[1:]
        return functional.dropout(output, share, module.training)

    for layer in model.base_model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    model.get_input_embeddings().register_forward_hook(drop)


def _embed(model: "PreTrainedModel", token_ids: Tensor) -> Tensor:
    embedded: Tensor = model.get_input_embeddings()(token_ids.to(model.device))
    return embedded


def _parameter_groups(model: nn.Module, config: SftConfig) -> list[dict[str, object]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _require_inputs(config: SftConfig, validation: TargetSplit, teaching: Teaching) -> None:
    if len(validation.targets) == 0:
        raise StageError("no user has three events, so there is nothing to validate on: give longer histories")
    if config.distillation and teaching.lists is None:
        raise StageError(f"sft.distillation={config.distillation} needs a teacher's lists, and nothing was given")
    if config.step_clusters and teaching.codebooks is None:
        raise StageError(f"sft.step_clusters={config.step_clusters} needs the codebooks, and nothing was given")
    if config.continuations and teaching.continuations is None:
        raise StageError(f"sft.continuations={config.continuations} needs continued sequences, and nothing was given")


def _refuse_non_finite(loss: float, epoch: int, config: SftConfig) -> None:
    if not math.isfinite(loss):
        raise StageError(f"the loss is {loss} in epoch {epoch}: lower sft.learning_rate (now {config.learning_rate})")


def _warmup_cosine(step: int, total: int, warmup_share: float) -> float:
    warmup = max(1, round(total * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _save_model(model: "PreTrainedModel", path: Path) -> None:
    """Replace the weights in `path`; the tokenizer's files stay."""
    staging = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging, state_dict=plain_state(model))
    for file in path.iterdir() if path.exists() else ():
        if not (staging / file.name).exists():
            shutil.copy(file, staging / file.name)
    shutil.rmtree(path, ignore_errors=True)
    staging.rename(path)
