"""Paired comparison of finished runs: which model gives the held-out items more likelihood, and is it more than luck?

Reads what the evaluate stages wrote, user by user; trains and ranks nothing. One to three seeds show differences of
Recall@10 only from .005 to .0035, more than most methods claim, so the primary endpoint is the mean log-likelihood of
the target item; Recall@10 and NDCG@10 (history left out) stand beside it, without a test of their own.

How it is computed, for S runs (seeds) of every row on the same U users:

1. The difference of a row to the reference, per user and seed: its i-th run less the reference's i-th run, (U, S).
2. 10,000 times: U users are drawn with replacement and, independently, S of the pairs of runs with replacement; the
   sample is the mean over both. Every row and metric sees the same draws (`metrics.bootstrap_over_seeds`).
3. The 95 % interval is between the samples' 2.5 % and 97.5 % quantiles. The two-sided p-value of the primary endpoint
   is twice the smaller share of samples on one side of 0, no less than 2 / 10,001.
4. Holm's correction of these p-values over all rows but the reference.

With S = 1 only users are drawn, and the answer is about these two trained models, not about their methods. With S = 2
or 3 the seeds' part of the interval is 0.71 or 0.82 of its true width, as resampling so few understates their spread.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from training.evaluation import Difference, UserResults, load_users
from training.metrics import MeanTest, bootstrap_over_seeds, holm, metrics_of_ranks
from training.stage import STAGE_FILE, StageError, Summary

SAMPLES = 10_000


class Estimate(Summary):
    """A row's own mean over users and seeds, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class ComparedRow(Summary):
    """One method: what its runs reach, and by how much that is more than the reference (absent for the reference)."""

    name: str
    runs: list[str]
    target_log_likelihood: Estimate  # nats per target over the legal codes
    recall_10: Estimate = Field(alias="recall@10")
    ndcg_10: Estimate = Field(alias="ndcg@10")
    difference_target_log_likelihood: Difference | None
    difference_recall_10: Difference | None = Field(alias="difference_recall@10")
    difference_ndcg_10: Difference | None = Field(alias="difference_ndcg@10")
    p_value: float | None  # of the log-likelihood's difference, two-sided
    p_holm: float | None  # the same, corrected for the number of rows


class Comparison(Summary):
    """All rows, the reference first."""

    reference: str
    split: str
    num_users: int
    num_seeds: int
    samples: int
    rows: list[ComparedRow]


@dataclass(frozen=True)
class RowOfRuns:
    """A name and its finished run folders, one per seed."""

    name: str
    runs: tuple[Path, ...]


def parse_row(text: str) -> RowOfRuns:
    """`RUN` (named after its folder) or `NAME=RUN,RUN,…`, a run per seed."""
    name, separator, runs = text.partition("=")
    if not separator:
        return RowOfRuns(Path(text).resolve().name, (Path(text),))
    paths = tuple(Path(run) for run in runs.split(",") if run)
    if not name or not paths:
        raise StageError(f"{text!r} is not a row: write RUN, or NAME=RUN,RUN with one run folder per seed")
    return RowOfRuns(name, paths)


def compare(rows: list[RowOfRuns], *, samples: int = SAMPLES, seed: int = 0) -> Comparison:
    """Every row against the first, paired by user and by the order of the runs; as the head of this file says.

    Runs that are unfinished, of other data, of another split, or not as many as the reference has, are a `StageError`.
    """
    _refuse_unpaired(rows)
    runs = [[_FinishedRun.read(path) for path in row.runs] for row in rows]
    first = runs[0][0]
    for row, row_runs in zip(rows, runs, strict=True):
        for run in row_runs:
            run.refuse_other_users(first)
        _refuse_repeated_training(row, row_runs)
    values = np.stack([_values(row_runs) for row_runs in runs], axis=2)  # (U, S, rows, metrics)
    own = _tests(values, samples, seed)
    less = _tests(values[:, :, 1:] - values[:, :, :1], samples, seed)
    corrected = holm([tests[0].p_value for tests in less])
    compared = [_row(rows[0], own[0], None, None)]
    compared += [_row(*columns) for columns in zip(rows[1:], own[1:], less, corrected.tolist(), strict=True)]
    return Comparison(
        reference=rows[0].name,
        split=first.split,
        num_users=len(first.results.users),
        num_seeds=len(rows[0].runs),
        samples=samples,
        rows=compared,
    )


