"""One training run on several processes, as `accelerate launch` starts them; all no-ops in a run of one.

The launcher and the process group are accelerate's, the gradients' averaging and the shards of FSDP torch's. This
module adds the few collective operations that stages need, so that no stage asks how many processes there are.
"""

import atexit
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.sharding import shard
from training.stage import StageError, is_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

_LAUNCHERS_VARIABLES = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"}  # of torchrun, and of accelerate's own launcher

LONGEST_WAIT = timedelta(days=7)
"""The others wait while the first process embeds texts or writes a catalogue."""

_FOR_LAST_TENSORS = 0.2
"""Seconds in which the threads of a process group drop what they hold: microseconds, and a busy machine's turn."""


class Processes:
    """This process among those of its launch."""

    def __init__(self, accelerator: "Accelerator | None", fsdp: "FullyShardedDataParallelPlugin | None" = None) -> None:
        """`fsdp`: what the launch wants of it; absent: no shards."""
        self._accelerator = accelerator
        self._fsdp = fsdp
        self.count = accelerator.num_processes if accelerator else 1
        self.index = accelerator.process_index if accelerator else 0

    @classmethod
    def alone(cls) -> "Processes":
        """A run of one process, whatever the launch: for what every process computes for itself."""
        return cls(None)

    @classmethod
    def launched(cls) -> "Processes":
        """The processes of this launch; one, without `accelerate launch`."""
        return _launched() if os.environ.keys() & _LAUNCHERS_VARIABLES else cls.alone()

    @property
    def is_main(self) -> bool:
        """Whether this one writes."""
        return is_main_process()

    @cached_property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._accelerator.device if self._accelerator else torch.device("cpu")

    def device_for(self, setting: str) -> torch.device:
        """The device of a stage that may be told: `auto` is the launch's, without a launch the machine's accelerator.

        A device that is not there, or not the launch's, raises StageError.
        """
        if self._accelerator is not None:
            if setting not in ("auto", self.device.type):
                raise StageError(f"device={setting}, and this launch computes on {self.device.type}: leave device out")
            return self.device
        if setting == "auto":
            return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        try:
            return torch.empty(0, device=setting).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise StageError(f"device={setting} is not here ({error}): name another, or auto") from error

    def share(self, count: int) -> slice:
        """This process's part of `count` things; parts differ by one at most."""
        return slice(*self._edges(count)[self.index : self.index + 2])

    def prepare(self, model: nn.Module, parts: Iterable[nn.Module] = ()) -> nn.Module:
        """The model with gradients that are the *mean* over all processes. Make the optimiser afterwards.

        A model of parts is in shards where the launch wants FSDP (`training.sharding`).
        """
        parts = list(parts)
        if self.count == 1:
            return model
        if parts and self._fsdp is not None:
            shard(model, parts, self.device, reshard_after_forward=bool(self._fsdp.reshard_after_forward))
            return model
        return nn.parallel.DistributedDataParallel(model)

    def gather(self, share: Tensor, count: int) -> Tensor:
        """Every process's share of `count` rows, one after the other; no gradient."""
        if self._accelerator is None:
            return share
        return self._joined(list(self._accelerator.gather(self._padded(share, count)[None])), count)

    def gather_with_gradient(self, share: Tensor, count: int) -> Tensor:
        """The same, with the gradient of every process's loss back to whoever gave the share."""
        if self._accelerator is None:
            return share
        from torch.distributed.nn.functional import all_gather

        return self._joined(list(all_gather(self._padded(share, count))), count)  # type: ignore[no-untyped-call]

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the processes."""
        if self._accelerator is None:
            return values
        summed: Tensor = self._accelerator.reduce(values.to(self.device), "sum")
        return summed.to(values.device)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others enter once the first process has left; they find what it made."""
        if not self.is_main:
            self.wait_for_all()
        yield
        if self.is_main:  # not after an exception: the launcher then ends the others
            self.wait_for_all()

    def wait_for_all(self) -> None:
        """Return when every process is here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def _edges(self, count: int) -> list[int]:
        return [process * count // self.count for process in range(self.count + 1)]

    def _padded(self, share: Tensor, count: int) -> Tensor:
        """The share filled up to the longest one: collectives want equal shapes."""
        return functional.pad(share, [0, 0] * (share.dim() - 1) + [0, -(-count // self.count) - len(share)])

    def _joined(self, padded: list[Tensor], count: int) -> Tensor:
        lengths = [stop - start for start, stop in itertools.pairwise(self._edges(count))]
        return torch.cat([share[:length] for share, length in zip(padded, lengths, strict=True)])


@cache
def _launched() -> Processes:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    without_gpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=without_gpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    atexit.register(_leave, accelerator)
    return Processes(accelerator, _launched_fsdp())


def _leave(accelerator: "Accelerator") -> None:
    """Before the interpreter ends: a thread of Gloo's that drops its last tensor later than that aborts the process.

    It needs the GIL to do so, which this one gives it; the launcher would call a finished training failed.
    """
    accelerator.end_training()  # most of torch's references to the group, not all: so its threads are not joined
    time.sleep(_FOR_LAST_TENSORS)


def _launched_fsdp() -> "FullyShardedDataParallelPlugin | None":
    """What `accelerate launch` was told of FSDP. accelerate itself would have it on GPUs only."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    fsdp = FullyShardedDataParallelPlugin()
    if fsdp.fsdp_version != 2:
        raise StageError(f"this launch asks for FSDP version {fsdp.fsdp_version}: give fsdp_version: 2")
    for name in ("offload_params", "activation_checkpointing"):
        if os.environ.get(f"FSDP_{name.upper()}", "false").lower() == "true":
            raise StageError(f"this launch asks for fsdp_{name}, which is not supported here: leave it out")
    return fsdp
