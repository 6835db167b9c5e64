// The console's script. Talks to the API of the service that serves it, and shows what it says.
// Texts of the API become text nodes and nothing else; the key is sent as a header and kept in this tab alone.

const TYPES = ["click", "like", "dislike", "hide", "purchase"];
const POLL_MS = 3000;
const KEPT_FIGURES = 40;
const NAMED_ITEMS = 20; // of a history: each name is one request
const $ = (id) => document.getElementById(id);

// ── building ────────────────────────────────────────────────────────────────────────────────────────────────────────

function element(namespace, tag, attributes, children) {
  const made = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return made;
}
const h = (tag, attributes = {}, ...children) => element("http://www.w3.org/1999/xhtml", tag, attributes, children);
const svg = (tag, attributes = {}, ...children) => element("http://www.w3.org/2000/svg", tag, attributes, children);

const badge = (text, kind = "") => h("span", { class: `badge ${kind}` }, text);
const pairs = (entries) =>
  h("dl", { class: "pairs" }, entries.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));

/** Cells keep their roles where a narrow screen lays a table out as cards. */
function table(caption, columns, rows, kind = "") {
  return h("div", { class: "scroll" }, h("table", { role: "table", class: kind },
    h("caption", { class: "unseen" }, caption),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" },
      columns.map(([name, css = ""]) => h("th", { role: "columnheader", scope: "col", class: css }, name)))),
    h("tbody", { role: "rowgroup" }, rows.map(({ cells, ...attributes }) => h("tr", { role: "row", ...attributes },
      cells.map((cell, column) => h("td", { role: "cell", class: columns[column][1] ?? "", "data-name": columns[column][0] }, cell)))))));
}

const ICONS = {
  click: ["M4 2.5l8 5.2-3.6.7L11 13l-1.6.9-2.5-4.6L4 11.6z"],
  like: ["M5 13.5V7L7.5 2.5c1 0 1.5.8 1.5 1.7V6.5h3.3c.8 0 1.3.7 1.1 1.5l-1 4.2c-.2.8-.7 1.3-1.5 1.3z", "M2.5 7v6.5"],
  dislike: ["M5 2.5V9l2.5 4.5c1 0 1.5-.8 1.5-1.7V9.5h3.3c.8 0 1.3-.7 1.1-1.5l-1-4.2c-.2-.8-.7-1.3-1.5-1.3z", "M2.5 9V2.5"],
  hide: ["M1.5 8S4 3.5 8 3.5 14.5 8 14.5 8 12 12.5 8 12.5 1.5 8 1.5 8z", "M2.5 13.5l11-11"],
  purchase: ["M3 5.5h10l-.8 8H3.8z", "M5.5 7.5v-3a2.5 2.5 0 0 1 5 0v3"],
};
const icon = (name) => svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, ICONS[name].map((d) => svg("path", { d })));

const number = (value, digits = 2) =>
  value == null ? "–" : Number(value).toLocaleString("en", { maximumFractionDigits: digits });
const percent = (value, digits = 1) => (value == null ? "–" : `${number(100 * value, digits)}\u00a0%`);
const milliseconds = (value) => (value == null ? "–" : `${number(value, value < 10 ? 1 : 0)}\u00a0ms`);
const time = (seconds) => {
  const date = new Date(seconds * 1000);
  if (Number.isNaN(date.getTime())) return String(seconds);
  const [day, clock] = date.toISOString().split("T");
  return [h("span", { class: "part" }, day), " ", h("span", { class: "part" }, clock.slice(0, 8))];
};
const names = (text) => {
  const given = text.trim();
  if (given.startsWith("[")) {
    try { return JSON.parse(given); } catch { /* then it is plain text */ }
  }
  return given.split(/[\n\r]+/).map((one) => one.trim()).filter(Boolean);
};
/** `crypto.randomUUID` is missing on plain HTTP. */
const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

// ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const KEY = "sidrec-api-key";
const keyInput = $("key");
try { keyInput.value = sessionStorage.getItem(KEY) ?? ""; } catch { /* a browser may forbid it: the key lives in the field */ }
$("identify").addEventListener("submit", (event) => event.preventDefault());
keyInput.addEventListener("change", () => {
  try { sessionStorage.setItem(KEY, keyInput.value.trim()); } catch { /* as above */ }
  show();
});

/** What the service refuses; `document` is its problem document. */
class Refusal extends Error {
  constructor(document, retryAfterS) {
    super(document.detail);
    this.document = document;
    this.retryAfterS = retryAfterS;
  }
}

