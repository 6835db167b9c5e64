"""Trie-constrained beam search under a filter: the only way this project turns a prompt into items.

At each level every beam's children are scored (`legal`), those without an eligible item are dropped, and the best
`width` are kept. A kept prefix always leads to an eligible item, so the answer holds min(width, eligible SIDs) SIDs.
A beam whose prefix has a single SID left is *closed*: what remains of it is forced, adds exactly 0, and is not run.
A request that explores has a second set of beams beside these, or in their place: those of a draw (`exploration`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semantic_ids.decoding.exploration import Exploration, ExplorationError, Perturbed, propensities
from semantic_ids.decoding.legal import EmptyAllowedSetError, LegalCodes, legal_log_softmax
from semantic_ids.decoding.tree_decoder import Decoder, StateT, TreeRows
from semantic_ids.filters import ItemFilter
from semantic_ids.trie import ROOT, Children, Nodes, Ranks, SidTrie

Scores = npt.NDArray[np.float32]

LevelListener: TypeAlias = Callable[[npt.NDArray[np.int64], Nodes, Tensor], None]
"""Hears of each level's beams (M,), before their codes are chosen: request, prefix and output (`step_outputs`)."""


@dataclass(frozen=True)
class ScoredItems:
    """Items of one request, best first; items of one SID have one score and stand by popularity."""

    ranks: Ranks  # (n,)
    scores: Scores  # (n,)
    propensity: npt.NDArray[np.float64] | None = None  # (n,) with which each was shown; None without exploration


@dataclass
class BeamWork:
    """What a search did, for metrics."""

    steps: int = 0
    beams: int = 0
    closed_beams: int = 0  # beams that needed no further forward pass
    codes: int = 0  # all codes of the levels, legal or not, of every beam
    legal_codes: int = 0
    prompt_tokens: int = 0
    known_prompt_tokens: int = 0  # of them those that a prompt cache had; whoever prefills counts both

    @property
    def masked_share(self) -> float:
        """The share of codes that were illegal."""
        return 1 - self.legal_codes / self.codes if self.codes else 0.0


@dataclass(frozen=True)
class _Beams:
    """Live prefixes of all requests, flat, grouped by request; within one the best first, then what is only drawn."""

    request: npt.NDArray[np.int64]  # (M,)
    node: Nodes  # (M,)
    score: Scores  # (M,)
    hidden: Tensor  # (M, D); zeros where closed
    row: npt.NDArray[np.int64]  # (M,) place in `TreeRows`; unused where closed
    is_best: npt.NDArray[np.bool_]  # (M,) among the best `width`; all are where nothing explores
    perturbed: Perturbed | None  # (M,) None where no request explores


def constrained_beam(
    decoder: Decoder[StateT],
    trie: SidTrie,
    state: StateT,
    filters: Sequence[ItemFilter],
    widths: Sequence[int],
    *,
    forced: Sequence[Sequence[int]] = (),
    work: BeamWork | None = None,
    exploration: Sequence[Exploration | None] | None = None,
    on_level: LevelListener | None = None,
) -> list[ScoredItems]:
    """The best items of each prompt in `state`, at least min(width, eligible items) of them.

    `filters`, `widths` and `exploration` have one entry per prompt. `forced[l]` are token ids that go before code l of
    every beam (thinking steps); they add nothing to a score. A prompt that explores gets exactly min(`num_items`,
    eligible items): the best `num_kept`, as ever, and items that are drawn, all with their propensities, by score; the
    search has up to `Exploration.num_beams(width)` beams. Raises `EmptyAllowedSetError` if a filter leaves nothing,
    `ExplorationError` if a width is too small for what is kept.
    """
    for item_filter in filters:
        if item_filter.num_eligible == 0:
            raise EmptyAllowedSetError("a filter that leaves no item reached decoding: answer it without the model")
    work = work if work is not None else BeamWork()
    rows, hidden = _force(decoder, state, state.root, state.last_hidden, _forced_before(forced, 0))
    num_prompts = len(filters)
    explorations = [*exploration] if exploration is not None else [None] * num_prompts
    _check_widths(widths, explorations)
    beams = _Beams(
        request=np.arange(num_prompts),
        node=np.full(num_prompts, ROOT),
        score=np.zeros(num_prompts, np.float32),
        hidden=hidden[:, 0],
        row=np.zeros(num_prompts, np.int64),
        is_best=np.array([one is None or one.num_kept > 0 for one in explorations]),
        perturbed=Perturbed.roots(explorations) if any(explorations) else None,
    )
    for level in range(trie.space.num_levels):
        if on_level is not None:
            on_level(beams.request, beams.node, beams.hidden)
        chosen = _best_children(decoder, trie, beams, level, filters, widths, explorations, work)
        work.steps += 1
        work.beams += len(chosen.node)
        if level + 1 < trie.space.num_levels:
            rows, beams = _advance(decoder, trie, state, rows, chosen, level, _forced_before(forced, level + 1), work)
        else:
            beams = chosen.with_hidden(torch.empty(0), chosen.parent_row)
    return [_items(trie, beams, request, filters[request], explorations[request]) for request in range(num_prompts)]


