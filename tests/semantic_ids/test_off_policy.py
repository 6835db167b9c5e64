"""Off-policy estimates: by hand, and from simulated logs whose truth is known.

`python -m tests.semantic_ids.test_off_policy` prints the table of docs/exploration.md.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidSpace
from semantic_ids.decoding.exploration import Exploration
from semantic_ids.filters import ItemFilter
from semantic_ids.off_policy import Estimate, OffPolicyError, ips_estimate, self_normalised_estimate
from tests.semantic_ids.factories import random_catalog
from tests.semantic_ids.test_exploration import TableDecoder, explore, policy_of, rounds, sids_of

Values = npt.NDArray[np.float64]

TABLE_SPACE = SidSpace(num_levels=3, codebook_size=4)
NUM_ITEMS = 62  # under 41 SIDs, up to four of them under one
NUM_ROUNDS = 8_000
NUM_ROUNDS_PRINTED = 20_000


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """How a simulated service explores. Its requests have one of several filters each."""

    temperature: float
    num_items: int
    num_kept: int
    shares: tuple[float, ...]  # of the items that each of the filters leaves

    @property
    def exploration(self) -> Exploration:
        return Exploration(self.temperature, 11, self.num_items, self.num_kept)

    @property
    def filters(self) -> list[ItemFilter]:
        generator = np.random.default_rng(5)
        return [ItemFilter.of(NUM_ITEMS, deny=np.flatnonzero(generator.random(NUM_ITEMS) > s)) for s in self.shares]

    def __str__(self) -> str:
        return f"T {self.temperature}, {self.num_items} items, {self.num_kept} kept, filters {self.shares}"


CASES = [
    Case(1.0, 10, 0, (1.0,)),
    Case(1.0, 4, 0, (1.0, 0.6)),
    Case(0.5, 10, 0, (1.0, 0.4)),
    Case(2.0, 10, 0, (0.6, 0.3, 0.2)),
    Case(1.0, 10, 5, (1.0, 0.6)),
    Case(1.0, 10, 8, (0.5,)),
    Case(0.7, 20, 12, (1.0, 0.5)),
]


@dataclass(frozen=True)
class Truth:
    """What no service knows."""

    catalog: Catalog
    decoder: TableDecoder
    reward: Values  # (N,) the probability of a click, were the item shown


@cache
def truth() -> Truth:
    catalog = random_catalog(TABLE_SPACE, NUM_ITEMS, seed=3)
    reward = np.random.default_rng(4).beta(1, 4, NUM_ITEMS)
    return Truth(catalog, TableDecoder(TABLE_SPACE, seed=2, spread=0.6), reward)


@dataclass(frozen=True)
class Log:
    """What a service would have written, an entry an item shown, and the filter of each round."""

    rank: npt.NDArray[np.int64]
    reward: Values
    propensity: Values
    round_of: npt.NDArray[np.int64]
    num_rounds: int
    filter_of: npt.NDArray[np.int64]  # (n,) of each entry


@cache
def log_of(case: Case, num_rounds: int = NUM_ROUNDS) -> Log:
    """Every filter takes an equal part of the rounds; a click is drawn for every item shown."""
    world, per_filter = truth(), num_rounds // len(case.filters)
    answers = []
    for place, item_filter in enumerate(case.filters):
        exploration = replace(case.exploration, seed=case.exploration.seed + place)
        answers += explore(world.decoder, world.catalog, rounds(per_filter, exploration), item_filter)
    rank = np.concatenate([answer.ranks for answer in answers])
    round_of = np.repeat(np.arange(len(answers)), [len(answer.ranks) for answer in answers])
    propensity = np.concatenate([answer.propensity for answer in answers if answer.propensity is not None])
    clicked = np.random.default_rng(6).random(len(rank)) < world.reward[rank]
    return Log(rank, clicked.astype(np.float64), propensity, round_of, len(answers), round_of // per_filter)


@cache
def best_items(case: Case) -> Values:
    """The other policy, per filter (F, N): 1 for the items that are answered without exploration."""
    shown = np.zeros((len(case.filters), NUM_ITEMS))
    for place, item_filter in enumerate(case.filters):
        [off] = explore(truth().decoder, truth().catalog, [None], item_filter)
        shown[place, off.ranks[: case.num_items]] = 1
    return shown


@cache
def can_be_shown(case: Case) -> Values:
    """Per filter (F, N): 1 for what is kept, and for the first `num_drawn` other eligible items of every SID."""
    found = np.zeros((len(case.filters), NUM_ITEMS))
    for place, item_filter in enumerate(case.filters):
        [off] = explore(truth().decoder, truth().catalog, [None], item_filter)
        kept = set(off.ranks[: case.num_kept].tolist())
        found[place, sorted(kept)] = 1
        eligible = np.flatnonzero(item_filter.contains(np.arange(NUM_ITEMS)))
        num_before: dict[tuple[int, ...], int] = {}
        for rank, sid in zip(eligible.tolist(), sids_of(truth().catalog, eligible), strict=True):
            if rank not in kept:
                found[place, rank] = num_before.get(sid, 0) < case.exploration.num_drawn
                num_before[sid] = num_before.get(sid, 0) + 1
    return found


def estimates(case: Case, log: Log, propensity: Values) -> dict[str, tuple[Estimate, float]]:
    """Every estimate of a log, with the truth."""
    per_item = truth().reward
    reachable, best = can_be_shown(case), best_items(case)
    assert (best <= reachable).all()
    target = best[log.filter_of, log.rank]
    entries = (log.reward, propensity, log.round_of, log.num_rounds)
    mean = (reachable @ per_item).sum() / reachable.sum()
    return {
        "sum over all items": (ips_estimate(*entries), float((reachable @ per_item).mean())),
        "number of items": (
            ips_estimate(np.ones_like(log.reward), *entries[1:]),
            float(reachable.sum(axis=1).mean()),
        ),
        "best items": (ips_estimate(*entries, target=target), float((best @ per_item).mean())),
        "mean of an item": (self_normalised_estimate(*entries), float(mean)),
        "mean of a best item": (
            self_normalised_estimate(*entries, target=target),
            float((best @ per_item).sum() / best.sum()),
        ),
    }


def naive_propensity(case: Case, log: Log) -> Values:
    """What is often taken for it: the policy's probability times the number of places, at most 1."""
    per_item = np.ones((len(case.filters), NUM_ITEMS))
    for place, item_filter in enumerate(case.filters):
        policy = policy_of(truth().decoder, truth().catalog, item_filter, case.temperature)
        for rank in np.flatnonzero(item_filter.contains(np.arange(NUM_ITEMS))).tolist():
            [sid] = sids_of(truth().catalog, np.array([rank]))
            per_item[place, rank] = min(1.0, case.num_items * np.exp(policy[sid]))
    return per_item[log.filter_of, log.rank]


