"""What every training stage shares: its run folder, its fingerprint, its progress bar, its one kind of error.

A run folder holds one sub-folder per stage. A stage is done when its `stage.json` exists with the fingerprint of its
configuration and of everything it was made from; `stage.json` is written last, atomically. So a killed run is simply
started again: finished stages are skipped, and an unfinished one finds its own checkpoints in the same folder.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

STAGE_FILE = "stage.json"

THREADS = "of torch; one is safe: two on two cores gain half when they are free, and are ten times slower when not"

console = Console(stderr=True)
"""Progress and tables; stdout belongs to `--json`."""


class StageError(Exception):
    """A stage cannot go on. The message says what is wrong, with the values, and what to do; the CLI prints it."""


class StageConfig(BaseModel):
    """Base of every stage's configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    added_later: ClassVar[frozenset[str]] = frozenset()
    """Settings that once did not exist: at their defaults they change nothing, and what was made before still holds."""

    def identity(self) -> dict[str, Any]:
        """What decides the result: everything but how many threads compute it."""
        fields = type(self).model_fields
        unused = {name for name in self.added_later if getattr(self, name) == fields[name].default}
        return self.model_dump(mode="json", exclude={"threads", *unused})


class Summary(BaseModel):
    """Base of every stage's summary: what `--json` prints and what the table at the end shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)


class StageFolder:
    """One stage's place on disk, bound to the fingerprint of what it shall hold.

    A folder of another fingerprint is emptied; one left unfinished by the same fingerprint is kept, so
    stage can resume from its own checkpoints.
    """

    def __init__(self, path: Path, config: StageConfig, upstream: dict[str, str], code_version: int = 1) -> None:
        self.path = path
        identity = {"config": config.identity(), "upstream": upstream, "code_version": code_version}
        self._config = config.model_dump(mode="json")
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        owner = path / ".fingerprint"
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists() and any(file.suffix != ".tmp" for file in path.iterdir()):
            if not owner.exists():
                raise StageError(f"{path} exists and no stage made it: give another run folder, or move it away")
            if owner.read_text() != self.fingerprint:
                path.rename(old)  # at once: a folder emptied by half would pass for one of this fingerprint
                shutil.rmtree(old)
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(owner, self.fingerprint.encode())

    def finished(self) -> dict[str, Any] | None:
        """The summary of a finished stage, else None."""
        done = self.path / STAGE_FILE
        if not done.exists():
            return None
        summary: dict[str, Any] = json.loads(done.read_text())["summary"]
        return summary

    def finish(self, summary: Summary) -> None:
        """Mark the stage done; call it once all its other files are written."""
        record = {"fingerprint": self.fingerprint, "config": self._config, "summary": summary.model_dump(mode="json")}
        write_atomically(self.path / STAGE_FILE, json.dumps(record, indent=2).encode())


def is_main_process() -> bool:
    """Whether this process writes and reports: the only one, or the first of an `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def write_atomically(path: Path, content: bytes) -> None:
    """Write the whole file or nothing: a reader, or a crash, sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Bar:
    """A progress bar's handle: `advance(n)`, and `note("loss 3.21")` beside it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1) -> None:
        """Move the bar by so many steps."""
        self._progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        """Show a short text at the right of the bar."""
        self._progress.update(self._task, note=text)


@contextmanager
def progress_bar(description: str, total: int, completed: int = 0) -> Iterator[Bar]:
    """A bar on stderr for `total` steps, `completed` of them already done by an earlier run."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not is_main_process()) as progress:
        yield Bar(progress, progress.add_task(description, total=total, completed=completed, note=""))