def _check_widths(widths: Sequence[int], explorations: Sequence[Exploration | None]) -> None:
    for width, one in zip(widths, explorations, strict=True):
        if one is not None and width < one.num_kept:
            raise ExplorationError(
                f"a width of {width} does not find the {one.num_kept} best items that are to be kept"
            )


@dataclass(frozen=True)
class _Chosen:
    """The children kept at one level, not yet run."""

    request: npt.NDArray[np.int64]
    node: Nodes
    score: Scores
    code: npt.NDArray[np.int64]
    parent_row: npt.NDArray[np.int64]
    is_best: npt.NDArray[np.bool_]
    perturbed: Perturbed | None

    def with_hidden(self, hidden: Tensor, row: npt.NDArray[np.int64]) -> _Beams:
        return _Beams(self.request, self.node, self.score, hidden, row, self.is_best, self.perturbed)


def _best_children(
    decoder: Decoder[StateT],
    trie: SidTrie,
    beams: _Beams,
    level: int,
    filters: Sequence[ItemFilter],
    widths: Sequence[int],
    explorations: Sequence[Exploration | None],
    work: BeamWork,
) -> _Chosen:
    legal = LegalCodes.of(trie, beams.node, decoder.device)
    work.codes += legal.mask.numel()
    work.legal_codes += len(legal.children.node)
    log_probs = legal_log_softmax(decoder.level_logits(beams.hidden, level), legal.mask).cpu().numpy()  # (M, K)
    children = legal.children
    log_prob = log_probs[children.parent, children.code]  # (C,)
    score = beams.score[children.parent] + log_prob
    low, high = trie.rank_range(children.node, level)
    request = beams.request[children.parent]
    bounds = np.searchsorted(request, np.arange(len(filters) + 1))
    alive = [
        start + np.flatnonzero(item_filter.count(low[start:stop], high[start:stop]))
        for item_filter, start, stop in zip(filters, bounds[:-1], bounds[1:], strict=True)
    ]
    if beams.perturbed is None:
        keep = np.concatenate([places[_top(score[places], width)] for places, width in zip(alive, widths, strict=True)])
        is_best, perturbed = np.ones(len(keep), np.bool_), None
    else:
        of_draw = _perturbed_children(beams.perturbed, children, request, log_prob, np.concatenate(alive), explorations)
        of_best = beams.is_best[children.parent]
        keep, is_best, perturbed = _best_and_drawn(score, of_best, of_draw, alive, widths, explorations)
    return _Chosen(
        request[keep],
        children.node[keep],
        score[keep],
        children.code[keep],
        beams.row[children.parent[keep]],
        is_best,
        perturbed,
    )


def _perturbed_children(
    parents: Perturbed,
    children: Children,
    request: npt.NDArray[np.int64],
    log_prob: Scores,
    alive: npt.NDArray[np.int64],
    explorations: Sequence[Exploration | None],
) -> Perturbed:
    """The children (C,) as their request's draw sees them; of those alive, what follows a prefix that takes part."""
    places = alive[parents.is_drawn[children.parent[alive]]]
    drawn = parents.children(
        children.parent[places], children.node[places], log_prob[places], request[places], explorations
    )
    return drawn.scattered(places, len(children.node))


def _best_and_drawn(
    score: Scores,
    of_best: npt.NDArray[np.bool_],
    of_draw: Perturbed,
    alive: Sequence[npt.NDArray[np.int64]],
    widths: Sequence[int],
    explorations: Sequence[Exploration | None],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Perturbed]:
    """Which children (C,) are kept, (M,): the best and then what is only drawn; which are best; those of the draw.

    Neither choice knows of the other: the best are those of a search that does not explore.
    """
    kept = []
    is_best, is_drawn = np.zeros((2, len(score)), np.bool_)
    for places, width, exploration in zip(alive, widths, explorations, strict=True):
        best = places[of_best[places]]
        best = best[_top(score[best], width)]
        is_best[best] = True
        kept.append(best)
        if exploration is not None:
            drawn = places[of_draw.is_drawn[places]]
            drawn = drawn[_top(of_draw.largest[drawn], exploration.num_candidates)]
            is_drawn[drawn] = True
            kept.append(drawn[~is_best[drawn]])
    keep = np.concatenate(kept)
    places = np.flatnonzero(is_drawn[keep])
    return keep, is_best[keep], of_draw.take(keep[places]).scattered(places, len(keep))


def _top(score: npt.NDArray[np.floating], width: int) -> npt.NDArray[np.int64]:
    """Places of the `width` best, best first; equal scores stand as given: by beam, then by code."""
    if len(score) > 4 * width:  # a full sort of few is cheaper than a selection
        threshold = np.partition(score, len(score) - width)[len(score) - width]
        candidates = np.flatnonzero(score >= threshold)
    else:
        candidates = np.arange(len(score))
    return candidates[np.argsort(-score[candidates], kind="stable")[:width]]


