"""What a training step of LETTER costs as the catalogue grows: `make bench-tokenizer-step` (0.4 GB in /tmp, minutes).

The time of a step is that of two epochs less that of one, over an epoch's steps. Memory is what a process of its own
for each size holds at its highest beyond what it held before; pages of the mapped vectors count as far as they stay.
"""

import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from semantic_ids.codes import SidSpace
from semantic_ids.quantizer import Vectors
from tests.benchmarks.encode import VECTOR_DIM, map_vectors
from tests.benchmarks.report import report
from training.processes import Processes
from training.tokenizer.config import TokenizerConfig
from training.tokenizer.rqvae import ItemSignals, fit
from training.tokenizer.standardised import Standardised

SIZES = (16_384, 262_144)
SPACE = SidSpace(num_levels=4, codebook_size=256)


def main() -> None:
    """LETTER with its defaults on drawn vectors, one thread."""
    results: dict[str, float | int | str] = {}
    with TemporaryDirectory(dir="/tmp") as folder:
        map_vectors(Path(folder) / "vectors", max(SIZES), seed=0)
        for size in SIZES:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                step_ms, growth_mb = process.submit(measure, Path(folder), size).result()
            results[f"step_ms_{size}"], results[f"peak_growth_mb_{size}"] = step_ms, growth_mb
    small, large = (float(results[f"step_ms_{size}"]) for size in SIZES)
    results["step_large_over_small"] = large / small
    report("A training step of LETTER (batch 1,024, K 256, L 4), by items in the catalogue", results)


def measure(folder: Path, size: int) -> tuple[float, float]:
    """Milliseconds of a step, and the growth of the process's peak memory in MB."""
    torch.set_num_threads(1)
    vectors = np.memmap(folder / "vectors", np.float32, "r", shape=(max(SIZES), VECTOR_DIM))
    signals = drawn_signals(vectors[:size])
    trained_s(signals, 1, folder)  # whatever is loaded or compiled once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one, two = trained_s(signals, 1, folder), trained_s(signals, 2, folder)
    steps = -(-round(0.95 * size) // TokenizerConfig().batch_size)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return 1000 * (two - one) / steps, growth / 1000


def drawn_signals(vectors: Vectors) -> ItemSignals:
    """Collaborative vectors and popularity at random: they cost what real ones cost."""
    generator = np.random.default_rng(0)
    return ItemSignals(
        text=Standardised.of(vectors),
        mixed=None,
        collaborative=generator.standard_normal((len(vectors), 32), np.float32),
        popularity=generator.integers(1, 50, len(vectors)),
        partners=None,
    )


def trained_s(signals: ItemSignals, epochs: int, folder: Path) -> float:
    """Seconds of a run of so many epochs, its start included."""
    config = TokenizerConfig(method="letter", max_epochs=epochs, init_sample=4096, checkpoint_epochs=epochs + 1)
    start = time.perf_counter()
    fit(config, config.objectives(), SPACE, signals, folder, Processes.alone())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
