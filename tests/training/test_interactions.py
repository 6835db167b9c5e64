"""The `data` stage: what it accepts, what it refuses and how it says so, and the order it gives."""

import csv
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.interactions import EVENT_TYPES, DataConfig, Dataset, DataSummary, fingerprint_of, k_core, run
from training.sequences import Sequences
from training.stage import StageError, StageFolder

ITEMS = "item_id,title\na,Apple\nb,Bread\nc,Cheese\n"
INTERACTIONS = "user_id,item_id,timestamp\nu,a,1\nu,b,2\nu,c,3\n"


def given_files(directory: Path, interactions: str | bytes = INTERACTIONS, items: str | bytes = ITEMS) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("interactions.csv", interactions), ("items.csv", items)):
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


def run_stage(data_dir: Path, **options: object) -> tuple[Dataset, DataSummary]:
    config = DataConfig.model_validate(options)
    folder = StageFolder(data_dir / "run", config, {"data": fingerprint_of(data_dir)})
    summary = run(config, data_dir, folder)
    return Dataset.load(folder.path), summary


def error_of(data_dir: Path, **options: object) -> str:
    with pytest.raises(StageError) as caught:
        run_stage(data_dir, **options)
    return str(caught.value)


def skipped_rows(data_dir: Path) -> list[list[str]]:
    with (data_dir / "run/skipped_rows.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def history_of(dataset: Dataset, user_id: str) -> list[str]:
    return [dataset.item_ids[item] for item in dataset.sequences[dataset.user_ids.index(user_id)]]


# What comes out


def test_events_are_ordered_by_time_whatever_their_order_in_the_file(tmp_path):
    dataset, _ = run_stage(given_files(tmp_path, "user_id,item_id,timestamp\nu,c,30\nu,a,9\nu,b,10\n"))
    assert history_of(dataset, "u") == ["a", "b", "c"]
    assert dataset.timestamps.tolist() == [9, 10, 30]


def test_ids_that_look_like_numbers_keep_their_zeros(tmp_path):
    files = given_files(
        tmp_path, "user_id,item_id,timestamp\n01,007,1\n01,7,2\n", "item_id,title\n007,Bond\n7,Seven\n1e3,Mill\n"
    )
    dataset, _ = run_stage(files)
    assert history_of(dataset, "01") == ["007", "7"]
    assert sorted(dataset.item_ids) == ["007", "1e3", "7"]


def test_only_clicks_purchases_and_likes_become_events_and_the_others_are_counted(tmp_path):
    rows = ["u,a,1,click", "u,a,2,", "u,b,3,purchase", "u,c,4,like", "u,b,5,hide", "u,b,6,dislike", "w,b,7,impression"]
    dataset, summary = run_stage(given_files(tmp_path, "\n".join(["user_id,item_id,timestamp,event_type", *rows])))
    assert [EVENT_TYPES[kind] for kind in dataset.event_types] == ["click", "click", "purchase", "like"]
    assert summary.events_by_type == {"click": 2, "purchase": 1, "like": 1}
    assert summary.ignored_events == {"impression": 1, "dislike": 1, "hide": 1}
    assert summary.users_without_training_events == 1
    assert dataset.user_ids == ["u"]


def test_the_summary_counts_what_can_be_counted_by_hand(tmp_path):
    rows = ["u,a,1", "u,a,2", "u,b,3", "w,a,1", "w,b,2"]
    items = "item_id,title\na,Apple\nb,Bread\nc,\n"
    _, summary = run_stage(given_files(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]), items))
    assert (summary.num_users, summary.num_items, summary.num_events) == (2, 3, 5)
    assert (summary.mean_length, summary.median_length, summary.max_length) == (2.5, 2.5, 3)
    assert summary.density == pytest.approx(4 / 6)
    assert summary.repeat_share == pytest.approx(1 / 5)
    assert (summary.items_without_events, summary.items_without_title, summary.training_only_users) == (1, 1, 1)


def test_leave_one_out_holds_out_the_last_two_and_keeps_users_with_two_for_training(tmp_path):
    rows = ["u,a,1", "u,b,2", "u,c,3", "u,a,4", "w,b,1", "w,c,2"]
    dataset, _ = run_stage(given_files(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows])))
    u, w = dataset.user_ids.index("u"), dataset.user_ids.index("w")

    def names(items) -> list[str]:
        return [dataset.item_ids[item] for item in items]

    assert names(dataset.train()[u]) == ["a", "b"]
    assert names(dataset.train()[w]) == ["b", "c"]
    validation, test = dataset.evaluation("validation"), dataset.evaluation("test")
    assert validation.users.tolist() == test.users.tolist() == [u]
    assert (names(validation.histories[0]), names(validation.targets)) == (["a", "b"], ["c"])
    assert (names(test.histories[0]), names(test.targets)) == (["a", "b", "c"], ["a"])
    assert (str(validation.users.dtype), str(validation.targets.dtype)) == ("int64", "int32")


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=7), max_size=8))
def test_a_history_with_its_target_is_the_beginning_of_the_sequence(sequences):
    num_events = sum(map(len, sequences))
    users = [str(user) for user in range(len(sequences))]
    no_items: list[str] = []
    dataset = Dataset(
        no_items, [], [], [], users, Sequences.of(sequences), np.zeros(num_events), np.zeros(num_events, np.uint8)
    )
    for split, after in (("validation", 1), ("test", 0)):
        evaluation = dataset.evaluation(split)  # type: ignore[arg-type]
        assert evaluation.users.tolist() == [user for user, items in enumerate(sequences) if len(items) >= 3]
        for row, user in enumerate(evaluation.users):
            whole = [*evaluation.histories[row], evaluation.targets[row]]
            assert whole == sequences[user][: len(sequences[user]) - after]
            assert sequences[user][: len(dataset.train()[user])] == dataset.train()[user].tolist()


