"""Trie-constrained beam search under a filter: the only way this project turns a prompt into items.

At each level every beam's children are scored (`legal`), those without an eligible item are dropped, and the best
`width` are kept. A kept prefix always leads to an eligible item, so the answer holds min(width, eligible SIDs) SIDs.
A beam whose prefix has a single SID left is *closed*: what remains of it is forced, adds exactly 0, and is not run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semantic_ids.decoding.legal import EmptyAllowedSetError, LegalCodes, legal_log_softmax
from semantic_ids.decoding.tree_decoder import Decoder, StateT, TreeRows
from semantic_ids.filters import ItemFilter
from semantic_ids.trie import ROOT, Nodes, Ranks, SidTrie

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ScoredItems:
    """Items of one request, best first; items of one SID have one score and stand by popularity."""

    ranks: Ranks  # (n,)
    scores: Scores  # (n,)


@dataclass
class BeamWork:
    """What a search did, for metrics."""

    steps: int = 0
    beams: int = 0
    closed_beams: int = 0  # beams that needed no further forward pass
    codes: int = 0  # all codes of the levels, legal or not, of every beam
    legal_codes: int = 0

    @property
    def masked_share(self) -> float:
        """The share of codes that were illegal."""
        return 1 - self.legal_codes / self.codes if self.codes else 0.0


@dataclass(frozen=True)
class _Beams:
    """Live prefixes of all requests, flat, grouped by request and best first within one."""

    request: npt.NDArray[np.int64]  # (M,)
    node: Nodes  # (M,)
    score: Scores  # (M,)
    hidden: Tensor  # (M, D); zeros where closed
    row: npt.NDArray[np.int64]  # (M,) place in `TreeRows`; unused where closed


def constrained_beam(
    decoder: Decoder[StateT],
    trie: SidTrie,
    state: StateT,
    filters: Sequence[ItemFilter],
    widths: Sequence[int],
    *,
    forced: Sequence[Sequence[int]] = (),
    work: BeamWork | None = None,
) -> list[ScoredItems]:
    """The best items of each prompt in `state`, at least min(width, eligible items) of them.

    `filters` and `widths` have one entry per prompt. `forced[l]` are token ids that go before code l of every beam
    (thinking steps); they add nothing to a score. Raises `EmptyAllowedSetError` if a filter leaves nothing.
    """
    for item_filter in filters:
        if item_filter.num_eligible == 0:
            raise EmptyAllowedSetError("a filter that leaves no item reached decoding: answer it without the model")
    work = work if work is not None else BeamWork()
    rows, hidden = _force(decoder, state, state.root, state.last_hidden, _forced_before(forced, 0))
    num_prompts = len(filters)
    beams = _Beams(
        request=np.arange(num_prompts),
        node=np.full(num_prompts, ROOT),
        score=np.zeros(num_prompts, np.float32),
        hidden=hidden[:, 0],
        row=np.zeros(num_prompts, np.int64),
    )
    for level in range(trie.space.num_levels):
        chosen = _best_children(decoder, trie, beams, level, filters, widths, work)
        work.steps += 1
        work.beams += len(chosen.node)
        if level + 1 < trie.space.num_levels:
            rows, beams = _advance(decoder, trie, state, rows, chosen, level, _forced_before(forced, level + 1), work)
        else:
            beams = chosen.as_beams()
    return [_items(trie, beams, request, filters[request]) for request in range(num_prompts)]


@dataclass(frozen=True)
class _Chosen:
    """The children kept at one level, not yet run."""

    request: npt.NDArray[np.int64]
    node: Nodes
    score: Scores
    code: npt.NDArray[np.int64]
    parent_row: npt.NDArray[np.int64]

    def as_beams(self) -> _Beams:
        return _Beams(self.request, self.node, self.score, torch.empty(0), self.parent_row)


def _best_children(
    decoder: Decoder[StateT],
    trie: SidTrie,
    beams: _Beams,
    level: int,
    filters: Sequence[ItemFilter],
    widths: Sequence[int],
    work: BeamWork,
) -> _Chosen:
    legal = LegalCodes.of(trie, beams.node, decoder.device)
    work.codes += legal.mask.numel()
    work.legal_codes += len(legal.children.node)
    log_probs = legal_log_softmax(decoder.level_logits(beams.hidden, level), legal.mask).cpu().numpy()  # (M, K)
    children = legal.children
    score = beams.score[children.parent] + log_probs[children.parent, children.code]  # (C,)
    low, high = trie.rank_range(children.node, level)
    request = beams.request[children.parent]
    bounds = np.searchsorted(request, np.arange(len(filters) + 1))
    kept = []
    for place, (item_filter, width) in enumerate(zip(filters, widths, strict=True)):
        start, stop = bounds[place], bounds[place + 1]
        alive = start + np.flatnonzero(item_filter.count(low[start:stop], high[start:stop]))
        kept.append(alive[_top(score[alive], width)])
    keep = np.concatenate(kept)
    return _Chosen(
        request[keep], children.node[keep], score[keep], children.code[keep], beams.row[children.parent[keep]]
    )


def _top(score: Scores, width: int) -> npt.NDArray[np.int64]:
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
    return rows, _Beams(chosen.request, chosen.node, chosen.score, hidden, row)


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


def _items(trie: SidTrie, beams: _Beams, request: int, item_filter: ItemFilter) -> ScoredItems:
    """Expand the SIDs of one request to their items, each filtered by itself."""
    mine = beams.request == request
    low, high = trie.rank_range(beams.node[mine], trie.space.num_levels - 1)
    counts = high - low
    ranks = np.repeat(low, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    scores = np.repeat(beams.score[mine], counts)
    eligible = item_filter.contains(ranks)
    return ScoredItems(ranks[eligible], scores[eligible])
