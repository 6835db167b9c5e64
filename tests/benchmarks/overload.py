"""What the service does at 80 % of what it can answer, and at twice that: `make bench-overload`.

The real application with its local engine on a small bundle and a real embedded Redis, in a process of its own; the
load is an open loop with Poisson arrivals over keep-alive connections. A request is POST /recommend, 10 items, for a
user with a stored history, with a deadline of a second. Latencies count from the scheduled arrival; a connection that
is still busy makes a request wait here, so there are more connections than requests are ever under way.

The client, which in life is on another machine, takes as little as it can of the two cores: uvloop (.18 of a core; with
select(), to the microsecond, .43), answers read when a phase is over, and SCHED_BATCH, without which every answer sent
gives the client the service's core at once.

Saturation is what an open loop gets answered that offers a little too much: 1.05 times what a closed loop gets. That
itself is no measure of it: clients that all wait for one batch ask for the next one together, and the service, which
then does one thing many times over, answers up to a fifth more a second than independent users could ever get.

All of that in ROUNDS of half a minute: two virtual cores of a shared machine may be half as fast a minute later, and
80 % of what they did before is no load of 80 % then. So saturation is measured straight before and straight after the
load, and the load's share is of the mean of the two. Rounds in which that is not 75 to 85 % are told of, and count for
nothing but totals; no latency is looked at for it. A figure is the median of the rounds that count.

Every user asks again some three seconds later, and the engine then has the prompt: `prompt_tokens_known` is the share
of tokens that it did not run. SIDREC_PROMPT_CACHE_MB=0 is a service to which nobody comes back.

SECONDS=2 shortens every phase, to see that it runs; its numbers mean little.
"""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import track

from tests.benchmarks.against import Results, run_against
from tests.benchmarks.load import Connection, Load, Measured, Response, poisson_arrivals, post
from tests.benchmarks.report import report
from tests.benchmarks.small_bundle import user_id

NUM_ITEMS, NUM_USERS, ANSWER_ITEMS = 5_000, 2_000, 10
DEADLINE_MS = 1_000
ROUNDS, SECONDS = int(os.environ.get("ROUNDS", "15")), float(os.environ.get("SECONDS", "10"))
SEARCH_S, CONNECTIONS = max(1.0, SECONDS / 5), 384  # the service has at most 256 in flight, and says no at once
CONCURRENCIES, BEYOND = (32, 64), 1.05
STEADY_SHARES = 0.75, 0.85
CLIENT_TIMEOUT_S = 30.0
TOTALS = ("at_200_beyond_deadline", "after_shed", "errors", "requests")  # the sum of all rounds
TOLD = ("at_80_share", "saturation_rps", "at_80_p99_over_p50", "at_200_shed_p99_ms")  # of every round


@dataclass
class Outcomes:
    """What a load saw, by kind of answer: `model`, `degraded`, `shed`, `error`. Latencies in seconds."""

    latencies: dict[str, list[float]] = field(default_factory=dict)
    elapsed_s: float = 0.0

    @classmethod
    def of(cls, answers: Sequence[tuple[Response | None, float]], elapsed_s: float) -> "Outcomes":
        """Of answers (None: there was none) and their latencies."""
        outcomes = cls(elapsed_s=elapsed_s)
        for response, latency_s in answers:
            outcomes.latencies.setdefault(kind_of(response), []).append(latency_s)
        return outcomes

    @property
    def accepted(self) -> list[float]:
        """Latencies of what was answered."""
        return self.latencies.get("model", []) + self.latencies.get("degraded", [])

    def num(self, kind: str) -> int:
        """How many answers of a kind."""
        return len(self.latencies.get(kind, []))

    @property
    def model_rate(self) -> float:
        """Answers of the model a second."""
        return self.num("model") / self.elapsed_s

    @property
    def total(self) -> int:
        """How many answers in all."""
        return sum(map(len, self.latencies.values()))


def kind_of(response: Response | None) -> str:
    """What an answer is: an error too where it has not as many different items as were asked for."""
    if response is not None and response.status in (429, 503):
        return "shed"
    if response is None or response.status != 200:
        return "error"
    answer = json.loads(response.body)
    if len({item["item_id"] for item in answer["items"]}) != ANSWER_ITEMS:
        return "error"
    return "degraded" if answer["degraded"] else "model"


class OutcomeLoad(Load):
    """A load that looks at what each answer is, once it is over: it takes time that the service has not."""

    def __init__(self, port: int, messages: list[bytes]) -> None:
        super().__init__(port, messages, lambda response: response.status == 200)
        self._answers: list[tuple[Response | None, float]] = []

    async def open(self, rate: float, seconds: float, seed: int) -> Outcomes:
        """Poisson arrivals at `rate` for `seconds`."""
        self._answers = []
        measured = await self.open_loop(poisson_arrivals(rate, seconds, seed), CONNECTIONS)
        return Outcomes.of(self._answers, measured.elapsed_s)

    async def closed(self, concurrency: int, seconds: float) -> Outcomes:
        """So many clients, each of which waits for its answer."""
        self._answers = []
        measured = await self.closed_loop(concurrency, seconds=seconds)
        return Outcomes.of(self._answers, measured.elapsed_s)

    async def _one(self, connection: Connection, due: float, measured: Measured) -> None:
        message = self._messages[self._next % len(self._messages)]
        self._next += 1
        response = None
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                response = await connection.request(message)
        except (OSError, TimeoutError):
            measured.num_errors += 1
        self._answers.append((response, time.perf_counter() - due))


