"""Users of a service that is being broken: what they send, and what must hold of every answer whatever is broken.

Each user is a client of its own that does one thing after the other, so what it was told before binds what it is told
next: an item of an acknowledged event is never recommended to it again, and its history has it. Each event has an item
of its own, so that a user's history counts the events. What was not acknowledged is sent again with its id, as a client
has to.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import aiohttp

from tests.service.world import ITEM_IDS, eligible, ids_of, random_filter

BENIGN = frozenset({None, "cold_start", "filter_matches_nothing"})
"""Reasons that say nothing is broken."""
PATIENT_MS, ANSWER_WITHIN_S = 10_000, 30.0
_CALM_S, _CALM_ANSWERS = 1.0, 15
_numbers = count()


@dataclass(frozen=True)
class Outcome:
    """One answer: 200 with its `reason`, 503 with the kind of its problem, or 0 where the connection was lost."""

    endpoint: str
    status: int
    reason: str | None
    ended_at: float

    @property
    def is_good(self) -> bool:
        """As if nothing were broken."""
        return self.status in (200, 204) and self.reason in BENIGN


@dataclass
class _User:
    user_id: str
    rng: random.Random
    unused: list[str]
    """Items that no event of this user has named yet."""
    seen: dict[str, str] = field(default_factory=dict)
    """Item → event id, of acknowledged clicks."""
    excluded: set[str] = field(default_factory=set)
    unacknowledged: list[dict[str, Any]] = field(default_factory=list)

    @property
    def undecided(self) -> set[str]:
        """Items of events that were sent and not acknowledged: stored or not, both may be."""
        return {event["item_id"] for event in self.unacknowledged}


class Traffic:
    """What all users do, and every outcome of it."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        urls: Sequence[str],
        *,
        num_users: int,
        seed: int,
        pause_s: float,
        deleted: frozenset[str],
        num_each: int | None,
    ) -> None:
        self._rng = random.Random(seed)
        self._http = http
        self._urls = urls
        self._pause_s = pause_s
        self._deleted = deleted
        self._num_each = num_each
        self._is_over = False
        self.may_lose_connections = False
        self.hurried_ms: int | None = None
        """A deadline that every other request has."""
        self.outcomes: list[Outcome] = []
        self.num_acknowledged = 0
        items = [item_id for item_id in ITEM_IDS if item_id not in deleted]
        self._users = [
            _User(f"chaos-{next(_numbers)}", random.Random(self._rng.random()), self._rng.sample(items, len(items)))
            for _ in range(num_users)
        ]

    async def run(self, user_number: int) -> None:
        """One user's life, until `end` or for so many requests as each has."""
        user = self._users[user_number]
        num_done = 0
        while not self._is_over and num_done != self._num_each:
            # half of what is sent writes; a third of the items are left over to be recommended
            writes = user.rng.random() < 0.5 and (user.unacknowledged or len(user.unused) > len(ITEM_IDS) / 3)
            if writes:
                await self._event(user)
            else:
                await user.rng.choice((self._recommend, self._recommend, self._rerank, self._history))(user)
            num_done += 1
            if self._pause_s:
                await asyncio.sleep(self._pause_s * user.rng.random() * 2)

    async def end(self) -> None:
        """No more traffic; what is unacknowledged is sent until it is acknowledged, and then all is counted."""
        self._is_over = True
        give_up_at = time.monotonic() + 30
        for user in self._users:
            while user.unacknowledged:
                assert time.monotonic() < give_up_at, f"still not acknowledged: {user.unacknowledged}"
                await self._event(user)
        for user in self._users:
            for url in self._urls:
                status, answer = await self._send("history", "GET", f"/users/{user.user_id}/history", None, url)
                assert status == 200
                stored = Counter(event["item_id"] for event in answer["events"])
                assert stored == Counter(user.seen.keys()), "an acknowledged event is there exactly once, and no other"

    async def recovery_s(self, since: float, within_s: float = 10.0) -> float:
        """Wait until all is well; how long after `since` the last answer came that was not good."""
        while True:
            await asyncio.sleep(0.05)
            bad = max((one.ended_at for one in self.outcomes if not one.is_good), default=0.0)
            num_since = sum(one.ended_at > max(bad, since) for one in self.outcomes)
            if time.monotonic() - max(bad, since) > _CALM_S and num_since >= _CALM_ANSWERS:
                return max(0.0, bad - since)
            assert max(bad, since) - since < within_s, f"not recovered: {Counter(self.seen_since(since))}"

    def seen_since(self, since: float) -> list[tuple[str, int, str | None]]:
        """(endpoint, status, reason) of every answer since then."""
        return [(one.endpoint, one.status, one.reason) for one in self.outcomes if one.ended_at > since]

    async def _event(self, user: _User) -> None:
        if not user.unacknowledged or user.rng.random() < 0.3:
            if not user.unused:
                return
            kind = user.rng.choice(["click", "click", "like", "purchase", "hide", "dislike"])
            user.unacknowledged.append(
                {
                    "event_id": f"chaos-event-{next(_numbers)}",
                    "user_id": user.user_id,
                    "item_id": user.unused.pop(),
                    "event_type": kind,
                    "timestamp": time.time(),
                }
            )
        events = list(user.unacknowledged)
        # Where there are several replicas, now and then all of them get it at once: one of them accepts.
        at_once = self._urls if len(self._urls) > 1 and user.rng.random() < 0.2 else (None,)
        sent = [self._send("events", "POST", "/events", {"events": events}, url) for url in at_once]
        answers = await asyncio.gather(*sent)
        if all(status != 200 for status, _ in answers):
            return
        assert all(answer["rejected"] == [] for _, answer in answers)
        assert all(answer["accepted"] + answer["duplicates"] == len(events) for _, answer in answers)
        assert len(at_once) == 1 or sum(answer["accepted"] for _, answer in answers) == len(events)
        self.num_acknowledged += len(events)
        user.unacknowledged.clear()
        for event in events:
            if event["event_type"] in ("hide", "dislike"):
                user.excluded.add(event["item_id"])
            else:
                user.seen[event["item_id"]] = event["event_id"]

    async def _recommend(self, user: _User) -> None:
        body: dict[str, Any] = {
            "user_id": user.user_id,
            "num_items": user.rng.choice([1, 5, 10, 40]),
            "filter": random_filter(user.rng) if user.rng.random() < 0.6 else {},
            "exclude_seen": user.rng.random() < 0.9,
            "deadline_ms": self._deadline_ms(user),
        }
        status, answer = await self._send("recommend", "POST", "/recommend", body)
        if status != 200:
            return
        denied = user.excluded | self._deleted | (user.seen.keys() if body["exclude_seen"] else set())
        allowed = eligible(body["filter"], denied)
        given = ids_of(answer)
        assert set(given) <= allowed, (set(given) - allowed, body, answer["reason"], answer["source"])
        assert len(set(given)) == len(given)
        least, most = (min(body["num_items"], len(items)) for items in (allowed - user.undecided, allowed))
        assert least <= len(given) <= most, (least, len(given), most, body, answer["reason"])
        self._check_degraded(answer)

    async def _rerank(self, user: _User) -> None:
        candidates = user.rng.sample(ITEM_IDS, user.rng.randint(1, 30))
        body = {"user_id": user.user_id, "candidates": candidates, "deadline_ms": self._deadline_ms(user)}
        status, answer = await self._send("rerank", "POST", "/rerank", body)
        if status != 200:
            return
        assert sorted(ids_of(answer)) == sorted(candidates)
        assert {item["item_id"] for item in answer["items"] if not item["known"]} == self._deleted & set(candidates)
        self._check_degraded(answer)

    async def _history(self, user: _User) -> None:
        status, answer = await self._send("history", "GET", f"/users/{user.user_id}/history", None)
        if status != 200:
            return
        stored = [event["item_id"] for event in answer["events"]]
        assert user.seen.keys() <= set(stored) <= user.seen.keys() | user.undecided, "read your writes"
        assert len(set(stored)) == len(stored)

    def _deadline_ms(self, user: _User) -> int:
        hurried = self.hurried_ms is not None and user.rng.random() < 0.5
        return self.hurried_ms or PATIENT_MS if hurried else PATIENT_MS

    @staticmethod
    def _check_degraded(answer: dict[str, Any]) -> None:
        assert answer["degraded"] == (answer["reason"] is not None)

    async def _send(
        self, endpoint: str, method: str, path: str, body: object, url: str | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Status and body; nothing but a 200, a 503 that says what is wrong, or a lost connection where that may be."""
        status, reason, answer = 0, None, {}
        try:
            request = self._http.request(method, (url or self._rng.choice(self._urls)) + path, json=body)
            async with asyncio.timeout(ANSWER_WITHIN_S), request as response:
                status, answer = response.status, await response.json(content_type=None)
                headers = response.headers
        except aiohttp.ClientError:
            assert self.may_lose_connections
            await asyncio.sleep(0.25)
        else:
            reason = answer.get("reason")
            if status != 200:
                assert status == 503, (status, answer)
                assert headers["content-type"] == "application/problem+json"
                assert (answer["status"], answer["request_id"]) == (503, headers["x-request-id"])
                reason = answer["type"].removeprefix("urn:sidrec:")
                assert reason in ("history-unavailable", "overloaded"), answer
                assert int(headers["retry-after"]) >= 1
        self.outcomes.append(Outcome(endpoint, status, reason, time.monotonic()))
        return status, answer


@asynccontextmanager
async def traffic(
    *urls: str,
    num_users: int = 6,
    seed: int = 0,
    pause_s: float = 0.08,
    deleted: frozenset[str] = frozenset(),
    num_each: int | None = None,
) -> AsyncIterator[Traffic]:
    """Traffic while this lasts (or `num_each` requests of every user, if that is given); at its end all is counted.

    `deleted` items are in no answer.
    """
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2)) as http:
        flow = Traffic(http, urls, num_users=num_users, seed=seed, pause_s=pause_s, deleted=deleted, num_each=num_each)
        async with asyncio.TaskGroup() as lives:
            running = [lives.create_task(flow.run(number)) for number in range(num_users)]
            yield flow
            if num_each is not None:
                await asyncio.gather(*running)
            flow._is_over = True
        await flow.end()