def walks(names: str, users: int = 30) -> tuple[str, str]:
    """`users` random walks of 3 to 9 events over these one-letter items: interactions and items."""
    rng = random.Random(0)
    rows = ["user_id,item_id,timestamp"]
    for user in range(users):
        rows += [f"u{user},{names[rng.randrange(len(names))]},{time}" for time in range(rng.randint(3, 9))]
    return "\n".join(rows), "\n".join(["item_id,title", *(f"{name},Title" for name in names)])


def test_cold_items_are_in_the_catalogue_and_in_nothing_that_is_learnt_or_shown(tmp_path):
    whole, _ = run_stage(given_files(tmp_path / "whole", *walks("abcdefghij")))
    dataset, summary = run_stage(given_files(tmp_path / "cold", *walks("abcdefghij")), cold_share=0.3)
    cold = set(dataset.cold_items.tolist())
    assert len(cold) == summary.cold_items == 3
    assert dataset.item_ids == whole.item_ids
    assert dataset.sequences.items.tolist() == whole.sequences.items.tolist()
    assert summary.cold_events == sum(item in cold for item in dataset.sequences.items)
    train = dataset.train()
    learnt = [[item for item in sequence if item not in cold] for sequence in whole.train()]
    assert [sequence.tolist() for sequence in train] == [sequence for sequence in learnt if sequence]
    for split, held_out in (("validation", 2), ("test", 1), ("cold", 1)):
        evaluation = dataset.evaluation(split)  # type: ignore[arg-type]
        expected = []
        for user, sequence in enumerate(whole.sequences):
            history = [item for item in sequence[:-held_out] if item not in cold]
            if history and (sequence[-held_out] in cold) == (split == "cold"):
                expected.append((user, history, int(sequence[-held_out])))
        found = zip(evaluation.users, evaluation.histories, evaluation.targets, strict=True)
        assert [(user, history.tolist(), target) for user, history, target in found] == expected
        assert expected
    assert summary.cold_users == len(dataset.evaluation("cold").users)
    assert (summary.num_users, summary.num_events) == (30, len(whole.sequences.items))


def test_cold_items_are_test_targets_drawn_by_the_seed_and_not_by_their_ids(tmp_path):
    interactions, items = walks("abcdefghij")
    renamed = str.maketrans("abcdefghij", "jihgfedcba")
    header, *rows = interactions.splitlines()
    other = "\n".join([header, *(row.translate(renamed) for row in rows)])
    _, *lines = items.splitlines()
    other_items = "\n".join(["item_id,title", *(f"{line[0].translate(renamed)}{line[1:]}" for line in lines)])

    def cold_ids(folder: str, files: tuple[str, str], seed: int) -> set[str]:
        dataset, _ = run_stage(given_files(tmp_path / folder, *files), cold_share=0.3, seed=seed)
        assert set(dataset.cold_items) <= {sequence[-1] for sequence in dataset.sequences}
        return {dataset.item_ids[item] for item in dataset.cold_items}

    drawn = [cold_ids(f"seed {seed}", (interactions, items), seed) for seed in range(4)]
    assert len(set(map(frozenset, drawn))) > 1
    mirrored = [cold_ids(f"renamed {seed}", (other, other_items), seed) for seed in range(4)]
    assert mirrored == [{name.translate(renamed) for name in ids} for ids in drawn]


def test_without_cold_items_a_dataset_is_what_it_was(tmp_path):
    """Neither a fingerprint nor a file knows of the setting, so that runs which are older than it stay finished."""
    assert DataConfig().identity() == {"k_core": 1, "seed": 0, "skip_bad_rows": False}
    assert DataConfig(cold_share=0.1).identity()["cold_share"] == 0.1
    dataset, summary = run_stage(given_files(tmp_path, *walks("abcdefghij")))
    assert pl.read_parquet(tmp_path / "run/items.parquet").columns == ["item_id", "title", "categories", "attributes"]
    assert len(dataset.cold_items) == len(dataset.evaluation("cold").users) == 0
    old = {name: value for name, value in summary.model_dump().items() if not name.startswith("cold_")}
    assert DataSummary.model_validate(old) == summary


