"""Tables for people: what they hold, and that they survive any summary."""

import io
import json
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from tests.training.conftest import Run
from training.comparison import ComparedRow, Comparison, Estimate
from training.evaluation import Difference
from training.pipeline import STAGES, PipelineConfig, load_config
from training.report import comparison_table, settings_table, summary_table


def text_of(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    written = console.file
    assert isinstance(written, io.StringIO)
    return written.getvalue()


def cells(text: str) -> list[list[str]]:
    """The rows of a printed table, cell by cell."""
    return [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in text.splitlines() if "│" in line]


def test_a_summary_is_a_row_per_value_with_nested_names_joined():
    content: dict[str, Any] = {
        "num_items": 12_345,
        "recall@10": 0.25,
        "method": "kmeans",
        "is_done": True,
        "bits": [1.5, 2.0],
        "baselines": {"popularity": {"recall@10": 0.125}},
        "skipped_rows": {},
    }
    assert cells(text_of(summary_table("tokenizer", content))) == [
        ["num_items", "12,345"],
        ["recall@10", "0.2500"],
        ["method", "kmeans"],
        ["is_done", "True"],
        ["bits", "1.5000, 2.0000"],
        ["baselines.popularity.recall@10", "0.1250"],
    ]


def test_text_with_square_brackets_is_shown_as_it_is():
    assert cells(text_of(summary_table("t", {"path": "/tmp/[bold]run[/bold]"}))) == [["path", "/tmp/[bold]run[/bold]"]]


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_of_a_stage_is_listed_with_its_default(stage):
    config = getattr(PipelineConfig(), stage)
    listed = [row[0] for row in cells(text_of(settings_table(stage, config)))]
    assert listed == [f"{stage}.{key}" for key in type(config).model_fields]
    assert load_config("default", {listed[0]: str(json.loads(config.model_dump_json())[listed[0].split(".")[1]])})


def test_a_comparison_has_a_line_per_row_and_metric_and_no_difference_for_the_reference():
    own = {
        "target_log_likelihood": Estimate(mean=-7.5, low=-7.75, high=-7.25),
        "recall@10": Estimate(mean=0.08, low=0.07, high=0.09),
        "ndcg@10": Estimate(mean=0.05, low=0.04, high=0.06),
    }
    keys = ("difference_target_log_likelihood", "difference_recall@10", "difference_ndcg@10")
    less = Difference(difference=0.0, low=-0.5, high=0.5)
    rows = [
        {"name": "[plain]", "runs": ["a"], **own, **dict.fromkeys(keys), "p_value": None, "p_holm": None},
        {"name": "other", "runs": ["b"], **own, **dict.fromkeys(keys, less), "p_value": 0.01, "p_holm": 0.02},
    ]
    comparison = Comparison(
        reference="[plain]", split="test", num_users=1234, num_seeds=3, samples=99,
        rows=[ComparedRow.model_validate(row) for row in rows],
    )  # fmt: skip
    text = text_of(comparison_table(comparison))
    assert "1,234 test users, 3 seeds; differences to [plain]" in text
    assert cells(text)[0] == ["[plain]", "log-likelihood", "-7.5000", "-7.7500 to -7.2500"]
    assert cells(text)[3][5:] == ["-0.5000 to +0.5000", "0.0200"]
    assert cells(text)[4] == ["Recall@10", "0.0800", "0.0700 to 0.0900", "+0.0000", "-0.5000 to +0.5000"]


def test_the_pipeline_ends_with_what_was_trained_and_how_it_ranks(finished: Run, cli):
    """The table of a run that was finished before: nothing is computed, all of it is shown."""
    shown = cli("pipeline", *finished.args())
    assert shown.code == 0
    rows = {row[0]: row[1:] for row in cells(shown.stdout)}
    evaluated = finished.outcome.json
    assert rows["items"] == ["48"]
    assert rows["users"] == ["60"]
    assert rows["SIDs"] == ["3 levels of 8 codes"]
    assert rows["uniqueness"][0].startswith("100.00%")
    assert "parameters" in rows["model"][0]
    assert rows["this model"][:2] == [f"{evaluated['recall@10']:.4f}", f"{evaluated['ndcg@10']:.4f}"]
    for title, name in (("popularity", "popularity"), ("item-kNN", "item_knn"), ("SASRec", "sasrec")):
        baseline = evaluated["baselines"][name]
        assert rows[title][:2] == [f"{baseline['recall@10']:.4f}", f"{baseline['ndcg@10']:.4f}"]
        assert f"{evaluated['difference_recall@10'][name]['difference']:+.4f}" in rows[title][2]
    assert "Ranking 60 held-out test items among all 48" in shown.stdout
