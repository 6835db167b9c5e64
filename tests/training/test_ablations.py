"""The ablations, on tiny data: what it runs, what it leaves alone, and what a failing row costs."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.ablations import OWN_STAGES, PROFILES, SHARED_STAGES, STEP_ROWS, main
from tests.training.conftest import SMALL, Run
from training.pipeline import load_config
from training.stage import STAGE_FILE

TINY = [*SMALL, "sft.max_epochs=1", "tokenizer.codebook_size=8"]
ROWS = [
    "--row",
    "again tokenizer.method=residual-kmeans tokenizer.kmeans_restarts=1",
    "--row",
    "bad tokenizer.method=none",
]


def times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob(f"*/*/*/{STAGE_FILE}")}


def test_rows_share_their_base_a_failing_one_is_told_and_a_second_call_does_nothing(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "matrix"
    common = ["--data", str(finished.data), "--out", str(out), "--base", str(finished.out), "--seeds", "0", *ROWS]
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}
    assert main([*common, "--rows", "residual-kmeans,bad,again", "--json", *TINY]) == 1
    written = capsys.readouterr()
    results = json.loads(written.out)
    assert results == json.loads((out / "results.json").read_text())
    assert results["failed"] == ["bad/0"]
    assert "tokenizer.method='none': Input should be" in (out / "bad" / "0.log").read_text()
    assert [row["name"] for row in results["comparison"]["rows"]] == ["residual-kmeans", "again"]
    assert results["comparison"]["num_users"] == 60
    assert set(results["runs"]["again"]["0"]) == set(OWN_STAGES)
    assert results["runs"]["again"]["0"]["sft"]["epochs"] == 1
    assert all((out / "again" / "0" / stage).resolve() == finished.out / stage for stage in SHARED_STAGES)
    after = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} <= {".fingerprint"}

    made = times(out)
    assert main([*common, "--rows", "residual-kmeans", "--workers", "1", *TINY]) == 0
    assert times(out) == made
    capsys.readouterr()

    assert main([*common, "--rows", "again,residual-kmeans", "--summarise", "--json", *TINY]) == 0
    summarised = json.loads(capsys.readouterr().out)
    assert summarised["comparison"]["reference"] == "again"
    assert summarised["runs"] == {row: results["runs"][row] for row in ("again", "residual-kmeans")}

    assert main([*common, "--rows", "again", "--summarise", "--json", *TINY, "sft.max_epochs=2"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == {}, "runs of other settings do not count"


def test_rows_about_steps_differ_from_the_plain_one_as_they_say(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is a valid configuration of its own; two of them are run."""
    configs = {row: load_config("default", PROFILES["scientific-steps"] | own).sft for row, own in STEP_ROWS.items()}
    assert len({config.model_dump_json() for config in configs.values()}) == len(STEP_ROWS)
    common = ["--data", str(finished.data), "--out", str(tmp_path), "--base", str(finished.out), "--seeds", "0"]
    fast = [*TINY, "tokenizer.max_epochs=1", "--profile", "scientific-steps", "--rows", "plain,full", "--json"]
    assert main([*common, *fast]) == 0
    plain, full = json.loads(capsys.readouterr().out)["comparison"]["rows"]
    assert (plain["name"], full["name"]) == ("plain", "full")
    assert full["target_log_likelihood"]["mean"] != plain["target_log_likelihood"]["mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "letter-released"], "no row letter-released (letter-released needs --released FILE): name some of"),
        (["--rows", "random,nonsense"], "no row nonsense: name some of rqvae, random, residual-kmeans"),
        (["sft.max_epochs"], "'sft.max_epochs' is not KEY=VALUE"),
        (["--base", "nowhere"], "--base nowhere has no finished data, vectors, collaborative: wait for it"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
