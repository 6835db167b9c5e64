"""Ablations: of the tokenizers (`make bench-tokenizers`) and of S²GR's thinking steps (`make bench-steps`).

A row is a tokenizer, or a way to think, given by its settings; generator and budget are one for all. Every (row, seed)
is a run folder OUT/ROW/SEED, made by `python -m training evaluate` in a process of one thread; the seed is the
tokenizer's and the generator's. The stages that do not depend on the row (data, vectors, collaborative) are made once
in OUT/base, or taken from `--base`, and linked into every run. Finished stages are skipped, so a killed matrix is
started again by the same command.

After every run OUT/results.json holds what is finished: `training.comparison` of all rows with the first row, and
each run's tokenizer, training and evaluation in numbers. All rows are compared on the same seeds: those that every row
has finished that has finished any. Nothing here is chosen on the test split; the generator's settings were chosen for
their time.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from training.comparison import Comparison, RowOfRuns, compare
from training.pipeline import RESOLVED_CONFIG, Pipeline, StageName, load_config, parse_overrides
from training.report import comparison_table
from training.stage import STAGE_FILE, StageError, console, write_atomically
from training.tokenizer.methods import ALIGNMENT_WEIGHT

ROOT = Path(__file__).parents[2]
TABLE_WIDTH = 150

SHARED_STAGES: tuple[StageName, ...] = ("data", "vectors", "collaborative")
OWN_STAGES: tuple[StageName, ...] = ("tokenizer", "sft", "evaluate")

_GENERATOR = {
    "sft.hidden_size": "128",
    "sft.num_layers": "2",
    "sft.num_heads": "4",
    "sft.intermediate_size": "384",
    "sft.dropout": "0.2",
    "sft.batch_size": "16",
    "sft.learning_rate": "2e-3",
    "sft.max_history": "20",
    "sft.threads": "1",
    "tokenizer.threads": "1",
    "evaluate.split": "test",
    "evaluate.width": "50",
    "evaluate.threads": "1",
}

PROFILES: dict[str, dict[str, str]] = {
    "scientific": _GENERATOR | {
        "tokenizer.num_levels": "3",
        "tokenizer.codebook_size": "256",
        "sft.max_epochs": "4",  # validation is best at the 5th of 12, at the 3rd of 6, and at the 3rd of 4
        "sft.patience": "4",
    },
    "beauty": _GENERATOR | {
        "tokenizer.num_levels": "4",
        "tokenizer.codebook_size": "256",
        "sft.max_epochs": "5",  # about a minute each
        "sft.patience": "5",
    },
}  # fmt: skip
_STEPWISE = {"tokenizer.method": "coba", "tokenizer.codebook_size": "256"}
PROFILES |= {
    "scientific-steps": PROFILES["scientific"] | _STEPWISE,
    "beauty-steps": PROFILES["beauty"] | _STEPWISE | {"tokenizer.num_levels": "3"},
}
"""The generator of every row, by data set, and S²GR's tokenizer where it is about steps.

Patience is the number of epochs: every row trains equally long.
"""

_RQVAE_CF = {"tokenizer.method": "rqvae", "tokenizer.collaborative_weight": str(ALIGNMENT_WEIGHT)}
RELEASED = "letter-released"

ROWS: dict[str, dict[str, str]] = {
    "rqvae": {"tokenizer.method": "rqvae"},
    "random": {"tokenizer.method": "random"},
    "residual-kmeans": {"tokenizer.method": "residual-kmeans"},
    "rqvae+cf": _RQVAE_CF,
    "rqvae+cf-permuted": _RQVAE_CF | {"tokenizer.collaborative_permuted": "true"},
    "rqvae+diversity": {"tokenizer.method": "rqvae", "tokenizer.diversity_weight": "1e-4"},
    "letter": {"tokenizer.method": "letter"},
    "coba": {"tokenizer.method": "coba"},
    "letter-coba": {"tokenizer.method": "letter-coba"},
    "gr2": {"tokenizer.method": "gr2"},
}
"""Tokenizer settings by row; `--row` defines others, and `--released` letter-released.

