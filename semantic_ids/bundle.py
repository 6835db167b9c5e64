"""The bundle: everything the service needs, in one immutable folder that checks itself.

    bundles/
      current                     the id of the bundle to serve; replaced atomically
      previous                    the id that was current before: what a rollback activates
      20261122T013000Z-0a1b2c…/   named by the digest of its manifest
        manifest.json             versions, SID space, prompt, text encoder, sha256 of every file
        catalog/ quantizer/ neighbours/ model/
        steps/                  where the model thinks in steps that learnt clusters: what their outputs mean

A bundle is staged under a hidden name, renamed when complete, loaded and tried, and only then made current: a reader
never sees half of one. Loading refuses a missing, changed or unlisted file, a foreign version, SID space or vocabulary,
and says which.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from semantic_ids.catalog import Catalog, CatalogError
from semantic_ids.codes import SidError, SidSpace, SidVocabulary
from semantic_ids.neighbours import Neighbours
from semantic_ids.prompt import PromptError, PromptRenderer, PromptSpec, TextTokenizer, make_renderer
from semantic_ids.quantizer import ResidualQuantizer
from semantic_ids.step_reader import StepReader
from semantic_ids.text_encoder import TextEncoderIdentity

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CURRENT = "current"
PREVIOUS = "previous"
TOKENIZER = "tokenizer.json"
"""Inside a bundle's `model/`, where prompts are text."""
_STEPS = "steps"
_STAGING = ".staging-"
_LOCK = ".publishing"
BUNDLE_ID = r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}"
"""The form of a bundle's id, a regular expression."""
_BUNDLE_ID = re.compile(BUNDLE_ID)


class BundleError(Exception):
    """A bundle that must not be served. The message names the file or version and what to do."""


