"""Whether the service grows: `make soak MINUTES=60`.

`python -m service run` with its local engine on a small bundle and its embedded Redis, under steady mixed traffic:
recommendations with filters never seen before, reranks, event streams, events, histories, erasures, items put and
deleted, reports of an experiment, and every ten minutes the other of two bundles. Memory of the service's process is
sampled every ten seconds; what counts is the Theil-Sen slope over the samples after the warm-up, and its 95 % interval.

Few users and few changing items, so that every bounded cache is full by the end of the warm-up. In the warm-up bundles
are moved every minute, so that each thread that ever moves one has done so; and in its first half ten seconds of every
minute are a rush, so that what grows with how much is under way at once (connections, the heap) is as large then as it
ever gets. Fails where the slope is a megabyte an hour or more and its interval lies above that, or where any answer was
not as it should be. A run of some minutes shows that all works; its interval is wide. JSON of it all goes to `--out`.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from scipy.stats import theilslopes

from semantic_ids.bundle import current_id
from semantic_ids.text_encoder import PACKAGED_MINILM, TextEncoderIdentity
from service.logs import configure
from tests.benchmarks.report import report
from tests.benchmarks.small_bundle import SPACE, item_id, publish_small_bundle, user_id
from tests.service.chaos.processes import ServiceProcess

NUM_ITEMS, NUM_USERS, NUM_PUT_ITEMS = 2_000, 200, 50
RATE, MAX_UNDER_WAY = 30.0, 64  # requests a second: a third of one core
RUSH_RATE, RUSH_S, RUSH_EVERY_S = 250.0, 10.0, 60.0
SAMPLE_S, ACTIVATE_S, WARM_UP_ACTIVATE_S, DEADLINE_MS = 10.0, 600.0, 60.0, 10_000
BAR_MB_PER_HOUR = 1.0
EXPERIMENT = {
    "name": "soak",
    "traffic": [0.0, 1.0],
    "variants": [{"name": "control", "control": True}, {"name": "wide", "overrides": {"beam_width": 30}}],
}
ENCODER = TextEncoderIdentity(name=PACKAGED_MINILM, revision=version(PACKAGED_MINILM), dimension=384)
"""What items are carried over from one bundle to the other with."""
BENIGN = {None, "cold_start", "filter_matches_nothing"}


@dataclass(frozen=True)
class Sample:
    """The service's process at one moment."""

    at_s: float
    rss_kib: int
    pss_kib: int
    anonymous_kib: int  # not of files
    num_threads: int
    num_files: int
    num_answers: int

    @classmethod
    def of(cls, pid: int, at_s: float, num_answers: int) -> "Sample":
        """Exact, from smaps_rollup: the counters in /proc/PID/status lag behind by some pages per CPU."""
        process = Path(f"/proc/{pid}")
        rollup = (process / "smaps_rollup").read_text()
        rss, pss, anonymous = (
            int(re.findall(rf"^{name}: +(\d+) kB$", rollup, re.MULTILINE)[0]) for name in ("Rss", "Pss", "Anonymous")
        )
        num_threads, num_files = (len(list((process / what).iterdir())) for what in ("task", "fd"))
        return cls(at_s, rss, pss, anonymous, num_threads, num_files, num_answers)


class _ShedError(Exception):
    """The service had no room in a rush."""


