"""The whole way: tiny data → pipeline → bundle → the real server over HTTP with a real Redis → only legal items.

The rules are restated here from the HTTP contract with strings and sets read from the data files, so that they can
disagree with the code. Every user has one conversation of its own, and all conversations run at once.
"""

import asyncio
import csv
import json
import random
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from tests.training.conftest import SMALL, environment, write_data
from training.pipeline import Pipeline, load_config

NUM_RECOMMEND, NUM_RERANK = 2_000, 300
PATIENT_MS = 60_000
TASTE = ("click", "purchase", "like")
AGAINST = ("dislike", "hide")

_event_ids = count()
Json = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A row of `items.csv`."""

    item_id: str
    path: str

    def is_in(self, category: str) -> bool:
        """A category matches the path or any node on it."""
        return self.path == category or self.path.startswith(f"{category} > ")


@dataclass
class User:
    """What the service must know of a user."""

    user_id: str
    history: list[str] = field(default_factory=list)
    disliked: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class World:
    """Catalogue and users, as the data files have them."""

    items: dict[str, Item]
    users: list[User]

    @classmethod
    def read(cls, data: Path) -> "World":
        """From `items.csv` and `interactions.csv`, whose rows of one user are in time order."""
        with (data / "items.csv").open(newline="") as file:
            items = {row["item_id"]: Item(row["item_id"], row["categories"]) for row in csv.DictReader(file)}
        users: dict[str, User] = {}
        with (data / "interactions.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                user = users.setdefault(row["user_id"], User(row["user_id"]))
                if row["event_type"] in TASTE:
                    user.history.append(row["item_id"])
        return cls(items, [*users.values(), User("nobody knows me")])

    def categories(self) -> list[str]:
        """Every node on every path, and one that does not exist."""
        nodes = {node for item in self.items.values() for node in (item.path, item.path.partition(" > ")[0])}
        return [*sorted(nodes), "No such category"]

    def eligible(self, item_filter: dict[str, list[str]], denied: set[str]) -> set[str]:
        """The ids that a request with this filter may be given."""
        include, exclude, any_of, none_of = (
            item_filter.get(name, [])
            for name in ("include_items", "exclude_items", "any_categories", "none_categories")
        )
        return {
            item.item_id
            for item in self.items.values()
            if (not include or item.item_id in include)
            and item.item_id not in exclude
            and (not any_of or any(item.is_in(name) for name in any_of))
            and not any(item.is_in(name) for name in none_of)
            and item.item_id not in denied
        }


class Conversation:
    """One user's requests, one after the other, each answer checked."""

    def __init__(self, http: httpx.AsyncClient, world: World, user: User, rng: random.Random) -> None:
        self.http, self.world, self.user, self.rng = http, world, user, rng
        self.events: list[Json] = []
        self._item_ids = list(world.items)
        self._categories = world.categories()

    async def recommend(self) -> None:
        """A random request: only eligible items, as many as there can be, none twice, best first."""
        body: Json = {"num_items": self.rng.choice([1, 5, 10, 20, 60]), "deadline_ms": PATIENT_MS}
        body["filter"] = self._random_filter() if self.rng.random() < 0.7 else {}
        body["exclude_seen"] = self.rng.random() < 0.8
        inline = self._random_history() if self.rng.random() < 0.4 else None
        if inline is not None:
            body["history"] = inline
        knows_user = inline is None or self.rng.random() < 0.7
        if knows_user:
            body["user_id"] = self.user.user_id
        done = [
            ("click", entry) if isinstance(entry, str) else (str(entry["event_type"]), str(entry["item_id"]))
            for entry in inline or []
        ]
        liked = [item_id for kind, item_id in done if kind in TASTE]
        denied = {item_id for kind, item_id in done if kind in AGAINST}
        denied |= self.user.disliked if knows_user else set()
        if body["exclude_seen"]:
            denied |= set(liked) | set(self.user.history if knows_user else [])
        allowed = self.world.eligible(body["filter"], denied)

        answer = await self._post("/recommend", body)

        ids = [item["item_id"] for item in answer["items"]]
        assert set(ids) <= allowed, (body, set(ids) - allowed)
        assert len(ids) == len(set(ids)) == min(body["num_items"], len(allowed)), (body, ids)
        assert [item["rank"] for item in answer["items"]] == list(range(1, len(ids) + 1))
        assert set(answer["ignored_items"]) == {item_id for _, item_id in done if item_id not in self.world.items}
        shown = liked if inline is not None else self.user.history
        if not allowed:
            assert answer["reason"] == "filter_matches_nothing"
        elif not any(item_id in self.world.items for item_id in shown):
            assert answer["reason"] == "cold_start"
        else:
            assert (answer["source"], answer["reason"], answer["degraded"]) == ("model", None, False)
            scores = [item["score"] for item in answer["items"]]
            assert scores == sorted(scores, reverse=True)
            assert scores[0] <= 0

    async def rerank(self) -> None:
        """Every candidate exactly once; unknown ones last, as given; the same scores as `/recommend` gives."""
        known = self.rng.sample(self._item_ids, self.rng.randint(0, 20))
        unknown = [f"unknown {number}" for number in range(self.rng.randint(0 if known else 1, 3))]
        candidates = [*known, *unknown]
        self.rng.shuffle(candidates)
        body = {"user_id": self.user.user_id, "candidates": candidates, "deadline_ms": PATIENT_MS}
        answer = await self._post("/rerank", body)
        ids = [item["item_id"] for item in answer["items"]]
        assert sorted(ids) == sorted(candidates)
        assert ids[len(known) :] == [item_id for item_id in candidates if item_id not in self.world.items]
        assert [item["known"] for item in answer["items"]] == [True] * len(known) + [False] * len(unknown)
        if known and self.user.history and self.rng.random() < 0.3:
            scores = {item["item_id"]: item["score"] for item in answer["items"][: len(known)]}
            assert list(scores.values()) == sorted(scores.values(), reverse=True)
            recommended = await self._post(
                "/recommend",
                {
                    "user_id": self.user.user_id,
                    "num_items": len(known),
                    "filter": {"include_items": known},
                    "exclude_seen": False,
                    "deadline_ms": PATIENT_MS,
                },
            )
            for item in recommended["items"]:
                assert abs(item["score"] - scores[item["item_id"]]) < 1e-3

    async def act(self) -> None:
        """Some events; what they say holds for the very next request, and saying it twice changes nothing."""
        known: list[Json] = [
            {
                "event_id": f"event {next(_event_ids)}",
                "user_id": self.user.user_id,
                "item_id": self.rng.choice(self._item_ids),
                "event_type": self.rng.choice([*TASTE, *AGAINST, "impression"]),
                "timestamp": 1_800_000_000.0 + len(self.events) + place,
            }
            for place in range(self.rng.randint(1, 3))
        ]
        answer = await self._post("/events", {"events": known})
        assert answer == {"accepted": len(known), "duplicates": 0, "rejected": []}
        self.events += known
        self.user.history += [event["item_id"] for event in known if event["event_type"] in TASTE]
        self.user.disliked |= {event["item_id"] for event in known if event["event_type"] in AGAINST}
        again = await self._post("/events", {"events": known})
        assert again == {"accepted": 0, "duplicates": len(known), "rejected": []}
        assert await self.history() == self.user.history

    async def history(self) -> list[str]:
        """Item ids of the stored history, oldest first."""
        response = await self.http.get(f"/users/{self.user.user_id}/history")
        assert response.status_code == 200, response.text
        return [event["item_id"] for event in response.json()["events"]]

    async def _post(self, path: str, body: Json) -> Json:
        response = await self.http.post(path, json=body)
        assert response.status_code == 200, (path, body, response.text)
        answer: Json = response.json()
        return answer

    def _random_filter(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        if self.rng.random() < 0.3:
            found["include_items"] = [*self.rng.choices(self._item_ids, k=self.rng.choice([1, 10, 40])), "unknown"]
        if self.rng.random() < 0.3:
            found["exclude_items"] = self.rng.choices(self._item_ids, k=self.rng.choice([1, 10, 100]))
        if self.rng.random() < 0.4:
            found["any_categories"] = self.rng.sample(self._categories, self.rng.randint(0, 4))
        if self.rng.random() < 0.3:
            found["none_categories"] = self.rng.sample(self._categories, self.rng.randint(0, 4))
        return found

    def _random_history(self) -> list[str | Json]:
        history: list[str | Json] = []
        for item_id in self.rng.choices([*self._item_ids, "unknown"], k=self.rng.randint(0, 12)):
            kind = self.rng.choice([*TASTE, *AGAINST, "impression"])
            history.append(item_id if self.rng.random() < 0.6 else {"item_id": item_id, "event_type": kind})
        return history


async def call(*args: str | Path, env: dict[str, str]) -> str:
    """Run `python -m …` to a good end; its stdout."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *map(str, args),
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    return stdout.decode()


@asynccontextmanager
async def serving(env: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """`python -m service run` on a free port, stopped by Ctrl-C: exit code 0, and its Redis with it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service", "run", env=env, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        said = b""
        while not (address := re.search(rb"http://127\.0\.0\.1:\d+", said)):
            line = await asyncio.wait_for(process.stderr.readline(), 120)
            assert line, said.decode()
            said += line
        rest = asyncio.create_task(process.stderr.read())
        # A connection for each conversation, given up well before the server, after 5 s without a request, hangs up.
        limits = httpx.Limits(max_keepalive_connections=None, keepalive_expiry=1.0)
        async with httpx.AsyncClient(base_url=address[0].decode(), timeout=120, limits=limits) as http:
            assert (await http.get("/health/ready")).status_code == 200
            yield http
        redis_servers = list(redis_servers_of(Path(env["SIDREC_DATA_DIR"])))
        assert len(redis_servers) == 1
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 60) == 0, (await rest).decode()
        assert "Traceback" not in (await rest).decode()
        assert not list(redis_servers_of(Path(env["SIDREC_DATA_DIR"])))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def redis_servers_of(data_dir: Path) -> Iterator[int]:
    """Process ids of the servers that have their working directory there."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            name, folder = (process / "comm").read_text().strip(), (process / "cwd").readlink()
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
        if name == "redis-server" and folder == data_dir.resolve():
            yield int(process.name)


async def converse(http: httpx.AsyncClient, world: World) -> list[Conversation]:
    """All users at once, each with its share of the requests in a random order."""
    conversations = [Conversation(http, world, user, random.Random(user.user_id)) for user in world.users]
    shares = -(-NUM_RECOMMEND // len(conversations)), -(-NUM_RERANK // len(conversations))

    async def talk(conversation: Conversation) -> None:
        say = [conversation.recommend] * shares[0] + [conversation.rerank] * shares[1] + [conversation.act] * 3
        conversation.rng.shuffle(say)
        for request in say:
            await request()

    async with asyncio.TaskGroup() as group:
        for conversation in conversations:
            group.create_task(talk(conversation))
    return conversations


async def top_tens(http: httpx.AsyncClient, world: World) -> list[tuple[str, ...]]:
    """The first ten items for every known user, nothing left out."""
    lists = []
    for user in world.users[:-1]:
        body = {"user_id": user.user_id, "exclude_seen": False, "deadline_ms": PATIENT_MS}
        answer = (await http.post("/recommend", json=body)).json()
        lists.append(tuple(item["item_id"] for item in answer["items"]))
    return lists


async def test_from_interactions_to_legal_recommendations_over_http(tmp_path: Path) -> None:
    data, run = await asyncio.to_thread(write_data, tmp_path / "data"), tmp_path / "run"
    env = environment() | {
        "SIDREC_BUNDLES": str(run / "bundles"),
        "SIDREC_DATA_DIR": str(tmp_path / "redis"),
        "SIDREC_PORT": "0",
        "SIDREC_LOG_LEVEL": "warning",
    }
    settings = [*SMALL, "sft.max_epochs=10", "sft.learning_rate=0.01"]
    pipeline: tuple[str | Path, ...] = ("training", "pipeline", "--data", data, "--out", run, "--json", *settings)
    summary = json.loads(await call(*pipeline, env=env))
    assert summary["recall@10"] > summary["baselines"]["popularity"]["recall@10"]
    world = World.read(data)
    await call("service", "import-histories", run / "publish" / "histories.jsonl", env=env)

    async with serving(env) as http:
        conversations = await converse(http, world)
        assert sum(len(conversation.events) for conversation in conversations) > 100
        lists = await top_tens(http, world)
        assert len(set(lists)) > len(lists) / 2  # what a user did decides
        first = (await http.get("/versions")).json()
        assert first["num_items"] == len(world.items)
        assert first["metrics"]["recall@10"] == summary["recall@10"]

        overrides = dict(text.split("=") for text in [*settings, "sft.seed=1"])
        await asyncio.to_thread(Pipeline(load_config("default", overrides), data, run).run)
        assert (await http.get("/versions")).json() == first  # a bundle is served to the end of the process

    async with serving(env) as http:
        second = (await http.get("/versions")).json()
        assert second["bundle"] != first["bundle"]
        assert second["bundle"] == (await asyncio.to_thread((run / "bundles" / "current").read_text)).strip()
        for conversation in conversations:
            conversation.http = http
            assert await conversation.history() == conversation.user.history
            await conversation.recommend()
        events = [event for conversation in conversations for event in conversation.events]
        again = (await http.post("/events", json={"events": events})).json()
        assert again == {"accepted": 0, "duplicates": len(events), "rejected": []}
        assert await top_tens(http, world) != lists  # other weights, other answers
