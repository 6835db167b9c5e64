"""Stage `tokenizer`: item vectors → SIDs, top to bottom.

`run` fits a quantiser (or takes SIDs from elsewhere), assigns the nearest codes, makes them unique, and writes the
quantiser, the catalogue and a report. SIDs never follow item-id order: items come in the data stage's shuffled order,
and all choices below depend on vectors and that order alone.
"""

import hashlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PositiveInt

from semantic_ids.catalog import Catalog, CatalogError
from semantic_ids.codes import Codes, SidSpace
from semantic_ids.quantizer import ResidualQuantizer, Vectors
from semantic_ids.trie import sid_keys
from training.interactions import Dataset
from training.processes import Processes
from training.sequences import Sequences
from training.stage import THREADS, StageConfig, StageError, StageFolder, Summary, progress_bar
from training.tokenizer.assignment import SMALLEST_EPSILON, last_distances, make_unique
from training.tokenizer.cooccurrence import Partners, item_graph, propagate
from training.tokenizer.kmeans import codebooks_of_codes, residual_codebooks
from training.tokenizer.methods import (
    CodebookUpdate,
    Initialisation,
    Method,
    Objectives,
    Repair,
    Similarity,
    objectives_of,
)
from training.tokenizer.report import Evidence, titles_nearest_to_centres, write_report
from training.tokenizer.rqvae import CHECKPOINT, ItemSignals, fit
from training.tokenizer.sid_files import read_sids
from training.tokenizer.standardised import Standardised

MIXED_VECTORS = "mixed_vectors.npy"
REPORT = "report.html"
GIVEN: tuple[Method, ...] = ("random", "imported")
"""Methods whose SIDs follow from no vector: nothing is fitted, and nothing repaired."""

COLLAPSED_SHARE = 0.05

BY_METHOD = "; absent: as the method has it"


class TokenizerConfig(StageConfig):
    """How SIDs are made: a method, and what to change in it."""

    method: Method = Field("residual-kmeans", description="a row of the switches below")
    num_levels: int = Field(3, ge=1, le=8, description="codes in a SID (L)")
    codebook_size: int | None = Field(
        None, ge=2, le=65_536, description="codes per level (K); by catalogue size if absent"
    )
    sids: str | None = Field(None, description="JSON or Parquet file of SIDs, for the method imported")

    codebook_update: CodebookUpdate | None = Field(None, description="by gradient, or moving averages" + BY_METHOD)
    initialisation: Initialisation | None = Field(None, description="of the codebooks on residuals" + BY_METHOD)
    sinkhorn_last_level: bool | None = Field(None, description="balanced last codes while training" + BY_METHOD)
    collaborative_weight: float | None = Field(None, ge=0, description="of alignment to SASRec's vectors" + BY_METHOD)
    collaborative_similarity: Similarity | None = Field(None, description="dot as published, or cosine" + BY_METHOD)
    collaborative_permuted: bool | None = Field(None, description="control: another item's SASRec vector" + BY_METHOD)
    diversity_weight: float | None = Field(None, ge=0, description="of the codes' diversity loss" + BY_METHOD)
    cointeraction_weight: float | None = Field(None, ge=0, description="of InfoNCE on co-interacted items" + BY_METHOD)
    graph: bool | None = Field(None, description="mix vectors along co-occurrence" + BY_METHOD)
    uniformity_weight: float | None = Field(None, ge=0, description="of the repulsion between codes" + BY_METHOD)
    load_balance: float | None = Field(None, ge=0, lt=1, description="rare codes nearer, by so much" + BY_METHOD)
    repair: Repair | None = Field(None, description="how shared SIDs are told apart" + BY_METHOD)

    hidden_widths: tuple[PositiveInt, ...] = Field((512, 256, 128, 64), description="of the encoder; mirrored back")
    latent_width: PositiveInt = 32
    commitment_weight: float = Field(0.25, ge=0)
    batch_size: PositiveInt = 1024
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    max_epochs: PositiveInt = 1000
    convergence_window: PositiveInt = Field(20, description="epochs of flat validation loss that end training")
    convergence_threshold: float = Field(1e-3, ge=0, description="share of the loss below which a fall counts as flat")
    validation_share: float = Field(0.05, gt=0, lt=0.5, description="of the items, held out: the least known ones")
    max_validation_items: int = Field(2048, ge=2)
    checkpoint_epochs: PositiveInt = Field(20, description="epochs between checkpoints")
    init_sample: PositiveInt = Field(65_536, description="most items that k-means reads")
    kmeans_restarts: int = Field(3, ge=1)
    ema_decay: float = Field(0.99, gt=0, lt=1)
    sinkhorn_epsilon: float = Field(0.003, ge=SMALLEST_EPSILON)
    sinkhorn_iterations: PositiveInt = 50
    collaborative_temperature: float = Field(0.1, gt=0, description="of the cosine")
    diversity_clusters: PositiveInt = Field(10, description="clusters of a level's codes")
    cluster_refresh: PositiveInt = Field(10, description="epochs between clusterings of the codes")
    cointeraction_temperature: float = Field(0.1, gt=0)
    graph_window: PositiveInt = Field(5, description="events between two items that still count as together")
    graph_alpha: float = Field(0.5, gt=0, le=1, description="share of an item's own vector at each hop")
    graph_hops: PositiveInt = 2
    graph_dropout: float = Field(0.3, ge=0, lt=1, description="share of items read by text alone while training")
    load_balance_bound: float = Field(0.2, ge=0, lt=1)
    threads: int = Field(1, ge=1, description=THREADS)
    seed: int = Field(0, ge=0)

    def objectives(self) -> Objectives:
        """The method's row, with what is set here over it."""
        return objectives_of(self.method, self.model_dump())

    def identity(self) -> dict[str, Any]:
        """Also what the method stands for, and the content of the file of SIDs."""
        content = hashlib.sha256(_read_bytes(Path(self.sids))).hexdigest() if self.sids else None
        return {**super().identity(), "objectives": repr(self.objectives()), "sids": content}


