"""MovieLens-100K from the installed RecBole package, in the project's format."""

import sys

import polars as pl
import pytest

from training.demo_data import title_and_year, write_movielens
from training.interactions import DataConfig, Dataset, fingerprint_of, run
from training.stage import StageError, StageFolder


@pytest.mark.parametrize(
    ("sorted_title", "title"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Boot, Das", "Das Boot"),
        ("Enfer, L'", "L'Enfer"),
        ("Horseman on the Roof, The (Hussard sur le toit, Le)", "The Horseman on the Roof (Le Hussard sur le toit)"),
        ("Cook the Thief His Wife & Her Lover, The", "The Cook the Thief His Wife & Her Lover"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Maybe, Maybe Not (Bewegte Mann, Der)", "Maybe, Maybe Not (Der Bewegte Mann)"),
        ("Sex, Lies, and Videotape", "Sex, Lies, and Videotape"),
        ("Truth or Consequences, N.M.", "Truth or Consequences, N.M."),
        ("Paris, Texas", "Paris, Texas"),
    ],
)
def test_a_trailing_article_comes_first(sorted_title, title):
    assert title_and_year(sorted_title, "1995") == (title, "1995")


def test_a_year_left_in_the_title_is_taken_out_and_the_nameless_film_has_none():
    assert title_and_year("Land Before Time III (1995)", "V") == ("Land Before Time III", "1995")
    assert title_and_year("unkonwn", "unkonwn") == ("unknown", "")


def test_the_written_files_pass_the_data_stage_whole(tmp_path):
    write_movielens(tmp_path / "movielens")
    config = DataConfig.model_validate({})
    folder = StageFolder(tmp_path / "run", config, {"data": fingerprint_of(tmp_path / "movielens")})
    summary = run(config, tmp_path / "movielens", folder)
    assert (summary.num_users, summary.num_items, summary.num_events) == (943, 1682, 100_000)
    assert summary.items_without_title == summary.training_only_users == 0
    dataset = Dataset.load(folder.path)
    suspects = dataset.item_ids.index("12")
    assert dataset.titles[suspects] == "The Usual Suspects"
    assert dataset.categories[suspects] == ["Crime", "Thriller"]
    assert dataset.attributes[suspects] == {"release_year": "1995"}
    assert dataset.categories[dataset.item_ids.index("267")] == []


def test_the_licence_note_names_the_non_commercial_terms(tmp_path):
    write_movielens(tmp_path)
    note = (tmp_path / "LICENSE.txt").read_text()
    assert "may not use it for commercial" in note
    assert "GroupLens" in note


def test_files_already_there_are_left_alone_and_a_missing_one_is_completed(tmp_path):
    write_movielens(tmp_path)
    whole = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert set(whole) == {"interactions.csv", "items.csv", "LICENSE.txt"}
    write_movielens(tmp_path)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == whole
    (tmp_path / "interactions.csv").unlink()
    write_movielens(tmp_path)
    assert pl.read_csv(tmp_path / "interactions.csv").height == 100_000


def test_without_recbole_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(StageError, match="package `recbole`, not installed; run `make setup`"):
        write_movielens(tmp_path / "movielens")
    assert not (tmp_path / "movielens").exists()


def test_a_recbole_without_its_example_files_is_named_with_the_missing_path(tmp_path, monkeypatch):
    metadata = tmp_path / "recbole-1.2.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(StageError, match=r"ml-100k\.item is missing\); run `make setup`"):
        write_movielens(tmp_path / "movielens")
