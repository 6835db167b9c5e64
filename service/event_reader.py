"""Reads server-sent events from bytes as they come, by the rules of the HTML standard (9.2.6).

Chunks may end anywhere: inside a character, or between the two halves of a line break. Knows nothing of HTTP.
"""

from collections.abc import Iterator
from dataclasses import dataclass

MAX_EVENT_BYTES = 16 * 2**20
"""Far above an answer with 500 items; more is no event of ours."""

_BOM = b"\xef\xbb\xbf"


class EventStreamError(ValueError):
    """What came is no event stream: bytes that are not UTF-8, or an event that does not end."""


@dataclass(frozen=True)
class ServerEvent:
    """One finished event."""

    name: str
    data: str


class EventReader:
    """Takes chunks, gives the events that they finish. An event that the stream breaks off is none."""

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._tail = b""  # the line that has not ended yet
        self._is_first_line = True
        self._skips_newline = False  # the last chunk ended with \r, which a \n may belong to
        self._name = ""
        self._data: list[str] = []
        self._num_bytes = 0  # of the event that has not ended yet

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        """The events that end in this chunk, in order. Iterate over all of them before the next chunk."""
        for line in self._lines(chunk):
            self._num_bytes += len(line)
            self._check_size(self._num_bytes)
            if line:
                self._take(line)
            else:
                name, data = self._name or "message", self._data
                self._name, self._data, self._num_bytes = "", [], 0
                if data:
                    yield ServerEvent(name, "\n".join(data))
        self._check_size(self._num_bytes + len(self._tail))

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        """The lines that end in this chunk, without their ends: \\r\\n, \\n or \\r."""
        if self._skips_newline and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skips_newline = False
        if b"\n" not in chunk and b"\r" not in chunk:
            self._tail += chunk
            return
        self._skips_newline = chunk.endswith(b"\r")
        *lines, self._tail = (self._tail + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if self._is_first_line:
            lines[0] = lines[0].removeprefix(_BOM)
            self._is_first_line = False
        yield from lines

    def _take(self, line: bytes) -> None:
        """One field; comments, and fields that are not ours, mean nothing."""
        field, _, value = line.partition(b":")
        if field not in {b"event", b"data"}:
            return
        try:
            text = value.removeprefix(b" ").decode()
        except UnicodeDecodeError as error:
            raise EventStreamError(f"a line of the event stream is not UTF-8: {error}") from None
        if field == b"event":
            self._name = text
        else:
            self._data.append(text)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_event_bytes:
            raise EventStreamError(f"an event of the stream is longer than {self._max_event_bytes} bytes")
