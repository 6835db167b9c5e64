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
from torch import Tensor, nn

from training.sharding import as_held, whole
from training.stage import StageError, is_main_process

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

    All processes of a launch are to call it where the model is in shards; the first one writes. `extra` takes numbers,
    strings, tensors, and lists and dicts of them: what loads again without running code.
    torch's own random state is always kept; `generators` names the numpy generators of the loop.
    """
    content = {
        "format": FORMAT,
        "step": step,
        "model": whole(model.state_dict()),
        "optimizer": whole(optimizer.state_dict()),
        "scheduler": scheduler.state_dict() if scheduler else None,
        "extra": whole(dict(extra or {})),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy_rng": {name: generator.bit_generator.state for name, generator in (generators or {}).items()},
    }
    if not is_main_process():
        return
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
        model.load_state_dict(_as_held(content["model"], model.state_dict()))
        optimizer.load_state_dict(_optimizer_as_held(content["optimizer"], optimizer))
        if scheduler:
            scheduler.load_state_dict(content["scheduler"])
        for name, generator in (generators or {}).items():
            generator.bit_generator.state = content["numpy_rng"][name]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"{path} was written by another training set-up ({_first_line(error)}); delete it to start afresh"
        ) from error
    torch.set_rng_state(content["torch_rng"])
    for device, state in zip(range(torch.cuda.device_count()), content["cuda_rng"], strict=False):
        torch.cuda.set_rng_state(state, device)
    return Checkpoint(content["step"], content["extra"])


def _as_held(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is another model's stays as it is, for `load_state_dict` to name."""
    return {
        name: as_held(value, own[name]) if name in own and value.shape == own[name].shape else value
        for name, value in state.items()
    }


def _optimizer_as_held(content: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What belongs to a parameter, and has its shape, goes where the parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            name: as_held(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in of_parameter.items()
        }
        for number, of_parameter in content["state"].items()
    }
    return content | {"state": state}


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
