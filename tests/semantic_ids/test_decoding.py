"""The beam, the scorer and the mask against exhaustive scoring with plain forward passes."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from semantic_ids.bundle import Bundle, publish
from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidError, SidSpace, SidVocabulary
from semantic_ids.decoding.beam import BeamWork, ScoredItems, constrained_beam
from semantic_ids.decoding.legal import EmptyAllowedSetError, LegalCodes, legal_log_softmax
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import FilterCompiler, FilterSpec, ItemFilter, RankBitmap
from semantic_ids.trie import SidTrie
from tests.semantic_ids.factories import (
    CATEGORIES,
    FIRST_TOKEN_ID,
    SPACE,
    VOCAB_SIZE,
    bundle_parts,
    catalog_of,
    random_catalog,
    random_codes,
    tiny_model,
    vocabulary,
)

Architecture = Literal["llama", "qwen3"]
Prompts = list[npt.NDArray[np.int64]]
Forced = list[list[int]]

SPACES = [SidSpace(1, 40), SidSpace(2, 12), SidSpace(3, 8), SidSpace(4, 5), SidSpace(4, 2)]
ATOL = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decoder_for(space: SidSpace, architecture: Architecture = "llama") -> TreeDecoder:
    return TreeDecoder(tiny_model(architecture), vocabulary(space))


def random_prompts(num_prompts: int, seed: int, longest: int = 12) -> Prompts:
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, VOCAB_SIZE, length)
        for length in generator.integers(1, longest, num_prompts, endpoint=True)
    ]


def beam(
    decoder: TreeDecoder,
    trie: SidTrie,
    prompts: Prompts,
    filters: Sequence[ItemFilter] | None = None,
    width: int | None = None,
    forced: Forced | tuple[()] = (),
) -> list[ScoredItems]:
    """The beam of every prompt; without a filter and a width, everything."""
    filters = filters or [ItemFilter.of(trie.num_items)] * len(prompts)
    widths = [width or trie.num_items] * len(prompts)
    return constrained_beam(decoder, trie, decoder.prefill(prompts), filters, widths, forced=forced)


def by_rank(answer: ScoredItems) -> dict[int, float]:
    return dict(zip(answer.ranks.tolist(), answer.scores.tolist(), strict=True))


@torch.inference_mode()
def exhaustive_scores(
    model: PreTrainedModel,
    space: SidSpace,
    sids: Sequence[tuple[int, ...]],
    prompt: npt.NDArray[np.int64],
    forced: Forced,
) -> list[float]:
    """Prompt and SID of every item through the model at once, no cache; log-softmax over a dict trie's children."""
    rows, before = [], []
    for sid in sids:
        row, places = prompt.tolist(), []
        for level, code in enumerate(sid):
            row += forced[level] if level < len(forced) else []
            places.append(len(row) - 1)  # where the logits of this code are
            row.append(FIRST_TOKEN_ID + level * space.codebook_size + code)
        rows.append(row)
        before.append(places)
    logits = model(torch.tensor(rows), use_cache=False).logits.double()
    scores = []
    for item, sid in enumerate(sids):
        score = 0.0
        for level, code in enumerate(sid):
            legal = sorted({other[level] for other in sids if other[:level] == sid[:level]})
            token_ids = [FIRST_TOKEN_ID + level * space.codebook_size + other for other in legal]
            score += float(logits[item, before[item][level], token_ids].log_softmax(-1)[legal.index(code)])
        scores.append(score)
    return scores


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[SidSpace, list[tuple[int, ...]]]:
    """SIDs in rank order, of few distinct codes, so that prefixes and whole SIDs repeat."""
    space = draw(st.sampled_from(SPACES))
    largest = draw(st.integers(0, space.codebook_size - 1))
    sid = st.tuples(*[st.integers(0, largest)] * space.num_levels)
    return space, sorted(draw(st.lists(sid, min_size=1, max_size=20)))