def errors_off(found: Estimate, expected: float) -> float:
    return (found.value - expected) / found.standard_error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_estimate_is_within_three_standard_errors_of_the_truth(case: Case):
    log = log_of(case)
    for name, (found, expected) in estimates(case, log, log.propensity).items():
        assert abs(errors_off(found, expected)) < 3, (name, found, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_errors_are_small_enough_to_see_a_bias(case: Case):
    """Within 5 % of the truth: otherwise three standard errors would show nothing."""
    log = log_of(case)
    for name, (found, expected) in estimates(case, log, log.propensity).items():
        assert found.standard_error < 0.05 * expected, (name, found, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_wrong_propensity_is_found_out(case: Case):
    """The policy's probability times the places, and no correction at all."""
    log = log_of(case)
    naive = estimates(case, log, naive_propensity(case, log))
    assert abs(errors_off(*naive["sum over all items"])) > 6
    assert abs(errors_off(*naive["number of items"])) > 6
    assert errors_off(*estimates(case, log, np.ones_like(log.reward))["sum over all items"]) < -6


def test_a_threshold_one_place_too_early_is_found_out():
    """κ is the best SID *not* drawn: with the last one drawn in its place, as a beam one too narrow would have it."""
    case = CASES[0]
    log = log_of(case)
    narrower = replace(case, num_items=case.num_items - 1)
    wrong = log_of(narrower)
    shown = dict(zip(zip(wrong.round_of.tolist(), wrong.rank.tolist(), strict=True), wrong.propensity, strict=True))
    places = list(zip(log.round_of.tolist(), log.rank.tolist(), strict=True))
    is_in_both = np.array([place in shown for place in places])
    propensity = np.array([shown.get(place, 1.0) for place in places])
    assert is_in_both.mean() > 0.85
    found = estimates(case, log, np.where(is_in_both, propensity, log.propensity))
    assert errors_off(*found["number of items"]) > 6


def test_standard_errors_are_honest():
    """Of 100 logs of 200 rounds each the deviations, in standard errors, have a variance of 1, and no mean."""
    case = CASES[4]
    log = log_of(case)
    expected = float((best_items(case) @ truth().reward).mean())
    target = best_items(case)[log.filter_of, log.rank]
    part_of_round = np.random.default_rng(0).permutation(log.num_rounds) % 100
    for estimate, scale in ((ips_estimate, 1.0), (self_normalised_estimate, 1 / case.num_items)):
        deviations = []
        for part in range(100):
            chosen = np.flatnonzero(part_of_round == part)
            mine = np.isin(log.round_of, chosen)
            found = estimate(
                log.reward[mine],
                log.propensity[mine],
                np.searchsorted(chosen, log.round_of[mine]),
                len(chosen),
                target=target[mine],
            )
            deviations.append(errors_off(found, expected * scale))
        assert abs(np.mean(deviations)) < 0.35
        assert 0.65 < np.var(deviations) < 1.45


def test_items_that_cannot_be_shown_are_not_in_the_sum():
    """One place: of a SID with several eligible items only the first can be drawn."""
    case = Case(1.0, 1, 0, (1.0,))
    log, reachable = log_of(case, 16_000), can_be_shown(case)
    assert reachable.sum() == len(np.unique(truth().catalog.codes, axis=0)) < NUM_ITEMS
    found = ips_estimate(np.ones_like(log.reward), log.propensity, log.round_of, log.num_rounds)
    assert abs(errors_off(found, reachable.sum())) < 3


def test_cut_weights_give_too_little():
    log, expected = log_of(CASES[0]), float(NUM_ITEMS)
    ones = np.ones_like(log.reward)
    cut = ips_estimate(ones, log.propensity, log.round_of, log.num_rounds, max_weight=3.0)
    uncut = ips_estimate(ones, log.propensity, log.round_of, log.num_rounds)
    assert cut.standard_error < uncut.standard_error
    assert errors_off(cut, expected) < -6
    assert cut.largest_weight == 3.0 < uncut.largest_weight


def test_the_estimate_by_hand():
    """Rounds 1/0.5 + 0 = 2, 3/1 = 3 and nothing: mean 5/3, variance 7/3, error sqrt(7/9)."""
    found = ips_estimate([1, 0, 3], [0.5, 0.25, 1.0], [0, 0, 1], 3)
    assert found.value == pytest.approx(5 / 3)
    assert found.standard_error == pytest.approx(np.sqrt(7) / 3)
    assert (found.num_rounds, found.largest_weight) == (3, 4.0)
    assert found.interval(1.0) == pytest.approx((5 / 3 - np.sqrt(7) / 3, 5 / 3 + np.sqrt(7) / 3))


def test_the_value_of_another_policy_by_hand():
    """It shows the first item half of the time, the second never, the third always: 1 · 0.5 / 0.5 and 3."""
    found = ips_estimate([1, 1, 3], [0.5, 0.25, 1.0], [0, 0, 1], 2, target=[0.5, 0, 1])
    assert found.value == pytest.approx(2)


def test_the_self_normalised_estimate_by_hand():
    """Weights 2, 4 and 1, rewards 1, 0 and 3: 5/7; residuals 2 - 6 · 5/7 and 3 - 5/7, over a mean weight of 7/2."""
    found = self_normalised_estimate([1, 0, 3], [0.5, 0.25, 1.0], [0, 0, 1], 2)
    assert found.value == pytest.approx(5 / 7)
    assert found.standard_error == pytest.approx(np.std([2 - 30 / 7, 16 / 7], ddof=1) / np.sqrt(2) / 3.5)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 1), st.integers(0, 9)), min_size=1, max_size=30),
    st.permutations(range(10)),
)
def test_the_order_and_the_names_of_rounds_do_not_matter(entries: list[tuple[float, float, int]], names: list[int]):
    reward, propensity, round_of = zip(*entries, strict=True)
    one = ips_estimate(reward, propensity, round_of, 10)
    renamed = [names[place] for place in round_of]
    other = ips_estimate(reward[::-1], propensity[::-1], renamed[::-1], 10)
    assert one.value == pytest.approx(other.value)
    assert one.standard_error == pytest.approx(other.standard_error)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 1), st.integers(0, 9)), min_size=1, max_size=30))