async function ask(path, { method = "GET", body, accept = "application/json", signal } = {}) {
  const headers = { accept };
  if (keyInput.value.trim()) headers["x-api-key"] = keyInput.value.trim();
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal({ title: "No answer", detail: "The service cannot be reached." });
  }
  if (response.ok) return response;
  const text = await response.text();
  let problem = { title: `${response.status} ${response.statusText}`, detail: text.slice(0, 500) };
  try { problem = { ...problem, ...JSON.parse(text) }; } catch { /* a gateway's page, not the service's document */ }
  const seconds = Number.parseFloat(response.headers.get("retry-after") ?? "");
  throw new Refusal(problem, Number.isFinite(seconds) ? seconds : undefined);
}
const askJson = async (path, options) => (await ask(path, options)).json();

/** The `answer` of an event stream; each piece of its thought goes to `onThought`. (EventSource cannot POST.) */
async function readEvents(response, onThought) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refusal({ title: "The stream broke off", detail: "It ended without an answer." });
    const blocks = (waiting + value).split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const kind = lines.find((line) => line.startsWith("event: "))?.slice(7);
      const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
      if (kind === "thought") onThought(JSON.parse(data).text);
      else if (kind === "problem") throw new Refusal(JSON.parse(data));
      else if (kind === "answer") return JSON.parse(data);
    }
  }
}

/** The problem as the service says it, and when it is worth another try. */
function problemBox(error, again) {
  if (!(error instanceof Refusal)) throw error;
  const { title, detail, status, errors = [], request_id } = error.document;
  const box = h("div", { class: "problem", role: "alert" },
    h("h3", {}, title, status && h("span", { class: "muted" }, ` ${status}`)),
    h("p", {}, detail),
    errors.length > 0 && h("ul", {}, errors.map((one) => h("li", {}, h("code", {}, one.path), " ", one.message))),
    request_id && h("p", { class: "muted small" }, "request ", h("code", {}, request_id)));
  if (error.retryAfterS !== undefined && again) box.append(retryButton(error.retryAfterS, again));
  return box;
}

function retryButton(seconds, again) {
  const button = h("button", { type: "button", disabled: true, onclick: again });
  let left = Math.ceil(seconds);
  const tick = () => {
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left-- > 0) setTimeout(tick, 1000);
  };
  tick();
  return button;
}

const titles = new Map(); // item id → title, as far as this page has been told

async function learnTitles(itemIds) {
  const unknown = [...new Set(itemIds)].filter((itemId) => !titles.has(itemId));
  const next = async () => {
    for (let itemId = unknown.pop(); itemId !== undefined; itemId = unknown.pop()) {
      titles.set(itemId, (await askJson(`items/${encodeURIComponent(itemId)}`)).title);
    }
  };
  await Promise.allSettled([next(), next(), next()]); // a title is a nicety: without it the id is shown alone
}

// ── try it ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const form = $("ask");
const mode = () => form.elements.mode.value;
const LISTS = ["any_categories", "none_categories", "include_items", "exclude_items"];
let underWay = null;

function requestBody() {
  const { elements } = form;
  const body = {};
  if (elements.user_id.value) body.user_id = elements.user_id.value;
  if (elements.history.value.trim()) body.history = names(elements.history.value);
  const numeric = (name) => (elements[name].value === "" ? null : Number(elements[name].value));
  if (mode() === "recommend") {
    body.num_items = numeric("num_items");
    const filter = Object.fromEntries(LISTS.map((name) => [name, names(elements[name].value)]).filter(([, list]) => list.length > 0));
    if (Object.keys(filter).length > 0) body.filter = filter;
    if (!elements.exclude_seen.checked) body.exclude_seen = false;
    for (const name of ["diversity", "exploration"]) if (numeric(name) > 0) body[name] = numeric(name);
  } else {
    body.candidates = names(elements.candidates.value);
  }
  if (elements.reasoning.value !== "auto") body.reasoning = elements.reasoning.value;
  if (elements.include_rationale.checked) body.include_rationale = true;
  body.deadline_ms = numeric("deadline_ms");
  return body;
}

/** The same call for a shell; the key stays in a variable of the shell's. */
function curlLine(path, body) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = keyInput.value.trim() ? ' -H "x-api-key: $SIDREC_API_KEY"' : "";
  const stream = body.include_rationale ? " -N -H 'accept: text/event-stream'" : "";
  return `curl -s ${new URL(path, document.baseURI).href}${key}${stream} -H 'content-type: application/json' -d ${quoted(JSON.stringify(body))}`;
}

