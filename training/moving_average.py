"""The exponential moving average of a model's weights, as a checkpoint keeps it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.sharding import as_held

_YOUNG = 10  # steps: the decay is (1 + n) / (10 + n) until that is more than asked for, so that the start fades


class MovingAverage:
    """Beside the parameters, of which there must be the same ones at every step.

    Not `torch.optim.swa_utils`: that copies modules, and a table that is made of other parameters cannot be copied.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self._num_updates = 0
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """A step was taken."""
        self._num_updates += 1
        decay = min(self._decay, (1 + self._num_updates) / (_YOUNG + self._num_updates))
        torch._foreach_lerp_(self._average, [parameter.detach() for parameter in self._parameters], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters are their averages for as long as the context."""
        weights = [parameter.detach().clone() for parameter in self._parameters]
        self._set(self._average)
        try:
            yield
        finally:
            self._set(weights)

    def state(self) -> dict[str, Any]:
        """What `load_state` takes."""
        return {"num_updates": self._num_updates, "average": self._average}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._num_updates = state["num_updates"]
        self._average = [as_held(value, own) for value, own in zip(state["average"], self._average, strict=True)]

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
