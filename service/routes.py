"""The HTTP endpoints: validate, admit, hand over, answer. No logic of their own."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import PlainTextResponse
from redis.exceptions import RedisError

import service.paths  # noqa: F401 - registers `any_text`
from semantic_ids.bundle import BundleError
from service.access import DEADLINE_HEADER, EngineRoute, StrictRoute, caller_of
from service.deployments import Deployment
from service.engine.base import EngineError
from service.errors import BadRequestProblem, ConflictProblem, ProblemDocument, UnavailableProblem
from service.event_types import IN_HISTORY
from service.experiments.exposures import ExposuresUnavailableError
from service.experiments.runtime import unit_of
from service.experiments.treatment import Treatment
from service.histories import Event, EventType, HistoryUnavailableError
from service.metrics import CONTENT_TYPE
from service.rationale import TextListener
from service.recommender import Recommender
from service.schemas import (
    BundleBeside,
    BundleResponse,
    DeadlineMs,
    EventsRequest,
    EventsResponse,
    HealthResponse,
    HistoryResponse,
    RecommendRequest,
    RecommendResponse,
    RejectedEvent,
    RerankRequest,
    RerankResponse,
    StoredEvent,
    UserId,
    UserRequest,
    VersionsResponse,
)
from service.security import require_admin
from service.served_log import ServedLogUnavailableError
from service.sse import EventStream, prefers_events
from service.state import State, state_of

T = TypeVar("T")
R = TypeVar("R", bound=UserRequest)
A = TypeVar("A", RecommendResponse, RerankResponse)

_PROBLEM = {"model": ProblemDocument, "description": "Problem document (RFC 9457)"}
PROBLEMS = dict.fromkeys((401, 404, 422, 503), _PROBLEM)

_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'event: thought\ndata: {"text":"You bought a kettle"}\n\n'
                'event: answer\ndata: {"recommendation_id":"01J…","items":[…],…}\n\n',
            }
        },
        "description": "The answer. With `Accept: text/event-stream`: the thought, checked, sentence by sentence "
        "(`thought` events, `{text}`), then one `answer` event with the same object as the plain answer, or one "
        "`problem` event with a problem document; comments keep the connection alive.",
    }
}


engine = APIRouter(route_class=EngineRoute, tags=["recommendations"], responses=PROBLEMS)  # type: ignore[arg-type]
api = APIRouter(route_class=StrictRoute, responses=PROBLEMS)  # type: ignore[arg-type]
operations = APIRouter(tags=["operations"])


async def administers(request: Request) -> None:
    """An administrator's key, where keys are configured."""
    require_admin(caller_of(request))


admin = APIRouter(
    route_class=StrictRoute,
    prefix="/admin",
    tags=["administration"],
    dependencies=[Depends(administers)],
    responses=PROBLEMS | dict.fromkeys((403, 409), _PROBLEM),  # type: ignore[arg-type]
)

DeadlineHeader = Annotated[DeadlineMs | None, Header(alias=DEADLINE_HEADER)]


@engine.post("/recommend", response_model=RecommendResponse, responses=_STREAMED)
async def recommend(
    body: RecommendRequest, request: Request, deadline: DeadlineHeader = None
) -> RecommendResponse | EventStream:
    """The items a user will most likely choose next."""
    question = _Question(Recommender.recommend, _with_deadline(body, deadline), caller_of(request).tenant)
    return await _answer(request, question)


@api.get("/recommend", tags=["recommendations"])
async def recommend_by_query(
    request: Request,
    user_id: Annotated[UserId | None, Query()] = None,
    num_items: Annotated[int, Query(ge=1, le=500)] = 10,
    deadline: DeadlineHeader = None,
) -> RecommendResponse:
    """The same with defaults."""
    body = _with_deadline(RecommendRequest(user_id=user_id, num_items=num_items), deadline)
    return await _answered(request, _Question(Recommender.recommend, body, caller_of(request).tenant), None)


@engine.post("/rerank", response_model=RerankResponse, responses=_STREAMED)
async def rerank(
    body: RerankRequest, request: Request, deadline: DeadlineHeader = None
) -> RerankResponse | EventStream:
    """Candidates in the order in which the user will most likely choose them."""
    question = _Question(Recommender.rerank, _with_deadline(body, deadline), caller_of(request).tenant)
    return await _answer(request, question)


@api.post("/events", tags=["events"])
async def record_events(body: EventsRequest, request: Request) -> EventsResponse:
    """Store what users did. Idempotent by `event_id`; what is accepted is on disk and visible to the next request."""
    state, caller = state_of(request), caller_of(request)
    with state.admission.slot():
        return await _recorded(state, caller.tenant, body)


