"""Atomic checkpoints for any torch training loop; knows no stage, no data and no schedule.

A checkpoint holds the model, the optimiser, the schedule and every random state. Training resumed from it equals
training straight through, bit for bit on a CPU, if the order of the data is a pure function of (seed, epoch).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from training.stage import StageError

FORMAT = "sidrec-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """Where training stood: steps (or epochs) done, and whatever else the loop keeps."""

    step: int
    extra: dict[str, Any]


def save_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    step: int,
    extra: Mapping[str, Any] | None = None,
    generators: Mapping[str, np.random.Generator] | None = None,
) -> None:
    """Replace the checkpoint at `path`: a crash leaves the old one or the new one.

    `extra` takes numbers, strings, tensors, and lists and dicts of them: what loads again without running code.
    torch's own random state is always kept; `generators` names the numpy generators of the loop.
    """
    content = {
        "format": FORMAT,
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "extra": dict(extra or {}),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy_rng": {name: generator.bit_generator.state for name, generator in (generators or {}).items()},
    }
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    generators: Mapping[str, np.random.Generator] | None = None,
) -> Checkpoint | None:
    """Put everything back as `save_checkpoint` found it; None, and nothing touched, if there is no file at `path`.

    A file that is truncated, foreign or of another model raises StageError.
    """
    if not path.exists():
        return None
    content = _read(path)
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        if scheduler:
            scheduler.load_state_dict(content["scheduler"])
        for name, generator in (generators or {}).items():
            generator.bit_generator.state = content["numpy_rng"][name]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"{path} was written by another training set-up ({_first_line(error)}); delete it to start afresh"
        ) from error
    torch.set_rng_state(content["torch_rng"])
    if content["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(content["cuda_rng"])
    return Checkpoint(content["step"], content["extra"])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load answers a broken file with half a dozen unrelated types; all of them mean the same to the reader.
        raise StageError(
            f"{path} is truncated or is not a checkpoint ({_first_line(error)}); delete it to start afresh"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StageError(f"{path} is not a checkpoint of format {FORMAT}; delete it to start afresh")
    return content


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
