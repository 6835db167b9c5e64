"""`sidrec-train`: one command per stage, and `pipeline` for all of them."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from training.stage import STAGE_FILE, StageError, Summary, console, is_main_process
from training.tokenizer.methods import Method

if TYPE_CHECKING:
    from semantic_ids.catalog import Catalog
    from training.pipeline import StageName

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Make a recommender from interactions and item texts.

    `sidrec-train pipeline --data DIR --out RUN` runs everything and publishes a bundle that `sidrec-serve` serves.
    Every stage is also a command of its own; it first runs whatever it needs that is not there yet, so any of them
    may be called first, called again, or killed and started again.

    **DIR** holds `interactions.csv` or `.parquet` (user_id, item_id, timestamp, and perhaps event_type) and
    `items.csv`, `.jsonl` or `.parquet` (item_id, title, and perhaps categories, description, …). **RUN** is where
    everything goes.
    """,
)

DataOption = Annotated[Path, typer.Option("--data", help="Folder with interactions.* and items.*", show_default=False)]
OutOption = Annotated[
    Path, typer.Option("--out", help="Run folder; what is finished there is not done again.", show_default=False)
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="A packaged configuration (default, demo, best) or a YAML file; absent: RUN's last one, else default.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object on stdout.")]
SkipOption = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that are not valid, and list them.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings over the configuration's, such as sft.max_epochs=5.",
        show_default=False,
    ),
]

STAGE_HELP: dict["StageName", str] = {
    "data": "Check interactions and items, split them by time (leave-one-out).",
    "vectors": "Embed every item's text.",
    "collaborative": "Train SASRec and item-kNN: the baselines, and collaborative vectors.",
    "tokenizer": "Learn the codebooks, give every item its Semantic ID, write the catalogue.",
    "sft": "Train the language model to write the next item's Semantic ID.",
    "evaluate": "Rank the full catalogue for every held-out user, beside the baselines.",
    "publish": "Write a bundle, reload it, try it, make it current.",
}


_EPILOG = "KEY=VALUE: `sidrec-train settings {0}` lists the keys."


def _add_stage(name: "StageName") -> None:
    @app.command(name, help=STAGE_HELP[name], epilog=_EPILOG.format(name))
    def command(
        data: DataOption,
        out: OutOption,
        overrides: Overrides = None,
        config: ConfigOption = None,
        skip_bad_rows: SkipOption = False,
        as_json: JsonOption = False,
    ) -> None:
        summary = _run(name, data, out, _qualified(name, overrides), config, skip_bad_rows)[name]
        _print_summary(name, summary, as_json)


def _add_tokenizer() -> None:
    """Like the other stages' commands, with `--method`."""

    @app.command("tokenizer", help=STAGE_HELP["tokenizer"], epilog=_EPILOG.format("tokenizer"))
    def command(
        data: DataOption,
        out: OutOption,
        overrides: Overrides = None,
        method: Annotated[
            Method | None, typer.Option("--method", help="The same as method=…", show_default="gr2")
        ] = None,
        config: ConfigOption = None,
        skip_bad_rows: SkipOption = False,
        as_json: JsonOption = False,
    ) -> None:
        qualified = _qualified("tokenizer", overrides) + ([f"tokenizer.method={method}"] if method else [])
        summary = _run("tokenizer", data, out, qualified, config, skip_bad_rows)["tokenizer"]
        _print_summary("tokenizer", summary, as_json)
        if not as_json and is_main_process():
            console.print(f"What the SIDs are like: {out / 'tokenizer' / 'report.html'}", soft_wrap=True)


for _name in STAGE_HELP:
    if _name == "tokenizer":
        _add_tokenizer()
    else:
        _add_stage(_name)


@app.command("export-sids")
def export_sids(
    out: OutOption,
    file: Annotated[Path, typer.Argument(help="FILE.json or FILE.parquet to write.", show_default=False)],
) -> None:
    """Write every item's SID of a finished tokenizer stage, for other tools.

    The other way: `sidrec-train tokenizer --method imported sids=FILE` takes SIDs from elsewhere.
    """
    from training.tokenizer.sid_files import write_sids

    catalog = _catalog_of(out)
    write_sids(file, catalog.item_ids, catalog.codes, catalog.space)
    console.print(f"{len(catalog):,} SIDs in {file}", soft_wrap=True)