ENDING_AT_C = "user_id,item_id,timestamp\nu,c,1\nu,c,2\nu,a,3\nu,c,4\nv,c,1\nv,c,2\nv,c,3\nv,c,4\n"
"""Only c is a last event, and without it one user has a single event and the other none."""


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.01, "data.cold_share=0.01 of 2 items with events is no item: raise it to at least 0.500000"),
        (0.95, "data.cold_share=0.95 of 2 items with events is 2, and only 1 are .*: lower it to at most 0.500000"),
    ],
)
def test_a_share_of_no_item_or_of_too_many_is_refused(tmp_path, share, message):
    assert re.search(message, error_of(given_files(tmp_path, ENDING_AT_C), cold_share=share))


def test_a_share_that_leaves_nothing_to_learn_or_nobody_to_ask_is_refused(tmp_path):
    message = error_of(given_files(tmp_path, ENDING_AT_C), cold_share=0.5)
    assert "data.cold_share=0.5 holds 1 items out of training and leaves no" in message
    assert "no training sequence of two events, no user with a validation target, no user with a test" in message
    assert message.endswith("lower it, or give more interactions")


def test_cold_items_that_only_follow_themselves_are_refused(tmp_path):
    """Of a and c, the two last events, the seed may draw c, whose only user knows nothing else."""
    rows = ["u,c,1", "u,c,2", "u,c,3", *(f"{user},{item},{time}" for user in "vw" for time, item in enumerate("abda"))]
    files = given_files(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows]), ITEMS + "d,Dates\n")
    assert any("leaves no cold user" in error_of(files, cold_share=0.25, seed=seed) for seed in range(8))


def test_what_is_saved_is_what_is_loaded(tmp_path):
    items = [
        {"item_id": "a", "title": 'A "quoted" title', "categories": ["X > Y", "Z"], "brand": "B", "year": 1999},
        {"item_id": "b", "title": "é, ü", "price": 2.0, "in_stock": True, "brand": None},
    ]
    data_dir = given_files(tmp_path)
    (data_dir / "items.csv").unlink()
    (data_dir / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (data_dir / "interactions.csv").write_text("user_id,item_id,timestamp\nu,a,1.5\nu,b,2\n")
    dataset, _ = run_stage(data_dir)
    dataset.save(tmp_path / "again")
    again = Dataset.load(tmp_path / "again")
    for one in (dataset, again):
        a, b = one.item_ids.index("a"), one.item_ids.index("b")
        assert one.titles[a] == 'A "quoted" title'
        assert one.categories[a] == ["X > Y", "Z"]
        assert one.categories[b] == []
        assert one.attributes[a] == {"brand": "B", "year": "1999"}
        assert one.attributes[b] == {"price": "2", "in_stock": "true"}
        assert one.sequences[0].tolist() == [a, b]
        assert one.timestamps.tolist() == [1.5, 2]
        assert one.timestamps.dtype == np.float64


def test_loading_from_a_folder_without_a_dataset_says_to_run_the_stage(tmp_path):
    with pytest.raises(StageError, match=r"holds no readable dataset .*run the data stage again"):
        Dataset.load(tmp_path)


def test_the_stage_is_marked_done_with_its_summary(tmp_path):
    data_dir = given_files(tmp_path)
    _, summary = run_stage(data_dir)
    folder = StageFolder(data_dir / "run", DataConfig(), {"data": fingerprint_of(data_dir)})
    assert folder.finished() == summary.model_dump(mode="json")


def test_the_fingerprint_follows_every_byte_of_both_files(tmp_path):
    fingerprints = {
        fingerprint_of(given_files(tmp_path / "0")),
        fingerprint_of(given_files(tmp_path / "1", interactions=INTERACTIONS + "\n")),
        fingerprint_of(given_files(tmp_path / "2", items=ITEMS + "\n")),
    }
    assert len(fingerprints) == 3
    assert fingerprint_of(given_files(tmp_path / "3")) in fingerprints


# Forms of input


@pytest.mark.parametrize(
    ("written", "paths"),
    [
        ("A > B|C", ["A > B", "C"]),
        (" A  >  B |C| ", ["A > B", "C"]),
        (["A > B", "C"], ["A > B", "C"]),
        (["A|B > C"], ["A|B > C"]),
        ([["A", "B"], ["C"]], ["A > B", "C"]),
        (["A", "A", ""], ["A"]),
        ([], []),
        (None, []),
    ],
)
def test_categories_may_be_a_string_a_list_of_paths_or_a_list_of_lists(tmp_path, written, paths):
    data_dir = given_files(tmp_path, "user_id,item_id,timestamp\nu,a,1\nu,a,2\n")
    (data_dir / "items.csv").unlink()
    (data_dir / "items.jsonl").write_text(json.dumps({"item_id": "a", "title": "A", "categories": written}))
    assert run_stage(data_dir)[0].categories == [paths]


def test_parquet_files_mean_the_same_as_csv(tmp_path):
    data_dir = tmp_path / "parquet"
    data_dir.mkdir()
    pl.DataFrame(
        {
            "user_id": [1, 1, 1],
            "item_id": ["a", "b", "c"],
            "timestamp": [3.0, 2.0, 1.0],
            "event_type": ["like", None, ""],
        }
    ).write_parquet(data_dir / "interactions.parquet")
    pl.DataFrame(
        {"item_id": ["a", "b", "c"], "title": ["Apple", None, "Cheese"], "year": [1.0, None, float("nan")]}
        | {"categories": [[["X", "Y"]], [], None]}
    ).write_parquet(data_dir / "items.parquet")
    dataset, _ = run_stage(data_dir)
    assert history_of(dataset, "1") == ["c", "b", "a"]
    a, b, c = map(dataset.item_ids.index, "abc")
    assert (dataset.categories[a], dataset.titles[b]) == (["X > Y"], "")
    assert (dataset.attributes[a], dataset.attributes[b], dataset.attributes[c]) == ({"year": "1"}, {}, {})

    written = "user_id,item_id,timestamp,event_type\n1,a,3,like\n1,b,2,\n1,c,1,\n"
    same, _ = run_stage(given_files(tmp_path / "csv", written))
    assert same.item_ids == dataset.item_ids
    assert same.sequences.items.tolist() == dataset.sequences.items.tolist()
    assert same.event_types.tolist() == dataset.event_types.tolist()


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1719830000", 1719830000.0),
        ("-1.5", -1.5),
        ("1e3", 1000.0),
        ("2024-07-01T10:33:20Z", 1719830000.0),
        ("2024-07-01 10:33:20.25", 1719830000.25),
        ("2024-07-01T12:33:20+02:00", 1719830000.0),
        ("2024-07-01T12:33+0200", 1719829980.0),
        ("2024-07-01", 1719792000.0),
    ],
)
def test_timestamps_are_seconds_or_iso_8601_with_utc_as_the_default_zone(tmp_path, written, seconds):
    dataset, _ = run_stage(given_files(tmp_path, f"user_id,item_id,timestamp\nu,a,{written}\nu,b,9e9\n"))
    assert dataset.timestamps[0] == seconds


