"""Exploration in the beam: what is answered, how often, and with which propensity; against enumeration."""

import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidSpace, SidVocabulary
from semantic_ids.decoding.beam import BeamWork, ScoredItems, constrained_beam
from semantic_ids.decoding.exploration import (
    MAX_SEED,
    DiversityWithExplorationError,
    Exploration,
    ExplorationError,
    Perturbed,
    gumbel,
    propensities,
    refuse_both,
)
from semantic_ids.decoding.legal import EmptyAllowedSetError
from semantic_ids.decoding.tree_decoder import TreeRows
from semantic_ids.filters import ItemFilter
from tests.semantic_ids.factories import SPACE, catalog_of, random_catalog
from tests.semantic_ids.test_decoding import ATOL, SPACES, by_rank, decoder_for, random_filter, random_prompts

Sid = tuple[int, ...]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TableState:
    """B prompts of which a table knows nothing."""

    def __init__(self, num_prompts: int) -> None:
        self.root = TreeRows(torch.ones(num_prompts, 1, 0), torch.zeros(num_prompts, 1, dtype=torch.long))
        self.last_hidden = torch.zeros(num_prompts, 1, 1, dtype=torch.float64)


class TableDecoder:
    """A model that is a table: of a row it needs to know the number of its prefix, and no position."""

    def __init__(self, space: SidSpace, seed: int = 0, spread: float = 1.5) -> None:
        self.vocabulary = SidVocabulary(space, 0, space.num_tokens)
        self.device = torch.device("cpu")
        num_prefixes = (space.num_tokens + 1) ** space.num_levels
        generator = torch.Generator().manual_seed(seed)
        self.logits = spread * torch.randn(num_prefixes, space.codebook_size, generator=generator)
        self.num_extensions = 0

    def extend(self, state: TableState, rows: TreeRows, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, TreeRows]:
        self.num_extensions += 1
        prefix = self._number(rows.next_position.gather(1, parents), token_ids)
        return prefix[..., None].double(), TreeRows(rows.visible, prefix)

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        return self.logits[hidden[:, 0].long()]

    def log_probs(
        self, sids: Sequence[Sid], eligible: Sequence[Sid] | None = None, temperature: float = 1
    ) -> list[float]:
        """The score of each SID, or, where some are not eligible or the temperature is not 1, the policy."""
        eligible = sids if eligible is None else eligible
        sums = []
        for sid in sids:
            total, prefix = 0.0, torch.zeros((), dtype=torch.long)
            for level, code in enumerate(sid):
                legal = sorted({other[level] for other in sids if other[:level] == sid[:level]})
                alive = [other in {one[level] for one in eligible if one[:level] == sid[:level]} for other in legal]
                log_p = self.logits[prefix, legal].double().log_softmax(-1)
                policy = (log_p / temperature).masked_fill(~torch.tensor(alive), -torch.inf).log_softmax(-1)
                total += float(policy[legal.index(code)])
                prefix = self._number(prefix, self.vocabulary.block(level).start + torch.tensor(code))
            sums.append(total)
        return sums

    def _number(self, prefix: Tensor, token_ids: Tensor) -> Tensor:
        return prefix * (self.vocabulary.vocab_size + 1) + token_ids + 1


def explore(
    decoder: TableDecoder,
    catalog: Catalog,
    explorations: Sequence[Exploration | None],
    item_filter: ItemFilter | None = None,
    width: int = 50,
    rounds_a_batch: int = 200,
) -> list[ScoredItems]:
    """The answer to each exploration."""
    item_filter = item_filter or ItemFilter.of(len(catalog))
    answers = []
    for start in range(0, len(explorations), rounds_a_batch):
        batch = explorations[start : start + rounds_a_batch]
        filters, widths = [item_filter] * len(batch), [width] * len(batch)
        answers += constrained_beam(decoder, catalog.trie, TableState(len(batch)), filters, widths, exploration=batch)
    return answers


def rounds(num_rounds: int, exploration: Exploration) -> list[Exploration]:
    """The same exploration with a seed of its own each time."""
    seeds = np.random.default_rng(exploration.seed).integers(0, MAX_SEED, num_rounds, np.uint64, endpoint=True)
    return [replace(exploration, seed=int(seed)) for seed in seeds]


