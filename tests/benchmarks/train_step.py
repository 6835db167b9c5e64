"""How near a training step comes to the bare rate of its matrix products: `make bench-train` (two minutes, 1.5 GB).

Measured is `training.learner`'s step under `--config best`, on drawn data like Amazon Beauty's: batches and lessons are
loaded, then come forward and backward passes, clipping, AdamW and the moving average. The matrix products of a step,
attention among them, are recorded with shapes and layouts and run again alone on random numbers. Loading, step and bare
products of one batch follow each other, so that all three see the same machine.

Seconds are CPU seconds of one thread: the wall's where the machine is idle, and the step's own where it is not.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidSpace
from tests.benchmarks.report import report
from training.distillation import LIST_LENGTH, NUM_SAMPLED, Continuations, TeacherLists
from training.examples import Examples, Lesson, continuation_lessons, epoch_batches, sequence_lessons
from training.generator import build_model
from training.item_memory import TEXT_WIDTH, KnownItems
from training.learner import Learner, Teaching
from training.memory import keep_freed_memory
from training.pipeline import load_config
from training.processes import Processes
from training.sequences import Sequences
from training.sft_config import SftConfig
from training.tokenizer.clustered import NUM_LEVELS, default_num_clusters

Result = TypeVar("Result")
Shape = tuple[int, ...]

NUM_USERS, NUM_ITEMS, SASREC_WIDTH = 22_363, 12_101, 64
STEPS, RUNS = 8, 5


def main() -> None:
    """One thread, seed 0, and the heap as `sidrec-train` has it."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = load_config("best", {}).sft
    notes = {
        "tokens_per_s": "of batches, padding included, as `sft` counts them; lessons come on top",
        "loading_share": "< 0.05",
        "achieved_over_bare": "≥ 0.6",
        "wall_over_cpu": "1 where the core is free",
    }
    report(f"A training step (--config best, batch {config.batch_size}), one thread", measure(config), notes)


@dataclass
class Seconds:
    """What a run of all steps took."""

    loading: float = 0.0
    step: float = 0.0
    bare: float = 0.0
    wall: float = 0.0

    @property
    def training(self) -> float:
        """All but the bare products."""
        return self.loading + self.step


def measure(config: SftConfig) -> dict[str, float | int | str]:
    """Medians over runs of the same steps, whose batches are spread over an epoch."""
    generator = np.random.default_rng(0)
    catalog = drawn_catalog(generator)
    train = drawn_sequences(generator, NUM_USERS)
    teaching = drawn_teaching(generator, config, train)
    model, vocabulary, renderer = build_model(config, catalog, Path(), teaching.known)
    examples = Examples(catalog, vocabulary, renderer)
    alone = Processes.alone()
    learner = Learner(config, model, examples, teaching, 10 * STEPS * RUNS, alone)
    model.train()
    epoch, shuffling_s = timed(lambda: list(epoch_batches(train, config, epoch=0)))
    lessons = sequence_lessons(train, teaching.lists, examples, config, 0, alone)
    further = continuation_lessons(teaching.continuations, examples, config, 0, alone)

    def load() -> tuple[Lesson, Lesson | None]:
        return next(lessons), next(further)

    loaded = [load() for _ in range(STEPS)]  # their order is drawn
    products = [MatrixProducts.of(partial(learner.step, *step)) for step in loaded]
    runs = []
    for _ in range(RUNS):
        run, start = Seconds(), time.perf_counter()
        for step, recorded in zip(loaded, products, strict=True):
            run.loading += timed(load)[1]
            run.step += timed(partial(learner.step, *step))[1]
            run.bare += timed(recorded.run)[1]
        run.wall = time.perf_counter() - start
        run.loading += shuffling_s * STEPS / len(epoch)
        runs.append(run)
    flops, tokens = sum(recorded.flops for recorded in products), sum(one.batch.token_ids.numel() for one, _ in loaded)

    def median(of: Callable[[Seconds], float]) -> float:
        return statistics.median(map(of, runs))

    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_s": median(lambda run: tokens / run.training),
        "step_s": median(lambda run: run.training / STEPS),
        "loading_share": median(lambda run: run.loading / run.training),
        "products_gflop_a_step": flops / STEPS / 1e9,
        "achieved_gflop_per_s": median(lambda run: flops / run.training) / 1e9,
        "bare_gflop_per_s": median(lambda run: flops / run.bare) / 1e9,
        "achieved_over_bare": median(lambda run: run.bare / run.training),
        "wall_over_cpu": median(lambda run: run.wall / (run.training + run.bare)),
    }


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """What `run` returns, and its CPU time in seconds."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


class MatrixProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The matrix products of whatever runs inside, ready to be run again on random numbers of the same layout."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[Callable[[], object]] = []
        self.flops = 0

    @classmethod
    def of(cls, run: Callable[[], object]) -> "MatrixProducts":
        """Those of `run`, forward and backward; their number of operations follows from the shapes."""
        products = cls()
        with _flop_counter() as counter, products:
            run()
        with _flop_counter() as again:
            products.run()
        if counter.get_flop_counts()["Global"] != again.get_flop_counts()["Global"]:
            raise SystemExit("what was recorded is not what was counted: the comparison is void")
        products.flops = counter.get_total_flops()
        return products

    @torch.no_grad()
    def run(self) -> None:
        """The products alone, in the order in which they came."""
        for call in self._calls:
            call()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func.overloadpacket in _flop_counter().flop_registry:
            values, form = tree_flatten((args, kwargs))
            values = [_random_like(value, place) for place, value in enumerate(values)]
            random_args, random_kwargs = tree_unflatten(values, form)
            self._calls.append(partial(func, *random_args, **random_kwargs))
        return func(*args, **kwargs)


def _flop_counter() -> FlopCounterMode:
    """torch's counter, which does not know the CPU's attention."""

    def forward(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backwards = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={attention: forward, backwards: backward})


def _random_like(value: object, place: int) -> object:
    if not isinstance(value, Tensor):
        return value
    return _random(tuple(value.shape), value.stride(), value.dtype, place)


@cache
def _random(shape: Shape, strides: Shape, dtype: torch.dtype, place: int) -> Tensor:
    """Normal numbers so laid out; operands at different places of a call do not share memory."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.randn(length).to(dtype).as_strided(shape, strides)