def test_parquet_datetimes_become_seconds(tmp_path):
    data_dir = given_files(tmp_path)
    (data_dir / "interactions.csv").unlink()
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": ["2024-07-01", "2024-07-02"]})
    frame.with_columns(pl.col("timestamp").str.to_date()).write_parquet(data_dir / "interactions.parquet")
    assert run_stage(data_dir)[0].timestamps.tolist() == [1719792000.0, 1719878400.0]


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_harmless(tmp_path):
    files = given_files(
        tmp_path,
        b"\xef\xbb\xbf" + INTERACTIONS.replace("\n", "\r\n").encode() + b"\r\n\r\n",
        b"\n" + ITEMS.encode().rstrip(),
    )
    dataset, _ = run_stage(files)
    assert history_of(dataset, "u") == ["a", "b", "c"]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('",\n\r |>'), max_size=8)] * 2),
        min_size=1,
        max_size=6,
    ),
    line_end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_csv_fields_are_read_as_pythons_csv_module_writes_them(tmp_path_factory, rows, line_end, quoting):
    data_dir = given_files(tmp_path_factory.mktemp("csv"), "user_id,item_id,timestamp\nu,0,1\nu,0,2\n")
    with (data_dir / "items.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=line_end, quoting=quoting)
        writer.writerows([["item_id", "title", "note"], *([index, *texts] for index, texts in enumerate(rows))])
    dataset, _ = run_stage(data_dir)
    for index, (title, note) in enumerate(rows):
        item = dataset.item_ids.index(str(index))
        assert dataset.titles[item] == title.strip()
        assert dataset.attributes[item].get("note", "") == note.strip()


# Order


@settings(deadline=None, max_examples=40)
@given(
    events=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 3), st.sampled_from(("click", "like"))),
        min_size=4,
        max_size=30,
        unique=True,
    ),
    labels=st.permutations([f"i{item}" for item in range(6)]),
    k=st.sampled_from([1, 2]),
    seed=st.integers(0, 3),
)
def test_relabelling_the_items_changes_nothing_but_the_labels(tmp_path_factory, events, labels, k, seed):
    """Every user also gets two plain events, so that k_core=1 has nobody to refuse."""
    events = [*events, *((user, 0, 10 + time, "click") for user in range(5) for time in range(2))]

    def dataset_of(names: list[str]) -> Dataset:
        rows = [f"u{user},{names[item]},{time},{kind}" for user, item, time, kind in events]
        return run_stage(
            given_files(
                tmp_path_factory.mktemp("labels"),
                "\n".join(["user_id,item_id,timestamp,event_type", *rows]),
                "\n".join(["item_id,title", *(f"{name},title {item}" for item, name in enumerate(names))]),
            ),
            k_core=k,
            seed=seed,
        )[0]

    plain = [f"i{item}" for item in range(6)]
    before, after = dataset_of(plain), dataset_of(labels)
    assert [labels[plain.index(item_id)] for item_id in before.item_ids] == after.item_ids
    assert before.titles == after.titles
    assert before.user_ids == after.user_ids
    assert before.sequences.offsets.tolist() == after.sequences.offsets.tolist()
    assert before.sequences.items.tolist() == after.sequences.items.tolist()
    assert before.timestamps.tolist() == after.timestamps.tolist()
    assert before.event_types.tolist() == after.event_types.tolist()