async def _recorded(state: State, tenant: str, body: EventsRequest) -> EventsResponse:
    unknown_ids = state.deployments.unknown_items({event.item_id for event in body.events})
    rejected = [
        RejectedEvent(index=index, reason="unknown_item")
        for index, event in enumerate(body.events)
        if event.item_id in unknown_ids
    ]
    skipped = {one.index for one in rejected}
    events = [
        Event(event.event_id, event.user_id, event.item_id, event.event_type, event.timestamp, event.recommendation_id)
        for index, event in enumerate(body.events)
        if index not in skipped
    ]
    stored = await _or_unavailable(state, state.histories.of(tenant).record(events))
    for event, is_new in zip(events, stored, strict=True):
        if is_new:
            unit = unit_of(tenant, event.user_id)
            state.experiments.outcome(event.recommendation_id, unit, event.event_type)
            state.served.happened(
                event.recommendation_id,
                tenant,
                event.user_id,
                event.item_id,
                event.event_type,
                event.timestamp,
            )
    recommender = state.deployments.current.recommender
    for event in events:
        if event.event_type != EventType.IMPRESSION:
            recommender.withdraw(tenant, event.user_id, (event.item_id,))
    new = (event for event, is_new in zip(events, stored, strict=True) if is_new)
    for user_id in {event.user_id for event in new if event.event_type in IN_HISTORY}:
        thinking = state.deployments.named(state.experiments.thinking_bundle(user_id, tenant))
        thinking.recommender.history_moved(tenant, user_id)
    accepted = sum(stored)
    for outcome, count in (("accepted", accepted), ("duplicate", len(stored) - accepted), ("rejected", len(rejected))):
        state.metrics.events.labels(outcome).inc(count)
    return EventsResponse(accepted=accepted, duplicates=len(stored) - accepted, rejected=rejected)


@api.get("/users/{user_id:any_text}/history", tags=["users"])
async def user_history(user_id: UserId, request: Request) -> HistoryResponse:
    """The stored history, oldest first; an unknown user's is empty."""
    state, caller = state_of(request), caller_of(request)
    entries = await _or_unavailable(state, state.histories.of(caller.tenant).history(user_id))
    events = [
        StoredEvent(item_id=entry.item_id, timestamp=entry.timestamp, event_type=entry.event_type) for entry in entries
    ]
    return HistoryResponse(user_id=user_id, events=events)


@api.delete("/users/{user_id:any_text}", tags=["users"], status_code=204)
async def erase_user(user_id: UserId, request: Request) -> None:
    """Erase every key of the user."""
    state, caller = state_of(request), caller_of(request)
    await _or_unavailable(state, state.histories.of(caller.tenant).erase(user_id))
    state.deployments.current.recommender.forget(caller.tenant, user_id)
    try:
        await state.experiments.erase(unit_of(caller.tenant, user_id))
        await state.served.erase(caller.tenant, user_id)
    except (ExposuresUnavailableError, ServedLogUnavailableError) as error:
        raise UnavailableProblem(
            f"the user's experiments and logged answers are not all erased ({error}); send the request again"
        ) from error


@api.get("/versions", tags=["operations"])
async def versions(request: Request) -> VersionsResponse:
    """What is being served."""
    state = state_of(request)
    current = state.deployments.current
    bundle = current.bundle
    return VersionsResponse(
        service=service_version(),
        engine=state.engine.name,
        bundle=bundle.bundle_id,
        catalog_epoch=bundle.catalog.epoch,
        prompt=bundle.manifest.prompt.version,
        num_items=len(bundle.catalog),
        metrics=bundle.manifest.metrics,
        beside=[
            *(_beside(one, "experiment") for one in state.deployments.served if one is not current),
            *(_beside(one, "ending") for one in state.deployments.ending),
        ],
    )


def _beside(deployment: Deployment, role: Literal["experiment", "ending"]) -> BundleBeside:
    return BundleBeside(
        bundle=deployment.bundle_id,
        role=role,
        catalog_epoch=deployment.bundle.catalog.epoch,
        num_items=len(deployment.bundle.catalog),
        is_ready=deployment.engine.problem is None,
    )


@admin.post("/bundles/{bundle_id}/activate")
async def activate_bundle(bundle_id: str, request: Request) -> BundleResponse:
    """Serve a published bundle from now on, here and on every replica; requests under way end on the old one."""
    state = state_of(request)
    return await _activated(state.deployments.activate(bundle_id))


