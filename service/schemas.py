"""The bodies of the HTTP contract. Strict: an unknown field, or a value of another JSON type, is a 422."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from semantic_ids.filters import FilterSpec
from service.event_types import EXCLUDING, IN_HISTORY, EventType

UserId = Annotated[str, StringConstraints(min_length=1, max_length=128)]
ItemId = Annotated[str, StringConstraints(min_length=1, max_length=128)]
EventId = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Category = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Timestamp = Annotated[float, Field(allow_inf_nan=False, ge=-1e12, le=1e12)]
DeadlineMs = Annotated[int, Field(ge=10, le=60_000)]
DEFAULT_DEADLINE_MS = 1_000

MAX_HISTORY = 10_000
MAX_FILTER_NAMES = 10_000

Reason = Literal[
    "deadline",
    "engine_unavailable",
    "history_unavailable",
    "cold_start",
    "filter_matches_nothing",
    "model_output_repaired",
]
Source = Literal["model", "cache", "fallback"]
Reasoning = Literal["auto", "off", "on"]


class Body(BaseModel):
    """Base of every body that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class HistoryEvent(Body):
    """One item of an inline history."""

    item_id: ItemId
    timestamp: Timestamp | None = None
    event_type: Annotated[EventType, Field(strict=False)] = EventType.CLICK


class ItemFilterBody(Body):
    """Restrictions on the answer; an absent or empty list means "no such restriction"."""

    include_items: Annotated[list[ItemId], Field(fail_fast=True)] = Field([], max_length=MAX_FILTER_NAMES)
    exclude_items: Annotated[list[ItemId], Field(fail_fast=True)] = Field([], max_length=MAX_FILTER_NAMES)
    any_categories: Annotated[list[Category], Field(fail_fast=True)] = Field([], max_length=MAX_FILTER_NAMES)
    none_categories: Annotated[list[Category], Field(fail_fast=True)] = Field([], max_length=MAX_FILTER_NAMES)

    def spec(self) -> FilterSpec:
        """The same by name, for the filter compiler."""
        return FilterSpec(
            frozenset(self.include_items),
            frozenset(self.exclude_items),
            frozenset(self.any_categories),
            frozenset(self.none_categories),
        )


_NO_FILTER = ItemFilterBody()  # one for all: to make one copies each of its lists


class UserRequest(Body):
    """What `/recommend` and `/rerank` share: whose taste it is, and how long the answer may take."""

    user_id: UserId | None = None
    history: Annotated[list[ItemId | HistoryEvent], Field(fail_fast=True)] | None = Field(
        None,
        max_length=MAX_HISTORY,
        description="oldest first; replaces the stored history in the prompt for this call",
    )
    reasoning: Reasoning = "auto"
    include_rationale: bool = False
    deadline_ms: DeadlineMs = DEFAULT_DEADLINE_MS

    def inline_history(self) -> list[str] | None:
        """Item ids of the inline history that a prompt shows: dislikes, hides and impressions are no taste."""
        if self.history is None:
            return None
        return [
            entry if isinstance(entry, str) else entry.item_id
            for entry in self.history
            if isinstance(entry, str) or entry.event_type in IN_HISTORY
        ]

    def inline_items(self) -> list[str]:
        """Every item id that the inline history names."""
        return [entry if isinstance(entry, str) else entry.item_id for entry in self.history or []]

    def inline_exclusions(self) -> list[str]:
        """Item ids that the inline history dislikes or hides."""
        return [
            entry.item_id
            for entry in self.history or []
            if not isinstance(entry, str) and entry.event_type in EXCLUDING
        ]


class RecommendRequest(UserRequest):
    """POST /recommend."""

    num_items: int = Field(10, ge=1, le=500)
    filter: ItemFilterBody = Field(default_factory=lambda: _NO_FILTER)
    exclude_seen: bool = True
    diversity: float = Field(0.0, ge=0.0, le=1.0, allow_inf_nan=False)
    exploration: float = Field(0.0, ge=0.0, le=1.0, allow_inf_nan=False)


class RerankRequest(UserRequest):
    """POST /rerank."""

    candidates: list[ItemId] = Field(min_length=1, max_length=500, json_schema_extra={"uniqueItems": True})

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len(set(self.candidates)) != len(self.candidates):
            repeated = next(item for index, item in enumerate(self.candidates) if item in self.candidates[:index])
            raise ValueError(f"candidates must be unique; {repeated!r} appears more than once")
        return self


