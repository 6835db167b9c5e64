"""The live catalogue over HTTP: puts, deletions, epochs; on one replica and on two."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from semantic_ids.bundle import Bundle, activate, publish
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.prompt import History
from service.redis_server import EmbeddedRedis
from service.security import hash_key
from service.settings import Settings
from tests.service.engines import SlowEngine, instant
from tests.service.running import Service, assert_problem, event, running
from tests.service.world import BY_ID, ITEM_IDS, SPACE, ids_of, make_parts

HISTORY = [ITEM_IDS[40], ITEM_IDS[41]]
_numbers = count()


def sid(*codes: int) -> str:
    return SPACE.format(codes)


async def put(service: Service, item_id: str, **body: object) -> httpx.Response:
    body = {"title": f"New {item_id}", "categories": ["Toys > Games"], **body}
    return await service.http.put(f"/items/{quote(item_id, safe='')}", json=body)


async def get(service: Service, item_id: str) -> httpx.Response:
    return await service.http.get(f"/items/{quote(item_id, safe='')}")


async def delete(service: Service, item_id: str) -> httpx.Response:
    return await service.http.delete(f"/items/{quote(item_id, safe='')}")


async def shown(service: Service, *item_ids: str) -> list[str]:
    """Which of these items an answer has that may have no others."""
    return ids_of(await service.recommend(history=HISTORY, filter={"include_items": item_ids}, num_items=500))


@pytest.fixture
def new_id() -> str:
    return f"new-{next(_numbers)}"


@pytest_asyncio.fixture
async def redis_url(tmp_path: Path) -> AsyncIterator[str]:
    server = EmbeddedRedis(tmp_path / "shared-redis")
    yield await server.start()
    await server.stop()


@pytest_asyncio.fixture
async def local(settings: Settings) -> AsyncIterator[Service]:
    async with running(settings) as service:
        yield service


@pytest_asyncio.fixture
async def quick(settings: Settings) -> AsyncIterator[Service]:
    async with running(settings, instant) as service:
        yield service


async def test_an_item_that_is_put_with_a_sid_is_in_the_very_next_answer(local: Service, new_id: str):
    assert await shown(local, new_id) == []
    before = (await local.http.get("/versions")).json()
    response = await put(local, new_id, sid=sid(0, 7, 15))
    item = {
        "item_id": new_id,
        "title": f"New {new_id}",
        "categories": ["Toys > Games"],
        "sid": sid(0, 7, 15),
        "catalog_epoch": before["catalog_epoch"] + 1,
    }
    assert (response.status_code, response.json()) == (200, item)
    answer = await local.recommend(history=HISTORY, filter={"include_items": [new_id]})
    assert [(one["item_id"], one["sid"], one["title"], one["source"]) for one in answer["items"]] == [
        (new_id, sid(0, 7, 15), f"New {new_id}", "model")
    ]
    assert answer["versions"]["catalog_epoch"] == before["catalog_epoch"] + 1
    after = (await local.http.get("/versions")).json()
    assert after == before | {"catalog_epoch": before["catalog_epoch"] + 1, "num_items": before["num_items"] + 1}
    assert (await get(local, new_id)).json() == item
    in_category = await local.recommend(history=HISTORY, filter={"any_categories": ["Toys"]}, num_items=100)
    assert new_id in ids_of(in_category)


async def test_scores_at_an_epoch_are_the_exact_softmax_over_its_trie(local: Service, bundle: Bundle):
    """Compared with the same model, asked for every item of the epoch's catalogue one by one."""
    await put(local, "x1", sid=sid(15, 0, 0))  # a new first code: it takes from everybody's probability
    await put(local, "x2", sid=sid(*BY_ID[ITEM_IDS[3]].codes))  # a SID that another item has
    await delete(local, ITEM_IDS[5])
    await put(local, ITEM_IDS[7], sid=sid(14, 3, 3))
    answer = await local.recommend(history=HISTORY, num_items=500, exclude_seen=False)
    codes = {item_id: item.codes for item_id, item in BY_ID.items() if item_id != ITEM_IDS[5]}
    codes |= {"x1": (15, 0, 0), "x2": BY_ID[ITEM_IDS[3]].codes, ITEM_IDS[7]: (14, 3, 3)}
    assert set(ids_of(answer)) == codes.keys()
    history = History(np.array([codes[one] for one in HISTORY]), [BY_ID[one].title for one in HISTORY])
    prompt = bundle.renderer.render(history).token_ids
    expected = _exhaustive(bundle, prompt, set(codes.values()))
    for item in answer["items"]:
        assert item["score"] == pytest.approx(expected[codes[item["item_id"]]], abs=1e-4)
        assert item["sid"] == sid(*codes[item["item_id"]])


