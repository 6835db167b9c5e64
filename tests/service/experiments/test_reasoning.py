"""The overrides that make the model think: `rerank` on /recommend, `reasoning` and `rationale` on both endpoints."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from semantic_ids.bundle import Bundle
from service.engine.base import DecodeRequest, DecodeResult, EngineUnavailableError, Think, ThoughtListener
from service.schemas import RecommendRequest
from service.settings import Settings
from tests.service.engines import InstantEngine
from tests.service.running import Service, running
from tests.service.world import ITEM_IDS, ids_of, scores_of

HISTORY = list(ITEM_IDS[:5])
TOLERANCE = 1e-4
POOL = 3  # candidates for each item that is shown


@pytest_asyncio.fixture
async def endless_service(endless: Bundle, tmp_path: Path) -> AsyncIterator[Service]:
    """Thoughts of 30 tokens, after which scores are other ones."""
    settings = Settings(bundles=endless.path.parent, data_dir=tmp_path / "redis", think_max_tokens=30)
    async with running(settings.model_copy(update={"think_max_seconds": 60.0})) as service:
        yield service


async def users_of(service: Service, **overrides: Any) -> dict[str, str]:
    """Put an experiment, and name a user of each variant."""
    content = {
        "name": "thought",
        "traffic": [0.0, 1.0],
        "variants": [{"name": "control", "control": True}, {"name": "new", "overrides": overrides}],
    }
    response = await service.http.put("/experiments/thought", json=content)
    assert response.status_code == 200, response.text
    found: dict[str, str] = {}
    for number in range(100):
        request = RecommendRequest(user_id=f"u{number}")
        (assignment,) = service.state.experiments.treatment(request, "default").assignments
        found.setdefault(assignment.variant, f"u{number}")
    return found


def reranks(service: Service) -> dict[str, float]:
    families = service.state.metrics.reranks.collect()
    return {
        sample.labels["outcome"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name.endswith("_total")
    }


async def test_what_was_retrieved_is_in_the_order_that_rerank_gives_it_after_a_thought(endless_service: Service):
    users = await users_of(endless_service, rerank=True)
    plain = await endless_service.recommend(history=HISTORY, num_items=POOL * 6)
    reranked = await endless_service.rerank(history=HISTORY, candidates=ids_of(plain), reasoning="on")
    answer = await endless_service.recommend(user_id=users["new"], history=HISTORY, num_items=6)
    assert answer["experiment"]["variant"] == "new"
    assert ids_of(answer) == ids_of(reranked)[:6]
    assert ids_of(answer) != ids_of(plain)[:6]
    assert list(scores_of(answer).values()) == pytest.approx(list(scores_of(reranked).values())[:6], abs=TOLERANCE)
    assert [item["rank"] for item in answer["items"]] == list(range(1, 7))
    assert (answer["source"], answer["degraded"], answer["rationale"]) == ("model", False, None)
    timings = answer["timings_ms"]
    assert min(timings["decode"], timings["reasoning"], timings["rerank"]) > 0
    assert sum(timings[stage] for stage in ("history", "decode", "reasoning", "rerank")) <= timings["total"]
    assert reranks(endless_service) == {"done": 1}


async def test_the_control_is_not_reordered(endless_service: Service):
    users = await users_of(endless_service, rerank=True)
    plain = await endless_service.recommend(history=HISTORY)
    answer = await endless_service.recommend(user_id=users["control"], history=HISTORY)
    assert scores_of(answer) == pytest.approx(scores_of(plain), abs=TOLERANCE)
    assert "rerank" not in answer["timings_ms"]
    assert reranks(endless_service) == {}


async def test_rerank_false_means_not(endless_service: Service):
    users = await users_of(endless_service, rerank=False)
    answer = await endless_service.recommend(user_id=users["new"], history=HISTORY)
    assert (answer["timings_ms"]["reasoning"], reranks(endless_service)) == (0, {})


async def test_a_narrow_filter_is_kept_to(endless_service: Service):
    users = await users_of(endless_service, rerank=True)
    few = list(ITEM_IDS[20:24])
    asked = {"history": HISTORY, "filter": {"include_items": few}}
    answer = await endless_service.recommend(user_id=users["new"], **asked)
    assert sorted(ids_of(answer)) == sorted(few)


async def test_the_rationale_is_the_thought_before_the_new_order(reciting: Bundle, tmp_path: Path):
    async with running(Settings(bundles=reciting.path.parent, data_dir=tmp_path / "redis")) as service:
        users = await users_of(service, rerank=True, rationale=True)
        explained = await service.recommend(history=HISTORY, reasoning="on", include_rationale=True)
        answer = await service.recommend(user_id=users["new"], history=HISTORY)
        assert answer["rationale"] == explained["rationale"]
        assert answer["rationale"]


@pytest.mark.parametrize("path", ["/recommend", "/rerank"])
async def test_reasoning_and_rationale_hold_for_both_endpoints(reciting: Bundle, tmp_path: Path, path: str):
    async with running(Settings(bundles=reciting.path.parent, data_dir=tmp_path / "redis")) as service:
        users = await users_of(service, reasoning=True, rationale=True)
        asked: dict[str, Any] = {"history": HISTORY, "deadline_ms": 60_000}
        if path == "/rerank":
            asked["candidates"] = list(ITEM_IDS[10:20])
        for variant in ("new", "control"):
            answer = (await service.post(path, asked | {"user_id": users[variant]})).json()
            assert answer["experiment"] == {"name": "thought", "variant": variant}
            assert bool(answer["rationale"]) == (variant == "new")
            assert (answer["timings_ms"]["reasoning"] > 0) == (variant == "new")
        for wish in ({"reasoning": "off"}, {"include_rationale": False}):
            answer = (await service.post(path, asked | wish | {"user_id": users["new"]})).json()
            assert (answer["experiment"], answer["rationale"]) == (None, None)
        async with asyncio.timeout(10):
            while True:
                report = (await service.http.get("/experiments/thought/report")).json()
                if [one["exposures"] for one in report["variants"]] == [1, 1]:
                    break
                await asyncio.sleep(0.05)


class OnThought(InstantEngine):
    """Answers plain requests at once, and does with a thought what it is told."""

    def __init__(self, bundle: Bundle, told: str) -> None:
        super().__init__(bundle)
        self.told = told

    async def decode(self, request: DecodeRequest, on_thought: ThoughtListener | None = None) -> DecodeResult:
        if isinstance(request.program[0], Think):
            if self.told == "sleep":
                await asyncio.sleep(30)
            if self.told == "fail":
                raise EngineUnavailableError("it is a test")
            everything = await super().decode(request)
            return DecodeResult(everything.ranks[:1], everything.scores[:1])  # the others are missing
        return await super().decode(request)


@pytest.mark.parametrize(
    ("told", "deadline_ms", "outcome"),
    [
        ("sleep", 85, "no_time"),  # less than what the engine is taken to need beside a thought
        ("sleep", 400, "deadline"),
        ("fail", 60_000, "engine_unavailable"),
        ("lose", 60_000, "model_output_repaired"),
    ],
)
async def test_without_a_second_answer_the_first_one_stands(
    endless: Bundle, tmp_path: Path, told: str, deadline_ms: int, outcome: str
):
    settings = Settings(bundles=endless.path.parent, data_dir=tmp_path / "redis")
    async with running(settings, lambda bundle, _settings, _metrics: OnThought(bundle, told)) as service:
        users = await users_of(service, rerank=True, rationale=True)
        asked = {"user_id": users["new"], "history": HISTORY, "deadline_ms": deadline_ms}
        answer = (await service.post("/recommend", asked)).json()
        plain = await service.recommend(history=HISTORY)
        assert scores_of(answer) == scores_of(plain)
        assert (answer["source"], answer["degraded"], answer["reason"]) == ("model", False, None)
        assert (answer["experiment"]["variant"], answer["rationale"]) == ("new", None)
        assert answer["timings_ms"]["total"] < deadline_ms
        assert reranks(service) == {outcome: 1}