rqvae+cf-permuted gives the items each other's collaborative vectors: the loss without its content.
"""

_UNIFORM, _CLUSTERS = {"sft.steps": "[1,1,1]"}, {"sft.step_clusters": "16"}
_INTEREST, _CONTINUOUS = {"sft.global_interest": "0.1"}, {"sft.step_form": "continuous"}
STEP_ROWS: dict[str, dict[str, str]] = {
    "plain": {},
    "pause": _UNIFORM,
    "shuffled": _UNIFORM | _CLUSTERS | {"sft.step_clusters_shuffled": "true"},
    "clusters-only": _CLUSTERS,
    "deeper": {"sft.num_layers": "5"},
    "uniform": _UNIFORM | _CLUSTERS,
    "front-loaded": {"sft.steps": "[3,0,0]"} | _CLUSTERS,
    "full": _UNIFORM | _CLUSTERS | _INTEREST,
    "continuous-pause": _UNIFORM | _CONTINUOUS,
    "continuous": _UNIFORM | _CLUSTERS | _INTEREST | _CONTINUOUS,
}
"""The rows of the profiles about steps: S²GR (full), what it is without one of its parts, and its controls.

All are in the discrete form but the last two, which are pause and full in the continuous one.
deeper: a row with steps runs 8 tokens where a plain one runs 3, so 5 layers in place of 2 cost it as much.
"""

TOKENIZER_NUMBERS = ("uniqueness", "collision_before_repair", "codes_used", "perplexity", "bits", "seconds")
TRAINING_NUMBERS = ("epochs", "best_epoch", "train_log_likelihood", "validation_log_likelihood", "seconds")
EVALUATION_NUMBERS = ("target_log_likelihood", "recall@10", "ndcg@10", "coverage@10", "gini@10", "seconds")


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: str
    seed: int
    folder: Path
    settings: dict[str, str]

    @property
    def log(self) -> Path:
        """What the run's process wrote; beside the run folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def summaries(self, config: Path) -> dict[StageName, dict[str, Any]] | None:
        """The summaries of its own stages if all are finished with the settings that it would have now, else None."""
        try:
            expected = load_config(str(config), self.settings)
        except StageError:
            return None
        found: dict[StageName, dict[str, Any]] = {}
        for stage in OWN_STAGES:
            path = self.folder / stage / STAGE_FILE
            if not path.exists():
                return None
            record = json.loads(path.read_text(encoding="utf-8"))
            section = getattr(expected, stage).model_dump(mode="json", exclude={"threads"})
            if any(record["config"].get(key, value) != value for key, value in section.items()):
                return None
            found[stage] = record["summary"]
        return found


@dataclass(frozen=True)
class Matrix:
    """All runs of one command, and where they are."""

    data: Path
    out: Path
    base: Path
    profile: str
    settings: dict[str, str]  # of every row: the profile's, and the command line's over them
    rows: list[str]
    runs: list[Run]  # seed by seed, so that partial results compare all rows

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Matrix":
        """The runs that the command line asks for."""
        out: Path = arguments.out
        rows = _rows(arguments)
        common = PROFILES[arguments.profile] | parse_overrides(arguments.overrides)
        runs = [
            Run(row, seed, out / row / str(seed), common | own | {"tokenizer.seed": str(seed), "sft.seed": str(seed)})
            for seed in dict.fromkeys(arguments.seeds)
            for row, own in rows.items()
        ]
        return cls(arguments.data, out, arguments.base or out / "base", arguments.profile, common, list(rows), runs)

    @property
    def config(self) -> Path:
        """What all runs start from: the shared stages' sections."""
        return self.out / "shared.yaml"

    def finished(self) -> dict[str, dict[int, dict[StageName, dict[str, Any]]]]:
        """The stages' summaries of finished runs, by row and seed."""
        found: dict[str, dict[int, dict[StageName, dict[str, Any]]]] = {}
        for run in self.runs:
            if (summaries := run.summaries(self.config)) is not None:
                found.setdefault(run.row, {})[run.seed] = summaries
        return {row: found[row] for row in self.rows if row in found}