def _exhaustive(bundle: Bundle, prompt: np.ndarray, sids: set[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """Log-probability of every SID by its definition: one forward pass for each prefix, with strings and sets."""
    import torch

    model = TreeDecoder.load(bundle.model_folder, bundle.vocabulary).model
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for level in range(SPACE.num_levels):
        block = bundle.vocabulary.block(level)
        longer: dict[tuple[int, ...], float] = {}
        for prefix, score in scores.items():
            tokens = [bundle.vocabulary.block(depth).start + code for depth, code in enumerate(prefix)]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt.tolist(), *tokens]])).logits[0, -1, block.start : block.stop]
            children = sorted({one[level] for one in sids if one[:level] == prefix})
            logprobs = torch.log_softmax(logits[children].double(), 0).tolist()
            longer |= {(*prefix, code): score + value for code, value in zip(children, logprobs, strict=True)}
        scores = longer
    return scores


async def test_an_item_that_is_put_without_a_sid_gets_a_free_one_from_the_codebooks(local: Service):
    names = [f"unplaced-{number}" for number in range(12)]
    responses = await asyncio.gather(*(put(local, name, title=f"A toy, {name}") for name in names))
    assert [response.status_code for response in responses] == [200] * 12
    sids = {response.json()["sid"] for response in responses}
    assert len(sids) == 12
    assert not sids & {sid(*item.codes) for item in BY_ID.values()}
    assert set(await shown(local, *names)) == set(names)
    again = await put(local, names[0], title="Another title", categories=[])
    assert again.json()["sid"] == responses[0].json()["sid"], "a known item keeps its SID"
    assert (await get(local, names[0])).json()["title"] == "Another title"


async def test_a_known_item_that_is_put_without_a_sid_keeps_its_own(quick: Service):
    known = BY_ID[ITEM_IDS[10]]
    response = await put(quick, known.item_id, title="Renamed")
    assert response.json()["sid"] == sid(*known.codes)
    assert (await get(quick, known.item_id)).json()["title"] == "Renamed"


async def test_a_deleted_item_is_never_recommended_again_and_a_second_time_it_is_unknown(local: Service):
    gone, stays = ITEM_IDS[60], ITEM_IDS[61]
    response = await delete(local, gone)
    assert (response.status_code, response.json()) == (200, {"item_id": gone, "catalog_epoch": 1})
    assert await shown(local, gone, stays) == [stays]
    assert_problem(await get(local, gone), 404, "not-found")
    assert_problem(await delete(local, gone), 404, "not-found")
    assert_problem(await delete(local, "no-such"), 404, "not-found")
    assert (await local.http.get("/versions")).json()["catalog_epoch"] == 1, "what changes nothing makes no epoch"
    reranked = await local.rerank(history=HISTORY, candidates=[gone, stays, "no-such"])
    assert [(one["item_id"], one["known"]) for one in reranked["items"]] == [
        (stays, True),
        (gone, False),
        ("no-such", False),
    ]
    assert (await put(local, gone, sid=sid(1, 1, 1))).status_code == 200
    assert set(await shown(local, gone, stays)) == {gone, stays}


