"""A bundle whose model thinks in steps: served with its steps before every code, in every kind of answer."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from semantic_ids.bundle import Bundle, publish
from semantic_ids.decoding.beam import constrained_beam
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import ItemFilter
from semantic_ids.prompt import CONTINUOUS_VERSION, STEPWISE_VERSION, History, PromptSpec
from service.app import make_engine
from service.engine.base import EngineError
from service.engine.local import LocalEngine
from service.metrics import Metrics
from service.settings import Settings
from tests.service.running import Service, running
from tests.service.world import ITEM_IDS, MAX_HISTORY, NUM_ITEMS, ids_of, make_parts, scores_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

HISTORY = list(ITEM_IDS[:4])


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=[STEPWISE_VERSION, CONTINUOUS_VERSION], ids=["discrete", "continuous"]
)
async def stepwise(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """The service on the usual model, whose prompts force two steps before the first code and one before the third."""
    bundle = publish_stepwise(tmp_path_factory.mktemp("bundles"), tmp_path_factory.mktemp("model"), request.param)
    async with running(Settings(bundles=bundle.path.parent, data_dir=tmp_path_factory.mktemp("redis"))) as service:
        yield service


def publish_stepwise(root: Path, model: Path, version: int) -> Bundle:
    prompt = PromptSpec(version=version, max_history=MAX_HISTORY, steps=(2, 0, 1))
    return publish(root, replace(make_parts(model), prompt=prompt), lambda bundle: None)


def expected_scores(
    bundles: Path, *, with_steps: bool = True, fed_back: Sequence[int] | None = None
) -> dict[str, float]:
    """Every unseen item's score after the history, computed without the service; `fed_back` as the prompts have it."""
    bundle = Bundle.load_current(bundles)
    catalog = bundle.catalog
    ranks, _ = catalog.ranks_of(HISTORY)
    fed_back = bundle.renderer.fed_back if fed_back is None else fed_back
    decoder = TreeDecoder.load(bundle.model_folder, bundle.vocabulary, fed_back=fed_back)
    found = constrained_beam(
        decoder,
        catalog.trie,
        decoder.prefill([bundle.renderer.render(History.of(catalog, ranks)).token_ids]),
        [ItemFilter.of(len(catalog), deny=ranks)],
        [NUM_ITEMS],
        forced=bundle.renderer.forced if with_steps else (),
    )[0]
    return dict(zip(catalog.item_ids.take(found.ranks), np.asarray(found.scores).tolist(), strict=True))


async def test_answers_are_scored_behind_the_steps(stepwise: Service, tmp_path: Path):
    root = stepwise.state.bundle.path.parent
    answer = await stepwise.recommend(history=HISTORY, num_items=20)
    expected = expected_scores(root)
    version = stepwise.state.bundle.renderer.version
    assert (answer["source"], answer["versions"]["prompt"]) == ("model", version)
    assert scores_of(answer) == pytest.approx({item: expected[item] for item in ids_of(answer)}, abs=1e-4)
    without = expected_scores(root, with_steps=False)
    assert max(abs(without[item] - expected[item]) for item in expected) > 0.01, "the steps say something"
    discrete = expected_scores(root, fed_back=())
    difference = max(abs(discrete[item] - expected[item]) for item in expected)
    assert difference > 0.01 if version == CONTINUOUS_VERSION else difference == 0


async def test_rerank_agrees_with_recommend(stepwise: Service):
    answer = await stepwise.recommend(history=HISTORY, num_items=20)
    reranked = await stepwise.rerank(history=HISTORY, candidates=ids_of(answer)[::-1])
    assert ids_of(reranked) == ids_of(answer)
    assert scores_of(reranked) == pytest.approx(scores_of(answer), abs=1e-4)


async def test_many_at_once_are_answered_as_one_at_a_time(stepwise: Service):
    """Prompts of different lengths in one batch, each with the outputs of its own beams."""
    histories = [list(ITEM_IDS[start : start + length]) for start, length in [(0, 1), (3, 4), (9, 2), (20, 5)]]
    alone = [await stepwise.recommend(history=history, num_items=20) for history in histories]
    together = await asyncio.gather(*(stepwise.recommend(history=history, num_items=20) for history in histories))
    for one, other in zip(alone, together, strict=True):
        assert ids_of(one) == ids_of(other)
        assert scores_of(one) == pytest.approx(scores_of(other), abs=1e-4)


async def test_the_vllm_engine_refuses_continuous_steps_and_auto_takes_the_local_one(tmp_path: Path):
    bundle = publish_stepwise(tmp_path / "bundles", tmp_path / "model", CONTINUOUS_VERSION)
    settings = Settings(bundles=bundle.path.parent, data_dir=tmp_path / "redis", engine="vllm")
    rule = (
        f"bundle {bundle.bundle_id} has prompt version 5: its thinking steps are continuous, and the vLLM engine runs "
        r"discrete ones only\. Set SIDREC_ENGINE=local, or train with sft\.step_form=discrete"
    )
    with pytest.raises(EngineError, match=rule):
        async with running(settings):
            pass
    assert isinstance(make_engine(bundle, settings.model_copy(update={"engine": "auto"}), Metrics()), LocalEngine)
