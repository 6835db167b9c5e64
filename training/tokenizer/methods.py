"""What each method is: a row of switches and weights over one set of objectives. No method has code of its own."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Method = Literal["residual-kmeans", "rqvae", "letter", "coba", "letter-coba", "gr2", "clustered", "random", "imported"]
Similarity = Literal["dot", "cosine"]
Repair = Literal["hungarian", "sinkhorn", "random", "none"]
CodebookUpdate = Literal["gradient", "ema"]
Initialisation = Literal["kmeans++", "constrained"]


@dataclass(frozen=True)
class Objectives:
    """All that a method can switch on; the defaults are a plain RQ-VAE."""

    codebook_update: CodebookUpdate = "gradient"
    initialisation: Initialisation = "kmeans++"
    sinkhorn_last_level: bool = True
    collaborative_weight: float = 0.0
    collaborative_similarity: Similarity = "dot"
    collaborative_permuted: bool = False
    diversity_weight: float = 0.0
    cointeraction_weight: float = 0.0
    graph: bool = False
    uniformity_weight: float = 0.0
    load_balance: float = 0.0
    repair: Repair = "hungarian"

    @property
    def needs_collaborative(self) -> bool:
        """Whether SASRec's item vectors are read."""
        return self.collaborative_weight > 0

    @property
    def needs_graph(self) -> bool:
        """Whether the graph of items that users touched together is read."""
        return self.graph or self.cointeraction_weight > 0


ALIGNMENT_WEIGHT = 0.2
"""LETTER's α, chosen on Scientific's validation split (docs/experiments.md); the paper has 0.02, for other vectors."""

_LETTER: dict[str, Any] = {
    "initialisation": "constrained",
    "collaborative_weight": ALIGNMENT_WEIGHT,
    "diversity_weight": 1e-4,
}
_COBA: dict[str, Any] = {"sinkhorn_last_level": False, "graph": True, "uniformity_weight": 1e-2, "load_balance": 0.1}

METHODS: dict[Method, Objectives] = {
    "rqvae": Objectives(),
    "letter": Objectives(**_LETTER),
    "coba": Objectives(**_COBA),
    "letter-coba": Objectives(**_COBA, **_LETTER),
    "gr2": Objectives(codebook_update="ema", sinkhorn_last_level=False, cointeraction_weight=0.1, repair="random"),
    # Of the rest only what is named applies: the repair, and for the clusters what SASRec's vectors weigh beside text.
    "clustered": Objectives(collaborative_weight=1.4),
    "residual-kmeans": Objectives(),
    "random": Objectives(),
    "imported": Objectives(),
}


NUM_LEVELS: dict[Method, int] = {"clustered": 2}
"""Where a method has another number of codes than `DEFAULT_NUM_LEVELS`; it is then the only one that it can have."""
DEFAULT_NUM_LEVELS = 3


def objectives_of(method: Method, overrides: dict[str, Any]) -> Objectives:
    """The method's row with what the configuration sets over it (None: as the method has it)."""
    names = {field.name for field in fields(Objectives)}
    return replace(METHODS[method], **{name: overrides[name] for name in names if overrides[name] is not None})
