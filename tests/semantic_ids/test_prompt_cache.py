"""What is kept of prompts saves work and changes no answer."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from semantic_ids.decoding import prompt_cache
from semantic_ids.decoding.beam import constrained_beam
from semantic_ids.decoding.prompt_cache import KeptPrompt, PromptCache
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import ItemFilter
from tests.semantic_ids.factories import SPACE, VOCAB_SIZE, random_catalog, tiny_model, vocabulary

Prompt = npt.NDArray[np.int64]

PLENTY = 1 << 30
ATOL = 3e-5  # rounding in scores of up to 4, with steps fed back; as `test_decoding` has it for those
CLEAR = 1e-4


def tokens(num: int, seed: int = 0) -> Prompt:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, num)


def kept(token_ids: Prompt, num_states: int = 4) -> KeptPrompt:
    return KeptPrompt(token_ids, torch.zeros((num_states, 1, len(token_ids), 8)), torch.zeros(32))


def decoder_with(
    max_bytes: int,
    architecture: Literal["llama", "qwen3"] = "llama",
    fed_back: Sequence[int] = (),
) -> tuple[TreeDecoder, PromptCache]:
    cache = PromptCache(max_bytes)
    return TreeDecoder(tiny_model(architecture), vocabulary(SPACE), fed_back=fed_back, prompt_cache=cache), cache


def visits(rng: np.random.Generator, num_batches: int) -> list[list[Prompt]]:
    """Batches of users who come back: as they were, with new events, or after a cut of their window."""
    histories = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 60)) for _ in range(8)]
    batches = []
    for _ in range(num_batches):
        users = rng.integers(0, len(histories), rng.integers(1, 7))
        for user in users:
            if (what := rng.integers(4)) == 1:
                histories[user] = np.append(histories[user], rng.integers(0, VOCAB_SIZE, rng.integers(1, 9)))
            elif what == 2:
                histories[user] = histories[user][len(histories[user]) // 2 :]
        batches.append([histories[user].copy() for user in users])
    return batches


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("max_bytes", [PLENTY, 40_000, 0], ids=["room for all", "for few", "for none"])
@pytest.mark.parametrize(
    ("forced", "fed_back"), [([], []), ([[2], [3, 4], [5]], [2, 3, 4, 5])], ids=["plain", "with steps fed back"]
)
def test_who_comes_back_is_answered_as_if_nothing_were_kept(
    architecture: Literal["llama", "qwen3"], max_bytes: int, forced: list[list[int]], fed_back: list[int]
):
    catalog = random_catalog()
    keeping, cache = decoder_with(max_bytes, architecture, fed_back)
    plain = TreeDecoder(tiny_model(architecture), vocabulary(SPACE), fed_back=fed_back)
    num_known = num_tokens = num_clear = num_answers = 0
    for prompts in visits(np.random.default_rng(0), 40):
        filters, widths = [ItemFilter.of(len(catalog))] * len(prompts), [10] * len(prompts)
        state = keeping.prefill(prompts)
        num_known, num_tokens = num_known + state.num_known, num_tokens + sum(map(len, prompts))
        found = constrained_beam(keeping, catalog.trie, state, filters, widths, forced=forced)
        expected = constrained_beam(plain, catalog.trie, plain.prefill(prompts), filters, widths, forced=forced)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=ATOL)
            gaps = -np.diff(other.scores, prepend=np.inf, append=-np.inf) > CLEAR
            is_clear = gaps[:-1] & gaps[1:]  # the order of items whose scores are nearly equal is rounding's
            is_clear[-1] = False  # as who is the last of them
            num_clear += int(is_clear.sum())
            assert one.ranks[is_clear].tolist() == other.ranks[is_clear].tolist()
        num_answers += len(prompts)
        assert cache.num_bytes <= max_bytes
    assert num_clear > 8 * num_answers
    if max_bytes == PLENTY:
        assert num_known > num_tokens / 2
    elif max_bytes == 0:
        assert num_known == 0


def test_only_what_is_not_known_is_run(request: pytest.FixtureRequest):
    decoder, _ = decoder_with(PLENTY)
    run: list[int] = []
    embeddings = decoder.model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _module, inputs: run.append(inputs[0].numel()))
    request.addfinalizer(hook.remove)  # the model is every test's
    one, other = tokens(40, seed=1), tokens(30, seed=2)

    def prefilled(*prompts: Prompt) -> tuple[list[int], int]:
        run.clear()
        num_known = decoder.prefill(prompts).num_known
        return [*run], num_known

    assert prefilled(one) == ([40], 0)
    assert prefilled(one) == ([], 40), "the same prompt"
    longer = np.append(one, tokens(4, seed=3))
    assert prefilled(longer, other) == ([4, 30], 40), "four tokens more, and a new one"
    assert prefilled(one) == ([1], 39), "the beginning of one: the output at its end is wanted"
    assert prefilled(longer, other, np.append(other[:20], 63)) == ([1], 44 + 30 + 20), "blocks, and what follows them"
    more, most = np.append(longer, tokens(4, seed=5)), np.append(other[:16], tokens(17, seed=6))
    assert prefilled(more, most) == ([4, 17], 44 + 16), "few new tokens are not filled up to many"
    assert prefilled(np.append(more, 1), np.append(most, tokens(3, seed=7))) == ([2 * 3], 48 + 33), "one to three are"
    assert prefilled(tokens(10, seed=4)) == ([10], 0)
    assert prefilled(tokens(10, seed=4)) == ([], 10), "a short one, as a whole"
    assert prefilled(tokens(11, seed=4)) == ([11], 0), "of less than a block nothing else is found"


def test_what_is_kept_is_no_part_of_anything_larger():
    """Else a prompt would hold its whole batch."""
    decoder, cache = decoder_with(PLENTY)
    decoder.prefill([tokens(20, seed=1), tokens(50, seed=2)])
    decoder.prefill([np.append(tokens(20, seed=1), 1), np.append(tokens(50, seed=2)[:32], 1)])
    prompts = [*cache._prompts.values()]
    assert sorted(len(one.token_ids) for one in prompts) == [21, 33, 50]
    for one in prompts:
        for tensor in (one.states, one.last_hidden):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert cache.num_bytes == sum(one.num_bytes for one in prompts)


def test_a_prompt_that_goes_on_takes_the_place_of_the_one_before():
    cache, first = PromptCache(PLENTY), tokens(36)
    cache.put(kept(first))
    cache.put(kept(np.append(first, tokens(4, seed=1))))
    assert len(cache) == 1
    cache.put(kept(first[:20]))
    assert len(cache) == 1, "a longer one begins with it"
    cache.put(kept(np.append(first, tokens(4, seed=2))))
    assert len(cache) == 2, "another that goes on from there"
    cache.put(kept(np.append(first, tokens(4, seed=2))))
    assert len(cache) == 2, "the same one twice"


def test_what_was_used_longest_ago_goes_first():
    one, two, three = (tokens(20, seed=seed) for seed in (1, 2, 3))
    cache = PromptCache(2 * kept(one).num_bytes)
    cache.put(kept(one))
    cache.put(kept(two))
    assert cache.find(one) is not None
    cache.put(kept(three))
    assert cache.find(two) is None
    assert cache.find(one) is not None
    assert cache.find(three) is not None
    assert len(cache) == 2
    assert cache.num_bytes == 2 * kept(one).num_bytes
    cache.put(kept(np.concatenate([one, tokens(300, seed=4)])))
    assert cache.num_bytes == 2 * kept(one).num_bytes, "what is too large for all the room takes no other's"
    cache.put(kept(four := tokens(40, seed=5)))
    assert cache.find(four) is not None
    assert (len(cache), cache.num_bytes) == (1, kept(four).num_bytes)
    assert {id(one) for one in cache._by_beginning.values()} == {*cache._prompts}


def test_digests_that_collide_change_no_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompt_cache, "hash", lambda _parts: 7, raising=False)
    keeping, _ = decoder_with(PLENTY)
    plain = TreeDecoder(tiny_model(), vocabulary(SPACE))
    for prompts in visits(np.random.default_rng(1), 20):
        torch.testing.assert_close(
            keeping.prefill(prompts).last_hidden, plain.prefill(prompts).last_hidden, atol=ATOL, rtol=0
        )


def test_a_model_that_keeps_a_window_only_is_run_as_ever():
    """Its layers keep no states of a prompt's beginning that another prompt could go on from."""
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
        )
    )
    cache = PromptCache(PLENTY)
    decoder = TreeDecoder(model, vocabulary(SPACE), prompt_cache=cache)
    assert [decoder.prefill([tokens(6)]).num_known for _ in range(2)] == [0, 0]
    assert len(cache) == 0
