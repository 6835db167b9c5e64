"""A small world for the service's tests: items whose properties are known, and plain re-statements of the rules.

The rules here are written from the HTTP contract with strings and sets, not with `semantic_ids`, so that the two can
disagree.
"""

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from semantic_ids.bundle import BundleParts
from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidSpace, SidVocabulary
from semantic_ids.neighbours import Neighbours
from semantic_ids.prompt import COMPACT_SPECIAL_TOKENS, COMPACT_VERSION, PromptSpec
from semantic_ids.quantizer import ResidualQuantizer
from semantic_ids.step_reader import NO_CLUSTER, StepReader
from semantic_ids.text_encoder import PACKAGED_MINILM, TextEncoderIdentity

SPACE = SidSpace(num_levels=3, codebook_size=16)
VOCABULARY = SidVocabulary(
    SPACE, len(COMPACT_SPECIAL_TOKENS), vocab_size=len(COMPACT_SPECIAL_TOKENS) + SPACE.num_tokens
)
MAX_HISTORY = 16
NUM_ITEMS, NUM_SIDS = 150, 110
CATEGORIES = (
    "Beauty",
    "Beauty > Hair Care",
    "Beauty > Hair Care > Shampoo",
    "Beauty > Skin Care",
    "Beauty Tools",
    "Toys",
    "Toys > Games",
)
_ODD_IDS = ("", " ", ":", "/", "品", '"', "{}", "\n")
ENCODER_DIMENSION = 384  # of the packaged MiniLM


@dataclass(frozen=True)
class Item:
    """One row of the catalogue."""

    item_id: str
    title: str
    categories: tuple[str, ...]
    codes: tuple[int, ...]
    popularity: int


def _make_items() -> tuple[Item, ...]:
    rng = random.Random(7)
    sids: set[tuple[int, ...]] = set()
    while len(sids) < NUM_SIDS:  # few first codes: prefixes are shared, as in a real catalogue
        sids.add((rng.randrange(5), rng.randrange(8), rng.randrange(16)))
    codes = [*sorted(sids), *rng.choices(sorted(sids), k=NUM_ITEMS - NUM_SIDS)]
    rng.shuffle(codes)
    return tuple(
        Item(
            f"B{number:03}{_ODD_IDS[number % 40] if number % 40 < len(_ODD_IDS) else ''}",
            f"Thing {number}",
            tuple(rng.sample(CATEGORIES, k=rng.choice([0, 1, 1, 1, 2]))),
            codes[number],
            rng.randrange(50),
        )
        for number in range(NUM_ITEMS)
    )


ITEMS = _make_items()
ITEM_IDS = tuple(item.item_id for item in ITEMS)
BY_ID = {item.item_id: item for item in ITEMS}


def is_in(item: Item, category: str) -> bool:
    """A category matches a path or any node on it."""
    return any(path == category or path.startswith(f"{category} > ") for path in item.categories)


def eligible(item_filter: dict[str, list[str]], denied: Collection[str] = ()) -> set[str]:
    """The ids that a request with this filter may be given."""
    include, exclude, any_of, none_of = (
        item_filter.get(name, []) for name in ("include_items", "exclude_items", "any_categories", "none_categories")
    )
    return {
        item.item_id
        for item in ITEMS
        if (not include or item.item_id in include)
        and item.item_id not in exclude
        and (not any_of or any(is_in(item, name) for name in any_of))
        and not any(is_in(item, name) for name in none_of)
        and item.item_id not in denied
    }


def random_ids(rng: random.Random, at_most: int, unknown: bool = True) -> list[str]:
    """Item ids, some repeated, some (if `unknown`) of no item."""
    ids = rng.choices(ITEM_IDS, k=rng.randint(0, at_most))
    return [f"no-such-{item_id}" if unknown and rng.random() < 0.05 else item_id for item_id in ids]


