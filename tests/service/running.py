"""The real application, running: its lifespan entered, spoken to over ASGI."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import httpx
from fastapi import FastAPI

from service.app import EngineFactory, create_app, make_engine
from service.settings import Settings
from service.state import State

PATIENT_MS = 60_000
"""A deadline that no test machine misses."""

_event_ids = count()


@dataclass(frozen=True)
class Service:
    """A running service and a client of it."""

    app: FastAPI
    http: httpx.AsyncClient

    @property
    def state(self) -> State:
        """What the lifespan made."""
        state: State = self.app.state.sidrec
        return state

    async def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        """POST any JSON; underscores in header names stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post(path, json=body, headers=named)

    async def recommend(self, **body: Any) -> dict[str, Any]:
        """A 200 of /recommend, with time enough unless the body says otherwise."""
        return _ok(await self.post("/recommend", {"deadline_ms": PATIENT_MS, **body}))

    async def rerank(self, **body: Any) -> dict[str, Any]:
        """A 200 of /rerank, likewise."""
        return _ok(await self.post("/rerank", {"deadline_ms": PATIENT_MS, **body}))

    async def record(self, *events: dict[str, Any]) -> dict[str, Any]:
        """A 200 of /events."""
        return _ok(await self.post("/events", {"events": events}))

    async def history(self, user_id: str) -> list[str]:
        """Item ids of the stored history, oldest first."""
        answer = _ok(await self.http.get(f"/users/{user_id}/history"))
        return [event["item_id"] for event in answer["events"]]

    async def clicks(self, user_id: str, *item_ids: str) -> None:
        """Click on items, one after the other."""
        answer = await self.record(*(event(user_id, item_id, timestamp=time) for time, item_id in enumerate(item_ids)))
        assert answer["accepted"] == len(item_ids)


def event(user_id: str, item_id: str, event_type: str = "click", timestamp: float = 0.0, **more: Any) -> dict[str, Any]:
    """The body of one event with an id of its own."""
    return {
        "event_id": f"event-{next(_event_ids)}",
        "user_id": user_id,
        "item_id": item_id,
        "event_type": event_type,
        "timestamp": timestamp,
        **more,
    }


def assert_problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The problem document of an error, whatever the error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert set(document) == {"type", "title", "status", "detail", "request_id", "errors"}
    assert document["type"] == f"urn:sidrec:{kind}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert document["request_id"] == response.headers["x-request-id"]
    assert all(set(error) == {"path", "message"} for error in document["errors"])
    assert "dur=" in response.headers["server-timing"]
    return document


async def until(condition: Callable[[], bool], within_s: float = 15.0) -> None:
    """Wait for `condition`."""
    async with asyncio.timeout(within_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running(settings: Settings, engine_factory: EngineFactory = make_engine) -> AsyncIterator[Service]:
    """Start, use, stop."""
    app = create_app(settings, engine_factory=engine_factory)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as http,
    ):
        yield Service(app, http)


def _ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer
