"""Time and memory of a catalogue epoch at 1M items, 4 x 256 codes: `python -m tests.benchmarks.catalog_changes`.

The base is built once (about a minute) and mapped from a temporary folder; TMPDIR says where.
"""

import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from semantic_ids.catalog import Catalog, load_trie
from semantic_ids.catalog_changes import CatalogItem, ItemChanges
from semantic_ids.codes import SidSpace
from tests.benchmarks.report import report

SPACE = SidSpace(num_levels=4, codebook_size=256)
NUM_ITEMS = 1_000_000
CHANGES = {"1": 1, "1k": 1_000, "10k": 10_000}
BARS = {
    "epoch_ms_1k": "< 300",
    "epoch_mb_1k": "< 80, kept",
    "epoch_peak_mb_1k": "while it is made",
    "popularity_base_ms": "once a bundle",
    "popularity_ms_1k": "once an epoch, when first asked for",
    "save_trie_ms": "< 50",
}


def _category(number: int) -> str:
    """One of 2,000 paths of three nodes."""
    return f"Department {number % 20} > Aisle {number % 200} > Shelf {number % 2_000}"


def _base() -> Catalog:
    generator = np.random.default_rng(0)
    return Catalog.build(
        SPACE,
        [f"item-{number:07}" for number in range(NUM_ITEMS)],
        generator.integers(0, SPACE.codebook_size, (NUM_ITEMS, SPACE.num_levels), dtype=np.uint16),
        generator.zipf(1.5, NUM_ITEMS).clip(max=100_000),
        [f"The title of item number {number:015}" for number in range(NUM_ITEMS)],
        [[_category(number)] for number in range(NUM_ITEMS)],
    )


def _changes(count: int) -> ItemChanges:
    """One fifth deleted, the others put: half of them replace an item of the base."""
    generator = np.random.default_rng(count)
    numbers = generator.choice(NUM_ITEMS, count, replace=False).tolist()
    sids = generator.integers(0, SPACE.codebook_size, (count, SPACE.num_levels)).tolist()
    items = [
        CatalogItem(f"{'item' if place % 2 else 'new'}-{number:07}", "Put", (_category(number),), tuple(sid))
        for place, (number, sid) in enumerate(zip(numbers, sids, strict=True))
    ]
    num_deleted = count // 5
    deleted = (f"item-{number:07}" for number in numbers[:num_deleted])
    return ItemChanges().with_put(*items[num_deleted:]).with_deleted(*deleted)


def _best_ms(measured: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        measured()
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1_000


def _memory_mb(base: Catalog, changes: ItemChanges) -> tuple[float, float]:
    """What an epoch keeps, its popularity order too, and the most that is held while it is made."""
    tracemalloc.start()
    epoch = base.with_changes(changes)
    epoch.by_popularity  # noqa: B018 - a cached column
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept / 1e6, peak / 1e6


def _measure(base: Catalog, changes: ItemChanges) -> dict[str, float]:
    epoch, text = base.with_changes(changes), changes.to_json()
    kept_mb, peak_mb = _memory_mb(base, changes)
    return {
        "epoch_ms": _best_ms(lambda: base.with_changes(changes)),
        "popularity_ms": _best_ms(lambda: replace(epoch).by_popularity),
        "epoch_mb": kept_mb,
        "epoch_peak_mb": peak_mb,
        "one_more_put_ms": _best_ms(lambda: changes.with_put(changes.items[0])),
        "to_json_ms": _best_ms(changes.to_json),
        "from_json_ms": _best_ms(lambda: ItemChanges.from_json(text)),
    }


def main() -> None:
    """Best of five; changes are one fifth deletions and half replacements, seeded."""
    with tempfile.TemporaryDirectory() as folder:
        _base().save(Path(folder) / "catalog")
        base = Catalog.load(Path(folder) / "catalog", SPACE)
        base.with_changes(ItemChanges())  # the base's pages are in memory
        start = time.perf_counter()
        base.by_popularity  # noqa: B018 - a cached column
        results: dict[str, float | int | str] = {"popularity_base_ms": (time.perf_counter() - start) * 1_000}
        for name, count in CHANGES.items():
            results |= {f"{measure}_{name}": value for measure, value in _measure(base, _changes(count)).items()}
        names = iter(range(100))
        results["save_trie_ms"] = _best_ms(lambda: base.save_trie(Path(folder) / f"trie-{next(names)}"))
        results["load_trie_ms"] = _best_ms(lambda: load_trie(Path(folder) / "trie-0"))
    report("Catalogue epochs, 1M items, K 256, L 4", results, BARS)


if __name__ == "__main__":
    main()
