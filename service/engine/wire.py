"""What crosses between the service and an engine's process: natives and bytes, and the errors by name.

Ranks travel as little-endian uint32, a category bitmap once, packed to a bit an item and named by its content.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog

from semantic_ids.decoding.exploration import Exploration
from semantic_ids.filters import ItemFilter, RankBitmap
from semantic_ids.step_reader import StepReading
from semantic_ids.trie import Ranks
from service.engine.base import StepTrace

if TYPE_CHECKING:
    from service.engine.search import Searched

log = structlog.get_logger(__name__)

RANK_DTYPE = np.dtype("<u4")
SCORE_DTYPE = np.dtype("<f4")
PROPENSITY_DTYPE = np.dtype("<f8")  # they may be very small

CAPTURE_ARG = "sid_capture"
"""The key in `SamplingParams.extra_args` of a prompt that is to be captured."""

ErrorKind: TypeAlias = Literal[
    "bad_request",  # malformed arguments
    "empty_allowed_set",  # a filter that leaves nothing, or a prefix without a legal code
    "unknown_prefix",  # output tokens that no catalogue item begins with
    "unknown_catalog",  # a catalogue epoch that this engine does not have
    "unknown_bitmap",  # a bitmap that this engine was not given, or has forgotten: send it
    "unknown_capture",  # no prompt was captured under this key
    "placeholder",  # a -1 among the output tokens: vLLM has not sampled them yet
    "internal",  # a fault of our own; the engine's log has it
]


class SidRequestError(Exception):
    """One request failed inside the engine; the others go on."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def as_wire(self) -> dict[str, str]:
        """For the answer."""
        return {"error": self.kind, "message": str(self)}


@dataclass(frozen=True)
class WireFilter:
    """An `ItemFilter` by value, its bitmap by name."""

    allow: bytes | None
    deny: bytes
    bitmap: str | None

    @classmethod
    def of(cls, item_filter: ItemFilter) -> "WireFilter":
        """The filter of a request, ready to be sent."""
        return cls(
            allow=None if item_filter.allow is None else pack_ranks(item_filter.allow),
            deny=pack_ranks(item_filter.deny),
            bitmap=None if item_filter.bitmap is None else item_filter.bitmap.digest,
        )

    def as_wire(self) -> dict[str, Any]:
        """Natives only."""
        return {"allow": self.allow, "deny": self.deny, "bitmap": self.bitmap}

    @classmethod
    def parse(cls, wire: Mapping[str, Any]) -> "WireFilter":
        """Check the types; absent fields mean "no such restriction"."""
        allow, deny, bitmap = wire.get("allow"), wire.get("deny", b""), wire.get("bitmap")
        for name, value, kinds in (
            ("allow", allow, (bytes, type(None))),
            ("deny", deny, bytes),
            ("bitmap", bitmap, (str, type(None))),
        ):
            if not isinstance(value, kinds):
                raise SidRequestError(
                    "bad_request", f"{name} is {type(value).__name__}: ranks are bytes, a bitmap a name"
                )
        return cls(allow, deny, bitmap)


@dataclass(frozen=True)
class BeamRequest:
    """One captured prompt's search."""

    key: str
    width: int
    item_filter: WireFilter
    exploration: Exploration | None = None
    wants_trace: bool = False

    @property
    def num_beams(self) -> int:
        """Beams that its search has at most."""
        return self.width if self.exploration is None else self.exploration.num_beams(self.width)

    def as_wire(self) -> dict[str, Any]:
        """Natives only."""
        return {
            "key": self.key,
            "width": self.width,
            "filter": self.item_filter.as_wire(),
            "exploration": None if self.exploration is None else list(astuple(self.exploration)),
            "wants_trace": self.wants_trace,
        }

    @classmethod
    def parse(cls, wire: Mapping[str, Any]) -> "BeamRequest":
        """Our own service sends it, so only its filter is checked."""
        explored = wire["exploration"]
        exploration = None if explored is None else Exploration(*explored)
        return cls(wire["key"], wire["width"], WireFilter.parse(wire["filter"]), exploration, wire["wants_trace"])


def room_for(forced: Sequence[Sequence[int]], num_beams: int) -> int:
    """Slots that a search may need behind a prompt: one a beam for each code but the last, and each forced token."""
    return num_beams * (len(forced) - 1 + sum(map(len, forced)))


@dataclass(frozen=True)
class BeamReport:
    """What one call of the beam did, for metrics."""

    answers: list[dict[str, Any]]
    steps: int
    beams: int
    closed_beams: int
    masked_share: float
    num_captures: int
    seconds: float

    def as_wire(self) -> dict[str, Any]:
        """Natives only."""
        return asdict(self)


def pack_answer(answer: "Searched | Exception") -> dict[str, Any]:
    """What one search found, or why it failed; a fault of our own goes into this process's log."""
    if isinstance(answer, SidRequestError):
        return answer.as_wire()
    if isinstance(answer, Exception):
        log.error("beam_failed", exc_info=answer)
        return SidRequestError("internal", f"decoding failed: {type(answer).__name__}").as_wire()
    items, trace = answer.items, answer.trace
    propensity = None if items.propensity is None else items.propensity.astype(PROPENSITY_DTYPE).tobytes()
    scores = items.scores.astype(SCORE_DTYPE).tobytes()
    steps = None if trace is None else [trace.rank, [list(astuple(step)) for step in trace.steps]]
    return {"ranks": pack_ranks(items.ranks), "scores": scores, "propensity": propensity, "trace": steps}


def unpack_trace(wire: Sequence[Any] | None) -> StepTrace | None:
    """The trace of an answer that `pack_answer` made."""
    return None if wire is None else StepTrace(wire[0], tuple(StepReading(*step) for step in wire[1]))


def pack_ranks(ranks: Ranks) -> bytes:
    """Ranks (n,) as bytes."""
    return ranks.astype(RANK_DTYPE).tobytes()


def unpack_ranks(data: bytes, num_items: int) -> Ranks:
    """Sorted unique ranks below `num_items`, as a filter holds them; anything else is a bad request."""
    if len(data) % RANK_DTYPE.itemsize:
        raise SidRequestError("bad_request", f"{len(data)} bytes are no whole number of ranks of 4 bytes")
    ranks = np.frombuffer(data, RANK_DTYPE).astype(np.int64)
    if len(ranks) and (ranks[-1] >= num_items or (len(ranks) > 1 and not bool((ranks[1:] > ranks[:-1]).all()))):
        raise SidRequestError("bad_request", f"ranks must rise and stay below the {num_items} items of the catalogue")
    return ranks


def pack_bitmap(bitmap: RankBitmap) -> bytes:
    """One bit an item."""
    return np.packbits(bitmap.member).tobytes()


def unpack_bitmap(data: bytes, num_items: int) -> RankBitmap:
    """The bitmap with its prefix sums."""
    if len(data) != -(-num_items // 8):
        raise SidRequestError("bad_request", f"a bitmap of {len(data)} bytes does not fit {num_items} items")
    member: npt.NDArray[np.bool_] = np.unpackbits(np.frombuffer(data, np.uint8), count=num_items).astype(np.bool_)
    return RankBitmap.of(member)