class EventBody(Body):
    """One event."""

    event_id: EventId
    user_id: UserId
    item_id: ItemId
    event_type: Annotated[EventType, Field(strict=False)]
    timestamp: Timestamp
    recommendation_id: Annotated[str, StringConstraints(max_length=128)] | None = None


class EventsRequest(Body):
    """POST /events."""

    events: list[EventBody] = Field(min_length=1, max_length=1_000)


class ItemBody(Body):
    """PUT /items/{item_id}."""

    title: Annotated[str, StringConstraints(max_length=1_024)]
    categories: list[Annotated[Category, Field(json_schema_extra={"pattern": r"^[^\u0000\u001f]*$"})]] = Field(
        [], max_length=64
    )
    sid: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = Field(
        None, description="without one: what the item has, and for a new one a free one from the bundle's codebooks"
    )


class ExperimentInfo(BaseModel):
    """The experiment and variant that an answer belongs to."""

    name: str
    variant: str


class Versions(BaseModel):
    """What an answer was made with."""

    bundle: str
    catalog_epoch: int
    prompt: int


class RecommendedItem(BaseModel):
    """One item of a recommendation."""

    item_id: str
    rank: int
    score: float | None = Field(description="the SID's log-probability among legal codes; null for fallback items")
    sid: str
    title: str
    source: Source
    propensity: float


class TracedItem(BaseModel):
    """An item that is typical of what a step meant."""

    item_id: str
    title: str


class TracedStep(BaseModel):
    """What a model that thinks in steps meant before it chose a code of the first item."""

    level: int = Field(description="of the code that follows the step, from 1")
    cluster: int = Field(description="the cluster of that level's codes that the step is nearest to")
    cosine: float = Field(description="how near: from -1 to 1, the centre itself")
    share: float = Field(description="of the cluster among all of its level: they sum to 1")
    within: str = Field(description="the codes of the first item that the typical items begin with; empty: with any")
    typical: list[TracedItem] = Field(description="items of the cluster, each one that the request could be given")


class Answer(BaseModel):
    """What both answers share."""

    recommendation_id: str
    user_id: str | None
    rationale: str | None
    trace: list[TracedStep] | None = Field(
        None,
        description="with include_rationale, of bundles that think in steps: those that were run for the first item",
    )
    ignored_items: list[str] = Field(description="items of the history that the catalogue does not hold")
    source: Source
    degraded: bool
    reason: Reason | None
    experiment: ExperimentInfo | None
    versions: Versions
    timings_ms: dict[str, float]


class RecommendResponse(Answer):
    """Answer of /recommend, best first."""

    items: list[RecommendedItem]


class RerankedItem(BaseModel):
    """One candidate."""

    item_id: str
    rank: int
    score: float | None
    known: bool


class RerankResponse(Answer):
    """Answer of /rerank: every candidate exactly once, best first, unknown ones last in the order given."""

    items: list[RerankedItem]


class RejectedEvent(BaseModel):
    """An event that was not stored, by its place in the request."""

    index: int
    reason: str


class EventsResponse(BaseModel):
    """Answer of /events."""

    accepted: int
    duplicates: int
    rejected: list[RejectedEvent]


class StoredEvent(BaseModel):
    """One entry of a stored history."""

    item_id: str
    timestamp: float
    event_type: EventType


class HistoryResponse(BaseModel):
    """Answer of /users/{user_id}/history, oldest first."""

    user_id: str
    events: list[StoredEvent]


class BundleBeside(BaseModel):
    """A bundle that is loaded beside the current one."""

    bundle: str
    role: Literal["experiment", "ending"] = Field(
        description="experiment: answers the users of variants that name it; ending: answers its last requests"
    )
    catalog_epoch: int
    num_items: int
    is_ready: bool = Field(description="whether its engine takes requests; if not, the fallback answers")


class VersionsResponse(BaseModel):
    """Answer of /versions."""

    service: str
    engine: str
    bundle: str
    catalog_epoch: int
    prompt: int
    num_items: int
    metrics: dict[str, float]
    beside: list[BundleBeside] = Field([], description="the bundles that are loaded beside the current one")


class ItemResponse(BaseModel):
    """An item, and the epoch of the catalogue that it was read from or put into."""

    item_id: str
    title: str
    categories: list[str]
    sid: str
    catalog_epoch: int


class ItemDeletedResponse(BaseModel):
    """Answer of DELETE /items/{item_id}."""

    item_id: str
    catalog_epoch: int


class BundleResponse(BaseModel):
    """Answer of the bundle administration: what is served now."""

    bundle: str
    catalog_epoch: int


class HealthResponse(BaseModel):
    """Answer of the health endpoints."""

    status: Literal["live", "ready"]