class TokenizerSummary(Summary):
    """The SIDs in numbers; lists are by level."""

    method: str
    num_items: int
    num_levels: int
    codebook_size: int
    uniqueness: float  # share of items whose SID no other item has
    identical_listings: int  # items whose vector another item has too: nothing but chance tells them apart
    collision_before_repair: float  # share of items that shared a SID before repair
    num_moved: int  # items whose last code is not their nearest
    mean_move: float  # how much farther their code is, in units of the mean distance to the nearest one
    codes_used: list[int]
    perplexity: list[float]
    bits: list[float]  # entropy of the code given its prefix, weighted by training interactions
    epochs: int  # 0 where nothing is trained
    seconds: float


@dataclass(frozen=True)
class Inputs:
    """What the stage reads of earlier ones."""

    dataset: Dataset
    train: Sequences
    vectors: Vectors  # (N, D) text vectors, memory-mapped
    collaborative: Callable[[], Vectors]  # (N, any width) SASRec's item vectors, asked for only where a method aligns


def run(config: TokenizerConfig, inputs: Inputs, folder: StageFolder) -> TokenizerSummary:
    """Fit, assign, repair; write `quantizer/`, `catalog/` and `report.html`.

    Under `accelerate launch` all processes fit together, and the first one does the rest.
    """
    start = time.monotonic()
    torch.set_num_threads(config.threads)
    processes = Processes.launched()
    popularity = np.bincount(inputs.train.items, minlength=inputs.dataset.num_items)
    fitted = _fit(config, inputs, popularity, folder.path, processes)
    if processes.is_main:
        folder.finish(_tokenize(config, inputs, popularity, fitted, folder.path, start))
    processes.wait_for_all()
    for scratch in (CHECKPOINT, MIXED_VECTORS):
        (folder.path / scratch).unlink(missing_ok=True)
    return TokenizerSummary.model_validate(folder.finished())