def test_a_self_normalised_estimate_lies_among_the_rewards(entries: list[tuple[float, float, int]]):
    reward, propensity, round_of = zip(*entries, strict=True)
    found = self_normalised_estimate(reward, propensity, round_of, 10)
    assert min(reward) - 1e-9 <= found.value <= max(reward) + 1e-9


def test_a_log_without_an_entry_is_a_log_of_nothing_gained():
    found = ips_estimate([], [], np.empty(0, np.int64), 5)
    assert (found.value, found.standard_error, found.largest_weight) == (0, 0, 0)


@pytest.mark.parametrize(
    ("reward", "propensity", "round_of", "num_rounds", "message"),
    [
        ([1.0], [0.0], [0], 2, "above 0 and at most 1"),
        ([1.0], [1.1], [0], 2, "above 0 and at most 1"),
        ([1.0], [float("nan")], [0], 2, "above 0 and at most 1"),
        ([float("inf")], [0.5], [0], 2, "rewards are finite"),
        ([1.0], [0.5, 0.5], [0], 2, "one entry an item shown"),
        ([1.0], [0.5], [2], 2, "rounds are 0 to 1"),
        ([1.0], [0.5], [-1], 2, "rounds are 0 to 1"),
        ([1.0], [0.5], [0], 1, "at least two"),
    ],
)
def test_a_log_that_cannot_be_is_refused(
    reward: Sequence[float], propensity: Sequence[float], round_of: Sequence[int], num_rounds: int, message: str
):
    with pytest.raises(OffPolicyError, match=message):
        ips_estimate(reward, propensity, round_of, num_rounds)


