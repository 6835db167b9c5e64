"""Bundles: what is published comes back, whatever was touched is refused by name, readers never see half of one."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ids.bundle import (
    CURRENT,
    MANIFEST,
    TOKENIZER,
    Bundle,
    BundleError,
    BundleParts,
    activate,
    current_id,
    publish,
)
from semantic_ids.codes import SidSpace
from semantic_ids.prompt import THINKING_VERSION, CompactPrompt, ThinkingChatPrompt
from tests.semantic_ids.factories import (
    VOCAB_SIZE,
    bundle_parts,
    history_of,
    random_catalog,
    random_mlp_quantizer,
    random_quantizer,
    vocabulary,
)
from tests.semantic_ids.test_prompt import CHAT_VOCABULARY, THINKING
from tests.semantic_ids.test_prompt import TOKENIZER as TINY_TOKENIZER


def no_trial(_bundle: Bundle) -> None:
    """Publication without a first request."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "bundles"


@pytest.fixture
def bundle(root: Path, parts: BundleParts) -> Bundle:
    """A published bundle that the test may damage."""
    return publish(root, parts, no_trial)


@pytest.fixture(scope="module")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A published bundle that every test leaves as it was."""
    folder = tmp_path_factory.mktemp("shared")
    return publish(folder / "bundles", bundle_parts(folder), no_trial)


class Damage:
    """One file of a bundle, put back after each damage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = path.read_bytes()

    @contextmanager
    def writing(self, content: bytes) -> Iterator[None]:
        self._overwrite(content)
        try:
            yield
        finally:
            self._overwrite(self.content)

    def flipped(self, place: int, mask: int) -> bytes:
        content = bytearray(self.content)
        content[place] ^= mask
        return bytes(content)

    def _overwrite(self, content: bytes) -> None:
        with self.path.open("r+b") as file:  # several times faster than a new file, and there are thousands of them
            file.write(content)
            file.truncate()


def file_names(bundle: Bundle) -> list[str]:
    return sorted(path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file())


def visible_bundles(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]


def staging_folders(root: Path) -> list[Path]:
    return list(root.glob(".staging-*"))


def test_a_published_bundle_is_current_and_comes_back_whole(root: Path, parts: BundleParts):
    published = publish(root, parts, no_trial)
    loaded = Bundle.load_current(root)
    assert loaded.bundle_id == published.bundle_id == current_id(root) == loaded.manifest.bundle_id
    manifest = loaded.manifest
    assert (manifest.num_levels, manifest.codebook_size, manifest.num_items) == (3, 8, 40)
    assert (manifest.prompt, manifest.text_encoder) == (parts.prompt, parts.text_encoder)
    assert (manifest.config_hash, manifest.metrics) == (parts.config_hash, parts.metrics)
    assert loaded.vocabulary == parts.vocabulary
    assert list(loaded.catalog.item_ids) == list(parts.catalog.item_ids)
    assert np.array_equal(loaded.catalog.codes, parts.catalog.codes)
    vectors = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    assert np.array_equal(loaded.quantizer.encode(vectors), parts.quantizer.encode(vectors))
    history = np.arange(5)
    assert np.array_equal(loaded.neighbours.of_history(history), parts.neighbours.of_history(history))
    assert isinstance(loaded.renderer, CompactPrompt)
    assert loaded.renderer.render(history_of([[0, 0, 0]])).token_ids.tolist() == [1, 16, 24, 32]
    assert (loaded.model_folder / "model.safetensors").read_bytes() == bytes(range(64))