class FileRecord(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    num_bytes: int


class Manifest(BaseModel):
    """The bundle's account of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    created_at: datetime
    num_levels: int
    codebook_size: int
    first_token_id: int
    vocab_size: int
    num_items: int
    prompt: PromptSpec
    text_encoder: TextEncoderIdentity
    config_hash: str
    """Of the resolved training configuration."""
    metrics: dict[str, float]
    """The evaluation that the bundle was published with."""
    files: dict[str, FileRecord]

    @property
    def space(self) -> SidSpace:
        """The SID space."""
        return SidSpace(self.num_levels, self.codebook_size)

    @property
    def vocabulary(self) -> SidVocabulary:
        """The SID space in the model's vocabulary."""
        return SidVocabulary(self.space, self.first_token_id, self.vocab_size)

    def to_bytes(self) -> bytes:
        """The one way to write this manifest down; loading accepts no other."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True).encode()

    @property
    def bundle_id(self) -> str:
        """Creation time and digest: the folder's name."""
        digest = hashlib.sha256(self.to_bytes()).hexdigest()[:12]
        return f"{self.created_at:%Y%m%dT%H%M%SZ}-{digest}"


@dataclass(frozen=True)
class BundleParts:
    """What training hands over for publication."""

    catalog: Catalog
    quantizer: ResidualQuantizer
    neighbours: Neighbours
    vocabulary: SidVocabulary
    prompt: PromptSpec
    text_encoder: TextEncoderIdentity
    model_folder: Path
    """A transformers checkpoint (config, safetensors, tokenizer files where the prompt is text)."""
    config_hash: str
    metrics: dict[str, float]
    step_reader: StepReader | None = None


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    path: Path
    manifest: Manifest
    catalog: Catalog
    quantizer: ResidualQuantizer
    neighbours: Neighbours
    renderer: PromptRenderer
    step_reader: StepReader | None = None
    """None where the model has no thinking steps, or steps whose outputs mean nothing."""

    @property
    def bundle_id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def catalog_id(self) -> str:
        """What pins a request to this catalogue at this epoch: ranks mean nothing in another one."""
        return f"{self.bundle_id}@{self.catalog.epoch}"

    @property
    def vocabulary(self) -> SidVocabulary:
        """The SID space in the model's vocabulary."""
        return self.manifest.vocabulary

    @property
    def model_folder(self) -> Path:
        """The transformers checkpoint."""
        return self.path / "model"

    @classmethod
    def load(cls, path: Path) -> "Bundle":
        """Verify every byte and map the columns; `BundleError` names the first thing that is wrong."""
        manifest = _read_manifest(path)
        _verify_files(path, manifest)
        try:
            vocabulary = manifest.vocabulary
            catalog = Catalog.load(path / "catalog", manifest.space)
            quantizer = ResidualQuantizer.load(path / "quantizer")
            neighbours = Neighbours.load(path / "neighbours")
            renderer = make_renderer(manifest.prompt, vocabulary, load_text_tokenizer(path / "model"))
            _verify_model_vocabulary(path, vocabulary)
            has_step_reader = any(name.startswith(f"{_STEPS}/") for name in manifest.files)
            step_reader = StepReader.load(path / _STEPS) if has_step_reader else None
        except (SidError, CatalogError, PromptError, OSError, ValueError) as error:
            raise BundleError(f"bundle {path.name}: {error}") from error
        if quantizer.space != manifest.space:
            raise BundleError(
                f"bundle {path.name}: its quantiser writes {quantizer.space}, its manifest says {manifest.space}"
            )
        if len(catalog) != manifest.num_items or len(neighbours.offsets) != manifest.num_items + 1:
            raise BundleError(
                f"bundle {path.name}: its tables do not hold the {manifest.num_items} items of its manifest"
            )
        if step_reader is not None:
            _verify_step_reader(path, step_reader, manifest, quantizer)
        return cls(path, manifest, catalog, quantizer, neighbours, renderer, step_reader)

    @classmethod
    def load_current(cls, root: Path) -> "Bundle":
        """The bundle that `current` names."""
        return cls.load(root / current_id(root))


def current_id(root: Path) -> str:
    """The id in `root/current`; `BundleError` when nothing is published or the pointer is not an id."""
    missing = f"no bundle is published in {root}: run `sidrec-train pipeline`, or name another folder"
    return _read_pointer(root, CURRENT, missing)


def previous_id(root: Path) -> str:
    """The id that was current before the last activation of another; `BundleError` when there was none."""
    return _read_pointer(root, PREVIOUS, "nothing was current before: name the bundle to activate")


def publish(root: Path, parts: BundleParts, try_out: Callable[[Bundle], None], *, activate_it: bool = True) -> Bundle:
    """Write, rename, reload, try, and make current. Whatever fails leaves `current` as it was, and no bundle behind.

    One publication at a time per folder; a second one waits for the first.
    """
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        return _publish(root, parts, try_out, activate_it=activate_it)


def _publish(root: Path, parts: BundleParts, try_out: Callable[[Bundle], None], *, activate_it: bool) -> Bundle:
    for left_behind in root.glob(f"{_STAGING}*"):  # a publication that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    staging = root / f"{_STAGING}{os.getpid()}"
    parts.catalog.save(staging / "catalog")
    parts.quantizer.save(staging / "quantizer")
    parts.neighbours.save(staging / "neighbours")
    if parts.step_reader is not None:
        parts.step_reader.save(staging / _STEPS)
    shutil.copytree(parts.model_folder, staging / "model")
    space = parts.vocabulary.space
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_at=datetime.now(UTC).replace(microsecond=0),
        num_levels=space.num_levels,
        codebook_size=space.codebook_size,
        first_token_id=parts.vocabulary.first_token_id,
        vocab_size=parts.vocabulary.vocab_size,
        num_items=len(parts.catalog),
        prompt=parts.prompt,
        text_encoder=parts.text_encoder,
        config_hash=parts.config_hash,
        metrics=parts.metrics,
        files={name: _record(staging / name) for name in _files(staging)},
    )
    (staging / MANIFEST).write_bytes(manifest.to_bytes())
    for name in [*_files(staging), "."]:
        _sync(staging / name)
    final = root / manifest.bundle_id
    if final.exists():  # the same content within the same second
        shutil.rmtree(staging)
        bundle = Bundle.load(final)
    else:
        staging.rename(final)
        _sync(root)
        try:
            bundle = Bundle.load(final)
            try_out(bundle)
        except BaseException:
            shutil.rmtree(final, ignore_errors=True)
            raise
    if activate_it:
        activate(root, bundle.bundle_id)
    return bundle


def activate(root: Path, bundle_id: str) -> None:
    """Point `current` at a bundle that loads; this is also the rollback."""
    if not _BUNDLE_ID.fullmatch(bundle_id):
        raise BundleError(f"{bundle_id!r} is not a bundle id: give the name of a bundle's folder in {root}")
    Bundle.load(root / bundle_id)
    with suppress(BundleError):
        if (before := current_id(root)) != bundle_id:
            _write_pointer(root, PREVIOUS, before)
    _write_pointer(root, CURRENT, bundle_id)
    _sync(root)