@dataclass
class Soak:
    """Steady traffic and what came of it."""

    http: aiohttp.ClientSession
    bundles: tuple[str, str]
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    answers: Counter[str] = field(default_factory=Counter)
    """By operation and status, and reason where it is degraded."""
    wrong: Counter[str] = field(default_factory=Counter)
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    last_rush_at: float = -math.inf
    """Of the monotonic clock: who comes in a rush, or soon after, may be told to come back later."""

    async def run(self, pid: int, seconds: float) -> list[Sample]:
        """Traffic for so long; the samples."""
        operations: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (0.40, self.recommend),
            (0.05, self.stream),
            (0.10, self.rerank),
            (0.30, self.events),
            (0.07, self.history),
            (0.02, self.erase),
            (0.02, self.put_item),
            (0.02, self.delete_item),
            (0.02, self.look),
        ]
        weights = [weight for weight, _ in operations]
        samples: list[Sample] = []
        begin = time.monotonic()
        next_sample, next_activation = 0.0, WARM_UP_ACTIVATE_S / 2
        async with asyncio.TaskGroup() as under_way:
            room = asyncio.Semaphore(MAX_UNDER_WAY)
            while (now := time.monotonic() - begin) < seconds:
                if now >= next_sample:
                    samples.append(Sample.of(pid, now, self.answers.total()))
                    next_sample += SAMPLE_S
                if now >= next_activation:
                    under_way.create_task(self.guarded(room, self.activate))
                    is_warm = now >= warm_up_of(seconds)
                    next_activation += ACTIVATE_S if is_warm else WARM_UP_ACTIVATE_S
                [(_, operation)] = self.rng.choices(operations, weights)
                under_way.create_task(self.guarded(room, operation))
                is_rush = now < warm_up_of(seconds) / 2 and now % RUSH_EVERY_S < RUSH_S
                self.last_rush_at = time.monotonic() if is_rush else self.last_rush_at
                await asyncio.sleep(self.rng.expovariate(RUSH_RATE if is_rush else RATE))
        samples.append(Sample.of(pid, time.monotonic() - begin, self.answers.total()))
        return samples

    async def guarded(self, room: asyncio.Semaphore, operation: Callable[[], Awaitable[None]]) -> None:
        """One operation, when there is room; what fails is counted and does not end the soak."""
        async with room:
            try:
                await operation()
            except _ShedError:
                pass
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self.wrong[f"{operation.__name__}: {type(error).__name__}"] += 1

    def user(self) -> str:
        """Any of the users."""
        return user_id(self.rng.randrange(NUM_USERS))

    def items(self, at_most: int) -> list[str]:
        """Some item ids."""
        return [item_id(item) for item in self.rng.sample(range(NUM_ITEMS), self.rng.randint(1, at_most))]

    def question(self) -> dict[str, Any]:
        """A recommendation with a filter that nobody had before."""
        item_filter: dict[str, Any] = {"exclude_items": self.items(30)}
        if self.rng.random() < 0.5:
            shelves = self.rng.sample(range(20), self.rng.randint(1, 6))
            item_filter["any_categories"] = [f"Everything > Shelf {shelf}" for shelf in shelves]
        if self.rng.random() < 0.2:
            item_filter["include_items"] = self.items(200)
        return {"user_id": self.user(), "num_items": 10, "filter": item_filter, "deadline_ms": DEADLINE_MS}

    async def recommend(self) -> None:
        """POST /recommend; its items obey its filter."""
        body = self.question()
        answer = await self.call("recommend", "POST", "/recommend", body)
        given = [item["item_id"] for item in answer.get("items", ())]
        if set(given) & set(body["filter"]["exclude_items"]) or len(set(given)) != len(given):
            self.wrong["recommend: illegal items"] += 1

    async def stream(self) -> None:
        """The same as an event stream."""
        url = "/recommend"
        async with self.http.post(url, json=self.question(), headers={"accept": "text/event-stream"}) as response:
            text = await response.text()
            self.count("stream", response.status, None)
            self.forgive(response.status)
            if "event: answer" not in text:
                self.wrong["stream: no answer"] += 1

    async def rerank(self) -> None:
        """POST /rerank of known candidates, each of which comes back."""
        candidates = self.items(50)
        body = {"user_id": self.user(), "candidates": candidates, "deadline_ms": DEADLINE_MS}
        answer = await self.call("rerank", "POST", "/rerank", body)
        if sorted(item["item_id"] for item in answer.get("items", ())) != sorted(candidates):
            self.wrong["rerank: not the candidates"] += 1

    async def events(self) -> None:
        """POST /events."""
        user, kinds = self.user(), ["impression", "click", "click", "purchase", "like", "dislike", "hide"]
        events = [
            {
                "event_id": f"soak-{next(self.numbers)}", "user_id": user, "item_id": item,
                "event_type": self.rng.choice(kinds), "timestamp": time.time(),
            }
            for item in self.items(3)
        ]  # fmt: skip
        answer = await self.call("events", "POST", "/events", {"events": events})
        if answer.get("accepted") != len(events):
            self.wrong["events: not accepted"] += 1

    async def history(self) -> None:
        """GET /users/{id}/history."""
        await self.call("history", "GET", f"/users/{self.user()}/history")

    async def erase(self) -> None:
        """DELETE /users/{id}."""
        await self.call("erase", "DELETE", f"/users/{self.user()}")

    async def put_item(self) -> None:
        """PUT of one of the changing items."""
        number = self.rng.randrange(NUM_PUT_ITEMS)
        codes = tuple(self.rng.randrange(SPACE.codebook_size) for _ in range(SPACE.num_levels))
        body = {"title": f"Put {number}", "categories": ["Everything > Put"], "sid": SPACE.format(codes)}
        await self.call("put_item", "PUT", f"/items/put-{number}", body)

    async def delete_item(self) -> None:
        """DELETE of one of them, there or not."""
        await self.call(
            "delete_item", "DELETE", f"/items/put-{self.rng.randrange(NUM_PUT_ITEMS)}", good=(200, 204, 404)
        )

    async def look(self) -> None:
        """What operators read."""
        path = self.rng.choice(["/experiments/soak/report", "/versions", "/health/ready", "/metrics"])
        await self.call("look", "GET", path)

    async def activate(self) -> None:
        """The other bundle."""
        self.bundles = self.bundles[::-1]
        await self.call("activate", "POST", f"/admin/bundles/{self.bundles[0]}/activate")

    async def call(
        self, name: str, method: str, path: str, body: object = None, good: tuple[int, ...] = (200, 204)
    ) -> dict[str, Any]:
        """The body of a good answer; the others are counted as wrong."""
        async with self.http.request(method, path, json=body) as response:
            text = await response.text()
            is_object = response.content_type == "application/json" and text != ""
            answer: dict[str, Any] = json.loads(text) if is_object else {"text": text}
            reason = answer.get("reason")
            self.count(name, response.status, reason)
            self.forgive(response.status)
            if response.status not in good or reason not in BENIGN:
                self.wrong[f"{name}: {response.status} {reason or answer.get('text', '')[:200]}"] += 1
            return answer

    def forgive(self, status: int) -> None:
        """Being shed in a rush is as it should be: the operation ends there."""
        if status == HTTPStatus.SERVICE_UNAVAILABLE and time.monotonic() - self.last_rush_at < DEADLINE_MS / 1000:
            raise _ShedError

    def count(self, name: str, status: int, reason: str | None) -> None:
        """One answer."""
        self.answers[f"{name} {status}{f' {reason}' if reason else ''}"] += 1


