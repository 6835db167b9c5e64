"""Merged catalogues equal those made from everything, across restarts, damage and a Redis that was set back."""

import dataclasses
import random
import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from semantic_ids.bundle import Bundle
from semantic_ids.catalog_changes import CatalogItem
from service.histories import connect
from service.item_store import ItemStore
from service.live_catalog import LiveCatalog
from service.merged_catalogs import MergedCatalogs
from service.metrics import Metrics
from service.redis_server import EmbeddedRedis
from tests.semantic_ids.test_catalog_changes import observed
from tests.service.world import BY_ID, ITEM_IDS

NEW = [f"new-{number}" for number in range(12)]


@pytest_asyncio.fixture
async def redis(tmp_path: Path) -> AsyncIterator[Redis]:
    server = EmbeddedRedis(tmp_path / "redis")
    client = connect(await server.start(), timeout_s=5, max_connections=4)
    yield client
    await client.aclose()
    await server.stop()


@pytest.fixture
def base(bundle: Bundle, tmp_path: Path) -> Bundle:
    return dataclasses.replace(bundle, path=tmp_path / "bundles" / bundle.bundle_id)


async def catalogue(redis: Redis, folder: Path | None, merge_at: int = 5) -> tuple[LiveCatalog, MergedCatalogs | None]:
    """What a process knows that starts now; without a folder it merges nothing."""
    merged = None if folder is None else MergedCatalogs(folder, merge_at)
    live = LiveCatalog(ItemStore(redis, timeout_s=5), Metrics(), merged)
    await live.load()
    return live, merged


async def everything(live: LiveCatalog, base: Bundle) -> dict[str, Any]:
    bundle = await live.bundle_at_epoch(base)
    histories = ([0], [3, 7], [len(bundle.catalog) - 1])
    neighbours = [bundle.neighbours.of_history(_ranks(one)).tolist() for one in histories]
    return observed(bundle.catalog) | {"neighbours": neighbours, "epoch": bundle.catalog.epoch}


def _ranks(ranks: list[int]) -> Any:
    import numpy as np

    return np.array(ranks)


async def change(live: LiveCatalog, base: Bundle, rng: random.Random) -> None:
    """Delete or put something, for this bundle or for one that was made before or after it."""
    item_id = rng.choice([*ITEM_IDS[:20], *NEW])
    if rng.random() < 0.3:
        await live.delete(item_id, is_known=item_id in BY_ID)
        return
    known = BY_ID.get(item_id)
    codes = known.codes if known and rng.random() < 0.5 else rng.choice(list(BY_ID.values())).codes
    put_for = base
    if known and rng.random() < 0.4:
        put_for = dataclasses.replace(base, path=base.path.with_name("another"))
    item = CatalogItem(item_id, f"title {rng.random()}", rng.choice([(), ("Toys > Games",), ("Z",)]), codes)
    await live.put(put_for, item)


@pytest.mark.parametrize("seed", range(3))
async def test_an_epoch_on_a_merged_catalogue_is_the_one_made_from_everything(
    redis: Redis, base: Bundle, tmp_path: Path, seed: int
):
    """Also where puts for another bundle hold, and where they do not: then the bundle says what the item is."""
    rng = random.Random(seed)
    if seed == 1:  # made after every put
        later = base.manifest.model_copy(update={"created_at": base.manifest.created_at + timedelta(days=1)})
        base = dataclasses.replace(base, manifest=later)
    live, merged = await catalogue(redis, tmp_path / "cache")
    assert merged is not None
    num_merged: set[int] = set()
    for _ in range(40):
        for _ in range(rng.randint(1, 3)):
            await change(live, base, rng)
        await live.load()
        plain, _ = await catalogue(redis, None)
        assert await everything(live, base) == await everything(plain, base)
        await merged.stop()
        if (latest := await merged.latest(base, live._changes, live.epoch)) is not None:
            num_merged.add(latest.catalog.epoch)
    assert len(num_merged) > 3
    folder = tmp_path / "cache" / base.bundle_id
    assert [path.name for path in folder.iterdir()] == [str(max(num_merged))], "the ones before are removed"
    restarted, merged = await catalogue(redis, tmp_path / "cache")
    assert await everything(restarted, base) == await everything(plain, base)
    assert merged is not None
    found = await merged.latest(base, restarted._changes, restarted.epoch)
    assert found is not None
    assert found.catalog.epoch == max(num_merged), "a restart begins where the last merge ended"


