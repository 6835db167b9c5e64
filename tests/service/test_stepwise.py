"""A bundle whose model thinks in steps: served with its steps before every code, in every kind of answer."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from semantic_ids.bundle import Bundle, publish
from semantic_ids.decoding.beam import constrained_beam
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import ItemFilter
from semantic_ids.prompt import STEPWISE_VERSION, HistoryItem, PromptSpec
from service.settings import Settings
from tests.service.running import Service, running
from tests.service.world import ITEM_IDS, MAX_HISTORY, NUM_ITEMS, ids_of, make_parts, scores_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

HISTORY = list(ITEM_IDS[:4])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stepwise(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """The service on the usual model, whose prompts force two steps before the first code and one before the third."""
    root = tmp_path_factory.mktemp("bundles")
    prompt = PromptSpec(version=STEPWISE_VERSION, max_history=MAX_HISTORY, steps=(2, 0, 1))
    publish(root, replace(make_parts(tmp_path_factory.mktemp("model")), prompt=prompt), lambda bundle: None)
    async with running(Settings(bundles=root, data_dir=tmp_path_factory.mktemp("redis"))) as service:
        yield service


def expected_scores(bundles: Path, *, with_steps: bool) -> dict[str, float]:
    """Every unseen item's score after the history, computed without the service."""
    bundle = Bundle.load_current(bundles)
    catalog = bundle.catalog
    ranks, _ = catalog.ranks_of(HISTORY)
    items = [HistoryItem(catalog.codes[rank], catalog.titles[rank]) for rank in ranks]
    decoder = TreeDecoder.load(bundle.model_folder, bundle.vocabulary)
    found = constrained_beam(
        decoder,
        catalog.trie,
        decoder.prefill([bundle.renderer.render(items).token_ids]),
        [ItemFilter.of(len(catalog), deny=ranks)],
        [NUM_ITEMS],
        forced=bundle.renderer.forced if with_steps else (),
    )[0]
    return dict(zip(catalog.item_ids.take(found.ranks), np.asarray(found.scores).tolist(), strict=True))


async def test_answers_are_scored_behind_the_steps(stepwise: Service, tmp_path: Path):
    root = stepwise.state.bundle.path.parent
    answer = await stepwise.recommend(history=HISTORY, num_items=20)
    expected = expected_scores(root, with_steps=True)
    assert (answer["source"], answer["versions"]["prompt"]) == ("model", STEPWISE_VERSION)
    assert scores_of(answer) == pytest.approx({item: expected[item] for item in ids_of(answer)}, abs=1e-4)
    without = expected_scores(root, with_steps=False)
    assert max(abs(without[item] - expected[item]) for item in expected) > 0.01, "the steps say something"


async def test_rerank_agrees_with_recommend(stepwise: Service):
    answer = await stepwise.recommend(history=HISTORY, num_items=20)
    reranked = await stepwise.rerank(history=HISTORY, candidates=ids_of(answer)[::-1])
    assert ids_of(reranked) == ids_of(answer)
    assert scores_of(reranked) == pytest.approx(scores_of(answer), abs=1e-4)