def test_a_bundle_that_thinks_comes_back_with_its_tokenizer(root: Path, tmp_path: Path):
    parts = bundle_parts(tmp_path, prompt_version=THINKING_VERSION, model_vocab_size=CHAT_VOCABULARY.vocab_size)
    TINY_TOKENIZER.save(str(parts.model_folder / TOKENIZER))
    publish(root, replace(parts, vocabulary=CHAT_VOCABULARY), no_trial)
    renderer = Bundle.load_current(root).renderer
    assert isinstance(renderer, ThinkingChatPrompt)
    assert renderer.thinking == THINKING.thinking
    history = history_of([[0, 1, 2]])
    thought = renderer.render(history, thinking=True).token_ids.tolist()
    assert thought == THINKING.render(history, thinking=True).token_ids.tolist()
    assert renderer.thought_text(thought) == TINY_TOKENIZER.decode(thought, skip_special_tokens=False)


def test_the_manifest_names_every_other_file(bundle: Bundle):
    assert file_names(bundle) == sorted([*bundle.manifest.files, MANIFEST])
    assert {name.split("/")[0] for name in bundle.manifest.files} == {"catalog", "quantizer", "neighbours", "model"}


def test_publishing_the_same_twice_leaves_whole_bundles_and_no_staging(root: Path, parts: BundleParts):
    for _ in range(2):
        publish(root, parts, no_trial)
    assert staging_folders(root) == []
    assert all(Bundle.load(path) for path in visible_bundles(root))


def test_a_metric_that_is_not_a_number_survives(root: Path, parts: BundleParts):
    bundle = publish(root, replace(parts, metrics={"ndcg@10": float("nan")}), no_trial)
    assert np.isnan(Bundle.load(bundle.path).manifest.metrics["ndcg@10"])


def test_nothing_published_says_how_to_publish(tmp_path: Path):
    with pytest.raises(BundleError, match="run `sidrec-train pipeline`"):
        Bundle.load_current(tmp_path)


@settings(max_examples=25)
@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_in_any_file_is_refused_by_its_name(shared_bundle: Bundle, where: float, mask: int):
    for name in shared_bundle.manifest.files:
        file = Damage(shared_bundle.path / name)
        flipped = file.flipped(int(where * len(file.content)), mask)
        with file.writing(flipped), pytest.raises(BundleError, match=f"{name} was changed"):
            Bundle.load(shared_bundle.path)
    assert Bundle.load(shared_bundle.path)


def test_a_flip_of_every_single_byte_of_the_manifest_is_refused(shared_bundle: Bundle):
    file = Damage(shared_bundle.path / MANIFEST)
    for place in range(len(file.content)):
        flipped = file.flipped(place, 1 << place % 8)  # each bit in turn
        with file.writing(flipped), pytest.raises(BundleError, match=r"manifest\.json|format version"):
            Bundle.load(shared_bundle.path)


@settings(max_examples=100)
@given(place=st.integers(0, 10_000), mask=st.integers(1, 255))
def test_any_flip_in_the_manifest_is_refused(shared_bundle: Bundle, place: int, mask: int):
    file = Damage(shared_bundle.path / MANIFEST)
    flipped = file.flipped(place % len(file.content), mask)
    with file.writing(flipped), pytest.raises(BundleError, match=r"manifest\.json|format version"):
        Bundle.load(shared_bundle.path)


@settings(max_examples=10)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_by_its_name(shared_bundle: Bundle, share: float):
    for name in file_names(shared_bundle):
        file = Damage(shared_bundle.path / name)
        cut = file.content[: int(share * len(file.content))]
        with file.writing(cut), pytest.raises(BundleError, match=name):
            Bundle.load(shared_bundle.path)


def test_a_longer_file_is_refused_by_its_name(shared_bundle: Bundle):
    for name in file_names(shared_bundle):
        file = Damage(shared_bundle.path / name)
        with file.writing(file.content + b"\n"), pytest.raises(BundleError, match=name):
            Bundle.load(shared_bundle.path)


def test_a_missing_file_is_refused_by_its_name(shared_bundle: Bundle):
    for name in file_names(shared_bundle):
        path = shared_bundle.path / name
        away = path.rename(shared_bundle.path.parent / "away")
        with pytest.raises(BundleError, match=f"{name} (is missing|cannot be read)"):
            Bundle.load(shared_bundle.path)
        away.rename(path)


