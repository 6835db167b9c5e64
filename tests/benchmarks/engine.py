"""The local engine's beam against the naive one that repeats the prompt's KV for every beam.

The first half of `make bench-engine`; `tests.benchmarks.vllm_engine` is the other. Both run the same random model of
SmolLM2-135M's shape in float32 on one thread, the same trie, prompt and width, and must return the same items; each
time is the median of several alternating runs. "Back" is the same request from a user who is back with one new item,
whose prompt before that is in the prompt cache.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from semantic_ids.codes import SidSpace, SidVocabulary, TokenIds
from semantic_ids.decoding.beam import constrained_beam
from semantic_ids.decoding.legal import LegalCodes, legal_log_softmax
from semantic_ids.decoding.prompt_cache import PromptCache
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import ItemFilter
from semantic_ids.trie import ROOT, SidTrie

SPACE = SidSpace(num_levels=4, codebook_size=256)
NUM_ITEMS, PROMPT_TOKENS, WIDTH, RUNS = 12_101, 300, 20, 7


def smollm2_shape(vocab_size: int) -> LlamaForCausalLM:
    """A randomly initialised model of SmolLM2-135M's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.04,
    )  # fmt: skip
    return LlamaForCausalLM(config).train(False)


def beauty_like_sids(num_items: int, seed: int) -> np.ndarray:
    """Skewed first codes and unique last ones: most nodes below level 2 have one child, as in real catalogues."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(SPACE.codebook_size, 0.3))
    codes = rng.integers(0, SPACE.codebook_size, (num_items, SPACE.num_levels))
    codes[:, 0] = rng.choice(SPACE.codebook_size, num_items, p=weights)
    return codes.astype(np.uint16)


@torch.inference_mode()
def naive_beam(decoder: TreeDecoder, trie: SidTrie, prompt: TokenIds, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Beam search with the usual cache: repeated for every beam, reordered at every step. Leaves and scores."""
    model = decoder.model
    cache = DynamicCache(config=model.config)
    hidden = model.base_model(input_ids=torch.from_numpy(prompt)[None], past_key_values=cache).last_hidden_state[:, -1]
    nodes, scores = np.array([ROOT]), np.zeros(1, np.float32)
    for level in range(trie.space.num_levels):
        legal = LegalCodes.of(trie, nodes, decoder.device)
        log_probs = legal_log_softmax(decoder.level_logits(hidden, level), legal.mask).numpy()
        children = legal.children
        total = scores[children.parent] + log_probs[children.parent, children.code]
        best = np.argsort(-total, kind="stable")[:width]
        parents, nodes, scores = children.parent[best], children.node[best], total[best]
        if level + 1 == trie.space.num_levels:
            break
        cache.batch_select_indices(torch.from_numpy(parents))
        token_ids = torch.from_numpy(decoder.vocabulary.block(level).start + children.code[best])[:, None]
        position = torch.full_like(token_ids, len(prompt) + level)
        hidden = model.base_model(input_ids=token_ids, past_key_values=cache, position_ids=position).last_hidden_state[
            :, -1
        ]
    return nodes, scores


def measure() -> dict[str, float | int | str]:
    """One request, cold and of a user who is back."""
    torch.set_num_threads(1)
    vocabulary = SidVocabulary(SPACE, 49_152, 49_152 + SPACE.num_tokens)
    model = smollm2_shape(vocabulary.vocab_size)
    decoder = TreeDecoder(model, vocabulary)
    keeping = TreeDecoder(model, vocabulary, prompt_cache=PromptCache(1 << 30))
    trie = SidTrie.build(SPACE, beauty_like_sids(NUM_ITEMS, seed=0))
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, 49_152, PROMPT_TOKENS)
    everything = ItemFilter.of(trie.num_items)

    def found(decoder: TreeDecoder, prompt: TokenIds) -> tuple[np.ndarray, np.ndarray]:
        items = constrained_beam(decoder, trie, decoder.prefill([prompt]), [everything], [WIDTH])[0]
        return items.ranks, items.scores

    def ours() -> tuple[np.ndarray, np.ndarray]:
        return found(decoder, prompt)

    def back() -> tuple[np.ndarray, np.ndarray]:
        return found(keeping, np.append(prompt[SPACE.num_levels :], rng.integers(0, 49_152, SPACE.num_levels)))

    def naive() -> tuple[np.ndarray, np.ndarray]:
        leaves, scores = naive_beam(decoder, trie, prompt, WIDTH)
        return trie.rank_range(leaves, SPACE.num_levels - 1)[0], scores

    def prefill() -> tuple[np.ndarray, np.ndarray]:
        decoder.prefill([prompt])
        return np.empty(0), np.empty(0)

    seconds: dict[str, list[float]] = {"ours": [], "naive": [], "prefill": [], "back": []}
    runs: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "ours": ours,
        "naive": naive,
        "prefill": prefill,
        "back": back,
    }
    for run in runs.values():
        run()
    for _ in range(RUNS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    (our_ranks, our_scores), (_, naive_scores) = ours(), naive()
    if not np.allclose(our_scores[: len(naive_scores)], naive_scores, atol=1e-3):
        raise SystemExit("the two engines disagree on the scores: the comparison is void")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "ours_s": median["ours"],
        "naive_s": median["naive"],
        "prefill_s": median["prefill"],
        "back_s": median["back"],
        "ratio_vs_naive": median["ours"] / median["naive"],
        "ours_over_prefill": median["ours"] / median["prefill"],
        "naive_over_prefill": median["naive"] / median["prefill"],
        "back_over_ours": median["back"] / median["ours"],
        "items": len(our_ranks),
    }


TITLE = f"local engine: one request, {WIDTH} beams, L {SPACE.num_levels}, {PROMPT_TOKENS} prompt tokens"
BARS = {"ratio_vs_naive": "≤ 0.6"}