def test_events_at_the_same_time_follow_neither_the_file_nor_the_ids_and_the_seed_decides(tmp_path):
    names = [f"i{item:03}" for item in range(200)]
    rows = [f"u,{name},0" for name in names]
    files = given_files(
        tmp_path,
        "\n".join(["user_id,item_id,timestamp", *rows]),
        "\n".join(["item_id,title", *(f"{name},x" for name in names)]),
    )
    first, again, other = (history_of(run_stage(files, seed=seed)[0], "u") for seed in (0, 0, 1))
    assert first == again != other
    ascending = np.mean([left < right for left, right in pairwise(first)])
    assert 0.35 < ascending < 0.65  # 199 pairs of a fair shuffle: 0.5 ± 4 × 0.02 (neighbours share an element)


def test_indices_of_items_and_users_are_shuffled(tmp_path):
    names = [f"x{index:03}" for index in range(100)]
    rows = [f"{name},{name},{time}" for name in names for time in (1, 2)]
    files = given_files(
        tmp_path,
        "\n".join(["user_id,item_id,timestamp", *rows]),
        "\n".join(["item_id,title", *(f"{name},x" for name in names)]),
    )
    dataset, _ = run_stage(files)
    assert sorted(dataset.item_ids) == sorted(dataset.user_ids) == names
    assert names != dataset.item_ids != dataset.user_ids != names


# k-core


def brute_force_k_core(events: list[tuple[int, int]], k: int) -> list[tuple[int, int]]:
    while True:
        users, items = Counter(user for user, _ in events), Counter(item for _, item in events)
        kept = [(user, item) for user, item in events if users[user] >= k and items[item] >= k]
        if kept == events:
            return kept
        events = kept


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40), st.integers(1, 4))
def test_the_k_core_is_that_of_taking_out_rare_users_and_items_until_none_is_left(events, k):
    pairs = np.array(events, np.int64).reshape(-1, 2)
    kept = k_core(pairs[:, 0], pairs[:, 1], k)
    assert [tuple(pair) for pair in pairs[kept].tolist()] == brute_force_k_core(events, k)


def test_items_below_the_k_core_stay_in_the_catalogue_and_one_event_users_are_counted(tmp_path):
    rows = ["u,a,1", "u,b,2", "w,a,1", "w,b,2", "w,c,3", "lonely,a,1"]
    dataset, summary = run_stage(given_files(tmp_path, "\n".join(["user_id,item_id,timestamp", *rows])), k_core=2)
    assert sorted(dataset.item_ids) == ["a", "b", "c"]
    assert sorted(dataset.user_ids) == ["u", "w"]
    assert summary.removed_by_k_core.model_dump() == {"users": 1, "items": 1, "events": 2}
    assert summary.items_without_events == 1
    assert summary.skipped_rows == {}


def test_a_k_core_that_leaves_nothing_says_so(tmp_path):
    message = error_of(given_files(tmp_path), k_core=5)
    assert "no event is left to train on" in message
    assert "3, after k_core=5: 0" in message
    assert "Lower k_core" in message


def test_skipping_every_row_says_so_and_still_lists_them(tmp_path):
    data_dir = given_files(tmp_path, "user_id,item_id,timestamp\nu,a,x\nu,b,nan\n")
    message = error_of(data_dir, skip_bad_rows=True)
    assert "no event is left" in message
    assert "unreadable timestamp: 1, timestamp not finite: 1" in message
    assert len(skipped_rows(data_dir)) == 2


# Structure that stops in both modes

STRUCTURAL: dict[str, tuple[str | bytes, str | bytes, str]] = {
    "empty interactions": (b"", ITEMS, r"interactions\.csv is empty: it holds no rows; export it again"),
    "only a header": ("user_id,item_id,timestamp\n", ITEMS, r"interactions\.csv is empty"),
    "blank lines only": (INTERACTIONS, "\n\n\n", r"items\.csv is empty"),
    "items with a header only": (INTERACTIONS, "item_id,title\n", r"items\.csv is empty"),
    "no timestamp column": (
        "user_id,item_id\nu,a\n",
        ITEMS,
        r"no column 'timestamp' \(it has \['user_id', 'item_id'\]",
    ),
    "no title column": (INTERACTIONS, "item_id,name\na,b\n", r"no column 'title'.*item_id,title\[,categories,"),
    "semicolons": ("user_id;item_id;timestamp\nu;a;1\n", ITEMS, "no column 'user_id' and .*separated by commas"),
    "unknown column": (
        "user_id,item_id,timestamp,price\nu,a,1,2\n",
        ITEMS,
        r"unknown column 'price'; rename or remove it: .*user_id,item_id,timestamp\[,event_type\]",
    ),
    "column twice": (
        "user_id,item_id,timestamp,item_id\nu,a,1,a\n",
        ITEMS,
        "column 'item_id' more than once; keep one",
    ),
    "column without a name": (INTERACTIONS, ",item_id,title\n0,a,A\n", "column 1 has no name; name or remove it"),
    "header not UTF-8": (
        INTERACTIONS,
        b"item_id,title,gr\xf6sse\na,A,1\n",
        r"the header 'item_id,title,gr\\\\xf6sse' is",
    ),
}


