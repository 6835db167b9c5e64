"""SASRec, item-kNN and popularity: hand-derived numbers, invariances, resumption, and the files they leave."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from training.collaborative import (
    COOCCURRENCE_FILE,
    ITEM_VECTORS_FILE,
    POPULARITY_FILE,
    SASREC_FILE,
    CollaborativeConfig,
    ItemKnn,
    Popularity,
    SasRec,
    SasRecShape,
    Scorer,
    epoch_windows,
    evaluate_scorer,
    load_item_knn,
    load_popularity,
    load_sasrec,
    next_item_loss,
    right_padded,
    run,
    train_sasrec,
)
from training.sequences import Sequences
from training.stage import StageError, StageFolder

TINY = CollaborativeConfig(
    threads=1, embedding_width=16, max_length=6, batch_size=16, learning_rate=0.01, max_epochs=4, patience=4
)


@dataclass(frozen=True)
class HeldOut:
    """The smallest EvaluationInput."""

    histories: Sequences
    targets: npt.NDArray[np.int32]


def random_sequences(
    generator: np.random.Generator, num_users: int = 12, num_items: int = 9, longest: int = 12
) -> Sequences:
    return Sequences.of(
        [generator.integers(0, num_items, generator.integers(2, longest)).tolist() for _ in range(num_users)]
    )


def tiny_task(num_items: int = 9) -> tuple[Sequences, HeldOut]:
    sequences = random_sequences(np.random.default_rng(5), num_users=40, num_items=num_items)
    targets = sequences.items[sequences.offsets[1:] - 1]
    return sequences.without_last(1), HeldOut(sequences.without_last(1), targets)


def tiny_model(max_length: int = 6) -> SasRec:
    torch.manual_seed(1)
    shape = SasRecShape(num_items=9, embedding_width=16, num_layers=2, num_heads=2, dropout=0.0, max_length=max_length)
    model = SasRec(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def test_popularity_gives_every_history_the_training_counts() -> None:
    popularity = Popularity.fit(Sequences.of([[0, 2, 2], [2]]), 4)
    assert popularity.scores(Sequences.of([[1], []])).tolist() == [[1, 0, 3, 0]] * 2


def test_item_knn_by_hand() -> None:
    """0→1 twice at distance 1, 1→2 once, 0→2 once at distance 2 (1/√2); backwards half of that.

    Counts 2, 2, 1. After the history 0, 1 item 2 gets table[1, 2] + ½ table[0, 2], where table[1, 2] = 1 / √2 and
    table[0, 2] = (1/√2) / √2 = ½ (count(2) = 1 divides by 1); item 0 gets table[1, 0] = 1 / (√2 · 2^⅛).
    """
    config = CollaborativeConfig(knn_backward_weight=0.5, knn_decay=0.5, knn_window=2)
    item_knn = ItemKnn.fit(Sequences.of([[0, 1, 2], [0, 1]]), 3, config)
    scores = item_knn.scores(Sequences.of([[0, 1]]))
    assert scores[0, 2] == pytest.approx(2**-0.5 + 0.25)
    assert scores[0, 0] == pytest.approx(2**-0.625)


def test_item_knn_reads_only_the_last_items() -> None:
    item_knn = ItemKnn.fit(Sequences.of([[0, 1, 2, 3, 4]]), 5, CollaborativeConfig(knn_last_items=2))
    histories = Sequences.of([[0, 3, 4], [1, 1, 2, 3, 4], [3, 4]])
    scores = item_knn.scores(histories)
    assert scores[0].tolist() == scores[1].tolist() == scores[2].tolist()


def test_item_knn_without_evidence_scores_nothing() -> None:
    item_knn = ItemKnn.fit(Sequences.of([[0, 1]]), 4, CollaborativeConfig())
    assert not item_knn.scores(Sequences.of([[], [3], [2, 3]])).any()


def test_item_knn_keeps_the_strongest_neighbours_and_their_equals() -> None:
    """Item 0 is followed by 1 twice and by 2, 3 and 4 once: of two neighbours kept, the second has two equals."""
    train = Sequences.of([[0, 1], [0, 1], [0, 2], [0, 3], [0, 4]])
    table = ItemKnn.fit(train, 5, CollaborativeConfig(knn_neighbours=1, knn_backward_weight=0)).table
    assert table[[0]].indices.tolist() == [1]
    table = ItemKnn.fit(train, 5, CollaborativeConfig(knn_neighbours=2, knn_backward_weight=0)).table
    assert sorted(table[[0]].indices.tolist()) == [1, 2, 3, 4]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_item_knn_equals_the_obvious_loop(seed: int) -> None:
    generator = np.random.default_rng(seed)
    train = random_sequences(generator)
    config = CollaborativeConfig(knn_window=3, knn_last_items=4)
    counts = np.maximum(np.bincount(train.items, minlength=9), 1)
    table = np.zeros((9, 9))
    for user in range(len(train)):
        events = train[user]
        for early in range(len(events)):
            for late in range(early + 1, min(early + 4, len(events))):
                table[events[early], events[late]] += (late - early) ** -0.5
                table[events[late], events[early]] += 0.3 * (late - early) ** -0.5
    np.fill_diagonal(table, 0)
    table /= counts[:, None] ** 0.5 * counts[None, :] ** 0.125
    histories = random_sequences(generator, num_users=5)
    expected = np.zeros((5, 9))
    for user in range(5):
        for age, item in enumerate(histories[user][::-1][:4]):
            expected[user] += 0.7**age * table[item]
    np.testing.assert_allclose(ItemKnn.fit(train, 9, config).scores(histories), expected, rtol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_permuting_item_indices_permutes_scores_and_nothing_else(seed: int, neighbours: int) -> None:
    generator = np.random.default_rng(seed)
    train, histories = random_sequences(generator), random_sequences(generator, num_users=5)
    renamed = generator.permutation(9).astype(np.int32)
    train_renamed = Sequences(train.offsets, renamed[train.items])
    histories_renamed = Sequences(histories.offsets, renamed[histories.items])
    config = CollaborativeConfig(knn_neighbours=neighbours)

    knn = ItemKnn.fit(train, 9, config).scores(histories)
    knn_renamed = ItemKnn.fit(train_renamed, 9, config).scores(histories_renamed)
    assert np.array_equal(knn_renamed[:, renamed], knn)
    popularity = Popularity.fit(train, 9).scores(histories)
    assert np.array_equal(Popularity.fit(train_renamed, 9).scores(histories_renamed)[:, renamed], popularity)

    targets = generator.integers(0, 9, 5).astype(np.int32)
    for scorer, scorer_renamed in (
        (ItemKnn.fit(train, 9, config), ItemKnn.fit(train_renamed, 9, config)),
        (Popularity.fit(train, 9), Popularity.fit(train_renamed, 9)),
    ):
        metrics = evaluate_scorer(scorer, histories, targets, masked=True).metrics
        metrics_renamed = evaluate_scorer(scorer_renamed, histories_renamed, renamed[targets], masked=True).metrics
        assert metrics.means() == metrics_renamed.means()


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    train, validation = tiny_task()
    scorer = ItemKnn.fit(train, 9, TINY)
    one, many = (
        evaluate_scorer(scorer, validation.histories, validation.targets, masked=False, batch_size=size)
        for size in (1, 64)
    )
    assert np.array_equal(one.recommended, many.recommended)
    assert np.array_equal(one.metrics.ndcg[10], many.metrics.ndcg[10])


def test_evaluation_with_seen_items_masked_recommends_none_of_them_and_counts_seen_targets_as_missed() -> None:
    train, validation = tiny_task()
    evaluation = evaluate_scorer(
        Popularity.fit(train, 9), validation.histories, validation.targets, masked=True, num_recommended=5
    )
    for user, target in enumerate(validation.targets):
        seen = set(validation.histories[user].tolist())
        assert not seen & set(evaluation.recommended[user].tolist())
        assert evaluation.metrics.recall[50][user] == (target not in seen)


def test_right_padding_puts_each_sequence_at_the_start_of_its_row() -> None:
    assert right_padded(Sequences.of([[3, 4], [], [5, 6, 7]])).tolist() == [[3, 4, 0], [0, 0, 0], [5, 6, 7]]


def test_epoch_windows_are_runs_of_the_users_own_events_and_a_pure_function_of_seed_and_epoch() -> None:
    train = Sequences.of([list(range(start, start + 3 + start % 7)) for start in range(0, 400, 20)])
    windows = epoch_windows(train, 5, seed=3, epoch=2)
    again = epoch_windows(train, 5, seed=3, epoch=2)
    assert np.array_equal(windows.items, again.items)
    owners = [int(window[0]) // 20 for window in (windows[row] for row in range(len(windows)))]
    assert sorted(owners) == list(range(20))
    for row, owner in enumerate(owners):
        assert np.diff(windows[row]).tolist() == [1] * (min(5, len(train[owner])) - 1)
        assert windows[row][-1] <= train[owner][-1]
    assert not np.array_equal(windows.items, epoch_windows(train, 5, seed=3, epoch=1).items)


def test_epoch_windows_reach_every_event() -> None:
    train = Sequences.of([list(range(9))])
    seen = {int(item) for epoch in range(60) for item in epoch_windows(train, 3, 0, epoch).items}
    assert seen == set(range(9))


def test_sasrec_is_causal() -> None:
    model = tiny_model()
    items = torch.tensor([[1, 2, 3, 4, 5]])
    changed = torch.tensor([[1, 2, 3, 8, 0]])
    before, after = model(items), model(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_sasrec_scores_do_not_depend_on_padding_or_on_the_rest_of_the_batch() -> None:
    model = tiny_model()
    histories = Sequences.of([[1, 2], [3, 4, 5, 6, 7], [8]])
    together = model.scores(histories)
    for user in range(3):
        alone = model.scores(histories.select(np.asarray([user])))
        np.testing.assert_allclose(together[[user]], alone, rtol=1e-5, atol=1e-5)


def test_sasrec_scores_the_last_events_and_ties_everything_for_an_empty_history() -> None:
    model = tiny_model(max_length=3)
    scores = model.scores(Sequences.of([[1, 2, 3, 4], [2, 3, 4], []]))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
    assert not scores[2].any()
    nothing = Sequences(np.zeros(2, np.int64), np.empty(0, np.int32))
    assert model.scores(nothing).tolist() == [[0] * 9]


@pytest.mark.parametrize("logits_at_once", [1, 50, 10_000])
def test_loss_in_shares_equals_the_obvious_loss_and_its_gradient(logits_at_once: int) -> None:
    sequences = Sequences.of([[1, 2, 3, 4], [5, 6], [7, 8, 0]])
    plain = tiny_model()
    losses = [
        F.cross_entropy(
            plain(torch.tensor([row[:-1]]))[0] @ plain.items.weight.T, torch.tensor(row[1:]), reduction="sum"
        )
        for row in (sequences[user].tolist() for user in range(3))
    ]
    expected = torch.stack(losses).sum() / 6
    torch.autograd.backward(expected)

    model = tiny_model()
    assert next_item_loss(model, sequences, logits_at_once) == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), plain_parameter in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, plain_parameter.grad, msg=name, rtol=1e-4, atol=1e-5)


def test_sasrec_learns_a_cycle(tmp_path: Path) -> None:
    """Every next item is the one after it, so a model that learned anything ranks it first."""
    generator = np.random.default_rng(0)
    walks = Sequences.of([((generator.integers(20) + np.arange(8)) % 20).tolist() for _ in range(120)])
    validation = HeldOut(walks.without_last(1), walks.items[walks.offsets[1:] - 1])
    config = TINY.model_copy(update={"max_epochs": 12})
    model, progress = train_sasrec(config, walks.without_last(1), validation, 20, tmp_path / "c")
    assert progress.best_ndcg > 0.99
    assert model.scores(Sequences.of([[4, 5, 6]])).argmax() == 7


def test_resumed_training_equals_training_straight_through_bit_for_bit(tmp_path: Path) -> None:
    train, validation = tiny_task()
    straight, straight_progress = train_sasrec(TINY, train, validation, 9, tmp_path / "straight")
    killed_after_two = TINY.model_copy(update={"max_epochs": 2})
    train_sasrec(killed_after_two, train, validation, 9, tmp_path / "resumed")
    resumed, resumed_progress = train_sasrec(TINY, train, validation, 9, tmp_path / "resumed")
    assert resumed_progress == straight_progress
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_stops_early_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    """On random sequences validation cannot keep rising; the model returned must be the one that scored best."""
    train, validation = tiny_task()
    config = TINY.model_copy(update={"max_epochs": 200, "patience": 3})
    model, progress = train_sasrec(config, train, validation, 9, tmp_path / "c")
    assert progress.epochs == progress.best_epoch + 3
    evaluation = evaluate_scorer(model, validation.histories, validation.targets, masked=True)
    assert evaluation.metrics.means()["ndcg@10"] == pytest.approx(progress.best_ndcg)


def test_run_leaves_files_that_load_and_a_summary_that_is_read_back(tmp_path: Path) -> None:
    train, validation = tiny_task()
    folder = StageFolder(tmp_path / "collaborative", TINY, {})
    summary = run(TINY, train, validation, 9, folder)
    assert {path.name for path in folder.path.iterdir()} == {
        ".fingerprint",
        "stage.json",
        "sasrec.safetensors",
        "sasrec.json",
        "item_vectors.npy",
        "cooccurrence.npz",
        "popularity.npy",
    }
    sasrec = load_sasrec(folder.path / SASREC_FILE)
    assert np.array_equal(np.load(folder.path / ITEM_VECTORS_FILE), sasrec.item_vectors())
    assert sasrec.item_vectors().shape == (9, 16)
    for name, scorer in (
        ("sasrec", sasrec),
        ("item_knn", load_item_knn(folder.path / COOCCURRENCE_FILE)),
        ("popularity", load_popularity(folder.path / POPULARITY_FILE)),
    ):
        evaluation = evaluate_scorer(scorer, validation.histories, validation.targets, masked=True)
        assert evaluation.metrics.means() == pytest.approx(getattr(summary, name)), name
    assert load_popularity(folder.path / POPULARITY_FILE).counts.dtype == np.int64
    table = sparse.load_npz(folder.path / COOCCURRENCE_FILE)
    assert table.shape == (9, 9)
    assert table.dtype == np.float32
    assert run(TINY, train, validation, 9, StageFolder(tmp_path / "collaborative", TINY, {})) == summary


def test_run_twice_gives_the_same_files(tmp_path: Path) -> None:
    train, validation = tiny_task()
    for name in ("a", "b"):
        run(TINY, train, validation, 9, StageFolder(tmp_path / name, TINY, {}))
    for file in (SASREC_FILE, ITEM_VECTORS_FILE, COOCCURRENCE_FILE, POPULARITY_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("train", "targets", "message"),
    [
        ([[0], [1]], [2, 2], "none of the 2 training sequences has two events"),
        ([[0, 1], [1, 9]], [2, 2], r"train: item indices 0 … 9 do not fit a catalogue of 9 items"),
        ([[0, 1], [1, 2]], [2, -1], r"validation targets: item indices -1 … 2"),
        ([[0, 1], [1, 2]], [2], "validation has 1 targets for 2 histories"),
    ],
)
def test_unusable_input_stops_the_stage(
    tmp_path: Path, train: list[list[int]], targets: list[int], message: str
) -> None:
    sequences = Sequences.of(train)
    with pytest.raises(StageError, match=message):
        run(
            TINY,
            sequences,
            HeldOut(sequences, np.asarray(targets, np.int32)),
            9,
            StageFolder(tmp_path / "collaborative", TINY, {}),
        )


@pytest.mark.parametrize(
    ("load", "name"),
    [(load_sasrec, "sasrec.safetensors"), (load_item_knn, "cooccurrence.npz"), (load_popularity, "popularity.npy")],
)
def test_unreadable_file_names_itself_and_the_remedy(tmp_path: Path, load: Callable[[Path], Scorer], name: str) -> None:
    path = tmp_path / name
    with pytest.raises(StageError, match="run the collaborative stage again"):
        load(path)
    train, validation = tiny_task()
    folder = StageFolder(tmp_path / "run", TINY, {})
    run(TINY, train, validation, 9, folder)
    whole = (folder.path / name).read_bytes()
    (folder.path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StageError, match=name):
        load(folder.path / name)


def test_validation_is_sampled_where_it_would_cost_more_than_training(tmp_path: Path) -> None:
    """The recall of one user is 0 or 1; that of forty is something between."""
    train, validation = tiny_task()
    config = TINY.model_copy(update={"max_epochs": 1, "max_validation_users": 1})
    summary = run(config, train, validation, 9, StageFolder(tmp_path / "one", config, {}))
    assert summary.popularity["recall@5"] in {0.0, 1.0}
    assert summary.item_knn["recall@5"] in {0.0, 1.0}


def test_diverging_training_stops_the_stage(tmp_path: Path) -> None:
    train, validation = tiny_task()
    config = TINY.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(StageError, match=r"loss became (nan|inf) in epoch \d+; lower collaborative's learning_rate"):
        train_sasrec(config, train, validation, 9, tmp_path / "c")