async def merged_once(redis: Redis, base: Bundle, folder: Path) -> LiveCatalog:
    live, merged = await catalogue(redis, folder)
    rng = random.Random(5)
    for _ in range(30):
        await change(live, base, rng)
    await live.load()
    await live.bundle_at_epoch(base)
    assert merged is not None
    await merged.stop()
    assert await merged.latest(base, live._changes, live.epoch) is not None
    return live


@pytest.mark.parametrize("damage", ["byte", "missing file", "no manifest", "no folder"])
async def test_what_is_damaged_is_made_again(redis: Redis, base: Bundle, tmp_path: Path, damage: str):
    await merged_once(redis, base, tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / base.bundle_id).iterdir()
    if damage == "byte":
        content = bytearray((folder / "codes.npy").read_bytes())
        content[-1] ^= 1
        (folder / "codes.npy").write_bytes(content)
    elif damage == "missing file":
        (folder / "ties.npy").unlink()
    elif damage == "no manifest":
        (folder / "merged.json").unlink()
    else:
        shutil.rmtree(tmp_path / "cache")
    live, merged = await catalogue(redis, tmp_path / "cache")
    plain, _ = await catalogue(redis, None)
    assert merged is not None
    assert await merged.latest(base, live._changes, live.epoch) is None
    assert await everything(live, base) == await everything(plain, base)
    await merged.stop()
    assert await merged.latest(base, live._changes, live.epoch) is not None


@pytest.mark.parametrize("restarts", [True, False])
async def test_a_redis_with_other_changes_is_believed(redis: Redis, base: Bundle, tmp_path: Path, restarts: bool):
    """It was emptied, and has now other changes of the same numbers."""
    live = await merged_once(redis, base, tmp_path / "cache")
    highest = live.epoch
    await redis.flushall()
    other, _ = await catalogue(redis, None)
    rng = random.Random(6)
    while other.epoch < highest + 3:
        await change(other, base, rng)
        await other.load()
    if restarts:
        live, _ = await catalogue(redis, tmp_path / "cache")
    else:
        await live.load()
    assert await everything(live, base) == await everything(other, base)


async def test_a_folder_that_cannot_be_written_changes_nothing(redis: Redis, base: Bundle, tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    live, merged = await catalogue(redis, tmp_path / "cache")
    rng = random.Random(5)
    for _ in range(30):
        await change(live, base, rng)
    await live.load()
    plain, _ = await catalogue(redis, None)
    for _ in range(2):
        assert await everything(live, base) == await everything(plain, base)
        assert merged is not None
        await merged.stop()


async def test_what_was_merged_of_a_deleted_bundle_goes(redis: Redis, base: Bundle, tmp_path: Path):
    for name, is_there in (("deleted", False), ("kept", True)):
        (tmp_path / "cache" / name / "7").mkdir(parents=True)
        if is_there:
            (base.path.parent / name).mkdir(parents=True)
    live, merged = await catalogue(redis, tmp_path / "cache")
    rng = random.Random(5)
    for _ in range(30):
        await change(live, base, rng)
        await live.catch_up()
        await live.bundle_at_epoch(base)
    assert merged is not None
    await merged.stop()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted((base.bundle_id, "kept"))


async def test_sids_of_earlier_changes_are_not_kept(redis: Redis, base: Bundle, monkeypatch: pytest.MonkeyPatch):
    """An item that is put again and again must not grow the process by a SID each time."""
    free = tuple(base.catalog.codes[0].tolist())
    monkeypatch.setattr("service.live_catalog.sids_for", lambda _bundle, items: [free] * len(items))
    live, _ = await catalogue(redis, None)
    another = dataclasses.replace(base, path=base.path.with_name("another"))
    for number in range(20):
        await live.put(another, CatalogItem("new", f"title {number}", (), free))
        await live.catch_up()
        assert "new" in (await live.bundle_at_epoch(base)).catalog.item_ids
    assert len(live._sids) == 1
