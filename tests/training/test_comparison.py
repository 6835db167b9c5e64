"""Paired comparison: differences whose truth is known by hand, and every pairing that would be none is refused."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.training.conftest import Cli, Run
from training.comparison import Comparison, RowOfRuns, compare, parse_row
from training.evaluation import USERS_FILE, UserResults, save_users
from training.metrics import metrics_of_ranks, paired_bootstrap
from training.stage import STAGE_FILE, StageError

RNG = np.random.default_rng(0)
LIKELIHOOD = RNG.normal(-7, 2, 400)
RANKS = RNG.integers(0, 40, 400)


def write_run(
    path: Path,
    likelihood: npt.NDArray[np.float64] = LIKELIHOOD,
    ranks: npt.NDArray[np.int64] = RANKS,
    *,
    data: str = "data",
    split: str = "test",
    first_user: int = 0,
    training: str | None = None,
) -> Path:
    """What a finished run leaves behind and a comparison reads."""
    fingerprints = {"data": data, "sft": training or path.name, "evaluate": "evaluate"}
    for stage, fingerprint in fingerprints.items():
        (path / stage).mkdir(parents=True)
        record = {"fingerprint": fingerprint, "config": {"split": split}, "summary": {}}
        (path / stage / STAGE_FILE).write_text(json.dumps(record))
    users = np.arange(first_user, first_user + len(likelihood))
    save_users(path / "evaluate", UserResults(users, users.astype(np.int32), likelihood, ranks, ranks))
    return path


def row(name: str, *runs: Path) -> RowOfRuns:
    return RowOfRuns(name, runs)


def test_the_same_gain_for_everybody_is_exact_and_as_sure_as_samples_allow(tmp_path):
    """Everybody's target gains 0.25 nats: no resample says anything else, so k = 0 and p = 2 · 1 / (999 + 1)."""
    reference = write_run(tmp_path / "reference")
    better = write_run(tmp_path / "better", LIKELIHOOD + 0.25)
    compared = compare([row("reference", reference), row("better", better)], samples=999)
    first, second = compared.rows
    assert first.difference_target_log_likelihood is None
    assert first.p_holm is None
    gain = second.difference_target_log_likelihood
    assert gain is not None
    assert [gain.difference, gain.low, gain.high] == pytest.approx([0.25] * 3)
    assert second.p_value == second.p_holm == pytest.approx(2 / 1000)
    assert second.target_log_likelihood.mean == pytest.approx(LIKELIHOOD.mean() + 0.25)
    assert second.difference_recall_10 is not None
    assert second.difference_recall_10.model_dump() == {"difference": 0, "low": 0, "high": 0}
    assert (compared.reference, compared.split, compared.num_users, compared.num_seeds) == ("reference", "test", 400, 1)


def test_equal_runs_do_not_differ(tmp_path):
    compared = compare([row("a", write_run(tmp_path / "a")), row("b", write_run(tmp_path / "b"))], samples=99)
    assert compared.rows[1].p_value == compared.rows[1].p_holm == 1


def test_with_one_seed_every_interval_is_the_paired_bootstrap_over_users(tmp_path):
    other_likelihood, other_ranks = RNG.normal(-7, 2, 400), RNG.integers(0, 30, 400)
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", other_likelihood, other_ranks)
    compared = compare([row("a", a), row("b", b)], samples=500, seed=3).rows[1]
    mine, others = metrics_of_ranks(RANKS), metrics_of_ranks(other_ranks)
    for found, own, reference in (
        (compared.difference_target_log_likelihood, other_likelihood, LIKELIHOOD),
        (compared.difference_recall_10, others.recall[10], mine.recall[10]),
        (compared.difference_ndcg_10, others.ndcg[10], mine.ndcg[10]),
    ):
        expected = paired_bootstrap(own, reference, samples=500, seed=3)
        assert found is not None
        assert [found.difference, found.low, found.high] == pytest.approx(
            [expected.difference, expected.low, expected.high]
        )


def test_seeds_are_paired_by_their_order_and_averaged(tmp_path):
    """Seeds 1 and 2 move both rows by +1 and −1; what stays of each pair is the method's 0.5, in every resample."""
    runs = {
        name: [write_run(tmp_path / f"{name}{sign}", LIKELIHOOD + gain + sign) for sign in (1, -1)]
        for name, gain in (("reference", 0.0), ("better", 0.5))
    }
    compared = compare([row(name, *paths) for name, paths in runs.items()], samples=200)
    own, gain = compared.rows[0].target_log_likelihood, compared.rows[1].difference_target_log_likelihood
    assert compared.num_seeds == 2
    assert own.mean == pytest.approx(LIKELIHOOD.mean())
    assert own.high - own.low > 1.5  # a row's own interval holds the spread of its seeds
    assert gain is not None
    assert [gain.difference, gain.low, gain.high] == pytest.approx([0.5] * 3)