function curlBox(path, body) {
  const code = h("code", {}, curlLine(path, body));
  const copy = h("button", { type: "button", onclick: async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "Copied";
    } catch { // no clipboard on plain HTTP: select it, and the user copies
      getSelection().selectAllChildren(code);
      copy.textContent = "Selected";
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  } }, "Copy");
  return h("details", { class: "curl" }, h("summary", {}, "As a curl command"), h("div", { class: "copyable" }, h("pre", {}, code), copy));
}

async function submit() {
  underWay?.abort();
  const call = (underWay = new AbortController());
  const path = mode();
  const body = requestBody();
  const answerBox = $("answer");
  markFields([]);
  answerBox.setAttribute("aria-busy", "true");
  $("said").textContent = "Asking…";
  const thought = h("p", { class: "thought-text" });
  const thoughtBox = h("figure", { class: "thought" }, h("figcaption", {}, "Thought"), thought);
  try {
    let answer;
    if (body.include_rationale) {
      answerBox.replaceChildren(thoughtBox);
      thoughtBox.classList.add("writing");
      const response = await ask(path, { method: "POST", body, accept: "text/event-stream", signal: call.signal });
      answer = await readEvents(response, (text) => thought.append(text));
      thought.textContent = answer.rationale ?? "";
    } else {
      answer = await askJson(path, { method: "POST", body, signal: call.signal });
    }
    thoughtBox.classList.remove("writing");
    for (const item of answer.items) if (item.title) titles.set(item.item_id, item.title);
    answerBox.replaceChildren(answerView(answer, path), curlBox(path, body));
    if (answer.trace?.length) thoughtBox.append(traceTable(answer.trace));
    if (answer.rationale) answerBox.firstChild.querySelector(".facts").after(thoughtBox);
    $("said").textContent = `${answer.items.length} items in ${milliseconds(answer.timings_ms.total)}` + (answer.degraded ? `, degraded: ${answer.reason}` : "");
    bringIntoView(answerBox);
    if (path === "rerank") nameRows(answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("said").textContent = "";
    answerBox.replaceChildren(problemBox(error, submit), curlBox(path, body));
    bringIntoView(answerBox);
    markFields(error.document.errors ?? []);
  } finally {
    if (underWay === call) answerBox.removeAttribute("aria-busy");
  }
}

/** Beside a long form, or below it on a narrow screen, the top of an answer may be out of sight. */
function bringIntoView(box) {
  const { top } = box.getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) box.scrollIntoView();
}