async def test_a_deletion_is_in_force_before_any_epoch_has_it(quick: Service, user_id: str):
    """As heard and not yet built: the state between the two is made by hand."""
    live = quick.state.live
    live._deleted[ITEM_IDS[0]] = 1
    assert await shown(quick, *ITEM_IDS[:3]) == await shown(quick, *ITEM_IDS[1:3])
    assert_problem(await get(quick, ITEM_IDS[0]), 404, "not-found")
    answer = await quick.record(event(user_id, ITEM_IDS[0]))
    assert answer["rejected"] == [{"index": 0, "reason": "unknown_item"}]
    fallback = await quick.recommend(filter={"include_items": ITEM_IDS[:3]})
    assert ITEM_IDS[0] not in ids_of(fallback)
    assert live.deleted_since(1) == frozenset()


async def test_events_on_new_items_are_accepted_and_on_deleted_ones_refused(quick: Service, user_id: str):
    await put(quick, "fresh", sid=sid(2, 2, 2))
    await delete(quick, ITEM_IDS[20])
    answer = await quick.record(event(user_id, "fresh"), event(user_id, ITEM_IDS[20]))
    assert (answer["accepted"], answer["rejected"]) == (1, [{"index": 1, "reason": "unknown_item"}])
    assert await shown(quick, "fresh") == ["fresh"]
    seen = await quick.recommend(user_id=user_id, filter={"include_items": ["fresh"]})
    assert ids_of(seen) == []


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("item_id", ["a/b", " ", "品", "x\n", "\n", "%41", "a?b#c", "...", '"{}'])
async def test_any_id_can_be_put_read_and_deleted(instant_service: Service, item_id: str):
    assert (await put(instant_service, item_id, sid=sid(1, 2, 3))).status_code == 200
    assert (await get(instant_service, item_id)).json()["item_id"] == item_id
    assert await shown(instant_service, item_id) == [item_id]
    assert (await delete(instant_service, item_id)).status_code == 200
    assert_problem(await get(instant_service, item_id), 404, "not-found")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_line_break_at_the_end_of_an_id_names_another_item(instant_service: Service):
    await put(instant_service, "line", sid=sid(1, 2, 3))
    assert_problem(await delete(instant_service, "line\n"), 404, "not-found")
    assert (await get(instant_service, "line")).status_code == 200


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"sid": "<a_1><b_2>"}, "body.sid"),
        ({"sid": "<a_1><b_2><c_16>"}, "body.sid"),
        ({"sid": ""}, "body.sid"),
        ({"sid": 5}, "body.sid"),
        ({"title": "x" * 1025}, "body.title"),
        ({"title": None}, "body.title"),
        ({"categories": ["A"] * 65}, "body.categories"),
        ({"categories": [""]}, "body.categories.0"),
        ({"categories": ["a\x1fb"]}, "body"),
        ({"categories": "Toys"}, "body.categories"),
        ({"popularity": 5}, "body.popularity"),
    ],
)
async def test_what_cannot_be_put_is_refused_and_changes_nothing(
    instant_service: Service, body: dict[str, object], path: str
):
    before = (await instant_service.http.get("/versions")).json()
    document = assert_problem(await put(instant_service, "bad", **body), 422, "invalid-request")
    assert [error["path"] for error in document["errors"]] == [path]
    assert (await instant_service.http.get("/versions")).json() == before
    assert_problem(await get(instant_service, "bad"), 404, "not-found")


async def test_items_are_read_with_any_key_and_changed_with_an_administrators(bundles: Path, tmp_path: Path):
    settings = Settings(
        bundles=bundles,
        data_dir=tmp_path / "redis",
        api_key_hashes=(hash_key("caller"),),
        admin_key_hashes=(hash_key("admin"),),
    )
    async with running(settings, instant) as service:
        body = {"title": "x", "sid": sid(0, 0, 1)}
        for headers, read, write in (
            ({}, 401, 401),
            ({"x-api-key": "caller"}, 200, 403),
            ({"x-api-key": "admin"}, 200, 200),
        ):
            assert (await service.http.get("/items/B001", headers=headers)).status_code in (read, 404)
            assert (await service.http.put("/items/k", json=body, headers=headers)).status_code == write
            assert (await service.http.delete("/items/k", headers=headers)).status_code == write