def main(argv: list[str] | None = None) -> int:
    """Run what is missing and show what there is; the exit code, 1 if a run failed."""
    arguments = _parser().parse_args(argv)
    try:
        matrix = Matrix.of(arguments)
        failed = [] if arguments.summarise else run_all(matrix, arguments.workers)
        results = summarise(matrix, failed)
    except StageError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    if arguments.json:
        sys.stdout.write(json.dumps(results) + "\n")
    return 1 if failed else 0


def run_all(matrix: Matrix, workers: int) -> list[Run]:
    """Run the matrix, at most `workers` processes at once, showing results after each; the runs that failed."""
    make_base(matrix)
    waiting, failed = list(matrix.runs), list[Run]()
    for run in waiting:
        link_base(matrix.base, run.folder)
    with _processes() as running:
        while waiting or running:
            while waiting and len(running) < workers:
                run = waiting.pop(0)
                running[_start(run, matrix)] = run
            for process in [process for process in running if process.poll() is not None]:
                run = running.pop(process)
                if process.returncode:
                    failed.append(run)
                    console.print(f"{run.row}, seed {run.seed}: failed, see {run.log}\n{_tail(run.log)}", markup=False)
                else:
                    console.print(f"{run.row}, seed {run.seed}: finished; {len(waiting) + len(running)} runs left")
                    try:
                        summarise(matrix, failed)
                    except StageError as error:  # told again at the end; hours of runs go on
                        console.print(str(error), markup=False)
            time.sleep(0.2)
    return failed


def make_base(matrix: Matrix) -> None:
    """Write the configuration of the stages that all runs share, the base's own if it has one, and make them.

    Only their sections: what a row does not set has the code's default, whatever the base was made with. A folder given
    by `--base` is read and never changed.
    """
    matrix.out.mkdir(parents=True, exist_ok=True)
    known = load_config(str(own) if (own := matrix.base / RESOLVED_CONFIG).exists() else "default", {})
    sections = known.model_dump(mode="json", include={*map(str, SHARED_STAGES)})
    write_atomically(matrix.config, yaml.safe_dump(sections, sort_keys=False).encode())
    if matrix.base == matrix.out / "base":
        pipeline = Pipeline(load_config(str(matrix.config), {}), matrix.data, matrix.base)
        for stage in SHARED_STAGES:
            pipeline.run(stage)
    elif missing := [stage for stage in SHARED_STAGES if not (matrix.base / stage / STAGE_FILE).exists()]:
        raise StageError(f"--base {matrix.base} has no finished {', '.join(missing)}: wait for it, or leave --base out")