def _tokenize(
    config: TokenizerConfig,
    inputs: Inputs,
    popularity: npt.NDArray[np.int64],
    fitted: "Fitted",
    path: Path,
    start: float,
) -> TokenizerSummary:
    quantizer, nearest, space = fitted.quantizer, fitted.codes, fitted.quantizer.space
    _, one_of_each, copies = np.unique(_listings(inputs.vectors), return_index=True, return_counts=True)
    if config.method not in GIVEN:
        _refuse_collapse(space, nearest, one_of_each)
    repair = "none" if config.method in GIVEN else config.objectives().repair
    codes = make_unique(repair, fitted.assigner, fitted.assigned, nearest, config.seed)
    dataset = inputs.dataset
    try:
        catalog = Catalog.build(space, dataset.item_ids, codes, popularity, dataset.titles, dataset.categories)
    except CatalogError as error:
        raise StageError(f"{error}: correct the items file") from error
    quantizer.save(path / "quantizer")
    catalog.save(path / "catalog")
    moved = np.flatnonzero((codes != nearest).any(axis=1))
    summary = TokenizerSummary(
        method=config.method,
        num_items=len(codes),
        num_levels=space.num_levels,
        codebook_size=space.codebook_size,
        uniqueness=_unique_share(space, codes),
        identical_listings=int(copies[copies > 1].sum()),
        collision_before_repair=1.0 - _unique_share(space, nearest),
        num_moved=len(moved),
        mean_move=_mean_move(fitted, nearest, codes, moved),
        codes_used=[len(np.unique(codes[:, level])) for level in range(space.num_levels)],
        perplexity=[_perplexity(codes[:, level]) for level in range(space.num_levels)],
        bits=_conditional_bits(space, codes, popularity),
        epochs=len(fitted.curve),
        seconds=time.monotonic() - start,
    )
    evidence = Evidence(
        summary=summary.model_dump(),
        space=space,
        codes=codes,
        nearest=nearest,
        popularity=popularity,
        titles=dataset.titles,
        categories=dataset.categories,
        centres=quantizer.codebooks[0],
        nearest_titles=titles_nearest_to_centres(fitted.assigner, fitted.assigned, codes, dataset.titles),
        loss_curve=fitted.curve,
    )
    write_report(path / REPORT, evidence)
    return summary


@dataclass(frozen=True)
class Fitted:
    """A quantiser, and the codes that the catalogue's items have by it before repair."""

    quantizer: ResidualQuantizer  # of text vectors: what the bundle carries
    codes: Codes  # (N, L)
    assigner: ResidualQuantizer  # what gave the codes: the same, unless the catalogue's vectors are mixed ones
    assigned: Vectors  # (N, D) what it read
    curve: list[dict[str, float]]


@dataclass(frozen=True)
class TokenizedCatalog:
    """What later stages read: the catalogue, the quantiser, and where each item of the dataset stands."""

    catalog: Catalog
    quantizer: ResidualQuantizer
    rank_of_item: npt.NDArray[np.int32]  # (N,) catalogue rank by item index

    @classmethod
    def load(cls, path: Path, dataset: Dataset) -> "TokenizedCatalog":
        """Read a finished tokenizer stage."""
        quantizer = ResidualQuantizer.load(path / "quantizer")
        catalog = Catalog.load(path / "catalog", quantizer.space)
        ranks, _ = catalog.ranks_of(dataset.item_ids)
        return cls(catalog, quantizer, ranks.astype(np.int32))

    def to_ranks(self, sequences: Sequences) -> Sequences:
        """The same sequences in catalogue ranks."""
        return Sequences(sequences.offsets, self.rank_of_item[sequences.items])


def _fit(
    config: TokenizerConfig, inputs: Inputs, popularity: npt.NDArray[np.int64], folder: Path, processes: Processes
) -> Fitted:
    text = Standardised.of(inputs.vectors)
    if config.method in GIVEN:
        space, codes = _given_sids(config, inputs.dataset)
        quantizer = ResidualQuantizer(text.mean, text.scale, codebooks_of_codes(text, codes, space))
        return Fitted(quantizer, codes, quantizer, inputs.vectors, [])
    space = SidSpace(config.num_levels, config.codebook_size or default_codebook_size(len(text)))
    if config.method == "residual-kmeans":
        with progress_bar(f"tokenizer: {config.method}", 1) as bar:
            sample = text.rows(_sample(len(text), config))
            codebooks = residual_codebooks(
                sample, space, "kmeans++", config.kmeans_restarts, config.threads, config.seed
            )
            bar.advance()
        quantizer = ResidualQuantizer(text.mean, text.scale, codebooks)
        return Fitted(quantizer, quantizer.encode(inputs.vectors), quantizer, inputs.vectors, [])
    return _fit_learned(config, space, text, inputs, popularity, folder, processes)


