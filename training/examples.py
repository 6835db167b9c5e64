"""Sequences → batches of token rows, through the one prompt renderer: what a generator is trained and validated on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidVocabulary, TokenIds
from semantic_ids.prompt import COMPACT_SPECIAL_TOKENS, History, PromptRenderer, window_start
from training.distillation import Continuations, TeacherLists
from training.processes import Processes
from training.sequences import Sequences
from training.sft_config import SftConfig
from training.stepwise import Tree, with_branches

_PAD_TOKEN_ID = COMPACT_SPECIAL_TOKENS.index("<pad>")
_BATCHES_PER_BUCKET = 20  # rows of like length share a batch; lengths are compared within so many batches


@dataclass(frozen=True)
class TargetSplit:
    """Histories with the item to predict after each, in catalogue ranks."""

    histories: Sequences
    targets: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, padded on the right, with every item that is a target."""

    token_ids: Tensor  # (B, T)
    ranks: npt.NDArray[np.int64]  # (items,) catalogue rank of each target item
    positions: Tensor  # (items, L): positions whose output predicts each code
    rows: Tensor  # (items,)
    anchors: Tensor  # (items,) the last token of what comes before each target
    tree: Tree | None = None  # where targets are branches

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        tree = None if self.tree is None else self.tree.to(device)
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            rows=self.rows.to(device),
            anchors=self.anchors.to(device),
            tree=tree,
        )

    def before_codes(self, hidden: Tensor) -> Tensor:
        """Of the outputs (B, T, D) those that predict each target's codes, (items, L, D)."""
        places = self.rows[:, None] * hidden.shape[1] + self.positions
        return hidden.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, -1)

    def where(self, is_target: npt.NDArray[np.bool_]) -> "Batch":
        """The same rows, of whose target items (items,) only these are targets."""
        kept = torch.from_numpy(is_target)
        return replace(
            self,
            ranks=self.ranks[is_target],
            positions=self.positions[kept],
            rows=self.rows[kept],
            anchors=self.anchors[kept],
        )


class Examples:
    """Windows of sequences → batches, through the one prompt renderer."""

    def __init__(self, catalog: Catalog, vocabulary: SidVocabulary, renderer: PromptRenderer) -> None:
        self.catalog = catalog
        self.vocabulary = vocabulary
        self.renderer = renderer

    def batch(self, windows: Sequences) -> Batch:
        """Every item of each window is a target."""
        rows = [self.renderer.training_row(self._history(window)) for window in windows]
        num_levels = self.vocabulary.space.num_levels
        places = [np.flatnonzero(row.levels >= 0).reshape(-1, num_levels) for row in rows]
        return self._with_steps(_batch([row.token_ids for row in rows], places, list(windows)))

    def batch_of_last(self, windows: Sequences) -> Batch:
        """Only the last item of each window is a target, after the very prompt that serving makes of the others."""
        token_ids, places = [], []
        for window in windows:
            prompt = self.renderer.render(self._history(window[:-1])).token_ids
            target = self.vocabulary.token_ids(self.catalog.codes[window[-1]])
            token_ids.append(np.concatenate((prompt, target)))
            places.append(len(prompt) + np.arange(len(target))[None])
        return self._with_steps(_batch(token_ids, places, [window[-1:] for window in windows]))

    def _history(self, ranks: npt.NDArray[np.int32]) -> History:
        return History.of(self.catalog, ranks, shows_titles=self.renderer.shows_titles)

    def _with_steps(self, plain: Batch) -> Batch:
        """The same targets, each behind its thinking steps, where prompts have any."""
        if not self.renderer.forced:
            return plain
        targets = self.vocabulary.token_ids(self.catalog.codes[plain.ranks])
        branches = with_branches(
            plain.token_ids,
            plain.rows.numpy(),
            plain.anchors.numpy(),
            targets,
            self.renderer.forced,
            self.renderer.fed_back,
        )
        return replace(plain, token_ids=branches.token_ids, positions=branches.positions, tree=branches.tree)


@dataclass(frozen=True)
class Lesson:
    """A process's part of one batch, with a teacher's list for each of its targets, where there is a teacher."""

    batch: Batch
    lists: TeacherLists | None
    weight: float
    """What the mean over this part counts in the mean of all processes' means: 1 in a run of one process."""
    num_targets: int  # of the whole batch

    def to(self, device: torch.device) -> "Lesson":
        """The same on a device."""
        return replace(self, batch=self.batch.to(device))


