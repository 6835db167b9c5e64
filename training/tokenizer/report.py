"""The tokenizer's report: one HTML file that shows what the SIDs are like, readable without a network.

`write_report` reads top to bottom: each function below it turns the evidence into one section, or None where there is
nothing to show. Size follows the codebook and not the catalogue: items are counted before anything is drawn. It judges
nothing and knows no recommender; whether SIDs are good is told by the ranking alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from semantic_ids.catalog import CATEGORY_SEPARATOR, nodes_on_path
from semantic_ids.codes import Codes, SidSpace
from semantic_ids.quantizer import ResidualQuantizer, Vectors
from semantic_ids.trie import sid_keys
from training.stage import write_atomically

TEMPLATE = Path(__file__).with_name("report.html.j2")

MAX_BARS = 256
MAX_GROUPS_LISTED = 5
MAX_TITLES_LISTED = 3
MAX_MAP_CATEGORIES = 8
TITLE_CHARACTERS_SHOWN = 70
SHUFFLE_SEED = 0

_LEGEND_BELOW = {"x": 0, "y": -0.18, "yanchor": "top"}
_LEGEND_RIGHT = {"orientation": "v", "x": 1.01, "y": 1, "yanchor": "top", "itemsizing": "constant"}

_BLUE, _ORANGE, _GREY, _DARK_GREY, _INK = "#2f6690", "#d1702a", "#b4bcc5", "#66717c", "#24303c"
# Okabe and Ito's colours, told apart by colour-blind readers too; less the yellow, which is faint on white.
_CATEGORY_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#5d4a9c", "#8c6d31")

Groups = npt.NDArray[np.int64]
"""(N,) a number for each item; -1 where it has none."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a tokenizer made; columns are by item in the dataset's order."""

    summary: Mapping[str, Any]  # TokenizerSummary as JSON; with perplexity, bits and codes_used by level
    space: SidSpace
    codes: Codes  # (N, L) final
    nearest: Codes  # (N, L) before repair
    popularity: npt.NDArray[np.int64]  # (N,) training interactions
    titles: Sequence[str]  # (N,)
    categories: Sequence[Sequence[str]]  # (N,) paths such as "Beauty > Makeup > Nails"; the first of an item counts
    centres: npt.NDArray[np.float32]  # (K, d) code vectors of the first level
    nearest_titles: Sequence[Sequence[str]]  # (K,) of the items nearest to each centre
    loss_curve: Sequence[Mapping[str, float]] = ()  # by epoch: train, validation and any further terms

    def __post_init__(self) -> None:
        items = {len(self.codes), len(self.nearest), len(self.popularity), len(self.titles), len(self.categories)}
        if len(items) > 1 or items == {0}:
            raise ValueError(f"a report needs at least one item and columns of one length, not {sorted(items)}")
        codes = {self.space.codebook_size, len(self.centres), len(self.nearest_titles)}
        if len(codes) > 1:
            raise ValueError(
                f"a codebook of {self.space.codebook_size} codes needs as many centres, not {sorted(codes)}"
            )
        self.space.check(self.codes)
        self.space.check(self.nearest)

    @cached_property
    def items_of_code(self) -> npt.NDArray[np.int64]:
        """(K,) items by first code."""
        return np.bincount(self.codes[:, 0], minlength=self.space.codebook_size)

    @cached_property
    def labels(self) -> "list[Labels]":
        """The category levels that tell items apart: the top one and the full path, or one, or none."""
        return _category_labels(self.categories)


@dataclass(frozen=True, eq=False)
class Labels:
    """One category level: a number for each item's category, and the names that the numbers stand for."""

    level: str
    of_item: Groups  # (N,)
    names: list[str]


