"""A teacher that cannot see its own user, and marginals that are sums over items."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.codes import SidSpace
from semantic_ids.trie import ROOT, SidTrie
from tests.training.test_sft import CATALOG, CYCLE, VALIDATION, config_of
from training.collaborative import CollaborativeConfig, ItemKnn, SasRec, SasRecShape
from training.distillation import (
    NUM_SAMPLED,
    SASREC_SHARE,
    Continuations,
    TeacherLists,
    leave_one_out_knn,
    sample_continuations,
    teacher_log_likelihood,
)
from training.examples import TargetSplit
from training.learner import Teaching
from training.legal_softmax import child_log_probs
from training.sequences import Sequences
from training.sft import run
from training.stage import StageError, StageFolder

NUM_ITEMS = 12
CONFIG = CollaborativeConfig(knn_window=3, knn_last_items=4, knn_neighbours=1000)


def sequences_of(seed: int, num_users: int = 9) -> Sequences:
    rng = np.random.default_rng(seed)
    return Sequences.of([rng.permutation(NUM_ITEMS)[: rng.integers(0, 9)].tolist() for _ in range(num_users)])


def without_user(train: Sequences, user: int) -> Sequences:
    return Sequences.of([[] if other == user else list(items) for other, items in enumerate(train)])


@given(st.integers(0, 10_000))
def test_lists_are_the_scores_of_a_knn_fitted_without_the_user(seed):
    """But for the items' counts, which normalise: they stay those of all users, and are put back by hand here."""
    train = sequences_of(seed)
    lists = leave_one_out_knn(train, NUM_ITEMS, CONFIG)
    counts = np.maximum(np.bincount(train.items, minlength=NUM_ITEMS), 1).astype(float)
    for user, items in enumerate(train):
        others = without_user(train, user)
        fewer = np.maximum(np.bincount(others.items, minlength=NUM_ITEMS), 1)
        knn = ItemKnn.fit(others, NUM_ITEMS, CONFIG)
        table = knn.table.toarray() * np.outer((fewer / counts) ** 0.5, (fewer / counts) ** 0.125)
        for place in range(len(items)):
            recent = items[max(0, place - 4) : place][::-1]
            expected = sum((0.7**age * table[item] for age, item in enumerate(recent)), np.zeros(NUM_ITEMS))
            expected[items[:place]] = 0
            if expected.sum():
                expected = expected / expected.sum()
            event = int(train.offsets[user]) + place
            given_ = np.bincount(lists.items[event], lists.weights[event], minlength=NUM_ITEMS)
            assert given_ == pytest.approx(expected, abs=1e-5)


def test_a_transition_that_only_this_user_made_is_not_expected():
    lists = leave_one_out_knn(Sequences.of([[0, 1], [2, 3], [2, 3]]), 4, CONFIG)
    assert lists.weights.sum(axis=1).tolist() == pytest.approx([0, 0, 0, 1, 0, 1])
    assert lists.items[3, 0] == 3


@given(st.integers(0, 10_000), st.integers(0, 2), st.integers(1, 30))
def test_a_code_is_expected_as_much_as_the_items_beneath_it(seed, level, num_rows):
    rng = np.random.default_rng(seed)
    trie = SidTrie.build(SidSpace(3, 4), rng.integers(0, 4, (25, 3)))
    paths = trie.path_of_rank(np.arange(25))
    targets = rng.integers(0, 25, num_rows)
    weights = np.where(rng.random((num_rows, 6)) < 0.5, rng.random((num_rows, 6)), 0).astype(np.float32)
    teacher = TeacherLists(rng.integers(0, 25, (num_rows, 6)).astype(np.int32), weights)
    prefix = paths[targets, level - 1] if level else np.full(num_rows, ROOT)
    generator = torch.Generator().manual_seed(seed)
    hidden, rows = torch.randn(num_rows, 4, generator=generator), torch.randn(4, 4, generator=generator)
    scores = child_log_probs(hidden, rows, None, trie, prefix)
    ours = teacher_log_likelihood(scores, teacher, paths, prefix, level, paths[targets, level])
    for row in range(num_rows):
        mass = np.bincount(teacher.items[row], weights[row], minlength=25)
        if level:
            mass[paths[:, level - 1] != prefix[row]] = 0
        if not mass.sum():
            mass[targets[row]] = 1
        children = np.unique(paths[mass > 0, level])
        of_child = [mass[paths[:, level] == child].sum() / mass.sum() for child in children]
        log_probs = scores.log_probs[row, children - scores.first_child[row]].tolist()
        assert float(ours[row]) == pytest.approx(np.dot(of_child, log_probs), abs=1e-4)


