"""The pipeline: what is done, what is not done again, and what a configuration may say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training.conftest import SMALL, Cli, Run, write_data
from training.pipeline import STAGES, PipelineConfig, load_config
from training.stage import StageError


def stage_times(out: Path) -> dict[str, int]:
    return {stage: (out / stage / "stage.json").stat().st_mtime_ns for stage in STAGES}


def redone(run: Run, before: dict[str, int]) -> list[str]:
    return [stage for stage, time in stage_times(run.out).items() if time != before[stage]]


def test_one_command_does_everything_and_prints_one_json_object(finished):
    assert finished.outcome.json["num_users"] == 60
    assert {path.name for path in finished.out.iterdir()} == {*STAGES, "bundles", "config.yaml"}
    for stage in STAGES:
        assert json.loads((finished.out / stage / "stage.json").read_text())["summary"]


def test_the_second_run_does_nothing_and_says_the_same(finished, cli, tmp_path):
    copied = finished.copy(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in copied.out.rglob("*") if path.name != ".fingerprint"}
    again = cli("pipeline", *copied.args(), "--json")
    assert again.json == finished.outcome.json
    after = {path: path.stat().st_mtime_ns for path in copied.out.rglob("*") if path.name != ".fingerprint"}
    changed = {path.relative_to(copied.out).as_posix() for path in after if after[path] != before.get(path)}
    assert changed <= {"config.yaml", *STAGES}  # a folder's own time changes with its renewed .fingerprint
    assert after.keys() == before.keys()
    assert again.stderr == ""  # no bar: nothing was done


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("sft.seed=1", ["sft", "evaluate", "publish"]),
        ("evaluate.seed=1", ["evaluate", "publish"]),
        ("tokenizer.seed=1", ["tokenizer", "sft", "evaluate", "publish"]),
        ("collaborative.knn_window=3", ["collaborative", "evaluate", "publish"]),
    ],
)
def test_a_changed_setting_redoes_its_stage_and_those_behind_it(finished, cli, tmp_path, override, stages):
    copied = finished.copy(tmp_path / "run")
    before = stage_times(copied.out)
    assert cli("pipeline", *copied.args(override), "--json").code == 0
    assert redone(copied, before) == stages
    key, _, value = override.partition("=")
    stage, _, field = key.partition(".")
    assert yaml.safe_load((copied.out / "config.yaml").read_text())[stage][field] == int(value)


def test_item_memory_and_a_teacher_come_from_the_stages_that_know_them(finished, cli, tmp_path):
    """Once they are used, what they are made from is part of what the model is made from."""
    copied = finished.copy(tmp_path / "run")
    asked = ("sft.item_memory=true", "sft.distillation=0.5", "sft.max_epochs=1")
    summary = cli("sft", *copied.args(*asked), "--json").json
    plain = json.loads((finished.out / "sft" / "stage.json").read_text())["summary"]
    assert summary["num_parameters"] != plain["num_parameters"]
    before = stage_times(copied.out)
    assert cli("pipeline", *copied.args(*asked, "collaborative.knn_window=3"), "--json").code == 0
    assert redone(copied, before) == ["collaborative", "sft", "evaluate", "publish"]


def test_changed_data_are_noticed(finished, cli, tmp_path):
    data = write_data(tmp_path / "data")
    args = ["--data", data, "--out", tmp_path / "run", "--json"]
    first = cli("data", *args).json
    with (data / "interactions.csv").open("a") as file:
        file.write("user 0,g0/0,1800000000,click\n")
    assert cli("data", *args).json["num_events"] == first["num_events"] + 1


def test_any_stage_may_be_called_first_and_makes_what_it_needs_and_no_more(cli, tiny_data, tmp_path):
    args = ["--data", tiny_data, "--out", tmp_path / "run", *(o for o in SMALL if o.startswith("collaborative."))]
    summary = cli("collaborative", *args, "seed=5", "--json").json
    assert {"epochs", "popularity", "item_knn", "sasrec"} <= summary.keys()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"data", "collaborative", "config.yaml"}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["collaborative"]["seed"] == 5


def test_the_configuration_that_a_run_wrote_makes_the_same_run(finished, cli, tmp_path):
    copied = finished.copy(tmp_path / "run")
    before = stage_times(copied.out)
    config = shutil.copy(copied.out / "config.yaml", tmp_path / "again.yaml")
    args = ["--data", copied.data, "--out", copied.out, "--config", config]
    assert cli("pipeline", *args, "--json").json == finished.outcome.json
    assert redone(copied, before) == []


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("sft: {max_epochs: 7, num_layers: 2}\n")
    config = load_config(str(path), {"sft.max_epochs": "9", "sft.learning_rate": "1e-3"})
    defaults = PipelineConfig()
    assert (config.sft.max_epochs, config.sft.num_layers, config.sft.learning_rate) == (9, 2, 0.001)
    assert config.sft.hidden_size == defaults.sft.hidden_size
    assert config.content_hash != defaults.content_hash
    assert load_config("default", {}) == defaults
    assert load_config("default", {}).content_hash == defaults.content_hash


@pytest.mark.parametrize("name", ["default", "demo"])
def test_the_packaged_configurations_are_valid(name):
    assert load_config(name, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sftt: {}", r"unknown key sftt \(known: data, vectors, collaborative, tokenizer, sft, evaluate, publish\)"),
        ("sft: {max_epoch: 3}", r"unknown key sft.max_epoch \(known: base_model, architecture, hidden_size, .*"),
        ("sft: {max_epochs: many}", "sft.max_epochs='many': Input should be a valid integer"),
        ("sft: {dropout: 1}", "sft.dropout=1: Input should be less than 1"),
        ("sft: {architecture: gpt2}", "sft.architecture='gpt2': Input should be 'llama' or 'qwen3'"),
        ("sft: {max_epochs: 0, dropout: 2}", "sft.dropout=2: .*; sft.max_epochs=0: |sft.max_epochs=0: .*dropout=2: "),
        ("- sft", "not a mapping of stages"),
        ("sft: 3", "sft=3: "),
        ("sft: [", "no configuration"),
    ],
)
def test_a_configuration_that_is_wrong_says_where(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(StageError, match=message):
        load_config(str(path), {})


@pytest.mark.parametrize("content", ["", "{}", "sft:", "# nothing\n"])
def test_an_empty_configuration_or_section_is_the_defaults(tmp_path, content):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    assert load_config(str(path), {}) == PipelineConfig()
    assert load_config(str(path), {"sft.max_epochs": "3"}).sft.max_epochs == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sft": "3"}, "override 'sft': write stage.key=value, with a stage of data, vectors"),
        ({"tokeniser.seed": "3"}, "override 'tokeniser.seed': write stage.key=value"),
        ({"sft.max_epochs": "["}, r"override sft.max_epochs='\[' is not a value"),
        ({"sft.seed": ""}, "sft.seed=None: Input should be a valid integer"),
        ({"sft.seed.x": "1"}, "unknown key sft.seed.x"),
    ],
)
def test_an_override_that_is_wrong_says_how_to_write_it(overrides, message):
    with pytest.raises(StageError, match=message):
        load_config("default", overrides)


def test_training_reads_no_test_target(finished, cli, tmp_path):
    """Other test targets for everybody: the data differ, and yet the model learns the same weights."""
    data = tmp_path / "data"
    shutil.copytree(finished.data, data)
    assert_same_training(finished, cli, data, tmp_path / "run")


def assert_same_training(finished: Run, cli: Cli, data: Path, out: Path) -> None:
    rows = (data / "interactions.csv").read_text().splitlines()
    last_of_user: dict[str, int] = {}
    for place, row in enumerate(rows[1:], start=1):
        user, _, _, kind = row.split(",")
        if kind != "impression":
            last_of_user[user] = place
    for place in last_of_user.values():
        user, _, timestamp, kind = rows[place].split(",")
        rows[place] = f"{user},g0/0,{timestamp},{kind}"
    (data / "interactions.csv").write_text("\n".join(rows) + "\n")
    own = Run(data, out, finished.outcome)
    cli("data", *own.args())
    summary: dict[str, Any] = cli("collaborative", *own.args(), "--json").json
    expected = json.loads((finished.out / "collaborative" / "stage.json").read_text())["summary"]
    summary.pop("seconds")
    expected.pop("seconds")
    assert summary == expected