@dataclass(frozen=True)
class Slope:
    """Megabytes an hour, with the 95 % interval of Theil and Sen, which takes samples for independent."""

    mb_per_hour: float
    low: float
    high: float


def slope_of(samples: list[Sample], warm_up_s: float, what: str) -> Slope:
    """Of `rss_kib`, `pss_kib` or `anonymous_kib` after the warm-up."""
    counted = [sample for sample in samples if sample.at_s >= warm_up_s]
    hours = np.array([sample.at_s for sample in counted]) / 3_600
    megabytes = np.array([getattr(sample, what) for sample in counted]) * 1_024 / 1e6
    found = theilslopes(megabytes, hours, 0.95)
    return Slope(float(found.slope), float(found.low_slope), float(found.high_slope))


def warm_up_of(seconds: float) -> float:
    """Five minutes or a quarter, whichever is more, and never more than 40 %."""
    return min(max(300.0, 0.25 * seconds), 0.4 * seconds)


async def run(folder: Path, minutes: float) -> tuple[Soak, list[Sample]]:
    """Prepare, serve, soak, stop."""
    ids = []
    for _ in range(2):
        publish_small_bundle(folder / "bundles", NUM_ITEMS, ENCODER)
        ids.append(current_id(folder / "bundles"))
        await asyncio.sleep(1.1)  # an id has the second it was made in
    service = ServiceProcess(folder, bundles=folder / "bundles", data_dir=folder / "redis", log_level="warning")
    try:
        await service.start()
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(
            service.url, timeout=timeout, connector=aiohttp.TCPConnector(limit=MAX_UNDER_WAY, keepalive_timeout=30)
        ) as http:
            async with http.put("/experiments/soak", json=EXPERIMENT) as response:
                if response.status not in (200, 201):
                    raise SystemExit(f"the experiment was refused: {await response.text()}")
            soak = Soak(http, (ids[1], ids[0]))
            samples = await soak.run(service.pid, 60 * minutes)
            return soak, samples
    finally:
        await service.stop()
        if "error" in service.log:
            sys.stderr.write(service.log[-4_000:])


def main() -> None:
    """Exit code 1 where memory grows or an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, help="file for the JSON of all samples and counts")
    chosen = parser.parse_args()
    configure("warning", "console")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="sidrec-soak-") as name:
        soak, samples = asyncio.run(run(Path(name), chosen.minutes))
    warm_up_s = warm_up_of(60 * chosen.minutes)
    rss, pss, anonymous = (slope_of(samples, warm_up_s, what) for what in ("rss_kib", "pss_kib", "anonymous_kib"))
    grows = rss.mb_per_hour >= BAR_MB_PER_HOUR and rss.low >= BAR_MB_PER_HOUR
    warm = [sample for sample in samples if sample.at_s >= warm_up_s]
    results: dict[str, float | int | str] = {
        "minutes": chosen.minutes,
        "answers": soak.answers.total(),
        "rss_mb_per_hour": rss.mb_per_hour,
        "rss_interval": f"{rss.low:.2f} to {rss.high:.2f}",
        "pss_mb_per_hour": pss.mb_per_hour,
        "anonymous_mb_per_hour": anonymous.mb_per_hour,
        "rss_mb_after_warm_up": warm[0].rss_kib * 1_024 / 1e6,
        "rss_mb_at_the_end": warm[-1].rss_kib * 1_024 / 1e6,
        "threads": f"{warm[0].num_threads} to {warm[-1].num_threads}",
        "open_files": f"{warm[0].num_files} to {warm[-1].num_files}",
        **dict(sorted(soak.answers.items())),
        "wrong": soak.wrong.total(),
        **{f"wrong: {what}": times for what, times in sorted(soak.wrong.items())},
    }
    report(
        "A soak of the service with its local engine",
        results,
        {"rss_mb_per_hour": f"< {BAR_MB_PER_HOUR:g}, after {warm_up_s:.0f} s", "wrong": "0"},
    )
    if chosen.out is not None:
        document = {"results": results, "rss": asdict(rss), "pss": asdict(pss), "samples": [asdict(s) for s in samples]}
        chosen.out.write_text(json.dumps(document, indent=1))
    if grows or soak.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
