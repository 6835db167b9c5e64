"""Latency, throughput and memory of the HTTP service round an engine that answers at once: `make bench-http`.

One run, one server. First rounds of: one request after the other (no load), a closed loop (saturation), Poisson
arrivals at half of that rate; in rounds, and pooled, because a machine that others use drifts from one minute to the
next. Then 100,000 requests, of which the last 80,000 must not grow the process. A request is POST /recommend, 10 items,
for a user with a stored history in the real embedded Redis.

One request straight after the other finds every cache warm; a lone one does not, and takes up to twice as long with no
queue at all. `lone_p50_ms` shows that part: arrivals at a fiftieth of the saturation rate.

REQUESTS=2000 shrinks every phase in proportion, to see that it runs; its numbers mean little.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.benchmarks.against import Results, run_against
from tests.benchmarks.load import Load, Measured, Response, poisson_arrivals, post
from tests.benchmarks.report import report
from tests.benchmarks.small_bundle import user_id

NUM_ITEMS, NUM_USERS, ANSWER_ITEMS = 5_000, 2_000, 10
REQUESTS = int(os.environ.get("REQUESTS", "100000"))
SCALE = min(1.0, REQUESTS / 100_000)
CONCURRENCIES = (2, 4, 8, 16, 32, 64)
ROUNDS, WARM_UP_REQUESTS, CONNECTIONS = 4, 500, 64
NO_LOAD_REQUESTS = max(50, round(750 * SCALE))  # and the seconds below: of each round
SATURATION_S, HALF_LOAD_S, LONE_S = max(0.2, 2 * SCALE), max(0.5, 6 * SCALE), max(1.0, 4 * SCALE)
MEMORY_CONCURRENCY, MEMORY_SAMPLES = 4, 100


@dataclass(frozen=True)
class Growth:
    """Resident memory of the server over the last 80 % of the requests."""

    kib_per_1000: float
    first_kib: int
    last_kib: int


async def measure(port: int, server_pid: int) -> Results:
    """All phases on one server."""
    users = np.random.default_rng(2).permutation(NUM_USERS)
    messages = [
        post("/recommend", json.dumps({"user_id": user_id(user), "num_items": ANSWER_ITEMS}).encode()) for user in users
    ]
    load = Load(port, messages, is_whole_answer)
    await load.closed_loop(1, num_requests=WARM_UP_REQUESTS)
    sweep = {width: await load.closed_loop(width, seconds=SATURATION_S) for width in CONCURRENCIES}
    best = max(sweep, key=lambda width: sweep[width].per_second)
    rounds = [await one_round(load, best, seed) for seed in range(ROUNDS)]
    no_load, saturated, half, lone = (Measured.pooled(parts) for parts in zip(*rounds, strict=True))
    growth, num_memory_errors = await memory_growth(load, server_pid)
    return {
        "no_load_p50_ms": no_load.percentile_ms(50),
        "no_load_p99_ms": no_load.percentile_ms(99),
        "lone_p50_ms": lone.percentile_ms(50),
        "saturation_rps": saturated.per_second,
        "saturation_concurrency": best,
        "half_load_rps": half.per_second,
        "half_load_p50_ms": half.percentile_ms(50),
        "half_load_p99_ms": half.percentile_ms(99),
        "half_load_p50_over_no_load": half.percentile_ms(50) / no_load.percentile_ms(50),
        "half_load_p50_over_lone": half.percentile_ms(50) / lone.percentile_ms(50),
        "rss_growth_kib_per_1000": growth.kib_per_1000,
        "rss_first_kib": growth.first_kib,
        "rss_last_kib": growth.last_kib,
        "memory_requests": REQUESTS,
        "errors": num_memory_errors + sum(one.num_errors for one in (no_load, saturated, half, lone, *sweep.values())),
    }


async def one_round(load: Load, concurrency: int, seed: int) -> tuple[Measured, Measured, Measured, Measured]:
    """No load, saturation, half of that, and lone requests."""
    no_load = await load.closed_loop(1, num_requests=NO_LOAD_REQUESTS)
    saturated = await load.closed_loop(concurrency, seconds=SATURATION_S)
    rate = saturated.per_second
    half = await load.open_loop(poisson_arrivals(rate / 2, HALF_LOAD_S, seed), CONNECTIONS)
    lone = await load.open_loop(poisson_arrivals(rate / 50, LONE_S, seed), num_connections=4)
    return no_load, saturated, half, lone


async def memory_growth(load: Load, server_pid: int) -> tuple[Growth, int]:
    """The slope of a line through the samples, so that one page more or less at either end decides nothing."""
    num_answered, rss_kib, num_errors = [0], [resident_kib(server_pid)], 0
    for _ in range(MEMORY_SAMPLES):
        measured = await load.closed_loop(MEMORY_CONCURRENCY, num_requests=REQUESTS // MEMORY_SAMPLES)
        num_answered.append(num_answered[-1] + len(measured.latencies))
        rss_kib.append(resident_kib(server_pid))
        num_errors += measured.num_errors
    counted = [place for place, number in enumerate(num_answered) if number >= 0.2 * num_answered[-1]]
    thousands = np.array(num_answered)[counted] / 1000
    slope = float(np.polyfit(thousands, np.array(rss_kib)[counted], deg=1)[0])
    return Growth(slope, rss_kib[counted[0]], rss_kib[-1]), num_errors


def resident_kib(pid: int) -> int:
    """Exact, from smaps_rollup: the counters in /proc/PID/status lag behind by some pages per CPU."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    (kib,) = re.findall(r"^Rss: +(\d+) kB$", text, re.MULTILINE)
    return int(kib)


def is_whole_answer(response: Response) -> bool:
    """200, by the model, and every item that was asked for."""
    return (
        response.status == 200
        and b'"degraded":false' in response.body
        and response.body.count(b'"item_id":') == ANSWER_ITEMS
    )


def main() -> None:
    """The table."""
    results = run_against("tests.benchmarks.instant_service", measure, num_items=NUM_ITEMS, num_users=NUM_USERS)
    notes = {
        "saturation_rps": "closed loop, the best concurrency",
        "lone_p50_ms": "no queue, cold caches",
        "half_load_p50_ms": "from the scheduled arrival",
        "half_load_p50_over_no_load": "≤ 3",
        "half_load_p50_over_lone": "what of it is queue",
        "rss_growth_kib_per_1000": "< 1, over the last 80 %",
        "errors": "0",
    }
    report(f"POST /recommend, {ANSWER_ITEMS} items of {NUM_ITEMS:,}, an engine that answers at once", results, notes)


if __name__ == "__main__":
    main()
