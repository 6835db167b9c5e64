"""`service.experiments.config`: what a configuration may say, and what may follow it."""

import json
from pathlib import Path
from typing import Any

import pytest

from service.experiments.config import Experiment, ExperimentsConfig, ExperimentsConfigError

VALID = """
layers:
  - name: decoding
    experiments:
      - name: wide-beam
        traffic: [0, 0.1]
        started_at: 2026-11-22T10:00:00Z
        minimum_lift: 0.05
        variants:
          - {name: control, control: true}
          - {name: wide, weight: 2, overrides: {beam_width: 50, diversity: 0}}
      - name: thought
        salt: second try
        traffic: [0.1, 0.5]
        primary_metric: conversion
        variants:
          - {name: off, control: true, overrides: {reasoning: false}}
          - {name: "on", overrides: {reasoning: true, rationale: true}}
  - name: models
    experiments:
      - name: new-bundle
        traffic: [0, 1]
        variants:
          - {name: control, control: true}
          - {name: new, overrides: {bundle: 20261122T100000Z-0123456789ab, rerank: false}}
""".replace("name: off", 'name: "off"')


def experiment(name: str = "e", **fields: Any) -> Experiment:
    content = {"name": name, "traffic": [0.0, 0.5], "variants": [{"name": "a", "control": True}, {"name": "b"}]}
    return Experiment.model_validate(content | fields)


def overriding(**overrides: Any) -> list[dict[str, Any]]:
    return [{"name": "a", "control": True}, {"name": "b", "overrides": overrides}]


def known(config: ExperimentsConfig, name: str = "e") -> Experiment:
    found = config.experiment(name)
    assert found is not None
    return found


def load(folder: Path, text: str) -> ExperimentsConfig:
    path = folder / "experiments.yaml"
    path.write_text(text, encoding="utf-8")
    return ExperimentsConfig.load(path)


def test_a_yaml_file_says_it_all(tmp_path):
    config = load(tmp_path, VALID)
    assert [layer.name for layer in config.layers] == ["decoding", "models"]
    found = known(config, "wide-beam")
    assert found.traffic == (0.0, 0.1)
    assert found.effective_salt == "wide-beam"
    assert found.control.name == "control"
    assert found.variants[1].overrides.fields() == {"beam_width", "diversity"}
    assert known(config, "thought").effective_salt == "second try"
    assert config.experiment("none") is None


def test_an_empty_file_is_no_experiments(tmp_path):
    assert load(tmp_path, "") == ExperimentsConfig()


def test_the_documentation_s_example_is_one(tmp_path):
    documentation = (Path(__file__).parents[3] / "docs/ab-tests.md").read_text(encoding="utf-8")
    example = documentation.split("```yaml\n")[1].split("```")[0]
    config = load(tmp_path, example)
    assert known(config, "wide-beam").minimum_lift == 0.1
    assert known(config, "thought").control.overrides.reasoning is False


def test_json_gives_it_back(tmp_path):
    config = load(tmp_path, VALID)
    assert ExperimentsConfig.parse(config.model_dump_json()) == config
    assert ExperimentsConfig.model_validate(json.loads(config.model_dump_json())) == config


_OVERRIDES = "layers[0].experiments[0].variants[1].overrides"
BROKEN = [
    ("traffic: [0, 0.1]", "traffic: [0, 1.5]", "layers[0].experiments[0].traffic[1]", "less than or equal to 1"),
    ("traffic: [0, 0.1]", "traffic: [0.1, 0.1]", "layers[0].experiments[0]", "traffic [0.1, 0.1) is empty"),
    ("traffic: [0, 0.1]", "traffic: 0.1", "layers[0].experiments[0].traffic", "tuple"),
    ("traffic: [0, 0.1]", "trafic: [0, 0.1]", "layers[0].experiments[0].trafic", "not permitted"),
    ("traffic: [0, 0.1]", "traffic: [0, 0.2]", "layers[0]", "'wide-beam' [0, 0.2) and 'thought' [0.1, 0.5) overlap"),
    ("beam_width: 50", 'beam_width: "50"', "layers[0].experiments[0].variants[1].overrides.beam_width", "integer"),
    ("beam_width: 50", "beam_width: 501", "layers[0].experiments[0].variants[1].overrides.beam_width", "500"),
    ("diversity: 0", "diversity: .nan", "layers[0].experiments[0].variants[1].overrides.diversity", "finite"),
    ("{beam_width: 50,", "{beam: 50,", "layers[0].experiments[0].variants[1].overrides.beam", "not permitted"),
    ("weight: 2", "weight: 0", "layers[0].experiments[0].variants[1].weight", "greater than 0"),
    ("weight: 2", "control: true", "layers[0].experiments[0]", "exactly one variant"),
    ("{name: wide,", "{name: control,", "layers[0].experiments[0]", "more than one variant is named 'control'"),
    ("name: wide-beam", "name: Wide Beam", "layers[0].experiments[0].name", "pattern"),
    ("name: thought", "name: wide-beam", "", "more than one experiment is named 'wide-beam'"),
    ("name: models", "name: decoding", "", "more than one layer is named 'decoding'"),
    ("10:00:00Z", "10:00:00", "layers[0].experiments[0].started_at", "timezone"),
    ("salt: second try", "salt: new-bundle", "", "share the salt 'new-bundle'"),
    ("rerank: false", "beam_width: 5", "", "'wide-beam' and 'new-bundle' of different layers both override beam_width"),
    ("rerank: false", "rerank: true", "", "experiments 'new-bundle' (rerank) and 'thought' (reasoning) of different"),
    ("diversity: 0", "diversity: 0.5, rerank: true", _OVERRIDES, "`rerank: true` with diversity makes no sense"),
    ("diversity: 0", "reasoning: true, rerank: true", _OVERRIDES, "`rerank: true` with reasoning makes no sense"),
    (
        "bundle: 20261122T100000Z-0123456789ab",
        "bundle: ../x",
        "layers[1].experiments[0].variants[1].overrides.bundle",
        "pattern",
    ),
]