/** Marks the inputs that a problem document names, and goes to the first. */
function markFields(errors) {
  for (const input of form.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
  for (const note of form.querySelectorAll(".bad")) note.remove();
  let first = null;
  for (const { path, message } of errors) {
    const input = path.split(".").map((part) => form.querySelector(`[name="${CSS.escape(part)}"]`)).find(Boolean);
    if (!input || input.hasAttribute("aria-invalid")) continue;
    const note = h("p", { class: "bad", id: `bad-${input.id}` }, message);
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", note.id);
    input.after(note);
    input.closest("details")?.setAttribute("open", "");
    first ??= input;
  }
  first?.focus();
}

/** What a model that thinks in steps meant by each. */
function traceTable(steps) {
  const columns = [["Before code", "rank"], ["Nearest cluster", "num"], ["Cosine", "num"], ["Share", "num"], ["Typical items", "item"]];
  const rows = steps.map(({ level, cluster, cosine, share, within, typical }) => ({ cells: [
    level, cluster, cosine.toFixed(2), percent(share),
    h("div", {}, within && h("div", { class: "muted small" }, "beneath ", sidChips(within)),
      typical.map((item) => h("div", {}, h("span", { class: "title" }, item.title), h("code", { class: "id" }, item.item_id)))),
  ] }));
  return table("What each step meant", columns, rows, "steps");
}

function answerView(answer, path) {
  const { source, degraded, reason, experiment, versions, ignored_items: ignored } = answer;
  const facts = h("div", { class: "facts" },
    badge(source, `source-${source}`),
    degraded ? badge(`degraded: ${reason}`, "warn") : reason && badge(reason),
    experiment && badge(`${experiment.name}: ${experiment.variant}`, "accent"),
    h("span", { class: "muted small" }, `bundle ${versions.bundle} · epoch ${versions.catalog_epoch} · prompt ${versions.prompt}`));
  const ignoredNote = ignored.length > 0 && h("p", { class: "muted small" }, `Not in the catalogue, so left out of the history: ${ignored.join(", ")}`);
  if (answer.items.length === 0) return h("div", {}, facts, timingBar(answer.timings_ms), h("p", { class: "empty" }, "No item is left."), ignoredNote);
  const best = Math.max(...answer.items.map((item) => item.score ?? -Infinity));
  const columns = path === "recommend"
    ? [["#", "rank"], ["Item", "item"], ["SID", "sid"], ["Score", "score"], ["Source", "from"], ["Propensity", "num"], ["Then the user …", "acts"]]
    : [["#", "rank"], ["Item", "item"], ["Score", "score"], ["Known", "from"], ["Then the user …", "acts"]];
  const rows = answer.items.map((item) => {
    const title = h("span", { class: "title" }, item.title ?? titles.get(item.item_id) ?? "");
    const named = h("div", { "data-item": item.item_id }, title, h("code", { class: "id" }, item.item_id));
    const cells = path === "recommend"
      ? [item.rank, named, sidChips(item.sid), scoreBar(item.score, best), item.source, number(item.propensity, 4), actions(answer, item)]
      : [item.rank, named, scoreBar(item.score, best), item.known ? "yes" : "no", item.known && actions(answer, item)];
    return { cells };
  });
  return h("div", {}, facts, timingBar(answer.timings_ms),
    table("Items, best first", columns, rows, `items ${path}`),
    Number.isFinite(best) && h("p", { class: "muted small" }, "A bar is an item's probability next to the best one's."),
    ignoredNote, h("div", { id: "after", "aria-live": "polite" }));
}

async function nameRows(answer) {
  await learnTitles(answer.items.filter((item) => item.known).slice(0, NAMED_ITEMS).map((item) => item.item_id));
  for (const cell of $("answer").querySelectorAll("[data-item]")) {
    cell.querySelector(".title").textContent = titles.get(cell.dataset.item) ?? "";
  }
}

function sidChips(sid) {
  const codes = [...sid.matchAll(/<([^<>]+)>/g)].map((match) => match[1]);
  return h("span", { class: "codes", title: sid }, codes.map((code, level) => h("span", { class: `chip level-${level % 6}` }, code.replace("_", " "))));
}

function scoreBar(score, best) {
  if (score == null) return h("span", { class: "scored" }, h("span", { class: "digits" }, "–"));
  const width = 64 * Math.exp(score - best);
  return h("span", { class: "scored" }, h("span", { class: "digits" }, score.toFixed(2)),
    svg("svg", { class: "bar", viewBox: "0 0 64 6", "aria-hidden": "true" },
      svg("rect", { class: "rail", width: 64, height: 6, rx: 3 }), svg("rect", { class: "fill", width: Math.max(width, 1.5), height: 6, rx: 3 })));
}

function timingBar(timings) {
  const { total, ...stages } = timings;
  const known = Object.entries(stages).filter(([, ms]) => ms > 0);
  const rest = total - known.reduce((sum, [, ms]) => sum + ms, 0);
  const parts = [...known, ...(rest > 0.05 ? [["rest", rest]] : [])];
  const whole = parts.reduce((sum, [, ms]) => sum + ms, 0) || 1;
  const css = (stage) => `stage-${["history", "reasoning", "decode"].includes(stage) ? stage : "rest"}`;
  let x = 0;
  return h("div", { class: "timing" },
    svg("svg", { viewBox: "0 0 1000 8", preserveAspectRatio: "none", "aria-hidden": "true" }, parts.map(([stage, ms]) => {
      const width = (1000 * ms) / whole;
      x += width;
      return svg("rect", { class: css(stage), x: x - width, width, height: 8 });
    })),
    h("ul", {}, parts.map(([stage, ms]) => h("li", {}, h("span", { class: `dot ${css(stage)}` }), `${stage} ${milliseconds(ms)}`)),
      h("li", { class: "strong" }, `total ${milliseconds(total)}`)));
}

function actions(answer, item) {
  const why = answer.user_id ? "" : ": needs a user id";
  return h("div", { class: "actions", role: "group", "aria-label": `What the user does with ${item.title ?? item.item_id}` },
    TYPES.map((type) => h("button", {
      type: "button", class: "act", disabled: !answer.user_id, title: `${type}${why}`, "aria-label": `${type} ${item.title ?? item.item_id}`,
      onclick: (event) => act(event.currentTarget, answer, item, type),
    }, icon(type))));
}

async function act(button, answer, item, type) {
  const after = $("after");
  button.disabled = true;
  const event = {
    event_id: newId(), user_id: answer.user_id, item_id: item.item_id, event_type: type,
    timestamp: Date.now() / 1000, recommendation_id: answer.recommendation_id,
  };
  try {
    const { accepted, rejected } = await askJson("events", { method: "POST", body: { events: [event] } });
    if (accepted === 0) throw new Refusal({ title: "The event was not stored", detail: rejected[0]?.reason ?? "it was known already" });
    button.classList.add("done");
    button.closest("tr").classList.add("used");
    const { events } = await askJson(`users/${encodeURIComponent(answer.user_id)}/history`);
    await learnTitles(events.slice(-8).map((one) => one.item_id));
    const note = type === "dislike" || type === "hide"
      ? `${type} is stored. It enters no history; the item is not shown to this user again.`
      : `${type} is stored; the next answer knows it.`;
    after.replaceChildren(h("h3", {}, "History now"), h("p", { class: "muted small" }, note), historyTable(events, 8));
  } catch (error) {
    button.disabled = false;
    after.replaceChildren(problemBox(error, () => act(button, answer, item, type)));
  }
  after.scrollIntoView({ block: "nearest" });
}

function showMode() {
  for (const part of form.querySelectorAll("[data-mode]")) part.hidden = part.dataset.mode !== mode();
  form.querySelector("[type=submit]").textContent = mode() === "recommend" ? "Recommend" : "Rerank";
}

form.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
form.addEventListener("change", showMode);
form.addEventListener("input", ({ target }) => {
  if (target.type === "range") target.closest(".field").querySelector("output").value = target.value;
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); submit(); }
});

