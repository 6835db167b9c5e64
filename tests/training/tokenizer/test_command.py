"""`sidrec-train tokenizer --method …` and `export-sids`, as people call them."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from semantic_ids.codes import Codes
from tests.training.conftest import NUM_ITEMS, SMALL, Cli, Run
from training.interactions import Dataset
from training.tokenizer.methods import METHODS, Method
from training.tokenizer.stage import TokenizedCatalog

FAST = (*SMALL, "max_epochs=8", "hidden_widths=[32]", "latent_width=8", "batch_size=16", "codebook_size=8")
KEYS = {
    "method", "num_items", "uniqueness", "collision_before_repair", "num_moved", "codes_used", "perplexity", "bits",
    "seconds", "identical_listings", "mean_move", "epochs",
}  # fmt: skip
LEARNED: tuple[Method, ...] = ("rqvae", "letter", "coba", "letter-coba", "gr2")


def codes_of(out: Path) -> dict[str, tuple[int, ...]]:
    tokenized = TokenizedCatalog.load(out / "tokenizer", Dataset.load(out / "data"))
    codes: Codes = np.asarray(tokenized.catalog.codes)
    return {item: tuple(row) for item, row in zip(tokenized.catalog.item_ids, codes.tolist(), strict=True)}


def started(finished: Run, out: Path) -> Run:
    """The finished run's data, vectors and collaborative stages, ready for another tokenizer."""
    out.mkdir()
    for stage in ("data", "vectors", "collaborative"):
        shutil.copytree(finished.out / stage, out / stage)
    return Run(finished.data, out, finished.outcome)


def tokenizer(cli: Cli, run: Run, *arguments: str) -> dict[str, Any]:
    return cli("tokenizer", "--data", run.data, "--out", run.out, *FAST, *arguments, "--json").json


@pytest.mark.parametrize("method", [method for method in get_args(Method) if method != "imported"])
def test_every_method_gives_every_item_a_sid_of_its_own_and_says_what_it_did(
    finished: Run, tmp_path: Path, cli: Cli, method: Method
) -> None:
    run = started(finished, tmp_path / "run")
    its_own_shape = ["codebook_size=null"] if method == "clustered" else []
    summary = tokenizer(cli, run, "--method", method, *its_own_shape)
    assert summary.keys() >= KEYS
    assert (summary["method"], summary["num_items"]) == (method, NUM_ITEMS)
    assert summary["uniqueness"] == 1.0
    assert len(set(codes_of(run.out).values())) == NUM_ITEMS
    assert summary["identical_listings"] == 2, "the twins"
    assert all(len(summary[key]) == summary["num_levels"] for key in ("codes_used", "perplexity", "bits"))
    assert summary["num_levels"] == (2 if method == "clustered" else 3)
    assert 0 <= summary["collision_before_repair"] <= 1
    assert (summary["epochs"] > 0) == (method in LEARNED)
    left = {path.name for path in (run.out / "tokenizer").iterdir()}
    assert left == {".fingerprint", "stage.json", "quantizer", "catalog", "report.html"}
    assert ", a tale of" in (run.out / "tokenizer" / "report.html").read_text()


def test_sasrec_is_trained_only_for_a_method_that_aligns_to_it(finished: Run, tmp_path: Path, cli: Cli) -> None:
    run = started(finished, tmp_path / "run")
    shutil.rmtree(run.out / "collaborative")
    tokenizer(cli, run, "--method", "rqvae")
    assert not (run.out / "collaborative").exists()
    tokenizer(cli, run, "--method", "letter", "max_epochs=1")
    assert (run.out / "collaborative" / "item_vectors.npy").exists()


