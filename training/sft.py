"""Stage `sft`: teach a causal LM to write the next item's SID, on whole user sequences with a loss at every item.

From scratch (a small Llama or Qwen3 over SID tokens, compact prompts) or from a base model (its vocabulary extended by
the SID block, chat prompts, with a think block where the model shall learn to think later).
The loss is the negative score that serving uses: per code, the log-softmax over the legal codes of its prefix, so what
is trained is exactly the likelihood of the item.
"""

import math
import time

import numpy as np
import torch

from semantic_ids.catalog import Catalog
from training.examples import Examples, TargetSplit, continuation_lessons, epoch_batches, sequence_lessons
from training.generator import MODEL, SPEC, STEPS, build_model, save_model
from training.learner import NOTHING_ELSE, Learner, Teaching
from training.likelihood import mean_target_log_likelihood
from training.processes import Processes
from training.sequences import Sequences
from training.sft_config import SftConfig
from training.stage import StageError, StageFolder, Summary, progress_bar, write_atomically

CHECKPOINT = "checkpoint.pt"


class SftSummary(Summary):
    """How training went; log-likelihoods are nats per item over the legal codes."""

    num_parameters: int
    epochs: int
    best_epoch: int
    train_log_likelihood: float
    validation_log_likelihood: float
    tokens_per_s: float
    seconds: float


def run(
    config: SftConfig,
    catalog: Catalog,
    train: Sequences,
    validation: TargetSplit,
    folder: StageFolder,
    teaching: Teaching = NOTHING_ELSE,
) -> SftSummary:
    """Train, keep the epoch with the best validation loss or the last, write a transformers checkpoint into `model/`.

    Sequences and targets are catalogue ranks. Resumes after the last finished epoch, bit for bit. The processes of a
    launch share every batch and every validation; the first one writes.
    """
    processes = Processes.launched()
    _require_inputs(config, validation, teaching, processes)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model, vocabulary, renderer = build_model(config, catalog, folder.path, teaching.known)
    model.to(processes.device_for(config.device))
    examples = Examples(catalog, vocabulary, renderer)
    batches_per_epoch = len(list(epoch_batches(train, config, epoch=0)))
    learner = Learner(config, model, examples, teaching, batches_per_epoch * config.max_epochs, processes)
    state = learner.load(folder.path / CHECKPOINT)
    progress = state.extra if state else {"best": -math.inf, "best_epoch": 0, "train": 0.0, "tokens": 0, "seconds": 0.0}
    epoch = state.step if state else 0
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    title = f"sft: {num_parameters / 1e6:.1f}M parameters"
    with progress_bar(title, batches_per_epoch * config.max_epochs, batches_per_epoch * epoch) as bar:
        while epoch < config.max_epochs and epoch - progress["best_epoch"] < config.patience:
            start, tokens, total, num_items = time.monotonic(), 0, 0.0, 0
            model.train()
            if not processes.is_main:  # or all would drop the same units, each of other rows
                torch.manual_seed(int(np.random.default_rng((config.seed, epoch, processes.index)).integers(2**62)))
            lessons = sequence_lessons(train, teaching.lists, examples, config, epoch, processes)
            further = continuation_lessons(teaching.continuations, examples, config, epoch, processes)
            for lesson in lessons:
                loss = learner.step(lesson, next(further))
                _refuse_non_finite(loss, epoch + 1, config)
                tokens += int(lesson.batch.token_ids.numel())
                total, num_items = total - loss * lesson.num_targets, num_items + lesson.num_targets
                bar.advance()
            epoch += 1
            with learner.kept_weights():
                validated = mean_target_log_likelihood(model, examples, validation, config, processes)
                _refuse_non_finite(-validated, epoch, config)
                tokens = int(processes.sum(torch.tensor(tokens)))
                progress |= {"train": total / num_items, "tokens": progress["tokens"] + tokens}
                progress["seconds"] += time.monotonic() - start
                if is_better := config.keep == "last" or validated > progress["best"]:
                    progress |= {"best": validated, "best_epoch": epoch}
                if is_better:
                    if (reader := learner.step_reader) is not None and processes.is_main:
                        reader.save(folder.path / STEPS)
                    save_model(model, folder.path / MODEL)
            learner.save(folder.path / CHECKPOINT, epoch, progress)
            bar.note(f"epoch {epoch}: {-progress['train']:.3f} train, {-validated:.3f} validation nats/item")
    summary = SftSummary(
        num_parameters=num_parameters,
        epochs=epoch,
        best_epoch=progress["best_epoch"],
        train_log_likelihood=progress["train"],
        validation_log_likelihood=progress["best"],
        tokens_per_s=progress["tokens"] / max(progress["seconds"], 1e-9),
        seconds=progress["seconds"],
    )
    if processes.is_main:
        write_atomically(folder.path / SPEC, renderer.spec.model_dump_json().encode())
        folder.finish(summary)
        (folder.path / CHECKPOINT).unlink(missing_ok=True)
    processes.wait_for_all()
    return summary


def _require_inputs(config: SftConfig, validation: TargetSplit, teaching: Teaching, processes: Processes) -> None:
    if config.global_interest and processes.count > 1:
        raise StageError(
            f"sft.global_interest={config.global_interest} contrasts the items of a whole batch, and "
            f"{processes.count} processes have a part each: launch one, or leave it out"
        )
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