// ── user ────────────────────────────────────────────────────────────────────────────────────────────────────────────

function historyTable(events, limit) {
  if (events.length === 0) return h("p", { class: "empty" }, "Nothing is stored of this user.");
  const shown = events.slice(-limit).reverse();
  const rows = shown.map((one) => ({ cells: [
    h("time", { class: "digits" }, time(one.timestamp)),
    h("div", {}, h("span", { class: "title" }, titles.get(one.item_id) ?? ""), h("code", { class: "id" }, one.item_id)),
    badge(one.event_type),
  ] }));
  return h("div", {},
    table("Stored history, newest first", [["Time (UTC)", "when"], ["Item", "item"], ["Type", "from"]], rows, "history"),
    h("p", { class: "muted small" }, `${shown.length} of ${number(events.length)} stored events, newest first`));
}

async function look() {
  const userId = $("looked").value;
  if (!userId) { $("looked").focus(); return; }
  try {
    const { events } = await askJson(`users/${encodeURIComponent(userId)}/history`);
    $("stored").replaceChildren(historyTable(events, 200));
    await learnTitles(events.slice(-NAMED_ITEMS).map((one) => one.item_id));
    if ($("looked").value === userId) $("stored").replaceChildren(historyTable(events, 200));
  } catch (error) {
    $("stored").replaceChildren(problemBox(error, look));
  }
}

async function erase(userId) {
  try {
    await ask(`users/${encodeURIComponent(userId)}`, { method: "DELETE" });
    $("stored").replaceChildren(h("p", { class: "notice" }, "Erased: nothing is stored of ", h("strong", {}, userId), " any more."));
  } catch (error) {
    $("stored").replaceChildren(problemBox(error, () => erase(userId)));
  }
}

$("look").addEventListener("submit", (event) => { event.preventDefault(); look(); });
$("erase").addEventListener("click", () => {
  const userId = $("looked").value;
  if (!userId) { $("looked").focus(); return; }
  $("confirm-user").textContent = userId;
  $("confirm").returnValue = "no";
  $("confirm").showModal();
});
$("confirm").addEventListener("close", () => { if ($("confirm").returnValue === "yes") erase($("confirm-user").textContent); });

// ── state ───────────────────────────────────────────────────────────────────────────────────────────────────────────

async function showVersions() {
  const box = $("versions");
  try {
    const found = await askJson("versions");
    box.replaceChildren(h("div", { class: "cards" },
      h("div", { class: "panel" }, h("h3", {}, "Served"), pairs([
        ["bundle", h("code", {}, found.bundle)], ["catalogue epoch", number(found.catalog_epoch)], ["items", number(found.num_items)],
        ["prompt version", found.prompt], ["engine", found.engine], ["service", found.service]])),
      h("div", { class: "panel" }, h("h3", {}, "The bundle's evaluation"), Object.keys(found.metrics).length > 0
        ? pairs(Object.entries(found.metrics).map(([name, value]) => [name, number(value, 4)]))
        : h("p", { class: "empty" }, "The bundle carries no metrics.")),
      h("div", { class: "panel" }, h("h3", {}, "Bundles beside it"), found.beside.length > 0
        ? found.beside.map((one) => pairs([["bundle", h("code", {}, one.bundle)], ["role", one.role], ["items", number(one.num_items)],
          ["ready", one.is_ready ? "yes" : badge("no", "warn")]]))
        : h("p", { class: "empty" }, "None: no experiment names another bundle."))));
  } catch (error) {
    box.replaceChildren(problemBox(error, showVersions));
  }
}

