"""Server-sent events, whatever their bytes are cut into."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.event_reader import EventReader, EventStreamError, ServerEvent

TEXT = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
EVENTS = st.lists(st.builds(ServerEvent, TEXT.filter(bool), st.lists(TEXT, min_size=1, max_size=3).map("\n".join)))


def read(*chunks: bytes) -> list[ServerEvent]:
    reader = EventReader()
    return [event for chunk in chunks for event in reader.feed(chunk)]


@given(EVENTS, st.data())
def test_however_it_is_cut_the_events_are_the_same(events: list[ServerEvent], data: st.DataObject):
    end = st.sampled_from(["\n", "\r\n", "\r"])
    lines = []
    for event in events:
        if data.draw(st.booleans()):
            lines += [": keep-alive", ""]
        lines += [f"event: {event.name}", *(f"data: {line}" for line in event.data.split("\n")), ""]
    ends = data.draw(end) if data.draw(st.booleans()) else None
    stream = "".join(line + (ends or data.draw(end)) for line in lines)
    if ends is None:  # a line that ends with \r, and an empty one that ends with \n, would be one line end
        stream = stream.replace("\r\n", "\n")
        expected = read(stream.encode())
    else:
        expected = events
    content = stream.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=20)))
    assert read(*(content[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True))) == (
        expected
    )


def test_byte_by_byte():
    stream = "\ufeffevent: thought\r\ndata: é🍵\r\n\r\n: still here\r\n\r\nevent: answer\rdata: 1\r\rdata\n\n".encode()
    pieces = [stream[place : place + 1] for place in range(len(stream))]
    expected = [ServerEvent("thought", "é🍵"), ServerEvent("answer", "1"), ServerEvent("message", "")]
    assert read(*pieces) == read(stream) == expected


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"", []),
        (b"\n\n\n", []),
        (b": only a comment\n\n", []),
        (b"event: thought\n\n", []),
        (b"data: cut off", []),
        (b"data: cut off\n", []),
        (b"data:no space\n\n", [ServerEvent("message", "no space")]),
        (b"data:  two\n\n", [ServerEvent("message", " two")]),
        (b"id: 7\nretry: 5\nother\ndata: 1\n\n", [ServerEvent("message", "1")]),
        (b"event: a\ndata: 1\n\ndata: 2\n\n", [ServerEvent("a", "1"), ServerEvent("message", "2")]),
    ],
)
def test_the_standard_rules(stream: bytes, events: list[ServerEvent]):
    assert read(stream) == events


def test_what_is_no_utf8_is_refused():
    with pytest.raises(EventStreamError, match="UTF-8"):
        read(b"data: \xff\n\n")


@pytest.mark.parametrize("chunk", [b"data: " + b"x" * 50, b"data: 1\n"])
def test_an_event_that_does_not_end_is_refused(chunk: bytes):
    reader = EventReader(max_event_bytes=100)
    with pytest.raises(EventStreamError, match="100 bytes"):
        for _ in range(100):
            list(reader.feed(chunk))
