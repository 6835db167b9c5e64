"""Tables for people: one stage's summary, what a whole run trained, and runs beside each other."""

from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from training.comparison import Comparison, Estimate
from training.evaluation import Difference, EvaluationSummary, RankingRow
from training.interactions import DataSummary
from training.publish import PublishSummary
from training.sft import SftSummary
from training.stage import StageConfig, Summary
from training.tokenizer.stage import TokenizerSummary

if TYPE_CHECKING:
    from training.pipeline import StageName

_BASELINE_TITLES = {"popularity": "popularity", "item_knn": "item-kNN", "sasrec": "SASRec", "text": "text"}
_SLICE_TITLES = {
    "history_1_to_4": "history of up to 4",
    "history_5_to_9": "history of 5 to 9",
    "history_10_or_more": "history of 10 and more",
    "target_id_below_previous": "target's id below the previous one's",
}


def summary_table(title: str, content: dict[str, Any]) -> Table:
    """Any summary, a row per value; nested values are flattened to `outer.inner`."""
    table = Table("", "", title=title, title_justify="left", show_header=False)
    for key, value in _flat(content):
        table.add_row(key, escape(_shown(value)))
    return table


def settings_table(stage: str, config: StageConfig) -> Table:
    """A stage's keys with their defaults and what they mean."""
    table = Table("key", "default", "", title=f"settings of {stage}", title_justify="left")
    for key, field in type(config).model_fields.items():
        table.add_row(f"{stage}.{key}", str(getattr(config, key)), field.description or "")
    return table


def show_results(summaries: dict["StageName", Summary], console: Console) -> None:
    """What was trained, and how it ranks beside the baselines."""
    data = cast("DataSummary", summaries["data"])
    sids = cast("TokenizerSummary", summaries["tokenizer"])
    model = cast("SftSummary", summaries["sft"])
    evaluated = cast("EvaluationSummary", summaries["evaluate"])
    published = cast("PublishSummary", summaries["publish"])
    trained = Table("", "", title="What was trained", title_justify="left", show_header=False)
    trained.add_row("items", f"{data.num_items:,}")
    trained.add_row("users", f"{data.num_users:,}")
    trained.add_row("interactions", f"{data.num_events:,}")
    trained.add_row("SIDs", f"{sids.num_levels} levels of {sids.codebook_size} codes")
    trained.add_row("uniqueness", f"{sids.uniqueness:.2%} ({sids.num_moved:,} items moved to a free last code)")
    trained.add_row(
        "model", f"{model.num_parameters / 1e6:.1f}M parameters, best of {model.epochs} epochs: {model.best_epoch}"
    )
    trained.add_row("bundle", published.bundle_id)
    console.print(trained)
    low, high = evaluated.recall_10_interval
    held_out = f"{evaluated.num_users:,} held-out {evaluated.split} items"
    title = f"Ranking {held_out} among all {evaluated.num_items:,} (seen items left out)"
    ranking = Table(
        "", "Recall@10", "NDCG@10", "this model's Recall@10 less the baseline's",
        title=title,
        title_justify="left",
    )  # fmt: skip
    ranking.add_row(
        "this model",
        f"{evaluated.recall_10:.4f}",
        f"{evaluated.ndcg_10:.4f}",
        f"(95 % interval of its own: {low:.4f} to {high:.4f})",
    )
    titles = {name: title for name, title in _BASELINE_TITLES.items() if name in evaluated.baselines}
    for name, title in titles.items():
        row: RankingRow = evaluated.baselines[name]
        difference = evaluated.difference_recall_10[name]
        interval = f"{difference.difference:+.4f}  (95 %: {difference.low:+.4f} to {difference.high:+.4f})"
        ranking.add_row(title, f"{row.recall_10:.4f}", f"{row.ndcg_10:.4f}", interval)
    console.print(ranking)
    if not evaluated.slices:  # evaluated before there were any
        return
    slices = Table(
        "", "users", "this model", *titles.values(), title="Recall@10 of some of the users", title_justify="left"
    )
    for name, part in evaluated.slices.items():
        rows = (part.model, *(part.baselines[baseline] for baseline in titles))
        slices.add_row(_SLICE_TITLES[name], f"{part.num_users:,}", *(f"{row.recall_10:.4f}" for row in rows))
    console.print(slices)


def comparison_table(comparison: Comparison) -> Table:
    """Every row with its means and, against the reference, differences with 95 % intervals; one line per metric."""
    seeds = f"{comparison.num_seeds} seed{'s' if comparison.num_seeds > 1 else ''}"
    title = f"{comparison.num_users:,} {comparison.split} users, {seeds}; differences to {escape(comparison.reference)}"
    table = Table("", "", "mean", "95 %", "difference", "95 %", "p (Holm)", title=title, title_justify="left")
    for row in comparison.rows:
        metrics: tuple[tuple[str, Estimate, Difference | None], ...] = (
            ("log-likelihood", row.target_log_likelihood, row.difference_target_log_likelihood),
            ("Recall@10", row.recall_10, row.difference_recall_10),
            ("NDCG@10", row.ndcg_10, row.difference_ndcg_10),
        )
        for number, (name, own, less) in enumerate(metrics):
            table.add_row(
                "" if number else escape(row.name),
                name,
                f"{own.mean:.4f}",
                f"{own.low:.4f} to {own.high:.4f}",
                f"{less.difference:+.4f}" if less else "",
                f"{less.low:+.4f} to {less.high:+.4f}" if less else "",
                "" if number or row.p_holm is None else f"{row.p_holm:.4f}",
                end_section=number == len(metrics) - 1,
            )
    return table


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in content.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


def _shown(value: Any) -> str:  # noqa: ANN401 - any JSON value
    if isinstance(value, float):
        return f"{value:,.4f}"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
