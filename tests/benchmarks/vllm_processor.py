"""What the SID processor costs a sampling step of vLLM, without a model.

`OMP_NUM_THREADS=1 python -m tests.benchmarks.vllm_processor` (vLLM replaces `torch.set_num_threads` by a warning). The
largest part of a step is the -inf over a whole vocabulary that has just been written: it is bound by memory.
"""

import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from vllm.config import VllmConfig

from semantic_ids.codes import SidSpace, SidVocabulary
from semantic_ids.trie import SidTrie
from service.engine.store import CatalogSnapshot, DecodingCatalog, SidStore
from service.engine.vllm_processors import SidArgs, SidCore, SidRowState
from service.engine.wire import WireFilter, pack_ranks
from tests.benchmarks.report import report

SPACE = SidSpace(num_levels=4, codebook_size=256)
TEXT_TOKENS = 49_152  # SmolLM2
VOCABULARY = SidVocabulary(SPACE, TEXT_TOKENS, TEXT_TOKENS + SPACE.num_tokens)
NUM_ITEMS = 1_000_000
NUM_ROWS = 64
NUM_DENIED = 1_000
CATALOG_ID = "benchmark@0"
STEPS = 50


class _Catalog:
    """A million random SIDs, without the items' texts."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.trie = SidTrie.build(SPACE, rng.integers(0, SPACE.codebook_size, (NUM_ITEMS, SPACE.num_levels)))

    def __len__(self) -> int:
        return NUM_ITEMS


class _Store(SidStore):
    """One that has the catalogue already."""

    def __init__(self, snapshot: CatalogSnapshot) -> None:
        super().__init__()
        self._catalogs[snapshot.catalog_id] = snapshot


def measure() -> dict[str, float]:
    """Medians in ms: one step of 64 rows, a quarter at each level, and one new request. All deny 1,000 items."""
    rng = np.random.default_rng(0)
    catalog = _Catalog(rng)
    store = _Store(CatalogSnapshot(CATALOG_ID, cast(DecodingCatalog, catalog), VOCABULARY))
    model = SimpleNamespace(get_vocab_size=lambda: VOCABULARY.vocab_size)
    config = SimpleNamespace(model_config=model, additional_config={})
    core = SidCore(cast(VllmConfig, config), store)
    wires = [_wire(rng, row) for row in range(NUM_ROWS)]
    start_ms = []
    for wire in wires * 3:
        start = time.perf_counter()
        core.start(wire)
        start_ms.append((time.perf_counter() - start) * 1e3)
    apply_ms = []
    for _ in range(STEPS):
        rows = [core.start(wire) for wire in wires]
        tokens = [_tokens(catalog.trie, rng, row % SPACE.num_levels) for row in range(NUM_ROWS)]
        for state, known in zip(rows, tokens, strict=True):
            core.follow(state, known[:-1])
        apply_ms.append(_step_ms(core, rows, tokens))
        if any(row.program is None for row in rows):
            raise RuntimeError("rows failed: these are the times of errors")
    return {"processor_apply_ms": float(np.median(apply_ms)), "processor_new_request_ms": float(np.median(start_ms))}


def _step_ms(core: SidCore, rows: list[SidRowState], tokens: list[list[int]]) -> float:
    """One `apply` as the adapters run it: take the last token of each row, write its logits."""
    logits = torch.randn(NUM_ROWS, VOCABULARY.vocab_size)
    start = time.perf_counter()
    for state, known in zip(rows, tokens, strict=True):
        core.follow(state, known[state.num_seen :])
    core.write(logits, dict(enumerate(rows)))
    return (time.perf_counter() - start) * 1e3


def _wire(rng: np.random.Generator, row: int) -> dict[str, Any]:
    denied = np.unique(rng.choice(NUM_ITEMS, NUM_DENIED, replace=False))
    return SidArgs(CATALOG_ID, f"r{row}", 0, WireFilter(None, pack_ranks(denied), None)).as_wire()


def _tokens(trie: SidTrie, rng: np.random.Generator, num_codes: int) -> list[int]:
    """The first codes of a random item, as tokens."""
    path = trie.path_of_rank(rng.integers(0, NUM_ITEMS, 1))[0]
    return [VOCABULARY.block(level).start + int(trie.tokens[path[level]]) for level in range(num_codes)]


def main() -> None:
    """Print what `measure` finds."""
    report(
        f"SID processor, {NUM_ROWS} rows at mixed levels, {NUM_ITEMS:,} items, {VOCABULARY.vocab_size:,} tokens",
        dict(measure()),
        {"processor_apply_ms": "≤ 2 % of a decode step", "processor_new_request_ms": "≤ 0.2, 1,000 denied items"},
    )


if __name__ == "__main__":
    main()