@app.command("base-model")
def base_model(
    name: Annotated[
        str, typer.Argument(help="smollm2-135m, a hub name, or a checkpoint's folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint.", show_default=False)],
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Run folder whose SIDs shall be in the vocabulary.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Write a pretrained model as a plain checkpoint, with --run extended by a catalogue's SIDs.

    `sft.base_model=FOLDER` trains from it. `smollm2-135m` needs no network: a package carries it.
    """
    from training.base_model import prepare

    prepare(name, out, _catalog_of(run).space if run else None, replace=force)
    console.print(f"{name} is in {out}", soft_wrap=True)


@app.command()
def pipeline(
    data: DataOption,
    out: OutOption,
    overrides: Overrides = None,
    config: ConfigOption = None,
    skip_bad_rows: SkipOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every stage, publish the bundle, and show what was trained (with --json: the summary of evaluate)."""
    summaries = _run("publish", data, out, overrides or [], config, skip_bad_rows)
    if as_json:
        _print_summary("evaluate", summaries["evaluate"], as_json)
        return
    from training.report import show_results

    show_results(summaries, Console())


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN [RUN]...",
            help="Evaluated run folders, the reference first; NAME=RUN,RUN,… for several seeds of one method.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Compare evaluated runs on the same data, user by user: is one better, or is it luck?"""
    from training import comparison

    compared = comparison.compare([comparison.parse_row(text) for text in runs])
    if as_json:
        sys.stdout.write(compared.model_dump_json() + "\n")
        return
    from training.report import comparison_table

    Console().print(comparison_table(compared))


@app.command()
def settings(stage: Annotated[str, typer.Argument(help="A stage, such as sft.")]) -> None:
    """List a stage's settings, for YAML files and KEY=VALUE."""
    from training.pipeline import STAGES, PipelineConfig
    from training.report import settings_table

    if stage not in STAGES:
        raise StageError(f"{stage!r} is not a stage: name one of {', '.join(STAGES)}")
    Console().print(settings_table(stage, getattr(PipelineConfig(), stage)))


@app.command("demo-data")
def demo_data(
    out: Annotated[Path, typer.Argument(help="Folder to write interactions.csv and items.csv into.")],
) -> None:
    """Write MovieLens-100K in this project's format (GroupLens' terms: not for commercial use)."""
    from training.demo_data import write_movielens

    write_movielens(out)


def main() -> None:
    """Run a command; a `StageError` is a message for the user, not a traceback."""
    try:
        app()
    except StageError as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _catalog_of(run: Path) -> "Catalog":
    """The catalogue of a run whose tokenizer stage is finished."""
    from training.interactions import Dataset
    from training.tokenizer.stage import TokenizedCatalog

    if not (run / "tokenizer" / STAGE_FILE).exists():
        raise StageError(f"{run} has no finished tokenizer stage: run `sidrec-train tokenizer --out {run} …` first")
    return TokenizedCatalog.load(run / "tokenizer", Dataset.load(run / "data")).catalog


def _qualified(stage: str, overrides: list[str] | None) -> list[str]:
    """A stage's own command needs no `stage.` before its keys."""
    return [text if "." in text.partition("=")[0] else f"{stage}.{text}" for text in overrides or []]


def _run(
    until: "StageName", data: Path, out: Path, overrides: list[str], config: str | None, skip_bad_rows: bool
) -> dict["StageName", Summary]:
    from training.memory import keep_freed_memory
    from training.pipeline import RESOLVED_CONFIG, Pipeline, load_config, parse_overrides

    keep_freed_memory()
    if config is None:
        config = str(out / RESOLVED_CONFIG) if (out / RESOLVED_CONFIG).exists() else "default"
    settings = parse_overrides(overrides)
    if skip_bad_rows:
        settings["data.skip_bad_rows"] = "true"
    return Pipeline(load_config(config, settings), data, out).run(until)


def _print_summary(name: str, summary: Summary, as_json: bool) -> None:
    if not is_main_process():
        return
    content = summary.model_dump(mode="json")
    if as_json:
        sys.stdout.write(json.dumps(content) + "\n")
        return
    from training.report import summary_table

    Console().print(summary_table(name, content))
