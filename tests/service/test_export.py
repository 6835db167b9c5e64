"""Served events as the next training set, from HTTP to what training reads; and the log for off-policy evaluation."""

import asyncio
import csv
import json
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import pytest_asyncio

from semantic_ids.off_policy import ips_estimate
from service.export import GONE, LONELY, OF_UNUSABLE, REPEATED, UNUSABLE, Exported, ExportError, Wanted, export
from service.histories import EventType, HistoryEntry
from service.redis_keys import history_pattern, user_keys, user_of_history
from service.security import hash_key
from service.settings import Settings
from tests.service.engines import instant
from tests.service.running import Service, event, running, until
from tests.service.test_cli import (
    assert_refused,
    env,  # noqa: F401 - a fixture
    serve,
)
from tests.service.world import ITEM_IDS, ITEMS, SPACE, ids_of
from training.interactions import DataConfig, Dataset
from training.interactions import run as run_data_stage
from training.stage import StageFolder

ODD_USERS = ["naïve 品", "a,b", 'q"uote"', "s/lash\\:{}", "new\nline", "car\rriage", "7", "007"]
ODD_ITEM, ODD_TITLE = 'x/1,"2"\n3\r\n品 4', 'A "title", with\nlines\r\nand 品'
SPACED = next(item_id for item_id in ITEM_IDS if item_id != item_id.strip())
USABLE = [item_id for item_id in ITEM_IDS if item_id == item_id.strip()]


@pytest_asyncio.fixture
async def service(settings: Settings) -> AsyncIterator[Service]:
    kept = settings.model_copy(update={"served_log_length": 10_000})
    async with running(kept, instant) as service:
        yield service


@pytest_asyncio.fixture
async def tenants(settings: Settings) -> AsyncIterator[Service]:
    keys = (f"{hash_key('red')}:red", f"{hash_key('blue')}:blue")
    async with running(settings.model_copy(update={"api_key_hashes": keys}), instant) as service:
        yield service


async def exported(service: Service, out: Path, wanted: Wanted | None = None) -> Exported:
    return await export(service.state.redis, service.state.bundle, out, wanted or Wanted("default"))


def trained_on(out: Path, folder: Path) -> Dataset:
    """What the data stage of training makes of the export."""
    run_data_stage(DataConfig(), out, StageFolder(folder / "data", DataConfig(), {}))
    return Dataset.load(folder / "data")


def histories(data: Dataset) -> dict[str, list[tuple[str, float, str]]]:
    """User → (item, time, type), oldest first, as training sees them."""
    types = list(EventType)
    bounds = zip(data.user_ids, data.sequences.offsets[:-1], data.sequences.offsets[1:], strict=True)
    return {
        user: [
            (data.item_ids[data.sequences.items[at]], float(data.timestamps[at]), types[data.event_types[at]].value)
            for at in range(low, high)
        ]
        for user, low, high in bounds
    }


async def test_training_reads_the_histories_that_were_sent(service: Service, tmp_path: Path):
    path = f"/items/{quote(ODD_ITEM, safe='')}"
    body = {"title": ODD_TITLE, "categories": ["Toys > Games"], "sid": SPACE.format((1, 2, 3))}
    assert (await service.http.put(path, json=body)).status_code == 200
    sent: dict[str, list[tuple[str, float, str]]] = {}
    kinds = [EventType.CLICK, EventType.PURCHASE, EventType.LIKE]
    for number, user_id in enumerate(ODD_USERS):
        items = [*USABLE[number : number + 5], ODD_ITEM]
        sent[user_id] = [(item, 1.7e9 + 0.123456 * place, kinds[place % 3]) for place, item in enumerate(items)]
        wanted = [event(user_id, item, kind, at) for item, at, kind in reversed(sent[user_id])]  # late ones first
        assert (await service.record(*wanted))["accepted"] == len(items)
    out = tmp_path / "out"
    counts = await exported(service, out)
    assert (counts.users, counts.events) == (len(ODD_USERS), 6 * len(ODD_USERS))
    data = trained_on(out, tmp_path / "run")
    assert histories(data) == sent
    known = {item.item_id: (item.title, list(item.categories)) for item in ITEMS if item.item_id in USABLE}
    assert dict(zip(data.item_ids, zip(data.titles, data.categories, strict=True), strict=True)) == known | {
        ODD_ITEM: (ODD_TITLE, ["Toys > Games"])
    }
    assert counts.items == len(known) + 1
    assert counts.left_out == {UNUSABLE: len(ITEMS) - len(USABLE)}


