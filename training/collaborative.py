"""What the interactions alone know: SASRec, directed item-kNN and popularity, from training sequences only.

They are the baselines that stand beside every result. SASRec's item table is the source of collaborative vectors, and
the kNN's and the popularity's tables travel in the bundle as fallbacks. This stage knows no item text and no SID; it
never sees a test target, and validation only chooses SASRec's epoch.
"""

import io
import json
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy import sparse
from torch import Tensor, nn

from training.checkpoint import load_checkpoint, save_checkpoint
from training.metrics import RankingMetrics, metrics_of_ranks, target_ranks, top_items
from training.sequences import Sequences
from training.stage import THREADS, StageConfig, StageError, StageFolder, Summary, progress_bar, write_atomically

SASREC_FILE = "sasrec.safetensors"
ITEM_VECTORS_FILE = "item_vectors.npy"
COOCCURRENCE_FILE = "cooccurrence.npz"
POPULARITY_FILE = "popularity.npy"
CHECKPOINT_FILE = "sasrec.ckpt"

LOGITS_AT_ONCE = 16_000_000
"""Bounds the full softmax's memory: 64 MB of logits, and as much again for their gradient."""

SOURCE_POWER, NEIGHBOUR_POWER = 0.5, 0.125
"""The kNN's normalisation. On validation (Beauty, MovieLens-100K; masked R@10), neighbour power 0: .1072, .2216;
0.125: .1071, .2291; 0.25: .1047, .2354; 0.5 costs a tenth on Beauty."""


