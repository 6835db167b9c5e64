"""Stage `evaluate`: full-catalogue ranking at item level, with the beam that serves and the baselines beside it.

Every user's list comes from the trie-constrained beam over the whole catalogue, once with the user's history left out
and once with nothing left out, from one prefill. Baselines rank the same targets in the same run. What each user got
is written beside the means, so that runs can be compared user by user (`training.comparison`), and the same ranks give
the means of slices of the users. docs/evaluation.md says what each row is for.
"""

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from pydantic import Field, PositiveInt

from semantic_ids.catalog import Catalog
from semantic_ids.decoding.beam import ScoredItems, constrained_beam
from semantic_ids.filters import ItemFilter
from semantic_ids.prompt import History, window_start
from training.collaborative import (
    COOCCURRENCE_FILE,
    POPULARITY_FILE,
    SASREC_FILE,
    EvaluationInput,
    ItemKnn,
    Popularity,
    SasRec,
    Scorer,
    evaluate_scorer,
    load_item_knn,
    load_popularity,
    load_sasrec,
)
from training.generator import TrainedModel
from training.interactions import SplitName
from training.metrics import (
    NO_ITEM,
    RankingMetrics,
    bootstrap_mean,
    chance_prefix_recall,
    coverage,
    gini,
    metrics_of_ranks,
    paired_bootstrap,
    prefix_recall,
    rank_of_a_miss,
)
from training.sequences import Sequences
from training.stage import THREADS, StageConfig, StageError, StageFolder, Summary, progress_bar, write_atomically
from training.text_similarity import TextSimilarity
from training.tokenizer.stage import TokenizedCatalog

LIST_LENGTH = 50  # the longest cut-off of the metrics
USERS_FILE = "users.parquet"

HISTORY_SLICES = {"history_1_to_4": (1, 4), "history_5_to_9": (5, 9), "history_10_or_more": (10, None)}
"""By how many events of a user were known; four is the least that a test history of Amazon's 5-core data has."""
DESCENDING_IDS = "target_id_below_previous"
"""Users whose target's id sorts below that of the item before it.

Where events of one day stand in the order of their ids, as in the Amazon data of 2014, "the next higher id" is a guess
that pays without knowing any taste: these users are free of it.
"""


class EvaluatedSplit(EvaluationInput, Protocol):
    """A split that says which user each of its rows is."""

    @property
    def users(self) -> npt.NDArray[np.int64]:
        """The dataset's index of each evaluated user, (users,)."""


class EvaluationConfig(StageConfig):
    """What is ranked, and how wide."""

    split: SplitName = Field(
        "test", description="choose on validation, report test once; cold: targets that data.cold_share held out"
    )
    width: PositiveInt = Field(50, description="beam width; at least 50 is used, as the metrics reach to 50")
    batch_size: PositiveInt = 32
    bootstrap_samples: PositiveInt = 2000
    threads: PositiveInt = Field(1, description=THREADS)
    seed: int = Field(0, ge=0)

    @property
    def beam_width(self) -> int:
        """The width in use: the lists must reach the longest cut-off."""
        return max(self.width, LIST_LENGTH)


class RankingRow(Summary):
    """One ranker's metrics, means over users."""

    recall_5: float = Field(alias="recall@5")
    ndcg_5: float = Field(alias="ndcg@5")
    recall_10: float = Field(alias="recall@10")
    ndcg_10: float = Field(alias="ndcg@10")
    recall_50: float = Field(alias="recall@50")
    ndcg_50: float = Field(alias="ndcg@50")


class Difference(Summary):
    """Model less baseline, with its paired 95 % bootstrap interval over users."""

    difference: float
    low: float
    high: float


class Slice(Summary):
    """The rows of some of the users, history masked."""

    num_users: int
    model: RankingRow
    baselines: dict[str, RankingRow]


