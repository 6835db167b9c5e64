"""The engine protocol: a request's prompt, filter and step program in, scored items out.

An engine is bound to one bundle. What a request goes through between prompt and answer is data, its *step program*: a
sequence of thinking (free text up to a close), forced tokens, and codes. So reasoning, latent steps and re-ranking are
other programs, not other protocols. This module imports no torch.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from semantic_ids.codes import SidSpace, TokenIds
from semantic_ids.filters import ItemFilter
from semantic_ids.trie import Ranks


class EngineError(Exception):
    """The engine could not answer."""


class EngineUnavailableError(EngineError):
    """The engine is not running, or stopped while it worked: the fallback answers."""


class UnsupportedProgramError(EngineError):
    """The engine, or its bundle, cannot run such a step program."""


@dataclass(frozen=True)
class Think:
    """Free text until the close of thinking, at most so long; a thought that is cut off is closed for the model."""

    max_tokens: int
    max_seconds: float


@dataclass(frozen=True)
class Forced:
    """Fixed tokens, the same for every beam. They add nothing to a score."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """The code of one level, among the trie's children under the request's filter."""

    level: int


StepProgram = tuple[Think | Forced | Code, ...]


def sid_program(space: SidSpace) -> StepProgram:
    """The plain program: the L codes, one after the other."""
    return tuple(Code(level) for level in range(space.num_levels))


@dataclass(frozen=True)
class DecodeRequest:
    """One request to an engine."""

    prompt: TokenIds  # (T,)
    item_filter: ItemFilter
    width: int
    program: StepProgram
    catalog_epoch: int


@dataclass(frozen=True)
class DecodeResult:
    """Items best first, at least min(width, eligible); equal SIDs have equal scores and stand by popularity."""

    ranks: Ranks  # (n,)
    scores: npt.NDArray[np.float32]  # (n,)
    thought: TokenIds = field(default_factory=lambda: np.empty(0, np.int64))
    queue_s: float = 0.0
    decode_s: float = 0.0


class Engine(Protocol):
    """What the service asks of an engine."""

    @property
    def name(self) -> str:
        """`local`, `vllm`, …"""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether it has decoded its canary and can take requests."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests accepted and not yet being decoded."""
        ...

    async def start(self) -> None:
        """Load, warm up, decode a canary SID; `EngineError` if that fails."""
        ...

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        """Decode one request. Cancelling it gives its place up."""
        ...

    async def stop(self) -> None:
        """Finish what is being decoded, refuse the rest, free everything."""
        ...