@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize("kind", STRUCTURAL)
def test_a_file_of_the_wrong_form_stops_in_both_modes(tmp_path, kind, skip_bad_rows):
    interactions, items, message = STRUCTURAL[kind]
    with pytest.raises(StageError, match=message):
        run_stage(given_files(tmp_path, interactions, items), skip_bad_rows=skip_bad_rows)


def test_a_missing_directory_or_file_is_named_with_what_is_wanted(tmp_path):
    assert "is not a directory; give the one with" in error_of(tmp_path / "nowhere")
    data_dir = given_files(tmp_path)
    (data_dir / "items.csv").unlink()
    message = error_of(data_dir)
    assert "has no items file (it holds interactions.csv" in message
    assert "add one of items.csv, items.jsonl, items.parquet" in message


def test_two_files_for_one_thing_are_both_named(tmp_path):
    data_dir = given_files(tmp_path)
    (data_dir / "items.jsonl").write_text("{}")
    assert "has both items.csv and items.jsonl; keep the one that is meant" in error_of(data_dir)


def test_parquet_that_is_none_or_has_columns_of_the_wrong_type_is_refused(tmp_path):
    data_dir = given_files(tmp_path)
    (data_dir / "items.csv").unlink()
    items = data_dir / "items.parquet"
    items.write_text("no parquet")
    assert "items.parquet cannot be read as Parquet" in error_of(data_dir)
    pl.DataFrame({"item_id": ["a"], "title": ["A"], "tags": [["x"]]}).write_parquet(items)
    assert "column 'tags' is of type List(String); only strings and numbers can be item text" in error_of(data_dir)
    items.unlink()
    (data_dir / "items.csv").write_text(ITEMS)
    (data_dir / "interactions.csv").unlink()
    interactions = data_dir / "interactions.parquet"
    pl.DataFrame({"user_id": [1.5], "item_id": ["a"], "timestamp": [1]}).write_parquet(interactions)
    assert "column 'user_id' is of type Float64; cast it to a string" in error_of(data_dir)
    pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [True]}).write_parquet(interactions)
    assert "column 'timestamp' is of type Boolean; write seconds or ISO-8601 times" in error_of(data_dir)
    pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [1]}).clear().write_parquet(interactions)
    assert "interactions.parquet is empty" in error_of(data_dir)


# Bad rows: (interactions, items, line in the message, row of skipped_rows.csv)

GOOD_ROWS = "u,a,1\nu,b,2\nu,c,3\n"
HEADER = "user_id,item_id,timestamp\n"
LONG = "x" * 129

BAD_ROWS = {
    "too few fields": (f"u,a\n{GOOD_ROWS}", ["2", "", "u,a", "wrong number of fields (2 instead of 3)"]),
    "too many fields": (f"{GOOD_ROWS}u,a,4,5\n", ["5", "", "u,a,4,5", "wrong number of fields (4 instead of 3)"]),
    "stray quote": (f'u,5" nail,1\n{GOOD_ROWS}', ["2", "", 'u,5" nail,1', "misplaced quote"]),
    "quote that never closes": (f'"u,a,1\n{GOOD_ROWS}', ["2", "", '"u,a,1', "misplaced quote"]),
    "text after a closing quote": (f'"u"x,a,1\n{GOOD_ROWS}', ["2", "", '"u"x,a,1', "misplaced quote"]),
    "not UTF-8": (f"u,a,1\nm\udcfcller,b,2\n{GOOD_ROWS[6:]}u,a,4\n", ["3", "", "m\\xfcller,b,2", "not UTF-8"]),
    "empty user": (f",a,1\n{GOOD_ROWS}", ["2", "user_id", "", "empty id"]),
    "empty item": (f"u,,1\n{GOOD_ROWS}", ["2", "item_id", "", "empty id"]),
    "id with a blank": (f"u ,a,1\n{GOOD_ROWS}", ["2", "user_id", "u ", "id with outer whitespace"]),
    "id too long": (f"{LONG},a,1\n{GOOD_ROWS}", ["2", "user_id", LONG, "id too long"]),
    "empty timestamp": (f"u,a,\n{GOOD_ROWS}", ["2", "timestamp", "", "no timestamp"]),
    "NaN timestamp": (f"u,a,NaN\n{GOOD_ROWS}", ["2", "timestamp", "NaN", "timestamp not finite"]),
    "infinite timestamp": (f"u,a,-inf\n{GOOD_ROWS}", ["2", "timestamp", "-inf", "timestamp not finite"]),
    "unparsable timestamp": (f"u,a,soon\n{GOOD_ROWS}", ["2", "timestamp", "soon", "unreadable timestamp"]),
    "no such day": (f"u,a,2024-02-30\n{GOOD_ROWS}", ["2", "timestamp", "2024-02-30", "unreadable timestamp"]),
    "unknown item": (f"{GOOD_ROWS}u,nail,4\n", ["5", "item_id", "nail", "unknown item"]),
    "duplicate": (f"{GOOD_ROWS}u,b,2.0\n", ["5", "item_id", "b", "duplicate interaction (the same as line 3)"]),
    "user with one event": (f"{GOOD_ROWS}w,b,2\n", ["5", "user_id", "w", "one-event user"]),
}