def policy_of(decoder: TableDecoder, catalog: Catalog, item_filter: ItemFilter, temperature: float) -> dict[Sid, float]:
    """log q of every eligible SID."""
    sids = [tuple(sid) for sid in np.unique(catalog.codes, axis=0).tolist()]
    eligible = sids_of(catalog, np.flatnonzero(item_filter.contains(np.arange(len(catalog)))))
    of_all = dict(zip(sids, decoder.log_probs(sids, eligible, temperature), strict=True))
    return {sid: of_all[sid] for sid in set(eligible)}


def sids_of(catalog: Catalog, ranks: npt.NDArray[np.int64]) -> list[Sid]:
    return [tuple(sid) for sid in catalog.codes[ranks].tolist()]


def exact_inclusion(
    log_policy: Mapping[Sid, float], items: Mapping[Sid, Sequence[int]], num_drawn: int
) -> dict[int, float]:
    """How often each item is drawn: SIDs one after the other, by q among those left, until their items are enough."""
    inclusion = dict.fromkeys(itertools.chain.from_iterable(items.values()), 0.0)

    def draw(left: frozenset[Sid], shown: tuple[int, ...], probability: float) -> None:
        if not left or len(shown) >= num_drawn:
            for item in shown[:num_drawn]:
                inclusion[item] += probability
            return
        total = sum(np.exp(log_policy[sid]) for sid in left)
        for sid in left:
            draw(left - {sid}, (*shown, *items[sid]), probability * np.exp(log_policy[sid]) / total)

    draw(frozenset(sid for sid in log_policy if items[sid]), (), 1.0)
    return inclusion


NUM_ROUNDS = 6000

SHARED = [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 2, 1], [1, 0, 3], [1, 0, 3], [1, 0, 3], [2, 1, 1], [2, 1, 2], [3, 3, 3]]
"""Seven SIDs with ten items: subtrees of one SID, SIDs of several items."""


@pytest.mark.parametrize(
    ("temperature", "num_items", "num_kept", "deny"),
    [
        (1.0, 1, 0, []),
        (1.0, 4, 0, []),
        (0.5, 3, 0, [3]),
        (2.0, 5, 0, [1, 7]),
        (1.0, 4, 2, []),
        (0.7, 5, 3, [5, 0]),
        (1.0, 8, 7, [2]),
        (1.0, 9, 0, [9]),
    ],
)
def test_items_are_drawn_as_often_as_enumeration_says(
    temperature: float, num_items: int, num_kept: int, deny: list[int]
):
    """And 1 / propensity is 1 on average for every item, with and without the cut inside a SID."""
    catalog, decoder = catalog_of(SHARED, codebook_size=4), TableDecoder(SidSpace(3, 4))
    item_filter = ItemFilter.of(10, deny=np.array(deny, np.int64))
    [off] = explore(decoder, catalog, [None], item_filter)
    kept = off.ranks[:num_kept].tolist()
    items: dict[Sid, list[int]] = {}
    for rank in np.flatnonzero(item_filter.contains(np.arange(10))).tolist():
        items.setdefault(sids_of(catalog, np.array([rank]))[0], []).extend([] if rank in kept else [rank])
    expected = exact_inclusion(policy_of(decoder, catalog, item_filter, temperature), items, num_items - num_kept)
    expected |= dict.fromkeys(kept, 1.0)
    answers = explore(
        decoder, catalog, rounds(NUM_ROUNDS, Exploration(temperature, 7, num_items, num_kept)), item_filter
    )
    shown, weight = np.zeros((2, NUM_ROUNDS, 10))
    for place, answer in enumerate(answers):
        assert answer.propensity is not None
        shown[place, answer.ranks] = 1
        weight[place, answer.ranks] = 1 / answer.propensity
    for rank, probability in expected.items():
        error = np.sqrt(max(probability * (1 - probability), 1e-12) / NUM_ROUNDS)
        assert abs(shown[:, rank].mean() - probability) < 4 * error + 1e-12, (rank, probability)
        if probability > 0.01:  # below, so few draws say nothing
            deviation = abs(weight[:, rank].mean() - 1)
            assert deviation < 4 * weight[:, rank].std() / np.sqrt(NUM_ROUNDS) + 1e-12, (rank, probability)
    assert shown[:, deny].sum() == 0


def test_every_item_is_answered_with_certainty_where_there_are_no_more():
    catalog, decoder = catalog_of(SHARED, codebook_size=4), TableDecoder(SidSpace(3, 4))
    [answer] = explore(decoder, catalog, [Exploration(1.0, 3, 10)])
    assert sorted(answer.ranks.tolist()) == list(range(10))
    assert answer.propensity is not None
    assert answer.propensity.tolist() == [1.0] * 10


