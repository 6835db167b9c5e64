"""Stage `tokenizer`: item vectors → SIDs. Fits a quantiser, resolves collisions, and writes the catalogue.

Each method is a function (config, vectors) → `ResidualQuantizer`; what follows (assignment, repair, catalogue, report)
is the same for all. SIDs never follow item-id order: items come in the data stage's shuffled order, and all choices
below depend on vectors and that order alone.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from semantic_ids.catalog import Catalog, CatalogError
from semantic_ids.codes import Codes, SidSpace
from semantic_ids.quantizer import ResidualQuantizer, Vectors, squared_distances
from semantic_ids.trie import sid_keys
from training.interactions import Dataset
from training.sequences import Sequences
from training.stage import THREADS, Bar, StageConfig, StageError, StageFolder, Summary, progress_bar

Method = Literal["residual-kmeans"]


class TokenizerConfig(StageConfig):
    """How SIDs are made."""

    method: Method = "residual-kmeans"
    num_levels: int = Field(3, ge=1, le=8, description="codes in a SID (L)")
    codebook_size: int | None = Field(
        None, ge=2, le=65_536, description="codes per level (K); by catalogue size if absent"
    )
    kmeans_restarts: int = Field(3, ge=1)
    threads: int = Field(1, ge=1, description=THREADS)
    seed: int = Field(0, ge=0)


class TokenizerSummary(Summary):
    """The SIDs in numbers; lists are by level."""

    method: str
    num_items: int
    num_levels: int
    codebook_size: int
    uniqueness: float  # share of items whose SID no other item has
    collision_before_repair: float  # share of items that shared a SID before repair
    num_moved: int  # items whose last code is not their nearest
    codes_used: list[int]
    perplexity: list[float]
    bits: list[float]  # entropy of the code given its prefix, weighted by training interactions
    seconds: float


def run(
    config: TokenizerConfig, dataset: Dataset, train: Sequences, vectors: Vectors, folder: StageFolder
) -> TokenizerSummary:
    """Fit, assign, repair; write `quantizer/` and `catalog/`."""
    start = time.monotonic()
    space = SidSpace(config.num_levels, config.codebook_size or default_codebook_size(len(vectors)))
    with progress_bar(f"tokenizer: {config.method}", space.num_levels + 1) as bar:
        quantizer = _METHODS[config.method](config, space, np.asarray(vectors, np.float32), bar)
        nearest = quantizer.encode(np.asarray(vectors, np.float32))
        codes = resolve_collisions(quantizer, np.asarray(vectors, np.float32), nearest)
        bar.advance()
    _refuse_collapse(space, codes)
    popularity = np.bincount(train.items, minlength=dataset.num_items)
    try:
        catalog = Catalog.build(space, dataset.item_ids, codes, popularity, dataset.titles, dataset.categories)
    except CatalogError as error:
        raise StageError(f"{error}: correct the items file") from error
    quantizer.save(folder.path / "quantizer")
    catalog.save(folder.path / "catalog")
    summary = TokenizerSummary(
        method=config.method,
        num_items=len(codes),
        num_levels=space.num_levels,
        codebook_size=space.codebook_size,
        uniqueness=_unique_share(space, codes),
        collision_before_repair=1.0 - _unique_share(space, nearest),
        num_moved=int((codes != nearest).any(axis=1).sum()),
        codes_used=[len(np.unique(codes[:, level])) for level in range(space.num_levels)],
        perplexity=[_perplexity(codes[:, level]) for level in range(space.num_levels)],
        bits=_conditional_bits(space, codes, popularity),
        seconds=time.monotonic() - start,
    )
    folder.finish(summary)
    return summary


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


def default_codebook_size(num_items: int) -> int:
    """The power of two next to 1.5 √N, within 8 and 256: two levels then tell most items apart, a third the rest."""
    return int(min(256, max(8, 2 ** round(np.log2(1.5 * np.sqrt(num_items))))))


def fit_residual_kmeans(config: TokenizerConfig, space: SidSpace, vectors: Vectors, bar: Bar) -> ResidualQuantizer:
    """k-means on the standardised vectors, then on what each level leaves over."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    mean, scale = vectors.mean(axis=0), np.maximum(vectors.std(axis=0), 1e-6)
    residual = (vectors - mean) / scale
    codebooks = np.empty((space.num_levels, space.codebook_size, vectors.shape[1]), np.float32)
    for level in range(space.num_levels):
        distinct = len(np.unique(residual.round(5), axis=0))
        num_clusters = min(space.codebook_size, distinct)
        kmeans = KMeans(num_clusters, n_init=config.kmeans_restarts, random_state=config.seed + level)
        with threadpool_limits(config.threads):
            nearest = kmeans.fit_predict(residual)
        codebooks[level, :num_clusters] = kmeans.cluster_centers_
        if num_clusters < space.codebook_size:  # fewer distinct residuals than codes: the rest repeat a code, unused
            codebooks[level, num_clusters:] = kmeans.cluster_centers_[0]
        residual = residual - codebooks[level][nearest]
        bar.advance()
    return ResidualQuantizer(mean.astype(np.float32), scale.astype(np.float32), codebooks)


_METHODS: dict[Method, Callable[[TokenizerConfig, SidSpace, Vectors, Bar], ResidualQuantizer]] = {
    "residual-kmeans": fit_residual_kmeans,
}


def resolve_collisions(quantizer: ResidualQuantizer, vectors: Vectors, codes: Codes) -> Codes:
    """Give the items under each crowded prefix distinct last codes at the least total distance (Hungarian, exact).

    Only items under a prefix with a collision can move, and only in their last code. A prefix that holds more than K
    items keeps some shared SIDs: they stay reachable, and the summary counts them.
    """
    space = quantizer.space
    repaired = codes.copy()
    residual = quantizer.standardise(vectors)
    for level in range(space.num_levels - 1):
        residual = residual - quantizer.codebooks[level][codes[:, level]]
    keys = sid_keys(space, codes)
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    prefixes = codes[:, :-1] if space.num_levels > 1 else np.zeros((len(codes), 1), np.uint16)
    _, group = np.unique(prefixes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    members_of = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    for prefix in np.unique(group[counts[inverse] > 1]):
        members = members_of[prefix]
        distances = squared_distances(residual[members], quantizer.codebooks[-1])
        # More items than codes: every code is taken once before any is taken twice, and so on. All rounds but the last
        # are so much cheaper that they fill up whatever the distances.
        rounds = -(-len(members) // space.codebook_size)
        costs = np.tile(distances.astype(np.float64), (1, rounds))
        costs[:, : -space.codebook_size] -= len(members) * (np.abs(distances).max() + 1.0)
        rows, columns = linear_sum_assignment(costs)
        repaired[members[rows], -1] = columns % space.codebook_size
    return repaired


def _refuse_collapse(space: SidSpace, codes: Codes) -> None:
    used = len(np.unique(codes[:, 0]))
    if len(codes) >= 8 and used < 2:
        raise StageError(
            f"the codebook of level 0 collapsed: {used} of {space.codebook_size} codes used for {len(codes)} items. "
            "The items' texts are nearly all the same: give titles, categories or descriptions that tell them apart"
        )


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
