"""The beam over a batch, as every engine's process runs it; with it, for who asks, what the thinking steps meant."""

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from semantic_ids.decoding.beam import BeamWork, ScoredItems, constrained_beam
from semantic_ids.decoding.step_outputs import StepOutputs
from semantic_ids.decoding.tree_decoder import Decoder, StateT
from semantic_ids.filters import ItemFilter
from semantic_ids.step_reader import StepReader
from semantic_ids.trie import SidTrie
from service.engine.base import StepTrace
from service.engine.store import CatalogSnapshot
from service.engine.wire import BeamRequest

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Searched:
    """The answer to one request of a batch."""

    items: ScoredItems
    trace: StepTrace | None


def search(
    decoder: Decoder[StateT],
    snapshot: CatalogSnapshot,
    state: StateT,
    requests: Sequence[BeamRequest],
    filters: Sequence[ItemFilter],
    forced: Sequence[Sequence[int]],
    work: BeamWork,
) -> list[Searched]:
    """The best items of each prompt in `state`; `forced` and what is raised as in `constrained_beam`."""
    reader, trie = snapshot.step_reader, snapshot.catalog.trie
    outputs = StepOutputs() if reader is not None and any(request.wants_trace for request in requests) else None
    found = constrained_beam(
        decoder,
        trie,
        state,
        filters,
        [request.width for request in requests],
        forced=forced,
        work=work,
        exploration=[request.exploration for request in requests],
        on_level=outputs,
    )
    if reader is None or outputs is None:
        return [Searched(items, None) for items in found]
    return [
        Searched(items, _trace(reader, outputs, trie, place, items, forced) if request.wants_trace else None)
        for place, (request, items) in enumerate(zip(requests, found, strict=True))
    ]


def _trace(
    reader: StepReader,
    outputs: StepOutputs,
    trie: SidTrie,
    place: int,
    items: ScoredItems,
    forced: Sequence[Sequence[int]],
) -> StepTrace | None:
    """The steps of the best item. What fails here is logged and leaves no trace: the items do not wait for it."""
    try:
        rank = int(items.ranks[0])
        before_codes = outputs.of(trie, place, rank)
        steps = (
            reader.read(level, output)
            for level, output in enumerate(before_codes)
            if output is not None and forced[level]
        )
        return StepTrace(rank, tuple(steps))
    except Exception:
        log.exception("steps_not_read")
        return None