async def test_without_redis_nothing_is_acknowledged(bundles: Path, tmp_path: Path):
    server = EmbeddedRedis(tmp_path / "redis")
    settings = Settings(bundles=bundles, redis_url=await server.start(), redis_timeout_s=0.5)
    async with running(settings, instant) as service:
        await put(service, "early", sid=sid(1, 1, 1))
        await server.stop()
        assert_problem(await put(service, "late", sid=sid(1, 1, 1)), 503, "history-unavailable")
        assert_problem(await delete(service, "early"), 503, "history-unavailable")
        assert await shown(service, "early", "late") == ["early"]
        again = EmbeddedRedis(tmp_path / "redis")
        assert await again.start() == settings.redis_url
        try:
            assert (await put(service, "late", sid=sid(1, 1, 1))).status_code == 200
            assert set(await shown(service, "early", "late")) == {"early", "late"}
        finally:
            await again.stop()


async def test_changes_survive_a_restart(settings: Settings):
    async with running(settings, instant) as service:
        await put(service, "one", sid=sid(3, 3, 3))
        await put(service, "two", sid=sid(3, 3, 3))
        await delete(service, ITEM_IDS[0])
        await put(service, "gone", sid=sid(3, 3, 3))
        await delete(service, "gone")
        await put(service, "one", sid=sid(3, 3, 3), title="Changed")
        before = await shown(service, "one", "two", "gone", ITEM_IDS[0])
    async with running(settings, instant) as service:
        assert (await service.http.get("/versions")).json()["catalog_epoch"] == 6
        assert await shown(service, "one", "two", "gone", ITEM_IDS[0]) == before == ["one", "two"]
        assert (await get(service, "one")).json()["title"] == "Changed"


async def _visible_within(service: Service, item_id: str, present: bool) -> float:
    start = time.perf_counter()
    async with asyncio.timeout(5):
        while bool(await shown(service, item_id)) is not present:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return time.perf_counter() - start


async def test_a_change_is_seen_on_another_replica_within_a_second(bundles: Path, redis_url: str):
    settings = Settings(bundles=bundles, redis_url=redis_url)
    async with running(settings, instant) as one, running(settings, instant) as two:
        for number in range(5):
            writer, reader = (one, two) if number % 2 else (two, one)
            assert (await put(writer, f"r{number}", sid=sid(4, 4, number))).status_code == 200
            assert await _visible_within(reader, f"r{number}", present=True) < 1
            assert (await delete(writer, f"r{number}")).status_code == 200
            assert await _visible_within(reader, f"r{number}", present=False) < 1
        await put(one, "b", sid=sid(4, 4, 4))
        await put(two, "a", sid=sid(4, 4, 4))
        await _visible_within(one, "a", present=True)
        assert await shown(one, "a", "b") == await shown(two, "a", "b") == ["b", "a"], "one order on all replicas"
        versions = [(await service.http.get("/versions")).json() for service in (one, two)]
        assert versions[0] == versions[1]


async def test_replicas_that_assign_sids_at_the_same_moment_choose_different_ones(bundles: Path, redis_url: str):
    """Items with one and the same text: every replica would choose the same SIDs for them."""
    settings = Settings(bundles=bundles, redis_url=redis_url)
    async with running(settings, instant) as one, running(settings, instant) as two:
        await put(one, "warm", title="Loads the encoder")
        puts = [
            put(replica, f"{at}-{number}", title="Alike")
            for number in range(12)
            for at, replica in enumerate((one, two))
        ]
        answers = [answer.json() for answer in await asyncio.gather(*puts)]
        sids = {answer["item_id"]: answer["sid"] for answer in answers}
        assert len(sids) == len(set(sids.values())) == 24
        for item_id, placed in sids.items():
            assert (await get(two, item_id)).json()["sid"] == placed
        await delete(one, "0-0")
        again = (await put(two, "again", title="Alike")).json()["sid"]
        assert again not in set(sids.values()) - {sids["0-0"]}
        shared = await put(two, "on-purpose", title="Alike", sid=sids["0-1"])
        assert shared.json()["sid"] == sids["0-1"], "a client may put two items under one SID"