def _advance(
    decoder: Decoder[StateT],
    trie: SidTrie,
    state: StateT,
    rows: TreeRows,
    chosen: _Chosen,
    level: int,
    forced: Sequence[int],
    work: BeamWork,
) -> tuple[TreeRows, _Beams]:
    """Run the chosen codes of the open beams through the model."""
    first_leaf, end_leaf = trie.leaf_range(chosen.node, level)
    is_open = end_leaf - first_leaf > 1
    work.closed_beams += int((~is_open).sum())
    hidden = torch.zeros(
        (len(chosen.node), state.last_hidden.shape[-1]), dtype=state.last_hidden.dtype, device=decoder.device
    )
    row = np.zeros(len(chosen.node), np.int64)
    open_places = np.flatnonzero(is_open)
    if len(open_places):
        request = chosen.request[open_places]
        row[open_places] = np.arange(len(request)) - np.searchsorted(request, request)  # counted within each request
        shape = (state.last_hidden.shape[0], int(row.max()) + 1)  # (B, R'); the rest is padding that nobody reads
        parents, token_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        parents[request, row[open_places]] = chosen.parent_row[open_places]
        token_ids[request, row[open_places]] = decoder.vocabulary.block(level).start + chosen.code[open_places]
        new_hidden, rows = decoder.extend(
            state, rows, torch.from_numpy(parents).to(decoder.device), torch.from_numpy(token_ids).to(decoder.device)
        )
        rows, new_hidden = _force(decoder, state, rows, new_hidden, forced)
        hidden[open_places] = new_hidden[request, row[open_places]]
    return rows, chosen.with_hidden(hidden, row)


def _force(
    decoder: Decoder[StateT], state: StateT, rows: TreeRows, hidden: Tensor, token_ids: Sequence[int]
) -> tuple[TreeRows, Tensor]:
    """Append the same tokens to every row."""
    num_prompts, num_rows = rows.next_position.shape
    parents = torch.arange(num_rows, device=decoder.device).expand(num_prompts, -1)
    for token_id in token_ids:
        hidden, rows = decoder.extend(state, rows, parents, torch.full_like(parents, token_id))
    return rows, hidden


def _forced_before(forced: Sequence[Sequence[int]], level: int) -> Sequence[int]:
    return forced[level] if level < len(forced) else ()


def _items(
    trie: SidTrie, beams: _Beams, request: int, item_filter: ItemFilter, exploration: Exploration | None
) -> ScoredItems:
    """Expand the SIDs of one request to their items, each filtered by itself."""
    mine = beams.request == request
    best = np.flatnonzero(mine & beams.is_best)
    ranks, place = _expanded(trie, beams.node[best], item_filter)
    answer = ScoredItems(ranks, beams.score[best][place])
    return answer if exploration is None else _explored(trie, beams, mine, item_filter, exploration, answer)


def _explored(
    trie: SidTrie,
    beams: _Beams,
    mine: npt.NDArray[np.bool_],
    item_filter: ItemFilter,
    exploration: Exploration,
    best: ScoredItems,
) -> ScoredItems:
    """The first of the best items, which were certain, and those drawn from the rest; all by score."""
    if beams.perturbed is None:
        raise ExplorationError("a request explores in a search that drew nothing")
    kept, kept_scores = best.ranks[: exploration.num_kept], best.scores[: exploration.num_kept]
    drawn = np.flatnonzero(mine & beams.perturbed.is_drawn)
    drawn = drawn[np.argsort(-beams.perturbed.largest[drawn], kind="stable")]
    ranks, place = _expanded(trie, beams.node[drawn], item_filter)
    is_other = ~np.isin(ranks, kept)
    ranks, place = ranks[is_other], place[is_other]
    num_eligible = np.bincount(place, minlength=len(drawn))
    propensity = propensities(beams.perturbed.take(drawn), num_eligible, exploration.num_drawn)
    ranks, place = ranks[: len(propensity)], place[: len(propensity)]
    ranks, scores = np.append(kept, ranks), np.append(kept_scores, beams.score[drawn][place])
    by_score = np.lexsort((ranks, -scores))
    return ScoredItems(ranks[by_score], scores[by_score], np.append(np.ones(len(kept)), propensity)[by_score])


def _expanded(trie: SidTrie, sids: Nodes, item_filter: ItemFilter) -> tuple[Ranks, npt.NDArray[np.int64]]:
    """The eligible items of these SIDs (M,), in their order, popular first; and which SID each is of."""
    low, high = trie.rank_range(sids, trie.space.num_levels - 1)
    counts = high - low
    place = np.repeat(np.arange(len(sids)), counts)
    ranks = low[place] + np.arange(len(place)) - (np.cumsum(counts) - counts)[place]
    eligible = item_filter.contains(ranks)
    return ranks[eligible], place[eligible]
