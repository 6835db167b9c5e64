"""Hostile requests on a real socket: each is refused with a problem document, and the service lives on, no larger."""

import gzip
import http.client
import json
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.security import hash_key
from tests.service.served import Served, serving
from tests.service.world import ITEM_IDS

KEY, ADMIN_KEY = "hostile-but-known", "keeper-of-the-keys"
MAX_BODY_BYTES = 1_048_576
BODY_TIMEOUT_S = 0.5
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Refusal:
    """What the service answered."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Case:
    """One request, as the bytes on the wire, and the statuses that may answer it."""

    name: str
    request: bytes
    statuses: frozenset[int]


def request(method: str, target: str, body: bytes | None = None, *headers: str | bytes, key: str | None = KEY) -> bytes:
    lines = [f"{method} {target} HTTP/1.1".encode("latin-1"), b"host: service"]
    if key is not None:
        lines.append(f"x-api-key: {key}".encode())
    if body is not None:
        lines.append(b"content-length: %d" % len(body))
        if not any(b"content-type" in _bytes(one).lower() for one in headers):
            lines.append(b"content-type: application/json")
    lines += [_bytes(one) for one in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


def _bytes(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text


def _bodies() -> Iterator[tuple[str, str, bytes]]:
    """(name, path, body), every one to be refused for its body."""
    numbers = {
        "num_items": "0 -1 501 1e1 10.0 1.5 1e999 -1e999 NaN Infinity -Infinity nan 0x10 010 +1 .5 1. 1_0 ١ true null "
        '[] {} "10" "" 9223372036854775808 99999999999999999999 -0.0',
        "diversity": 'NaN Infinity 1e999 -1e-9 1.0000001 "0" true null [0] 1e308',
        "exploration": "NaN -Infinity 1e999 -0.1 2 false []",
        "deadline_ms": '0 -1 9 60001 1e3 100.0 NaN 1e999 "100" true null',
        "exclude_seen": '0 1 "true" null [] 1e999',
        "include_rationale": '0 "false" {}',
        "reasoning": '"AUTO" "" "оn" "on\\u0000" "auto " 1 true null ["on"]',
        "user_id": '7 "" true [] {} "\\u0000" "a\\u0000b" "\\ud800" "\\udfff\\ud800" "\\uDC00x" NaN',
        "history": '7 "B" {} [7] [""] [null] [[]] [{}] [{"item_id":7}] [{"item_id":"B","timestamp":NaN}] '
        '[{"item_id":"B","timestamp":1e999}] [{"item_id":"B","event_type":"buy"}] [{"item_id":"B","x":1}] ["\\ud800"]',
        "filter": '7 [] "x" null {"include_items":"B"} {"include_items":[7]} {"exclude_items":{}} {"none":[]} '
        '{"any_categories":[""]} {"any_categories":["\\ud83d"]} {"include_items":[["B"]]}',
    }
    for field, values in numbers.items():
        for value in values.split(" "):
            yield f"{field}={value}", "/recommend", f'{{"{field}": {value}}}'.encode()
    for field in ("num_items", "deadline_ms", "diversity", "user_id"):
        for digits in (400, 4_299, 5_000, 100_000):
            yield f"{field}=10^{digits}", "/recommend", f'{{"{field}": 1{"0" * digits}}}'.encode()
    for name in (
        "__proto__",
        "constructor",
        "Num_Items",
        "num_items ",
        "user\u200b_id",
        "ｕser_id",
        "",
        "__class__",
        "$where",
    ):
        yield f"unknown field {name!r}", "/recommend", json.dumps({name: 1}).encode()
    long = "x" * 129
    yield "long user", "/recommend", json.dumps({"user_id": long}).encode()
    yield "long astral user", "/recommend", json.dumps({"user_id": "😀" * 129}).encode()
    yield "long item", "/recommend", json.dumps({"history": [long]}).encode()
    yield "long category", "/recommend", json.dumps({"filter": {"any_categories": ["x" * 513]}}).encode()
    yield "long history", "/recommend", json.dumps({"history": ["x"] * 10_001}).encode()
    yield "bad history", "/recommend", json.dumps({"history": [7] * 10_000}).encode()
    yield "bad events of a history", "/recommend", json.dumps({"history": [{"x": 1, "y": 2}] * 10_000}).encode()
    yield "bad filter", "/recommend", json.dumps({"filter": {"exclude_items": [[]] * 10_000}}).encode()
    yield "long filter", "/recommend", json.dumps({"filter": {"exclude_items": ["x"] * 10_001}}).encode()
    for name, text in {
        "twice": '{"num_items": 1, "num_items": 1}',
        "twice, differently": '{"user_id": "a", "user_id": "b"}',
        "twice, once escaped": '{"user_id": "a", "user_\\u0069d": "b"}',
        "twice, deeper": '{"filter": {"include_items": [], "include_items": ["B"]}}',
        "twice, in a list": '{"history": [{"item_id": "B", "item_id": "C"}]}',
        "twice, unknown": '{"a": 1, "a": 1}',
        "twice, empty names": '{"": 1, "": 1}',
    }.items():
        yield name, "/recommend", text.encode()
    candidates = [f"c{number}" for number in range(501)]
    bodies: dict[str, object] = {
        "no candidates": {"candidates": []},
        "absent candidates": {},
        "many candidates": {"candidates": candidates},
        "equal candidates": {"candidates": ["B", "B"]},
        "text candidates": {"candidates": "B"},
        "object candidates": {"candidates": {"0": "B"}},
    }
    for name, content in bodies.items():
        yield name, "/rerank", json.dumps(content).encode()
    good = {"event_id": "e", "user_id": "u", "item_id": ITEM_IDS[0], "event_type": "click", "timestamp": 1.0}
    batches = {"no events": [], "many events": [good] * 1_001, "an object": good, "nested": [[good]]}
    for name, batch in batches.items():
        yield name, "/events", json.dumps({"events": batch}).encode()
    yield "bad events", "/events", json.dumps({"events": [{"x": 1}] * 1_000}).encode()
    for field, texts in {
        "timestamp": '1e999 NaN -Infinity 1e13 "1" true null [] 1' + "0" * 400,
        "event_type": '"buy" "CLICK" "" 1 null "click\\u0000"',
        "event_id": '"" 7 null "\\ud800" "a\\u0000"',
        "item_id": '"" 7 null {}',
        "recommendation_id": "7 [] {}",
    }.items():
        for text in texts.split(" "):
            event = json.dumps({name: value for name, value in good.items() if name != field})[:-1]
            yield f"event with {field}={text[:20]}", "/events", f'{{"events": [{event}, "{field}": {text}}}]}}'.encode()
    for name, body in {
        "nothing": b"",
        "blanks": b" \r\n\t ",
        "null": b"null",
        "true": b"true",
        "a number": b"1",
        "a text": b'"user_id"',
        "a list": b"[]",
        "objects in a list": b'[{"user_id": "u"}]',
        "cut": b'{"user_id": "u"',
        "cut in a text": b'{"user_id": "u',
        "a trailing comma": b'{"num_items": 1,}',
        "single quotes": b"{'num_items': 1}",
        "a comment": b'{"num_items": 1 /* one */}',
        "two documents": b'{"num_items": 1}{"num_items": 1}',
        "a byte order mark": b'\xef\xbb\xbf{"num_items": 1}',
        "UTF-16": '{"num_items": 1}'.encode("utf-16"),
        "UTF-16 without mark": '{"num_items": 1}'.encode("utf-16-le"),
        "UTF-32": '{"num_items": 1}'.encode("utf-32"),
        "Latin-1": '{"user_id": "é"}'.encode("latin-1"),
        "overlong UTF-8": b'{"user_id": "\xc0\xaf"}',
        "surrogates in UTF-8": b'{"user_id": "\xed\xa0\x80"}',
        "beyond Unicode": b'{"user_id": "\xf4\x90\x80\x80"}',
        "half a character": b'{"user_id": "\xf0\x9f"}',
        "bytes FF": b"\xff" * 100,
        "NULs": b"\0" * 100,
        "a NUL in a text": b'{"user_id": "a\0b"}',
        "a line break in a text": b'{"user_id": "a\nb"}',
        "a NUL after the document": b'{"num_items": 1}\0',
        "a bad escape": b'{"user_id": "\\x41"}',
        "half an escape": b'{"user_id": "\\u00"}',
        "deep lists": b"[" * 100_000,
        "deep lists, closed": b"[" * 100_000 + b"]" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "deep objects, closed": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "deep in a field": b'{"user_id": ' + b"[" * 900 + b"]" * 900 + b"}",
        "deep in a history": b'{"history": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        "many names": b"{" + b",".join(b'"%d":1' % number for number in range(50_000)) + b"}",
        "a long name": b'{"' + b"x" * 500_000 + b'": 1}',
        "a long text": b'{"user_id": "' + b"x" * 1_000_000 + b'"}',
        "a long number": b'{"num_items": ' + b"1" * 1_000_000 + b"}",
        "XML": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY y SYSTEM 'file:///etc/passwd'>]><x>&y;</x>",
        "a form": b"user_id=u&num_items=1",
        "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    }.items():
        yield name, "/recommend", body


def _headers() -> Iterator[tuple[str, bytes]]:
    good = b'{"num_items": 1}'
    for media in (
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml", "",
        "application/jsonx", "json", "application/json, text/plain", "text/json", "*/*", "application/", ";",
        "\xff\xfe",
    ):  # fmt: skip
        yield f"content-type {media!r}", request("POST", "/recommend", good, f"content-type: {media}")
    for coding, body in {
        "gzip": gzip.compress(good),
        "deflate": zlib.compress(good),
        "br": good,
        "zstd": good,
        "gzip, gzip": gzip.compress(gzip.compress(good)),
        "bomb": gzip.compress(b"0" * 50 * MEGABYTE),
    }.items():
        yield f"content-encoding {coding}", request("POST", "/recommend", body, f"content-encoding: {coding}")
    yield "gzip, unannounced", request("POST", "/recommend", gzip.compress(good))
    for deadline in ("", "-1", "9", "60001", "1e3", "NaN", "1" * 400, "1" * 5_000, "ten", "\xb2", "100.5", "10,20"):
        yield f"deadline {deadline[:10]!r}", request("GET", "/recommend", None, f"x-deadline-ms: {deadline}")
        yield f"deadline {deadline[:10]!r}, POST", request("POST", "/recommend", good, f"x-deadline-ms: {deadline}")
    for key in (
        None,
        "",
        "wrong",
        KEY.upper(),
        KEY + " x",
        "' OR 1=1 --",
        "x" * 8_000,
        "../../etc",
        hash_key(KEY),
        "%s%n",
        "é",
    ):
        yield f"key {str(key)[:20]!r}", request("POST", "/recommend", good, key=key)
    yield "a key in the query", request("GET", f"/recommend?x-api-key={KEY}&x_api_key={KEY}", key=None)
    yield "a key in a cookie", request("GET", "/recommend", None, f"cookie: x-api-key={KEY}", key=None)
    yield "a bearer", request("GET", "/recommend", None, f"authorization: Bearer {KEY}", key=None)
    yield "a bad body without a key", request("POST", "/recommend", b"{", key=None)
    yield "10 MB without a key", request("POST", "/recommend", b"[" * 10 * MEGABYTE, key=None)
    yield "an administrator's work", request("POST", "/admin/rollback")
    yield "many headers", request("GET", "/versions", None, *(f"x-{number}: y" for number in range(5_000)))
    yield "one long header", request("GET", "/versions", None, "x-long: " + "y" * 40_000)
    yield "a header bomb", request("GET", "/versions", None, "x-long: " + "y" * 5 * MEGABYTE)
    yield "a long name of a header", request("GET", "/versions", None, "y" * 100_000 + ": x")


def _targets() -> Iterator[tuple[str, bytes]]:
    for query in (
        "num_items=0", "num_items=-1", "num_items=501", "num_items=1e2", "num_items=NaN", "num_items=", "num_items=1.5",
        "num_items=" + "9" * 400, "num_items=" + "9" * 5_000, "num_items=%31%00", "num_items=%D9%A1%FF",
        "num_items=true",
        "user_id=", "user_id=" + "x" * 129, "user_id=%00", "user_id=a%00b", "user_id=%FF", "user_id=%C0%AF",
        "user_id=%ED%A0%80", "user_id=%F4%90%80%80", "user_id=%E2%82", "num_items[]=x&num_items=x",
    ):  # fmt: skip
        yield f"GET /recommend?{query[:30]}", request("GET", f"/recommend?{query}")
    for path in (
        "/../../etc/passwd", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//recommend", "/recommend/",
        "/RECOMMEND",
        "/recommend%00", "/recommend%2f", "/recommend;a=b", "/recommend%20", "/.env", "/.git/config",
        "/users/%FF/history",
        "/users/%C0%AE%C0%AE/history", "/users/a%00b/history", "/users/" + "x" * 129 + "/history",
        "/users/%ED%A0%80/history",
        "/users/" + "%F0%9F%98%80" * 129 + "/history", "/users/u", "/recommend/../admin/rollback",
        "/static/../../x", "/%",
        "/%zz", "/~root", "/cgi-bin/test-cgi", "/v2/../admin", "/" + "a" * 30_000, "/" + "a" * 100_000,
        "/users/u/history/x",
    ):  # fmt: skip
        yield f"GET {path[:30]}", request("GET", path)
    for method, path in (
        ("TRACE", "/recommend"), ("OPTIONS", "/recommend"), ("PUT", "/recommend"), ("PATCH", "/events"),
        ("DELETE", "/recommend"), ("HEAD", "/rerank"), ("POST", "/versions"), ("PROPFIND", "/"), ("POST", "/metrics"),
        ("POST", "/health/live"), ("DELETE", "/users/%FF"), ("DELETE", "/users/a%00"),
        ("POST", "/admin/bundles/..%2f..%2fetc/activate"), ("POST", "/admin/bundles/%00/activate"),
        ("POST", "/admin/bundles/no-such/activate"),
    ):  # fmt: skip
        yield f"{method} {path}", request(method, path, key=ADMIN_KEY)


def _chunked(*chunks: bytes) -> bytes:
    head = request("POST", "/recommend", None, "transfer-encoding: chunked", "content-type: application/json")
    return head + b"".join(chunks)


def _wires() -> Iterator[tuple[str, bytes]]:
    """What is hardly HTTP."""
    post = f"POST /recommend HTTP/1.1\r\nhost: s\r\nx-api-key: {KEY}\r\ncontent-type: application/json\r\n".encode()
    yield from {
        "noise": b"\xde\xad\xbe\xef" * 100,
        "TLS": bytes.fromhex("16030100a5010000a10303") + b"\0" * 160,
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/0.9": b"GET /versions\r\n\r\n",
        "HTTP/9.9": b"GET /versions HTTP/9.9\r\nhost: s\r\n\r\n",
        "an invented method": b"BREW /versions HTTP/1.1\r\nhost: s\r\n\r\n",
        "a lower-case method": b"get /versions HTTP/1.1\r\nhost: s\r\n\r\n",
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "Redis": b"*1\r\n$4\r\nPING\r\n",
        "SMTP": b"HELO there\r\n\r\n",
        "a raw path in UTF-8": "GET /üser HTTP/1.1\r\nhost: s\r\n\r\n".encode(),
        "a NUL in the path": b"GET /a\0b HTTP/1.1\r\nhost: s\r\n\r\n",
        "a header without colon": b"GET /versions HTTP/1.1\r\nhost\r\n\r\n",
        "a NUL in a header": b"GET /versions HTTP/1.1\r\nhost: s\r\nx-api-key: a\0b\r\n\r\n",
        "a blank before the colon": b"GET /versions HTTP/1.1\r\nhost : s\r\n\r\n",
        "a bare CR": b"GET /versions HTTP/1.1\r\nhost: a\rb\r\n\r\n",
        "a negative length": post + b"content-length: -1\r\n\r\n",
        "a signed length": post + b"content-length: +2\r\n\r\n{}",
        "a hexadecimal length": post + b"content-length: 0x2\r\n\r\n{}",
        "a length of no number": post + b"content-length: two\r\n\r\n{}",
        "a length beyond 64 bits": post + b"content-length: " + b"9" * 30 + b"\r\n\r\n{}",
        "two lengths": post + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        "length and chunks": post + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "an unknown transfer coding": post + b"transfer-encoding: xchunked\r\n\r\n{}",
        "an old client's bad body": post.replace(b"HTTP/1.1", b"HTTP/1.0") + b"content-length: 1\r\n\r\n{",
        "a short length": post + b"content-length: 1\r\n\r\n{}",
        "10 MB": request("POST", "/recommend", b'"' + b"x" * 10 * MEGABYTE + b'"'),
        "one byte too many": request("POST", "/events", b" " * (MAX_BODY_BYTES + 1)),
        "a declared terabyte": post + b"content-length: 1000000000000\r\n\r\n",
        "a declared terabyte, with consent": post + b"expect: 100-continue\r\ncontent-length: 1000000000000\r\n\r\n",
        "10 MB in chunks": _chunked(*[b"ffff\r\n" + b"x" * 0xFFFF + b"\r\n"] * 160, b"0\r\n\r\n"),
        "10 MB in one chunk": _chunked(b"989680\r\n" + b"x" * 10_000_000 + b"\r\n0\r\n\r\n"),
        "many tiny chunks": _chunked(b"1\r\n[\r\n" * 20_000, b"0\r\n\r\n"),
        "a chunk of no size": _chunked(b"zz\r\n{}\r\n0\r\n\r\n"),
        "a negative chunk": _chunked(b"-1\r\n{}\r\n0\r\n\r\n"),
        "a chunk beyond 64 bits": _chunked(b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
        "endless headers": b"GET /versions HTTP/1.1\r\n" + b"x: y\r\n" * 500_000,
        "an endless header": b"GET /versions HTTP/1.1\r\nx: " + b"y" * 5 * MEGABYTE,
        "an endless target": b"GET /" + b"y" * 5 * MEGABYTE,
        "a body that does not come": post + b"content-length: 100\r\n\r\n{",
        "a chunk that does not come": _chunked(b"ff\r\n{"),
    }.items()


def _cases() -> list[Case]:
    refused = frozenset(range(400, 500))
    cases = [
        Case(f"{path} {name}"[:60], request("POST", path, body), frozenset({400, 422}))
        for name, path, body in _bodies()
    ]
    for named in (_headers(), _targets(), _wires()):
        cases += [Case(name[:60], wire, refused) for name, wire in named]
    return cases


CASES = _cases()


def ask(port: int, wire: bytes) -> Refusal:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # the service may have heard enough
            connection.sendall(wire)
        with closing(http.client.HTTPResponse(connection, method=wire[:4].strip().decode("latin-1"))) as response:
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Refusal(response.status, headers, response.read())


def check(case: Case, answer: Refusal) -> None:
    assert answer.status in case.statuses, answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers
    if case.request.startswith(b"HEAD "):
        return
    document = json.loads(answer.body)
    assert document["status"] == answer.status
    assert document["type"].startswith("urn:sidrec:")
    assert document["request_id"] == answer.headers["x-request-id"]
    assert len(answer.body) < 200_000, "a refusal is not much longer than what it refuses"
    assert b"Traceback" not in answer.body


def answers(served: Served) -> bool:
    answer = ask(served.port, request("POST", "/recommend", b'{"num_items": 3}'))
    return answer.status == 200 and len(json.loads(answer.body)["items"]) == 3


@pytest.fixture(scope="module")
def served(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("hostile")
    with serving(
        folder / "log",
        bundles=bundles,
        data_dir=folder / "redis",
        api_key_hashes=[hash_key(KEY)],
        admin_key_hashes=[hash_key(ADMIN_KEY)],
        body_timeout_s=BODY_TIMEOUT_S,
    ) as served:
        assert answers(served)
        yield served


def test_there_are_many():
    assert len(CASES) >= 200
    assert len({case.request for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name.encode("ascii", "replace").decode() for case in CASES])
def test_a_hostile_request_is_refused(served: Served, case: Case):
    check(case, ask(served.port, case.request))


def test_a_body_that_drips_is_given_up(served: Served):
    head = request("POST", "/recommend", None, "content-length: 1000", "content-type: application/json")
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(head)
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < start + 2 * BODY_TIMEOUT_S:
                connection.sendall(b" ")
                time.sleep(BODY_TIMEOUT_S / 20)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 408 ")
    assert answers(served)


def test_headers_that_drip_are_given_up(served: Served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=15) as connection:
        connection.sendall(b"GET /versions HTTP/1.1\r\nhost: s\r\n")
        start = time.monotonic()
        assert connection.recv(65_536).startswith(b"HTTP/1.1 408 ")
        assert 5 < time.monotonic() - start < 14


def test_noise_behind_a_request_ends_the_connection(served: Served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(request("GET", "/versions") + b"\xff" * 10_000)
        while connection.recv(65_536):
            pass
    assert answers(served)


def test_a_hundred_requests_in_one_go_are_answered_in_turn(served: Served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(request("GET", "/versions") * 99 + request("GET", "/versions", None, "connection: close"))
        received = b""
        while part := connection.recv(65_536):
            received += part
    assert received.count(b"HTTP/1.1 200 OK") == 100


def test_a_caller_who_leaves_in_the_middle_of_a_body_is_forgotten(served: Served):
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            connection.sendall(request("POST", "/recommend", b"{" * 1000)[:-500])
    assert answers(served)


def test_a_caller_who_asks_for_much_in_one_go_and_leaves_is_forgotten(served: Served):
    """As is every answer on its way to nobody: none is an error in the log, which the last test reads."""
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            connection.sendall(request("POST", "/recommend", b'{"user_id": "leaves", "num_items": 3}') * 5)
    assert answers(served)


def test_users_that_look_alike_are_different_users(served: Served):
    for number, user_id in enumerate(("é", "e\u0301", "\u00c5", "\u212b", "ﬁ", "fi", "\u0430", "a", "a\u200b", "A")):
        event = {"event_id": f"alike-{number}", "user_id": user_id, "item_id": ITEM_IDS[number], "event_type": "click"}
        body = json.dumps({"events": [{**event, "timestamp": 1.0}]}).encode()
        assert json.loads(ask(served.port, request("POST", "/events", body)).body)["accepted"] == 1
        quoted = "".join(f"%{byte:02X}" for byte in user_id.encode())
        history = json.loads(ask(served.port, request("GET", f"/users/{quoted}/history")).body)
        assert [entry["item_id"] for entry in history["events"]] == [ITEM_IDS[number]]


def test_the_service_lives_on_and_has_not_grown(served: Served):
    """The tests above have warmed it up: all of it once more adds nothing."""
    before = served.resident_bytes
    for case in CASES:
        check(case, ask(served.port, case.request))
    assert answers(served)
    assert served.resident_bytes - before < 5 * MEGABYTE
    log = served.log.read_text()
    assert "unexpected_error" not in log
    assert KEY not in log
    assert ADMIN_KEY not in log