def test_a_method_given_later_replaces_all_of_the_earlier_ones_switches(
    finished: Run, tmp_path: Path, cli: Cli
) -> None:
    """The run folder remembers what was set, and the method's own switches were not set."""
    run, fresh = started(finished, tmp_path / "run"), started(finished, tmp_path / "fresh")
    tokenizer(cli, run, "--method", "coba")
    tokenizer(cli, run, "--method", "letter")
    tokenizer(cli, fresh, "--method", "letter")
    assert codes_of(run.out) == codes_of(fresh.out)
    assert METHODS["letter"] != METHODS["coba"]


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_exported_sids_come_back_as_they_were(finished: Run, tmp_path: Path, cli: Cli, ending: str) -> None:
    run, other = started(finished, tmp_path / "run"), started(finished, tmp_path / "other")
    tokenizer(cli, run, "--method", "rqvae")
    file = tmp_path / f"sids.{ending}"
    assert cli("export-sids", "--out", run.out, file).code == 0
    summary = tokenizer(cli, other, "--method", "imported", f"sids={file}")
    assert codes_of(other.out) == codes_of(run.out)
    assert (summary["uniqueness"], summary["num_moved"], summary["epochs"]) == (1.0, 0, 0)


def test_imported_sids_that_collide_stay_as_they_are_and_are_counted(finished: Run, tmp_path: Path, cli: Cli) -> None:
    run = started(finished, tmp_path / "run")
    items = Dataset.load(run.out / "data").item_ids
    file = tmp_path / "sids.json"
    file.write_text(json.dumps({item: f"<a_{number // 8}><b_{number % 4}>" for number, item in enumerate(items)}))
    summary = tokenizer(cli, run, "--method", "imported", f"sids={file}")
    assert summary["uniqueness"] == 0.0
    assert summary["collision_before_repair"] == 1.0
    assert len(set(codes_of(run.out).values())) == NUM_ITEMS // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "imported"], r"needs a file of SIDs: set tokenizer.sids=FILE"),
        (["--method", "imported", "sids=nowhere.json"], r"nowhere.json cannot be read .*give tokenizer.sids"),
        (["--method", "random", "num_levels=1"], r"48 items do not fit .*raise tokenizer.codebook_size or num_levels"),
        (["--method", "rqvae", "learning_rate=1e9"], r"loss became (nan|inf).*lower tokenizer.learning_rate"),
        (["--method", "rqvae", "diversity_weight=-1"], r"greater than or equal to 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_way_out(
    finished: Run, tmp_path: Path, cli: Cli, arguments: list[str], message: str
) -> None:
    import re

    run = started(finished, tmp_path / "run")
    refusal = cli("tokenizer", "--data", run.data, "--out", run.out, *FAST, *arguments, "--json").refusal()
    assert re.search(message, " ".join(refusal.split())), refusal
    assert not (run.out / "tokenizer" / "stage.json").exists()


def test_exporting_before_there_are_sids_says_what_to_run(tmp_path: Path, cli: Cli) -> None:
    assert "run `sidrec-train tokenizer" in cli("export-sids", "--out", tmp_path, tmp_path / "sids.json").refusal()


def test_held_out_events_change_no_sid(finished: Run, tmp_path: Path, cli: Cli) -> None:
    """Every user's last event, the test target, becomes another item: SIDs that learn from users stay the same."""
    changed = tmp_path / "data"
    shutil.copytree(finished.data, changed)
    with (changed / "interactions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last = {row["user_id"]: place for place, row in enumerate(rows) if row["event_type"] != "impression"}
    items = [rows[place]["item_id"] for place in last.values()]
    for place, item in zip(last.values(), items[1:] + items[:1], strict=True):
        rows[place]["item_id"] = item
    with (changed / "interactions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    one, two = (Run(data, tmp_path / name, finished.outcome) for name, data in (("a", finished.data), ("b", changed)))
    for run in (one, two):
        tokenizer(cli, run, "--method", "letter-coba", "cointeraction_weight=0.1")
    assert (one.out / "data" / "events.parquet").read_bytes() != (two.out / "data" / "events.parquet").read_bytes()
    assert codes_of(one.out) == codes_of(two.out)
