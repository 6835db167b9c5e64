"""The trace of a model that thinks in steps: what each step meant, in data and in words, and what neither may name."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from semantic_ids.bundle import Bundle, publish
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.prompt import STEPWISE_VERSION, History, PromptSpec
from semantic_ids.step_reader import StepReader
from service.catalog_titles import CatalogTitles
from service.rationale_check import NamedItems, RationaleCheck
from service.settings import Settings
from tests.service.engines import instant
from tests.service.running import PATIENT_MS, Service, running
from tests.service.test_sse import parse
from tests.service.world import (
    BY_ID,
    ITEM_IDS,
    ITEMS,
    MAX_HISTORY,
    SPACE,
    eligible,
    ids_of,
    make_parts,
    make_step_reader,
    random_filter,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

STEPS = (2, 0, 1)
HISTORY = list(ITEM_IDS[8:12])


def publish_stepwise(folder: Path, *, is_read: bool = True) -> Path:
    """The usual model, whose prompts force two steps before the first code and one before the third."""
    parts = make_parts(folder / "model")
    prompt = PromptSpec(version=STEPWISE_VERSION, max_history=MAX_HISTORY, steps=STEPS)
    reader = make_step_reader(parts.quantizer) if is_read else None
    publish(folder / "bundles", replace(parts, prompt=prompt, step_reader=reader), lambda _bundle: None)
    return folder / "bundles"


@pytest.fixture(scope="module")
def stepwise_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_stepwise(tmp_path_factory.mktemp("stepwise"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stepwise(stepwise_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running(Settings(bundles=stepwise_bundles, data_dir=tmp_path_factory.mktemp("redis"))) as service:
        yield service


async def explained(service: Service, **body: Any) -> dict[str, Any]:
    return await service.recommend(**{"history": HISTORY, "include_rationale": True} | body)


def outcomes(service: Service) -> dict[str, float]:
    """`sidrec_step_traces` so far."""
    (family,) = service.state.metrics.step_traces.collect()
    return {one.labels["outcome"]: one.value for one in family.samples if one.name.endswith("_total")}


def reader_of(service: Service) -> StepReader:
    reader = service.state.bundle.step_reader
    assert reader is not None
    return reader


def outputs_before_codes(bundle: Bundle, model: Any, item_id: str) -> dict[int, np.ndarray]:
    """By level with a step: the output of a plain forward pass over prompt, steps and the item's codes before it."""
    ranks, _ = bundle.catalog.ranks_of(HISTORY)
    tokens = bundle.renderer.render(History.of(bundle.catalog, ranks)).token_ids.tolist()
    outputs = {}
    for level, code in enumerate(BY_ID[item_id].codes):
        tokens += bundle.renderer.forced[level]
        if STEPS[level]:
            with torch.inference_mode():
                hidden = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state
            outputs[level] = hidden[0, -1].numpy()
        tokens.append(bundle.vocabulary.block(level).start + code)
    return outputs


def num_sids(prefix: tuple[int, ...]) -> int:
    return len({item.codes for item in ITEMS if item.codes[: len(prefix)] == prefix})


def cluster_of(reader: StepReader, item_id: str, level: int) -> int:
    return int(reader.cluster_of_code[level, BY_ID[item_id].codes[level]])


async def test_each_step_has_its_nearest_cluster_as_a_plain_forward_pass_says(stepwise: Service):
    """Every item as the first one: of a prefix with other SIDs both steps, else the first alone: no other is run."""
    reader, bundle = reader_of(stepwise), stepwise.state.bundle
    model = TreeDecoder.load(bundle.model_folder, bundle.vocabulary).model
    lengths = set()
    alone = [item.item_id for item in ITEMS if num_sids(item.codes[:2]) == 1]
    for item_id in [*ITEM_IDS[20:60:5], *alone[:3]]:
        answer = await stepwise.rerank(history=HISTORY, candidates=[item_id], include_rationale=True)
        outputs = outputs_before_codes(bundle, model, item_id)
        if num_sids(BY_ID[item_id].codes[:2]) == 1:
            del outputs[2]
        assert [step["level"] for step in answer["trace"]] == [level + 1 for level in outputs]
        for step, (level, output) in zip(answer["trace"], outputs.items(), strict=True):
            projected = output @ reader.projection[level]
            cosines = reader.centres[level] @ projected / np.linalg.norm(projected)
            odds = np.exp(cosines / 0.1)
            assert step["cluster"] == cosines.argmax()
            assert step["cosine"] == pytest.approx(cosines.max(), abs=2e-4)
            assert step["share"] == pytest.approx(odds.max() / odds.sum(), abs=1e-3)
        lengths.add(len(outputs))
    assert lengths == {1, 2}


