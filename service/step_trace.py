"""What a model that thinks in steps (S²GR) meant by each: told as data, the trace, and in words, the rationale.

    trace       level, nearest cluster, how near, and items that are typical of it; each of them one that the request
                itself could be given, so never a deleted, seen, hidden or filtered one
    rationale   the same in sentences, which name items of the history and of the answer alone

This is the one owner of the sentences. Nothing in them is the model's own text, so there is nothing to be checked.
"""

from collections.abc import Sequence

import numpy as np

from semantic_ids.bundle import Bundle
from semantic_ids.catalog import Catalog
from semantic_ids.filters import ItemFilter
from semantic_ids.step_reader import StepReader, StepReading
from semantic_ids.trie import ROOT, Nodes, Ranks
from service.engine.base import StepTrace
from service.schemas import TracedItem, TracedStep

NUM_TYPICAL = 3
_NUM_NAMED = 3  # items in a sentence


class StepTraces:
    """Tells the traces of one bundle at one epoch of its catalogue."""

    def __init__(self, bundle: Bundle, reader: StepReader) -> None:
        self._catalog = bundle.catalog
        self._codebooks = bundle.quantizer.codebooks
        self._reader = reader

    def steps(self, trace: StepTrace, item_filter: ItemFilter) -> list[TracedStep]:
        """The trace as the answer shows it; `item_filter` is what the request may be given."""
        return [self._step(trace.rank, step, item_filter) for step in trace.steps]

    def rationale(self, trace: StepTrace, history: Ranks, answer: Ranks) -> str | None:
        """The trace in words; None where no step was run."""
        newest_first = list(dict.fromkeys(history[::-1].tolist()))
        others = [rank for rank in answer.tolist() if rank not in set(newest_first)]
        return " ".join(self._sentence(step, newest_first, others) for step in trace.steps) or None

    def _step(self, rank: int, step: StepReading, item_filter: ItemFilter) -> TracedStep:
        within, ranks = self._typical(rank, step, item_filter)
        titles, item_ids = self._catalog.titles.take(ranks), self._catalog.item_ids.take(ranks)
        return TracedStep(
            level=step.level + 1,
            cluster=step.cluster,
            cosine=round(step.cosine, 4),
            share=round(step.share, 4),
            within=within,
            typical=[TracedItem(item_id=item_id, title=title) for item_id, title in zip(item_ids, titles, strict=True)],
        )

    def _typical(self, rank: int, step: StepReading, item_filter: ItemFilter) -> tuple[str, Ranks]:
        """Items whose code of the step's level is in its cluster, beneath a prefix of the item's SID; and that prefix.

        It is the longest one that has enough of them: what a code of a later level says depends on those before. First
        come the most popular items of the cluster's most central codes, one of each.
        """
        space, path = self._catalog.space, self._catalog.trie.path_of_rank(np.array([rank]))[0]
        members = self._reader.members(step.level, step.cluster, self._codebooks)
        order = np.full(space.codebook_size, len(members))
        order[members] = np.arange(len(members))
        ranks = np.empty(0, np.int64)
        for length in range(step.level, -1, -1):
            prefix = int(path[length - 1]) if length else ROOT
            nodes = _below(self._catalog, prefix, length, step.level)
            nodes = nodes[order[self._catalog.trie.tokens[nodes]] < len(members)]
            ranks = _eligible(self._catalog, nodes, step.level, item_filter)
            if len(ranks) >= NUM_TYPICAL or not length:
                break
        centrality, popularity = order[self._catalog.codes[ranks, step.level]], self._catalog.popularity[ranks]
        by_code = np.lexsort((-popularity.astype(np.int64), centrality))
        is_first = np.ones(len(ranks), np.bool_)
        is_first[1:] = np.diff(centrality[by_code]) > 0
        chosen = ranks[np.concatenate((by_code[is_first], by_code[~is_first]))[:NUM_TYPICAL]]
        codes = self._catalog.codes[rank, :length].tolist()
        return "".join(space.token(level, code) for level, code in enumerate(codes)), chosen

    def _sentence(self, step: StepReading, history: Sequence[int], others: Sequence[int]) -> str:
        of_history, of_answer = self._members_of(step, history), self._members_of(step, others)
        parts = [f"{self._named(of_history)} of the history"] if of_history else []
        parts += [f"{self._named(of_answer)} of the answer"] if of_answer else []
        group = f"with {' and '.join(parts)}" if parts else "that has none of the history or the answer"
        return f"Step {step.level + 1} leans ({step.share:.0%}) to a group of items {group}."

    def _members_of(self, step: StepReading, ranks: Sequence[int]) -> list[int]:
        codes = self._catalog.codes[np.array(ranks, np.int64), step.level]
        is_member = self._reader.cluster_of_code[step.level][codes] == step.cluster
        return [rank for rank, is_in in zip(ranks, is_member.tolist(), strict=True) if is_in][:_NUM_NAMED]

    def _named(self, ranks: Sequence[int]) -> str:
        titles = (" ".join(self._catalog.titles[rank].split()) or self._catalog.item_ids[rank] for rank in ranks)
        return ", ".join(f"“{title}”" for title in titles)


def _below(catalog: Catalog, prefix: int, length: int, level: int) -> Nodes:
    """The nodes of `level` beneath a prefix of so many codes: an interval, as a trie has them."""
    trie = catalog.trie
    if prefix == ROOT:
        return np.arange(trie.level_starts[level], trie.level_starts[level + 1])
    low, high = prefix, prefix + 1
    for _ in range(level - length + 1):
        low, high = int(trie.first_child[low]), int(trie.first_child[high])
    return np.arange(low, high)


def _eligible(catalog: Catalog, nodes: Nodes, level: int, item_filter: ItemFilter) -> Ranks:
    """The items beneath these nodes (M,) of `level` that a request may be given."""
    low, high = catalog.trie.rank_range(nodes, level)
    has_any = item_filter.count(low, high) > 0
    low, counts = low[has_any], (high - low)[has_any]
    ranks = np.repeat(low - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    return ranks[item_filter.contains(ranks)]