def random_filter(rng: random.Random) -> dict[str, list[str]]:
    """Anything from no restriction to one that leaves nothing."""
    names = [*CATEGORIES, "Hair Care", "No such"]
    found: dict[str, list[str]] = {}
    if rng.random() < 0.3:
        found["include_items"] = random_ids(rng, rng.choice([1, 5, 100]))
    if rng.random() < 0.3:
        found["exclude_items"] = random_ids(rng, rng.choice([1, 100, 400]))
    if rng.random() < 0.4:
        found["any_categories"] = rng.sample(names, k=rng.randint(0, 3))
    if rng.random() < 0.3:
        found["none_categories"] = rng.sample(names, k=rng.randint(0, 3))
    return found


def scores_of(answer: dict[str, Any]) -> dict[str, float]:
    """Item id → score."""
    return {item["item_id"]: item["score"] for item in answer["items"]}


def ids_of(answer: dict[str, Any]) -> list[str]:
    """Item ids, best first."""
    return [item["item_id"] for item in answer["items"]]


def make_model(**config: int) -> LlamaForCausalLM:
    """A tiny model with random weights, always the same; `config` overrides its sizes."""
    torch.manual_seed(0)
    defaults = {
        "vocab_size": VOCABULARY.vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "tie_word_embeddings": True,
        "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**defaults | config))


def make_parts(
    folder: Path, *, weight: float | None = None, items: Sequence[Item] = ITEMS, **config: int
) -> BundleParts:
    """What training would hand over; `weight` overwrites every weight of the model, `config` its sizes.

    `items` are as many as `ITEMS`.
    """
    model = make_model(**config)
    if weight is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(weight)
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    return BundleParts(
        catalog=_catalog(items),
        quantizer=ResidualQuantizer(
            np.zeros(ENCODER_DIMENSION, np.float32),
            np.full(ENCODER_DIMENSION, 0.05, np.float32),
            rng.normal(0, 1, (*_codebook_shape(), ENCODER_DIMENSION)).astype(np.float32),
        ),
        neighbours=_neighbours(rng),
        vocabulary=VOCABULARY,
        prompt=PromptSpec(version=COMPACT_VERSION, max_history=MAX_HISTORY),
        text_encoder=TextEncoderIdentity(
            name=PACKAGED_MINILM, revision=version(PACKAGED_MINILM), dimension=ENCODER_DIMENSION
        ),
        model_folder=folder,
        config_hash="0" * 64,
        metrics={"recall@10": 0.125},
    )


def make_step_reader(quantizer: ResidualQuantizer, hidden_size: int = 32) -> StepReader:
    """Four clusters a level: a used code is in that of its number modulo 4. Projections are random, always the same."""
    cluster_of_code = np.full(_codebook_shape(), NO_CLUSTER, np.int16)
    centres = np.zeros((SPACE.num_levels, 4, quantizer.codebooks.shape[2]), np.float32)
    for level in range(SPACE.num_levels):
        used = np.array(sorted({item.codes[level] for item in ITEMS}))
        cluster_of_code[level, used] = used % 4
        for cluster in range(4):
            mean = quantizer.codebooks[level][used[used % 4 == cluster]].mean(axis=0)
            centres[level, cluster] = mean / np.linalg.norm(mean)
    shape = (SPACE.num_levels, hidden_size, quantizer.codebooks.shape[2])
    projection = np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)
    return StepReader(centres, projection, cluster_of_code, np.array([0.1], np.float32))


def _catalog(items: Iterable[Item]) -> Catalog:
    rows = list(items)
    return Catalog.build(
        SPACE,
        [item.item_id for item in rows],
        np.array([item.codes for item in rows]),
        np.array([item.popularity for item in rows]),
        [item.title for item in rows],
        [item.categories for item in rows],
    )


def _codebook_shape() -> tuple[int, int]:
    return SPACE.num_levels, SPACE.codebook_size


def _neighbours(rng: np.random.Generator) -> Neighbours:
    """Four others of every item, the first the strongest."""
    others = [
        (rank + rng.choice(np.arange(1, NUM_ITEMS), 4, replace=False)) % NUM_ITEMS  # never the item itself
        for rank in range(NUM_ITEMS)
    ]
    return Neighbours(
        np.arange(0, 4 * NUM_ITEMS + 1, 4),
        np.concatenate(others).astype(np.uint32),
        np.tile(np.array([4, 3, 2, 1], np.float32), NUM_ITEMS),
    )
