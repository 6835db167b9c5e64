"""Speed and memory of `sidrec-serve export`'s work: `python -m tests.benchmarks.export --users 100000 --events 20`.

A bundle of 10,000 items and an embedded Redis with the histories of so many users, each of so many events, in a folder
of its own. Time is of one export, which includes reading the catalogue and writing every file to disk.
"""

import argparse
import asyncio
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from semantic_ids.bundle import Bundle
from service.export import Wanted, export
from service.histories import EventType, Histories, HistoryEntry, connect
from service.redis_server import EmbeddedRedis
from tests.benchmarks.report import report
from tests.benchmarks.small_bundle import publish_small_bundle

_NUM_ITEMS = 10_000


def _histories(bundle: Bundle, num_users: int, num_events: int) -> Iterator[tuple[str, list[HistoryEntry]]]:
    generator = np.random.default_rng(0)
    item_ids = list(bundle.catalog.item_ids)
    for user in range(num_users):
        ranks = generator.integers(0, len(item_ids), num_events).tolist()
        yield (
            f"user-{user:07}",
            [HistoryEntry(item_ids[rank], 1.7e9 + at, EventType.CLICK) for at, rank in enumerate(ranks)],
        )


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def _measure(folder: Path, num_users: int, num_events: int) -> dict[str, float | int | str]:
    publish_small_bundle(folder / "bundles", _NUM_ITEMS)
    bundle = Bundle.load_current(folder / "bundles")
    server = EmbeddedRedis(folder / "redis")
    redis = connect(await server.start(), timeout_s=60, max_connections=4)
    try:
        await Histories(redis).import_histories(_histories(bundle, num_users, num_events))
        before_mb, start = _peak_mb(), time.perf_counter()
        exported = await export(redis, bundle, folder / "out", Wanted("default"))
        seconds = time.perf_counter() - start
    finally:
        await redis.aclose()
        await server.stop()
    return {
        "users": exported.users,
        "events": exported.events,
        "export_s": seconds,
        "events_per_s": exported.events / seconds,
        "peak_grown_mb": _peak_mb() - before_mb,
    }


def main() -> None:
    """One export of a store that was filled once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(_measure(Path(folder), asked.users, asked.events))
    report("Export of served events", results, {"export_s": "100,000 users"})


if __name__ == "__main__":
    main()
