"""The tokenizer's report: one file that needs nothing else, for every shape of catalogue, and safe with any title."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.codes import SidError, SidSpace
from semantic_ids.quantizer import DenseLayer, ResidualQuantizer
from training.tokenizer.report import (
    Evidence,
    principal_plane,
    purity,
    titles_nearest_to_centres,
    write_report,
)

HOSTILE = "</script><img src=x onerror=alert(1)>"
FIGURES = {"first-codes", "levels", "collisions", "map", "purity", "losses"}


def evidence(num_items: int = 60, num_levels: int = 3, codebook_size: int = 4, **changes: Any) -> Evidence:
    rng = np.random.default_rng(0)
    codes = rng.integers(codebook_size, size=(num_items, num_levels)).astype(np.uint16)
    summary = {
        "method": "residual-kmeans",
        "num_items": num_items,
        "uniqueness": 0.5,
        "codes_used": [codebook_size] * num_levels,
        "perplexity": [codebook_size / 2] * num_levels,
        "bits": [1.5] * num_levels,
        "nested": {"mean_move": 1.25},
    }
    made = Evidence(
        summary=summary,
        space=SidSpace(num_levels, codebook_size),
        codes=codes,
        nearest=codes // 2,
        popularity=np.arange(num_items),
        titles=[f"title {number}" for number in range(num_items)],
        categories=[[f"Shop > Top {number % 3} > Sub {number % 5}"] for number in range(num_items)],
        centres=rng.normal(size=(codebook_size, 6)).astype(np.float32),
        nearest_titles=[[f"near {code}"] for code in range(codebook_size)],
        loss_curve=[{"train": 2.0, "validation": 2.5, "commitment": 0.1}, {"train": 1.0, "validation": 1.5}],
    )
    return replace(made, **changes)


class Page(HTMLParser):
    """What a browser makes of a page: its elements, its visible text, and its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style":
            self.words.append(data)

    def figure(self, name: str) -> list[dict[str, Any]]:
        """The traces that the script of one figure draws."""
        script = next(script for script in self.scripts if re.search(rf'newPlot\(\s*"{name}"', script))
        start = script.index("[", script.index("Plotly.newPlot"))
        traces: list[dict[str, Any]] = json.JSONDecoder().raw_decode(script, start)[0]
        return traces

    @property
    def figures(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.elements} & FIGURES


def report(path: Path, made: Evidence) -> Page:
    write_report(path / "report.html", made)
    assert [entry.name for entry in path.iterdir()] == ["report.html"]
    return Page(path / "report.html")


def test_the_report_is_one_file_that_loads_nothing(tmp_path):
    page = report(tmp_path, evidence())
    assert page.figures == FIGURES
    assert not [tag for tag, _ in page.elements if tag in {"link", "img", "iframe", "object"}]
    assert not [attributes for _, attributes in page.elements if attributes.keys() & {"src", "href"}]
    assert sum("plotly.js v" in script for script in page.scripts) == 1


def test_the_report_is_the_same_each_time(tmp_path):
    write_report(tmp_path / "one.html", evidence())
    write_report(tmp_path / "two.html", evidence())
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_every_number_of_the_summary_is_shown(tmp_path):
    page = report(tmp_path, evidence(summary={**evidence().summary, "num_moved": 12_345, "has_converged": True}))
    for shown in ("method residual-kmeans", "num moved 12,345", "bits 1.5 1.5 1.5", "nested.mean move 1.25"):
        assert shown in page.text
    assert "has converged True" in page.text


def test_titles_categories_and_loss_names_are_text_and_never_markup(tmp_path):
    made = evidence(
        titles=[HOSTILE] * 60,
        categories=[[f"{HOSTILE} > {number % 3}{HOSTILE} > x"] for number in range(60)],
        nearest_titles=[[HOSTILE]] * 4,
        loss_curve=[{HOSTILE: 1.0}],
        summary={**evidence().summary, "method": HOSTILE, HOSTILE: HOSTILE},
    )
    plain, page = report(tmp_path, evidence()), report(tmp_path, made)
    kinds = [tag for tag, _ in page.elements]
    assert "img" not in kinds
    assert kinds.count("script") == [tag for tag, _ in plain.elements].count("script")
    assert HOSTILE in page.text
    assert "onerror=alert" not in "".join(page.scripts).replace("&lt;img src=x onerror=alert", "")
    for trace in page.figure("map"):
        assert "<img" not in json.dumps(trace)
        assert all("&lt;/script&gt;&lt;img" in hover for hover in trace["customdata"])


@pytest.mark.parametrize(
    ("made", "missing"),
    [
        (evidence(12, 1, 2), set()),
        (evidence(12, 3, 2), set()),
        (evidence(1, 1, 2), {"purity", "collisions"}),
        (evidence(60, 8, 2), set()),
        (evidence(40, 2, 1000), {"collisions"}),
        (evidence(loss_curve=[]), {"losses"}),
        (evidence(loss_curve=[{"train": 1.0}]), set()),
        (evidence(loss_curve=[{"train": float("nan"), "validation": float("inf")}]), set()),
        (evidence(categories=[[]] * 60), {"purity"}),
        (evidence(categories=[["Beauty"]] * 60), {"purity"}),
        (evidence(categories=[["Beauty"]] + [[]] * 59), {"purity"}),
        (evidence(categories=[["A"], ["B > C"]] + [[]] * 58), set()),
        (evidence(popularity=np.zeros(60, np.int64)), set()),
        (evidence(centres=np.zeros((4, 6), np.float32)), set()),
        (evidence(centres=np.arange(4, dtype=np.float32)[:, None]), set()),
        (evidence(codes=np.zeros((60, 3), np.uint16), nearest=np.zeros((60, 3), np.uint16)), set()),
        (evidence(nearest_titles=[[]] * 4, titles=[""] * 60), set()),
        (evidence(summary={**evidence().summary, "bits": [0.0, 0.0, 0.0]}), set()),
    ],
)
def test_every_shape_of_catalogue_has_a_report(tmp_path, made: Evidence, missing: set[str]):
    assert report(tmp_path, made).figures == FIGURES - missing


def test_the_page_grows_with_the_codebook_and_not_with_the_catalogue(tmp_path):
    write_report(tmp_path / "small.html", evidence(1_000, 4, 16))
    write_report(tmp_path / "large.html", evidence(50_000, 4, 16))
    small, large = ((tmp_path / name).stat().st_size for name in ("small.html", "large.html"))
    assert large - small < 5_000


def test_first_codes_stand_by_frequency_beside_the_uniform_share(tmp_path):
    codes = np.repeat([2, 0, 2, 1], [3, 2, 3, 2])[:, None].astype(np.uint16)  # 6 of code 2, 2 each of codes 0 and 1
    made = evidence(10, 1, 4, codes=codes, nearest=codes, popularity=np.array([5] * 3 + [0] * 7))
    page = report(tmp_path, made)
    items, interactions, uniform = page.figure("first-codes")
    assert decoded(items["y"]) == [0.6, 0.2, 0.2, 0.0]
    assert decoded(interactions["y"]) == [1.0, 0.0, 0.0, 0.0]
    assert decoded(uniform["y"]) == [0.25] * 4
    assert "3 of 4 first codes are used. The most frequent tenth (1) holds 60.0% of the items" in page.text


def test_collisions_are_counted_before_and_after_repair(tmp_path):
    nearest = np.array([[0], [0], [0], [1], [1], [2]], np.uint16)
    codes = np.array([[0], [3], [4], [1], [1], [2]], np.uint16)
    page = report(tmp_path, evidence(6, 1, 5, nearest=nearest, codes=codes))
    assert (
        "Before repair 5 of 6 items (83.3%) shared a SID, in 2 groups, the largest of 3. 2 items got a code that is "
        "not their nearest. 2 items still share one." in page.text
    )
    before, after = page.figure("collisions")
    assert (decoded(before["x"]), decoded(before["y"])) == ([2, 3], [1, 1])
    assert (decoded(after["x"]), decoded(after["y"])) == ([2], [1])
    assert "<a_0> 3 title 0 title 1 title 2 <a_1> 2 title 3 title 4" in page.text


def test_without_collisions_the_report_says_so(tmp_path):
    codes = np.arange(4, dtype=np.uint16)[:, None]
    page = report(tmp_path, evidence(4, 1, 4, codes=codes, nearest=codes))
    assert "No two items had one SID before repair." in page.text
    assert page.figures == FIGURES - {"collisions"}


def test_the_top_category_is_the_first_level_that_tells_items_apart(tmp_path):
    codes = np.array([[0], [0], [1], [1]], np.uint16)
    paths = [["Beauty > Hair > Dye", "Toys"], ["Beauty > Hair > Gel"], ["Beauty > Nails"], []]
    page = report(tmp_path, evidence(4, 1, 2, codes=codes, nearest=codes, categories=paths))
    assert {trace["name"] for trace in page.figure("map")} == {"Hair", "Nails"}
    top, top_shuffled, full, _ = page.figure("purity")
    assert decoded(top["y"]) == [1.0]  # both of code 0; the one labelled item of code 1 is left out
    assert decoded(top_shuffled["y"])[0] in {0.5, 1.0}
    assert decoded(full["y"]) == [0.5]
    assert decoded(top["customdata"]) == [pytest.approx(2 / 3)]