FORCED: st.SearchStrategy[Forced] = st.just([]) | st.lists(
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2), max_size=4
)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_beam_wide_enough_equals_exhaustive_scoring(architecture: Architecture):
    @settings(max_examples=200)
    @given(catalogues(), st.integers(1, 4), st.integers(0, 2**32 - 1), FORCED)
    def check(case: tuple[SidSpace, list[tuple[int, ...]]], num_prompts: int, seed: int, forced: Forced) -> None:
        space, sids = case
        decoder = decoder_for(space, architecture)
        trie = SidTrie.build(space, np.array(sids))
        prompts = random_prompts(num_prompts, seed)
        forced = forced[: space.num_levels]
        for prompt, answer in zip(prompts, beam(decoder, trie, prompts, forced=forced), strict=True):
            expected = exhaustive_scores(decoder.model, space, sids, prompt, forced)
            assert sorted(answer.ranks.tolist()) == list(range(len(sids)))
            assert np.allclose(answer.scores, [expected[rank] for rank in answer.ranks], atol=3e-5, rtol=1e-5)
            assert (np.diff(answer.scores) <= 0).all()

    check()


def test_the_exhaustive_reference_tells_prompts_codes_and_forced_tokens_apart():
    """Otherwise equality with it would show nothing: each change moves the scores by far more than the tolerance."""
    sids = sorted({tuple(sid) for sid in random_codes(SPACE, 15).tolist()})
    model, prompt = tiny_model(), np.array([1, 20, 30])
    scores = [
        exhaustive_scores(model, SPACE, sids, *rest)
        for rest in [
            (prompt, []),
            (prompt[::-1], []),
            (np.append(0, prompt), []),
            (prompt, [[], [5]]),
            (prompt, [[], [], [5]]),
        ]
    ]
    for one in range(len(scores)):
        for other in range(one):
            assert np.abs(np.array(scores[one]) - scores[other]).max() > 0.01


NUM_REQUESTS_PROMISED = 10_000
REQUESTS_A_BATCH = 64


def random_filter(generator: np.random.Generator, num_items: int) -> ItemFilter:
    """Any form of filter: wide, narrow, a single item, all but one."""

    def ranks(largest: int) -> npt.NDArray[np.int64]:
        return generator.integers(0, num_items, generator.integers(1, largest, endpoint=True))

    kind = generator.integers(6)
    bitmap = RankBitmap.of(generator.random(num_items) < generator.choice([0.02, 0.3, 0.9]))
    if kind == 0:
        return ItemFilter.of(num_items)
    if kind == 1:
        return ItemFilter.of(num_items, allow=ranks(1))
    if kind == 2:
        return ItemFilter.of(num_items, allow=ranks(num_items), deny=ranks(num_items))
    if kind == 3:
        return ItemFilter.of(num_items, bitmap=bitmap)
    if kind == 4:
        return ItemFilter.of(num_items, bitmap=bitmap, deny=ranks(num_items))
    spared = generator.integers(num_items)
    return ItemFilter.of(num_items, deny=np.delete(np.arange(num_items), spared))


