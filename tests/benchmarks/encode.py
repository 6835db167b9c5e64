"""SIDs for a million item vectors, and for 10,000 new ones: `make bench-encode` (1.5 GB in /tmp, minutes)."""

import time
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from semantic_ids.codes import SidSpace
from semantic_ids.quantizer import DenseLayer, ResidualQuantizer, Vectors, squared_distances
from semantic_ids.trie import SidTrie
from tests.benchmarks.report import report

Result = TypeVar("Result")

SPACE = SidSpace(num_levels=4, codebook_size=256)
NUM_ITEMS, NUM_NEW = 1_000_000, 10_000
VECTOR_DIM, NUM_TOPICS = 384, 2_000
ENCODERS = {
    "kmeans": (VECTOR_DIM,),
    "mlp": (VECTOR_DIM, 512, 256, 128, 64, 32),
    "letter": (VECTOR_DIM, 2048, 1024, 512, 256, 128, 64, 32),  # LETTER's published widths
}


def main() -> None:
    """One run for each encoder; vectors, weights and codebooks are drawn, seed 0."""
    results: dict[str, float | int | str] = {}
    with TemporaryDirectory(dir="/tmp") as folder:
        vectors = map_vectors(Path(folder) / "vectors", NUM_ITEMS, seed=0)
        new = map_vectors(Path(folder) / "new", NUM_NEW, seed=1)
        for name, widths in ENCODERS.items():
            quantizer = random_encoder(widths, vectors[:8192])
            tracemalloc.start()  # what numpy asks for; the pages of the mapped file are the kernel's
            codes, results[f"encode_s_1m_{name}"] = timed(quantizer.encode, vectors)
            results[f"encode_peak_mb_{name}"] = tracemalloc.get_traced_memory()[1] / 1e6
            tracemalloc.stop()
            results[f"encode_one_ms_{name}"] = timed(quantizer.encode, new[:1])[1] * 1000
            if name == "mlp":
                results |= assignment(quantizer, new, codes)
    notes = {
        "encode_s_1m_mlp": "≤ 120",
        "encode_peak_mb_mlp": "of which 8 the codes",
        "assign_new_s_10k": "encoding included",
    }
    report("Vectors of 384 → SIDs, K 256, L 4", results, notes)


def assignment(
    quantizer: ResidualQuantizer, new: Vectors, codes: npt.NDArray[np.uint16]
) -> dict[str, float | int | str]:
    """10,000 new items against the million, and the worst case: 10,000 times the same item."""
    taken = SidTrie.build(SPACE, codes)
    assigned, seconds = timed(quantizer.assign_new, new, taken)
    _, same_seconds = timed(quantizer.assign_new, np.repeat(new[:1], len(new), axis=0), taken)
    return {
        "sids_of_1m": taken.num_leaves,
        "assign_new_s_10k": seconds,
        "assign_new_moved_share": float((assigned != quantizer.encode(new)).any(axis=1).mean()),
        "assign_new_s_10k_equal_items": same_seconds,
    }


def map_vectors(path: Path, num_items: int, seed: int) -> Vectors:
    """Unit vectors around 2,000 topics, as text embeddings crowd; memory-mapped."""
    topics = np.random.default_rng(7).standard_normal((NUM_TOPICS, VECTOR_DIM), np.float32)
    rng = np.random.default_rng(seed)
    vectors = np.memmap(path, np.float32, "w+", shape=(num_items, VECTOR_DIM))
    for start in range(0, num_items, 10_000):
        block = topics[rng.integers(0, NUM_TOPICS, min(10_000, num_items - start))]
        block += 0.5 * rng.standard_normal(block.shape, np.float32)
        vectors[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    vectors.flush()
    return np.memmap(path, np.float32, "r", shape=(num_items, VECTOR_DIM))


def random_encoder(widths: Sequence[int], sample: Vectors) -> ResidualQuantizer:
    """Random layers that keep the variance; the codes of each level are drawn from what is left of the sample."""
    rng = np.random.default_rng(0)
    layers = tuple(
        DenseLayer((rng.standard_normal((out, into)) * (2 / into) ** 0.5).astype(np.float32), np.zeros(out, np.float32))
        for into, out in pairwise(widths)
    )
    codebooks = np.zeros((SPACE.num_levels, SPACE.codebook_size, widths[-1]), np.float32)
    mean, scale = sample.mean(axis=0), sample.std(axis=0)
    residuals = ResidualQuantizer(mean, scale, codebooks, layers).latents(sample)
    for codebook in codebooks:
        codebook[:] = rng.choice(residuals, SPACE.codebook_size, replace=False)
        residuals -= codebook[squared_distances(residuals, codebook).argmin(axis=1)]
    return ResidualQuantizer(mean, scale, codebooks, layers)


def timed(run: Callable[..., Result], *arguments: object) -> tuple[Result, float]:
    """What `run` returns, and its wall time in seconds."""
    start = time.perf_counter()
    result = run(*arguments)
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