async def test_a_replica_that_missed_the_stream_reads_everything_anew(bundles: Path, redis_url: str):
    settings = Settings(bundles=bundles, redis_url=redis_url)
    async with running(settings, instant) as one, running(settings, instant) as two:
        await put(one, "before", sid=sid(4, 4, 4))
        await _visible_within(two, "before", present=True)
        store = one.state.live._store
        await one.state.redis.xtrim(store._keys.changes, maxlen=0)
        two.state.live.epoch -= 1  # as if it had not heard of the last change, which the stream has no more
        await put(one, "after", sid=sid(4, 4, 4))
        await _visible_within(two, "after", present=True)
        assert two.state.live.epoch == one.state.live.epoch


async def test_many_puts_at_once_share_epochs_and_are_all_served(quick: Service):
    names = [f"many-{number}" for number in range(200)]
    responses = await asyncio.gather(*(put(quick, name, sid=sid(5, 5, 5)) for name in names))
    assert sorted(response.json()["catalog_epoch"] for response in responses) == list(range(1, 201))
    assert set(await shown(quick, *names)) == {*names}
    sample = quick.state.metrics.registry.get_sample_value
    assert sample("sidrec_catalog_epoch") == 200
    assert sample("sidrec_catalog_changes_total", {"kind": "put"}) == 200
    assert (sample("sidrec_catalog_build_seconds_count") or 0) < 100


async def test_requests_under_way_neither_fail_nor_mix_epochs(local: Service):
    """Every answer is right for the epoch that it names: after change n the items are known."""
    is_over = asyncio.Event()
    history = {0: frozenset[str]()}
    seen: set[int] = set()

    async def ask() -> None:
        while not is_over.is_set():
            answer = await local.recommend(history=HISTORY, filter={"include_items": ["flip", "flop", ITEM_IDS[9]]})
            assert answer["source"] == "model"
            epoch = answer["versions"]["catalog_epoch"]
            seen.add(epoch)
            expected = history[epoch] | {ITEM_IDS[9]}
            assert set(ids_of(answer)) <= expected  # less, where it was deleted while the request waited

    async def change() -> None:
        items: frozenset[str] = frozenset()
        for number in range(1, 41):
            name = "flip" if number % 4 in (1, 3) else "flop"
            items = items ^ {name}
            history[number] = items
            response = await (put(local, name, sid=sid(number % 16, 1, 1)) if name in items else delete(local, name))
            assert response.json()["catalog_epoch"] == number

    crowd = [asyncio.ensure_future(ask()) for _ in range(6)]
    await change()
    is_over.set()
    await asyncio.gather(*crowd)
    assert len(seen) > 10
    assert len(local.state.deployments.current.epochs) == 1


@dataclass
class _Recorded:
    """An engine factory whose engines tell what epochs they have."""

    engines: list["_RecordingEngine"] = field(default_factory=list)

    def __call__(self, bundle: Bundle, *_: object) -> "_RecordingEngine":
        self.engines.append(_RecordingEngine(bundle, 0.3))
        return self.engines[-1]


class _RecordingEngine(SlowEngine):
    def __init__(self, bundle: Bundle, delay_s: float) -> None:
        super().__init__(bundle, delay_s)
        self.epochs: list[str] = []

    async def use_catalog(self, bundle: Bundle) -> None:
        self.epochs.append(bundle.catalog_id)

    async def retire_catalog(self, catalog_id: str) -> None:
        if catalog_id in self.epochs:
            self.epochs.remove(catalog_id)


async def test_an_epoch_lives_until_its_last_request_has_ended(settings: Settings, bundle: Bundle):
    made = _Recorded()
    async with running(settings, made) as service:
        await put(service, "p", sid=sid(1, 1, 1))
        (engine,) = made.engines
        assert engine.epochs == [f"{bundle.bundle_id}@1"]
        under_way = asyncio.ensure_future(shown(service, "p"))
        await asyncio.sleep(0.1)
        await put(service, "q", sid=sid(1, 1, 1))
        assert engine.epochs == [f"{bundle.bundle_id}@1", f"{bundle.bundle_id}@2"]
        assert await under_way == ["p"]
        await asyncio.sleep(0.05)
        assert engine.epochs == [f"{bundle.bundle_id}@2"]