def test_ten_thousand_random_requests_get_only_eligible_items_and_enough_of_them():
    """Distinct items, all eligible, min(width, eligible) or more of them, each with its unfiltered score."""
    counts = Counter[str]()

    @settings(max_examples=40, derandomize=True)
    @given(st.sampled_from(SPACES), st.integers(1, 150), st.integers(0, 2**32 - 1))
    def check(space: SidSpace, num_items: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        catalog = random_catalog(space, num_items, seed)
        decoder = decoder_for(space)
        prompts = random_prompts(4, seed)
        unfiltered = [by_rank(answer) for answer in beam(decoder, catalog.trie, prompts)]
        state = decoder.prefill(prompts * (REQUESTS_A_BATCH // 4))
        everything = np.arange(num_items)
        for _ in range(4):
            filters: list[ItemFilter] = []
            while len(filters) < REQUESTS_A_BATCH:
                item_filter = random_filter(generator, num_items)
                filters += [item_filter] if item_filter.num_eligible else []
            widths = generator.integers(1, 12, REQUESTS_A_BATCH, endpoint=True).tolist()
            answers = constrained_beam(decoder, catalog.trie, state, filters, widths)
            for place, (answer, item_filter, width) in enumerate(zip(answers, filters, widths, strict=True)):
                eligible = set(everything[item_filter.contains(everything)].tolist())
                counts["requests"] += 1
                counts["narrow"] += len(eligible) < width
                counts["illegal"] += not set(answer.ranks.tolist()) <= eligible
                counts["repeated"] += len(set(answer.ranks.tolist())) != len(answer.ranks)
                counts["too few"] += len(answer.ranks) < min(width, len(eligible))
                counts["out of order"] += bool((np.diff(answer.scores) > 0).any())
                expected = [unfiltered[place % 4][rank] for rank in answer.ranks.tolist()]
                counts["score changed"] += not np.allclose(answer.scores, expected, atol=ATOL, rtol=0)

    check()
    assert counts.pop("requests") >= NUM_REQUESTS_PROMISED
    assert counts.pop("narrow") > NUM_REQUESTS_PROMISED / 10
    assert not +counts, counts


@given(st.sampled_from(CATEGORIES), st.integers(0, 1000))
def test_a_category_filter_removes_items_and_changes_no_score(name: str, seed: int):
    catalog = random_catalog(seed=seed)
    decoder, prompts = decoder_for(SPACE), random_prompts(1, seed)
    item_filter = FilterCompiler(catalog).compile(FilterSpec(any_categories=frozenset({name})))
    everything = by_rank(beam(decoder, catalog.trie, prompts)[0])
    members = catalog.ranks_in_category(name).tolist()
    if not members:
        return
    filtered = by_rank(beam(decoder, catalog.trie, prompts, [item_filter])[0])
    assert sorted(filtered) == members
    assert np.allclose(list(filtered.values()), [everything[rank] for rank in filtered], atol=ATOL, rtol=0)


@given(st.lists(st.integers(0, 39), min_size=1, max_size=10, unique=True), st.integers(0, 1000))
def test_candidates_to_rerank_get_the_scores_they_have_in_a_recommendation(candidates: list[int], seed: int):
    catalog = random_catalog()
    decoder, prompts = decoder_for(SPACE), random_prompts(1, seed)
    recommended = by_rank(beam(decoder, catalog.trie, prompts)[0])
    only = ItemFilter.of(len(catalog), allow=np.array(candidates))
    reranked = by_rank(beam(decoder, catalog.trie, prompts, [only], width=len(candidates))[0])
    assert sorted(reranked) == sorted(candidates)
    assert np.allclose(list(reranked.values()), [recommended[rank] for rank in reranked], atol=ATOL, rtol=0)


@given(catalogues(), st.integers(0, 1000))
def test_the_probabilities_of_all_sids_sum_to_one(case: tuple[SidSpace, list[tuple[int, ...]]], seed: int):
    space, sids = case
    trie = SidTrie.build(space, np.array(sids))
    [answer] = beam(decoder_for(space), trie, random_prompts(1, seed))
    score_of_sid = {sids[rank]: score for rank, score in by_rank(answer).items()}
    assert np.exp(list(score_of_sid.values())).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("forced", [[], [[5], [6, 7], [8]]])
def test_the_only_item_of_a_catalogue_scores_exactly_nought(forced: Forced):
    work = BeamWork()
    decoder, trie = decoder_for(SPACE), catalog_of([[3, 1, 4]]).trie
    state = decoder.prefill(random_prompts(3, 0))
    answers = constrained_beam(decoder, trie, state, [ItemFilter.of(1)] * 3, [5] * 3, forced=forced, work=work)
    assert [by_rank(answer) for answer in answers] == [{0: 0.0}] * 3
    assert work.closed_beams == 3 * 2  # both codes that could have been run were not


def test_items_of_the_only_sid_all_score_exactly_nought_and_stand_by_popularity():
    decoder = decoder_for(SPACE)
    [answer] = beam(decoder, catalog_of([[3, 1, 4]] * 4).trie, random_prompts(1, 0), width=1)
    assert answer.ranks.tolist() == [0, 1, 2, 3]
    assert answer.scores.tolist() == [0.0] * 4


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8), st.integers(0, 7))
def test_a_forced_code_adds_exactly_nought_whatever_the_logits(logits: list[float], code: int):
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[0, code] = True
    assert legal_log_softmax(torch.tensor([logits]), mask)[0, code].item() == 0.0


def test_codes_after_the_last_choice_add_exactly_nought():
    """First codes differ, all else is forced: the score is the first level's log-softmax, to the last bit."""
    decoder, catalog = decoder_for(SPACE), catalog_of([[0, 5, 1], [2, 3, 3], [7, 0, 6]])
    prompts = random_prompts(2, 0)
    first = decoder.level_logits(decoder.prefill(prompts).last_hidden[:, 0], 0)[:, [0, 2, 7]].log_softmax(-1)
    for answer, expected in zip(beam(decoder, catalog.trie, prompts), first, strict=True):
        assert [by_rank(answer)[rank] for rank in range(3)] == expected.tolist()


def test_codes_before_the_first_choice_add_exactly_nought():
    """All share two codes: the score is the third level's log-softmax after them, as a plain forward pass has it."""
    decoder, catalog = decoder_for(SPACE), catalog_of([[4, 4, 0], [4, 4, 2], [4, 4, 7]])
    [prompt] = random_prompts(1, 0)
    [answer] = beam(decoder, catalog.trie, [prompt])
    sids = [(4, 4, 0), (4, 4, 2), (4, 4, 7)]
    expected = exhaustive_scores(decoder.model, SPACE, sids, prompt, [])
    assert np.allclose([by_rank(answer)[rank] for rank in range(3)], expected, atol=ATOL)
    assert np.exp(answer.scores).sum() == pytest.approx(1, abs=1e-6)


@torch.inference_mode()
def exhaustive_scores_fed_back(
    model: PreTrainedModel,
    sids: Sequence[tuple[int, ...]],
    prompt: npt.NDArray[np.int64],
    forced: Forced,
    fed_back: Sequence[int],
) -> list[float]:
    """As above, token by token, without a cache: a token behind the prompt that is fed back gets the output before."""
    scores = []
    for sid in sids:
        inputs = model.get_input_embeddings()(torch.from_numpy(prompt))[None]
        score = 0.0
        for level, code in enumerate(sid):
            for token_id in (*forced[level], FIRST_TOKEN_ID + level * SPACE.codebook_size + code):
                output = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1:]
                row = model.get_input_embeddings()(torch.tensor([[token_id]]))
                inputs = torch.cat((inputs, row + output if token_id in fed_back else row), dim=1)
            legal = sorted({other[level] for other in sids if other[:level] == sid[:level]})
            token_ids = [FIRST_TOKEN_ID + level * SPACE.codebook_size + other for other in legal]
            logits = model.get_output_embeddings()(output)[0, 0].double()  # before the code, the last token run
            score += float(logits[token_ids].log_softmax(-1)[legal.index(code)])
        scores.append(score)
    return scores


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("forced", [[[2], [3], [4]], [[2, 3, 4], [], []], [[], [2, 3], [4]]])
def test_tokens_fed_back_equal_exhaustive_scoring_token_by_token(architecture: Architecture, forced: Forced):
    """In a batch of prompts of different lengths; what is not among `fed_back` is a token as any other."""
    catalog, model, prompts = random_catalog(num_items=12), tiny_model(architecture), random_prompts(2, 0)
    sids = [tuple(sid) for sid in catalog.codes.tolist()]
    answers: dict[tuple[int, ...], list[dict[int, float]]] = {}
    for fed_back in ((), (2, 4), (2, 3, 4)):
        decoder = TreeDecoder(model, vocabulary(SPACE), fed_back=fed_back)
        answers[fed_back] = [by_rank(answer) for answer in beam(decoder, catalog.trie, prompts, forced=forced)]
        for prompt, answer in zip(prompts, answers[fed_back], strict=True):
            expected = exhaustive_scores_fed_back(model, sids, prompt, forced, fed_back)
            assert answer == pytest.approx(dict(enumerate(expected)), abs=3e-5)
    for one, other in pairwise(answers.values()):
        pairs = zip(one, other, strict=True)
        assert max(abs(left[rank] - right[rank]) for left, right in pairs for rank in left) > 0.01


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("forced", "fed_back"), [([], []), ([[2], [3, 4], [], [5]], []), ([[2], [3, 4], [], [5]], [2, 3, 4, 5])]
)
def test_a_batch_of_eight_answers_like_eight_requests(
    architecture: Architecture, forced: Forced, fed_back: Sequence[int]
):
    space = SidSpace(4, 5)
    catalog = random_catalog(space, 60)
    decoder = TreeDecoder(tiny_model(architecture), vocabulary(space), fed_back=fed_back)
    prompts = random_prompts(8, 0, longest=30)
    generator = np.random.default_rng(0)
    filters = [ItemFilter.of(60, deny=generator.integers(0, 60, 15)) for _ in prompts]
    together = beam(decoder, catalog.trie, prompts, filters, 10, forced)
    for prompt, item_filter, answer in zip(prompts, filters, together, strict=True):
        [alone] = beam(decoder, catalog.trie, [prompt], [item_filter], 10, forced)
        assert answer.ranks.tolist() == alone.ranks.tolist()
        assert np.allclose(answer.scores, alone.scores, atol=ATOL)