@dataclass(frozen=True)
class _FinishedRun:
    path: Path
    data: str  # fingerprint of the data stage
    training: str  # fingerprint of the sft stage
    split: str
    results: UserResults

    @classmethod
    def read(cls, path: Path) -> "_FinishedRun":
        data, training, evaluated = (_stage_record(path, stage) for stage in ("data", "sft", "evaluate"))
        return cls(
            path,
            data["fingerprint"],
            training["fingerprint"],
            evaluated["config"]["split"],
            load_users(path / "evaluate"),
        )

    def refuse_other_users(self, first: "_FinishedRun") -> None:
        """Two runs are paired by user only if both are on the same data, split and targets."""
        for what, own, other in (("data stage", self.data, first.data), ("split", self.split, first.split)):
            if own != other:
                raise StageError(
                    f"{self.path} and {first.path} cannot be paired: their {what} differs ({own} and {other}); "
                    "compare runs on the same data folder, data settings and evaluate.split"
                )
        mine, others = self.results, first.results
        if not (np.array_equal(mine.users, others.users) and np.array_equal(mine.targets, others.targets)):
            raise StageError(
                f"{self.path} and {first.path} cannot be paired: {len(mine.users)} and {len(others.users)} users, not "
                f"the same ones with the same targets; remove {self.path / 'evaluate'} and evaluate again"
            )


def _stage_record(run: Path, stage: str) -> dict[str, Any]:
    path = run / stage / STAGE_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(
            f"{run} has no finished stage {stage} ({error}): run `sidrec-train evaluate --out {run} --data …` first"
        ) from error
    return record


def _refuse_unpaired(rows: list[RowOfRuns]) -> None:
    if len(rows) < 2:
        raise StageError(f"{len(rows)} row given: a comparison needs a reference and at least one other")
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise StageError(f"rows need distinct names, got {', '.join(names)}: write NAME=RUN")
    if len({len(row.runs) for row in rows}) > 1:
        counts = ", ".join(f"{row.name} {len(row.runs)}" for row in rows)
        raise StageError(f"runs are paired one to one, but the rows have different numbers of runs ({counts})")


def _refuse_repeated_training(row: RowOfRuns, runs: list[_FinishedRun]) -> None:
    if len({run.training for run in runs}) < len(runs):
        paths = ", ".join(str(path) for path in row.runs)
        raise StageError(f"row {row.name} names one training twice ({paths}): a second seed must be another sft.seed")


def _values(runs: list[_FinishedRun]) -> npt.NDArray[np.float64]:
    """The three metrics of one row's runs, (U, S, metrics)."""
    of_run = []
    for run in runs:
        ranked = metrics_of_ranks(run.results.masked_ranks)
        of_run.append(np.stack((run.results.target_log_likelihood, ranked.recall[10], ranked.ndcg[10]), axis=1))
    return np.stack(of_run, axis=1)


def _tests(values: npt.NDArray[np.float64], samples: int, seed: int) -> list[list[MeanTest]]:
    """By row, its metrics' tests; `values` (U, S, rows, metrics)."""
    num_users, num_seeds, num_rows, num_metrics = values.shape
    tests = bootstrap_over_seeds(values.reshape(num_users, num_seeds, -1), samples=samples, seed=seed)
    return [tests[row * num_metrics : (row + 1) * num_metrics] for row in range(num_rows)]


def _row(row: RowOfRuns, own: list[MeanTest], less: list[MeanTest] | None, p_holm: float | None) -> ComparedRow:
    likelihood, recall, ndcg = (Estimate(mean=test.mean, low=test.low, high=test.high) for test in own)
    differences = [Difference(difference=test.mean, low=test.low, high=test.high) for test in less or ()]
    likelihood_less, recall_less, ndcg_less = differences or (None, None, None)
    return ComparedRow(
        name=row.name,
        runs=[str(path) for path in row.runs],
        target_log_likelihood=likelihood,
        recall_10=recall,
        ndcg_10=ndcg,
        difference_target_log_likelihood=likelihood_less,
        difference_recall_10=recall_less,
        difference_ndcg_10=ndcg_less,
        p_value=less[0].p_value if less else None,
        p_holm=p_holm,
    )
