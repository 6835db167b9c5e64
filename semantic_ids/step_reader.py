"""What a thinking step's output says: the cluster of its level's codes that it is nearest to (S²GR, arXiv 2601.18664).

Training supervises a step with the cluster of the code that follows it. Centres and projections of that supervision go
into the bundle, so that serving can say which cluster a step meant. Nothing here changes a score. Pure numpy.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from semantic_ids.codes import SidError
from semantic_ids.columns import map_array, save_array
from semantic_ids.quantizer import Vectors

NO_CLUSTER = -1
"""Of a code that no training item had: it belongs to no cluster."""

_ARRAYS = ("centres", "projection", "cluster_of_code", "temperature")


@dataclass(frozen=True)
class StepReading:
    """What one step meant."""

    level: int  # of the code that it stands before
    cluster: int
    cosine: float  # of the projected output to the cluster's centre
    share: float  # of the cluster in the softmax over all of its level, at the temperature of training


@dataclass(frozen=True)
class StepReader:
    """The clusters of every level, and how a step's output is projected to where they are.

    Arrays that do not fit each other, or are not finite, raise `SidError`.
    """

    centres: npt.NDArray[np.float32]  # (L, C, d) unit length; 0 where a level has fewer clusters
    projection: npt.NDArray[np.float32]  # (L, D, d)
    cluster_of_code: npt.NDArray[np.int16]  # (L, K), or `NO_CLUSTER`
    temperature: npt.NDArray[np.float32]  # (1,)

    def __post_init__(self) -> None:
        shapes = self.centres.shape, self.projection.shape, self.cluster_of_code.shape, self.temperature.shape
        if [len(shape) for shape in shapes] != [3, 3, 2, 1]:
            raise SidError(f"the step clusters have arrays of shapes {shapes}: (L, C, d), (L, D, d), (L, K), 1 fit")
        num_levels, num_clusters, width = self.centres.shape
        if self.projection.shape[::2] != (num_levels, width) or len(self.cluster_of_code) != num_levels:
            raise SidError(f"the step clusters have arrays of shapes {shapes}, which do not fit each other")
        if not all(np.isfinite(one).all() for one in (self.centres, self.projection)) or not self.temperature[0] > 0:
            raise SidError("the step clusters hold a number that is not finite, or a temperature that is not above 0")
        if self.cluster_of_code.min() < NO_CLUSTER or self.cluster_of_code.max() >= num_clusters:
            raise SidError(f"the step clusters put a code into a cluster beyond the {num_clusters} that there are")

    def read(self, level: int, output: Vectors) -> StepReading:
        """The cluster with codes that the output (D,) of a step before the code of `level` is nearest to."""
        projected = output.astype(np.float32) @ self.projection[level]
        cosines = self.centres[level] @ (projected / max(float(np.linalg.norm(projected)), 1e-12))  # (C,)
        has_codes = np.isin(np.arange(len(cosines)), self.cluster_of_code[level])
        cluster = int(np.where(has_codes, cosines, -np.inf).argmax())
        weights = np.exp((cosines - cosines.max()) / self.temperature[0])
        return StepReading(level, cluster, float(cosines[cluster]), float(weights[cluster] / weights.sum()))

    def members(self, level: int, cluster: int, codebooks: Vectors) -> npt.NDArray[np.int64]:
        """The codes of a cluster, the most central first: `codebooks` are the quantiser's (L, K, d)."""
        codes = np.flatnonzero(self.cluster_of_code[level] == cluster)
        vectors = codebooks[level][codes]
        norms = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
        return codes[np.argsort(-(vectors @ self.centres[level, cluster]) / norms, kind="stable")]

    def save(self, folder: Path) -> None:
        """Write the four arrays."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            save_array(folder, name, getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> "StepReader":
        """Map what was saved; `SidError` names what does not fit."""
        try:
            return cls(*(map_array(folder, name) for name in _ARRAYS))
        except (OSError, EOFError) as error:
            raise SidError(f"the step clusters cannot be read: {error}") from error