def test_targets_and_cuts_that_cannot_be_are_refused():
    with pytest.raises(OffPolicyError, match="not negative"):
        ips_estimate([1.0], [0.5], [0], 2, target=[-0.5])
    with pytest.raises(OffPolicyError, match=r"none can end at 0\.5"):
        ips_estimate([1.0], [0.5], [0], 2, max_weight=0.5)
    with pytest.raises(OffPolicyError, match="says nothing"):
        self_normalised_estimate([1.0], [0.5], [0], 2, target=[0.0])


def main() -> None:
    """The simulation's figures, as a Markdown table."""
    torch.set_num_threads(1)
    write = sys.stdout.write
    write("| case | of | truth | estimate ± standard error | off by | with q · places |\n|---|---|---|---|---|---|\n")
    start = time.perf_counter()
    for case in CASES:
        log = log_of(case, NUM_ROUNDS_PRINTED)
        wrong = estimates(case, log, naive_propensity(case, log))
        for name, (found, expected) in estimates(case, log, log.propensity).items():
            write(
                f"| {case} | {name} | {expected:.4f} | {found.value:.4f} ± {found.standard_error:.4f} "
                f"| {errors_off(found, expected):+.2f} | {errors_off(*wrong[name]):+.1f} |\n"
            )
    seconds = time.perf_counter() - start
    num_sids = len(np.unique(truth().catalog.codes, axis=0))
    write(f"\n{num_sids} SIDs, {NUM_ITEMS} items, {NUM_ROUNDS_PRINTED} rounds a case, {seconds:.0f} s in all\n")


if __name__ == "__main__":
    main()