def _fit_learned(
    config: TokenizerConfig,
    space: SidSpace,
    text: "Standardised",
    inputs: Inputs,
    popularity: npt.NDArray[np.int64],
    folder: Path,
    processes: Processes,
) -> Fitted:
    objectives = config.objectives()
    graph = item_graph(inputs.train, len(text), config.graph_window) if objectives.needs_graph else None
    mixed: Vectors | None = None
    if objectives.graph and graph is not None:
        if processes.is_main:
            propagate(text, graph, alpha=config.graph_alpha, hops=config.graph_hops, path=folder / MIXED_VECTORS)
        processes.wait_for_all()
        mixed = np.load(folder / MIXED_VECTORS, mmap_mode="r")
    signals = ItemSignals(
        text=text,
        mixed=mixed,
        collaborative=_alignment_targets(config, inputs, popularity > 0) if objectives.needs_collaborative else None,
        popularity=popularity,
        partners=Partners(graph) if graph is not None and objectives.cointeraction_weight else None,
    )
    trained = fit(config, objectives, space, signals, folder, processes)
    quantizer = ResidualQuantizer(text.mean, text.scale, trained.codebooks, trained.layers)
    if mixed is None:
        return Fitted(quantizer, quantizer.encode(inputs.vectors), quantizer, inputs.vectors, trained.curve)
    assigner = replace(quantizer, mean=np.zeros_like(text.mean), scale=np.ones_like(text.scale))  # mixed as they are
    return Fitted(quantizer, assigner.encode(mixed), assigner, mixed, trained.curve)


def _alignment_targets(config: TokenizerConfig, inputs: Inputs, is_known: npt.NDArray[np.bool_]) -> Vectors:
    """SASRec's item vectors in the latent's width: the directions that keep most of their dot products, or zeros added.

    The control permutes them among the items that have any.
    """
    vectors = np.asarray(inputs.collaborative(), np.float32)
    width = min(vectors.shape[1], config.latent_width)
    _, directions = np.linalg.eigh(vectors[is_known].T @ vectors[is_known])  # ascending
    targets = np.zeros((len(vectors), config.latent_width), np.float32)
    targets[:, :width] = vectors @ directions[:, -width:]
    if config.objectives().collaborative_permuted:
        known = np.flatnonzero(is_known)
        targets[known] = targets[np.random.default_rng((config.seed, 4)).permutation(known)]
    return targets


def _given_sids(config: TokenizerConfig, dataset: Dataset) -> tuple[SidSpace, Codes]:
    if config.method == "imported":
        if config.sids is None:
            raise StageError("the method imported needs a file of SIDs: set tokenizer.sids=FILE (JSON or Parquet)")
        given = read_sids(Path(config.sids), dataset.item_ids, config.codebook_size)
        return given.space, given.codes
    space = SidSpace(config.num_levels, config.codebook_size or default_codebook_size(dataset.num_items))
    if space.codebook_size**space.num_levels < dataset.num_items:
        raise StageError(f"{dataset.num_items} items do not fit {space}: raise tokenizer.codebook_size or num_levels")
    keys = np.random.default_rng(config.seed).choice(
        space.codebook_size**space.num_levels, dataset.num_items, replace=False
    )
    powers = space.codebook_size ** np.arange(space.num_levels)[::-1]
    return space, (keys[:, None] // powers % space.codebook_size).astype(np.uint16)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StageError(
            f"the file of SIDs {path} cannot be read ({error.strerror}): give tokenizer.sids another"
        ) from error


