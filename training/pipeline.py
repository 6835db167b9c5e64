"""All stages in order, from one configuration. Each stage runs only if what it would make is not already there.

    data → vectors → collaborative → tokenizer → sft → evaluate → publish

A stage's fingerprint covers its own configuration and the stages before it, so a changed setting redoes that stage and
those that depend on it, and nothing else.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import ValidationError

from semantic_ids.bundle import BundleParts
from training import collaborative, evaluation, interactions, item_vectors, publish, sft
from training.collaborative import CollaborativeConfig
from training.distillation import leave_one_out_knn, sample_continuations
from training.evaluation import EvaluationConfig
from training.examples import TargetSplit
from training.generator import TrainedModel
from training.interactions import DataConfig, Dataset
from training.item_memory import KnownItems
from training.item_vectors import VectorsConfig
from training.learner import Teaching
from training.processes import Processes
from training.publish import PublishConfig
from training.sequences import Sequences
from training.sft_config import SftConfig
from training.stage import StageConfig, StageError, StageFolder, Summary, write_atomically
from training.text_similarity import TextSimilarity
from training.tokenizer import stage as tokenizer
from training.tokenizer.config import TokenizerConfig
from training.tokenizer.stage import TokenizedCatalog

StageName = Literal["data", "vectors", "collaborative", "tokenizer", "sft", "evaluate", "publish"]
STAGES: tuple[StageName, ...] = ("data", "vectors", "collaborative", "tokenizer", "sft", "evaluate", "publish")

CONFIGS = Path(__file__).parent / "configs"
RESOLVED_CONFIG = "config.yaml"
"""In a run folder: every setting of its last run, and so the configuration of the next."""


class PipelineConfig(StageConfig):
    """One section per stage."""

    data: DataConfig = DataConfig()
    vectors: VectorsConfig = VectorsConfig()
    collaborative: CollaborativeConfig = CollaborativeConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    sft: SftConfig = SftConfig()
    evaluate: EvaluationConfig = EvaluationConfig()
    publish: PublishConfig = PublishConfig()

    @property
    def content_hash(self) -> str:
        """Of the resolved configuration; written into the bundle."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


def load_config(name: str, overrides: dict[str, str]) -> PipelineConfig:
    """A packaged configuration by name, or a YAML file, with `section.key` overrides on top.

    Precedence: override, file, default. An unknown key, or a value of the wrong kind, is a `StageError`.
    """
    path = CONFIGS / f"{name}.yaml" if (CONFIGS / f"{name}.yaml").exists() else Path(name)
    try:
        read: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        packaged = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise StageError(f"no configuration {name!r} ({error}): name one of {packaged}, or a YAML file") from error
    if not isinstance(read, dict):
        raise StageError(f"configuration {name!r} is not a mapping of stages to their settings, but {read!r}")
    content: dict[str, Any] = {section: {} if found is None else found for section, found in read.items()}
    for key, text in overrides.items():
        section, _, field = key.partition(".")
        if section not in STAGES or not field:
            raise StageError(f"override {key!r}: write stage.key=value, with a stage of {', '.join(STAGES)}")
        try:
            content.setdefault(section, {})[field] = yaml.safe_load(text)
        except (yaml.YAMLError, TypeError, AttributeError) as error:
            raise StageError(f"override {key}={text!r} is not a value: {error}") from error
    try:
        return PipelineConfig.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise StageError(f"configuration {name!r}: {problems}") from error