@dataclass(frozen=True)
class CollidingGroup:
    """Items with one SID before repair, and the titles of some of them."""

    sid: str
    num_items: int
    titles: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A heading, what to look for, what this run shows, and the figure, if any."""

    heading: str
    look_for: str
    finding: str
    figure: str = ""
    groups: tuple[CollidingGroup, ...] = ()


def write_report(path: Path, evidence: Evidence) -> None:
    """Write the report as one self-contained HTML file, whole or not at all."""
    sections = (
        _first_codes(evidence),
        _levels(evidence),
        _collisions(evidence),
        _map(evidence),
        _purity(evidence),
        _losses(evidence),
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        summary=evidence.summary,
        rows=list(_summary_rows(evidence.summary)),
        sections=[section for section in sections if section is not None],
        plotly_js=get_plotlyjs(),
    )
    write_atomically(path, page.encode())


def titles_nearest_to_centres(
    quantizer: ResidualQuantizer,
    vectors: Vectors,
    codes: Codes,
    titles: Sequence[str],
    count: int = 5,
    batch: int = 8192,
) -> list[list[str]]:
    """For each first code (K,), the titles of at most `count` of its items, the nearest to its centre first.

    `vectors` (N, D) may be memory-mapped: `batch` rows of it are read at a time. A code without items has no titles.
    """
    first = np.asarray(codes[:, 0])
    distances = np.empty(len(first), np.float32)
    for start in range(0, len(first), batch):
        rows = slice(start, start + batch)
        latents = quantizer.latents(np.asarray(vectors[rows], np.float32))
        distances[rows] = ((latents - quantizer.codebooks[0][first[rows]]) ** 2).sum(axis=1)
    order = np.lexsort((distances, first))
    starts = np.searchsorted(first[order], np.arange(quantizer.space.codebook_size + 1))
    return [
        [titles[item] for item in order[low : min(high, low + count)]]
        for low, high in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]


def _first_codes(evidence: Evidence) -> Section:
    """Share of items by first code, the most frequent first (LETTER, figure of the code distribution)."""
    space, items = evidence.space, evidence.items_of_code
    order = np.argsort(-items, kind="stable")
    per_bar = -(-space.codebook_size // MAX_BARS)
    bars = np.arange(0, space.codebook_size, per_bar)
    codes_in_bar = np.diff(np.append(bars, space.codebook_size))
    share = np.add.reduceat(items[order], bars) / len(evidence.codes)
    uniform = codes_in_bar / space.codebook_size
    if per_bar == 1:
        hover = [_code_hover(evidence, int(code)) for code in order]
    else:
        hover = [f"{count} codes" for count in codes_in_bar]
    figure = go.Figure(layout=_layout(height=360))
    figure.add_bar(
        x=bars + 1,
        y=share,
        name="share of items",
        marker={"color": _BLUE, "line": {"width": 0}},
        customdata=hover,
        hovertemplate="%{y:.2%} of items<br>%{customdata}<extra></extra>",
    )
    if evidence.popularity.sum():
        weights = np.bincount(evidence.codes[:, 0], evidence.popularity, minlength=space.codebook_size)
        figure.add_scatter(
            x=bars + 1,
            y=np.add.reduceat(weights[order], bars) / weights.sum(),
            name="share of training interactions",
            mode="markers",
            marker={"color": _ORANGE, "size": 4},
            hovertemplate="%{y:.2%} of training interactions<extra></extra>",
        )
    figure.add_scatter(
        x=bars + 1,
        y=uniform,
        name="all codes alike",
        mode="lines",
        line={"color": _INK, "width": 1.5, "dash": "dash"},
        hovertemplate="%{y:.2%} if all codes were alike<extra></extra>",
    )
    grouped = "" if per_bar == 1 else f", {per_bar} a bar"
    ticks = {"tickmode": "linear", "dtick": 1} if space.codebook_size <= 24 else {}
    figure.update_xaxes(title=f"first codes, the most frequent first{grouped}", **ticks)
    figure.update_yaxes(tickformat=".1~%", rangemode="tozero")
    figure.update_layout(bargap=0.12 if len(bars) <= 64 else 0)
    tenth = -(-space.codebook_size // 10)
    head = items[order][:tenth].sum() / len(evidence.codes)
    return Section(
        heading="How evenly the first code is used",
        look_for="Look for a few very tall bars at the left and for unused codes at the right: a flat profile splits "
        "the catalogue evenly, a steep one leaves most of the choice to later codes. Utilisation is an alarm, not a "
        "goal: first-level entropy and NDCG@10 correlate at about −0.02 (SID-Repro, arXiv 2609.24430).",
        finding=f"{np.count_nonzero(items):,} of {space.codebook_size:,} first codes are used. The most "
        f"frequent tenth ({tenth:,}) holds {head:.1%} of the items; with all codes alike it would be "
        f"{tenth / space.codebook_size:.1%}.",
        figure=_html(figure, "first-codes"),
    )


def _levels(evidence: Evidence) -> Section:
    """Bits, perplexity and used codes by level, from the summary."""
    summary, space = evidence.summary, evidence.space
    levels = [f"level {level + 1}" for level in range(space.num_levels)]
    bits, perplexity, used = summary["bits"], summary["perplexity"], summary["codes_used"]
    figure = make_subplots(cols=2, subplot_titles=("bits that each code adds", "codes in use"), horizontal_spacing=0.1)
    figure.add_bar(
        x=levels,
        y=bits,
        name="bits",
        showlegend=False,
        marker_color=_BLUE,
        text=[f"{value:.2f}" for value in bits],
        hovertemplate="%{y:.3f} bits<extra></extra>",
        row=1,
        col=1,
    )
    for name, values, colour, written in (
        ("codes used", used, _GREY, "%{y:,} codes used<extra></extra>"),
        ("perplexity", perplexity, _ORANGE, "perplexity %{y:,.1f}<extra></extra>"),
    ):
        shown = [f"{value:,.0f}" for value in values]
        figure.add_bar(
            x=levels, y=values, name=name, marker_color=colour, text=shown, hovertemplate=written, row=1, col=2
        )
    figure.add_hline(y=np.log2(space.codebook_size), **_limit(f"log₂ K = {np.log2(space.codebook_size):.3g}"), col=1)
    figure.add_hline(y=space.codebook_size, **_limit(f"K = {space.codebook_size:,}"), col=2)
    figure.update_traces(textposition="auto")
    figure.update_layout(_layout(height=380), margin_t=70, legend=_LEGEND_BELOW)
    figure.update_yaxes(range=[0, 1.15 * np.log2(space.codebook_size)], col=1)
    figure.update_yaxes(range=[0, 1.15 * space.codebook_size], col=2)
    shares = ", ".join(f"{value / sum(bits):.0%}" for value in bits) if sum(bits) else "none"
    return Section(
        heading="How much each level decides",
        look_for="Look for the levels that carry the choice: the bits are the entropy of a code once those before it "
        "are known, with items weighted by their training interactions, so a model has that much to predict there. "
        "Perplexity far below the used codes means that a few of them hold most items; a late level with few bits is "
        "normal, for it only tells the last neighbours apart.",
        finding=f"{sum(bits):.2f} bits in all; by level: {shares}.",
        figure=_html(figure, "levels"),
    )


def _collisions(evidence: Evidence) -> Section:
    """Groups of items with one SID, before repair and after."""
    before, after = _sizes(evidence.space, evidence.nearest), _sizes(evidence.space, evidence.codes)
    moved = int((evidence.codes != evidence.nearest).any(axis=1).sum())
    num_items = len(evidence.codes)
    if not len(before) + len(after):
        finding = "No two items had one SID before repair."
    else:
        finding = (
            f"Before repair {before.sum():,} of {num_items:,} items ({before.sum() / num_items:.1%}) shared a SID, in "
            f"{len(before):,} {'group' if len(before) == 1 else 'groups'}, the largest of {before.max(initial=0):,}. "
            f"{moved:,} items got a code that is not their nearest. {after.sum():,} items still share one."
        )
    return Section(
        heading="Items that shared a SID",
        look_for="Look for large groups: listings of one product in many variants collide whatever the tokenizer, but "
        "different products in one group mean that the vectors or the codebooks cannot tell them apart. Repair "
        "makes SIDs unique by moving items to another code, and that code then says less about the item.",
        finding=finding,
        figure=_html(_sizes_figure(before, after), "collisions") if len(before) + len(after) else "",
        groups=tuple(_largest_groups(evidence)),
    )


def _sizes_figure(before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> Any:  # noqa: ANN401 - untyped plotly
    figure, most = go.Figure(layout=_layout(height=320)), 1
    largest = int(max(before.max(initial=2), after.max(initial=2)))
    width = max(0.4, largest / 300)  # still visible where one group is very large
    for name, sizes, colour in (("before repair", before, _BLUE), ("after repair", after, _ORANGE)):
        size, count = np.unique(sizes, return_counts=True)
        if len(size):
            written = f"%{{y:,}} groups of %{{x}} items {name}<extra></extra>"
            figure.add_bar(x=size, y=count, name=name, marker_color=colour, width=width, hovertemplate=written)
            most = max(most, int(count.max()))
    ticks = {"tickmode": "linear", "dtick": 1} if largest <= 24 else {}
    figure.update_xaxes(title="items with one SID", range=[1.4, largest + 0.6], **ticks)
    figure.update_yaxes(title="groups", type="log", dtick=1, range=[np.log10(0.6), np.log10(2 * most)])
    figure.update_layout(showlegend=True)
    return figure


def _sizes(space: SidSpace, codes: Codes) -> npt.NDArray[np.int64]:
    """Sizes of the groups of two and more items that have one SID."""
    _, counts = np.unique(sid_keys(space, codes), return_counts=True)
    shared: npt.NDArray[np.int64] = counts[counts > 1]
    return shared


def _largest_groups(evidence: Evidence) -> Iterator[CollidingGroup]:
    keys = sid_keys(evidence.space, evidence.nearest)
    order = np.argsort(keys, kind="stable")
    _, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    for group in np.argsort(-counts, kind="stable")[:MAX_GROUPS_LISTED]:
        if counts[group] > 1:
            members = order[starts[group] : starts[group] + counts[group]]
            titles = tuple(_shortened(evidence.titles[item]) for item in members[:MAX_TITLES_LISTED])
            yield CollidingGroup(evidence.space.format(evidence.nearest[members[0]]), int(counts[group]), titles)


def _map(evidence: Evidence) -> Section:
    """First codes on the plane of their centres' two widest directions."""
    used = np.flatnonzero(evidence.items_of_code)
    points, explained = principal_plane(np.asarray(evidence.centres, np.float64)[used])
    items = evidence.items_of_code[used]
    figure = go.Figure(layout=_layout(height=620))
    for name, colour, chosen in _coloured(evidence, used):
        figure.add_scatter(
            x=points[chosen, 0],
            y=points[chosen, 1],
            mode="markers",
            name=escape(_shortened(name)),
            marker={
                "size": items[chosen],
                "sizemode": "area",
                "sizeref": 2 * items.max() / 38**2,
                "sizemin": 3,
                "color": colour,
                "opacity": 0.75,
                "line": {"width": 1, "color": "white"},
            },
            customdata=[_code_hover(evidence, int(code)) for code in used[chosen]],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_xaxes(title=f"first direction, {explained[0]:.0%} of the variance", showgrid=True, zeroline=False)
    figure.update_yaxes(title=f"second direction, {explained[1]:.0%} of the variance", zeroline=False)
    figure.update_layout(legend=_LEGEND_RIGHT, showlegend=bool(evidence.labels))
    colours = (
        " The colour is the most frequent category among a code's items: colours that stay together mean that "
        "neighbouring codes hold related items."
        if evidence.labels
        else ""
    )
    unused = evidence.space.codebook_size - len(used)
    return Section(
        heading="Map of the first codes",
        look_for="Hover over a code to read the titles nearest to its centre, and ask whether they belong together and "
        f"to their neighbours. The area of a mark is the number of its items.{colours}",
        finding=f"This plane has {explained.sum():.0%} of the centres' variance: what looks near may be far apart in "
        f"another direction. {f'Unused codes, not drawn: {unused:,}.' if unused else 'Every code is used.'}",
        figure=_html(figure, "map"),
    )


def principal_plane(centres: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """PCA: centres (M, d) → their places (M, 2) on the plane, and the share of the variance that each axis has (2,)."""
    left, singular, _ = np.linalg.svd(centres - centres.mean(axis=0), full_matrices=False)
    points, explained = np.zeros((len(centres), 2)), np.zeros(2)
    width = int((singular[:2] > 1e-6 * max(singular[0], 1e-12)).sum())  # less is rounding, not a direction
    if width:
        # A singular vector has no sign of its own: the largest entry is made positive.
        signs = np.sign(left[np.abs(left[:, :width]).argmax(axis=0), np.arange(width)])
        points[:, :width] = left[:, :width] * singular[:width] * signs
        explained[:width] = singular[:width] ** 2 / (singular**2).sum()
    return points, explained


def _coloured(evidence: Evidence, used: npt.NDArray[np.int64]) -> Iterator[tuple[str, str, npt.NDArray[np.int64]]]:
    """Name, colour and members (places in `used`) of each category that is most frequent in some code."""
    if not evidence.labels:
        yield "codes", _BLUE, np.arange(len(used))
        return
    top = evidence.labels[0]
    majority = _majority(evidence.codes[:, 0].astype(np.int64), top.of_item, evidence.space.codebook_size)[used]
    labels, count = np.unique(majority[majority >= 0], return_counts=True)
    shown = labels[np.argsort(-count, kind="stable")][:MAX_MAP_CATEGORIES]
    for label, colour in zip(shown.tolist(), _CATEGORY_COLOURS, strict=False):
        yield top.names[label], colour, np.flatnonzero(majority == label)
    for name, colour, chosen in (
        ("other categories", _DARK_GREY, (majority >= 0) & ~np.isin(majority, shown)),
        ("no category", _GREY, majority < 0),
    ):
        if chosen.any():
            yield name, colour, np.flatnonzero(chosen)


def _majority(groups: Groups, labels: Groups, num_groups: int) -> Groups:
    """(num_groups,) the most frequent label of each group, -1 where none of its items has one."""
    has_label = labels >= 0
    width = int(labels.max()) + 1
    pairs, counts = np.unique(groups[has_label] * width + labels[has_label], return_counts=True)
    order = np.lexsort((counts, pairs // width))
    majority = np.full(num_groups, -1, np.int64)
    majority[pairs[order] // width] = pairs[order] % width  # of the writes to one group the last stays: the largest
    return majority


@dataclass(frozen=True)
class Purity:
    """How much of a group is of one category."""

    share: float | None  # the majority's, over all items in groups of two and more; None without such groups
    counted: float  # share of the items with a category that are in such groups


def purity(groups: Groups, labels: Groups) -> Purity:
    """The share of the majority label, over the labelled items (N,) of all groups with at least two of them.

    A group of one is pure whatever it holds, so it says nothing and is left out.
    """
    has_label = labels >= 0
    width = int(labels.max()) + 1
    pairs, counts = np.unique(groups[has_label] * width + labels[has_label], return_counts=True)
    _, starts = np.unique(pairs // width, return_index=True)
    sizes, largest = np.add.reduceat(counts, starts), np.maximum.reduceat(counts, starts)
    shared = sizes > 1
    total = sizes[shared].sum()
    return Purity(float(largest[shared].sum() / total) if total else None, float(total / sizes.sum()))


def _purity(evidence: Evidence) -> Section:
    """Category purity of prefixes beside a shuffle of the same categories over the same groups."""
    heading = "Whether items with one prefix are of one category"
    if not evidence.labels:
        return Section(
            heading, "", "The items have no categories that tell them apart, so there is nothing to compare."
        )
    space, rng = evidence.space, np.random.default_rng(SHUFFLE_SEED)
    prefixes = [f"{length} code{'s' * (length > 1)}" for length in range(1, space.num_levels + 1)]
    figure = make_subplots(cols=len(evidence.labels), subplot_titles=[labels.level for labels in evidence.labels])
    counted: list[float] = []
    for column, labels in enumerate(evidence.labels, start=1):
        shuffled = labels.of_item.copy()
        labelled = np.flatnonzero(shuffled >= 0)
        shuffled[labelled] = shuffled[rng.permutation(labelled)]
        groups = [_prefixes(space, evidence.codes, length) for length in range(1, space.num_levels + 1)]
        real = [purity(group, labels.of_item) for group in groups]
        for name, colour, measured in (
            ("by SID", _BLUE, real),
            ("shuffled items", _GREY, [purity(group, shuffled) for group in groups]),
        ):
            figure.add_bar(
                x=prefixes,
                y=[one.share for one in measured],
                name=name,
                marker_color=colour,
                text=["" if one.share is None else f"{one.share:.0%}" for one in measured],
                customdata=[one.counted for one in measured],
                hovertemplate="%{y:.1%}, over %{customdata:.1%} of the items<extra>" + name + "</extra>",
                showlegend=column == 1,
                row=1,
                col=column,
            )
        counted = [one.counted for one in real]
    figure.update_traces(textposition="outside", cliponaxis=False)
    figure.update_layout(_layout(height=400), margin_t=70, legend={**_LEGEND_BELOW, "y": -0.26})
    figure.update_xaxes(title="length of the prefix", categoryarray=prefixes, categoryorder="array")
    figure.update_yaxes(tickformat=".0%", range=[0, 1.12], tickvals=[0, 0.25, 0.5, 0.75, 1])
    shares = ", ".join(f"{share:.1%}" for share in counted)
    return Section(
        heading=heading,
        look_for="Look at the distance between the two bars: the mean share of the most frequent category under a "
        "prefix, beside the same categories shuffled over the same groups. Small groups are pure by chance, so the "
        "height alone says nothing; and categories are one view of what belongs together, what users do is another.",
        finding=f"Only prefixes that two or more items share are counted; they hold, by length, {shares} of the items "
        "with a category. The first category of an item counts.",
        figure=_html(figure, "purity"),
    )


def _prefixes(space: SidSpace, codes: Codes, length: int) -> Groups:
    """(N,) a number for each prefix of `length` codes."""
    keys = sid_keys(SidSpace(length, space.codebook_size), codes[:, :length])
    groups: Groups = np.unique(keys, return_inverse=True)[1]
    return groups


def _losses(evidence: Evidence) -> Section | None:
    """Every term of the loss by epoch, where something was trained."""
    curve = evidence.loss_curve
    if not curve:
        return None
    epochs = np.arange(1, len(curve) + 1)
    figure = go.Figure(layout=_layout(height=360))
    names = list(dict.fromkeys(name for point in curve for name in point if name != "epoch"))
    styles = {"train": {"color": _BLUE, "width": 2}, "validation": {"color": _ORANGE, "width": 2}}
    for name in names:
        figure.add_scatter(
            x=epochs,
            y=[point.get(name) for point in curve],
            name=escape(name),
            mode="lines" if len(curve) > 1 else "markers",
            line=styles.get(name, {"width": 1, "dash": "dot"}),
            hovertemplate="%{y:.4g}",
        )
    figure.update_xaxes(title="epoch")
    figure.update_layout(hovermode="x unified", showlegend=True)
    last = ", ".join(f"{name} {curve[-1][name]:.4g}" for name in ("train", "validation") if name in curve[-1])
    return Section(
        heading="Training",
        look_for="Look for a validation loss that has flattened and stays near the training loss. Losses of different "
        "methods or weights are not comparable: a lower one does not mean better SIDs.",
        finding=f"{len(curve):,} epochs; last: {last or 'no train or validation loss was kept'}.",
        figure=_html(figure, "losses"),
    )


def _category_labels(categories: Sequence[Sequence[str]]) -> list[Labels]:
    numbers: dict[str, int] = {}
    path_of_item = np.fromiter(
        (numbers.setdefault(paths[0], len(numbers)) if paths else -1 for paths in categories), np.int64, len(categories)
    )
    if len(numbers) < 2:
        return []
    nodes = [nodes_on_path(path) for path in numbers]
    # The first node often names the whole catalogue: the top level is the first one at which paths part.
    top = next(names for depth in range(max(map(len, nodes))) if len(set(names := _nodes_at(nodes, depth))) > 1)
    top_names = list(dict.fromkeys(top))
    top_numbers = {name: number for number, name in enumerate(top_names)}
    top_of_path = np.array([*(top_numbers[name] for name in top), -1])  # the last is for -1, no category
    short = [name.rpartition(CATEGORY_SEPARATOR)[2] for name in top_names]
    top_labels = Labels("top category", top_of_path[path_of_item], short)
    if len(top_names) == len(numbers):
        return [top_labels]
    return [top_labels, Labels("full category path", path_of_item, list(numbers))]


def _nodes_at(nodes: Sequence[Sequence[str]], depth: int) -> list[str]:
    return [names[min(depth, len(names) - 1)] for names in nodes]


def _code_hover(evidence: Evidence, code: int) -> str:
    """A first code, its items, and the titles nearest to its centre, in plotly's subset of HTML."""
    items = int(evidence.items_of_code[code])
    lines = [f"<b>{escape(SidSpace(1, evidence.space.codebook_size).token(0, code))}</b>  {items:,} items"]
    return "<br>".join(lines + [escape(_shortened(title)) for title in evidence.nearest_titles[code]])


def _shortened(title: str) -> str:
    words = " ".join(title.split()) or "(no title)"
    return words if len(words) <= TITLE_CHARACTERS_SHOWN else f"{words[: TITLE_CHARACTERS_SHOWN - 1]}…"


def _summary_rows(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in summary.items():
        if isinstance(value, Mapping):
            yield from _summary_rows(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".replace("_", " "), _written(value)


def _written(value: Any) -> str:  # noqa: ANN401 - any JSON value
    if isinstance(value, list | tuple):
        return "  ".join(_written(one) for one in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _limit(text: str) -> dict[str, Any]:
    return {
        "line": {"color": _INK, "width": 1.5, "dash": "dash"},
        "annotation": {"text": text, "font": {"size": 12, "color": _INK}},
        "annotation_position": "top right",
        "row": 1,
    }


def _layout(height: int) -> dict[str, Any]:
    return {
        "template": "plotly_white",
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "bgcolor": "white"},
    }


def _html(figure: Any, name: str) -> str:  # noqa: ANN401 - plotly has no types
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        default_height=f"{figure.layout.height}px",
        config={"displayModeBar": False, "responsive": True},
    )
    return html
