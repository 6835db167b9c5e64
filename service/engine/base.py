"""The engine protocol: a request's prompt, filter and step program in, scored items out.

An engine is bound to one bundle. What a request goes through between prompt and answer is data, its *step program*: a
sequence of thinking (free text up to a close), forced tokens, and codes. So reasoning, latent steps and re-ranking are
other programs, not other protocols. This module imports no torch.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from semantic_ids.bundle import Bundle
from semantic_ids.codes import SidSpace, TokenIds
from semantic_ids.decoding.exploration import Exploration
from semantic_ids.filters import ItemFilter
from semantic_ids.prompt import History
from semantic_ids.step_reader import StepReading
from semantic_ids.trie import Ranks


class EngineError(Exception):
    """The engine could not answer."""


class EngineUnavailableError(EngineError):
    """The engine is not running, or stopped while it worked: the fallback answers."""


class UnsupportedProgramError(EngineError):
    """The engine, or its bundle, cannot run such a step program."""


@dataclass(frozen=True)
class Think:
    """Free text until the close of thinking, at most so long; a thought that is cut off is closed for the model.

    `max_seconds` runs from when the engine begins the thought; on vLLM, where a thought is a request of its own, that
    includes its prompt.

    `close` (`prompt.ThinkingFormat.close`) stands between every thought and what follows it; its first token is the one
    by which the model itself ends a thought.
    """

    max_tokens: int
    max_seconds: float
    close: tuple[int, ...]


@dataclass(frozen=True)
class Forced:
    """Fixed tokens, the same for every beam. They add nothing to a score."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """The code of one level, among the trie's children under the request's filter."""

    level: int


StepProgram = tuple[Think | Forced | Code, ...]

ThoughtListener: TypeAlias = Callable[[Sequence[int]], None]
"""Called on the event loop with the new token ids of a thought, as they come."""

ThoughtEnd: TypeAlias = Literal["closed", "token_budget", "time_budget"]
"""Why a thought ended: by the model itself, or by which of its budgets."""


def sid_program(space: SidSpace, forced: Sequence[Sequence[int]] = ()) -> StepProgram:
    """The L codes, one after the other, each behind what its prompt forces there (`PromptRenderer.forced`)."""
    program: list[Forced | Code] = []
    for level in range(space.num_levels):
        if level < len(forced) and forced[level]:
            program.append(Forced(tuple(forced[level])))
        program.append(Code(level))
    return tuple(program)


@dataclass(frozen=True)
class Plan:
    """A step program as engines run it: perhaps a thought, then the codes with what is forced before each."""

    think: Think | None
    forced: tuple[tuple[int, ...], ...]  # L entries


def plan(program: StepProgram, num_levels: int) -> Plan:
    """Check a program; `UnsupportedProgramError` unless it is at most one thought and then the L codes in order."""
    think = program[0] if program and isinstance(program[0], Think) else None
    forced: list[tuple[int, ...]] = []
    pending: tuple[int, ...] = ()
    for step in program[1:] if think else program:
        if isinstance(step, Forced):
            pending += step.token_ids
        elif isinstance(step, Code) and step.level == len(forced):
            forced.append(pending)
            pending = ()
        else:
            raise UnsupportedProgramError(f"no engine can run {step} after {len(forced)} codes")
    if len(forced) != num_levels or pending:
        raise UnsupportedProgramError(
            f"a program ends with the code of level {num_levels - 1}; this one has {len(forced)} codes"
        )
    return Plan(think, tuple(forced))


@dataclass(frozen=True)
class DecodeRequest:
    """One request to an engine."""

    prompt: TokenIds  # (T,)
    item_filter: ItemFilter
    width: int
    program: StepProgram
    catalog_id: str  # the `Bundle.catalog_id` that prompt and filter were made for
    exploration: Exploration | None = None
    wants_trace: bool = False
    """Whether the steps of the best item are to be read, where the bundle's model thinks in any."""


@dataclass(frozen=True)
class StepTrace:
    """What the thinking steps before the codes of the best item meant, in their order.

    A step that was not run, because the codes before it leave one SID, is not there.
    """

    rank: int
    steps: tuple[StepReading, ...]


@dataclass(frozen=True)
class DecodeResult:
    """Items best first, at least min(width, eligible); equal SIDs have equal scores and stand by popularity."""

    ranks: Ranks  # (n,)
    scores: npt.NDArray[np.float32]  # (n,)
    propensity: npt.NDArray[np.float64] | None = None  # (n,) with which each was shown; None without exploration
    thought: tuple[int, ...] = ()  # without the close
    thought_end: ThoughtEnd | None = None  # None where the program does not think
    queue_s: float = 0.0
    think_s: float = 0.0
    decode_s: float = 0.0
    trace: StepTrace | None = None  # None too where nothing reads the model's steps


class Engine(Protocol):
    """What the service asks of an engine."""

    @property
    def name(self) -> str:
        """`local`, `vllm`, …"""
        ...

    @property
    def problem(self) -> str | None:
        """Why it takes no requests; None once it has decoded its canary, for as long as it can decode."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests accepted and not yet being decoded."""
        ...

    async def start(self) -> None:
        """Load, warm up, decode a canary SID; `EngineError` if that fails."""
        ...

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        """Decode one request. Cancelling it gives its place up, and stops its thought.

        `on_thought` hears every token of the thought once, in order, and all of them before this returns.
        """
        ...

    async def use_catalog(self, bundle: Bundle) -> None:
        """Requests pinned to this epoch of the engine's bundle may come from now on; `EngineError` if they may not.

        What it had before stays, each until it is retired; the epoch it was started with stays always.
        """
        ...

    async def retire_catalog(self, catalog_id: str) -> None:
        """No request is pinned to this epoch any more."""
        ...

    async def stop(self) -> None:
        """Finish what is being decoded, refuse the rest, free everything."""
        ...


def check_request(request: DecodeRequest, catalog_ids: Collection[str]) -> None:
    """Refuse alone what would fail a whole batch; `catalog_ids` are those that the engine has."""
    if request.catalog_id not in catalog_ids:
        raise EngineError(f"request for catalogue {request.catalog_id!r}, the engine has {', '.join(catalog_ids)}")
    if request.item_filter.num_eligible == 0:
        raise EngineError("a filter that leaves no item reached the engine")
    if not len(request.prompt) or request.width < 1:
        raise EngineError(f"a prompt of {len(request.prompt)} tokens and a width of {request.width} cannot be decoded")


async def canary(decode: Callable[[DecodeRequest], Awaitable[DecodeResult]], bundle: Bundle) -> None:
    """Decode one request for the likeliest item; `EngineError` unless a finite score comes back."""
    catalog = bundle.catalog
    prompt = bundle.renderer.render(History.of(catalog, [])).token_ids
    program = sid_program(catalog.space, bundle.renderer.forced)
    answer = await decode(DecodeRequest(prompt, ItemFilter.of(len(catalog)), 1, program, bundle.catalog_id))
    if len(answer.ranks) == 0 or not np.isfinite(answer.scores).all():
        raise EngineError(f"bundle {bundle.bundle_id}: the canary request was answered with {answer}")