@pytest.mark.parametrize(
    ("forced", "fed_back"), [([], []), ([[2], [3, 4], [5]], []), ([[2], [3, 4], [5]], [2, 3, 4, 5])]
)
def test_two_searches_from_one_prefilled_state_agree(forced: Forced, fed_back: Sequence[int]):
    """As evaluation does, with and without a filter in between."""
    catalog, prompts = random_catalog(), random_prompts(3, 0)
    decoder = TreeDecoder(tiny_model(), vocabulary(SPACE), fed_back=fed_back)
    filters, widths = [ItemFilter.of(len(catalog))] * 3, [10] * 3
    narrow = [ItemFilter.of(len(catalog), allow=np.array([7]))] * 3
    state = decoder.prefill(prompts)
    first = constrained_beam(decoder, catalog.trie, state, filters, widths, forced=forced)
    constrained_beam(decoder, catalog.trie, state, narrow, widths)
    second = constrained_beam(decoder, catalog.trie, state, filters, widths, forced=forced)
    for one, other in zip(first, second, strict=True):
        assert one.ranks.tolist() == other.ranks.tolist()
        assert np.allclose(one.scores, other.scores, atol=ATOL)


def test_forced_tokens_change_what_is_said_after_them_only():
    """Tokens before the last code leave the sums over each two-code prefix as they were."""
    catalog, decoder, prompts = random_catalog(), decoder_for(SPACE), random_prompts(1, 0)
    [plain], [thinking] = (beam(decoder, catalog.trie, prompts, forced=forced) for forced in ([], [[], [], [5, 6]]))
    sums = [prefix_probabilities(catalog, answer, 2) for answer in (plain, thinking)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-5)
    assert not np.allclose(np.sort(plain.scores), np.sort(thinking.scores), atol=0.01)