@pytest.mark.parametrize(("sound", "broken", "field", "rule"), BROKEN, ids=[one[1] for one in BROKEN])
def test_a_broken_rule_is_told_with_file_field_and_rule(tmp_path, sound, broken, field, rule):
    assert sound in VALID
    with pytest.raises(ExperimentsConfigError) as failure:
        load(tmp_path, VALID.replace(sound, broken, 1))
    assert str(tmp_path / "experiments.yaml") in str(failure.value)
    assert field in [problem.field for problem in failure.value.problems]
    assert rule in str(failure.value)


@pytest.mark.parametrize("text", ["layers: [", "layers: []\nlayers: []", "- a", "\0"])
def test_what_is_no_such_yaml_is_told_with_the_file(tmp_path, text):
    with pytest.raises(ExperimentsConfigError, match=r"experiments\.yaml: "):
        load(tmp_path, text)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ExperimentsConfigError, match="No such file"):
        ExperimentsConfig.load(tmp_path / "none.yaml")


def test_stopped_experiments_free_their_interval_and_their_fields():
    stopped = experiment("old", status="stopped", variants=overriding(rerank=True))
    config = ExperimentsConfig().with_experiment("one", stopped).with_experiment("one", experiment("new"))
    config = config.with_experiment("two", experiment("other", variants=overriding(rerank=True)))
    with pytest.raises(ExperimentsConfigError, match="overlap"):
        config.with_experiment("one", stopped.model_copy(update={"status": "running"}))


def test_the_admin_api_meets_the_same_rules():
    config = ExperimentsConfig().with_experiment("one", experiment("e"))
    with pytest.raises(ExperimentsConfigError, match=r"'e' \[0, 0.5\) and 'f' \[0.4, 0.6\) overlap"):
        config.with_experiment("one", experiment("f", traffic=[0.4, 0.6]))
    both = config.with_experiment("one", experiment("f", traffic=[0.5, 1.0]))
    assert [one.name for one in both.layers[0].experiments] == ["e", "f"]
    assert both.without("f") == config
    with pytest.raises(ExperimentsConfigError, match="no experiment 'g'"):
        both.without("g")


def test_a_ramp_may_grow_and_an_experiment_may_stop():
    config = ExperimentsConfig().with_experiment("one", experiment(traffic=[0.1, 0.2]))
    for change in ({"traffic": (0.1, 0.9)}, {"status": "stopped"}, {"primary_metric": "conversion"}):
        config = config.with_experiment("one", known(config).model_copy(update=change))
    assert known(config).traffic == (0.1, 0.9)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"traffic": [0.0, 0.4]}, "traffic"),
        ({"traffic": [0.05, 0.5]}, "traffic"),
        ({"salt": "other"}, "salt"),
        ({"minimum_lift": 0.2}, "minimum_lift"),
        ({"variants": [{"name": "b"}, {"name": "a", "control": True}]}, "variants"),
        ({"variants": [{"name": "a", "control": True}, {"name": "b", "weight": 2}]}, "variants"),
        ({"variants": overriding(rerank=True)}, "variants"),
    ],
)
def test_a_change_that_moves_users_is_refused(change, field):
    config = ExperimentsConfig().with_experiment("one", experiment())
    with pytest.raises(ExperimentsConfigError) as failure:
        config.with_experiment("one", experiment(**change))
    assert [problem.field for problem in failure.value.problems] == [f"one.e.{field}"]


def test_an_experiment_does_not_change_its_layer():
    config = ExperimentsConfig().with_experiment("one", experiment())
    with pytest.raises(ExperimentsConfigError, match="more than one experiment is named 'e'"):
        config.with_experiment("two", experiment())
    with pytest.raises(ExperimentsConfigError, match="it was in layer 'one'"):
        ExperimentsConfig().with_experiment("two", experiment()).check_follows(config)
