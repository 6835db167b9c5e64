"""The live catalogue of the running service at a million items: `python -m tests.benchmarks.live_catalog`.

For 100, 10,000 and 100,000 changes in Redis (one fifth deletions, half of the others replacing an item): time of an
epoch, from `PUT` with a SID to its presence in an answer, from `DELETE` to its absence, and of a start; once without a
merged catalogue, where every epoch is made from all changes, and once with it. The service runs in this process, with
an engine that answers at once and an embedded Redis; the bundle is made first (some minutes, kept in FOLDER if given).
"""

import argparse
import asyncio
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from semantic_ids.bundle import Bundle
from semantic_ids.catalog_changes import CatalogItem
from service.histories import connect
from service.item_store import ItemPut, ItemStore
from service.redis_server import EmbeddedRedis
from service.settings import Settings
from tests.benchmarks.report import report
from tests.benchmarks.small_bundle import SPACE, item_id, publish_small_bundle
from tests.service.engines import instant
from tests.service.running import Service, running

NUM_ITEMS = 1_000_000
NUM_CHANGES = (100, 10_000, 100_000)
REPEATS = 5
_TOGETHER = 64


async def _fill(url: str, bundle: Bundle, count: int) -> None:
    """`count` changes of different items."""
    redis = connect(url, timeout_s=60, max_connections=_TOGETHER)
    store = ItemStore(redis, timeout_s=60)
    generator = np.random.default_rng(count)
    numbers = generator.choice(NUM_ITEMS, count, replace=False).tolist()
    sids = generator.integers(0, SPACE.codebook_size, (count, SPACE.num_levels)).tolist()

    async def change(place: int) -> None:
        name = item_id(numbers[place]) if place % 2 else f"new-{place}"
        if place % 10 in (1, 3):
            await store.delete(name, epoch=0, is_known=True)
            return
        item = CatalogItem(name, f"Put {place}", (f"Everything > Shelf {place % 20}",), tuple(sids[place]))
        put = ItemPut(
            title=item.title, categories=item.categories, codes=item.codes, bundle=bundle.bundle_id, at=time.time()
        )
        await store.put(name, put, epoch=0)

    for first in range(0, count, _TOGETHER):
        await asyncio.gather(*(change(place) for place in range(first, min(first + _TOGETHER, count))))
    await redis.aclose()


async def _shown(service: Service, name: str) -> bool:
    answer = await service.recommend(history=[item_id(1)], filter={"include_items": [name]}, num_items=1)
    return bool(answer["items"])


async def _put_and_delete_s(service: Service, name: str, sid: str) -> tuple[float, float]:
    start = time.perf_counter()
    response = await service.http.put(f"/items/{name}", json={"title": name, "categories": [], "sid": sid})
    assert response.status_code == 200, response.text
    assert await _shown(service, name)
    put_s, start = time.perf_counter() - start, time.perf_counter()
    deleting = asyncio.create_task(service.http.delete(f"/items/{name}"))
    # An answer here waits for nothing: without the pause nothing else would run.
    while await _shown(service, name):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    delete_s = time.perf_counter() - start
    assert (await deleting).is_success
    return put_s, delete_s


async def _measured(settings: Settings, count: int, way: str, *, merging: bool) -> dict[str, float | int | str]:
    start = time.perf_counter()
    async with running(settings, instant) as service:
        start_s = time.perf_counter() - start
        if merging:  # the first epoch of so many changes begins a merge, and the service ends when that has
            return {}
        times = [
            await _put_and_delete_s(service, f"b-{way}-{one}", SPACE.format((9, 9, 9, one))) for one in range(REPEATS)
        ]
        started = time.perf_counter()
        await service.state.live.bundle_at_epoch(service.state.deployments.current.base)
        epoch_s = time.perf_counter() - started
    puts, deletes = zip(*times, strict=True)
    name = f"{count}_{way}"
    return {
        f"{name}_start_s": start_s,
        f"{name}_epoch_s": epoch_s,
        f"{name}_put_visible_s": sorted(puts)[REPEATS // 2],
        f"{name}_put_visible_worst_s": max(puts),
        f"{name}_delete_gone_ms": 1_000 * sorted(deletes)[REPEATS // 2],
    }


async def _measure(folder: Path, counts: list[int]) -> dict[str, float | int | str]:
    if not (folder / "bundles").exists():
        publish_small_bundle(folder / "bundles", NUM_ITEMS)
    bundle = Bundle.load_current(folder / "bundles")
    results: dict[str, float | int | str] = {}
    for count in counts:
        data, cache = folder / f"redis-{count}", folder / f"cache-{count}"
        shutil.rmtree(data, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
        server = EmbeddedRedis(data)
        await _fill(await server.start(), bundle, count)
        await server.stop()
        settings = Settings(bundles=folder / "bundles", data_dir=data, catalog_cache=cache, redis_timeout_s=30)
        blocked = folder / "no-folder"
        blocked.touch()
        unmerged = settings.model_copy(update={"catalog_cache": blocked})
        results |= await _measured(unmerged, count, "unmerged", merging=False)
        if count >= 5_000:
            await _measured(settings, count, "first", merging=True)
            results |= await _measured(settings, count, "merged", merging=False)
    return results


def main() -> None:
    """Medians of five; `start_s` includes the verification of the bundle."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--changes", type=int, nargs="+", default=list(NUM_CHANGES))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = asyncio.run(_measure(asked.folder or Path(temporary), asked.changes))
    report("The live catalogue, 1M items", results, {})


if __name__ == "__main__":
    main()