class EvaluationSummary(RankingRow):
    """The model's row (history masked), then everything beside it."""

    split: str
    num_users: int
    num_items: int
    width: int
    recall_10_interval: tuple[float, float] = Field(alias="recall@10_interval")
    sid_recall_10: float = Field(alias="sid_recall@10")  # the target's SID among the first ten, whatever its items
    target_log_likelihood: float  # nats per target over the legal codes
    unmasked: RankingRow  # nothing left out of the ranking
    baselines: dict[str, RankingRow]
    difference_recall_10: dict[str, Difference] = Field(alias="difference_recall@10")
    difference_ndcg_10: dict[str, Difference] = Field(alias="difference_ndcg@10")
    slices: dict[str, Slice] = Field({})  # those that have a user
    # Share of users with the target's first 1, 2, … L codes among their first ten and fifty: model, baselines, chance.
    prefix_recall_10: dict[str, list[float]] = Field({}, alias="prefix_recall@10")
    prefix_recall_50: dict[str, list[float]] = Field({}, alias="prefix_recall@50")
    coverage_10: float = Field(alias="coverage@10")  # share of the catalogue in some first ten
    gini_10: float = Field(alias="gini@10")  # 0: all items equally often
    ms_per_user: float
    seconds: float


@dataclass(frozen=True)
class Baselines:
    """What the model is compared with, from the collaborative stage; `text` for cold items, which that cannot know."""

    popularity: Popularity
    item_knn: ItemKnn
    sasrec: SasRec
    text: TextSimilarity | None = None

    @classmethod
    def load(cls, path: Path) -> "Baselines":
        """Read a finished collaborative stage."""
        return cls(
            load_popularity(path / POPULARITY_FILE),
            load_item_knn(path / COOCCURRENCE_FILE),
            load_sasrec(path / SASREC_FILE),
        )

    def by_name(self) -> dict[str, Scorer]:
        """The names under which summaries list them."""
        names: dict[str, Scorer] = {"popularity": self.popularity, "item_knn": self.item_knn, "sasrec": self.sasrec}
        return names if self.text is None else names | {"text": self.text}


def run(
    config: EvaluationConfig,
    ranker: "GenerativeRanker",
    baselines: Baselines,
    split: EvaluatedSplit,
    tokenized: TokenizedCatalog,
    folder: StageFolder,
) -> EvaluationSummary:
    """Rank every user of the split with the model and with each baseline; write `users.parquet`."""
    torch.set_num_threads(config.threads)
    if len(split.targets) == 0:
        needs = "data.cold_share above 0" if config.split == "cold" else "users with at least three events"
        raise StageError(f"the {config.split} split has no user: leave-one-out needs {needs}")
    start = time.monotonic()
    histories, targets = tokenized.to_ranks(split.histories), tokenized.rank_of_item[split.targets]
    lists = ranker.rank_all(histories, targets, config)
    seconds = time.monotonic() - start
    save_users(
        folder.path,
        UserResults(split.users, split.targets, lists.target_log_likelihood, lists.masked_ranks, lists.unmasked_ranks),
    )
    masked = metrics_of_ranks(lists.masked_ranks)
    rows: dict[str, RankingMetrics] = {}
    listed = {"model": lists.first_fifty}
    scorers = baselines.by_name()
    with progress_bar("evaluate: baselines", len(scorers)) as bar:
        for name, scorer in scorers.items():
            evaluated = evaluate_scorer(
                scorer,
                split.histories,
                split.targets,
                masked=True,
                seed=config.seed,
                num_recommended=LIST_LENGTH,
            )
            rows[name], items = evaluated.metrics, evaluated.recommended
            listed[name] = np.where(items == NO_ITEM, NO_ITEM, tokenized.rank_of_item[items])
            bar.advance()
    interval = bootstrap_mean(masked.recall[10], samples=config.bootstrap_samples, seed=config.seed)
    summary = EvaluationSummary(
        **masked.means(),
        split=config.split,
        num_users=len(targets),
        num_items=len(tokenized.catalog),
        width=config.beam_width,
        recall_10_interval=(interval.low, interval.high),
        sid_recall_10=float(lists.sid_hits_10.mean()),
        target_log_likelihood=float(lists.target_log_likelihood.mean()),
        unmasked=RankingRow(**metrics_of_ranks(lists.unmasked_ranks).means()),
        baselines={name: RankingRow(**row.means()) for name, row in rows.items()},
        difference_recall_10={
            name: _difference(masked.recall[10], row.recall[10], config) for name, row in rows.items()
        },
        difference_ndcg_10={name: _difference(masked.ndcg[10], row.ndcg[10], config) for name, row in rows.items()},
        slices={
            name: _slice(is_in, masked, rows)
            for name, is_in in slices_of(histories, targets, tokenized.catalog).items()
        },
        prefix_recall_10=_prefix_recalls(listed, 10, targets, tokenized.catalog),
        prefix_recall_50=_prefix_recalls(listed, LIST_LENGTH, targets, tokenized.catalog),
        coverage_10=coverage(lists.first_ten, len(tokenized.catalog)),
        # Where everybody has seen everything, no item is recommended at all, and all equally often.
        gini_10=gini(lists.first_ten, len(tokenized.catalog)) if (lists.first_ten >= 0).any() else 0.0,
        ms_per_user=1000 * seconds / len(targets),
        seconds=time.monotonic() - start,
    )
    folder.finish(summary)
    return summary


