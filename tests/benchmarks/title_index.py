"""The index of a million titles: time to make it, its longest hold on the event loop, and looking a rationale up.

python -m tests.benchmarks.title_index
"""

import asyncio
import random
import resource
import time

from semantic_ids.columns import StringColumn
from service.catalog_titles import TitleIndex, words_of

NUM_TITLES = 1_000_000


def _titles(accented_share: float) -> StringColumn:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))).title() for _ in range(20_000)]
    return StringColumn.of(
        " ".join(rng.choices(words, k=rng.randint(3, 12))) + (" café" if rng.random() < accented_share else "")
        for _ in range(NUM_TITLES)
    )


async def _measure(name: str, titles: StringColumn) -> None:
    lags: list[float] = []
    stop = asyncio.Event()

    async def tick() -> None:
        while not stop.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - before - 0.001)

    ticking = asyncio.create_task(tick())
    start = time.perf_counter()
    index = await asyncio.to_thread(TitleIndex, titles)
    seconds = time.perf_counter() - start
    stop.set()
    await ticking
    text = "You bought " + " and ".join(titles[place] for place in (5, 500_000)) + ", so next comes " + titles[7] + "."
    start = time.perf_counter()
    for _ in range(100):
        matches = index.matches(words_of(text))
    each_ms = 10 * (time.perf_counter() - start)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(  # noqa: T201
        f"{name}: {seconds:.2f} s for {len(index):,} titles, loop held at most {1e3 * max(lags):.0f} ms; a text of "
        f"{len(words_of(text))} words {each_ms:.2f} ms, {len(matches)} titles found; peak {peak_mb:.0f} MB"
    )


def main() -> None:
    """Measure both."""
    asyncio.run(_measure("ASCII", _titles(0.0)))
    asyncio.run(_measure("10 % with an accent", _titles(0.1)))


if __name__ == "__main__":
    main()