class CollaborativeConfig(StageConfig):
    """Settings of SASRec's training and of the kNN's table; the defaults are for catalogues like Amazon Beauty."""

    seed: int = Field(default=0, ge=0)
    threads: int = Field(1, ge=1, description=THREADS)
    device: str = "cpu"
    embedding_width: int = Field(default=64, ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_heads: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    max_length: int = Field(default=50, ge=1)
    batch_size: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    max_epochs: int = Field(default=40, ge=1)
    patience: int = Field(default=5, ge=1)
    max_validation_users: int = Field(default=25_000, ge=1)
    knn_window: int = Field(default=10, ge=1)
    knn_backward_weight: float = Field(default=0.3, ge=0)
    knn_last_items: int = Field(default=20, ge=1)
    knn_decay: float = Field(default=0.7, gt=0, le=1)
    knn_neighbours: int = Field(default=100, ge=1)


class CollaborativeSummary(Summary):
    """How SASRec's training went, and the three baselines' validation metrics with seen items masked.

    The metrics are those of all validation users, or of `max_validation_users` of them drawn by the seed.
    """

    epochs: int
    best_epoch: int
    popularity: dict[str, float]
    item_knn: dict[str, float]
    sasrec: dict[str, float]
    seconds: float


class EvaluationInput(Protocol):
    """One held-out item per user, with what the user did before it."""

    @property
    def histories(self) -> Sequences:
        """All earlier events of each user."""

    @property
    def targets(self) -> npt.NDArray[np.int32]:
        """The held-out item of each user, (users,)."""


class Scorer(Protocol):
    """Anything that gives every item of the catalogue a score for each history."""

    def scores(self, histories: Sequences) -> npt.NDArray[np.float32]:
        """Scores (B, N), the greater the better; comparable within a row only."""


@dataclass(frozen=True)
class ScorerEvaluation:
    """A scorer's metrics per user, and the lists it recommends, (U, k), for coverage and Gini."""

    metrics: RankingMetrics
    recommended: npt.NDArray[np.int32]


def run(
    config: CollaborativeConfig, train: Sequences, validation: EvaluationInput, num_items: int, folder: StageFolder
) -> CollaborativeSummary:
    """Fit the three baselines, write their files into the stage's folder, and mark the stage done.

    A finished folder is only read; an unfinished one resumes SASRec after its last complete epoch.
    """
    if (finished := folder.finished()) is not None:
        return CollaborativeSummary.model_validate(finished)
    _require_usable(train, validation, num_items)
    validation = _sampled(validation, config)
    started_s = time.monotonic()
    torch.set_num_threads(config.threads)

    popularity = Popularity.fit(train, num_items)
    popularity.save(folder.path / POPULARITY_FILE)
    item_knn = ItemKnn.fit(train, num_items, config)
    item_knn.save(folder.path / COOCCURRENCE_FILE)
    sasrec, progress = train_sasrec(config, train, validation, num_items, folder.path / CHECKPOINT_FILE)
    save_sasrec(sasrec, folder.path / SASREC_FILE)
    _save_array(sasrec.item_vectors(), folder.path / ITEM_VECTORS_FILE)

    summary = CollaborativeSummary(
        epochs=progress.epochs,
        best_epoch=progress.best_epoch,
        popularity=_validate(popularity, validation, config.seed).means(),
        item_knn=_validate(item_knn, validation, config.seed).means(),
        sasrec=_validate(sasrec, validation, config.seed).means(),
        seconds=round(time.monotonic() - started_s, 1),
    )
    folder.finish(summary)
    (folder.path / CHECKPOINT_FILE).unlink()
    return summary


def evaluate_scorer(
    scorer: Scorer,
    histories: Sequences,
    targets: npt.NDArray[np.int32],
    *,
    masked: bool,
    batch_size: int = 256,
    seed: int = 0,
    num_recommended: int = 10,
) -> ScorerEvaluation:
    """Rank every target among the full catalogue, and list each user's `num_recommended` best items.

    With `masked`, the history leaves the ranking and the lists. `seed` draws the places of equal scores; the size of
    the batches changes no draw.
    """
    generator = np.random.default_rng([seed, 0])
    tie_order: npt.NDArray[np.int64] | None = None
    ranks, recommended = [], []
    for start in range(0, len(targets), batch_size):
        users = np.arange(start, min(start + batch_size, len(targets)))
        of_users = histories.select(users)
        scores = scorer.scores(of_users)  # (B, N)
        seen = of_users if masked else None
        ranks.append(target_ranks(scores, targets[users], seen, generator=generator))
        if num_recommended:
            if tie_order is None:
                tie_order = np.random.default_rng([seed, 1]).permutation(scores.shape[1])
            recommended.append(top_items(scores, num_recommended, seen, tie_order=tie_order))
    lists = np.concatenate(recommended) if recommended else np.empty((len(targets), 0), np.int32)
    return ScorerEvaluation(metrics_of_ranks(np.concatenate([np.empty(0, np.int64), *ranks])), lists)


class Popularity:
    """Every history gets the items' training counts; equal counts stay equal, and the ranking draws their order."""

    def __init__(self, counts: npt.NDArray[np.int64]) -> None:
        self.counts = counts  # (N,)

    @classmethod
    def fit(cls, train: Sequences, num_items: int) -> "Popularity":
        """Count the training events of each item."""
        return cls(np.bincount(train.items, minlength=num_items))

    def scores(self, histories: Sequences) -> npt.NDArray[np.float32]:
        """The counts, once per history, (B, N)."""
        return np.tile(self.counts.astype(np.float32), (len(histories), 1))

    def save(self, path: Path) -> None:
        """Write the counts as int64 .npy."""
        _save_array(self.counts, path)


class ItemKnn:
    """Directed co-occurrence: what followed the last items of a history in other users' sequences.

    A history scores item j with the sum over its last `last_items` events i, of age a = 0, 1, … from the newest, of
    decay^a · table[i, j]. Without evidence an item scores 0.
    """

    def __init__(self, table: sparse.csr_array, last_items: int, decay: float) -> None:
        self.table = table  # (N, N)
        self.last_items = last_items
        self.decay = decay

    @classmethod
    def fit(cls, train: Sequences, num_items: int, config: CollaborativeConfig) -> "ItemKnn":
        """Count, for each pair of items, how often j came within the window after i, and normalise.

        An occurrence at distance s counts 1/√s; one of j *before* i counts `knn_backward_weight` times that. Each cell
        is divided by count(i)^SOURCE_POWER · count(j)^NEIGHBOUR_POWER, so that items with long histories of their own
        do not outvote the rest.
        """
        forward = forward_cooccurrence(train, num_items, config.knn_window, distance_power=0.5)
        both = sparse.csr_array(forward + config.knn_backward_weight * forward.T)
        counts = np.maximum(np.bincount(train.items, minlength=num_items), 1)
        sources = np.repeat(np.arange(num_items), np.diff(both.indptr))
        weights = both.data * counts[sources] ** -SOURCE_POWER * counts[both.indices] ** -NEIGHBOUR_POWER
        weights[sources == both.indices] = 0
        table = sparse.csr_array((weights, both.indices, both.indptr), shape=both.shape)
        return cls(_strongest_of_each_row(table, config.knn_neighbours), config.knn_last_items, config.knn_decay)

    def scores(self, histories: Sequences) -> npt.NDArray[np.float32]:
        """Scores (B, N)."""
        recent = last_of_each(histories, self.last_items)
        age = np.repeat(recent.offsets[1:], recent.lengths) - 1 - np.arange(len(recent.items))
        shape = (len(recent), self.table.shape[0])
        weights: sparse.csr_array = sparse.csr_array((self.decay**age, recent.items, recent.offsets), shape=shape)
        scores: npt.NDArray[np.float32] = (weights @ self.table).toarray().astype(np.float32)
        return scores

    def save(self, path: Path) -> None:
        """Write scipy's own .npz form, readable by `scipy.sparse.load_npz`, with the two settings of scoring beside."""
        content = io.BytesIO()
        np.savez(
            content,
            format=np.bytes_("csr"),
            shape=np.asarray(self.table.shape),
            indptr=self.table.indptr,
            indices=self.table.indices,
            data=self.table.data.astype(np.float32),
            last_items=np.int64(self.last_items),
            decay=np.float64(self.decay),
        )
        write_atomically(path, content.getvalue())


class SasRec(nn.Module):
    """Self-attentive sequential recommendation (Kang & McAuley 2018) with a full softmax over the tied item table.

    Batches are padded on the right, so causal attention alone keeps padding out of every real position.
    """

    def __init__(self, shape: "SasRecShape") -> None:
        super().__init__()
        self.shape = shape
        self.never_next = np.empty(0, np.int64)
        """Items whose score is -inf: a teacher must not name what its student shall not meet."""
        self.items = nn.Embedding(shape.num_items, shape.embedding_width)  # (N, D)
        self.positions = nn.Embedding(shape.max_length, shape.embedding_width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.embedding_width)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                # With position embeddings of unit variance SASRec never left popularity level on Beauty (measured).
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, items: Tensor) -> Tensor:
        """Hidden states (B, T, D) of item sequences (B, T), right-padded with any item."""
        places = torch.arange(items.shape[1], device=items.device)
        hidden: Tensor = self.items(items) * self.shape.embedding_width**0.5 + self.positions(places)
        hidden = self.dropout(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        normed: Tensor = self.norm(hidden)
        return normed

    @torch.inference_mode()
    def scores(self, histories: Sequences) -> npt.NDArray[np.float32]:
        """Logits (B, N) of the next item after each history's last `max_length` events; all 0 for an empty history."""
        scores = self._scores(last_of_each(histories, self.shape.max_length))
        scores[:, self.never_next] = -np.inf
        return scores

    def _scores(self, recent: Sequences) -> npt.NDArray[np.float32]:
        lengths = torch.from_numpy(recent.lengths)
        if not lengths.any():
            return np.zeros((len(recent), self.shape.num_items), np.float32)
        device = self.items.weight.device
        was_training = self.training
        self.eval()
        hidden = self(torch.from_numpy(right_padded(recent)).to(device))  # (B, T, D)
        self.train(was_training)
        last = hidden[torch.arange(len(recent)), (lengths - 1).clamp(min=0)]  # (B, D)
        logits = (last * (lengths > 0).to(device)[:, None]) @ self.items.weight.T
        scores: npt.NDArray[np.float32] = logits.cpu().numpy()
        return scores

    def item_vectors(self) -> npt.NDArray[np.float32]:
        """The item table, (N, D)."""
        vectors: npt.NDArray[np.float32] = self.items.weight.detach().cpu().numpy()
        return vectors


@dataclass(frozen=True)
class SasRecShape:
    """What it takes to build a SasRec before its weights are loaded."""

    num_items: int
    embedding_width: int
    num_layers: int
    num_heads: int
    dropout: float
    max_length: int


class _Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward, each with a residual path."""

    def __init__(self, shape: SasRecShape) -> None:
        super().__init__()
        width = shape.embedding_width
        self.num_heads = shape.num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        hidden = hidden + self.dropout(self._attend(self.attention_norm(hidden)))
        output: Tensor = hidden + self.dropout(self.feed_forward(hidden))
        return output

    def _attend(self, hidden: Tensor) -> Tensor:
        num_rows, length, width = hidden.shape
        heads = self.query_key_value(hidden).view(num_rows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()  # each (B, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed: Tensor = self.attention_out(attended.transpose(1, 2).reshape(num_rows, length, width))
        return mixed


@dataclass(frozen=True)
class TrainingProgress:
    """How far SASRec's training went: epochs run, the epoch whose weights were kept, and its validation NDCG@10."""

    epochs: int
    best_epoch: int
    best_ndcg: float


def train_sasrec(
    config: CollaborativeConfig, train: Sequences, validation: EvaluationInput, num_items: int, checkpoint: Path
) -> tuple[SasRec, TrainingProgress]:
    """Train until validation NDCG@10 has not risen for `patience` epochs; returns the best epoch's model.

    After every epoch the whole state goes to `checkpoint`, and a later call continues from there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = SasRec(_shape_of(config, num_items)).to(config.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        progress, best = TrainingProgress(0, 0, -1.0), model.state_dict()
        if resumed := load_checkpoint(checkpoint, model=model, optimizer=optimizer):
            progress, best = TrainingProgress(**resumed.extra["progress"]), resumed.extra["best"]
        learners = np.flatnonzero(train.lengths >= 2)
        with progress_bar("SASRec", config.max_epochs, progress.epochs) as bar:
            for epoch in range(progress.epochs + 1, config.max_epochs + 1):
                if epoch - 1 - progress.best_epoch >= config.patience:
                    break
                loss = _train_epoch(model, optimizer, train.select(learners), config, epoch)
                ndcg = float(_validate(model, validation, config.seed).ndcg[10].mean())
                if ndcg > progress.best_ndcg:
                    progress = TrainingProgress(epoch, epoch, ndcg)
                    best = {name: weights.detach().clone() for name, weights in model.state_dict().items()}
                else:
                    progress = TrainingProgress(epoch, progress.best_epoch, progress.best_ndcg)
                save_checkpoint(
                    checkpoint,
                    model=model,
                    optimizer=optimizer,
                    step=epoch,
                    extra={"progress": asdict(progress), "best": best},
                )
                bar.advance()
                bar.note(f"loss {loss:.3f}  validation NDCG@10 {ndcg:.4f}  best {progress.best_ndcg:.4f}")
    model.load_state_dict(best)
    return model.eval(), progress


def epoch_windows(train: Sequences, max_events: int, seed: int, epoch: int) -> Sequences:
    """One epoch's sequences in their order: shuffled users, each with a random run of at most `max_events` events.

    A pure function of its arguments, so that a resumed epoch reads what an uninterrupted one would have read.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(train))
    slack = np.maximum(train.lengths - max_events, 0)
    start = (generator.random(len(train)) * (slack + 1)).astype(np.int64)
    return train.slice_each(start, np.minimum(start + max_events, train.lengths)).select(order)