def test_the_propensity_of_each_item_by_hand():
    """SIDs A, B, C, D with G 3, 2, 1, 0 and 2, 1, 2, 1 items; 3 places: both of A, then B.

    The first of A goes when the others reach 3 items, at C (1 + 2); the second when they reach 2, at C as well; B when
    they reach 3, at C (2 + 2).
    """
    log_policy = np.log([0.4, 0.3, 0.2, 0.1])
    found = propensities(Perturbed(log_policy, np.array([3.0, 2, 1, 0])), np.array([2, 1, 2, 1]), 3)
    assert found == pytest.approx(1 - np.exp(-np.array([0.4, 0.4, 0.3]) / np.exp(1)))


def test_a_later_item_of_a_sid_needs_more_luck_than_the_first():
    """A has 3 items and 3 places: its items go when the others reach 3, 2 and 1 items: at D, C and B."""
    log_policy = np.log([0.4, 0.3, 0.2, 0.1])
    found = propensities(Perturbed(log_policy, np.array([3.0, 2, 1, 0])), np.array([3, 1, 1, 1]), 3)
    assert found == pytest.approx(1 - np.exp(-0.4 / np.exp([0, 1, 2])))


def test_with_one_item_a_sid_the_threshold_is_the_best_that_was_not_drawn():
    sids = Perturbed(np.log([0.5, 0.3, 0.2]), np.array([0.7, 0.1, -0.4]))
    assert propensities(sids, np.ones(3, np.int64), 2) == pytest.approx(
        1 - np.exp(-np.array([0.5, 0.3]) / np.exp(-0.4))
    )
    assert propensities(sids, np.ones(3, np.int64), 3).tolist() == [1.0, 1.0, 1.0]


def test_extreme_thresholds_neither_overflow_nor_give_a_propensity_of_nought():
    sids = Perturbed(np.array([0.0, -1e5, -2e5]), np.array([1.0, -1e5, -2e5]))
    assert propensities(sids, np.ones(3, np.int64), 1).tolist() == [1.0]
    assert (propensities(Perturbed(np.full(3, -36.0), np.zeros(3)), np.ones(3, np.int64), 2) > 0).all()


def test_the_policy_is_the_tempered_softmax_over_eligible_children():
    """Probabilities 1/4 and 3/4 at temperature 1/2: squares, 1/10 and 9/10."""
    exploration = [Exploration(0.5, 1, 5)]
    root = Perturbed.roots(exploration)
    nothing = np.zeros(2, np.int64)
    found = root.children(nothing, np.array([4, 5]), np.log([0.25, 0.75]), nothing, exploration)
    assert np.exp(found.log_policy) == pytest.approx([0.1, 0.9])
    assert found.largest.max() == root.largest[0]


def test_an_only_child_is_its_parent_to_the_last_bit():
    exploration = [Exploration(0.3, 9, 5)]
    parents = Perturbed(np.array([-0.1234567, -3.7]), np.array([0.7654321, -2.2]))
    found = parents.children(
        np.array([0, 1]), np.array([7, 9]), np.array([-5.0, -0.5]), np.zeros(2, np.int64), exploration
    )
    assert found.log_policy.tolist() == parents.log_policy.tolist()
    assert found.largest.tolist() == parents.largest.tolist()


@given(st.lists(st.floats(-300, 0), min_size=1, max_size=30), st.integers(0, MAX_SEED), st.floats(1e-3, 10))
def test_children_share_their_parents_probability_and_its_largest_perturbation(
    log_probs: list[float], seed: int, temperature: float
):
    exploration = [Exploration(temperature, seed, 5)]
    nothing = np.zeros(len(log_probs), np.int64)
    parents = Perturbed(np.array([-2.5]), np.array([-1.25]))
    found = parents.children(nothing, np.arange(len(log_probs)), np.array(log_probs), nothing, exploration)
    assert np.exp(found.log_policy).sum() == pytest.approx(np.exp(-2.5))
    assert found.largest.max() == -1.25
    assert np.isfinite(found.largest).all()