def test_purity_against_hand_counted_groups():
    """Groups 0: a a b, 1: b alone, 2: c and one without a label, 3: a b. Majorities of 0 and 3: 2 of 3 and 1 of 2."""
    groups, labels = np.array([0, 0, 0, 1, 2, 2, 3, 3]), np.array([0, 0, 1, 1, 2, -1, 0, 1])
    measured = purity(groups, labels)
    assert measured.share == pytest.approx(3 / 5)
    assert measured.counted == pytest.approx(5 / 7)
    assert purity(np.arange(3), np.zeros(3, np.int64)).share is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 3))))
def test_purity_is_the_share_counted_group_by_group(rows: list[tuple[int, int]]):
    rows = [*rows, (0, 0)]  # at least one item has a category
    groups, labels = np.array(rows).T
    members = [[label for group, label in rows if group == wanted and label >= 0] for wanted in range(5)]
    shared = [labels for labels in members if len(labels) > 1]
    measured = purity(groups, labels)
    if not shared:
        assert measured.share is None
        return
    majorities = sum(max(map(labels.count, labels)) for labels in shared)
    assert measured.share == pytest.approx(majorities / sum(map(len, shared)))


def test_the_plane_is_that_of_the_widest_directions():
    """Points at ±2 on one axis and ±1 on another: variances 8 and 2, so 80 % and 20 %."""
    centres = np.array([[2.0, 0, 0], [-2, 0, 0], [0, 0, 1], [0, 0, -1]]) + 7
    points, explained = principal_plane(centres)
    assert np.abs(points) == pytest.approx(np.array([[2, 0], [2, 0], [0, 1], [0, 1]]))
    assert explained == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("layers", [(), (DenseLayer(np.eye(2, dtype=np.float32)[::-1], np.ones(2, np.float32)),)])
def test_nearest_titles_equal_those_found_one_by_one(tmp_path, batch: int, layers: tuple[DenseLayer, ...]):
    rng = np.random.default_rng(1)
    np.save(tmp_path / "vectors.npy", rng.normal(size=(40, 2)).astype(np.float16))
    vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    books = rng.normal(size=(2, 6, 2)).astype(np.float32)
    quantizer = ResidualQuantizer(np.ones(2, np.float32), np.full(2, 2.0, np.float32), books, layers)
    codes = quantizer.encode(np.asarray(vectors, np.float32))
    codes[codes == 5] = 0  # one code without items
    titles = [f"title {item}" for item in range(40)]

    def distance(item: int) -> float:
        latent = quantizer.latents(np.asarray(vectors[item : item + 1], np.float32))[0]
        return float(((latent - books[0, codes[item, 0]]) ** 2).sum())

    expected = [
        [titles[item] for item in sorted(np.flatnonzero(codes[:, 0] == code).tolist(), key=distance)[:3]]
        for code in range(6)
    ]
    assert titles_nearest_to_centres(quantizer, vectors, codes, titles, count=3, batch=batch) == expected
    assert expected[5] == []


@pytest.mark.parametrize("column", ["nearest", "popularity", "titles", "categories"])
def test_columns_of_different_lengths_are_refused(column: str):
    with pytest.raises(ValueError, match=r"columns of one length, not \[59, 60\]"):
        evidence(**{column: getattr(evidence(), column)[1:]})


def test_centres_and_titles_that_do_not_fit_the_codebook_are_refused():
    with pytest.raises(ValueError, match=r"a codebook of 4 codes needs as many centres, not \[3, 4\]"):
        evidence(centres=np.zeros((3, 6), np.float32))
    with pytest.raises(ValueError, match=r"a codebook of 4 codes"):
        evidence(nearest_titles=[[]] * 5)
    with pytest.raises(SidError, match="code 4 is outside"):
        evidence(codes=np.full((60, 3), 4, np.uint16))


def decoded(values: Any) -> list[Any]:
    """Numbers of a trace: plotly writes numpy's as base64 with their type."""
    if isinstance(values, dict):
        return list(np.frombuffer(base64.b64decode(values["bdata"]), np.dtype(values["dtype"])).tolist())
    return list(values)