def sequence_lessons(
    train: Sequences,
    lists: TeacherLists | None,
    examples: Examples,
    config: SftConfig,
    epoch: int,
    processes: Processes,
) -> Iterator[Lesson]:
    """Every event of every sequence of one epoch; `lists` has one for each event of `train`."""
    numbered = Sequences(train.offsets, np.arange(len(train.items), dtype=np.int32))
    for events in epoch_batches(numbered, config, epoch):
        mine, is_spare = _mine(events, processes)
        batch = examples.batch(Sequences(mine.offsets, train.items[mine.items]))
        weight = 0.0 if is_spare else processes.count * len(mine.items) / len(events.items)
        yield Lesson(batch, None if lists is None else lists.select(mine.items), weight, len(events.items))


def continuation_lessons(
    continuations: Continuations | None, examples: Examples, config: SftConfig, epoch: int, processes: Processes
) -> Iterator[Lesson | None]:
    """Batches of continuations without end, half as large as those of sequences, beside which they are learnt.

    All come before any comes again; None where there are none. A pure function of (seed, epoch).
    """
    if continuations is None or not len(continuations.sequences):
        yield from repeat(None)
        return
    rng = np.random.default_rng((config.seed, epoch, 1))
    sequences, list_of_event = continuations.sequences, continuations.list_of_event()
    numbered = Sequences(sequences.offsets, np.arange(len(sequences.items), dtype=np.int32))
    size = max(1, config.batch_size // 2)
    while True:
        for places in _batches_of_like_length(numbered.lengths, rng.permutation(len(numbered)), size, rng):
            events = numbered.select(places)
            mine, is_spare = _mine(events, processes)
            lists, num_lists = list_of_event[mine.items], int((list_of_event[events.items] >= 0).sum())
            batch = examples.batch(Sequences(mine.offsets, sequences.items[mine.items])).where(lists >= 0)
            weight = 0.0 if is_spare else processes.count * len(batch.ranks) / num_lists
            yield Lesson(batch, continuations.lists.select(lists[lists >= 0]), weight, num_lists)


def _mine(windows: Sequences, processes: Processes) -> tuple[Sequences, bool]:
    """This process's share of a batch; where that is nothing, a window that is to count nothing, and True."""
    share = np.arange(len(windows))[processes.share(len(windows))]
    return windows.select(share if len(share) else np.array([0])), not len(share)


def prompt_windows(histories: Sequences, targets: npt.NDArray[np.int32], max_history: int) -> Sequences:
    """Each history cut as serving cuts it, with the target behind it."""
    start = np.array([window_start(int(length), max_history) for length in histories.lengths], np.int64)
    cut = histories.slice_each(start, histories.lengths)
    items = np.insert(cut.items, cut.offsets[1:], targets)
    return Sequences(cut.offsets + np.arange(len(cut.offsets)), items.astype(np.int32))


def epoch_batches(train: Sequences, config: SftConfig, epoch: int) -> Iterator[Sequences]:
    """Every event of every sequence once, in windows of a full history and its target, cut at a random phase.

    A pure function of (seed, epoch). Rows of like length share a batch.
    """
    rng = np.random.default_rng((config.seed, epoch))
    longest = config.max_history + 1
    users, starts, stops = [], [], []
    for user, length in enumerate(train.lengths):
        phase = int(rng.integers(longest)) if length > longest else 0
        edges = [0, *range(phase or longest, int(length), longest), int(length)]
        users += [user] * (len(edges) - 1)
        starts += edges[:-1]
        stops += edges[1:]
    windows = train.select(np.array(users, np.int64)).slice_each(np.array(starts, np.int64), np.array(stops, np.int64))
    order = rng.permutation(np.flatnonzero(windows.lengths > 0))
    for places in _batches_of_like_length(windows.lengths, order, config.batch_size, rng):
        yield windows.select(places)


def _batches_of_like_length(
    lengths: npt.NDArray[np.int64], order: npt.NDArray[np.int64], size: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """The places in `order` in batches, whose order is drawn; lengths are compared within some batches only."""
    batches = []
    for bucket_start in range(0, len(order), size * _BATCHES_PER_BUCKET):
        bucket = order[bucket_start : bucket_start + size * _BATCHES_PER_BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[start : start + size] for start in range(0, len(bucket), size)]
    for place in rng.permutation(len(batches)):
        yield batches[place]


def _batch(token_ids: list[TokenIds], places: list[npt.NDArray[np.int64]], ranks: list[npt.NDArray[np.int32]]) -> Batch:
    """Pad rows; `places` (items, L) are the positions of each row's target codes, `ranks` (items,) the targets."""
    padded = np.full((len(token_ids), max(map(len, token_ids))), _PAD_TOKEN_ID)
    for number, row in enumerate(token_ids):
        padded[number, : len(row)] = row
    positions = torch.from_numpy(np.concatenate(places) - 1)  # the output before predicts
    return Batch(
        token_ids=torch.from_numpy(padded),
        ranks=np.concatenate(ranks).astype(np.int64),
        positions=positions,
        anchors=positions[:, 0],
        rows=torch.from_numpy(np.repeat(np.arange(len(places)), [len(place) for place in places])),
    )
