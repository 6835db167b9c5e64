"""`service.experiments.assignment`: uniform, independent, exclusive, sticky. Seeds and salts are fixed."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from service.experiments.assignment import Assigner, Assignment, merged_overrides
from service.experiments.config import Experiment, ExperimentsConfig, Layer, Variant, VariantOverrides

USERS = [f"user-{number}" for number in range(20_000)]


def experiment(
    name: str, start: float = 0.0, end: float = 1.0, weights: Sequence[float] = (1.0, 1.0), salt: str | None = None
) -> Experiment:
    variants = tuple(
        Variant(name=f"v{number}", weight=weight, control=number == 0) for number, weight in enumerate(weights)
    )
    return Experiment(name=name, salt=salt, traffic=(start, end), variants=variants)


def assigner(*layers: Layer) -> Assigner:
    return Assigner(ExperimentsConfig(layers=layers))


def only(one: Experiment) -> Assigner:
    return assigner(Layer(name="layer", experiments=(one,)))


def variants(found: Assigner) -> list[str | None]:
    assigned = (found.assign(user) for user in USERS)
    return [one[0].variant if one else None for one in assigned]


def test_an_assignment_is_a_function_of_names_and_user_alone():
    """Written down: any other value would move the users of running experiments."""
    found = only(experiment("e", weights=(1, 1, 1)))
    assert [found.assign(user)[0].variant for user in ("u1", "u2", "u3", "u4", "用户", "\ud800")] == [
        "v1",
        "v2",
        "v2",
        "v0",
        "v0",
        "v1",
    ]


@pytest.mark.parametrize("salt", ["a", "b", "salt", "2026"])
def test_variants_get_their_shares(salt):
    weights = (5.0, 3.0, 1.5, 0.5)
    counts = Counter(variants(only(experiment("e", weights=weights, salt=salt))))
    expected = [weight / 10 * len(USERS) for weight in weights]
    assert stats.chisquare([counts[f"v{number}"] for number in range(4)], expected).pvalue > 0.001


@pytest.mark.parametrize("name", ["engine", "ranking", "a", "b"])
def test_points_of_a_layer_are_uniform(name):
    tenths = [experiment(f"e{tenth}", tenth / 10, (tenth + 1) / 10) for tenth in range(10)]
    found = assigner(Layer(name=name, experiments=tuple(tenths)))
    counts = Counter(found.assign(user)[0].experiment for user in USERS)
    assert sum(counts.values()) == len(USERS), "the intervals leave no gap"
    assert stats.chisquare([counts[f"e{tenth}"] for tenth in range(10)]).pvalue > 0.001


def independent(pairs: list[tuple[str, str]]) -> bool:
    counts = Counter(pairs)
    rows, columns = sorted({row for row, _ in pairs}), sorted({column for _, column in pairs})
    table = [[counts[row, column] for column in columns] for row in rows]
    return bool(stats.chi2_contingency(table).pvalue > 0.001)


def test_layers_know_nothing_of_each_other():
    parts = [(f"{number}", number / 4, (number + 1) / 4) for number in range(4)]
    layers = [
        Layer(name=name, experiments=tuple(experiment(f"{name}{part}", start, end) for part, start, end in parts))
        for name in ("x", "y")
    ]
    both = assigner(*layers)
    found = [both.assign(user) for user in USERS]
    assert independent([(one.experiment, other.experiment) for one, other in found])
    assert independent([(one.variant, other.variant) for one, other in found])
    assert independent([(one.experiment, other.variant) for one, other in found])
    assert independent([(one.experiment, one.variant) for one, _ in found])


def test_another_salt_shuffles_anew():
    one, other = (variants(only(experiment("e", salt=salt))) for salt in ("one", "other"))
    assert independent([(str(first), str(second)) for first, second in zip(one, other, strict=True)])


@given(
    start=st.floats(0.0, 0.8),
    ends=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=4),
)
def test_a_ramp_keeps_everyone_who_was_in_with_their_variant(start, ends, weights):
    reached = sorted(max(start + 0.01, end) for end in ends)
    before: dict[str, str] = {}
    for end in reached:
        found = only(experiment("e", start, min(1.0, end), weights))
        now = {user: one[0].variant for user in USERS[:300] if (one := found.assign(user))}
        assert before.items() <= now.items()
        before = now


def test_a_ramp_and_a_stop_move_nobody_else():
    neighbour = experiment("neighbour", 0.5, 1.0)
    states = [
        (experiment("e", 0.0, 0.1), neighbour),
        (experiment("e", 0.0, 0.5), neighbour),
        (experiment("e", 0.0, 0.5).model_copy(update={"status": "stopped"}), neighbour),
        (neighbour,),
    ]
    seen = []
    for experiments in states:
        found = assigner(Layer(name="layer", experiments=experiments))
        assigned = {user: one[0] for user in USERS[:2_000] if (one := found.assign(user))}
        seen.append({user: one.variant for user, one in assigned.items() if one.experiment == "neighbour"})
    assert seen[0]
    assert all(others == seen[0] for others in seen)


def test_experiments_of_a_layer_share_no_user():
    found = assigner(
        Layer(name="layer", experiments=(experiment("low", 0.0, 0.3), experiment("high", 0.3, 0.6))),
        Layer(name="other", experiments=(experiment("everyone"),)),
    )
    counts = Counter(tuple(one.experiment for one in found.assign(user)) for user in USERS)
    assert set(counts) == {("low", "everyone"), ("high", "everyone"), ("everyone",)}
    assert counts["low", "everyone"] == pytest.approx(0.3 * len(USERS), rel=0.05)


def test_nobody_and_a_stopped_experiment_are_not_assigned():
    running, stopped = experiment("e"), experiment("e").model_copy(update={"status": "stopped"})
    assert only(running).assign(None) == ()
    assert only(stopped).assign("u") == ()
    assert assigner().assign("u") == ()


def test_overrides_of_all_layers_are_one():
    both = [
        Assignment("one", "e", "v", VariantOverrides(beam_width=5, reasoning=False)),
        Assignment("two", "f", "w", VariantOverrides(diversity=0.5)),
        Assignment("three", "g", "control", VariantOverrides()),
    ]
    assert merged_overrides(both) == VariantOverrides(beam_width=5, reasoning=False, diversity=0.5)
    assert merged_overrides([]) == VariantOverrides()