async def test_it_is_the_first_items_trace_whatever_else_is_found(stepwise: Service):
    """A wide beam, diversity, exploration: the steps are those of the item alone."""
    for more in ({}, {"num_items": 40}, {"diversity": 0.7}, {"exploration": 0.9}):
        answer = await explained(stepwise, **more)
        alone = await stepwise.rerank(history=HISTORY, candidates=ids_of(answer)[:1], include_rationale=True)
        told = [(step["level"], step["cluster"], pytest.approx(step["cosine"], abs=2e-4)) for step in alone["trace"]]
        assert [(step["level"], step["cluster"], step["cosine"]) for step in answer["trace"]] == told


async def test_typical_items_are_of_the_cluster_beneath_the_longest_prefix_with_enough_that_may_be_given(
    stepwise: Service,
):
    reader, codebooks = reader_of(stepwise), stepwise.state.bundle.quantizer.codebooks
    rng = random.Random(3)
    withins = set()
    for _ in range(25):
        item_filter = random_filter(rng)
        allowed = eligible(item_filter, HISTORY)
        answer = await explained(stepwise, filter=item_filter)
        for step in answer["trace"] or []:
            level, first = step["level"] - 1, BY_ID[ids_of(answer)[0]]
            members = [one for one in allowed if cluster_of(reader, one, level) == step["cluster"]]
            beneath = [
                [one for one in members if BY_ID[one].codes[:length] == first.codes[:length]]
                for length in range(level + 1)
            ]
            length = max((length for length in range(level + 1) if len(beneath[length]) >= 3), default=0)
            assert step["within"] == "".join(SPACE.token(place, first.codes[place]) for place in range(length))
            assert {one["item_id"] for one in step["typical"]} <= set(beneath[length])
            assert len(step["typical"]) == min(3, len(beneath[length]))
            assert all(one["title"] == BY_ID[one["item_id"]].title for one in step["typical"])
            assert_central_codes_come_first(step, level, beneath[length], reader, codebooks)
            withins.add(length)
    assert {0, 1} <= withins


def assert_central_codes_come_first(
    step: dict[str, Any], level: int, items: Collection[str], reader: StepReader, codebooks: np.ndarray
) -> None:
    """One item of each code, the most popular, from the code nearest to the centre on; more of a code only after."""

    def distance(code: int) -> float:
        vector = codebooks[level][code]
        return -float(vector @ reader.centres[level, step["cluster"]] / np.linalg.norm(vector))

    codes = sorted({BY_ID[one].codes[level] for one in items}, key=distance)
    shown = [BY_ID[one["item_id"]] for one in step["typical"]]
    assert [item.codes[level] for item in shown[: len(codes)]] == codes[:3]
    for item in shown[: len(codes)]:
        alike = (BY_ID[one].popularity for one in items if BY_ID[one].codes[level] == item.codes[level])
        assert item.popularity == max(alike)


async def test_the_rationale_names_items_of_the_history_and_the_answer_alone(stepwise: Service):
    catalog, reader = stepwise.state.bundle.catalog, reader_of(stepwise)
    titles = CatalogTitles(catalog)
    titles.prepare()
    await titles.ready()
    rng = random.Random(5)
    num_named = 0
    for _ in range(15):
        history = rng.sample(ITEM_IDS, 6)
        answer = await explained(stepwise, history=history, num_items=rng.choice([1, 5, 20]))
        text = answer["rationale"]
        check = RationaleCheck(SPACE, titles, NamedItems.of(catalog, catalog.ranks_of(history)[0]))
        assert check.finish(text, NamedItems.of(catalog, catalog.ranks_of(ids_of(answer))[0])) == text
        named = [re.findall("“Thing ([0-9]+)”", sentence) for sentence in re.split(r"(?<=\.) ", text)]
        for step, numbers in zip(answer["trace"], named, strict=True):
            items = [ITEM_IDS[int(number)] for number in numbers]
            assert {cluster_of(reader, one, step["level"] - 1) for one in items} <= {step["cluster"]}
            members = {
                one
                for one in {*history, *ids_of(answer)}
                if cluster_of(reader, one, step["level"] - 1) == step["cluster"]
            }
            assert len(items) == len(set(items)) and bool(items) == bool(members) and set(items) <= members
            num_named += len(items)
    assert num_named > 30