async def test_what_training_would_refuse_is_left_out_and_counted(service: Service, tmp_path: Path):
    kept, gone = USABLE[:3], USABLE[3]
    await service.record(*(event("u", item, timestamp=at) for at, item in enumerate([*kept, gone, SPACED])))
    await service.record(event("u", kept[0], timestamp=0.0))  # an event of its own, in everything the same
    await service.record(event(" spaced", kept[0]), event(" spaced", kept[1], timestamp=1.0))
    await service.record(event("lonely", kept[0]), event("also-lonely", gone), event("also-lonely", kept[0]))
    await service.record(event("hides", kept[0], "hide"))
    assert (await service.http.delete(f"/items/{quote(gone, safe='')}")).status_code == 200
    counts = await exported(service, tmp_path / "out")
    assert histories(trained_on(tmp_path / "out", tmp_path / "run")) == {
        "u": [(item, float(at), "click") for at, item in enumerate(kept)]
    }
    assert (counts.users, counts.events, counts.items) == (1, 3, len(USABLE) - 1)
    assert counts.left_out == {
        GONE: 2,
        OF_UNUSABLE: 3,
        REPEATED: 1,
        LONELY: 2,
        UNUSABLE: len(ITEMS) - len(USABLE) + 1,
    }


async def test_an_item_is_exported_as_it_is_now(service: Service, tmp_path: Path):
    item, again = USABLE[0], USABLE[1]
    await service.http.put(f"/items/{quote(item, safe='')}", json={"title": "Corrected", "categories": ["A|B > C"]})
    await service.http.delete(f"/items/{quote(again, safe='')}")
    body = {"title": "Back", "categories": [], "sid": SPACE.format((1, 1, 1))}
    await service.http.put(f"/items/{quote(again, safe='')}", json=body)
    await service.record(event("u", item), event("u", again, timestamp=1.0))
    await exported(service, tmp_path / "out")
    assert not (tmp_path / "out" / "items.csv").exists(), "a bar in a category would part it in two"
    data = trained_on(tmp_path / "out", tmp_path / "run")
    items = dict(zip(data.item_ids, zip(data.titles, data.categories, strict=True), strict=True))
    assert (items[item], items[again]) == (("Corrected", ["A|B > C"]), ("Back", []))
    assert len(items) == len(USABLE)


async def test_tenants_are_exported_apart_or_by_name(tenants: Service, tmp_path: Path):
    long = "u" * 128
    for key, items in (("red", USABLE[:2]), ("blue", USABLE[2:4])):
        for user in ("alice", long):
            events = [event(user, item, timestamp=at) for at, item in enumerate(items)]
            assert (await tenants.post("/events", {"events": events}, x_api_key=key)).status_code == 200
    await exported(tenants, tmp_path / "red", Wanted("red"))
    found = histories(trained_on(tmp_path / "red", tmp_path / "run-red"))
    assert {user: [item for item, _, _ in events] for user, events in found.items()} == {
        "alice": USABLE[:2],
        long: USABLE[:2],
    }
    await exported(tenants, tmp_path / "all", Wanted())
    found = histories(trained_on(tmp_path / "all", tmp_path / "run-all"))
    assert found["red/alice"][0][0] == USABLE[0]
    assert found["blue/alice"][0][0] == USABLE[2]
    assert len(found) == 4
    with pytest.raises(ExportError, match="tenant 'green'"):
        await exported(tenants, tmp_path / "green", Wanted("green"))


async def test_what_is_older_is_left_alone(service: Service, tmp_path: Path):
    await service.record(*(event("u", item, timestamp=at) for at, item in enumerate(USABLE[:5])))
    counts = await exported(service, tmp_path / "out", Wanted("default", since=3.0))
    assert counts.events == 2
    assert [item for item, _, _ in histories(trained_on(tmp_path / "out", tmp_path / "run"))["u"]] == USABLE[3:5]


