"""How long the choice of diverse items takes: `python -m tests.benchmarks.diversity`; the best of 50, one core."""

import timeit

import numpy as np

from semantic_ids.diversity import mmr
from tests.benchmarks.report import report

REPEATS = 50


def main() -> None:
    """By SIDs of 4 levels of 16 codes, and by vectors of 64 dimensions."""
    rng = np.random.default_rng(0)
    results: dict[str, float | int | str] = {}
    for wanted, num_candidates in ((500, 500), (10, 50)):
        scores = np.sort(rng.normal(size=num_candidates).astype(np.float32))[::-1].copy()
        codes = rng.integers(0, 16, (num_candidates, 4)).astype(np.uint16)
        for what, vectors in (("sids", None), ("vectors", rng.normal(size=(num_candidates, 64)).astype(np.float32))):
            seconds = min(
                timeit.repeat(lambda: mmr(scores, codes, wanted, 0.5, vectors=vectors), number=1, repeat=REPEATS)  # noqa: B023
            )
            results[f"{wanted}_of_{num_candidates}_by_{what}_ms"] = 1_000 * seconds
    report("Choosing diverse items", results, {})


if __name__ == "__main__":
    main()