def link_base(base: Path, folder: Path) -> None:
    """Link the shared stages into a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in SHARED_STAGES:
        link, shared = folder / stage, (base / stage).resolve()
        if link.is_symlink() and link.resolve() != shared:
            link.unlink()
        if not link.exists():
            link.symlink_to(shared, target_is_directory=True)
        elif link.resolve() != shared:
            raise StageError(f"{link} is not a link to {shared}: give another --out, or move it away")


def summarise(matrix: Matrix, failed: list[Run]) -> dict[str, Any]:
    """Write OUT/results.json of all runs that are finished, show it as tables, and give it back."""
    finished = matrix.finished()
    comparison = _compare(matrix, finished)
    results: dict[str, Any] = {
        "profile": matrix.profile,
        "settings": matrix.settings,
        "failed": [f"{run.row}/{run.seed}" for run in failed],
        "comparison": comparison.model_dump(mode="json") if comparison else None,
        "runs": {
            row: {str(seed): _numbers(summaries) for seed, summaries in by_seed.items()}
            for row, by_seed in finished.items()
        },
    }
    matrix.out.mkdir(parents=True, exist_ok=True)
    write_atomically(matrix.out / "results.json", json.dumps(results, indent=2).encode())
    tables = Console(stderr=True, width=max(console.width, TABLE_WIDTH))  # a log has no width of its own
    if comparison:
        tables.print(comparison_table(comparison))
    tables.print(_table_of_sids(results["runs"]))
    return results


def _compare(matrix: Matrix, finished: dict[str, dict[int, dict[StageName, dict[str, Any]]]]) -> Comparison | None:
    """All rows against the first on the seeds that they share; None while there are no two rows, or the first lacks."""
    if len(finished) < 2 or matrix.rows[0] not in finished:
        return None
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in finished.values())))
    if not seeds:
        return None
    rows = [RowOfRuns(row, tuple(matrix.out / row / str(seed) for seed in seeds)) for row in finished]
    return compare(rows)


def _numbers(summaries: dict[StageName, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    wanted: dict[StageName, tuple[str, ...]] = {
        "tokenizer": TOKENIZER_NUMBERS,
        "sft": TRAINING_NUMBERS,
        "evaluate": EVALUATION_NUMBERS,
    }
    return {stage: {name: summaries[stage][name] for name in names} for stage, names in wanted.items()}


def _table_of_sids(runs: dict[str, dict[str, Any]]) -> Table:
    sids_columns = ("uniqueness", "collision", "codes used", "perplexity", "bits")
    columns = ("row", "seed", *sids_columns, "validation LL", "epoch", "s")
    table = Table(*columns, title="SIDs and training", title_justify="left")
    for row, by_seed in runs.items():
        for seed, numbers in by_seed.items():
            sids, trained = numbers["tokenizer"], numbers["sft"]
            table.add_row(
                row,
                seed,
                f"{sids['uniqueness']:.4f}",
                f"{sids['collision_before_repair']:.4f}",
                " ".join(map(str, sids["codes_used"])),
                " ".join(f"{value:.0f}" for value in sids["perplexity"]),
                " ".join(f"{value:.2f}" for value in sids["bits"]),
                f"{trained['validation_log_likelihood']:.4f}",
                f"{trained['best_epoch']}/{trained['epochs']}",
                " + ".join(f"{numbers[stage]['seconds']:.0f}" for stage in OWN_STAGES),
            )
    return table


@contextmanager
def _processes() -> Iterator[dict[subprocess.Popen[bytes], Run]]:
    """Running processes; whatever happens, none outlives the block."""
    running: dict[subprocess.Popen[bytes], Run] = {}
    try:
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _start(run: Run, matrix: Matrix) -> subprocess.Popen[bytes]:
    """`python -m training evaluate` in a process of one thread; everything before it is made on the way."""
    overrides = [f"{key}={value}" for key, value in run.settings.items()]
    command = [sys.executable, "-m", "training", "evaluate", *overrides]
    command += ["--config", str(matrix.config), "--data", str(matrix.data), "--out", str(run.folder), "--json"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with run.log.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])


def _rows(arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The rows asked for with their settings, in the order asked for."""
    known = dict(STEP_ROWS if arguments.profile.endswith("-steps") else ROWS)
    if arguments.released:
        known[RELEASED] = {"tokenizer.method": "imported", "tokenizer.sids": str(arguments.released.resolve())}
    for text in arguments.row:
        name, *settings = text.split()
        known[name] = parse_overrides(settings)
    asked: list[str] = arguments.rows or list(known)
    if unknown := [row for row in asked if row not in known]:
        hint = f" ({RELEASED} needs --released FILE)" if RELEASED in unknown else ""
        raise StageError(f"no row {', '.join(unknown)}{hint}: name some of {', '.join(known)}, or define it by --row")
    return {row: known[row] for row in asked}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.ablations",
        description=__doc__,
        epilog=f"Rows: {', '.join(ROWS)}; of the profiles about steps: {', '.join(STEP_ROWS)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions.* and items.*")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--base", type=Path, help="a run folder whose data, vectors and collaborative are finished")
    parser.add_argument("--rows", type=lambda text: text.split(","), help="the first is the reference; default: all")
    parser.add_argument("--row", action="append", default=[], metavar='"NAME KEY=VALUE …"', help="define a row")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--profile", choices=PROFILES, default="scientific")
    parser.add_argument("--released", type=Path, help=f"the SID file of row {RELEASED}")
    parser.add_argument("--workers", type=int, default=2, help="processes at once, a core each")
    parser.add_argument("--summarise", action="store_true", help="run nothing, only show what is finished")
    parser.add_argument("--json", action="store_true", help="print the content of results.json on stdout")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every row, over the profile's")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the runs end with it
    sys.exit(main())