async def test_an_encoder_that_is_not_on_this_machine_is_said_at_once_and_once(bundle: Bundle, tmp_path: Path):
    """The second bundle's encoder is a hub model that nobody has downloaded."""
    root = tmp_path / "bundles"
    shutil.copytree(bundle.path, root / bundle.bundle_id)
    parts = make_parts(tmp_path / "model", weight=0.5)
    elsewhere = parts.text_encoder.model_copy(update={"name": "nobody/no-such-encoder", "revision": "hub"})
    second = publish(root, replace(parts, text_encoder=elsewhere), lambda _bundle: None, activate_it=False)
    activate(root, bundle.bundle_id)
    async with running(Settings(bundles=root, data_dir=tmp_path / "redis"), instant) as service:
        for number in range(3):
            assert (await put(service, f"before-{number}", title="New", sid=sid(0, 7, number))).status_code == 200
        with capture_logs() as logs:
            await service.post(f"/admin/bundles/{second.bundle_id}/activate", {})
            started_at = time.perf_counter()
            refused = await put(service, "unplaced", title="New")
            detail = assert_problem(refused, 503, "sids-unavailable")["detail"]
            assert "`hf download nobody/no-such-encoder`" in detail
            for number in range(3):
                assert (await put(service, f"after-{number}", title="New", sid=sid(0, 8, number))).status_code == 200
            assert time.perf_counter() - started_at < 2
        assert [entry["event"] for entry in logs].count("items_not_carried_over") == 1
        assert sorted(await shown(service, "before-0", "after-0", "after-2")) == ["after-0", "after-2"]


async def test_another_bundle_keeps_deletions_and_what_was_put_since_it_was_made(bundle: Bundle, tmp_path: Path):
    root = tmp_path / "bundles"
    shutil.copytree(bundle.path, root / bundle.bundle_id)
    other = publish(root, make_parts(tmp_path / "model", weight=0.5), lambda _bundle: None, activate_it=False)
    activate(root, bundle.bundle_id)
    settings = Settings(bundles=root, data_dir=tmp_path / "redis")
    await asyncio.sleep(1.1)  # a bundle's time of making is in whole seconds
    async with running(settings, instant) as service:
        await delete(service, ITEM_IDS[0])
        moved, kept = BY_ID[ITEM_IDS[1]], BY_ID[ITEM_IDS[2]]
        await put(service, moved.item_id, sid=sid(15, 15, 15), title="Renamed")
        await put(service, "brand-new", sid=sid(15, 15, 14), title="A toy")
        response = await service.post(f"/admin/bundles/{other.bundle_id}/activate", {})
        assert response.json() == {"bundle": other.bundle_id, "catalog_epoch": 3}
        assert await shown(service, ITEM_IDS[0], kept.item_id) == [kept.item_id]
        renamed = (await get(service, moved.item_id)).json()
        assert (renamed["title"], renamed["sid"]) == ("Renamed", sid(*moved.codes)), "the SID is the new bundle's own"
        new = (await get(service, "brand-new")).json()
        assert new["title"] == "A toy"
        assert new["sid"] not in {sid(*item.codes) for item in BY_ID.values()}
        await put(service, "later", sid=sid(1, 1, 1))
        assert set(await shown(service, "brand-new", "later")) == {"brand-new", "later"}
        await service.post("/admin/rollback", {})
        assert (await get(service, "brand-new")).json()["sid"] == sid(15, 15, 14)
        assert await shown(service, ITEM_IDS[0]) == []
    async with running(settings, instant) as service:
        assert (await service.http.get("/versions")).json()["catalog_epoch"] == 4
        await service.post(f"/admin/bundles/{other.bundle_id}/activate", {})
        assert (await get(service, "brand-new")).json()["sid"] == new["sid"], "agreed on once"