def assert_refused_or_skipped(data_dir: Path, file: str, expected: list[str]) -> None:
    """Refused with file, line, column, value, rule and remedy; or skipped, listed and counted, and the rest kept."""
    row, column, value, reason = expected
    message = error_of(data_dir)
    assert message.startswith("1 bad row in ")
    where = f"{file}, {'row' if file.endswith('parquet') else 'line'} {row}{', ' + column if column else ''}"
    assert f"  {where}: {reason}: {value!r}\n" in message
    name = reason.split(" (")[0]
    assert f"  {name} (1): " in message
    assert "--skip-bad-rows" in message

    dataset, summary = run_stage(data_dir, skip_bad_rows=True)
    assert skipped_rows(data_dir) == [[file, row, column, value, reason]]
    assert summary.skipped_rows == {name: 1}
    assert dataset.num_users == 1


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_interaction_is_refused_or_skipped_and_listed(tmp_path, kind):
    rows, expected = BAD_ROWS[kind]
    data_dir = given_files(tmp_path, (HEADER + rows).encode(errors="surrogateescape"))
    assert_refused_or_skipped(data_dir, "interactions.csv", expected)


def test_an_unknown_event_type_is_refused_with_the_known_ones(tmp_path):
    rows = "user_id,item_id,timestamp,event_type\nu,a,1,click\nu,b,2,view\nu,c,3,like\n"
    data_dir = given_files(tmp_path, rows)
    assert "an event type is one of impression, click, purchase, like, dislike, hide" in error_of(data_dir)
    expected = ["3", "event_type", "view", "unknown event type"]
    assert_refused_or_skipped(data_dir, "interactions.csv", expected)


def test_an_impression_does_not_save_a_user_with_one_click(tmp_path):
    rows = "user_id,item_id,timestamp,event_type\nu,a,1,\nu,b,2,\nw,a,1,\nw,b,2,impression\n"
    assert_refused_or_skipped(given_files(tmp_path, rows), "interactions.csv", ["4", "user_id", "w", "one-event user"])


def test_parquet_rows_are_counted_from_zero(tmp_path):
    data_dir = given_files(tmp_path)
    (data_dir / "interactions.csv").unlink()
    columns = {"user_id": ["u"] * 3, "item_id": ["a", "b", "c"], "timestamp": [1.0, float("nan"), 3.0]}
    pl.DataFrame(columns).write_parquet(data_dir / "interactions.parquet")
    expected = ["1", "timestamp", "NaN", "timestamp not finite"]
    assert_refused_or_skipped(data_dir, "interactions.parquet", expected)


BAD_CSV_ITEMS = {
    "duplicate": ("b,Bun", ["5", "item_id", "b", "duplicate item (first in line 3)"]),
    "empty id": (",Bun", ["5", "item_id", "", "empty id"]),
    "id with a blank": (" d,Bun", ["5", "item_id", " d", "id with outer whitespace"]),
    "id too long": (f"{LONG},Bun", ["5", "item_id", LONG, "id too long (129 characters)"]),
    "comma in the title": ("d,Bun, sweet", ["5", "", "d,Bun, sweet", "wrong number of fields (3 instead of 2)"]),
    "stray quote": ('d,5" nail', ["5", "", 'd,5" nail', "misplaced quote"]),
}


@pytest.mark.parametrize("kind", BAD_CSV_ITEMS)
def test_a_bad_item_in_csv_is_refused_or_skipped_and_listed(tmp_path, kind):
    row, expected = BAD_CSV_ITEMS[kind]
    assert_refused_or_skipped(given_files(tmp_path, items=f"{ITEMS}{row}\ne,Egg\n"), "items.csv", expected)


BAD_JSON_ITEMS = {
    "malformed": ('{"item_id": ', "", '{"item_id":', "malformed JSON (Expecting value: line 1 column 13 (char 12))"),
    "NaN": ('{"x": NaN}', "", '{"x": NaN}', "malformed JSON (NaN is not a JSON value)"),
    "no object": ("[1]", "", "[1]", "malformed JSON (a list instead of an object)"),
    "not UTF-8": ('{"x": "\udcfc"}', "", '{"x": "\\xfc"}', "not UTF-8"),
    "no id": ('{"title": "D"}', "item_id", "", "empty id"),
    "id of a wrong type": ('{"item_id": 1.5, "title": "D"}', "item_id", "1.5", "id is not text"),
    "nested text": ('{"item_id": "d", "title": "D", "size": {"cm": 3}}', "size", "{'cm': 3}", "nested value"),
    "odd categories": (
        '{"item_id": "d", "title": "D", "categories": [1]}',
        "categories",
        "[1]",
        "malformed categories",
    ),
    "categories of a wrong type": (
        '{"item_id": "d", "title": "D", "categories": {"A": 1}}',
        "categories",
        "{'A': 1}",
        "malformed categories",
    ),
}


