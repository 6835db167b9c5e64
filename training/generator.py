"""The generator as a model: made from scratch or from a base model, saved and loaded as a plain checkpoint."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from semantic_ids.bundle import load_text_tokenizer
from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidVocabulary
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.prompt import (
    CHAT_VERSION,
    COMPACT_SPECIAL_TOKENS,
    COMPACT_VERSION,
    CONTINUOUS_VERSION,
    STEPWISE_VERSION,
    THINKING_VERSION,
    PromptError,
    PromptRenderer,
    PromptSpec,
    make_renderer,
)
from semantic_ids.step_reader import StepReader
from training.base_model import extend_pretrained
from training.item_memory import ItemMemory, KnownItems, plain_state
from training.legal_softmax import set_temperature
from training.rms_norm import replace_norms
from training.sft_config import SftConfig
from training.sharding import whole
from training.stage import StageError, is_main_process

if TYPE_CHECKING:  # transformers takes seconds to load, and a finished pipeline needs none of it
    from transformers import LlamaConfig, PreTrainedModel, Qwen3Config

MODEL = "model"
SPEC = "prompt.json"
STEPS = "steps"


@dataclass(frozen=True)
class TrainedModel:
    """A finished stage: the checkpoint, its SID block, its prompts, and what reads its thinking steps."""

    folder: Path
    vocabulary: SidVocabulary
    renderer: PromptRenderer
    step_reader: StepReader | None = None

    @classmethod
    def load(cls, path: Path, catalog: Catalog) -> "TrainedModel":
        """Read a finished sft stage."""
        spec = PromptSpec.model_validate_json((path / SPEC).read_bytes())
        vocab_size = json.loads((path / MODEL / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        vocabulary = SidVocabulary(catalog.space, vocab_size - catalog.space.num_tokens, vocab_size)
        renderer = make_renderer(spec, vocabulary, load_text_tokenizer(path / MODEL))
        step_reader = StepReader.load(path / STEPS) if (path / STEPS).exists() else None
        return cls(path / MODEL, vocabulary, renderer, step_reader)

    def load_decoder(self) -> TreeDecoder:
        """The model, ready to decode, in float32."""
        return TreeDecoder.load(self.folder, self.vocabulary, fed_back=self.renderer.fed_back)


def build_model(
    config: SftConfig, catalog: Catalog, folder: Path, known: KnownItems | None = None
) -> tuple["PreTrainedModel", SidVocabulary, PromptRenderer]:
    """A fresh or extended model with its SID block and its prompts; a base model's tokenizer goes into `model/`.

    `known`, by catalogue rank, is for `item_memory`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving: a stage has its own
    if config.base_model is None:
        vocabulary = compact_vocabulary(catalog)
        model = AutoModelForCausalLM.from_config(_fresh_config(config, vocabulary))
        replace_norms(model)
        _add_dropout(model, config.dropout)
        set_temperature(model, config.temperature)
        if config.item_memory:
            if known is None:
                raise StageError("sft.item_memory=true needs what is known of the items, and nothing was given")
            ItemMemory(catalog, vocabulary, known, config.hidden_size).install(model)
        stepwise = CONTINUOUS_VERSION if config.step_form == "continuous" else STEPWISE_VERSION
        version = stepwise if any(config.steps) else COMPACT_VERSION
        steps = config.steps if any(config.steps) else ()
        spec = PromptSpec(version=version, max_history=config.max_history, steps=steps)
        try:
            return model, vocabulary, make_renderer(spec, vocabulary)
        except PromptError as error:
            raise StageError(f"sft.steps={list(config.steps)}: {error}") from error
    extended = extend_pretrained(config.base_model, catalog.space, config.seed)
    if is_main_process():
        extended.tokenizer.save_pretrained(folder / MODEL)
    version = THINKING_VERSION if config.thinking else CHAT_VERSION
    spec = PromptSpec(version=version, max_history=config.max_history)
    return extended.model, extended.vocabulary, make_renderer(spec, extended.vocabulary, extended.text_tokenizer)


def compact_vocabulary(catalog: Catalog) -> SidVocabulary:
    """The vocabulary of a model trained from scratch: the special tokens, then the SID block."""
    first = len(COMPACT_SPECIAL_TOKENS)
    return SidVocabulary(catalog.space, first, first + catalog.space.num_tokens)


def save_model(model: "PreTrainedModel", path: Path) -> None:
    """Replace the weights in `path`; the tokenizer's files stay. All processes are to call it; the first one writes."""
    weights = whole(plain_state(model))
    if not is_main_process():
        return
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights:  # a table of two names that was in shards is two by now
            weights[name] = weights[first_name.setdefault(id(parameter), name)]
    staging = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging, state_dict=weights)
    for file in path.iterdir() if path.exists() else ():
        if not (staging / file.name).exists():
            shutil.copy(file, staging / file.name)
    shutil.rmtree(path, ignore_errors=True)
    staging.rename(path)


def _fresh_config(config: SftConfig, vocabulary: SidVocabulary) -> "LlamaConfig | Qwen3Config":
    from transformers import LlamaConfig, Qwen3Config

    if config.hidden_size % config.num_heads:
        raise StageError(f"sft.hidden_size={config.hidden_size} is not a multiple of sft.num_heads={config.num_heads}")
    kind = LlamaConfig if config.architecture == "llama" else Qwen3Config
    longest = 1 + (config.max_history + 1) * vocabulary.space.num_levels + sum(config.steps)
    return kind(
        vocab_size=vocabulary.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=1 << (longest - 1).bit_length(),
        tie_word_embeddings=False,
        pad_token_id=COMPACT_SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=COMPACT_SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=COMPACT_SPECIAL_TOKENS.index("<eos>"),
    )


def _add_dropout(model: "PreTrainedModel", share: float) -> None:
    """Dropout on every attention and MLP output. Hooks, so that the checkpoint stays a plain Llama or Qwen3."""

    def drop(module: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(output, tuple):
            return _dropped(output[0], share if module.training else 0.0), *output[1:]
        return _dropped(output, share if module.training else 0.0)

    for layer in model.base_model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    model.get_input_embeddings().register_forward_hook(drop)


def _dropped(values: Tensor, share: float) -> Tensor:
    """Dropout by 16 random bits a number, four numbers a draw: `functional.dropout` draws one at a time, and is slower.

    So `share` is rounded to 1 / 65,536.
    """
    if not share:
        return values
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device).random_(-(2**63), None)
    is_kept = draws.view(torch.int16)[: values.numel()].view(values.shape) >= round(share * 2**16) - 2**15
    return values * is_kept.to(values.dtype).mul_(1 / (1 - share))  # a third of `torch.where`'s time, there and back
