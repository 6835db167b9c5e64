"""What thinking steps cost: a training step and a search of every row of `make bench-steps`, beside the plain one.

`python -m tests.benchmarks.step_cost`: the ablations' generator, 5,000 items with random SIDs of three codes, batches
of 16 sequences of 20 items in training, width 50 in searches. CPU seconds of one thread, rows in turns, medians; so
other work on the machine changes the times and hardly their ratios.
"""

import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidSpace
from semantic_ids.decoding.beam import constrained_beam
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import ItemFilter
from semantic_ids.prompt import History
from tests.benchmarks.ablations import PROFILES, STEP_ROWS
from tests.benchmarks.report import report
from training.examples import Examples, Lesson
from training.generator import build_model
from training.learner import Learner, Teaching
from training.pipeline import load_config
from training.processes import Processes
from training.sequences import Sequences

NUM_ITEMS, LENGTH, WIDTH, USERS = 5_000, 20, 50, (1, 16)
TURNS = 15
SPACE = SidSpace(3, 256)


class Row:
    """A way to think: a learner to step, and a decoder to search with."""

    def __init__(self, settings: dict[str, str], catalog: Catalog, codebooks: np.ndarray) -> None:
        config = load_config("default", PROFILES["scientific-steps"] | settings).sft
        torch.manual_seed(0)
        model, vocabulary, self._renderer = build_model(config, catalog, Path())
        self._catalog = catalog
        self._examples = Examples(catalog, vocabulary, self._renderer)
        self._learner = Learner(config, model, self._examples, Teaching(codebooks=codebooks), 1_000, Processes.alone())
        self._model = model
        self._decoder = TreeDecoder(model, vocabulary, fed_back=self._renderer.fed_back)

    def learn(self, sequences: Sequences) -> None:
        """A training step."""
        self._model.train()
        batch = self._examples.batch(sequences)
        self._learner.step(Lesson(batch, None, 1.0, len(batch.ranks)), None)

    def search(self, sequences: Sequences) -> None:
        """The best items after each sequence."""
        self._model.eval()
        histories = (History.of(self._catalog, sequence, shows_titles=False) for sequence in sequences)
        state = self._decoder.prefill([self._renderer.render(history).token_ids for history in histories])
        filters = [ItemFilter.of(NUM_ITEMS)] * len(sequences)
        widths = [WIDTH] * len(sequences)
        constrained_beam(self._decoder, self._catalog.trie, state, filters, widths, forced=self._renderer.forced)


def measure() -> dict[str, float | int | str]:
    """Milliseconds, and times the plain row's."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    ids, codes = [f"i{number}" for number in range(NUM_ITEMS)], rng.integers(0, SPACE.codebook_size, (NUM_ITEMS, 3))
    nothing = np.zeros(NUM_ITEMS, np.int64)
    catalog = Catalog.build(SPACE, ids, codes, nothing, [""] * NUM_ITEMS, [[]] * NUM_ITEMS)
    codebooks = rng.standard_normal((3, SPACE.codebook_size, 32)).astype(np.float32)
    rows = {name: Row(settings, catalog, codebooks) for name, settings in STEP_ROWS.items()}
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(TURNS):
        many = Sequences.of(rng.integers(0, NUM_ITEMS, (16, LENGTH)).tolist())
        for name, row in rows.items():
            start = time.process_time()
            row.learn(many)
            seconds[name, "a training step"].append(time.process_time() - start)
            for num_users in USERS:
                some = Sequences.of(list(many)[:num_users])
                start = time.process_time()
                row.search(some)
                seconds[name, f"a search, {num_users} users"].append(time.process_time() - start)
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    return {
        f"{what}: {name}": f"{1000 * median:.1f} ms, {median / medians['plain', what]:.2f} ×"
        for (name, what), median in sorted(medians.items(), key=lambda one: one[0][1])
    }


if __name__ == "__main__":
    report("Thinking steps, beside the plain row", measure())