def last_of_each(sequences: Sequences, count: int) -> Sequences:
    """Each sequence's last `count` events."""
    return sequences.slice_each(np.maximum(sequences.lengths - count, 0), sequences.lengths)


def right_padded(sequences: Sequences) -> npt.NDArray[np.int64]:
    """The sequences as rows, (B, T) with T the longest, filled up with item 0."""
    lengths = sequences.lengths
    rows = np.repeat(np.arange(len(sequences)), lengths)
    padded = np.zeros((len(sequences), int(lengths.max())), np.int64)
    padded[rows, np.arange(len(rows)) - sequences.offsets[rows]] = sequences.items
    return padded


def next_item_loss(model: SasRec, sequences: Sequences, logits_at_once: int = LOGITS_AT_ONCE) -> float:
    """Mean cross-entropy of every next item against all items; leaves its gradient in the parameters.

    Only real positions reach the softmax, some at a time: each share's gradient is taken at once and collected at the
    hidden states, so that never more than `logits_at_once` logits exist. Every sequence has at least two events.
    """
    device = model.items.weight.device
    events = torch.from_numpy(right_padded(sequences)).to(device)  # (B, T + 1)
    lengths = torch.from_numpy(sequences.lengths).to(device)
    is_real = torch.arange(1, events.shape[1], device=device) < lengths[:, None]  # (B, T)
    hidden = model(events[:, :-1])[is_real]  # (positions, D)
    targets = events[:, 1:][is_real]
    boundary = hidden.detach().requires_grad_()
    positions_at_once = max(1, logits_at_once // model.shape.num_items)
    total = 0.0
    for start in range(0, len(targets), positions_at_once):
        share = slice(start, start + positions_at_once)
        logits = boundary[share] @ model.items.weight.T
        loss = F.cross_entropy(logits, targets[share], reduction="sum") / len(targets)
        torch.autograd.backward(loss)
        total += loss.item()
    torch.autograd.backward(hidden, boundary.grad)
    return total


def save_sasrec(model: SasRec, path: Path) -> None:
    """Write the weights to `path` (.safetensors) and the shape to the .json beside it."""
    write_atomically(path.with_suffix(".json"), json.dumps(asdict(model.shape), indent=2).encode())
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(weights))