def uniform_lists(train: Sequences, catalog_size: int) -> TeacherLists:
    shape = (len(train.items), catalog_size)
    items = np.broadcast_to(np.arange(catalog_size, dtype=np.int32), shape)
    return TeacherLists(items, np.full(shape, 1 / catalog_size, np.float32))


def test_training_on_a_teacher_alone_learns_the_teacher(tmp_path):
    """One that expects everything equally, on sequences that are all the same: the targets get what all items get."""
    constant = Sequences.of([[3, 3, 3, 3, 3, 3]] * 20)
    settings = {"max_epochs": 30, "learning_rate": 0.02, "dropout": 0.0, "keep": "last"}
    config = config_of(distillation=0.99, **settings)
    folder = StageFolder(tmp_path / "taught", config, {})
    teacher = uniform_lists(constant, len(CATALOG))
    taught = run(config, CATALOG, constant, VALIDATION, folder, Teaching(lists=teacher))
    alone_config = config_of(**settings)
    alone = run(alone_config, CATALOG, constant, VALIDATION, StageFolder(tmp_path / "alone", alone_config, {}))
    assert alone.train_log_likelihood > -0.1
    # Item 3 shares its SID with one other of the 15; a hundredth of the loss is still the target's.
    assert -taught.train_log_likelihood == pytest.approx(np.log(15 / 2), abs=0.1)
    assert taught.validation_log_likelihood > alone.validation_log_likelihood + 1


def test_distillation_without_lists_is_refused(tmp_path):
    config = config_of(distillation=0.5)
    with pytest.raises(StageError, match=r"distillation=0\.5 needs a teacher"):
        run(config, CATALOG, CYCLE, VALIDATION, StageFolder(tmp_path, config, {}))