def slices_of(
    histories: Sequences, targets: npt.NDArray[np.int32], catalog: Catalog
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which users (U,) are in each slice that has any; a user is in one of the lengths' and perhaps in the ids'.

    Histories and targets are catalogue ranks.
    """
    lengths = histories.lengths
    slices = {
        name: (lengths >= least) & (lengths <= (most or lengths)) for name, (least, most) in HISTORY_SLICES.items()
    }
    place_of_id = np.empty(len(catalog), np.int64)
    place_of_id[pl.Series(list(catalog.item_ids)).arg_sort().to_numpy()] = np.arange(len(catalog))
    has_history = lengths > 0
    previous = histories.items[histories.offsets[1:][has_history] - 1]
    is_below = np.zeros(len(targets), np.bool_)
    is_below[has_history] = place_of_id[targets[has_history]] < place_of_id[previous]
    slices[DESCENDING_IDS] = is_below
    return {name: is_in for name, is_in in slices.items() if is_in.any()}


def _slice(is_in: npt.NDArray[np.bool_], model: RankingMetrics, baselines: dict[str, RankingMetrics]) -> Slice:
    return Slice(
        num_users=int(is_in.sum()),
        model=RankingRow(**model.select(is_in).means()),
        baselines={name: RankingRow(**row.select(is_in).means()) for name, row in baselines.items()},
    )


def _prefix_recalls(
    listed: dict[str, npt.NDArray[np.int32]], length: int, targets: npt.NDArray[np.int32], catalog: Catalog
) -> dict[str, list[float]]:
    paths = catalog.trie.path_of_rank(np.arange(len(catalog)))
    recalls = {name: prefix_recall(paths, lists[:, :length], targets) for name, lists in listed.items()}
    return recalls | {"chance": chance_prefix_recall(paths, length, targets)}


@dataclass(frozen=True)
class UserResults:
    """What `users.parquet` holds: a row per evaluated user. A miss has the rank `rank_of_a_miss`, beyond every cut-off.

    Users and targets are the dataset's indices: the same in every run on one finished data stage, whatever its SIDs.
    """

    users: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int32]
    target_log_likelihood: npt.NDArray[np.float64]
    masked_ranks: npt.NDArray[np.int64]  # the user's history left out of the ranking
    unmasked_ranks: npt.NDArray[np.int64]


def save_users(path: Path, results: UserResults) -> None:
    """Write `users.parquet` into the evaluate stage's folder, whole or not at all."""
    columns = {
        "user": results.users,
        "target": results.targets,
        "target_log_likelihood": results.target_log_likelihood,
        "masked_rank": results.masked_ranks,
        "unmasked_rank": results.unmasked_ranks,
    }
    content = io.BytesIO()
    pl.DataFrame(columns).write_parquet(content)
    write_atomically(path / USERS_FILE, content.getvalue())


def load_users(path: Path) -> UserResults:
    """Read `users.parquet` of a finished evaluate stage's folder."""
    try:
        frame = pl.read_parquet(path / USERS_FILE)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StageError(
            f"{path / USERS_FILE} cannot be read ({error}): remove {path} and run `sidrec-train evaluate` again"
        ) from error
    return UserResults(
        users=frame["user"].to_numpy(),
        targets=frame["target"].to_numpy(),
        target_log_likelihood=frame["target_log_likelihood"].to_numpy(),
        masked_ranks=frame["masked_rank"].to_numpy(),
        unmasked_ranks=frame["unmasked_rank"].to_numpy(),
    )


@dataclass(frozen=True)
class RankedLists:
    """Per user of a split; a miss has `rank_of_a_miss`."""

    masked_ranks: npt.NDArray[np.int64]
    unmasked_ranks: npt.NDArray[np.int64]
    sid_hits_10: npt.NDArray[np.bool_]
    target_log_likelihood: npt.NDArray[np.float64]
    first_fifty: npt.NDArray[np.int32]  # (users, 50) catalogue ranks, history masked; NO_ITEM where there are fewer

    @property
    def first_ten(self) -> npt.NDArray[np.int32]:
        """The beginning of the same lists, (users, 10)."""
        return self.first_fifty[:, :10]


class GenerativeRanker:
    """A trained model with its catalogue and prompts, ranking whole splits."""

    def __init__(self, trained: TrainedModel, catalog: Catalog) -> None:
        self.decoder = trained.load_decoder()
        self.renderer = trained.renderer
        self.catalog = catalog

    def rank_all(self, histories: Sequences, targets: npt.NDArray[np.int32], config: EvaluationConfig) -> RankedLists:
        """Beams for every user; batches hold histories of like length."""
        num_users, missing = len(targets), rank_of_a_miss(len(self.catalog))
        masked_ranks, unmasked_ranks = np.full(num_users, missing), np.full(num_users, missing)
        sid_hits, likelihood = np.zeros(num_users, np.bool_), np.zeros(num_users)
        first_fifty = np.full((num_users, LIST_LENGTH), NO_ITEM, np.int32)
        order = np.argsort(histories.lengths, kind="stable")
        width = config.beam_width
        with progress_bar("evaluate: beams", num_users) as bar:
            for start in range(0, num_users, config.batch_size):
                users = order[start : start + config.batch_size]
                batch = [histories[user] for user in users]
                for user, lists in zip(users, self._rank(batch, targets[users], width), strict=True):
                    masked, unmasked, score = lists
                    target = targets[user]
                    masked_ranks[user] = _place(masked.ranks, target, missing)
                    unmasked_ranks[user] = _place(unmasked.ranks, target, missing)
                    top = masked.ranks[:LIST_LENGTH]
                    first_fifty[user, : len(top)] = top
                    sid_hits[user] = (self.catalog.codes[top[:10]] == self.catalog.codes[target]).all(axis=1).any()
                    likelihood[user] = score
                bar.advance(len(users))
        return RankedLists(masked_ranks, unmasked_ranks, sid_hits, likelihood, first_fifty)

    def _rank(
        self, histories: list[npt.NDArray[np.int32]], targets: npt.NDArray[np.int32], width: int
    ) -> list[tuple[ScoredItems, ScoredItems, float]]:
        """Per user: the list without the history, the list without any filter, and the target's score."""
        num_items, trie, widths = len(self.catalog), self.catalog.trie, [width] * len(histories)
        forced = self.renderer.forced
        state = self.decoder.prefill([self.prompt(history) for history in histories])
        everything = [ItemFilter.of(num_items)] * len(histories)
        unseen = [ItemFilter.of(num_items, deny=history.astype(np.int64)) for history in histories]
        # Someone who has seen everything can be recommended nothing; the empty list is a miss.
        can_rank = [item_filter.num_eligible > 0 for item_filter in unseen]
        safe = [item_filter if ok else everything[0] for item_filter, ok in zip(unseen, can_rank, strict=True)]
        masked = constrained_beam(self.decoder, trie, state, safe, widths, forced=forced)
        unmasked = constrained_beam(self.decoder, trie, state, everything, widths, forced=forced)
        only_target = [ItemFilter.of(num_items, allow=np.array([target])) for target in targets.astype(np.int64)]
        target = constrained_beam(self.decoder, trie, state, only_target, [1] * len(histories), forced=forced)
        nothing = ScoredItems(np.empty(0, np.int64), np.empty(0, np.float32))
        return [
            (masked[user] if can_rank[user] else nothing, unmasked[user], float(target[user].scores[0]))
            for user in range(len(histories))
        ]

    def prompt(self, history: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """The prompt that serving would send for this history (catalogue ranks, oldest first)."""
        start = window_start(len(history), self.renderer.spec.max_history)
        shown = History.of(self.catalog, history[start:], shows_titles=self.renderer.shows_titles)
        return self.renderer.render(shown).token_ids


def _place(ranks: npt.NDArray[np.int64], target: int, missing: int) -> int:
    found = np.flatnonzero(ranks == target)
    return int(found[0]) if len(found) else missing


def _difference(
    model: npt.NDArray[np.float64], baseline: npt.NDArray[np.float64], config: EvaluationConfig
) -> Difference:
    interval = paired_bootstrap(model, baseline, samples=config.bootstrap_samples, seed=config.seed)
    return Difference(difference=interval.difference, low=interval.low, high=interval.high)