async def test_nothing_is_overwritten_and_an_empty_store_is_an_error(service: Service, tmp_path: Path):
    with pytest.raises(ExportError, match="no event of the tenant 'default'"):
        await exported(service, tmp_path / "out")
    await service.record(event("u", USABLE[0]), event("u", USABLE[1]))
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="nothing is overwritten"):
        await exported(service, tmp_path / "out")
    left = await asyncio.to_thread(lambda: list(tmp_path.glob("*out*/**")))
    assert left == [tmp_path / "out"], "nothing is in it, and no staging is left behind"


async def test_thousands_of_users_are_exported_once_each_while_events_come(service: Service, tmp_path: Path):
    old = [HistoryEntry(item, float(at), EventType.CLICK) for at, item in enumerate(USABLE[:3])]
    await service.state.histories.import_histories((f"user-{number}", old) for number in range(5_000))
    exporting = asyncio.create_task(exported(service, tmp_path / "out"))
    number = 0
    while not exporting.done():  # the keyspace grows, so SCAN repeats keys
        await service.record(*(event(f"late-{number}-{one}", USABLE[0]) for one in range(100)))
        number += 1
    counts = await exporting
    found = histories(trained_on(tmp_path / "out", tmp_path / "run"))
    assert counts.users == len(found) == 5_000
    assert all(len(events) == 3 for events in found.values())


@pytest.mark.parametrize("user_id", [*ODD_USERS, " ", "{a}:b", "\ud800"])
def test_a_key_tells_its_user(user_id: str):
    keys = user_keys(user_id, "red")
    assert user_of_history(keys.history) == ("red", user_id)
    assert {user_of_history(key) for key in keys if key != keys.history} == {None}
    assert history_pattern("red") == "sidrec:{red:*}:history"
    assert user_of_history("sidrec:{default}:catalog-items") is None


async def logged(service: Service, number: int) -> None:
    """Wait until the log has so many entries."""
    for _ in range(500):
        lengths = [await service.state.redis.xlen(f"sidrec:{name}:default") for name in ("served", "outcomes")]
        if sum(lengths) >= number:
            return
        await asyncio.sleep(0.02)
    raise TimeoutError(f"the log has {lengths} entries, not {number}")


