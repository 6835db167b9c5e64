"""Variants of a bundle: the same shape, with other weights or another catalogue."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from semantic_ids.bundle import TOKENIZER, Bundle, BundleParts, publish
from semantic_ids.catalog import Catalog
from semantic_ids.neighbours import Neighbours
from semantic_ids.prompt import CONTINUOUS_VERSION, STEPWISE_VERSION, PromptSpec
from tests.service.world import MAX_HISTORY, SPACE, make_step_reader


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


def with_steps(bundle: Bundle, root: Path, steps: tuple[int, ...]) -> Bundle:
    """The same model, whose prompts force steps that are read."""
    hidden_size = json.loads((bundle.model_folder / "config.json").read_text())["hidden_size"]
    parts = replace(
        _parts(bundle, bundle.model_folder, bundle.catalog, bundle.neighbours),
        prompt=PromptSpec(version=STEPWISE_VERSION, max_history=MAX_HISTORY, steps=steps),
        step_reader=make_step_reader(bundle.quantizer, hidden_size),
    )
    return publish(root / "bundles", parts, lambda _bundle: None)


def with_continuous_steps(bundle: Bundle, root: Path) -> Bundle:
    """The same model, whose steps are to read the output before them."""
    parts = _parts(bundle, bundle.model_folder, bundle.catalog, bundle.neighbours)
    prompt = PromptSpec(version=CONTINUOUS_VERSION, max_history=MAX_HISTORY, steps=(1, 1, 1))
    return publish(root / "bundles", replace(parts, prompt=prompt), lambda _bundle: None)


def _published(bundle: Bundle, root: Path, model: Path, catalog: Catalog, neighbours: Neighbours) -> Bundle:
    return publish(root / "bundles", _parts(bundle, model, catalog, neighbours), lambda _bundle: None)


def _parts(bundle: Bundle, model: Path, catalog: Catalog, neighbours: Neighbours) -> BundleParts:
    return BundleParts(
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