def load_sasrec(path: Path) -> SasRec:
    """The model that `save_sasrec` wrote at `path`, on the CPU, ready to score."""
    try:
        model = SasRec(SasRecShape(**json.loads(path.with_suffix(".json").read_text())))
        model.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error
    return model.eval()


def load_item_knn(path: Path) -> ItemKnn:
    """The kNN that `ItemKnn.save` wrote at `path`."""
    try:
        with path.open("rb") as file, np.load(file) as content:
            parts = (content["data"], content["indices"], content["indptr"])
            table = sparse.csr_array(parts, shape=tuple(content["shape"]))
            return ItemKnn(table, int(content["last_items"]), float(content["decay"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


def load_popularity(path: Path) -> Popularity:
    """The counts that `Popularity.save` wrote at `path`."""
    try:
        return Popularity(np.load(path))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _require_usable(train: Sequences, validation: EvaluationInput, num_items: int) -> None:
    if not (train.lengths >= 2).any():
        raise StageError(
            f"none of the {len(train)} training sequences has two events, so there is no next item to learn; "
            "lower data's k-core or give more interactions"
        )
    if not len(validation.targets) or len(validation.targets) != len(validation.histories):
        raise StageError(
            f"validation has {len(validation.targets)} targets for {len(validation.histories)} histories; "
            "a user gives one with at least three events; "
            "it takes one of each per user, and at least one user"
        )
    for name, items in (("train", train.items), ("validation targets", validation.targets)):
        if len(items) and not 0 <= items.min() <= items.max() < num_items:
            raise StageError(
                f"{name}: item indices {items.min()} … {items.max()} do not fit a catalogue of {num_items} items; "
                "run the data stage again"
            )


@dataclass(frozen=True)
class _HeldOut:
    histories: Sequences
    targets: npt.NDArray[np.int32]


def _sampled(validation: EvaluationInput, config: CollaborativeConfig) -> EvaluationInput:
    """At most `max_validation_users` users: every epoch ranks the whole catalogue for each of them."""
    if len(validation.targets) <= config.max_validation_users:
        return validation
    drawn = np.random.default_rng(config.seed).choice(
        len(validation.targets), config.max_validation_users, replace=False, shuffle=False
    )
    return _HeldOut(validation.histories.select(drawn), validation.targets[drawn])


def _validate(scorer: Scorer, validation: EvaluationInput, seed: int) -> RankingMetrics:
    evaluation = evaluate_scorer(
        scorer, validation.histories, validation.targets, masked=True, seed=seed, num_recommended=0
    )
    return evaluation.metrics


def _shape_of(config: CollaborativeConfig, num_items: int) -> SasRecShape:
    return SasRecShape(
        num_items=num_items,
        embedding_width=config.embedding_width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        dropout=config.dropout,
        max_length=config.max_length,
    )


def _train_epoch(
    model: SasRec, optimizer: torch.optim.Optimizer, train: Sequences, config: CollaborativeConfig, epoch: int
) -> float:
    """One pass over all users; the mean loss of its batches."""
    model.train()
    windows = epoch_windows(train, config.max_length + 1, config.seed, epoch)
    losses = []
    for batch in _batches(windows, config.batch_size):
        optimizer.zero_grad()
        losses.append(next_item_loss(model, batch))
        optimizer.step()
    mean_loss = float(np.mean(losses))
    if not np.isfinite(mean_loss):
        raise StageError(
            f"SASRec's loss became {mean_loss} in epoch {epoch}; lower collaborative's learning_rate, "
            f"now {config.learning_rate}"
        )
    return mean_loss


def _batches(sequences: Sequences, batch_size: int) -> Iterator[Sequences]:
    for start in range(0, len(sequences), batch_size):
        yield sequences.select(np.arange(start, min(start + batch_size, len(sequences))))


def forward_cooccurrence(train: Sequences, num_items: int, window: int, *, distance_power: float) -> sparse.csr_array:
    """Cell (i, j): the sum of s^-distance_power over all places where j comes s ≤ window events after i in a sequence.

    One pass per distance, so memory grows with the distinct pairs and not with the square of a sequence's length;
    cells are summed in the order of the distances, whatever the items' indices.
    """
    owner = np.repeat(np.arange(len(train)), train.lengths)
    total = sparse.csr_array((num_items, num_items), dtype=np.float64)
    for distance in range(1, min(window, int(train.lengths.max(initial=0)) - 1) + 1):
        is_pair = owner[distance:] == owner[:-distance]
        pairs = (train.items[:-distance][is_pair], train.items[distance:][is_pair])
        ones = np.ones(len(pairs[0]))
        # The counts are whole numbers, exact in any order of addition; only then are they weighted.
        counts = sparse.csr_array(sparse.coo_array((ones, pairs), shape=(num_items, num_items)))
        total = sparse.csr_array(total + counts * distance**-distance_power)
    return total


def _strongest_of_each_row(table: sparse.csr_array, count: int) -> sparse.csr_array:
    """Each row's `count` greatest cells, and every further cell equal to the least of them: no tie by index."""
    rows = np.repeat(np.arange(table.shape[0]), np.diff(table.indptr))
    by_row_then_weight = np.lexsort((-table.data, rows))
    threshold = np.zeros(table.shape[0])
    is_full = np.diff(table.indptr) > count
    threshold[is_full] = table.data[by_row_then_weight[table.indptr[:-1][is_full] + count - 1]]
    pruned = sparse.csr_array(
        (np.where(table.data >= threshold[rows], table.data, 0), table.indices, table.indptr), shape=table.shape
    )
    pruned.eliminate_zeros()
    return pruned


def _save_array(array: npt.NDArray[Any], path: Path) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_atomically(path, content.getvalue())


def _unreadable(path: Path, error: Exception) -> StageError:
    return StageError(f"{path} cannot be read ({type(error).__name__}: {error}); run the collaborative stage again")