def served(out: Path) -> list[dict[str, str]]:
    with (out / "served.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


async def test_answers_are_joined_with_what_their_user_did(service: Service, tmp_path: Path):
    answer = await service.recommend(user_id="u", num_items=3)
    shown = [item["item_id"] for item in answer["items"]]
    named = {"recommendation_id": answer["recommendation_id"]}
    clicks = [event("u", shown[1], **named), event("u", shown[1], "purchase", 1.0, **named)]
    await service.record(*clicks)
    await service.record(*clicks)  # sent again: it happened once
    await service.record(event("u", shown[0]), event("u", USABLE[100], **named), event("other", shown[2], **named))
    await logged(service, 1 + 4)
    counts = await exported(service, tmp_path / "out")
    assert (counts.answers, counts.shown_items) == (1, 3)
    rows = served(tmp_path / "out")
    assert [(row["item_id"], row["click"], row["purchase"]) for row in rows] == [
        (shown[0], "0", "0"),
        (shown[1], "1", "1"),
        (shown[2], "0", "0"),
    ]
    assert {row["recommendation_id"] for row in rows} == {answer["recommendation_id"]}
    assert {row["bundle"] for row in rows} == {answer["versions"]["bundle"]}
    assert len({row["user"] for row in rows}) == 1
    assert "u" not in {row["user"] for row in rows}
    for row, item in zip(rows, answer["items"], strict=True):
        assert (float(row["propensity"]), row["item_source"]) == (item["propensity"], item["source"])


async def test_an_erased_user_leaves_nothing_in_the_log(service: Service):
    for user in ("goes", "stays"):
        answer = await service.recommend(user_id=user, num_items=2)
        await service.record(event(user, answer["items"][0]["item_id"], recommendation_id=answer["recommendation_id"]))
    await logged(service, 4)
    await service.recommend(user_id="goes", num_items=2)  # still waits to be written
    assert (await service.http.delete("/users/goes")).status_code == 204
    await asyncio.sleep(0.5)
    redis = service.state.redis
    assert [await redis.xlen(f"sidrec:{name}:default") for name in ("served", "outcomes")] == [1, 1]
    assert len([key async for key in redis.scan_iter(match="sidrec:{default:served:*")]) == 1


async def test_a_log_that_is_off_writes_nothing(settings: Settings):
    async with running(settings, instant) as service:
        await service.recommend(user_id="u")
        await asyncio.sleep(0.4)
        assert not await service.state.redis.exists("sidrec:served:default")


async def test_a_log_that_cannot_be_written_drops_and_counts(service: Service):
    await service.state.redis.set("sidrec:served:default", "not a stream")
    await service.recommend(user_id="u")
    await until(lambda: service.state.served.num_dropped == 1)
    assert "sidrec_served_log_dropped_total 1.0" in (await service.http.get("/metrics")).text


async def test_the_exported_log_tells_what_every_item_is_worth(settings: Settings, tmp_path: Path):
    """The truth is the sum of the click probabilities of all eligible items; a plain mean of the shown is far off."""
    rng = np.random.default_rng(0)
    worth = dict(zip(ITEM_IDS, rng.beta(2, 6, len(ITEM_IDS)), strict=True))
    num_rounds, asked = 300, {"history": list(ITEM_IDS[:2]), "exclude_seen": False}
    kept = settings.model_copy(update={"served_log_length": 10_000})
    async with running(kept) as service:
        eligible = ids_of(await service.recommend(**asked, num_items=20))
        for number in range(num_rounds):
            answer = await service.recommend(
                **asked, user_id=f"u{number}", num_items=8, exploration=1.0, filter={"include_items": eligible}
            )
            named = {"recommendation_id": answer["recommendation_id"]}
            clicked = [item_id for item_id in ids_of(answer) if rng.random() < worth[item_id]]
            if clicked:
                await service.record(*(event(f"u{number}", item_id, **named) for item_id in clicked))
    async with running(kept) as service:  # what waited was written when the first one stopped
        await exported(service, tmp_path / "out")
    rows = [row for row in served(tmp_path / "out") if row["user"]]
    rounds = {name: place for place, name in enumerate(dict.fromkeys(row["recommendation_id"] for row in rows))}
    assert len(rounds) == num_rounds
    reward = np.array([float(row["click"]) for row in rows])
    round_of = np.array([rounds[row["recommendation_id"]] for row in rows])
    found = ips_estimate(reward, [float(row["propensity"]) for row in rows], round_of, num_rounds)
    truth = sum(worth[item_id] for item_id in eligible)
    low, high = found.interval(num_errors=4)  # the seeds are the service's: 1 of 16,000 runs may miss it
    assert low < truth < high
    assert reward.sum() / num_rounds < low, "what was clicked, unweighted, is not what all items are worth"


def test_the_command_exports_a_folder_and_tells_what_is_in_it(env: dict[str, str], tmp_path: Path):  # noqa: F811
    lines = [json.dumps({"user_id": f"u{one}", "events": [[USABLE[0], 1.0, "click"], [USABLE[1], 2.0, "like"]]})
             for one in range(3)]  # fmt: skip
    (tmp_path / "histories.jsonl").write_text("\n".join(lines))
    out = tmp_path / "new" / "out"
    assert_refused(serve(env, "export", "--out", out), "no event of the tenant 'default'", "SIDREC_REDIS_URL")
    assert serve(env, "import-histories", tmp_path / "histories.jsonl").returncode == 0
    done = serve(env, "export", "--out", out, "--since", "1970-01-01")
    assert done.returncode == 0, done.stderr
    assert "3 users, 6 events" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["interactions.csv", "items.csv"]
    assert_refused(serve(env, "export", "--out", out), "nothing is overwritten")
    assert_refused(serve(env, "export", "--out", tmp_path / "x", "--tenant", "a/b"), "tenant 'a/b'")
