"""Teachers' lists of items, and what they say of each level's codes.

A teacher that was fitted to an event would only repeat it, so each speaks where it has not seen what comes next:

- at every training event the directed item-kNN *without the user's own sequence*;
- behind every sequence SASRec and the item-kNN together, on *continuations* that they sample themselves. There the
  student learns what they would answer a user whose next items nobody knows, which is what serving asks.

Lists are item-level; a student that writes codes learns from their marginals: the probability of a legal code is the
sum of the items beneath it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from semantic_ids.trie import Nodes
from training.collaborative import (
    NEIGHBOUR_POWER,
    SOURCE_POWER,
    CollaborativeConfig,
    ItemKnn,
    SasRec,
    forward_cooccurrence,
)
from training.legal_softmax import ChildLogProbs
from training.sequences import Sequences
from training.stage import progress_bar

LIST_LENGTH = 100
NUM_SAMPLED = 4
"""Items of a continuation. The first has no list: it would be at the very place that validation asks about."""
SASREC_SHARE = 0.7
"""Of the two teachers' probabilities; the better mixture of the two on Beauty's validation split."""
_USERS_AT_ONCE = 400
_SCORES_AT_ONCE = 1 << 23  # of a teacher: 32 MB, and some times that in work
_ROUNDING = 1e-9


@dataclass(frozen=True)
class TeacherLists:
    """For each of E training events the items that the teacher expects in its place; weights 0 fill up."""

    items: npt.NDArray[np.int32]  # (E, k)
    weights: npt.NDArray[np.float32]  # (E, k)

    def select(self, events: npt.NDArray[np.integer]) -> "TeacherLists":
        """The lists of these events, in this order."""
        return TeacherLists(self.items[events], self.weights[events])

    def followed_by(self, others: "TeacherLists") -> "TeacherLists":
        """These lists, then the others."""
        return TeacherLists(np.concatenate((self.items, others.items)), np.concatenate((self.weights, others.weights)))

    def renamed(self, new_name: npt.NDArray[np.int32]) -> "TeacherLists":
        """The same lists where item i is called `new_name[i]`."""
        return TeacherLists(new_name[self.items], self.weights)

    @classmethod
    def empty(cls, num_lists: int) -> "TeacherLists":
        """Lists without any weight."""
        shape = (num_lists, LIST_LENGTH)
        return cls(np.zeros(shape, np.int32), np.zeros(shape, np.float32))


@dataclass(frozen=True)
class Continuations:
    """S sequences whose last events the teachers chose, with a list for each of these but the first."""

    sequences: Sequences
    lists: TeacherLists  # of S · (NUM_SAMPLED - 1) events: the last ones of each sequence, in order

    def list_of_event(self) -> npt.NDArray[np.int64]:
        """The place of each event's list, (events,); -1 for those of the user's own doing and the first sampled one."""
        places = np.full(len(self.sequences.items), -1)
        ends = self.sequences.offsets[1:, None] - np.arange(NUM_SAMPLED - 1, 0, -1)  # (S, NUM_SAMPLED - 1)
        places[ends] = np.arange(ends.size).reshape(ends.shape)
        return places

    def renamed(self, new_name: npt.NDArray[np.int32]) -> "Continuations":
        """The same where item i is called `new_name[i]`."""
        sequences = Sequences(self.sequences.offsets, new_name[self.sequences.items])
        return Continuations(sequences, self.lists.renamed(new_name))


def sample_continuations(
    train: Sequences, sasrec: SasRec, item_knn: ItemKnn, *, count: int, max_events: int, seed: int
) -> Continuations:
    """`count` continuations of training sequences, each user's as often as another's, the last `max_events` of each.

    An item is drawn from the list of the teachers' best, with what they say it has as its probability; no user is given
    an item again, and whoever has had nearly all of them is left out. A pure function of the arguments.
    """
    rng = np.random.default_rng((seed, 5))
    can_go_on = np.flatnonzero(train.lengths + NUM_SAMPLED <= item_knn.table.shape[0])
    count = count if len(can_go_on) else 0
    rounds = -(-count // max(1, len(can_go_on)))
    users = np.concatenate([rng.permutation(can_go_on) for _ in range(rounds)] or [can_go_on])[:count]
    parts: list[npt.NDArray[np.int32]] = []
    lists = TeacherLists.empty(count * (NUM_SAMPLED - 1))
    of_sequence = np.arange(count * (NUM_SAMPLED - 1)).reshape(count, NUM_SAMPLED - 1)
    at_once = max(1, _SCORES_AT_ONCE // item_knn.table.shape[0])
    with progress_bar("sft: continuations", count) as bar:
        for start in range(0, count, at_once):
            some = users[start : start + at_once]
            sequences = [train[user] for user in some]
            for step in range(NUM_SAMPLED):
                expected = _expected_next(Sequences.of(sequences), sasrec, item_knn)
                sampled = _sample(expected, rng)
                sequences = [np.append(one, item) for one, item in zip(sequences, sampled, strict=True)]
                if step > 0:
                    places = of_sequence[start : start + len(some), step - 1]
                    num_listed = expected.items.shape[1]
                    lists.items[places, :num_listed], lists.weights[places, :num_listed] = (
                        expected.items,
                        expected.weights,
                    )
            parts += [one[-max_events:] for one in sequences]
            bar.advance(len(some))
    return Continuations(Sequences.of(parts), lists)


def leave_one_out_knn(train: Sequences, num_items: int, config: CollaborativeConfig) -> TeacherLists:
    """The kNN's best items after what came before each event, from all *other* users' sequences.

    The items' counts, which normalise, stay those of all users. Items that the user has had are left out. An event
    without evidence, such as a first one, has weights 0 only.
    """
    forward = forward_cooccurrence(train, num_items, config.knn_window, distance_power=0.5)
    both = sparse.csr_array(forward + config.knn_backward_weight * forward.T)
    counts = np.maximum(np.bincount(train.items, minlength=num_items), 1).astype(np.float64)
    by_source, by_target = sparse.diags_array(counts**-SOURCE_POWER), sparse.diags_array(counts**-NEIGHBOUR_POWER)
    table = sparse.csr_array(by_source @ both @ by_target)
    lists = TeacherLists.empty(len(train.items))
    for start in range(0, len(train), _USERS_AT_ONCE):
        users = train.select(np.arange(start, min(start + _USERS_AT_ONCE, len(train))))
        history, own, seen = _of_users(users, counts, config)
        scores = sparse.csr_array(history @ table - own)
        scores = sparse.csr_array(scores - scores.multiply(seen))
        scores.data[scores.data < _ROUNDING] = 0  # what is left of a transition that nobody else made
        scores.eliminate_zeros()
        _write_strongest(scores, lists, int(train.offsets[start]))
    return lists


def _expected_next(histories: Sequences, sasrec: SasRec, item_knn: ItemKnn) -> TeacherLists:
    """The teachers' best items after each history, without those in it; where the kNN knows nothing, SASRec's alone."""
    logits, evidence = sasrec.scores(histories), item_knn.scores(histories)
    for row, history in enumerate(histories):
        logits[row, history], evidence[row, history] = -np.inf, 0
    expected = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    total = evidence.sum(axis=1, keepdims=True)
    share = np.where(total > 0, SASREC_SHARE, 1.0).astype(np.float32)
    expected = share * expected + (1 - share) * evidence / np.maximum(total, 1e-12)
    num_listed = min(LIST_LENGTH, expected.shape[1])
    best = np.argpartition(-expected, num_listed - 1, axis=1)[:, :num_listed]
    weights = np.take_along_axis(expected, best, axis=1)
    return TeacherLists(best.astype(np.int32), weights / weights.sum(axis=1, keepdims=True))


def _sample(lists: TeacherLists, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """One item of each list, by its weight."""
    below = np.cumsum(lists.weights, axis=1, dtype=np.float64)
    drawn = rng.random(len(below)) * below[:, -1]
    place = np.minimum((below <= drawn[:, None]).sum(axis=1), below.shape[1] - 1)
    sampled: npt.NDArray[np.int32] = lists.items[np.arange(len(below)), place]
    return sampled


def teacher_log_likelihood(
    scores: ChildLogProbs, teacher: TeacherLists, paths: Nodes, prefix: Nodes, level: int, targets: Nodes
) -> Tensor:
    """What the teacher expects of the log-probabilities behind P prefixes, (P,): the negative cross-entropy.

    `teacher` has a list per prefix and `paths` (N, L) the nodes of every item. The lists' weights beneath a prefix are
    shared out anew; where they have none, the teacher is the target, whose node is `targets` (P,).
    """
    nodes = paths[teacher.items, level]  # (P, k)
    is_beneath = np.full(nodes.shape, True) if level == 0 else paths[teacher.items, level - 1] == prefix[:, None]
    weights = np.where(is_beneath, teacher.weights, 0).astype(np.float32)
    columns = np.where(weights > 0, nodes - scores.first_child[:, None], 0)
    mass = torch.zeros_like(scores.log_probs)
    mass = mass.scatter_add(1, *(torch.from_numpy(part).to(mass.device) for part in (columns, weights)))
    total = mass.sum(dim=1)
    expected = (mass / total.clamp(min=1e-12)[:, None] * scores.log_probs.masked_fill(mass == 0, 0)).sum(dim=1)
    return torch.where(total > 0, expected, scores.of(targets))


def _of_users(
    users: Sequences, counts: npt.NDArray[np.float64], config: CollaborativeConfig
) -> tuple[sparse.csr_array, sparse.csr_array, sparse.csr_array]:
    """Of each event of some users, (E, N) each: the history's weights, the part of scores that is their own, the seen.

    Only transitions to later events are the user's own doing that matters: earlier items are seen.
    """
    owner, items = np.repeat(np.arange(len(users)), users.lengths), users.items
    events = np.arange(len(items))
    history, own, seen = _Cells(), _Cells(), _Cells()
    for lag in range(1, int(users.lengths.max(initial=1))):
        later = events[lag:][owner[lag:] == owner[:-lag]]
        seen.add(later, items[later - lag], np.ones(len(later)))
        if lag > config.knn_last_items:
            continue
        decay = config.knn_decay ** (lag - 1)
        history.add(later, items[later - lag], np.full(len(later), decay))
        for ahead in range(config.knn_window - lag + 1):
            near = later[later + ahead < len(items)]
            near = near[owner[near + ahead] == owner[near]]
            source, target = items[near - lag], items[near + ahead]
            share = counts[source] ** -SOURCE_POWER * counts[target] ** -NEIGHBOUR_POWER
            own.add(near, target, decay * (lag + ahead) ** -0.5 * share)
    shape = (len(items), len(counts))
    seen_cells = seen.array(shape)
    seen_cells.data[:] = 1  # though a user may repeat an item
    return history.array(shape), own.array(shape), seen_cells


class _Cells:
    """Cells of a sparse matrix, collected."""

    def __init__(self) -> None:
        self._rows: list[npt.NDArray[np.int64]] = []
        self._columns: list[npt.NDArray[np.int32]] = []
        self._values: list[npt.NDArray[np.float64]] = []

    def add(self, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int32], values: npt.NDArray[np.float64]) -> None:
        self._rows.append(rows)
        self._columns.append(columns)
        self._values.append(values)

    def array(self, shape: tuple[int, int]) -> sparse.csr_array:
        if not self._rows:
            return sparse.csr_array(shape)
        cells = (np.concatenate(self._rows), np.concatenate(self._columns))
        return sparse.csr_array(sparse.coo_array((np.concatenate(self._values), cells), shape=shape))


def _write_strongest(scores: sparse.csr_array, lists: TeacherLists, first_event: int) -> None:
    """The greatest cells of each row into `lists`, as shares of their sum; equal ones by index."""
    rows = np.repeat(np.arange(scores.shape[0]), np.diff(scores.indptr))
    order = np.lexsort((scores.indices, -scores.data, rows))
    place = np.arange(len(order)) - scores.indptr[rows]
    strongest = place < LIST_LENGTH
    cells = (first_event + rows[strongest], place[strongest])
    lists.items[cells] = scores.indices[order[strongest]]
    lists.weights[cells] = scores.data[order[strongest]]
    mine = slice(first_event, first_event + scores.shape[0])
    lists.weights[mine] /= np.maximum(lists.weights[mine].sum(axis=1, keepdims=True), 1e-12)
