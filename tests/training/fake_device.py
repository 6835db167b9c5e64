"""Training steps on a device that is not there: `python -m tests.training.fake_device VARIANT…`, a process of its own.

Fake tensors have a shape and a device, no numbers, and refuse to mix devices. Their device here is one that torch knows
by name alone, once for the whole process. Only the way back is left out; it is where the way there was.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

from tests.training.conftest import make_catalog
from training.distillation import Continuations, TeacherLists
from training.examples import Examples, continuation_lessons, sequence_lessons
from training.generator import build_model
from training.item_memory import KnownItems
from training.learner import Learner, Teaching
from training.likelihood import bake, item_log_likelihood
from training.processes import Processes
from training.sequences import Sequences
from training.sft_config import SftConfig

CODES = [(first, second, third) for first in range(3) for second in range(2) for third in range(2)]
SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "max_history": 6, "batch_size": 4}
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "qwen3": {"architecture": "qwen3"},
    "item memory": {"item_memory": True},
    "teachers": {"item_memory": True, "distillation": 0.5, "continuations": 5, "moving_average": 0.9},
    "clusters alone": {"step_clusters": 2},
    "continuous steps": {"steps": (1, 1, 1), "step_form": "continuous"},
    "steps": {"steps": (1, 1, 1), "step_clusters": 2, "global_interest": 0.1, "moving_average": 0.9},
}

RNG = np.random.default_rng(1)
TRAIN = Sequences.of([RNG.permutation(len(CODES)).astype(np.int32)[:length] for length in (3, 5, 6, 4)])
CONTINUED = Sequences.of([RNG.permutation(len(CODES)).astype(np.int32)[:6] for _ in range(5)])


class NoNumbers(Processes):
    """A process alone whose loss is a number, though fake tensors have none."""

    def sum(self, values: Tensor) -> Tensor:
        """1, whatever the values."""
        return 1.0  # type: ignore[return-value]


def fake_device() -> torch.device:
    """Of a kind that no tensor has by mistake."""
    return torch.device("absent", 0)


def lists(count: int) -> TeacherLists:
    """What a teacher may expect: two items, and no more."""
    items = RNG.integers(len(CODES), size=(count, 2)).astype(np.int32)
    return TeacherLists(items, np.full((count, 2), 0.5, np.float32))


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """`nn.Module.to`, which cannot give a fake tensor another device in place."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            part._parameters[name] = None if weight is None else nn.Parameter(weight.detach().to(device))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    return module


def take_a_step(settings: dict[str, object]) -> None:
    """Train, then score: both are to be where the model is, from the loss to the last parameter."""
    device, alone = fake_device(), NoNumbers.alone()
    config = SftConfig.model_validate(SMALL | settings)
    catalog = make_catalog(CODES, codebook_size=3)
    known = KnownItems.of(*(RNG.normal(size=(len(catalog), 20)).astype(np.float32) for _ in range(2)))
    teaching = Teaching(
        known=known if config.item_memory else None,
        lists=lists(len(TRAIN.items)) if config.distillation else None,
        continuations=Continuations(CONTINUED, lists(3 * len(CONTINUED))) if config.continuations else None,
        codebooks=RNG.normal(size=(3, 3, 4)).astype(np.float32) if config.step_clusters else None,
    )
    model, vocabulary, renderer = build_model(config, catalog, Path(), teaching.known)
    examples = Examples(catalog, vocabulary, renderer)
    lesson = next(sequence_lessons(TRAIN, teaching.lists, examples, config, 0, alone))
    further = next(continuation_lessons(teaching.continuations, examples, config, 0, alone))
    assert (further is not None) == bool(config.continuations)
    losses: list[Tensor] = []

    def backward(loss: Tensor) -> None:
        losses.append(loss)
        for weight in learner._trained.parameters():
            weight.grad = torch.zeros_like(weight)

    def to(tensor: Tensor, *where: Any, **named: Any) -> Tensor:
        """A real tensor becomes a fake one first: nothing real can get to the device."""
        is_going = device in (*where, *named.values()) and not isinstance(tensor, FakeTensor)
        return real_to(mode.from_tensor(tensor) if is_going else tensor, *where, **named)

    def made(data: Any, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        return torch.zeros(np.shape(data), dtype=dtype, device=device)

    real_to, mode = Tensor.to, FakeTensorMode(allow_non_fake_inputs=True)  # what was made until here is on the CPU
    with (
        mode,
        torch.no_grad(),
        patch.object(torch, "tensor", made),
        patch.object(Tensor, "to", to),
        patch.object(nn.Module, "to", moved),
    ):
        learner = Learner(config, moved(model, device), examples, teaching, 10, alone)
        with patch.object(torch.autograd, "backward", backward):
            learner.step(lesson, further)
        with learner.kept_weights():
            bake(model)
            scores = item_log_likelihood(model, catalog, vocabulary, lesson.batch.to(device))
        found = {tensor.device for tensor in (*losses, scores, *learner._trained.parameters())}
    assert found == {device}, f"on {found}"


class _Absent(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What `torch.autocast` asks even where it does nothing."""
        return [torch.bfloat16]


def main() -> None:
    """For each variant that is named, a line: null, or what went wrong."""

    backend_registration._setup_privateuseone_for_python_backend("absent", _Absent())
    for name in sys.argv[1:]:
        try:
            take_a_step(VARIANTS[name])
            wrong = None
        except Exception:
            wrong = traceback.format_exc()
        sys.stdout.write(json.dumps(wrong) + "\n")


if __name__ == "__main__":
    main()
