"""A world that thinks: bundles of prompt version 3 whose models never close a thought, or recite one and close it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM

from semantic_ids.bundle import Bundle, BundleParts, FileTokenizer, publish
from semantic_ids.codes import SidVocabulary
from semantic_ids.prompt import THINKING_TOKENS, THINKING_VERSION, PromptSpec
from service.app import EngineFactory, make_engine
from service.recommender import Recommender, ThinkingLimits
from service.settings import Settings
from tests.service.running import Service, running
from tests.service.world import MAX_HISTORY, SPACE, make_model, make_parts

PIECES = ("Te.", " é!", "\t🍵?")
RATIONALE = "".join(PIECES)
"""What may be shown of the thought below, sentence by sentence: its last one names a SID that is none."""
THOUGHT = RATIONALE + "\r<a_1>"
"""Recited token by token: letters, bytes of longer characters, and a code of a SID. No token comes twice."""
MAX_POSITIONS = 8192


def _make_tokenizer() -> Tokenizer:
    """One token a byte, then the special tokens, then the SID block."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", *THINKING_TOKENS])
    tokenizer.add_tokens(SPACE.all_tokens())
    return tokenizer


TOKENIZER = FileTokenizer(_make_tokenizer())
FIRST_SID_TOKEN = 260
VOCABULARY = SidVocabulary(SPACE, FIRST_SID_TOKEN, vocab_size=320)  # 12 ids at its end are no token


def encode(text: str) -> list[int]:
    """Token ids."""
    return TOKENIZER.encode(text, add_special_tokens=False)


THOUGHT_IDS = tuple(encode(THOUGHT))
CLOSE = tuple(encode("</think>\n\n"))


def publish_thinking(
    root: Path, thought: str | None = THOUGHT, *, max_positions: int = MAX_POSITIONS, **config: int
) -> Bundle:
    """Publish a bundle whose model thinks `thought`, and with None, random text that it never closes."""
    sizes = {"vocab_size": VOCABULARY.vocab_size, "max_position_embeddings": max_positions} | config
    if thought is None:
        model = make_model(**sizes)
        _never_say(model, CLOSE[0])
    else:
        model = make_model(**sizes, tie_word_embeddings=False)
        _recite(model, [*encode("\n" + thought), CLOSE[0]])
    return publish(root, _parts(root, model), lambda _bundle: None)


@asynccontextmanager
async def thinking_service(
    settings: Settings, limits: ThinkingLimits | None = None, engine_factory: EngineFactory = make_engine
) -> AsyncIterator[Service]:
    """The running service; its thoughts have these limits."""
    async with running(settings, engine_factory) as service:
        state, deployment = service.state, service.state.deployments.current
        parts = deployment.bundle, deployment.engine, state.histories, state.metrics
        deployment.current.recommender = Recommender(*parts, settings.beam_width, limits)
        yield service


def _parts(root: Path, model: LlamaForCausalLM) -> BundleParts:
    folder = root / "model"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(_make_tokenizer().to_str())
    return replace(
        make_parts(root / "unused"),
        vocabulary=VOCABULARY,
        prompt=PromptSpec(version=THINKING_VERSION, max_history=MAX_HISTORY),
        model_folder=folder,
    )


@torch.no_grad()
def _never_say(model: LlamaForCausalLM, token_id: int) -> None:
    """The logit of a token whose vector is zero is 0, and among 320 there is always a larger one."""
    model.get_input_embeddings().weight[token_id] = 0


@torch.no_grad()
def _recite(model: LlamaForCausalLM, token_ids: Sequence[int]) -> None:
    """After each of these tokens comes the next one, wherever it stands: the layers add nothing, and each token's
    vector points at the output of the one after it.
    """
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    directions = 100 * torch.eye(model.config.hidden_size)
    for place, (token_id, next_id) in enumerate(pairwise(token_ids)):
        model.get_input_embeddings().weight[token_id] = directions[place]
        model.get_output_embeddings().weight[next_id] += directions[place]
