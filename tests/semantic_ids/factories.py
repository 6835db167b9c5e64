"""Small things to test with: SID spaces, catalogues, quantisers, tables, a publishable bundle, tiny models."""

import itertools
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from semantic_ids.bundle import BundleParts
from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidSpace, SidVocabulary
from semantic_ids.neighbours import Neighbours
from semantic_ids.prompt import COMPACT_SPECIAL_TOKENS, COMPACT_VERSION, History, PromptSpec
from semantic_ids.quantizer import DenseLayer, ResidualQuantizer
from semantic_ids.text_encoder import TextEncoderIdentity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPACE = SidSpace(num_levels=3, codebook_size=8)
FIRST_TOKEN_ID = len(COMPACT_SPECIAL_TOKENS)
VOCAB_SIZE = 64
CATEGORIES = ["Beauty", "Beauty > Hair", "Beauty > Hair > Colour", "Beauty > Skin", "Books", "Books > Poetry"]


def vocabulary(space: SidSpace = SPACE) -> SidVocabulary:
    """The space in the vocabulary of the tiny models."""
    return SidVocabulary(space, FIRST_TOKEN_ID, VOCAB_SIZE)


def random_codes(space: SidSpace, num_items: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """SIDs in no order, with repeats where the space is small."""
    return np.random.default_rng(seed).integers(0, space.codebook_size, (num_items, space.num_levels))


def catalog_of(codes: Sequence[Sequence[int]] | npt.NDArray[np.integer], codebook_size: int = 8) -> Catalog:
    """A catalogue of these SIDs; item `i<n>` is row n, and earlier rows are more popular."""
    codes = np.array(codes)
    num_items, num_levels = codes.shape
    return Catalog.build(
        SidSpace(num_levels, codebook_size),
        [f"i{row}" for row in range(num_items)],
        codes,
        np.arange(num_items, 0, -1),
        [f"Title {row}" for row in range(num_items)],
        [[]] * num_items,
    )


def random_catalog(space: SidSpace = SPACE, num_items: int = 40, seed: int = 0) -> Catalog:
    """A catalogue with shared SIDs, tied popularity, and nought to two category paths an item."""
    generator = np.random.default_rng(seed)
    return Catalog.build(
        space,
        [f"item-{number}" for number in generator.permutation(num_items)],
        random_codes(space, num_items, seed),
        generator.integers(0, 5, num_items),
        [f"Tîtle {row} 書" for row in range(num_items)],
        [
            [str(name) for name in generator.choice(CATEGORIES, generator.integers(0, 3), replace=False)]
            for _ in range(num_items)
        ],
    )


def history_of(sids: Sequence[Sequence[int]], titles: Sequence[str] | None = None) -> History:
    """A history of these SIDs, each of `SPACE.num_levels` codes."""
    codes = np.array(sids, np.uint16).reshape(-1, SPACE.num_levels)
    return History(codes, [f"Title {place}" for place in range(len(sids))] if titles is None else titles)


def eighths(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Rounded so that distances of them are exact in float32: a tie is a tie, in whatever order it is summed."""
    return (np.round(values * 8) / 8).astype(np.float32)


def random_quantizer(space: SidSpace = SPACE, dimension: int = 4, seed: int = 0) -> ResidualQuantizer:
    """Codebooks that shrink from level to level, as residuals do."""
    generator = np.random.default_rng(seed)
    codebooks = generator.normal(size=(space.num_levels, space.codebook_size, dimension))
    codebooks /= 2.0 ** np.arange(space.num_levels)[:, None, None]
    scale = generator.choice([0.5, 1.0, 2.0], dimension)
    return ResidualQuantizer(eighths(generator.normal(size=dimension)), eighths(scale), eighths(codebooks))


def random_mlp_quantizer(
    space: SidSpace = SPACE, widths: Sequence[int] = (4, 6, 3), seed: int = 0
) -> ResidualQuantizer:
    """A quantiser behind an MLP of these widths, whose latents are exact in float32 for vectors that are eighths."""
    generator = np.random.default_rng(seed)
    layers = tuple(
        DenseLayer(generator.integers(-1, 2, (out, into)).astype(np.float32), eighths(generator.normal(size=out)))
        for into, out in itertools.pairwise(widths)
    )
    outside, inside = random_quantizer(space, widths[0], seed), random_quantizer(space, widths[-1], seed + 1)
    return ResidualQuantizer(outside.mean, outside.scale, inside.codebooks, layers)


def random_neighbours(num_items: int, seed: int = 0) -> Neighbours:
    """Nought to three neighbours an item."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 4, num_items)
    ranks = generator.integers(0, num_items, counts.sum()).astype(np.uint32)
    weights = generator.uniform(0, 1, counts.sum()).astype(np.float32)
    return Neighbours(np.concatenate(([0], np.cumsum(counts))).astype(np.int64), ranks, weights)


def bundle_parts(
    folder: Path,
    *,
    space: SidSpace = SPACE,
    num_items: int = 40,
    prompt_version: int = COMPACT_VERSION,
    quantizer_space: SidSpace | None = None,
    num_neighbours: int | None = None,
    model_vocab_size: int = VOCAB_SIZE,
    model_folder: Path | None = None,
    metrics: dict[str, float] | None = None,
) -> BundleParts:
    """Everything a publication needs. The checkpoint is a stand-in, unless a real one is given."""
    if model_folder is None:
        model_folder = folder / "checkpoint"
        model_folder.mkdir(parents=True, exist_ok=True)
        (model_folder / "config.json").write_text(json.dumps({"vocab_size": model_vocab_size}), encoding="utf-8")
        (model_folder / "model.safetensors").write_bytes(bytes(range(64)))
    return BundleParts(
        catalog=random_catalog(space, num_items),
        quantizer=random_quantizer(quantizer_space or space),
        neighbours=random_neighbours(num_items if num_neighbours is None else num_neighbours),
        vocabulary=vocabulary(space),
        prompt=PromptSpec(version=prompt_version, max_history=20),
        text_encoder=TextEncoderIdentity(name="tiny", revision="1", dimension=4),
        model_folder=model_folder,
        config_hash="0123abcd",
        metrics=metrics or {"recall@10": 0.125},
    )


def is_mapped(array: npt.NDArray[Any]) -> bool:
    """Whether the array is a view of a memory-mapped file."""
    base: object = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)


@cache
def tiny_model(architecture: Literal["llama", "qwen3"] = "llama") -> "PreTrainedModel":
    """A random two-layer model whose weights are large enough that every token of the prompt changes its answer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = LlamaConfig(**shape) if architecture == "llama" else Qwen3Config(**shape)
    return AutoModelForCausalLM.from_config(config)
