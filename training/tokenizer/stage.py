"""Stage `tokenizer`: item vectors → SIDs, top to bottom.

`run` fits a quantiser (or takes SIDs from elsewhere), assigns the nearest codes, makes them unique, and writes the
quantiser, the catalogue and a report. SIDs never follow item-id order: items come in the data stage's shuffled order,
and all choices below depend on vectors and that order alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from semantic_ids.catalog import Catalog, CatalogError
from semantic_ids.codes import Codes, SidError, SidSpace
from semantic_ids.quantizer import ResidualQuantizer, Vectors
from semantic_ids.trie import SidTrie
from training.interactions import Dataset
from training.processes import Processes
from training.sequences import Sequences
from training.stage import StageError, StageFolder, Summary, progress_bar
from training.tokenizer.assignment import make_unique
from training.tokenizer.clustered import clustered_codes
from training.tokenizer.config import TokenizerConfig
from training.tokenizer.cooccurrence import Partners, item_graph, propagate
from training.tokenizer.kmeans import codebooks_of_codes, residual_codebooks
from training.tokenizer.methods import Method
from training.tokenizer.quality import (
    conditional_bits,
    listings_of,
    mean_move,
    perplexity_of,
    refuse_collapse,
    unique_share,
)
from training.tokenizer.rqvae import CHECKPOINT, ItemSignals, fit
from training.tokenizer.sid_files import read_sids
from training.tokenizer.standardised import Standardised

GIVEN: tuple[Method, ...] = ("clustered", "random", "imported")
"""Methods whose SIDs no quantiser gives: one is fitted to them, for new items, and nothing is repaired."""

MIXED_VECTORS = "mixed_vectors.npy"
REPORT = "report.html"


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
    has_converged: bool  # training ended by itself
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
    try:
        fitted = _fit(config, inputs, popularity, folder.path, processes)
    except SidError as error:  # numbers that are none, or beyond float32
        raise StageError(f"the item vectors cannot be quantised: {error}") from error
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
    _, one_of_each, copies = np.unique(listings_of(inputs.vectors), return_index=True, return_counts=True)
    if config.method not in GIVEN:
        refuse_collapse(space, nearest, one_of_each)
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
        uniqueness=unique_share(space, codes),
        identical_listings=int(copies[copies > 1].sum()),
        collision_before_repair=1.0 - unique_share(space, nearest),
        num_moved=len(moved),
        mean_move=mean_move(fitted.assigner, fitted.assigned, nearest, codes, moved),
        codes_used=[len(np.unique(codes[:, level])) for level in range(space.num_levels)],
        perplexity=[perplexity_of(codes[:, level]) for level in range(space.num_levels)],
        bits=conditional_bits(space, codes, popularity),
        epochs=len(fitted.curve),
        has_converged=fitted.has_converged,
        seconds=time.monotonic() - start,
    )
    from training.tokenizer.report import Evidence, titles_nearest_to_centres, write_report  # Plotly: only when needed

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
    curve: Sequence[dict[str, float]] = ()
    has_converged: bool = True


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

    def catalog_without(self, items: npt.NDArray[np.int64]) -> Catalog:
        """The catalogue with the same ranks and columns, whose trie has no SID that only these items have.

        For training, which then neither offers nor denies them. In this trie a rank that is left out stands under the
        leaf before it (the first one's, where there is none): it may be no target.
        """
        if not len(items):
            return self.catalog
        kept = np.delete(np.arange(len(self.catalog)), self.rank_of_item[items])
        trie = SidTrie.from_sorted(self.catalog.space, self.catalog.codes[kept])
        leaf_rank = np.append(kept, len(self.catalog))[trie.leaf_rank]
        leaf_rank[0] = 0
        return replace(self.catalog, trie=replace(trie, leaf_rank=leaf_rank.astype(np.uint32)))


def _fit(
    config: TokenizerConfig, inputs: Inputs, popularity: npt.NDArray[np.int64], folder: Path, processes: Processes
) -> Fitted:
    text = Standardised.of(inputs.vectors)
    if config.method in GIVEN:
        space, codes = _given_sids(config, inputs, popularity)
        quantizer = ResidualQuantizer(text.mean, text.scale, codebooks_of_codes(text, codes, space))
        return Fitted(quantizer, codes, quantizer, inputs.vectors)
    space = SidSpace(config.levels, config.codebook_size or default_codebook_size(len(text)))
    if config.method == "residual-kmeans":
        with progress_bar(f"tokenizer: {config.method}", 1) as bar:
            sample = text.rows(_sample(len(text), config))
            codebooks = residual_codebooks(
                sample, space, "kmeans++", config.kmeans_restarts, config.threads, config.seed
            )
            bar.advance()
        quantizer = ResidualQuantizer(text.mean, text.scale, codebooks)
        return Fitted(quantizer, quantizer.encode(inputs.vectors), quantizer, inputs.vectors)
    return _fit_learned(config, space, text, inputs, popularity, folder, processes)


def _fit_learned(
    config: TokenizerConfig,
    space: SidSpace,
    text: Standardised,
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
    assigner, assigned = quantizer, inputs.vectors
    if mixed is not None:  # they are standardised already
        assigner = replace(quantizer, mean=np.zeros_like(text.mean), scale=np.ones_like(text.scale))
        assigned = mixed
    codes = assigner.encode(assigned)
    return Fitted(quantizer, codes, assigner, assigned, trained.curve, trained.has_converged)


def _collaborative(config: TokenizerConfig, inputs: Inputs, is_known: npt.NDArray[np.bool_]) -> Vectors:
    """SASRec's item vectors (N, any width); the control permutes them among the items that have any."""
    vectors = np.array(inputs.collaborative(), np.float32)
    if config.objectives().collaborative_permuted:
        known = np.flatnonzero(is_known)
        vectors[known] = vectors[np.random.default_rng((config.seed, 4)).permutation(known)]
    return vectors


def _alignment_targets(config: TokenizerConfig, inputs: Inputs, is_known: npt.NDArray[np.bool_]) -> Vectors:
    """The same in the latent's width: the directions that keep most of their dot products, or zeros added."""
    vectors = _collaborative(config, inputs, is_known)
    width = min(vectors.shape[1], config.latent_width)
    _, directions = np.linalg.eigh(vectors[is_known].T @ vectors[is_known])  # ascending
    targets = np.zeros((len(vectors), config.latent_width), np.float32)
    targets[:, :width] = vectors @ directions[:, -width:]
    return targets


def _given_sids(config: TokenizerConfig, inputs: Inputs, popularity: npt.NDArray[np.int64]) -> tuple[SidSpace, Codes]:
    dataset = inputs.dataset
    if config.method == "clustered":
        objectives, is_known = config.objectives(), popularity > 0
        learnt = _collaborative(config, inputs, is_known) if objectives.needs_collaborative else None
        if learnt is not None:
            learnt[~is_known] = 0  # what nobody touched has no vector, only a starting value
        with progress_bar(f"tokenizer: {config.method}", 1) as bar:
            space, codes = clustered_codes(
                inputs.vectors, learnt, objectives.collaborative_weight, config.threads, config.seed
            )
            bar.advance()
        return space, codes
    if config.method == "imported":
        if config.sids is None:
            raise StageError("the method imported needs a file of SIDs: set tokenizer.sids=FILE (JSON or Parquet)")
        given = read_sids(Path(config.sids), dataset.item_ids, config.codebook_size)
        return given.space, given.codes
    space = SidSpace(config.levels, config.codebook_size or default_codebook_size(dataset.num_items))
    if space.codebook_size**space.num_levels < dataset.num_items:
        raise StageError(f"{dataset.num_items} items do not fit {space}: raise tokenizer.codebook_size or num_levels")
    keys = np.random.default_rng(config.seed).choice(
        space.codebook_size**space.num_levels, dataset.num_items, replace=False
    )
    powers = space.codebook_size ** np.arange(space.num_levels)[::-1]
    return space, (keys[:, None] // powers % space.codebook_size).astype(np.uint16)


def _sample(num_items: int, config: TokenizerConfig) -> npt.NDArray[np.int64]:
    if num_items <= config.init_sample:
        return np.arange(num_items)
    return np.sort(np.random.default_rng(config.seed).choice(num_items, config.init_sample, replace=False))


def default_codebook_size(num_items: int) -> int:
    """The power of two next to 1.5 √N, within 8 and 256: two levels then tell most items apart, a third the rest."""
    return int(min(256, max(8, 2 ** round(np.log2(1.5 * np.sqrt(num_items))))))
