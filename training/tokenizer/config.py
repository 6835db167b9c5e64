"""The tokenizer stage's settings."""

import hashlib
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from training.stage import THREADS, StageConfig, StageError
from training.tokenizer.assignment import SMALLEST_EPSILON
from training.tokenizer.methods import (
    DEFAULT_NUM_LEVELS,
    NUM_LEVELS,
    CodebookUpdate,
    Initialisation,
    Method,
    Objectives,
    Repair,
    Similarity,
    objectives_of,
)

BY_METHOD = "; absent: as the method has it"


class TokenizerConfig(StageConfig):
    """How SIDs are made: a method, and what to change in it."""

    method: Method = Field("gr2", description="a row of the switches below; see docs/tokenizers.md")
    num_levels: int | None = Field(
        None, ge=1, le=8, description=f"codes in a SID (L); absent: {DEFAULT_NUM_LEVELS}, or what the method has"
    )
    codebook_size: int | None = Field(
        None, ge=2, le=65_536, description="codes per level (K); by catalogue size if absent"
    )
    sids: str | None = Field(None, description="JSON or Parquet file of SIDs, for the method imported")

    codebook_update: CodebookUpdate | None = Field(None, description="by gradient, or moving averages" + BY_METHOD)
    initialisation: Initialisation | None = Field(None, description="of the codebooks on residuals" + BY_METHOD)
    sinkhorn_last_level: bool | None = Field(None, description="balanced last codes while training" + BY_METHOD)
    collaborative_weight: float | None = Field(None, ge=0, description="of alignment to SASRec's vectors" + BY_METHOD)
    collaborative_similarity: Similarity | None = Field(None, description="dot as published, or cosine" + BY_METHOD)
    collaborative_permuted: bool | None = Field(None, description="control: another item's SASRec vector" + BY_METHOD)
    diversity_weight: float | None = Field(None, ge=0, description="of the codes' diversity loss" + BY_METHOD)
    cointeraction_weight: float | None = Field(None, ge=0, description="of InfoNCE on co-interacted items" + BY_METHOD)
    graph: bool | None = Field(None, description="mix vectors along co-occurrence" + BY_METHOD)
    uniformity_weight: float | None = Field(None, ge=0, description="of the repulsion between codes" + BY_METHOD)
    load_balance: float | None = Field(None, ge=0, lt=1, description="rare codes nearer, by so much" + BY_METHOD)
    repair: Repair | None = Field(None, description="how shared SIDs are told apart" + BY_METHOD)

    hidden_widths: tuple[PositiveInt, ...] = Field((512, 256, 128, 64), description="of the encoder; mirrored back")
    latent_width: PositiveInt = 32
    commitment_weight: float = Field(0.25, ge=0)
    batch_size: PositiveInt = 1024
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    max_epochs: PositiveInt = 1000
    convergence_window: PositiveInt = Field(20, description="epochs of flat validation loss that end training")
    convergence_threshold: float = Field(1e-3, ge=0, description="share of the loss below which a fall counts as flat")
    validation_share: float = Field(0.05, gt=0, lt=0.5, description="of the items, held out: the least known ones")
    max_validation_items: int = Field(2048, ge=2)
    checkpoint_epochs: PositiveInt = Field(20, description="epochs between checkpoints")
    init_sample: PositiveInt = Field(65_536, description="most items that k-means reads")
    kmeans_restarts: int = Field(3, ge=1)
    ema_decay: float = Field(0.99, gt=0, lt=1)
    sinkhorn_epsilon: float = Field(0.003, ge=SMALLEST_EPSILON)
    sinkhorn_iterations: PositiveInt = 50
    collaborative_temperature: float = Field(0.1, gt=0, description="of the cosine")
    diversity_clusters: PositiveInt = Field(10, description="clusters of a level's codes")
    cluster_refresh: PositiveInt = Field(10, description="epochs between clusterings of the codes")
    cointeraction_temperature: float = Field(0.1, gt=0)
    graph_window: PositiveInt = Field(5, description="events between two items that still count as together")
    graph_alpha: float = Field(0.5, gt=0, le=1, description="share of an item's own vector at each hop")
    graph_hops: PositiveInt = 2
    graph_dropout: float = Field(0.3, ge=0, lt=1, description="share of items read by text alone while training")
    load_balance_bound: float = Field(0.2, ge=0, lt=1)
    threads: int = Field(1, ge=1, description=THREADS)
    seed: int = Field(0, ge=0)

    @field_validator("num_levels", "codebook_size")
    @classmethod
    def _is_not_the_methods_own(cls, value: int | None, info: ValidationInfo) -> int | None:
        method: Method | None = info.data.get("method")
        if method in NUM_LEVELS and value not in (
            None,
            NUM_LEVELS[method] if info.field_name == "num_levels" else None,
        ):
            raise ValueError(f"the method {method} has {NUM_LEVELS[method]} levels and a codebook of its own size")
        return value

    @property
    def levels(self) -> int:
        """Codes in a SID."""
        return self.num_levels or NUM_LEVELS.get(self.method, DEFAULT_NUM_LEVELS)

    def objectives(self) -> Objectives:
        """The method's row, with what is set here over it."""
        return objectives_of(self.method, self.model_dump())

    def identity(self) -> dict[str, Any]:
        """Also what the method stands for, and the content of the file of SIDs."""
        content = hashlib.sha256(_read_bytes(Path(self.sids))).hexdigest() if self.sids else None
        named = {"num_levels": self.levels, "objectives": repr(self.objectives()), "sids": content}
        return super().identity() | named


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StageError(
            f"the file of SIDs {path} cannot be read ({error.strerror}): give tokenizer.sids another"
        ) from error