async function showReady() {
  const sign = $("ready");
  const say = (text, kind, detail) => { // written only when it changes: a screen reader reads every write
    if (sign.textContent !== text) sign.textContent = text;
    sign.className = `ready ${kind}`;
    sign.title = detail;
  };
  try {
    await ask("health/ready");
    say("ready", "good", "A bundle is loaded, the engine decodes, Redis answers");
  } catch (error) {
    say("not ready", "poor", error.document?.detail ?? "");
  }
}

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ANSWERING = new Set(["/recommend", "/rerank"]);

/** Samples of Prometheus' text format that the figures need, by name. */
function parseMetrics(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("sidrec_") && SAMPLE.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value]));
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: Number(match[3]) });
  }
  return (name, matches = () => true) =>
    (found.get(name) ?? []).filter(({ labels }) => matches(labels)).reduce((sum, { labels, value }) => {
      if (labels.le === undefined) return sum + value;
      sum.set(Number(labels.le.replace("+Inf", "Infinity")), (sum.get(Number(labels.le.replace("+Inf", "Infinity"))) ?? 0) + value);
      return sum;
    }, name.endsWith("_bucket") ? new Map() : 0);
}

/** The quantile of what came between two histograms, in ms: linear within its bucket, as Prometheus has it. */
function quantileMs(share, before, now) {
  const bounds = [...now.keys()].sort((a, b) => a - b);
  const counts = bounds.map((bound) => now.get(bound) - (before.get(bound) ?? 0));
  const all = counts.at(-1) ?? 0;
  if (all <= 0) return null;
  const place = counts.findIndex((count) => count >= share * all);
  const low = place === 0 ? 0 : bounds[place - 1];
  if (bounds[place] === Infinity) return 1000 * low;
  const below = place === 0 ? 0 : counts[place - 1];
  return 1000 * (low + ((bounds[place] - low) * (share * all - below)) / (counts[place] - below));
}

const answersOnly = ({ route }) => ANSWERING.has(route);
const FIGURES = [
  ["Answers a second", (now, before, s) => (now.requests - before.requests) / s, (value) => number(value, 1)],
  ["p50", (now, before) => quantileMs(0.5, before.latency, now.latency), milliseconds],
  ["p95", (now, before) => quantileMs(0.95, before.latency, now.latency), milliseconds],
  ["Degraded", (now, before) => share(now.degraded - before.degraded, now.answers - before.answers), percent],
  ["Shed", (now, before) => share(now.shed - before.shed, now.requests - before.requests), percent],
  ["Waiting", (now) => now.waiting, (value) => number(value, 0)],
  ["Engine", (now) => now.ready, (value) => (value ? "ready" : "not ready")],
].map(([name, of, format]) => ({ name, of, format, values: [], tile: null }));
const share = (part, whole) => (whole > 0 ? part / whole : null);
let lastFigures = null;

async function pollFigures() {
  let text;
  try {
    text = await (await ask("metrics", { accept: "text/plain" })).text();
  } catch { // the sign at the top says what is wrong
    lastFigures = null;
    return;
  }
  const sum = parseMetrics(text);
  const now = {
    at: performance.now(),
    requests: sum("sidrec_http_requests_total", answersOnly),
    latency: sum("sidrec_http_request_seconds_bucket", answersOnly),
    answers: sum("sidrec_answers_total"),
    degraded: sum("sidrec_answers_total", ({ reason }) => reason !== ""),
    shed: sum("sidrec_shed_total"),
    waiting: sum("sidrec_engine_waiting"),
    ready: sum("sidrec_engine_ready"),
  };
  const isRestart = lastFigures !== null && now.requests < lastFigures.requests; // counters begin anew
  for (const figure of FIGURES) {
    const value = lastFigures && !isRestart ? figure.of(now, lastFigures, (now.at - lastFigures.at) / 1000) : figure.of.length === 1 ? figure.of(now) : null;
    figure.values = [...figure.values, value].slice(-KEPT_FIGURES);
  }
  lastFigures = now;
  showFigures();
}

