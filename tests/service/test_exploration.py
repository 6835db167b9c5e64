"""Diversity and exploration over HTTP, through the real engine: legal, full, and honest about propensities."""

import random
from typing import Any

import pytest

from tests.service.running import PATIENT_MS, Service, assert_problem
from tests.service.world import BY_ID, ITEM_IDS, eligible, ids_of, random_filter, scores_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


def random_request(rng: random.Random, **wish: float) -> dict[str, Any]:
    history = rng.choices(ITEM_IDS, k=rng.randint(1, 6))
    return {"history": history, "filter": random_filter(rng), "num_items": rng.randint(1, 40), **wish}


@pytest.mark.parametrize("wish", ["diversity", "exploration"])
async def test_answers_are_legal_full_and_scored_as_without(service: Service, wish: str):
    rng = random.Random(3)
    for _ in range(60):
        asked = random_request(rng)
        allowed = eligible(asked["filter"], asked["history"])
        everything = scores_of(await service.recommend(**asked | {"num_items": 500}))
        answer = await service.recommend(**asked, **{wish: rng.choice([0.1, 0.5, 1.0])})
        assert len(answer["items"]) == min(asked["num_items"], len(allowed))
        assert set(ids_of(answer)) <= allowed
        for item_id, score in scores_of(answer).items():
            assert score == pytest.approx(everything[item_id], abs=1e-4)


async def test_exploring_answers_differ_and_tell_their_propensities(service: Service):
    asked = {"history": list(ITEM_IDS[:3]), "num_items": 10, "exploration": 0.5}
    best = ids_of(await service.recommend(**asked | {"exploration": 0.0}))
    answers = [await service.recommend(**asked) for _ in range(10)]
    assert len({tuple(ids_of(answer)) for answer in answers}) > 1
    for answer in answers:
        propensity = {item["item_id"]: item["propensity"] for item in answer["items"]}
        assert all(0 < one <= 1 for one in propensity.values())
        assert all(propensity[item_id] == 1 for item_id in best[:5])  # half of the places keep the best
        assert any(one < 1 for one in propensity.values())


async def test_without_exploration_every_propensity_is_one(service: Service):
    answer = await service.recommend(history=[ITEM_IDS[0]], diversity=0.5)
    assert {item["propensity"] for item in answer["items"]} == {1.0}


async def test_diversity_shares_fewer_prefixes_and_begins_with_the_best(service: Service):
    def alike(answer: dict[str, Any]) -> float:
        codes = [BY_ID[item_id].codes for item_id in ids_of(answer)]
        pairs = [(one, other) for place, one in enumerate(codes) for other in codes[:place]]
        return sum(one[0] == other[0] for one, other in pairs) / len(pairs)

    asked = {"history": list(ITEM_IDS[:3]), "num_items": 10}
    plain, diverse = await service.recommend(**asked), await service.recommend(**asked, diversity=0.9)
    assert ids_of(diverse)[0] == ids_of(plain)[0]
    assert alike(diverse) < alike(plain)


async def test_both_together_are_refused(service: Service):
    body = {"history": [ITEM_IDS[0]], "diversity": 0.2, "exploration": 0.2, "deadline_ms": PATIENT_MS}
    document = assert_problem(await service.post("/recommend", body), 422, "invalid-request")
    assert "false propensities" in document["detail"]
    assert document["errors"][0]["path"] == "body.exploration"