def test_noise_is_standard_gumbel_across_nodes_and_across_seeds():
    """Mean Euler's constant, variance π²/6, and the distribution function at five points; neighbours uncorrelated."""
    count = 200_000
    for noise in (
        gumbel(np.full(count, 5, np.uint64), np.arange(count) - 1),
        gumbel(np.arange(count, dtype=np.uint64), np.full(count, 3)),
    ):
        assert noise.mean() == pytest.approx(np.euler_gamma, abs=4 * np.pi / np.sqrt(6 * count))
        assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.02)
        for point in (-1.5, -0.5, 0.3665, 1.5, 4.0):
            assert (noise < point).mean() == pytest.approx(np.exp(-np.exp(-point)), abs=2 / np.sqrt(count))
        assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 4 / np.sqrt(count)


def test_noise_is_the_same_in_every_version():
    """Otherwise a logged seed would not tell what was drawn."""
    found = gumbel(np.array([0, 1, MAX_SEED], np.uint64), np.array([-1, 0, 123_456_789]))
    assert found == pytest.approx(GOLDEN_NOISE, rel=1e-12)


GOLDEN_NOISE = [2.0868436769674386, 0.012270581425354594, -0.33126180948285733]


EXPLORATIONS = st.builds(
    lambda temperature, seed, num_items, kept: Exploration(temperature, seed, num_items, int(kept * num_items)),
    st.sampled_from([0.05, 0.5, 1.0, 3.0]),
    st.integers(0, MAX_SEED),
    st.integers(1, 15),
    st.sampled_from([0, 0, 0.3, 0.99]),
)


