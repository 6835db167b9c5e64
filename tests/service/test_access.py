"""`service.access`: an `EngineRoute` answers as FastAPI's own handler does, byte for byte but ids and times."""

import json
from typing import Any

import pytest
from fastapi import APIRouter, Depends, Request

from service import routes
from service.access import EngineRoute, StrictRoute
from service.schemas import RecommendRequest, RecommendResponse, RerankResponse
from tests.service.running import Service
from tests.service.world import ITEM_IDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

TWIN = "/by-fastapi"
OF_ONE_ANSWER = {"request_id", "recommendation_id", "timings_ms"}
BODIES = [
    b"",
    b"null",
    b"[]",
    b"7",
    b'"a"',
    b"{}",
    b'{"user_id":',
    b'{"user_id":1,"num_items":0,"unknown":[]}',
    b'{"user_id":"a","num_items":"10"}',
    b'{"user_id":"a","filter":{"exclude_items":[1,2],"any_categories":null}}',
    b'{"user_id":"a","deadline_ms":500}',
    b'{"user_id":"a","deadline_ms":"soon"}',
    b'{"user_id":"a","reasoning":"on"}',
    b'{"user_id":"a","diversity":0.5,"exploration":{"temperature":1}}',
    b'{"candidates":[]}',
    b'{"candidates":["a","a"]}',
    json.dumps({"history": list(ITEM_IDS[:3])}).encode(),
    json.dumps({"history": list(ITEM_IDS[:3]), "candidates": list(ITEM_IDS[5:9])}).encode(),
]
DEADLINES = [None, "60000", "", "abc", "0", "1e3", "500"]


@pytest.fixture
def twins(instant_service: Service) -> Service:
    """The service, with FastAPI's handlers of the same endpoints beside its own."""
    twin = APIRouter(route_class=StrictRoute, prefix=TWIN)
    twin.post("/recommend", response_model=RecommendResponse)(routes.recommend)
    twin.post("/rerank", response_model=RerankResponse)(routes.rerank)
    instant_service.app.include_router(twin)
    return instant_service


async def answer_of(service: Service, path: str, body: bytes, deadline: str | None) -> tuple[int, dict[str, Any], str]:
    headers = {"content-type": "application/json"} | ({} if deadline is None else {"x-deadline-ms": deadline})
    response = await service.http.post(path, content=body, headers=headers)
    document = {name: value for name, value in response.json().items() if name not in OF_ONE_ANSWER}
    return response.status_code, document, response.headers["content-type"]


@pytest.mark.parametrize("path", ["/recommend", "/rerank"])
async def test_an_engine_route_answers_as_fastapi_would(twins: Service, path: str):
    statuses = set()
    for body in BODIES:
        for deadline in DEADLINES:
            ours = await answer_of(twins, path, body, deadline)
            assert ours == await answer_of(twins, TWIN + path, body, deadline), (body, deadline)
            statuses.add(ours[0])
    assert statuses == {200, 422}


async def one_more(body: RecommendRequest, request: Request, deadline: int, more: int) -> None:
    """An endpoint of another form."""


@pytest.mark.parametrize(("endpoint", "dependencies"), [(one_more, []), (routes.recommend, [Depends(lambda: None)])])
async def test_an_endpoint_that_fastapi_would_have_to_serve_is_refused(endpoint: Any, dependencies: list[Any]):
    with pytest.raises(TypeError, match="/x"):
        APIRouter(route_class=EngineRoute).post("/x", response_model=None, dependencies=dependencies)(endpoint)
