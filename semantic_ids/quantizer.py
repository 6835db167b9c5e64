"""Item vector → SID, in numpy, from what the bundle carries: how an item added next week gets its SID."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from semantic_ids.codes import Codes, SidError, SidSpace
from semantic_ids.columns import map_array, save_array
from semantic_ids.trie import SidTrie, UnknownPrefixError

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DenseLayer:
    """y = x Wᵀ + b."""

    weight: npt.NDArray[np.float32]  # (out, in)
    bias: npt.NDArray[np.float32]  # (out,)


@dataclass(frozen=True)
class ResidualQuantizer:
    """Standardise, encode, then at each level take the nearest code to what the levels before left over.

    Without layers the latent is the standardised vector itself (residual k-means); with them it is an MLP's output
    (RQ-VAE and what builds on it).
    """

    mean: npt.NDArray[np.float32]  # (D,)
    scale: npt.NDArray[np.float32]  # (D,) standard deviations
    codebooks: npt.NDArray[np.float32]  # (L, K, width of the latent)
    layers: tuple[DenseLayer, ...] = ()  # ReLU between them, none behind the last

    @property
    def space(self) -> SidSpace:
        """The SIDs that this quantiser writes."""
        return SidSpace(self.codebooks.shape[0], self.codebooks.shape[1])

    def standardise(self, vectors: Vectors) -> Vectors:
        """Per-dimension zero mean and unit variance, by the training catalogue's statistics."""
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean):
            raise SidError(f"vectors have shape {vectors.shape}; this quantiser takes (N, {len(self.mean)})")
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise SidError(f"vector {row} holds a value that is not finite, so no code is nearest to it")
        return (vectors - self.mean) / self.scale

    def latents(self, vectors: Vectors) -> Vectors:
        """What the codebooks quantise, (N, D) → (N, width of the latent)."""
        latents = self.standardise(vectors)
        for number, layer in enumerate(self.layers):
            latents = latents @ layer.weight.T + layer.bias
            if number < len(self.layers) - 1:
                latents = np.maximum(latents, 0.0)
        return latents

    def last_residuals(self, vectors: Vectors, codes: Codes) -> Vectors:
        """What these codes (N, L) leave of each item for the last level to quantise."""
        residuals = self.latents(vectors)
        for level in range(self.space.num_levels - 1):
            residuals = residuals - self.codebooks[level][codes[:, level]]
        return residuals

    def encode(self, vectors: Vectors, batch: int = 8192) -> Codes:
        """Nearest codes, level by level, (N, D) → (N, L). Different items may get one SID."""
        codes = np.empty((len(vectors), self.space.num_levels), np.uint16)
        for start in range(0, len(vectors), batch):
            residual = self.latents(vectors[start : start + batch])
            for level, codebook in enumerate(self.codebooks):
                nearest = squared_distances(residual, codebook).argmin(axis=1)
                codes[start : start + batch, level] = nearest
                residual = residual - codebook[nearest]
        return codes

    def assign_new(self, vectors: Vectors, taken: SidTrie) -> Codes:
        """SIDs for new items (M, D) → (M, L) that no item of `taken`, nor another of the new ones, has.

        The first L-1 codes are the nearest ones; the last is the nearest that is still free under them. A prefix that
        is full passes on to the nearest other (L-1)th code.
        """
        codes = self.encode(vectors)
        given: set[tuple[int, ...]] = set()
        for row, vector in enumerate(self.latents(vectors)):
            codes[row] = self._nearest_free(vector, codes[row], taken, given)
            given.add(tuple(int(code) for code in codes[row]))
        return codes

    def _nearest_free(self, vector: Vectors, nearest: Codes, taken: SidTrie, given: set[tuple[int, ...]]) -> Codes:
        last = self.space.num_levels - 1
        residual = vector
        for level in range(last - 1):
            residual = residual - self.codebooks[level][nearest[level]]
        parents = (
            [None]
            if last == 0
            else np.argsort(squared_distances(residual[None], self.codebooks[last - 1])[0], kind="stable")
        )
        for parent in parents:
            prefix = tuple(int(code) for code in nearest[: max(last - 1, 0)])
            rest = residual
            if parent is not None:
                prefix += (int(parent),)
                rest = residual - self.codebooks[last - 1][parent]
            for code in np.argsort(squared_distances(rest[None], self.codebooks[last])[0], kind="stable"):
                sid = (*prefix, int(code))
                if sid not in given and not _is_taken(taken, sid):
                    return np.array(sid, np.uint16)
        raise SidError(f"no SID is free under the prefix {list(nearest[: max(last - 1, 0)])}: train a larger codebook")

    def save(self, folder: Path) -> None:
        """Write `mean`, `scale`, `codebooks`, and `weight.N` and `bias.N` of each layer."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("mean", "scale", "codebooks"):
            save_array(folder, name, getattr(self, name))
        for number, layer in enumerate(self.layers):
            save_array(folder, f"weight.{number}", layer.weight)
            save_array(folder, f"bias.{number}", layer.bias)

    @classmethod
    def load(cls, folder: Path) -> "ResidualQuantizer":
        """Map a saved quantiser."""
        num_layers = len(list(folder.glob("weight.*.npy")))
        layers = (
            DenseLayer(map_array(folder, f"weight.{number}"), map_array(folder, f"bias.{number}"))
            for number in range(num_layers)
        )
        mean, scale, codebooks = (map_array(folder, name) for name in ("mean", "scale", "codebooks"))
        return cls(mean, scale, codebooks, tuple(layers))


def squared_distances(vectors: Vectors, codebook: Vectors) -> npt.NDArray[np.float32]:
    """‖v - e‖² for every pair, (N, D), (K, D) → (N, K)."""
    distances: npt.NDArray[np.float32] = (
        (vectors**2).sum(axis=1)[:, None] - 2.0 * vectors @ codebook.T + (codebook**2).sum(axis=1)[None]
    )
    return distances


def _is_taken(trie: SidTrie, sid: tuple[int, ...]) -> bool:
    try:
        trie.walk(sid)
    except UnknownPrefixError:
        return False
    return True
