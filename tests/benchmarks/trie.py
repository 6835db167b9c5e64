"""Build time and size of the SID trie from unsorted random SIDs: `make bench-trie` (20M needs about 2 GB)."""

import time

import numpy as np

from semantic_ids.codes import SidSpace
from semantic_ids.trie import SidTrie
from tests.benchmarks.report import report

SPACE = SidSpace(num_levels=4, codebook_size=256)


def main() -> None:
    """Best of three builds per size; the SIDs are drawn once per size, seed 0."""
    results: dict[str, float | int | str] = {}
    for name, num_items in (("1m", 1_000_000), ("20m", 20_000_000)):
        codes = np.random.default_rng(0).integers(
            0, SPACE.codebook_size, (num_items, SPACE.num_levels), dtype=np.uint16
        )
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            trie = SidTrie.build(SPACE, codes)
            seconds.append(time.perf_counter() - start)
        results[f"build_s_{name}"] = min(seconds)
        results[f"bytes_per_item_{name}"] = trie.nbytes / num_items
        results[f"item_map_bytes_per_item_{name}"] = trie.leaf_rank.nbytes / num_items
        nodes = np.random.default_rng(1).integers(trie.level_starts[1], trie.level_starts[2], 1000)
        start = time.perf_counter()
        for _ in range(100):
            children = trie.children(nodes)
            trie.rank_range(children.node, 2)
        results[f"expand_1000_nodes_ms_{name}"] = (time.perf_counter() - start) * 10
    bars = {"build_s_1m": "≤ 0.7", "bytes_per_item_1m": "≤ 10", "build_s_20m": "≤ 6", "bytes_per_item_20m": "≤ 8"}
    report("SID trie, K 256, L 4, from unsorted random SIDs", results, bars)


if __name__ == "__main__":
    main()
