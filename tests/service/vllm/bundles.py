"""Variants of a bundle: the same shape, with other weights or another catalogue."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from semantic_ids.bundle import TOKENIZER, Bundle, BundleParts, publish
from semantic_ids.catalog import Catalog
from semantic_ids.neighbours import Neighbours
from tests.service.world import SPACE


def with_other_weights(bundle: Bundle, root: Path) -> Bundle:
    """Every weight a little different."""
    model = AutoModelForCausalLM.from_pretrained(bundle.model_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    folder = root / "other-weights"
    model.save_pretrained(folder)
    (folder / TOKENIZER).write_bytes((bundle.model_folder / TOKENIZER).read_bytes())
    return _published(bundle, root, folder, bundle.catalog, bundle.neighbours)


def with_other_catalog(bundle: Bundle, root: Path, num_items: int) -> Bundle:
    """`num_items` items of other names, some of them sharing a SID."""
    rng = np.random.default_rng(0)
    catalog = Catalog.build(
        SPACE,
        [f"other-{item}" for item in range(num_items)],
        rng.integers(0, (5, 8, 16), (num_items, SPACE.num_levels)),
        rng.integers(0, 50, num_items),
        [f"Other {item}" for item in range(num_items)],
        [[] for _ in range(num_items)],
    )
    nobody = Neighbours(np.zeros(num_items + 1, np.int64), np.empty(0, np.uint32), np.empty(0, np.float32))
    return _published(bundle, root, bundle.model_folder, catalog, nobody)


def _published(bundle: Bundle, root: Path, model: Path, catalog: Catalog, neighbours: Neighbours) -> Bundle:
    parts = BundleParts(
        catalog=catalog,
        quantizer=bundle.quantizer,
        neighbours=neighbours,
        vocabulary=bundle.vocabulary,
        prompt=bundle.manifest.prompt,
        text_encoder=bundle.manifest.text_encoder,
        model_folder=model,
        config_hash=bundle.manifest.config_hash,
        metrics=bundle.manifest.metrics,
    )
    return publish(root / "bundles", parts, lambda _bundle: None)