class TestContinuations:
    """What the teachers expect behind sequences that they continued themselves."""

    TRAIN = sequences_of(3, num_users=6)

    def sampled(self, count: int, *, train: Sequences | None = None, seed: int = 0) -> Continuations:
        sasrec, knn = self.teachers()
        train = self.TRAIN if train is None else train
        return sample_continuations(train, sasrec, knn, count=count, max_events=7, seed=seed)

    @staticmethod
    def teachers() -> tuple[SasRec, ItemKnn]:
        torch.manual_seed(0)
        shape = SasRecShape(NUM_ITEMS, embedding_width=8, num_layers=1, num_heads=1, dropout=0.0, max_length=5)
        sasrec = SasRec(shape).eval()
        return sasrec, ItemKnn.fit(sequences_of(4), NUM_ITEMS, CONFIG)

    def test_they_are_the_ends_of_users_sequences_and_items_that_these_users_have_not_had(self):
        continuations = self.sampled(14)
        originals = [items.tolist() for items in self.TRAIN]
        assert len(continuations.sequences) == 14
        num_each = [0] * len(originals)
        for sequence in continuations.sequences:
            assert len(sequence) <= 7
            before, after = sequence[:-NUM_SAMPLED].tolist(), sequence[-NUM_SAMPLED:].tolist()
            is_whole = len(sequence) < 7
            owner = next(one for one in originals if one == before or (not is_whole and one[-len(before) :] == before))
            assert not set(after) & set(owner)
            assert len(set(after)) == NUM_SAMPLED
            num_each[originals.index(owner)] += 1
        assert max(num_each) <= -(-14 // len(originals))

    def test_lists_are_what_both_teachers_expect_without_what_the_user_has_had(self):
        continuations, (sasrec, knn) = self.sampled(12), self.teachers()
        places = continuations.list_of_event()
        for number, sequence in enumerate(continuations.sequences):
            if len(sequence) == 7:
                continue  # cut: the beginning that the teachers saw is not there any more
            offset = int(continuations.sequences.offsets[number])
            assert (places[offset : offset + len(sequence) - NUM_SAMPLED + 1] == -1).all()
            for place in range(len(sequence) - NUM_SAMPLED + 1, len(sequence)):
                history = Sequences.of([sequence[:place]])
                logits, evidence = sasrec.scores(history)[0], knn.scores(history)[0]
                logits[sequence[:place]], evidence[sequence[:place]] = -np.inf, 0
                expected = np.exp(logits) / np.exp(logits).sum()
                if evidence.sum():
                    expected = SASREC_SHARE * expected + (1 - SASREC_SHARE) * evidence / evidence.sum()
                row = places[offset + place]
                lists = continuations.lists
                given_ = np.bincount(lists.items[row], lists.weights[row], minlength=NUM_ITEMS)
                assert given_ == pytest.approx(expected, abs=1e-4)

    def test_items_are_drawn_by_their_probability(self):
        """From a thousand continuations of one sequence: the first item's frequencies beside the teachers' numbers."""
        history = [0, 5]
        continuations = self.sampled(3000, train=Sequences.of([history]))
        first = continuations.sequences.items.reshape(3000, -1)[:, 2]
        sasrec, knn = self.teachers()
        logits, evidence = sasrec.scores(Sequences.of([history]))[0], knn.scores(Sequences.of([history]))[0]
        logits[history], evidence[history] = -np.inf, 0
        expected = np.exp(logits) / np.exp(logits).sum()
        if evidence.sum():
            expected = SASREC_SHARE * expected + (1 - SASREC_SHARE) * evidence / evidence.sum()
        assert np.bincount(first, minlength=NUM_ITEMS) / 3000 == pytest.approx(expected, abs=0.04)

    def test_the_same_arguments_give_the_same_and_another_seed_gives_others(self):
        one, same, other = self.sampled(9), self.sampled(9), self.sampled(9, seed=1)
        assert (one.sequences.items == same.sequences.items).all()
        assert (one.lists.weights == same.lists.weights).all()
        assert (
            len(one.sequences.items) != len(other.sequences.items)
            or (one.sequences.items != other.sequences.items).any()
        )

    def test_whoever_has_had_nearly_everything_is_left_out(self):
        everything = list(range(NUM_ITEMS))
        continuations = self.sampled(5, train=Sequences.of([everything, [1, 2]]))
        assert {tuple(one[:2].tolist()) for one in continuations.sequences} == {(1, 2)}
        assert len(self.sampled(5, train=Sequences.of([everything])).sequences) == 0

    def test_new_names_reach_sequences_and_lists(self):
        continuations = self.sampled(4)
        new_name = np.arange(NUM_ITEMS, dtype=np.int32)[::-1].copy()
        renamed = continuations.renamed(new_name)
        assert (renamed.sequences.items == NUM_ITEMS - 1 - continuations.sequences.items).all()
        assert (renamed.lists.items == NUM_ITEMS - 1 - continuations.lists.items).all()
        assert (renamed.lists.weights == continuations.lists.weights).all()

    def test_training_learns_what_is_expected_there(self, tmp_path):
        """Behind every sequence the teachers want the last item, which no training event ever shows."""
        wanted = len(CATALOG) - 1
        train = Sequences.of([[one % (wanted - 1), (one + 1) % (wanted - 1)] for one in range(40)])
        sequences = Sequences.of([[*one.tolist(), *[wanted] * NUM_SAMPLED] for one in train])
        lists = TeacherLists.empty(len(train) * (NUM_SAMPLED - 1))
        lists.items[:, 0], lists.weights[:, 0] = wanted, 1.0
        split = TargetSplit(Sequences.of([[*one.tolist(), wanted] for one in train]), np.full(40, wanted, np.int32))
        settings = {"max_epochs": 15, "learning_rate": 0.02, "dropout": 0.0, "keep": "last"}
        taught_config = config_of(continuations=40, **settings)
        teaching = Teaching(continuations=Continuations(sequences, lists))
        taught = run(
            taught_config, CATALOG, train, split, StageFolder(tmp_path / "taught", taught_config, {}), teaching
        )
        alone_config = config_of(**settings)
        alone = run(alone_config, CATALOG, train, split, StageFolder(tmp_path / "alone", alone_config, {}))
        assert taught.validation_log_likelihood > -1.0
        assert alone.validation_log_likelihood < -4.0

    def test_nobody_to_continue_is_no_obstacle_and_nothing_given_is_refused(self, tmp_path):
        nobody = Continuations(Sequences.of([]), TeacherLists.empty(0))
        config = config_of(continuations=5, max_epochs=1)
        run(config, CATALOG, CYCLE, VALIDATION, StageFolder(tmp_path / "a", config, {}), Teaching(continuations=nobody))
        with pytest.raises(StageError, match="continuations=5 needs continued sequences"):
            run(config, CATALOG, CYCLE, VALIDATION, StageFolder(tmp_path / "b", config, {}))