async def closed_loop_rate(load: OutcomeLoad) -> float:
    """The most answers of the model a second, over numbers of clients that each wait for their answer."""
    outcomes = [await load.closed(concurrency, SEARCH_S) for concurrency in CONCURRENCIES]
    return max(one.model_rate for one in outcomes)


async def saturation(load: OutcomeLoad, closed_rate: float, seed: int) -> float:
    """Answers of the model a second in an open loop that offers a little too much."""
    return (await load.open(BEYOND * closed_rate, 1.5 * SEARCH_S, seed)).model_rate


async def one_round(load: OutcomeLoad, number: int) -> dict[str, float]:
    """Saturation, and the service at 80 % and 200 % of it, and at half of it straight after."""
    closed_rate = await closed_loop_rate(load)
    before = await saturation(load, closed_rate, seed=10 * number)
    below = await load.open(0.8 * before, SECONDS, seed=10 * number + 2)
    rate = (before + await saturation(load, closed_rate, seed=10 * number + 1)) / 2
    over = await load.open(2 * rate, SECONDS / 2, seed=10 * number + 3)
    after = await load.open(0.5 * rate, SECONDS / 4, seed=10 * number + 4)
    p50, p99 = percentile_ms(below.accepted, 50), percentile_ms(below.accepted, 99)
    return {
        "closed_loop_rps": closed_rate,
        "saturation_rps": rate,
        "at_80_share": 0.8 * before / rate,
        "at_80_p50_ms": p50,
        "at_80_p99_ms": p99,
        "at_80_p99_over_p50": p99 / p50,
        "at_80_shed_or_degraded_share": 1 - below.num("model") / below.total,
        "at_200_answered_rps": len(over.accepted) / over.elapsed_s,
        "at_200_model_rps": over.model_rate,
        "at_200_shed_share": over.num("shed") / over.total,
        "at_200_shed_p50_ms": percentile_ms(over.latencies.get("shed", []), 50),
        "at_200_shed_p99_ms": percentile_ms(over.latencies.get("shed", []), 99),
        "at_200_degraded_share": over.num("degraded") / over.total,
        "at_200_accepted_p50_ms": percentile_ms(over.accepted, 50),
        "at_200_accepted_p99_ms": percentile_ms(over.accepted, 99),
        "at_200_beyond_deadline": sum(1000 * latency > DEADLINE_MS for latency in over.accepted),
        "after_shed": after.num("shed"),
        "after_p99_ms": percentile_ms(after.accepted, 99),
        "errors": sum(phase.num("error") for phase in (below, over, after)),
        "requests": sum(phase.total for phase in (below, over, after)),
    }


async def measure(port: int, _server_pid: int) -> Results:
    """All rounds on one server."""
    if hasattr(os, "SCHED_BATCH"):  # Linux; here, as the service would inherit it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    users = np.random.default_rng(2).permutation(NUM_USERS)
    bodies = [{"user_id": user_id(user), "num_items": ANSWER_ITEMS, "deadline_ms": DEADLINE_MS} for user in users]
    load = OutcomeLoad(port, [post("/recommend", json.dumps(body).encode()) for body in bodies])
    await load.open(10, SEARCH_S, seed=0)
    rounds = [
        await one_round(load, number)
        for number in track(range(ROUNDS), "rounds", console=Console(stderr=True), refresh_per_second=1)
    ]
    least, most = STEADY_SHARES
    steady = [one for one in rounds if least <= one["at_80_share"] <= most]
    if not steady:
        raise SystemExit("the machine was steady in no round: stop what else runs on it, or ask for more ROUNDS")
    medians = {name: float(np.median([one[name] for one in steady])) for name in rounds[0] if name not in TOTALS}
    totals = {name: sum(one[name] for one in rounds) for name in TOTALS}
    each = {f"{name}, rounds": " ".join(f"{one[name]:.3g}" for one in rounds) for name in TOLD}
    known = {"prompt_tokens_known": await known_share(port)}
    return {"steady_rounds": f"{len(steady)} of {ROUNDS}"} | medians | totals | known | each


async def known_share(port: int) -> float:
    """Of all prompt tokens, those that the engine's process had kept."""
    async with httpx.AsyncClient() as client:
        exposition = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    families = text_string_to_metric_families(exposition)
    samples = (sample for family in families for sample in family.samples)
    tokens = {one.labels["from"]: one.value for one in samples if one.name == "sidrec_engine_prompt_tokens_total"}
    return tokens["cached"] / sum(tokens.values())


def percentile_ms(latencies: list[float], percent: float) -> float:
    """A percentile in milliseconds; NaN of nothing."""
    return 1000 * float(np.percentile(latencies, percent)) if latencies else float("nan")


def main() -> None:
    """The table."""
    results = run_against(
        "tests.benchmarks.serving",
        measure,
        num_items=NUM_ITEMS,
        num_users=NUM_USERS,
        loop_factory=uvloop.new_event_loop,
    )
    notes = {
        "closed_loop_rps": "the best of " + ", ".join(map(str, CONCURRENCIES)) + " clients",
        "saturation_rps": f"open loop at {BEYOND} of that, before and after the load",
        "at_80_share": "of saturation; a round counts from {:g} to {:g}".format(*STEADY_SHARES),
        "at_80_p99_over_p50": "≤ 3",
        "at_200_shed_p99_ms": "< 20",
        "at_200_beyond_deadline": "0",
        "requests": f"at 80 %, 200 % and after, in {ROUNDS} rounds",
        "after_shed": "0: at half of saturation, straight after",
        "errors": "0",
    }
    report(f"POST /recommend under load, {ANSWER_ITEMS} items of {NUM_ITEMS:,}, the local engine", results, notes)


if __name__ == "__main__":
    main()