function showFigures() {
  for (const figure of FIGURES) {
    if (figure.tile === null) {
      figure.value = h("strong", { class: "digits" });
      figure.line = svg("svg", { class: "spark", viewBox: "0 0 120 32", preserveAspectRatio: "none", "aria-hidden": "true" });
      figure.tile = h("div", { class: "tile" }, h("span", { class: "muted small" }, figure.name), figure.value, figure.line);
      $("figures").append(figure.tile);
    }
    figure.value.textContent = figure.values.at(-1) == null ? "–" : figure.format(figure.values.at(-1));
    figure.line.replaceChildren(...sparkline(figure.values));
  }
}

/** Lines through what is known; a gap where nothing is. */
function sparkline(values) {
  const highest = Math.max(...values.map((value) => value ?? 0), Number.MIN_VALUE);
  const runs = [[]];
  values.forEach((value, place) => {
    if (value === null) runs.push([]);
    else runs.at(-1).push([120 - (values.length - 1 - place) * (120 / (KEPT_FIGURES - 1)), 29 - 26 * (value / highest)]);
  });
  return runs.filter((run) => run.length > 0).map((run) => {
    const [[x, y]] = run;
    const points = run.length > 1 ? run : [[x - 1, y], [x, y]];
    return svg("polyline", { points: points.map((point) => point.map((part) => part.toFixed(1)).join(",")).join(" ") });
  });
}

// ── experiments ─────────────────────────────────────────────────────────────────────────────────────────────────────

async function showExperiments() {
  const box = $("layers");
  try {
    const { layers } = await askJson("experiments");
    const all = layers.flatMap((layer) => layer.experiments.map((one) => ({ layer: layer.name, ...one })));
    box.replaceChildren(all.length === 0 ? h("p", { class: "empty" }, "There is no experiment. PUT /experiments/{name} adds one.") : table(
      "Experiments", [["Experiment", "item"], ["Layer"], ["Traffic"], ["Variants", "arms"], ["Status"], ["", "acts"]],
      all.map((one) => ({ cells: [
        h("strong", {}, one.name), one.layer, trafficBar(one.traffic), h("div", {}, one.variants.map((variant) => badge(variant.name, variant.control ? "" : "accent"))),
        h("div", {}, badge(one.status, one.status === "running" ? "good" : ""), one.waiting_for && h("p", { class: "waiting small" }, `waiting: ${one.waiting_for}`)),
        h("button", { type: "button", "aria-label": `Report of ${one.name}`, onclick: () => showReport(one.name) }, "Report")] })), "experiments"));
  } catch (error) {
    $("report").replaceChildren();
    box.replaceChildren(problemBox(error, showExperiments));
  }
}

function trafficBar([start, end]) {
  return h("span", { class: "scored" },
    svg("svg", { class: "bar", viewBox: "0 0 64 6", "aria-hidden": "true" }, svg("rect", { class: "rail", width: 64, height: 6, rx: 3 }),
      svg("rect", { class: "fill", x: 64 * start, width: Math.max(64 * (end - start), 1), height: 6 })),
    h("span", { class: "digits" }, `${percent(start, 0)} to ${percent(end, 0)}`));
}

async function showReport(name) {
  const box = $("report");
  try {
    const report = await askJson(`experiments/${encodeURIComponent(name)}/report`);
    box.replaceChildren(reportView(report));
  } catch (error) {
    box.replaceChildren(problemBox(error, () => showReport(name)));
  }
  box.focus({ preventScroll: true });
  box.scrollIntoView({ block: "nearest" });
}