async def test_a_stream_tells_the_rationale_before_the_answer(stepwise: Service):
    body = {"history": HISTORY, "include_rationale": True, "deadline_ms": PATIENT_MS}
    response = await stepwise.post("/recommend", body, accept="text/event-stream")
    *thoughts, (last, answer) = parse(response.text)
    assert last == "answer"
    assert "".join(data["text"] for _, data in thoughts) == answer["rationale"]
    assert answer["rationale"].startswith("Step 1 leans (")
    response = await stepwise.post("/recommend", {**body, "include_rationale": False}, accept="text/event-stream")
    ((name, answer),) = parse(response.text)
    assert (name, answer["rationale"], answer["trace"]) == ("answer", None, None)


async def test_what_is_not_asked_for_is_not_read(stepwise: Service):
    before = outcomes(stepwise)
    answer = await stepwise.recommend(history=HISTORY)
    assert (answer["rationale"], answer["trace"]) == (None, None)
    assert outcomes(stepwise) == before
    told = await explained(stepwise)
    assert told["items"] == answer["items"], "being explained changes nothing"
    assert outcomes(stepwise)["shown"] == before.get("shown", 0) + 1


async def test_requests_of_one_batch_keep_their_traces_apart(stepwise: Service):
    histories = [list(ITEM_IDS[start : start + 5]) for start in range(30, 60, 2)]
    alone = [await explained(stepwise, history=history) for history in histories]
    asked = (
        explained(stepwise, history=history, include_rationale=place % 3 > 0) for place, history in enumerate(histories)
    )
    for place, (one, together) in enumerate(zip(alone, await asyncio.gather(*asked), strict=True)):
        assert ids_of(together) == ids_of(one)
        steps = [(step["level"], step["cluster"], step["typical"]) for step in one["trace"]]
        told = together["trace"] and [(step["level"], step["cluster"], step["typical"]) for step in together["trace"]]
        assert told == (steps if place % 3 else None)


async def test_an_engine_that_has_no_trace_is_counted(stepwise_bundles: Path, tmp_path: Path):
    async with running(Settings(bundles=stepwise_bundles, data_dir=tmp_path / "redis"), instant) as service:
        answer = await explained(service)
        assert (answer["source"], answer["rationale"], answer["trace"]) == ("model", None, None)
        assert outcomes(service) == {"lost": 1}


async def test_an_answer_without_the_model_has_no_trace(stepwise: Service):
    before = outcomes(stepwise).get("no_answer", 0)
    answer = await explained(stepwise, history=[], user_id="nobody")
    assert (answer["source"], answer["rationale"], answer["trace"]) == ("fallback", None, None)
    assert outcomes(stepwise)["no_answer"] == before + 1


async def test_a_deleted_item_is_typical_no_more(stepwise_bundles: Path, tmp_path: Path):
    async with running(Settings(bundles=stepwise_bundles, data_dir=tmp_path / "redis")) as service:
        for _ in range(3):
            answer = await explained(service)
            item_id = answer["trace"][0]["typical"][0]["item_id"]
            assert (await service.http.delete(f"/items/{item_id}")).status_code == 200
            after = await explained(service)
            assert after["trace"][0]["typical"]
            assert item_id not in [one["item_id"] for step in after["trace"] for one in step["typical"]]


async def test_a_bundle_that_cannot_read_its_steps_answers_without_a_trace(stepwise: Service, tmp_path: Path):
    """Steps that are mere pauses, or a bundle from before there were readers."""
    root = publish_stepwise(tmp_path, is_read=False)
    async with running(Settings(bundles=root, data_dir=tmp_path / "redis")) as service:
        answer = await explained(service)
        assert (answer["rationale"], answer["trace"]) == (None, None)
        assert answer["items"] == (await explained(stepwise))["items"]
        assert outcomes(service) == {"no_clusters": 1}


async def test_a_bundle_without_steps_has_no_trace(service: Service):
    answer = await explained(service)
    assert (answer["rationale"], answer["trace"], outcomes(service)) == (None, None, {})