def prefix_probabilities(catalog: Catalog, answer: ScoredItems, length: int) -> dict[tuple[int, ...], float]:
    """Of each prefix of `length` codes, from the scores of all SIDs."""
    of_sid = {tuple(catalog.codes[rank].tolist()): score for rank, score in by_rank(answer).items()}
    sums: dict[tuple[int, ...], float] = {}
    for sid, score in of_sid.items():
        sums[sid[:length]] = sums.get(sid[:length], 0.0) + float(np.exp(score))
    return sums


@given(st.sampled_from(SPACES), st.integers(1, 60), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_a_narrow_beam_keeps_the_best_eligible_prefixes_of_each_level(
    space: SidSpace, num_items: int, width: int, seed: int
):
    """A prefix is as probable as its SIDs together; level by level the `width` best with an eligible item stay."""
    generator = np.random.default_rng(seed)
    catalog, decoder = random_catalog(space, num_items, seed), decoder_for(space)
    item_filter = ItemFilter.of(num_items, deny=generator.integers(0, num_items, generator.integers(0, num_items)))
    prompts = random_prompts(1, seed)
    [everything], [narrow] = (
        beam(decoder, catalog.trie, prompts, filters, of_width)
        for filters, of_width in ((None, None), ([item_filter], width))
    )
    eligible = {tuple(sid) for sid in catalog.codes[item_filter.contains(np.arange(num_items))].tolist()}
    kept: list[tuple[int, ...]] = [()]
    for length in range(1, space.num_levels + 1):
        probability = prefix_probabilities(catalog, everything, length)
        alive = [prefix for prefix in {sid[:length] for sid in eligible} if prefix[:-1] in kept]
        alive.sort(key=probability.__getitem__, reverse=True)
        kept, dropped = alive[:width], alive[width:]
        assume(not dropped or probability[kept[-1]] > 1.0001 * probability[dropped[0]])  # no tie at the edge
    found = catalog.codes[narrow.ranks].tolist()
    assert {tuple(sid) for sid in found} == set(kept)


def test_items_of_one_sid_are_filtered_one_by_one():
    catalog, decoder = catalog_of([[1, 2, 3]] * 3 + [[4, 5, 6]]), decoder_for(SPACE)
    only = ItemFilter.of(4, deny=np.array([1]))
    [answer] = beam(decoder, catalog.trie, random_prompts(1, 0), [only])
    assert sorted(answer.ranks.tolist()) == [0, 2, 3]
    assert by_rank(answer)[0] == by_rank(answer)[2]


def test_a_filter_that_leaves_nothing_never_reaches_the_model():
    catalog, decoder = random_catalog(), decoder_for(SPACE)
    nothing = ItemFilter.of(len(catalog), allow=np.empty(0, np.int64))
    with pytest.raises(EmptyAllowedSetError, match="leaves no item"):
        beam(decoder, catalog.trie, random_prompts(2, 0), [ItemFilter.of(len(catalog)), nothing])


def test_a_prefix_without_a_legal_code_is_an_error_not_a_free_choice():
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(EmptyAllowedSetError, match="without any legal code"):
        legal_log_softmax(torch.zeros(2, 2), mask)


def test_the_score_of_a_code_is_its_share_among_the_legal_ones():
    """Logits ln 1, ln 3, ln 4 with the last illegal: shares 1/4 and 3/4."""
    scores = legal_log_softmax(torch.tensor([[1.0, 3.0, 4.0]]).log(), torch.tensor([[True, True, False]]))
    assert scores.exp().tolist() == [pytest.approx([0.25, 0.75, 0.0])]
    assert scores[0, 2] == float("-inf")


def test_the_mask_has_the_children_of_each_node():
    trie = catalog_of([[0, 5], [2, 3], [2, 7]]).trie
    legal = LegalCodes.of(trie, np.array([trie.walk([2]), trie.walk([0]), trie.walk([2])]), torch.device("cpu"))
    assert [row.nonzero().flatten().tolist() for row in legal.mask] == [[3, 7], [5], [3, 7]]
    assert legal.children.code.tolist() == [3, 7, 5, 3, 7]


def test_a_model_of_another_vocabulary_is_refused():
    with pytest.raises(SidError, match="vocabulary of 64 is not the SID vocabulary's 65"):
        TreeDecoder(tiny_model(), SidVocabulary(SPACE, FIRST_TOKEN_ID, VOCAB_SIZE + 1))


def test_a_model_whose_attention_would_misread_the_mask_is_refused():
    config = copy.deepcopy(tiny_model().config)  # else it is every test's
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"needs attention implementation 'sdpa'.* 'eager'"):
        TreeDecoder(model, vocabulary(SPACE))


def test_a_published_checkpoint_answers_as_the_model_did(tmp_path: Path):
    model, prompts = tiny_model(), random_prompts(2, 0)
    model.save_pretrained(tmp_path / "model")
    answers: list[list[ScoredItems]] = []

    def first_request(bundle: Bundle) -> None:
        decoder = TreeDecoder.load(bundle.model_folder, bundle.vocabulary)
        answers.append(beam(decoder, bundle.catalog.trie, prompts))

    bundle = publish(tmp_path / "bundles", bundle_parts(tmp_path, model_folder=tmp_path / "model"), first_request)
    for published, original in zip(answers[0], beam(decoder_for(SPACE), bundle.catalog.trie, prompts), strict=True):
        assert published.ranks.tolist() == original.ranks.tolist()
        assert np.allclose(published.scores, original.scores, atol=ATOL)
