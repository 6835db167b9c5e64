"""A small random bundle and users with stored histories, for benchmarks of the service."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from semantic_ids.bundle import BundleParts, publish
from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidSpace, SidVocabulary
from semantic_ids.neighbours import Neighbours
from semantic_ids.prompt import COMPACT_SPECIAL_TOKENS, COMPACT_VERSION, PromptSpec
from semantic_ids.quantizer import ResidualQuantizer
from semantic_ids.text_encoder import TextEncoderIdentity
from service.histories import EventType, Histories, HistoryEntry, connect
from service.redis_server import EmbeddedRedis

SPACE = SidSpace(num_levels=4, codebook_size=256)
NUM_NEIGHBOURS, VECTOR_DIM, MAX_HISTORY = 20, 16, 50


NO_ENCODER = TextEncoderIdentity(name="none", revision="none", dimension=VECTOR_DIM)


def publish_small_bundle(bundles: Path, num_items: int, text_encoder: TextEncoderIdentity = NO_ENCODER) -> None:
    """Random SIDs, neighbours and weights, seed 0; the model is tiny. New items get SIDs where there is an encoder."""
    width = text_encoder.dimension
    rng = np.random.default_rng(0)
    vocabulary = SidVocabulary(SPACE, len(COMPACT_SPECIAL_TOKENS), len(COMPACT_SPECIAL_TOKENS) + SPACE.num_tokens)
    disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.save_pretrained(bundles.parent / "model")
    publish(
        bundles,
        BundleParts(
            catalog=Catalog.build(
                SPACE,
                [item_id(item) for item in range(num_items)],
                rng.integers(0, SPACE.codebook_size, (num_items, SPACE.num_levels)),
                rng.zipf(1.5, num_items).clip(max=10_000),
                [f"The title of item number {item}" for item in range(num_items)],
                [[f"Everything > Shelf {item % 20}"] for item in range(num_items)],
            ),
            quantizer=ResidualQuantizer(
                np.zeros(width, np.float32),
                np.ones(width, np.float32),
                rng.standard_normal((SPACE.num_levels, SPACE.codebook_size, width), np.float32),
            ),
            neighbours=Neighbours(
                np.arange(num_items + 1, dtype=np.int64) * NUM_NEIGHBOURS,
                rng.integers(0, num_items, num_items * NUM_NEIGHBOURS, dtype=np.uint32),
                rng.random(num_items * NUM_NEIGHBOURS, np.float32),
            ),
            vocabulary=vocabulary,
            prompt=PromptSpec(version=COMPACT_VERSION, max_history=MAX_HISTORY),
            text_encoder=text_encoder,
            model_folder=bundles.parent / "model",
            config_hash="benchmark",
            metrics={},
        ),
        try_out=lambda _bundle: None,
    )


async def store_histories(data_dir: Path, num_users: int, num_items: int) -> None:
    """20 to 100 clicks per user, as in MovieLens-100K's lower half, through the service's own import."""
    rng = np.random.default_rng(1)
    histories = [
        (
            user_id(user),
            [
                HistoryEntry(item_id(item), float(timestamp), EventType.CLICK)
                for timestamp, item in enumerate(rng.choice(num_items, rng.integers(20, 101), replace=False))
            ],
        )
        for user in range(num_users)
    ]
    server = EmbeddedRedis(data_dir)
    try:
        redis = connect(await server.start(), timeout_s=10, max_connections=1)
        try:
            await Histories(redis).import_histories(histories)
        finally:
            await redis.aclose()
    finally:
        await server.stop()


def user_id(user: int) -> str:
    """The id of the n-th user."""
    return f"user-{user}"


def item_id(item: int) -> str:
    """The id of the n-th item."""
    return f"item-{item}"
