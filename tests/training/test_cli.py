"""The command line: exit codes, one JSON object, one plain message for every mistake, and help that teaches."""

import csv
import json
from pathlib import Path

import pytest

from tests.training.conftest import Cli, Run, run_command, write_data
from training.cli import STAGE_HELP
from training.pipeline import STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_prints_its_own_summary_as_json(finished: Run, cli: Cli, stage: str) -> None:
    summary = cli(stage, *finished.args(), "--json").json
    assert summary == json.loads((finished.out / stage / "stage.json").read_text())["summary"]


@pytest.mark.parametrize("stage", STAGES)
def test_without_json_the_same_is_a_table(finished: Run, cli: Cli, stage: str) -> None:
    shown = cli(stage, *finished.args())
    assert shown.code == 0
    assert stage in shown.stdout
    for key, value in json.loads((finished.out / stage / "stage.json").read_text())["summary"].items():
        assert key in shown.stdout or value == {}


def test_the_module_is_the_command_and_a_mistake_is_one_message_without_a_traceback(tmp_path):
    outcome = run_command("pipeline", "--data", tmp_path / "nowhere", "--out", tmp_path / "run", "--json")
    assert f"{tmp_path / 'nowhere'} is not a directory; give the one with interactions.*" in outcome.refusal()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sft.max_epoch=5"], "unknown key sft.max_epoch (known: base_model, architecture"),
        (["sftt.max_epochs=5"], "override 'sftt.max_epochs': write stage.key=value"),
        (["sft.max_epochs=many"], "sft.max_epochs='many': Input should be a valid integer"),
        (["sft.max_epochs"], "'sft.max_epochs' is not KEY=VALUE, such as sft.max_epochs=5"),
        (["=5"], "override '': write stage.key=value"),
        (["sft.max_epochs=[1"], "override sft.max_epochs='[1' is not a value"),
        (["--config", "no-such.yaml"], "name one of best, default, demo, or a YAML file"),
        (["sft.hidden_size=32", "sft.num_heads=5"], "sft.hidden_size=32 is not a multiple of sft.num_heads=5"),
    ],
)
def test_a_mistake_in_the_settings_is_one_plain_message(finished, cli, tmp_path, overrides, message):
    copied = finished.copy(tmp_path / "run")
    refusal = cli("pipeline", *copied.args(*overrides)).refusal()
    assert message in refusal
    assert "[/" not in refusal


def test_a_key_without_a_stage_is_the_commands_own(finished, cli, tmp_path):
    refusal = cli("sft", *finished.args("max_epochs=0")).refusal()
    assert "sft.max_epochs=0: Input should be greater than 0" in refusal


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("items.csv", None),
        ("interactions.csv", None),
        ("interactions.csv", ""),
        ("items.csv", "item_id,name\n1,x\n"),
        ("interactions.csv", "user,item\n1,2\n"),
    ],
)
def test_files_that_are_missing_empty_or_foreign_are_named(cli, tmp_path, name, content):
    data = write_data(tmp_path / "data")
    (data / name).unlink() if content is None else (data / name).write_text(content)
    refusal = cli("data", "--data", data, "--out", tmp_path / "run").refusal()
    assert name.split(".")[0] in refusal
    assert str(data) in refusal


def test_long_paths_in_messages_are_not_broken_into_lines(cli, tmp_path, monkeypatch):
    path = tmp_path / ("deep" * 50)
    monkeypatch.setenv("COLUMNS", "80")
    assert str(path) in cli("data", "--data", path, "--out", tmp_path / "run").refusal()


def test_bad_rows_stop_with_file_row_value_and_remedy_and_may_be_skipped(cli, tmp_path):
    data = write_data(tmp_path / "data")
    path = data / "interactions.csv"
    rows = path.read_text().splitlines()
    rows[3] = "user 0,g0/0,yesterday,click"
    rows[7] = "user 0,no-such-item,1700000000,click"
    path.write_text("\n".join(rows) + "\n")
    args = ["--data", data, "--out", tmp_path / "run", "--json"]
    refusal = cli("data", *args).refusal()
    assert "interactions.csv, line 4, timestamp: unreadable timestamp: 'yesterday'" in refusal
    assert "interactions.csv, line 8, item_id: unknown item: 'no-such-item'" in refusal
    assert "write it as 1719830000 or 2024-07-01T10:33:20Z" in refusal
    assert "--skip-bad-rows" in refusal
    summary = cli("data", *args, "--skip-bad-rows").json
    assert summary["skipped_rows"] == {"unreadable timestamp": 1, "unknown item": 1}
    with (tmp_path / "run" / "data" / "skipped_rows.csv").open(newline="") as file:
        assert [(row["row"], row["value"]) for row in csv.DictReader(file)] == [
            ("4", "yesterday"),
            ("8", "no-such-item"),
        ]


@pytest.mark.parametrize("command", [*STAGE_HELP, "pipeline"])
def test_the_help_of_every_command_says_what_it_does_and_what_it_takes(cli, command):
    shown = cli(command, "--help")
    assert shown.code == 0
    text = " ".join(shown.stdout.replace("│", " ").split())
    assert STAGE_HELP.get(command, "Run every stage, publish the bundle") in text
    for taught in ("KEY=VALUE", "--data", "--out", "--config", "--json", "--skip-bad-rows", "sft.max_epochs=5"):
        assert taught in text
    assert f"settings {command}" in text or command == "pipeline"


def test_the_help_of_the_program_names_every_command_and_the_format_of_the_data(cli):
    shown = cli("--help")
    assert shown.code == 0
    for taught in (*STAGE_HELP, "pipeline", "compare", "settings", "demo-data", "interactions.csv", "item_id, title"):
        assert taught in " ".join(shown.stdout.split())


def test_the_settings_of_a_stage_are_listed_and_an_unknown_stage_is_an_error(cli):
    shown = cli("settings", "sft")
    assert shown.code == 0
    assert "sft.base_model" in shown.stdout
    assert "'sftt' is not a stage: name one of data, vectors" in cli("settings", "sftt").refusal()


@pytest.mark.parametrize("args", [[], ["no-such-command"], ["data"], ["data", "--data", "x"]])
def test_a_command_that_is_not_whole_shows_its_usage(cli, args):
    shown = cli(*args)
    assert shown.code == 2
    assert "Usage" in shown.stdout + shown.stderr


def test_an_output_that_is_a_file_is_refused(cli, tiny_data, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    refusal = cli("data", "--data", tiny_data, "--out", tmp_path / "run").refusal()
    assert f"the run folder {tmp_path / 'run'} cannot be made (File exists): give another" in refusal
