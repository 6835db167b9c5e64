"""A teacher's lists for every training event, and what they say of each level's codes.

The teacher is the directed item-kNN *without the user's own sequence*: its table counts the very transition that is to
be learned, so that as it stands it would only repeat the target. Lists are item-level; a student that writes codes
learns from their marginals: the probability of a legal code is the sum of the items beneath it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from semantic_ids.trie import Nodes
from training.collaborative import NEIGHBOUR_POWER, SOURCE_POWER, CollaborativeConfig, forward_cooccurrence
from training.legal_softmax import ChildLogProbs
from training.sequences import Sequences

LIST_LENGTH = 100
_USERS_AT_ONCE = 400
_ROUNDING = 1e-9


@dataclass(frozen=True)
class TeacherLists:
    """For each of E training events the items that the teacher expects in its place; weights 0 fill up."""

    items: npt.NDArray[np.int32]  # (E, k)
    weights: npt.NDArray[np.float32]  # (E, k)

    def select(self, events: npt.NDArray[np.integer]) -> "TeacherLists":
        """The lists of these events, in this order."""
        return TeacherLists(self.items[events], self.weights[events])


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
    lists = TeacherLists(
        np.zeros((len(train.items), LIST_LENGTH), np.int32), np.zeros((len(train.items), LIST_LENGTH), np.float32)
    )
    for start in range(0, len(train), _USERS_AT_ONCE):
        users = train.select(np.arange(start, min(start + _USERS_AT_ONCE, len(train))))
        history, own, seen = _of_users(users, counts, config)
        scores = sparse.csr_array(history @ table - own)
        scores = sparse.csr_array(scores - scores.multiply(seen))
        scores.data[scores.data < _ROUNDING] = 0  # what is left of a transition that nobody else made
        scores.eliminate_zeros()
        _write_strongest(scores, lists, int(train.offsets[start]))
    return lists


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
    mass = torch.zeros_like(scores.log_probs).scatter_add(1, torch.from_numpy(columns), torch.from_numpy(weights))
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
