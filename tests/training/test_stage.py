"""Run folders: what a fingerprint keeps and what it empties, whole files or none, and one kind of bar."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from training.stage import STAGE_FILE, StageConfig, StageError, StageFolder, Summary, progress_bar, write_atomically
from training.tokenizer.config import TokenizerConfig


class Config(StageConfig):
    """A stage with one setting."""

    size: int = 1


class Scores(Summary):
    """A summary with a name that is no Python name."""

    recall_10: float = Field(alias="recall@10")
    by_name: "dict[str, Scores]" = Field(default_factory=dict)


UPSTREAM = {"data": "abc"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "stage"


def files_in(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_an_unfinished_stage_of_the_same_fingerprint_keeps_its_files(path):
    first = StageFolder(path, Config(), UPSTREAM)
    (path / "checkpoint.pt").write_bytes(b"half way")
    again = StageFolder(path, Config(), UPSTREAM)
    assert again.fingerprint == first.fingerprint
    assert (path / "checkpoint.pt").read_bytes() == b"half way"
    assert again.finished() is None


@pytest.mark.parametrize(
    "changed",
    [
        {"config": Config(size=2)},
        {"upstream": {"data": "abd"}},
        {"upstream": {"data": "abc", "vectors": "x"}},
        {"code_version": 2},
    ],
)
def test_any_change_of_what_a_stage_is_made_from_empties_its_folder(path, changed):
    made_from: dict[str, Any] = {"config": Config(), "upstream": UPSTREAM, "code_version": 1}
    before = StageFolder(path, **made_from)
    (path / "sub").mkdir()
    (path / "sub" / "old").touch()
    before.finish(Scores(recall_10=0.5))
    after = StageFolder(path, **made_from | changed)
    assert after.fingerprint != before.fingerprint
    assert after.finished() is None
    assert files_in(path) == {".fingerprint"}


def test_the_order_of_the_upstream_stages_is_no_change(path):
    one = StageFolder(path, Config(), {"data": "1", "vectors": "2"})
    other = StageFolder(path, Config(), {"vectors": "2", "data": "1"})
    assert one.fingerprint == other.fingerprint


def test_a_folder_that_no_stage_made_is_left_alone_and_named(path):
    path.mkdir(parents=True)
    (path / "thesis.tex").touch()
    with pytest.raises(
        StageError, match=r"stage exists and no stage made it: give another run folder, or move it away"
    ):
        StageFolder(path, Config(), UPSTREAM)
    assert files_in(path) == {"thesis.tex"}


def test_a_run_killed_before_it_signed_its_folder_is_started_again(path):
    path.mkdir(parents=True)
    (path / "..fingerprint.123.tmp").touch()
    assert StageFolder(path, Config(), UPSTREAM).finished() is None


def test_what_was_put_aside_by_a_killed_run_is_removed(path):
    old = StageFolder(path, Config(), UPSTREAM)
    old.finish(Scores(recall_10=0.5))
    path.rename(path.with_name(".stage.old"))
    assert StageFolder(path, Config(size=2), UPSTREAM).finished() is None
    assert {folder.name for folder in path.parent.iterdir()} == {"stage"}


def test_a_finished_stage_gives_its_summary_back_under_the_names_of_json(path):
    folder = StageFolder(path, Config(), UPSTREAM)
    summary = Scores(recall_10=0.5, by_name={"knn": Scores(recall_10=0.25)})
    folder.finish(summary)
    record = json.loads((path / STAGE_FILE).read_text())
    assert record["fingerprint"] == folder.fingerprint
    assert record["config"] == {"size": 1}
    found = StageFolder(path, Config(), UPSTREAM).finished()
    assert found == {"recall@10": 0.5, "by_name": {"knn": {"recall@10": 0.25, "by_name": {}}}}
    assert Scores.model_validate(found) == summary


def test_configurations_and_summaries_refuse_unknown_keys_and_changes():
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Config.model_validate({"sice": 2})
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Scores.model_validate({"recall@10": 0.5, "recall@11": 0.5})
    with pytest.raises(ValidationError, match="frozen"):
        Config().size = 2  # type: ignore[misc]


def test_a_reader_of_a_file_being_rewritten_sees_one_whole_version(tmp_path):
    path = tmp_path / "file"
    versions = [bytes([letter]) * 200_000 for letter in b"ab"]
    write_atomically(path, versions[0])
    done = threading.Event()

    def rewrite() -> None:
        for number in range(40):
            write_atomically(path, versions[number % 2])
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(path.read_bytes())
    writer.join()
    assert seen <= set(versions)
    assert files_in(tmp_path) == {"file"}


def test_a_write_that_fails_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"


def test_the_bar_is_on_stderr_and_counts_what_an_earlier_run_did(capsys):
    with progress_bar("sft", total=5, completed=3) as bar:
        bar.advance()
        bar.note("loss 3.21")
    written = capsys.readouterr()
    assert written.out == ""
    assert "4/5" in written.err
    assert "loss 3.21" in written.err


def test_a_setting_that_was_added_later_changes_nothing_until_it_is_used(tmp_path: Path) -> None:
    class Before(StageConfig):
        size: int = 1

    class After(Before):
        added_later = frozenset({"extra"})
        extra: tuple[int, ...] = ()

    made = StageFolder(tmp_path / "run", Before(size=2), {}).fingerprint
    assert StageFolder(tmp_path / "run", After(size=2), {}).fingerprint == made
    assert StageFolder(tmp_path / "run", After(size=2, extra=(1,)), {}).fingerprint != made


def test_the_default_tokenizer_is_what_it_was_when_its_levels_were_a_number() -> None:
    assert TokenizerConfig().identity()["num_levels"] == 3
    assert TokenizerConfig(method="clustered").identity()["num_levels"] == 2
