"""The console: its three files over HTTP, and the page in a real browser against the real service."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Request, Route, async_playwright, expect

from semantic_ids.bundle import Bundle, publish
from service.errors import RateLimitedProblem
from service.security import hash_key
from service.settings import Settings
from tests.service.engines import instant
from tests.service.running import Service, running
from tests.service.test_sse import gated, listening
from tests.service.test_step_trace import publish_stepwise
from tests.service.thinking import PIECES, RATIONALE, THOUGHT_IDS
from tests.service.world import ITEMS, make_parts

pytestmark = pytest.mark.asyncio(loop_scope="module")

FILES = {"/console": "text/html", "/console/console.css": "text/css", "/console/console.js": "text/javascript"}
HOSTILE = '<img src="x" onerror="document.title = \'broken\'"><b>bold</b>'
CHROMIUM_OPTIONS = (
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
KEY, ADMIN_KEY = "a-callers-key", "an-administrators-key"

files = pytest.mark.parametrize("path", FILES)


@dataclass
class Console:
    """The service on a port, and a page of the browser with all that it did."""

    service: Service
    page: Page
    origin: str
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)

    async def open(self, section: str = "") -> Page:
        """The page, at one of its sections."""
        await self.page.goto(f"{self.origin}/console" + (section and f"#{section}"))
        return self.page

    async def items(self) -> list[str]:
        """Item ids of the answer that is shown."""
        cells = await self.page.locator("table.items [data-item]").all()
        return [await cell.get_attribute("data-item") or "" for cell in cells]


@asynccontextmanager
async def page_of(service: Service, browser: Browser) -> AsyncIterator[Console]:
    """A page; at the end nothing was asked of another host, and nothing failed but what the service refused."""
    async with listening(service.app) as origin:
        context = await browser.new_context()
        console = Console(service, await context.new_page(), origin)
        page = console.page
        page.set_default_timeout(10_000)
        page.on("console", lambda message: console.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: console.said.append(f"error: {error}"))
        page.on("request", lambda request: console.asked.append(request.url))
        page.on(
            "response", lambda response: console.refused.append(response.status) if response.status >= 400 else None
        )
        try:
            yield console
        finally:
            await context.close()
        assert [url for url in console.asked if not url.startswith((f"{origin}/", "data:"))] == []
        network = [line for line in console.said if line.startswith("error: Failed to load resource")]
        assert len(network) == len(console.refused), console.said  # Chromium's line for each status of 400 and above
        assert [line for line in console.said if line.startswith(("error", "warning")) and line not in network] == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """One Chromium, without which the tests fail."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path is not None, "the browser tests need Chromium: apt-get install chromium"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_OPTIONS))
        yield browser
        await browser.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hostile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A service whose titles are HTML."""
    root = tmp_path_factory.mktemp("hostile")
    items = [replace(item, title=f"{HOSTILE} {item.title}") for item in ITEMS]
    publish(root, make_parts(tmp_path_factory.mktemp("model"), items=items), lambda _bundle: None)
    async with running(Settings(bundles=root, data_dir=tmp_path_factory.mktemp("redis")), instant) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def console(hostile: Service, browser: Browser) -> AsyncIterator[Console]:
    """The page of the service with the hostile titles."""
    async with page_of(hostile, browser) as console:
        yield console


@files
async def test_a_file_is_served_with_its_policy(hostile: Service, path: str):
    response = await hostile.http.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == f"{FILES[path]}; charset=utf-8"
    policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'",
        "img-src": "'self' data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


@files
async def test_a_browser_asks_whether_its_copy_is_the_same(hostile: Service, path: str):
    whole = await hostile.http.get(path)
    assert whole.headers["cache-control"] == "no-cache"
    for known in (whole.headers["etag"], f'"other", W/{whole.headers["etag"]}'):
        same = await hostile.http.get(path, headers={"if-none-match": known})
        assert (same.status_code, same.content) == (304, b"")
        assert same.headers["etag"] == whole.headers["etag"]
        assert same.headers["content-security-policy"] == whole.headers["content-security-policy"]
    other = await hostile.http.get(path, headers={"if-none-match": '"other"'})
    assert (other.status_code, other.content) == (200, whole.content)


async def test_no_other_policy_has_changed(hostile: Service):
    for path in ("/versions", "/console/index.html", "/console/../app.py"):
        policy = (await hostile.http.get(path)).headers["content-security-policy"]
        assert policy == "default-src 'none'; frame-ancestors 'none'"


async def test_the_page_has_nothing_inline_and_nothing_from_elsewhere(hostile: Service):
    page = (await hostile.http.get("/console")).text
    assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page) == []
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', page)) - {"docs", "metrics", "openapi.json"} == {
        "console/console.css", "console/console.js", *re.findall(r'href="(data:[^"]+)"', page),
    }  # fmt: skip
    script = (await hostile.http.get("/console/console.js")).text
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|localStorage", script) == []


@files
async def test_only_get_is_answered(hostile: Service, path: str):
    assert (await hostile.post(path, {})).status_code == 405


async def test_the_files_need_no_key_and_what_they_show_does(bundles: Path, tmp_path: Path):
    settings = Settings(bundles=bundles, data_dir=tmp_path / "redis", api_key_hashes=(hash_key(KEY),))
    async with running(settings, instant) as service:
        for path in FILES:
            assert (await service.http.get(path)).status_code == 200
        assert (await service.post("/recommend", {"user_id": "u"})).status_code == 401


async def test_recommend_click_and_recommend_again(console: Console, user_id: str):
    await console.service.clicks(user_id, ITEMS[0].item_id)
    page = await console.open()
    await page.fill("#user_id", user_id)
    await page.click("#ask button[type=submit]")
    await page.wait_for_selector("table.items")
    first, *rest = await console.items()
    assert len([first, *rest]) == 10
    await page.click(f'tr:has([data-item="{first}"]) button[aria-label^="click"]')
    await expect(page.locator("#after td code")).to_have_text([first, ITEMS[0].item_id])
    assert await console.service.history(user_id) == [ITEMS[0].item_id, first]
    await page.click("#ask button[type=submit]")
    await expect(page.locator("#after table")).to_have_count(0)
    assert first not in await console.items()
    assert set(rest) <= set(await console.items())
    facts = await page.locator(".facts").inner_text()
    assert console.service.state.bundle.bundle_id in facts
    assert "total" in await page.locator(".timing").inner_text()


async def test_each_kind_of_event_is_recorded_with_its_recommendation(console: Console, user_id: str):
    page = await console.open()
    await page.fill("#user_id", user_id)
    await page.click("#ask button[type=submit]")
    await page.wait_for_selector("table.items")
    sent: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/events"):
            sent.extend((request.post_data_json or {})["events"])

    page.on("request", note)
    kinds = ["click", "like", "dislike", "hide", "purchase"]
    for row, kind in enumerate(kinds):
        await page.locator("table.items tbody tr").nth(row).locator(f'[aria-label^="{kind} "]').click()
        await expect(page.locator("#after")).to_contain_text(f"{kind} is stored")
    assert [event["event_type"] for event in sent] == kinds
    assert len({event["event_id"] for event in sent}) == len(kinds)
    assert len({event["recommendation_id"] for event in sent}) == 1
    shown = await console.items()
    assert await console.service.history(user_id) == [shown[0], shown[1], shown[4]]


async def test_a_hostile_title_stays_text(console: Console, user_id: str):
    await console.service.clicks(user_id, ITEMS[0].item_id)
    page = await console.open()
    await page.fill("#user_id", user_id)
    await page.click("#ask button[type=submit]")
    await page.wait_for_selector("table.items")
    assert (await page.locator("table.items .title").first.inner_text()).startswith(HOSTILE)
    await page.click('nav a[href="#user"]')
    await page.click("#look [type=submit]")
    await expect(page.locator("#stored .title")).to_contain_text(HOSTILE)
    assert await page.locator("main img, main b").count() == 0
    assert await page.title() == "sidrec console"


async def test_a_refused_field_is_named_marked_and_focused(console: Console):
    page = await console.open()
    await page.fill("#num_items", "501")
    await page.click("#ask button[type=submit]")
    problem = page.locator(".problem")
    await expect(problem).to_contain_text("Invalid request")
    await expect(problem).to_contain_text("body.num_items")
    await expect(page.locator("#num_items")).to_be_focused()
    assert await page.get_attribute("#num_items", "aria-invalid") == "true"
    await expect(page.locator("#bad-num_items")).to_contain_text("500")
    await page.fill("#num_items", "5")
    await page.click("#ask button[type=submit]")
    await page.wait_for_selector("table.items")
    assert await page.get_attribute("#num_items", "aria-invalid") is None
    assert console.refused == [422]


async def test_the_filter_and_the_curl_command_are_what_was_asked(console: Console):
    page = await console.open()
    await page.fill("#history", json.dumps([ITEMS[0].item_id, "no-such-item"]))
    await page.click("text=Filter")
    await page.fill("#any_categories", "Toys\nBeauty > Hair Care")
    await page.fill("#exclude_items", ITEMS[3].item_id)
    await page.fill("#num_items", "3")
    async with page.expect_request("**/recommend") as asked:
        await page.click("#ask button[type=submit]")
    body = (await asked.value).post_data_json
    assert body == {
        "history": [ITEMS[0].item_id, "no-such-item"], "num_items": 3, "deadline_ms": 1000,
        "filter": {"any_categories": ["Toys", "Beauty > Hair Care"], "exclude_items": [ITEMS[3].item_id]},
    }  # fmt: skip
    await expect(page.locator(".facts")).to_be_in_viewport()  # though the button stands far below the top of the page
    await expect(page.locator("#answer")).to_contain_text("left out of the history: no-such-item")
    command = await page.locator(".curl code").text_content()
    run = await asyncio.to_thread(
        subprocess.run, ["sh", "-c", str(command)], check=True, capture_output=True, text=True
    )
    assert [item["item_id"] for item in json.loads(run.stdout)["items"]] == await console.items()


async def test_rerank_by_keyboard_alone(console: Console):
    page = await console.open()
    await page.keyboard.press("Tab")
    await expect(page.locator(".skip")).to_be_focused()
    await page.focus("[name=mode][value=recommend]")
    await page.keyboard.press("ArrowRight")
    await page.focus("#candidates")
    await page.keyboard.type(ITEMS[9].item_id)
    await page.keyboard.press("Enter")
    await page.keyboard.type("unknown")
    for _ in range(4):  # deadline, reasoning, the thought, the button
        await page.keyboard.press("Tab")
    await expect(page.locator("#ask [type=submit]")).to_be_focused()
    await page.keyboard.press("Enter")
    await page.wait_for_selector("table.rerank")
    assert await console.items() == [ITEMS[9].item_id, "unknown"]
    await expect(page.locator("table.rerank .title").first).to_contain_text(ITEMS[9].title)
    await expect(page.locator("#said")).to_contain_text("2 items")


async def test_a_user_is_erased_after_a_yes_alone(console: Console, user_id: str):
    await console.service.clicks(user_id, ITEMS[0].item_id, ITEMS[1].item_id)
    page = await console.open("user")
    await page.fill("#looked", user_id)
    await page.keyboard.press("Enter")
    await expect(page.locator("#stored td code")).to_have_text([ITEMS[1].item_id, ITEMS[0].item_id])
    await page.click("#erase")
    await page.keyboard.press("Escape")
    await page.click("#erase")
    await page.click("dialog >> text=Keep")
    assert len(await console.service.history(user_id)) == 2
    await page.click("#erase")
    await page.click("dialog button[value=yes]")
    await expect(page.locator("#stored")).to_contain_text("Erased")
    assert await console.service.history(user_id) == []


async def test_the_state_and_its_live_figures(console: Console):
    page = await console.open("state")
    await expect(page.locator("#versions")).to_contain_text(console.service.state.bundle.bundle_id)
    await expect(page.locator("#versions")).to_contain_text("recall@10")
    await expect(page.locator("#ready")).to_have_text("ready")
    tile = page.locator(".tile", has_text="Answers a second")
    await expect(tile).to_be_visible()
    for _ in range(40):
        await console.service.recommend(user_id=None)
    await expect(tile.locator("strong")).to_have_text(re.compile(r"^[1-9]"))
    await expect(page.locator(".tile", has_text="p50").locator("strong")).to_have_text(re.compile(r"ms$"))
    await expect(page.locator(".tile", has_text="Degraded").locator("strong")).to_have_text("100\u00a0%")
    assert await tile.locator("polyline").count() == 1


async def test_when_to_try_again_is_shown_and_held_to(console: Console):
    page = await console.open()
    problem = RateLimitedProblem("too many requests with this key", retry_after_s=1)

    async def refuse(route: Route) -> None:
        document = {"title": problem.title, "detail": problem.detail, "status": problem.status, "errors": []}
        await route.fulfill(status=problem.status, headers=problem.headers, json=document)

    await page.route("**/recommend", refuse, times=1)
    await page.click("#ask button[type=submit]")
    again = page.locator(".problem button")
    await expect(again).to_have_text("Try again in 1 s")
    await expect(again).to_be_disabled()
    await expect(again).to_have_text("Try again")
    await again.click()
    await page.wait_for_selector("table.items")


async def test_a_thought_is_shown_while_it_is_written(reciting: Bundle, browser: Browser, tmp_path: Path):
    settings = Settings(bundles=reciting.path.parent, data_dir=tmp_path / "redis")
    async with gated(settings) as (service, engine), page_of(service, browser) as console:
        page = await console.open()
        await page.fill("#history", "\n".join(item.item_id for item in ITEMS[10:15]))
        await page.fill("#deadline_ms", "60000")
        await page.select_option("#reasoning", "on")
        await page.check("#include_rationale")
        async with page.expect_request("**/recommend") as asked:
            await page.click("#ask button[type=submit]")
        assert (await asked.value).headers["accept"] == "text/event-stream"
        engine.let(4)  # one sentence
        await expect(page.locator(".thought-text")).to_have_text(PIECES[0])
        assert await page.locator("table.items").count() == 0
        engine.let(len(THOUGHT_IDS))
        await page.wait_for_selector("table.items")
        assert await page.locator(".thought-text").text_content() == RATIONALE


async def test_steps_are_shown_with_what_they_meant(browser: Browser, tmp_path: Path):
    settings = Settings(bundles=publish_stepwise(tmp_path), data_dir=tmp_path / "redis")
    async with running(settings) as service, page_of(service, browser) as console:
        page = await console.open()
        await page.fill("#history", "\n".join(item.item_id for item in ITEMS[10:15]))
        await page.fill("#deadline_ms", "60000")
        await page.check("#include_rationale")
        await page.click("#ask button[type=submit]")
        await page.wait_for_selector("table.items")
        assert (await page.locator(".thought-text").text_content() or "").startswith("Step 1 leans (")
        rows = await page.locator("table.steps tbody tr").all()
        answer = await service.recommend(history=[item.item_id for item in ITEMS[10:15]], include_rationale=True)
        assert len(rows) == len(answer["trace"])
        for row, step in zip(rows, answer["trace"], strict=True):
            assert await row.locator(".title").all_text_contents() == [item["title"] for item in step["typical"]]
            assert await row.locator("td").nth(1).text_content() == str(step["cluster"])


async def test_experiments_need_an_administrators_key_that_stays_in_the_tab(
    bundles: Path, browser: Browser, tmp_path: Path
):
    settings = Settings(
        bundles=bundles, data_dir=tmp_path / "redis",
        api_key_hashes=(hash_key(KEY),), admin_key_hashes=(hash_key(ADMIN_KEY),),
    )  # fmt: skip
    async with running(settings, instant) as service, page_of(service, browser) as console:
        service.http.headers["x-api-key"] = ADMIN_KEY
        experiment = {
            "name": "diverse", "traffic": [0, 1],
            "variants": [{"name": "control", "control": True}, {"name": "some", "overrides": {"diversity": 0.2}}],
        }  # fmt: skip
        assert (await service.http.put("/experiments/diverse", json=experiment)).status_code == 200
        for number in range(12):
            await service.recommend(user_id=f"user-{number}")
        page = await console.open("experiments")
        await expect(page.locator("#layers .problem")).to_contain_text("Unauthorized")
        for key, kind in ((KEY, "Forbidden"), (ADMIN_KEY, "diverse")):
            await page.fill("#key", key)
            await page.keyboard.press("Tab")
            await expect(page.locator("#layers")).to_contain_text(kind)
        await page.click('[aria-label="Report of diverse"]')
        await expect(page.locator("table.variants tbody tr")).to_have_count(2)
        exposures = await page.locator("table.variants tbody td:nth-child(3)").all_inner_texts()
        assert sum(map(int, exposures)) == 12
        assert await page.locator("table.variants .whisker circle").count() >= 2
        await page.reload()
        assert await page.input_value("#key") == ADMIN_KEY
        assert ADMIN_KEY not in page.url + "".join(console.asked) + "".join(console.said)
        assert await page.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"
        other = await (await browser.new_context()).new_page()
        await other.goto(f"{console.origin}/console")
        assert await other.input_value("#key") == ""
        await other.context.close()