def _read_pointer(root: Path, name: str, missing: str) -> str:
    try:
        bundle_id = (root / name).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise BundleError(missing) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{root / name} cannot be read: {error}") from error
    if not _BUNDLE_ID.fullmatch(bundle_id):
        raise BundleError(f"{root / name} holds {bundle_id!r}, which is not a bundle id: activate a bundle anew")
    return bundle_id


def _write_pointer(root: Path, name: str, bundle_id: str) -> None:
    temporary = root / f".{name}.{os.getpid()}"
    temporary.write_text(bundle_id + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(root / name)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with (root / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, also when the process is killed
        yield


def _read_manifest(path: Path) -> Manifest:
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(f"bundle {path.name}: {MANIFEST} cannot be read ({error}): publish it again") from error
    try:
        version = json.loads(content)["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"bundle {path.name}: {MANIFEST} is damaged: publish it again or roll back") from error
    if version != FORMAT_VERSION:
        raise BundleError(
            f"bundle {path.name}: format version {version!r}; this build reads {FORMAT_VERSION}: use the matching build"
        )
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise BundleError(
            f"bundle {path.name}: {MANIFEST} is not a manifest ({error}): publish it again or roll back"
        ) from error
    if manifest.to_bytes() != content or manifest.bundle_id != path.name:
        raise BundleError(
            f"bundle {path.name}: {MANIFEST} was changed after publication, or its folder renamed: "
            "publish it again or roll back"
        )
    return manifest


def _verify_files(path: Path, manifest: Manifest) -> None:
    present = set(_files(path)) - {MANIFEST}
    if missing := sorted(set(manifest.files) - present):
        raise BundleError(f"bundle {path.name}: {missing[0]} is missing: publish it again or roll back")
    if unlisted := sorted(present - set(manifest.files)):
        raise BundleError(f"bundle {path.name}: {unlisted[0]} is not in its manifest: remove it or publish again")
    for name, record in manifest.files.items():
        try:
            found = _record(path / name)
        except OSError as error:
            raise BundleError(f"bundle {path.name}: {name} cannot be read ({error}): publish it again") from error
        if found != record:
            raise BundleError(
                f"bundle {path.name}: {name} was changed after publication: publish it again or roll back"
            )


def _verify_model_vocabulary(path: Path, vocabulary: SidVocabulary) -> None:
    config = json.loads((path / "model" / "config.json").read_text(encoding="utf-8"))
    if config.get("vocab_size") != vocabulary.vocab_size:
        raise BundleError(
            f"bundle {path.name}: its model has a vocabulary of {config.get('vocab_size')}, "
            f"its manifest says {vocabulary.vocab_size}"
        )


def _verify_step_reader(path: Path, reader: StepReader, manifest: Manifest, quantizer: ResidualQuantizer) -> None:
    hidden_size = json.loads((path / "model" / "config.json").read_text(encoding="utf-8")).get("hidden_size")
    num_levels, codebook_size, latent_width = quantizer.codebooks.shape
    fits = (num_levels, hidden_size, latent_width) == reader.projection.shape
    if not fits or reader.cluster_of_code.shape[1] != codebook_size or not any(manifest.prompt.steps):
        raise BundleError(
            f"bundle {path.name}: its {_STEPS} project {reader.projection.shape} to clusters of codes "
            f"{reader.cluster_of_code.shape}; its model has an output of {hidden_size}, its quantiser has codebooks "
            f"{quantizer.codebooks.shape}, its prompts have steps {list(manifest.prompt.steps)}"
        )


def load_text_tokenizer(model_folder: Path) -> TextTokenizer | None:
    """The tokenizer beside a checkpoint, or None where the model knows SID tokens only."""
    path = model_folder / TOKENIZER
    if not path.exists():
        return None
    from tokenizers import Tokenizer  # only bundles with text prompts need it

    try:
        return FileTokenizer(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises nothing narrower
        raise PromptError(f"{path.name} is not a tokenizer ({error})") from error


class FileTokenizer:
    """A `tokenizers.Tokenizer` as prompts want it."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, with special tokens and SIDs; bytes that are no whole character are U+FFFD."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, num_bytes=path.stat().st_size)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