@given(
    st.sampled_from(SPACES),
    st.integers(1, 100),
    st.lists(st.none() | EXPLORATIONS, min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_answers_are_eligible_distinct_as_many_as_asked_for_and_scored_as_ever(
    space: SidSpace, num_items: int, explorations: list[Exploration | None], seed: int
):
    """Those that explore and those that do not, in one batch; what does not is what it is without the others."""
    generator = np.random.default_rng(seed)
    catalog, decoder = random_catalog(space, num_items, seed), decoder_for(space)
    prompts = random_prompts(len(explorations), seed)
    filters = [random_filter(generator, num_items) for _ in prompts]
    filters = [one if one.num_eligible else ItemFilter.of(num_items) for one in filters]
    widths = [15] * len(prompts)
    state = decoder.prefill(prompts)
    off = constrained_beam(decoder, catalog.trie, state, filters, widths)
    everything = constrained_beam(decoder, catalog.trie, state, filters, [num_items] * len(prompts))
    answers = constrained_beam(decoder, catalog.trie, state, filters, widths, exploration=explorations)
    for exploration, item_filter, answer, plain, full in zip(
        explorations, filters, answers, off, everything, strict=True
    ):
        if exploration is None:
            assert answer.propensity is None
            assert answer.ranks.tolist() == plain.ranks.tolist()
            assert np.allclose(answer.scores, plain.scores, atol=ATOL, rtol=0)
            continue
        ranks = answer.ranks.tolist()
        assert item_filter.contains(answer.ranks).all()
        assert len(set(ranks)) == len(ranks) == min(exploration.num_items, item_filter.num_eligible)
        assert np.allclose(answer.scores, [by_rank(full)[rank] for rank in ranks], atol=ATOL, rtol=0)
        assert answer.scores.dtype == np.float32
        assert (np.diff(answer.scores) <= 0).all()
        assert answer.propensity is not None
        assert ((answer.propensity > 0) & (answer.propensity <= 1)).all()
        certain = set(answer.ranks[answer.propensity == 1].tolist())
        assert set(plain.ranks[: exploration.num_kept].tolist()) <= certain
        if item_filter.num_eligible <= exploration.num_items:
            assert len(certain) == len(ranks)


@given(st.lists(st.none() | EXPLORATIONS, min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_a_batch_of_prompts_that_explore_and_do_not_answers_like_each_alone(
    explorations: list[Exploration | None], seed: int
):
    catalog, decoder = random_catalog(seed=seed), decoder_for(SPACE)
    prompts = random_prompts(len(explorations), seed)
    item_filter = ItemFilter.of(len(catalog), deny=np.arange(0, 40, 7))

    def answers(prompts: list[npt.NDArray[np.int64]], explorations: list[Exploration | None]) -> list[ScoredItems]:
        filters, widths = [item_filter] * len(prompts), [15] * len(prompts)
        state = decoder.prefill(prompts)
        return constrained_beam(decoder, catalog.trie, state, filters, widths, exploration=explorations)

    together = answers(prompts, explorations)
    for prompt, exploration, answer in zip(prompts, explorations, together, strict=True):
        [alone] = answers([prompt], [exploration])
        assert answer.ranks.tolist() == alone.ranks.tolist()
        assert np.allclose(answer.scores, alone.scores, atol=ATOL)
        if exploration is None:
            assert answer.propensity is alone.propensity is None
        else:
            assert answer.propensity == pytest.approx(alone.propensity, rel=1e-3)


def test_one_seed_draws_one_answer_and_other_seeds_draw_others():
    catalog, decoder = random_catalog(), TableDecoder(SPACE)
    answers = explore(decoder, catalog, [Exploration(1.0, seed, 5) for seed in (*range(50), *range(50))])
    sets = [tuple(sorted(answer.ranks.tolist())) for answer in answers]
    assert sets[:50] == sets[50:]
    assert len(set(sets[:50])) > 40


@given(st.integers(0, 1000), st.integers(1, 12))
def test_a_wider_beam_draws_the_same(seed: int, num_items: int):
    """The largest of a beam of `num_candidates` are the largest of all."""
    catalog, decoder = random_catalog(seed=seed), TableDecoder(SPACE, seed)
    exploration = Exploration(1.0, seed, num_items)
    [narrow] = explore(decoder, catalog, [exploration])
    found = []
    for wider in (num_items + 10, 60):
        [more] = explore(decoder, catalog, [replace(exploration, num_items=wider)])
        found.append(set(more.ranks.tolist()))
    assert set(narrow.ranks.tolist()) <= found[0] <= found[1]


def test_what_is_drawn_depends_on_no_draw_of_what_is_kept():
    """With all but one place kept, the items that stay are those of the beam that does not explore, for every seed."""
    catalog, decoder = random_catalog(), TableDecoder(SPACE)
    [off] = explore(decoder, catalog, [None], width=10)
    for answer in explore(decoder, catalog, [Exploration(1.0, seed, 10, 9) for seed in range(30)], width=10):
        assert answer.propensity is not None
        assert answer.ranks[answer.propensity == 1].tolist() == off.ranks[:9].tolist()


@pytest.mark.parametrize("num_kept", [0, 2])
def test_no_exploration_at_all_is_the_search_without_the_argument(num_kept: int):
    catalog, decoder, prompts = random_catalog(), decoder_for(SPACE), random_prompts(3, 0)
    filters, widths, state = [ItemFilter.of(len(catalog))] * 3, [7] * 3, decoder.prefill(prompts)
    plain = constrained_beam(decoder, catalog.trie, state, filters, widths)
    for explorations in (None, [None] * 3, [None, Exploration(1.0, 0, 5, num_kept), None]):
        found = constrained_beam(decoder, catalog.trie, state, filters, widths, exploration=explorations)
        for place in (0, 2):
            assert found[place].ranks.tolist() == plain[place].ranks.tolist()
            assert np.allclose(found[place].scores, plain[place].scores, atol=ATOL, rtol=0)
            assert found[place].propensity is None


@pytest.mark.parametrize("num_kept", [0, 1])
def test_closed_beams_need_no_forward_pass_and_add_exactly_nought(num_kept: int):
    """First codes differ, all else is forced: two of three SIDs are drawn without a single step of the model."""
    catalog, decoder, work = catalog_of([[0, 5, 1], [2, 3, 3], [7, 0, 6]]), TableDecoder(SPACE), BeamWork()
    state, filters = TableState(1), [ItemFilter.of(3)]
    [off] = constrained_beam(decoder, catalog.trie, state, filters, [3])
    exploration = [Exploration(1.0, 4, 2, num_kept)]
    [answer] = constrained_beam(decoder, catalog.trie, state, filters, [3], work=work, exploration=exploration)
    assert decoder.num_extensions == 0
    assert work.closed_beams == 2 * 3
    assert [by_rank(off)[rank] for rank in answer.ranks.tolist()] == answer.scores.tolist()


def test_a_filter_that_leaves_one_code_makes_it_certain_and_does_not_change_its_score():
    catalog, decoder = random_catalog(), TableDecoder(SPACE)
    [full] = explore(decoder, catalog, [None])
    [answer] = explore(decoder, catalog, [Exploration(0.2, 1, 3)], ItemFilter.of(40, allow=np.array([17])))
    assert answer.propensity is not None
    assert (answer.ranks.tolist(), answer.propensity.tolist()) == ([17], [1.0])
    assert answer.scores[0] == pytest.approx(by_rank(full)[17], abs=ATOL)


def test_forced_tokens_are_run_for_drawn_beams_too():
    catalog, decoder = random_catalog(), decoder_for(SPACE)
    state, filters = decoder.prefill(random_prompts(1, 0)), [ItemFilter.of(40)]
    forced = [[2], [3, 4], [5]]
    [full] = constrained_beam(decoder, catalog.trie, state, filters, [40], forced=forced)
    [answer] = constrained_beam(
        decoder, catalog.trie, state, filters, [40], forced=forced, exploration=[Exploration(1.0, 5, 8, 3)]
    )
    expected = [by_rank(full)[rank] for rank in answer.ranks.tolist()]
    assert np.allclose(answer.scores, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("exploration", "num_items", "num_drawn"),
    [(0.1, 10, 1), (0.1, 30, 3), (0.01, 10, 1), (0.11, 10, 2), (0.5, 3, 2), (1.0, 10, 10), (1.0, 1, 1), (1e-12, 1, 1)],
)
def test_a_requests_exploration_is_the_share_of_places_drawn(exploration: float, num_items: int, num_drawn: int):
    found = Exploration.of_request(exploration, num_items, 1)
    assert found == Exploration(1.0, 1, num_items, num_items - num_drawn)
    assert found is not None
    assert found.num_drawn == num_drawn


def test_no_exploration_asked_for_is_none():
    assert Exploration.of_request(0.0, 10, 1) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1, 5), "temperature is positive"),
        ((float("inf"), 1, 5), "temperature is positive"),
        ((float("nan"), 1, 5), "temperature is positive"),
        ((1.0, -1, 5), "seed has 64 bits"),
        ((1.0, MAX_SEED + 1, 5), "seed has 64 bits"),
        ((1.0, 1, 0), "of 0 items"),
        ((1.0, 1, 5, 5), "keeps 0 to 4, not 5"),
        ((1.0, 1, 5, -1), "keeps 0 to 4, not -1"),
    ],
)
def test_an_exploration_that_cannot_be_is_refused(arguments: tuple[float, int, int], message: str):
    with pytest.raises(ExplorationError, match=message):
        Exploration(*arguments)