def test_holm_corrects_over_all_rows_but_the_reference(tmp_path):
    """p = 2/1000 three times: the first is multiplied by 3, and no later one may be smaller."""
    rows = [row("reference", write_run(tmp_path / "reference"))]
    rows += [row(str(n), write_run(tmp_path / str(n), LIKELIHOOD + n)) for n in (1, 2, 3)]
    compared = compare(rows, samples=999)
    assert [found.p_holm for found in compared.rows] == [None, *[pytest.approx(6 / 1000)] * 3]


def test_the_order_of_the_other_rows_changes_no_number(tmp_path):
    rows = [row(name, write_run(tmp_path / name, RNG.normal(-7, 2, 400))) for name in "abc"]
    forth, back = compare(rows, samples=100), compare([rows[0], rows[2], rows[1]], samples=100)
    likelihoods = {found.name: found.target_log_likelihood.model_dump() for found in back.rows}
    p_values = {found.name: found.p_value for found in back.rows}
    for found in forth.rows:
        assert found.target_log_likelihood.model_dump() == pytest.approx(likelihoods[found.name])
        assert found.p_value == p_values[found.name]


def test_runs_that_cannot_be_paired_are_refused(tmp_path):
    good = write_run(tmp_path / "good")
    for name, other, message in (
        ("data", write_run(tmp_path / "1", data="others"), r"their data stage differs \(others and data\)"),
        ("split", write_run(tmp_path / "2", split="validation"), r"their split differs \(validation and test\)"),
        ("users", write_run(tmp_path / "3", first_user=1), "400 and 400 users, not the same ones"),
        ("fewer", write_run(tmp_path / "4", LIKELIHOOD[:9], RANKS[:9]), "9 and 400 users, not the same ones"),
        ("nothing", tmp_path / "5", "has no finished stage data .*: run `sidrec-train evaluate"),
    ):
        with pytest.raises(StageError, match=message):
            compare([row("good", good), row(name, other)])


def test_an_evaluation_that_wrote_no_users_is_refused(tmp_path):
    good, old = write_run(tmp_path / "good"), write_run(tmp_path / "old")
    (old / "evaluate" / USERS_FILE).unlink()
    with pytest.raises(StageError, match=r"old/evaluate/users\.parquet cannot be read"):
        compare([row("good", good), row("old", old)])


def test_rows_that_are_not_rows_are_refused(tmp_path):
    a, b, again = (write_run(tmp_path / name) for name in "abc")
    same = write_run(tmp_path / "d", training="a")
    for rows, message in (
        ([row("a", a)], "1 row given"),
        ([row("a", a), row("a", b)], "rows need distinct names, got a, a"),
        ([row("a", a, again), row("b", b)], r"different numbers of runs \(a 2, b 1\)"),
        ([row("a", a, same), row("b", b, again)], "row a names one training twice"),
    ):
        with pytest.raises(StageError, match=message):
            compare(rows)


def test_a_row_is_a_run_or_a_name_with_a_run_per_seed(monkeypatch, tmp_path):
    assert parse_row("runs/a") == RowOfRuns("a", (Path("runs/a"),))
    assert parse_row("k=runs/a,runs/b") == RowOfRuns("k", (Path("runs/a"), Path("runs/b")))
    monkeypatch.chdir(tmp_path)
    assert parse_row(".") == RowOfRuns(tmp_path.name, (Path(),))


@pytest.mark.parametrize("text", ["k=", "=runs/a", "k=,"])
def test_half_a_row_is_refused(text):
    with pytest.raises(StageError, match="is not a row: write RUN, or NAME=RUN,RUN"):
        parse_row(text)


def test_the_command_compares_finished_runs(finished: Run, cli: Cli, tmp_path) -> None:
    """A run beside its own copy: the same means as its summary, and no difference."""
    again = finished.copy(tmp_path / "again")
    found = Comparison.model_validate(cli("compare", finished.out, f"copy={again.out}", "--json").json)
    evaluated = finished.outcome.json
    assert [row.name for row in found.rows] == ["finished", "copy"]
    for compared in found.rows:
        assert compared.target_log_likelihood.mean == pytest.approx(evaluated["target_log_likelihood"])
        assert compared.recall_10.mean == pytest.approx(evaluated["recall@10"])
        assert compared.ndcg_10.mean == pytest.approx(evaluated["ndcg@10"])
    assert found.rows[1].p_holm == 1
    shown = cli("compare", finished.out, f"copy={again.out}")
    assert shown.code == 0
    assert "60 test users, 1 seed; differences to finished" in shown.stdout


def test_the_command_refuses_with_one_message(finished: Run, cli: Cli, tmp_path) -> None:
    assert "1 row given: a comparison needs a reference" in cli("compare", finished.out).refusal()
    assert f"{tmp_path} has no finished stage data" in cli("compare", finished.out, tmp_path).refusal()