def drawn_catalog(generator: np.random.Generator) -> Catalog:
    """SIDs as the method `clustered` makes them: a cluster, of at most about 1.7 times the mean size, and the item."""
    num_clusters = default_num_clusters(NUM_ITEMS)
    sizes = np.minimum(generator.lognormal(0, 0.5, num_clusters), 1.7)
    clusters = np.sort(generator.choice(num_clusters, NUM_ITEMS, p=sizes / sizes.sum()))
    codes = np.stack([clusters, np.arange(NUM_ITEMS)], axis=1)
    names = [str(item) for item in range(NUM_ITEMS)]
    return Catalog.build(
        SidSpace(NUM_LEVELS, NUM_ITEMS), names, codes, np.zeros(NUM_ITEMS, np.int64), names, [()] * NUM_ITEMS
    )


def drawn_sequences(generator: np.random.Generator, count: int, extra: int = 0) -> Sequences:
    """Lengths from 3 on, 7 on average, seldom above 50, and `extra` more; some items far more often than others."""
    lengths = 3 + np.minimum(generator.lognormal(0.53, 1.38, count).astype(np.int64), 200) + extra
    popularity = generator.permutation(generator.lognormal(0, 1, NUM_ITEMS))
    items = generator.choice(NUM_ITEMS, lengths.sum(), p=popularity / popularity.sum())
    return Sequences(np.concatenate(([0], np.cumsum(lengths))), items.astype(np.int32))


def drawn_teaching(generator: np.random.Generator, config: SftConfig, train: Sequences) -> Teaching:
    """All that `config` asks for, at random: it costs what the real thing costs."""
    known = lists = continuations = None
    if config.item_memory:
        text, collaborative = (
            generator.standard_normal((NUM_ITEMS, n), np.float32) for n in (TEXT_WIDTH, SASREC_WIDTH)
        )
        known = KnownItems(text, collaborative)
    if config.distillation:
        lists = drawn_lists(generator, len(train.items))
    if config.continuations:
        continued = drawn_sequences(generator, config.continuations, extra=NUM_SAMPLED)
        stop = continued.lengths
        continued = continued.slice_each(np.maximum(stop - config.max_history - 1, 0), stop)
        continuations = Continuations(continued, drawn_lists(generator, len(continued) * (NUM_SAMPLED - 1)))
    return Teaching(known, lists, continuations)


def drawn_lists(generator: np.random.Generator, count: int) -> TeacherLists:
    """Full ones, of any items."""
    shape = (count, LIST_LENGTH)
    weights = generator.random(shape, np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    return TeacherLists(generator.integers(NUM_ITEMS, size=shape, dtype=np.int32), weights)


if __name__ == "__main__":
    main()