def test_a_request_beyond_nought_to_one_is_refused():
    with pytest.raises(ExplorationError, match=r"0 to 1, not 1\.5"):
        Exploration.of_request(1.5, 10, 1)


def test_a_beam_too_narrow_for_what_is_kept_is_refused():
    with pytest.raises(ExplorationError, match="width of 3 does not find the 4 best"):
        explore(TableDecoder(SPACE), random_catalog(), [Exploration(1.0, 1, 5, 4)], width=3)


def test_a_filter_that_leaves_nothing_is_an_error_when_exploring_too():
    nothing = ItemFilter.of(40, allow=np.empty(0, np.int64))
    with pytest.raises(EmptyAllowedSetError, match="leaves no item"):
        explore(TableDecoder(SPACE), random_catalog(), [Exploration(1.0, 1, 5)], nothing)


def test_a_search_has_no_more_beams_than_it_says():
    catalog, decoder = random_catalog(num_items=100), TableDecoder(SPACE)
    for exploration in (Exploration(1.0, 3, 6), Exploration(1.0, 3, 6, 4)):
        work = BeamWork()
        filters = [ItemFilter.of(100)]
        constrained_beam(decoder, catalog.trie, TableState(1), filters, [9], work=work, exploration=[exploration])
        assert work.beams <= 3 * exploration.num_beams(9)


def test_diversity_and_exploration_together_are_refused():
    refuse_both(0.5, 0.0)
    refuse_both(0.0, 0.5)
    refuse_both(0.0, 0.0)
    with pytest.raises(DiversityWithExplorationError, match=r"diversity 0\.3 and exploration 0\.5 together"):
        refuse_both(0.3, 0.5)


def test_a_service_without_torch_can_name_an_exploration():
    program = "import sys, semantic_ids.decoding.exploration; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_the_reference_policy_is_the_score_where_nothing_is_filtered():
    """At temperature 1, unfiltered: the table's own log-probabilities, as the beam sums them."""
    catalog, decoder = random_catalog(), TableDecoder(SPACE)
    [full] = explore(decoder, catalog, [None])
    policy = policy_of(decoder, catalog, ItemFilter.of(40), 1.0)
    expected = [policy[sid] for sid in sids_of(catalog, full.ranks)]
    assert np.allclose(full.scores, expected, atol=ATOL)
    assert sum(np.exp(list(policy.values()))) == pytest.approx(1)