@pytest.mark.parametrize("kind", BAD_JSON_ITEMS)
def test_a_bad_item_in_jsonl_is_refused_or_skipped_and_listed(tmp_path, kind):
    line, *expected = BAD_JSON_ITEMS[kind]
    data_dir = given_files(tmp_path)
    (data_dir / "items.csv").unlink()
    lines = [*(json.dumps({"item_id": item, "title": item}) for item in "abc"), "", line]
    (data_dir / "items.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    assert_refused_or_skipped(data_dir, "items.jsonl", ["5", *expected])


def test_half_a_surrogate_pair_in_json_is_malformed(tmp_path):
    data_dir = given_files(tmp_path)
    (data_dir / "items.csv").unlink()
    (data_dir / "items.jsonl").write_text(
        '{"item_id": "a", "title": "\\ud83d"}\n{"item_id": "b", "title": "\\u00e9"}\n'
    )
    message = error_of(data_dir)
    assert "items.jsonl, line 1: malformed JSON" in message
    assert "items.jsonl, line 2" not in message


def test_jsonl_without_any_title_is_a_missing_column(tmp_path):
    data_dir = given_files(tmp_path)
    (data_dir / "items.csv").unlink()
    (data_dir / "items.jsonl").write_text('{"item_id": "a"}\n')
    assert "has no column 'title'" in error_of(data_dir, skip_bad_rows=True)


def test_lines_are_counted_as_an_editor_shows_them_across_quoted_line_ends(tmp_path):
    items = 'item_id,title\na,"Apple,\nred\n""Gala"""\n\nb,Bread\n,Cheese\nc,Cheese\n'
    expected = ["7", "item_id", "", "empty id"]
    data_dir = given_files(tmp_path, items=items)
    assert_refused_or_skipped(data_dir, "items.csv", expected)
    dataset = Dataset.load(data_dir / "run")
    assert dataset.titles[dataset.item_ids.index("a")] == 'Apple,\nred\n"Gala"'


def test_one_stray_quote_costs_one_line_however_many_there_are(tmp_path):
    rows = [f'u,a,{index}\nu,5" nail,0\n"u","b",{index}' for index in range(50)]
    dataset, summary = run_stage(given_files(tmp_path, HEADER + "\n".join(rows)), skip_bad_rows=True)
    assert summary.skipped_rows == {"misplaced quote": 50}
    assert len(dataset.sequences.items) == 100


def test_the_first_twenty_bad_rows_are_shown_and_all_are_counted(tmp_path):
    rows = [f"u,a,bad{row}" for row in range(30)]
    message = error_of(given_files(tmp_path, f"{INTERACTIONS}{chr(10).join(rows)}\n", ITEMS + ",Nameless\n"))
    assert message.startswith("31 bad rows in ")
    assert message.index("items.csv, line 5, item_id: empty id") < message.index("interactions.csv, line 5")
    assert "'bad18'" in message
    assert "'bad19'" not in message
    assert "… and 11 more" in message
    assert "unreadable timestamp (30): a timestamp is a number of seconds or an ISO-8601 time; write it as" in message


def test_what_follows_from_a_bad_row_is_not_reported_beside_it(tmp_path):
    """Once item c's row and the date are corrected, the interactions of c and the user w are in order."""
    rows = f"{GOOD_ROWS}w,a,1\nw,b,yesterday\n"
    data_dir = given_files(tmp_path, HEADER + rows)
    (data_dir / "items.csv").unlink()
    bad_item = {"item_id": "c", "title": ["nested"]}
    items = [{"item_id": "a", "title": "A"}, {"item_id": "b", "title": "B"}, bad_item]
    (data_dir / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    assert error_of(data_dir).startswith("2 bad rows")

    _, summary = run_stage(data_dir, skip_bad_rows=True)
    assert summary.skipped_rows == {
        "nested value": 1,
        "item was skipped": 1,
        "unreadable timestamp": 1,
        "one-event user": 1,
    }


@pytest.mark.parametrize("num_items", [254, 255, 256, 257])
def test_interactions_of_a_skipped_item_are_skipped_whatever_the_width_of_its_index(tmp_path, num_items):
    items = [json.dumps({"item_id": str(item), "title": "x"}) for item in range(num_items)]
    data_dir = given_files(tmp_path, f"{HEADER}u,0,1\nu,{num_items - 1},2\nu,bad,3\n")
    (data_dir / "items.csv").unlink()
    (data_dir / "items.jsonl").write_text("\n".join([*items, '{"item_id": "bad", "title": []}']))
    dataset, summary = run_stage(data_dir, skip_bad_rows=True)
    assert history_of(dataset, "u") == ["0", str(num_items - 1)]
    assert summary.skipped_rows == {"nested value": 1, "item was skipped": 1}