function reportView(report) {
  const { variants, sample_ratio: ratio } = report;
  const rates = { ctr: variants.map((one) => one.ctr), conversion: variants.map((one) => one.conversion) };
  const scales = Object.fromEntries(Object.entries(rates).map(([metric, all]) => [metric, {
    rate: scaleOf(all),
    lift: scaleOf(all.flatMap(({ lift: one }) => (one ? [{ value: one.value, interval: one.always_valid_interval }] : [])), [-0.05, 0.05]),
  }]));
  const rate = (one, metric) => h("div", { class: "measure" }, whisker(one[metric], scales[metric].rate), h("span", { class: "digits" }, percent(one[metric].value, 2)),
    h("span", { class: "muted small" }, range(one[metric].interval)));
  const lift = (found, metric) => (!found ? h("span", { class: "muted" }, "control") : h("div", { class: "measure" },
    whisker({ value: found.value, interval: found.always_valid_interval }, scales[metric].lift, 0),
    h("span", { class: "digits" }, signed(found.value)),
    h("span", { class: "muted small" }, found.always_valid_interval ? range(found.always_valid_interval, signed) : "too few events for an interval"),
    found.always_valid_p_value != null && h("span", { class: "small" }, `p ${pText(found.always_valid_p_value)}`)));
  const guard = (found, format) => h("div", {}, h("span", { class: "digits" }, format(found.value)), found.breached && badge("worse", "warn"));
  return h("article", { class: "panel report" },
    h("h3", {}, report.name, " ", badge(report.status, report.status === "running" ? "good" : "")),
    h("p", { class: "muted small" }, `primary metric ${report.primary_metric} · planned for a lift of ${percent(report.minimum_lift, 0)}`,
      report.started_at && ` · since ${report.started_at.slice(0, 16).replace("T", " ")}`),
    h("p", {}, ratio.mismatch ? badge("sample ratio is off", "warn") : badge("sample ratio fits", "good"), h("span", { class: "muted small" }, ` p ${pText(ratio.p_value)}`)),
    report.warnings.length > 0 && h("ul", { class: "warnings" }, report.warnings.map((one) => h("li", {}, one))),
    table(`Report of ${report.name}`,
      [["Variant", "item"], ["Users", "num"], ["Exposures", "num"], ["Clicks", "num"], ["CTR"], ["Lift of CTR"], ["Conversion"], ["Lift of conversion"], ["p95", "num"], ["Degraded", "num"]],
      variants.map((one) => ({ cells: [
        h("strong", {}, one.name), number(one.units), number(one.exposures), number(one.clicks), rate(one, "ctr"), lift(one.ctr.lift, "ctr"),
        rate(one, "conversion"), lift(one.conversion.lift, "conversion"), guard(one.p95_latency_ms, milliseconds), guard(one.degraded_share, percent)] })), "variants"),
    h("p", { class: "muted small" }, "Dots are values and lines 95 % intervals, each column on one scale. Intervals and p of lifts are always valid: they may be acted on at any look."));
}

const signed = (value) => (value == null ? "–" : `${value > 0 ? "+" : ""}${percent(value, 1)}`);
const range = (interval, format = (value) => percent(value, 2)) =>
  interval ? `${interval.low == null ? "…" : format(interval.low)} to ${interval.high == null ? "…" : format(interval.high)}` : "";
const pText = (value) => (value == null ? "–" : value < 0.001 ? "< 0.001" : value.toFixed(3));

function scaleOf(measures, least = []) {
  const ends = [...least, ...measures.flatMap((one) => [one.value, one.interval?.low, one.interval?.high])].filter((end) => end != null);
  const low = Math.min(...ends), high = Math.max(...ends);
  return ends.length === 0 || low === high ? (value) => (value == null ? null : 60) : (value) => 6 + (108 * (value - low)) / (high - low);
}

function whisker({ value, interval }, scale, zero = null) {
  if (value == null) return null;
  const from = interval ? (interval.low == null ? 0 : scale(interval.low)) : null;
  const to = interval ? (interval.high == null ? 120 : scale(interval.high)) : null;
  return svg("svg", { class: "whisker", viewBox: "0 0 120 14", "aria-hidden": "true" },
    zero !== null && svg("line", { class: "zero", x1: scale(zero), x2: scale(zero), y1: 0, y2: 14 }),
    interval && svg("path", { d: `M${from} 7H${to}M${from} 4V10M${to} 4V10` }),
    svg("circle", { cx: scale(value), cy: 7, r: 3 }));
}

$("reload").addEventListener("click", showExperiments);

// ── which section ───────────────────────────────────────────────────────────────────────────────────────────────────

const SECTIONS = ["try", "user", "state", "experiments"];
let pollTimer = null;

function show() {
  if (location.hash === "#main") return; // the skip link
  const wanted = SECTIONS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "try";
  for (const name of SECTIONS) $(name).hidden = name !== wanted;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${wanted}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (wanted === "user" && !$("looked").value) $("looked").value = form.elements.user_id.value;
  if (wanted === "experiments") showExperiments();
  if (wanted === "state") showVersions();
  poll();
}

async function poll() {
  clearTimeout(pollTimer);
  if (document.hidden) return;
  await Promise.all([showReady(), $("state").hidden ? null : pollFigures()]);
  clearTimeout(pollTimer);
  pollTimer = setTimeout(poll, $("state").hidden ? 5 * POLL_MS : POLL_MS);
}

addEventListener("hashchange", show);
document.addEventListener("visibilitychange", poll);
showMode();
show();