@pytest.mark.parametrize("name", ["notes.txt", "catalog/more.npy", "model/manifest.json", ".hidden"])
def test_a_file_beyond_the_manifest_is_refused_by_its_name(bundle: Bundle, name: str):
    (bundle.path / name).write_text("surprise", encoding="utf-8")
    with pytest.raises(BundleError, match=f"{name} is not in its manifest"):
        Bundle.load(bundle.path)


def test_a_file_that_cannot_be_read_is_refused_by_its_name(bundle: Bundle):
    path = bundle.path / "catalog" / "codes.npy"
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(BundleError, match=r"catalog/codes\.npy cannot be read"):
        Bundle.load(bundle.path)


def test_two_files_that_changed_places_are_refused(bundle: Bundle):
    one, other = (bundle.path / "quantizer" / f"{name}.npy" for name in ("mean", "scale"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(BundleError, match=r"quantizer/(mean|scale)\.npy was changed"):
        Bundle.load(bundle.path)


def test_a_quantiser_with_an_mlp_comes_back_whole(root: Path, parts: BundleParts):
    quantizer = random_mlp_quantizer()
    loaded = publish(root, replace(parts, quantizer=quantizer), no_trial)
    names = [f"quantizer/{name}.{layer}.npy" for name in ("bias", "weight") for layer in range(2)]
    assert set(names) < set(loaded.manifest.files)
    vectors = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    assert np.array_equal(loaded.quantizer.latents(vectors), quantizer.latents(vectors))
    taken = loaded.catalog.trie
    assert np.array_equal(loaded.quantizer.assign_new(vectors[:20], taken), quantizer.assign_new(vectors[:20], taken))


def test_one_changed_weight_is_refused_by_its_file(root: Path, parts: BundleParts):
    path = publish(root, replace(parts, quantizer=random_mlp_quantizer()), no_trial).path
    weight = np.load(path / "quantizer" / "weight.1.npy")
    weight[2, 3] += 1
    np.save(path / "quantizer" / "weight.1.npy", weight)
    with pytest.raises(BundleError, match=r"quantizer/weight\.1\.npy was changed after publication"):
        Bundle.load(path)


def test_a_quantiser_whose_layers_do_not_fit_is_refused(root: Path, parts: BundleParts):
    """Every file is as its manifest says: what is wrong was wrong when it was published."""
    quantizer = random_mlp_quantizer(widths=(4, 6, 3))
    before = publish(root, parts, no_trial).bundle_id
    object.__setattr__(quantizer, "layers", quantizer.layers[:1])  # past its own check
    with pytest.raises(BundleError, match=r"codebooks has shape \(3, 8, 3\), not \(any, any, 6\)"):
        publish(root, replace(parts, quantizer=quantizer), no_trial)
    assert current_id(root) == before
    assert visible_bundles(root) == [root / before]


def test_a_renamed_folder_is_refused(bundle: Bundle):
    renamed = bundle.path.rename(bundle.path.with_name("20200101T000000Z-0123456789ab"))
    with pytest.raises(BundleError, match="its folder renamed"):
        Bundle.load(renamed)


def test_a_manifest_that_was_edited_by_hand_is_refused(bundle: Bundle):
    manifest = json.loads((bundle.path / MANIFEST).read_bytes())
    manifest["metrics"]["recall@10"] = 0.99
    (bundle.path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    with pytest.raises(BundleError, match="changed after publication"):
        Bundle.load(bundle.path)


@pytest.mark.parametrize("content", ["", "[]", '"text"', "{}", "null", '{"format_version": 1}', "\x00\x00"])
def test_what_is_not_a_manifest_is_refused(bundle: Bundle, content: str):
    (bundle.path / MANIFEST).write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=r"manifest\.json is (damaged|not a manifest)"):
        Bundle.load(bundle.path)


def test_another_format_version_is_refused_before_anything_else_is_read(bundle: Bundle):
    (bundle.path / MANIFEST).write_text(json.dumps({"format_version": 2, "news": True}), encoding="utf-8")
    with pytest.raises(BundleError, match="format version 2; this build reads 1"):
        Bundle.load(bundle.path)


def refused(tmp_path: Path, parts: BundleParts, reason: str) -> None:
    root = tmp_path / "bundles"
    before = publish(root, bundle_parts(tmp_path / "before"), no_trial).bundle_id
    with pytest.raises(BundleError, match=reason):
        publish(root, parts, no_trial)
    assert current_id(root) == before


def test_an_unknown_prompt_version_is_refused(tmp_path: Path):
    refused(tmp_path, bundle_parts(tmp_path, prompt_version=99), "no renderer for prompt version 99")


def test_a_chat_prompt_without_its_tokenizer_is_refused(tmp_path: Path):
    refused(tmp_path, bundle_parts(tmp_path, prompt_version=2), "the bundle carries none")


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path):
    reason = f"its model has a vocabulary of 999, its manifest says {VOCAB_SIZE}"
    refused(tmp_path, bundle_parts(tmp_path, model_vocab_size=999), reason)


@pytest.mark.parametrize("config", [None, "not json", "{}"])
def test_a_model_without_a_readable_config_is_refused(tmp_path: Path, config: str | None):
    parts = bundle_parts(tmp_path)
    path = parts.model_folder / "config.json"
    path.unlink()
    if config is not None:
        path.write_text(config, encoding="utf-8")
    refused(tmp_path, parts, "^bundle ")


@pytest.mark.parametrize("space", [SidSpace(2, 8), SidSpace(3, 4), SidSpace(4, 8)])
def test_a_quantiser_of_another_sid_space_is_refused(tmp_path: Path, space: SidSpace):
    refused(tmp_path, replace(bundle_parts(tmp_path), quantizer=random_quantizer(space)), "its quantiser writes")


@pytest.mark.parametrize("space", [SidSpace(2, 8), SidSpace(4, 8), SidSpace(3, 16)])
def test_a_catalogue_of_another_sid_space_is_refused(tmp_path: Path, space: SidSpace):
    refused(tmp_path, replace(bundle_parts(tmp_path), catalog=random_catalog(space)), "catalogue in")


def test_a_vocabulary_of_another_sid_space_is_refused(tmp_path: Path):
    refused(tmp_path, replace(bundle_parts(tmp_path), vocabulary=vocabulary(SidSpace(3, 9))), "its quantiser writes")


def test_tables_of_another_number_of_items_are_refused(tmp_path: Path):
    refused(tmp_path, bundle_parts(tmp_path, num_neighbours=39), "do not hold the 40 items")


def test_a_bundle_that_fails_its_trial_does_not_become_current(root: Path, bundle: Bundle, tmp_path: Path):
    def fails(_bundle: Bundle) -> None:
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        publish(root, bundle_parts(tmp_path / "next", metrics={"recall@10": 0.5}), fails)
    assert current_id(root) == bundle.bundle_id
    assert Bundle.load_current(root).bundle_id == bundle.bundle_id
    assert staging_folders(root) == []


def test_the_trial_gets_the_reloaded_bundle_before_it_is_current(root: Path, parts: BundleParts):
    seen: list[tuple[bool, bool]] = []

    def trial(bundle: Bundle) -> None:
        seen.append(((root / CURRENT).exists(), (root / bundle.bundle_id / MANIFEST).exists()))

    publish(root, parts, trial)
    assert seen == [(False, True)]


def test_a_publication_that_breaks_off_leaves_current_and_the_next_one_tidies_up(root: Path, parts: BundleParts):
    first = publish(root, parts, no_trial)
    broken = replace(parts, model_folder=parts.model_folder / "missing", metrics={"recall@10": 0.5})
    with pytest.raises(FileNotFoundError):
        publish(root, broken, no_trial)
    assert current_id(root) == first.bundle_id
    assert visible_bundles(root) == [first.path]
    (root / ".staging-99999" / "catalog").mkdir(parents=True)  # and one of a process that was killed
    second = publish(root, replace(parts, metrics={"recall@10": 0.75}), no_trial)
    assert staging_folders(root) == []
    assert current_id(root) == second.bundle_id != first.bundle_id


def test_publishing_without_activating_leaves_current(root: Path, bundle: Bundle, parts: BundleParts):
    other = publish(root, replace(parts, config_hash="another"), no_trial, activate_it=False)
    assert current_id(root) == bundle.bundle_id != other.bundle_id
    assert Bundle.load(other.path)


def test_a_reader_never_sees_half_a_bundle_while_others_are_published(root: Path, parts: BundleParts):
    first = publish(root, parts, no_trial)
    done, failures, loaded = threading.Event(), list[BaseException](), set[str]()

    def read() -> None:
        while not done.is_set():
            try:
                loaded.add(Bundle.load_current(root).bundle_id)
                for path in visible_bundles(root):
                    Bundle.load(path)
            except BaseException as error:  # noqa: BLE001, RUF100 - whatever it is, the test reports it
                failures.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    published = [first.bundle_id]
    try:
        for number in range(12):
            publishing = replace(parts, metrics={"recall@10": number / 100})
            published.append(publish(root, publishing, no_trial).bundle_id)
    finally:
        done.set()
        reader.join()
    assert failures == []
    assert len(set(published)) == len(published)
    assert len(loaded) > 1
    assert loaded <= set(published)


def test_rolling_back_is_activating_the_older_one(root: Path, bundle: Bundle, parts: BundleParts):
    newer = publish(root, replace(parts, config_hash="newer"), no_trial)
    assert current_id(root) == newer.bundle_id
    activate(root, bundle.bundle_id)
    assert Bundle.load_current(root).bundle_id == bundle.bundle_id


def test_a_damaged_bundle_cannot_be_activated(root: Path, bundle: Bundle, parts: BundleParts):
    other = publish(root, replace(parts, config_hash="other"), no_trial, activate_it=False)
    shutil.rmtree(other.path / "neighbours")
    with pytest.raises(BundleError, match=r"neighbours/.* is missing"):
        activate(root, other.bundle_id)
    assert current_id(root) == bundle.bundle_id


@pytest.mark.parametrize("written", ["{id}/", "./{id}", "../bundles/{id}", "", ".", "..", "nothing", "\0"])
def test_only_an_id_can_be_activated(root: Path, bundle: Bundle, written: str):
    with pytest.raises(BundleError, match="is not a bundle id"):
        activate(root, written.format(id=bundle.bundle_id))
    assert current_id(root) == bundle.bundle_id


def test_an_id_without_a_bundle_cannot_be_activated(root: Path, bundle: Bundle):
    with pytest.raises(BundleError, match=r"20200101T000000Z-0123456789ab: manifest\.json cannot be read"):
        activate(root, "20200101T000000Z-0123456789ab")
    assert current_id(root) == bundle.bundle_id


@pytest.mark.parametrize(
    "garbage", [b"", b"\n", b".", b"..", b"../elsewhere", b"/etc", b"a\0b", b"\xff\xfe", b".staging-1", b"x" * 5000]
)
def test_a_pointer_that_holds_garbage_is_refused(root: Path, bundle: Bundle, garbage: bytes):
    (root / CURRENT).write_bytes(garbage)
    with pytest.raises(BundleError, match=CURRENT):
        Bundle.load_current(root)
    activate(root, bundle.bundle_id)  # the remedy
    assert current_id(root) == bundle.bundle_id


def test_a_pointer_to_a_bundle_that_was_removed_is_refused(root: Path, bundle: Bundle):
    shutil.rmtree(bundle.path)
    with pytest.raises(BundleError, match=f"{bundle.bundle_id}: manifest.json cannot be read"):
        Bundle.load_current(root)