@admin.post("/rollback")
async def roll_back(request: Request) -> BundleResponse:
    """Serve the bundle that was current before."""
    state = state_of(request)
    return await _activated(state.deployments.rollback())


async def _activated(work: Awaitable[Deployment]) -> BundleResponse:
    try:
        deployment = await work
    except BundleError as error:
        raise ConflictProblem(str(error)) from error
    except OSError as error:
        raise ConflictProblem(
            f"the pointer to the bundle cannot be written ({error}): mount the folder writable"
        ) from error
    except EngineError as error:
        raise UnavailableProblem(f"the bundle's engine did not start ({error}); the old one is served on") from error
    return BundleResponse(bundle=deployment.bundle.bundle_id, catalog_epoch=deployment.bundle.catalog.epoch)


@operations.get("/health/live")
@operations.get("/v2/health/live", include_in_schema=False)
async def live() -> HealthResponse:
    """The process answers."""
    return HealthResponse(status="live")


@operations.get("/health/ready", responses={503: _PROBLEM})
@operations.get("/v2/health/ready", include_in_schema=False)
async def ready(request: Request) -> HealthResponse:
    """A bundle is loaded, the engine has decoded a canary SID, and Redis answers."""
    state = state_of(request)
    missing = []
    if state.engine.problem is not None:
        missing.append(state.engine.problem)
    try:
        async with asyncio.timeout(2.0):
            await state.redis.ping()
    except (RedisError, OSError, TimeoutError) as error:
        missing.append(f"Redis does not answer ({type(error).__name__})")
    if not state.live.is_loaded:
        missing.append("the changes of the catalogue have not been read")
    if missing:
        raise UnavailableProblem("; ".join(missing), kind="not-ready")
    return HealthResponse(status="ready")


@operations.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> PlainTextResponse:
    """Prometheus' text format."""
    state = state_of(request)
    state.metrics.engine_ready.set(state.engine.problem is None)
    state.metrics.engine_waiting.set(state.engine.num_waiting)
    return PlainTextResponse(state.metrics.exposition(), media_type=CONTENT_TYPE)


def service_version() -> str:
    """The package's version; images carry the source alone, without package metadata."""
    try:
        return version("sidrec")
    except PackageNotFoundError:
        return "unpackaged"


@dataclass(frozen=True)
class _Question(Generic[R, A]):
    """A request of a tenant's, still without the recommender that answers it."""

    method: Callable[[Recommender, R, str, TextListener | None, Treatment], Awaitable[A]]
    request: R
    tenant: str


async def _answer(request: Request, question: _Question[R, A]) -> A | EventStream:
    """The answer, or the stream of its events where the client prefers that."""
    if prefers_events(request.headers.getlist("accept")):
        return EventStream(request, lambda on_thought: _answered(request, question, on_thought))
    return await _answered(request, question, None)


async def _answered(request: Request, question: _Question[R, A], on_thought: TextListener | None) -> A:
    """The answer of the bundle that the user's variant names, else of the current one; in a slot while it is made.

    Nothing waits between the assignment and the lease, so an experiment that is in force has its bundles. Its stage
    times are noted for the response's headers.
    """
    state, asked, tenant = state_of(request), question.request, question.tenant
    with state.admission.slot():
        treatment = state.experiments.treatment(asked, tenant)
        async with state.deployments.named(treatment.overrides.bundle).leased() as epoch:
            answer = await question.method(epoch.recommender, asked, tenant, on_thought, treatment)
    request.scope["sidrec_timings_ms"] |= answer.timings_ms
    return answer


async def _or_unavailable(state: State, work: Awaitable[T]) -> T:
    """Redis failing is a clear 503: nothing was acknowledged, and the same request may be sent again."""
    try:
        return await work
    except HistoryUnavailableError as error:
        state.metrics.history_failures.inc()
        raise UnavailableProblem(
            f"histories cannot be read or written ({error}); nothing was acknowledged, send the request again",
            kind="history-unavailable",
        ) from error


def _with_deadline(body: R, deadline_ms: int | None) -> R:
    """The header wins over the default; saying both, and differently, is an error."""
    if deadline_ms is None or deadline_ms == body.deadline_ms:
        return body
    if "deadline_ms" in body.model_fields_set:
        raise BadRequestProblem(
            f"deadline_ms is {body.deadline_ms} in the body and {deadline_ms} in {DEADLINE_HEADER}: send one of them"
        )
    return body.model_copy(update={"deadline_ms": deadline_ms})