def parse_overrides(texts: list[str]) -> dict[str, str]:
    """`section.key=value` texts, as the command line has them, for `load_config`."""
    overrides: dict[str, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise StageError(f"{text!r} is not KEY=VALUE, such as sft.max_epochs=5")
        overrides[key] = value
    return overrides


class Pipeline:
    """The stages of one run folder; `run(until)` brings it up to a stage."""

    def __init__(self, config: PipelineConfig, data_dir: Path, out: Path) -> None:
        self.config = config
        self._data_dir = data_dir
        self._out = out
        self._fingerprints: dict[StageName, str] = {}
        self._summaries: dict[StageName, Summary] = {}

    def run(self, until: StageName = "publish") -> dict[StageName, Summary]:
        """Run what is missing, up to and with `until` and only what it needs; the summaries, old or new."""
        needed = self._with_upstream(until)
        if "evaluate" in needed and self.config.evaluate.split == "cold" and not self.config.data.cold_share:
            raise StageError("evaluate.split=cold has nobody to evaluate with data.cold_share=0: set it, as to 0.05")
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StageError(f"the run folder {self._out} cannot be made ({error.strerror}): give another") from error
        resolved = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        write_atomically(self._out / RESOLVED_CONFIG, resolved.encode())
        for name in STAGES:
            if name in needed:
                self._summaries[name] = self._run_stage(name)
        return {name: self._summaries[name] for name in STAGES if name in needed}

    def _run_stage(self, name: StageName) -> Summary:
        stage, processes = _STAGES[name], Processes.launched()
        upstream: dict[str, str] = {before: self._fingerprints[before] for before in self._upstream(name)}
        with processes.main_first():
            folder = StageFolder(
                self._out / name,
                getattr(self.config, name),
                upstream or {"input": interactions.fingerprint_of(self._data_dir)},
            )
            self._fingerprints[name] = folder.fingerprint
            if (finished := folder.finished()) is not None:
                summary = stage.summary.model_validate(finished)
                if stage.still_holds(self, summary):
                    return summary
            if not stage.is_shared:
                return stage.make(self, folder)
        return stage.make(self, folder)

    def _upstream(self, name: StageName) -> tuple[StageName, ...]:
        if name == "tokenizer" and self.config.tokenizer.objectives().needs_collaborative:
            return (*_STAGES[name].upstream, "collaborative")
        if name == "sft" and self.config.sft.learns_from_more:
            return (*_STAGES[name].upstream, "vectors", "collaborative")
        if name == "evaluate" and self.config.evaluate.split == "cold":
            return (*_STAGES[name].upstream, "vectors")
        return _STAGES[name].upstream

    def _with_upstream(self, name: StageName) -> set[StageName]:
        return {name}.union(*(self._with_upstream(before) for before in self._upstream(name)))

    # What later stages read of earlier ones; each is loaded once, when first needed.

    @cached_property
    def _dataset(self) -> Dataset:
        return Dataset.load(self._out / "data")

    @cached_property
    def _train(self) -> Sequences:
        return self._dataset.train()

    @cached_property
    def _tokenized(self) -> TokenizedCatalog:
        return TokenizedCatalog.load(self._out / "tokenizer", self._dataset)

    @cached_property
    def _model(self) -> TrainedModel:
        return TrainedModel.load(self._out / "sft", self._tokenized.catalog)

    @cached_property
    def _baselines(self) -> evaluation.Baselines:
        return evaluation.Baselines.load(self._out / "collaborative")

    # The stages.

    def make_data(self, folder: StageFolder) -> Summary:
        """Validated, split interactions and items."""
        return interactions.run(self.config.data, self._data_dir, folder)

    def make_vectors(self, folder: StageFolder) -> Summary:
        """Text vectors of the items."""
        return item_vectors.run(self.config.vectors, self._dataset, folder)

    def make_collaborative(self, folder: StageFolder) -> Summary:
        """Baselines and collaborative vectors, from training interactions."""
        validation = self._dataset.evaluation("validation")
        return collaborative.run(self.config.collaborative, self._train, validation, self._dataset.num_items, folder)

    def make_tokenizer(self, folder: StageFolder) -> Summary:
        """SIDs, quantiser and catalogue."""
        vectors, _ = item_vectors.load_vectors(self._out / "vectors")
        inputs = tokenizer.Inputs(
            dataset=self._dataset,
            train=self._train,
            vectors=vectors,
            collaborative=lambda: np.load(self._out / "collaborative" / collaborative.ITEM_VECTORS_FILE),
        )
        return tokenizer.run(self.config.tokenizer, inputs, folder)

    def make_sft(self, folder: StageFolder) -> Summary:
        """The language model."""
        held_out = self._dataset.evaluation("validation")
        to_ranks, rank_of_item = self._tokenized.to_ranks, self._tokenized.rank_of_item
        validation = TargetSplit(to_ranks(held_out.histories), rank_of_item[held_out.targets])
        teaching = self._teaching(to_ranks(self._train))
        catalog = self._tokenized.catalog_without(self._dataset.cold_items)
        return sft.run(self.config.sft, catalog, to_ranks(self._train), validation, folder, teaching)

    def _teaching(self, train: Sequences) -> Teaching:
        """What the settings want learnt beside the sequences `train`, which are catalogue ranks."""
        config, path = self.config.sft, self._out / "collaborative"
        known = lists = continuations = None
        if config.item_memory:
            text, _ = item_vectors.load_vectors(self._out / "vectors")
            learnt = np.load(path / collaborative.ITEM_VECTORS_FILE)
            learnt[self._dataset.cold_items] = 0  # as wrong answers they have a vector too
            of_items = KnownItems.of(text, learnt)
            known = of_items.select(np.argsort(self._tokenized.rank_of_item))
        if config.distillation:
            lists = leave_one_out_knn(train, self._dataset.num_items, self.config.collaborative)
        if config.continuations:
            sasrec = collaborative.load_sasrec(path / collaborative.SASREC_FILE)
            sasrec.never_next = self._dataset.cold_items
            continuations = sample_continuations(
                self._train,
                sasrec,
                self._baselines.item_knn,
                count=config.continuations,
                max_events=config.max_history + 1,
                seed=config.seed,
            ).renamed(self._tokenized.rank_of_item)
        codebooks = self._tokenized.quantizer.codebooks if config.step_clusters else None
        return Teaching(known, lists, continuations, codebooks)

    def make_evaluate(self, folder: StageFolder) -> Summary:
        """Metrics beside the baselines'."""
        ranker = evaluation.GenerativeRanker(self._model, self._tokenized.catalog)
        split = self._dataset.evaluation(self.config.evaluate.split)
        baselines = self._baselines
        if self.config.evaluate.split == "cold":
            text, _ = item_vectors.load_vectors(self._out / "vectors")
            baselines = replace(baselines, text=TextSimilarity(text))
        return evaluation.run(self.config.evaluate, ranker, baselines, split, self._tokenized, folder)

    def make_publish(self, folder: StageFolder) -> Summary:
        """The bundle."""
        _, text_encoder = item_vectors.load_vectors(self._out / "vectors")
        evaluated = self._summaries["evaluate"].model_dump(by_alias=True)
        parts = BundleParts(
            catalog=self._tokenized.catalog,
            quantizer=self._tokenized.quantizer,
            neighbours=publish.neighbours_by_rank(self._baselines.item_knn, self._tokenized),
            vocabulary=self._model.vocabulary,
            prompt=self._model.renderer.spec,
            text_encoder=text_encoder,
            model_folder=self._model.folder,
            config_hash=self.config.content_hash,
            metrics={name: evaluated[name] for name in ("recall@10", "ndcg@10", "target_log_likelihood")},
            step_reader=self._model.step_reader,
        )
        return publish.run(self.config.publish, parts, self._dataset, self._bundles, folder)

    @property
    def _bundles(self) -> Path:
        return self._out / "bundles"

    def is_published(self, summary: Summary) -> bool:
        """Whether a finished publication's bundle is still there: bundles may be removed by hand."""
        config = self.config.publish
        return isinstance(summary, publish.PublishSummary) and publish.is_still_there(config, summary, self._bundles)


@dataclass(frozen=True)
class _Stage:
    upstream: tuple[StageName, ...]
    summary: type[Summary]
    make: Callable[[Pipeline, StageFolder], Summary]
    is_shared: bool = False  # whether the processes of a launch make it together; else the first makes it for all
    still_holds: Callable[[Pipeline, Summary], bool] = lambda _pipeline, _summary: True


_STAGES: dict[StageName, _Stage] = {
    "data": _Stage((), interactions.DataSummary, Pipeline.make_data),
    "vectors": _Stage(("data",), item_vectors.VectorsSummary, Pipeline.make_vectors),
    "collaborative": _Stage(("data",), collaborative.CollaborativeSummary, Pipeline.make_collaborative),
    "tokenizer": _Stage(("data", "vectors"), tokenizer.TokenizerSummary, Pipeline.make_tokenizer, is_shared=True),
    "sft": _Stage(("data", "tokenizer"), sft.SftSummary, Pipeline.make_sft, is_shared=True),
    "evaluate": _Stage(("sft", "collaborative"), evaluation.EvaluationSummary, Pipeline.make_evaluate),
    "publish": _Stage(("evaluate",), publish.PublishSummary, Pipeline.make_publish, still_holds=Pipeline.is_published),
}


def _describe(problem: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: Any = PipelineConfig.model_fields.get(str(problem["loc"][0]))
        known = ", ".join(section.annotation.model_fields) if section else ", ".join(STAGES)
        return f"unknown key {key} (known: {known})"
    return f"{key}={problem['input']!r}: {problem['msg']}"