def _sample(num_items: int, config: TokenizerConfig) -> npt.NDArray[np.int64]:
    if num_items <= config.init_sample:
        return np.arange(num_items)
    return np.sort(np.random.default_rng(config.seed).choice(num_items, config.init_sample, replace=False))


def default_codebook_size(num_items: int) -> int:
    """The power of two next to 1.5 √N, within 8 and 256: two levels then tell most items apart, a third the rest."""
    return int(min(256, max(8, 2 ** round(np.log2(1.5 * np.sqrt(num_items))))))


def _refuse_collapse(space: SidSpace, codes: Codes, one_of_each: npt.NDArray[np.int64]) -> None:
    """`StageError` if a level fails to tell items apart that the levels before it left together.

    `codes` (N, L) are the nearest ones. The first level is judged on all items, a later one on those whose prefix is
    not theirs alone, identical listings counted once (`one_of_each`). The measure is the perplexity of their codes,
    which is how many are in even use: below 2, or below COLLAPSED_SHARE of those they could use, is a collapse. The
    lowest of LETTER's released SIDs is .28.
    """
    together = np.arange(len(codes))
    for level in range(space.num_levels):
        usable = min(space.codebook_size, len(together))
        at_level = codes[together, level]
        perplexity, used = _perplexity(at_level), len(np.unique(at_level))
        least = max(2.0, COLLAPSED_SHARE * usable) if usable >= 8 else 0.0
        if len(together) >= 8 and (used < 2 or perplexity < least):
            raise StageError(
                f"the codebook of level {level} collapsed: {used} of {space.codebook_size} codes used for "
                f"{len(together)} items that it should tell apart, as many as {perplexity:.1f} in even use. "
                "If the items' texts are nearly all the same, give titles, categories or descriptions that tell them "
                "apart; else try another method or seed, a smaller tokenizer.codebook_size, or a lower "
                "tokenizer.learning_rate"
            )
        prefixes = codes[one_of_each, : level + 1]
        _, group, sizes = np.unique(prefixes, axis=0, return_inverse=True, return_counts=True)
        together = one_of_each[sizes[group.reshape(-1)] > 1]


def _unique_share(space: SidSpace, codes: Codes) -> float:
    _, counts = np.unique(sid_keys(space, codes), return_counts=True)
    return float((counts == 1).sum() / len(codes))


def _perplexity(codes: npt.NDArray[np.uint16]) -> float:
    share = np.bincount(codes) / len(codes)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def _conditional_bits(space: SidSpace, codes: Codes, weights: npt.NDArray[np.int64]) -> list[float]:
    """H(code | prefix) in bits by level, items weighted by their interactions (all alike where there are none)."""
    weights = weights if weights.sum() else np.ones_like(weights)
    entropies = [0.0]
    for level in range(1, space.num_levels + 1):
        _, inverse = np.unique(codes[:, :level], axis=0, return_inverse=True)
        share = np.bincount(inverse.reshape(-1), weights) / weights.sum()
        share = share[share > 0]
        entropies.append(float(-(share * np.log2(share)).sum()))
    return [max(0.0, after - before) for before, after in itertools.pairwise(entropies)]


def _listings(vectors: Vectors) -> npt.NDArray[np.int64]:
    """Which listing each item is, (N,): items have the same number exactly if their vectors agree to the bit."""
    digests = (hash(np.ascontiguousarray(vectors[row]).tobytes()) for row in range(len(vectors)))
    _, listing = np.unique(np.fromiter(digests, np.int64, len(vectors)), return_inverse=True)
    return listing


def _mean_move(fitted: Fitted, nearest: Codes, codes: Codes, moved: npt.NDArray[np.int64]) -> float:
    """Mean over the moved items of their added distance, in units of the mean distance to the nearest code."""
    if not len(moved):
        return 0.0
    distances = np.sqrt(last_distances(fitted.assigner, fitted.assigned, nearest, moved))
    to_nearest = distances[np.arange(len(moved)), nearest[moved, -1]]
    to_given = distances[np.arange(len(moved)), codes[moved, -1]]
    return float((to_given - to_nearest).mean() / max(float(to_nearest.mean()), 1e-12))
