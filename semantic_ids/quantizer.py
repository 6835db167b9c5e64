"""Item vector → SID, in numpy, from what the bundle carries: how an item added next week gets its SID."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from semantic_ids.codes import Codes, SidError, SidSpace
from semantic_ids.columns import map_array, save_array
from semantic_ids.trie import SidTrie, UnknownPrefixError

Vectors = npt.NDArray[np.float32]

_Prefix = tuple[int, ...]

_BLOCK = 256
"""Rows per matrix product. All have this many, the last one padded: BLAS rounds by the shape, and so a row comes out
alike whatever stands beside it (to the bit with OpenBLAS's AVX-512 kernels, to the last bits with its AVX2 ones)."""

_TIE = 2.0**-20  # of ‖r‖·max‖e‖: 8 units in the last place; nearer than that, rounding decides which code is nearer

_LARGEST_NORM = 1e18  # of a latent or a code: float32 ends at 3e38, so the squares and products of these are finite


@dataclass(frozen=True)
class DenseLayer:
    """y = x Wᵀ + b."""

    weight: npt.NDArray[np.float32]  # (out, in)
    bias: npt.NDArray[np.float32]  # (out,)


@dataclass(frozen=True)
class ResidualQuantizer:
    """Standardise, encode, then at each level take the nearest code to what the levels before left over.

    Without layers the latent is the standardised vector itself (residual k-means); with them it is an MLP's output
    (RQ-VAE and what builds on it). Of codes that are equally near, up to rounding, the lowest is taken. Arrays that do
    not fit each other, are not float32 or not finite raise `SidError`.
    """

    mean: npt.NDArray[np.float32]  # (D,)
    scale: npt.NDArray[np.float32]  # (D,) standard deviations
    codebooks: npt.NDArray[np.float32]  # (L, K, width of the latent)
    layers: tuple[DenseLayer, ...] = ()  # ReLU between them, none behind the last

    def __post_init__(self) -> None:
        width = _checked("mean", self.mean, (None,))[0]
        _checked("scale", self.scale, (width,))
        if not (self.scale > 0).all():
            raise SidError(f"the quantiser's scale holds {self.scale.min()}; standard deviations are above 0")
        for number, layer in enumerate(self.layers):
            out, _ = _checked(f"weight.{number}", layer.weight, (None, width))
            _checked(f"bias.{number}", layer.bias, (out,))
            width = out
        num_levels, codebook_size, _ = _checked("codebooks", self.codebooks, (None, None, width))
        SidSpace(num_levels, codebook_size)
        if not (np.abs(self.codebooks).max(initial=0.0) * np.sqrt(width) <= _LARGEST_NORM):
            raise SidError(f"the quantiser's codebooks holds a value beyond ±{_LARGEST_NORM:g}")

    @property
    def space(self) -> SidSpace:
        """The SIDs that this quantiser writes."""
        return SidSpace(self.codebooks.shape[0], self.codebooks.shape[1])

    def latents(self, vectors: npt.NDArray[np.number]) -> Vectors:
        """What the codebooks quantise, (N, D) → (N, width of the latent)."""
        latents = np.empty((len(vectors), self.codebooks.shape[2]), np.float32)
        for rows, block in self._latent_blocks(vectors):
            latents[rows] = block[: rows.stop - rows.start]
        return latents

    def last_residuals(self, vectors: npt.NDArray[np.number], codes: Codes) -> Vectors:
        """What these codes (N, L) leave of each item for the last level to quantise."""
        residuals = self.latents(vectors)
        for level in range(self.space.num_levels - 1):
            residuals -= self.codebooks[level][codes[:, level]]
        return residuals

    def encode(self, vectors: npt.NDArray[np.number]) -> Codes:
        """Nearest codes, level by level, (N, D) → (N, L). Different items may get one SID.

        `vectors` may be memory-mapped, of any real type: a block at a time is read, and made float32.
        """
        codes = np.empty((len(vectors), self.space.num_levels), np.uint16)
        for rows, block in self._latent_blocks(vectors):
            codes[rows] = self._quantise(block)[: rows.stop - rows.start]
        return codes

    def assign_new(self, vectors: npt.NDArray[np.number], taken: SidTrie) -> Codes:
        """SIDs for new items (M, D) → (M, L) that no item of `taken`, nor another of the new ones, has.

        The first L-1 codes are the nearest ones; the last is the nearest that is still free under them. A prefix that
        is full passes on to the nearest other (L-1)th code; when those are full too, `SidError`.

        Items choose in the order given, so put first whose place matters most. Then a later item never changes an
        earlier one's SID, and assigning a list in two goes, the first part's SIDs taken, equals assigning it in one.
        """
        if taken.space != self.space:
            raise SidError(f"the taken SIDs are of {taken.space}, this quantiser writes {self.space}")
        latents = np.empty((len(vectors), self.codebooks.shape[2]), np.float32)
        codes = np.empty((len(vectors), self.space.num_levels), np.uint16)
        for rows, block in self._latent_blocks(vectors):
            latents[rows] = block[: rows.stop - rows.start]
            codes[rows] = self._quantise(block)[: rows.stop - rows.start]
        under: dict[_Prefix, set[int]] = {}

        def taken_under(prefix: _Prefix) -> set[int]:
            if prefix not in under:
                under[prefix] = _last_codes(taken, prefix)
            return under[prefix]

        for row, nearest in enumerate(codes.tolist()):
            prefix, code = tuple(nearest[:-1]), nearest[-1]
            if code in taken_under(prefix):
                prefix, code = self._nearest_free(latents[row], nearest, taken_under)
                codes[row] = (*prefix, code)
            taken_under(prefix).add(code)
        return codes

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
        """Map a saved quantiser; `SidError` names the array that is missing, unreadable or does not fit."""
        num_layers = max(len(list(folder.glob(f"{name}.*.npy"))) for name in ("weight", "bias"))
        mean, scale, codebooks = (_map(folder, name) for name in ("mean", "scale", "codebooks"))
        layers = tuple(
            DenseLayer(_map(folder, f"weight.{number}"), _map(folder, f"bias.{number}")) for number in range(num_layers)
        )
        return cls(mean, scale, codebooks, layers)

    def _latent_blocks(self, vectors: npt.NDArray[np.number]) -> Iterator[tuple[slice, Vectors]]:
        """(rows, their latents): `_BLOCK` of them each time, so that the last may have more than its rows.

        A block is the caller's until the next one.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean):
            raise SidError(f"vectors have shape {vectors.shape}; this quantiser takes (N, {len(self.mean)})")
        if vectors.dtype.kind not in "fiu":
            raise SidError(f"vectors are of type {vectors.dtype}; this quantiser takes real numbers")
        standardised = np.empty((_BLOCK, len(self.mean)), np.float32)
        for start in range(0, len(vectors), _BLOCK):
            rows = slice(start, min(start + _BLOCK, len(vectors)))
            with np.errstate(over="ignore", invalid="ignore"):  # refused below, by the row
                block = np.asarray(vectors[rows], np.float32)
                _require(np.isfinite(block), start, "holds a value that is not finite in float32")
                standardised[: len(block)] = block
                standardised[len(block) :] = block[0]
                standardised -= self.mean
                standardised /= self.scale
                latents = self._encoded(standardised, start)
                is_small = _squared_norms(latents) <= _LARGEST_NORM**2  # and a number
            _require(is_small, start, "overflows: its latent is too large")
            yield rows, latents

    def _encoded(self, hidden: Vectors, start: int) -> Vectors:
        for number, layer in enumerate(self.layers):
            hidden = hidden @ layer.weight.T
            hidden += layer.bias
            if number < len(self.layers) - 1:
                # Here and not at the end alone: behind a ReLU an infinity can look like any number.
                _require(np.isfinite(hidden), start, f"overflows in layer {number} of the encoder")
                np.maximum(hidden, 0.0, out=hidden)
        return hidden

    def _quantise(self, residuals: Vectors) -> Codes:
        """Nearest codes (N, L) of latents, which become what these codes leave over."""
        codes = np.empty((len(residuals), self.space.num_levels), np.uint16)
        for level, codebook in enumerate(self.codebooks):
            codes[:, level] = self._nearest(self._nearness(residuals, level), residuals, level)
            residuals -= codebook[codes[:, level]]
        return codes

    def _nearest_free(
        self, latent: Vectors, nearest: list[int], taken_under: Callable[[_Prefix], set[int]]
    ) -> tuple[_Prefix, int]:
        last = self.space.num_levels - 1
        residual = latent.copy()
        for level in range(last - 1):
            residual -= self.codebooks[level][nearest[level]]
        for prefix in self._prefixes(residual, nearest):
            used = taken_under(prefix)
            if len(used) == self.space.codebook_size:
                continue
            rest = (residual - self.codebooks[last - 1][prefix[-1]] if prefix else residual)[None]
            nearness = self._nearness(rest, last)
            nearness[0, list(used)] = -np.inf
            return prefix, int(self._nearest(nearness, rest, last)[0])
        raise SidError(f"no SID is free under the prefix {nearest[: max(last - 1, 0)]}: train a larger codebook")

    def _prefixes(self, residual: Vectors, nearest: list[int]) -> Iterator[_Prefix]:
        """The item's own prefix, then those of the other (L-1)th codes, by their distance to what is left for them."""
        if len(nearest) == 1:
            yield ()
            return
        above, own = nearest[:-2], nearest[-2]
        yield (*above, own)
        by_distance = np.argsort(-self._nearness(residual[None], len(above))[0], kind="stable")
        yield from ((*above, parent) for parent in by_distance.tolist() if parent != own)

    def _nearness(self, residuals: Vectors, level: int) -> npt.NDArray[np.float32]:
        """r·e - ‖e‖²/2 of every pair, (N, K): the greater, the nearer. ‖r‖² is the same for all codes."""
        nearness: npt.NDArray[np.float32] = residuals @ self.codebooks[level].T
        nearness -= self._squared_code_norms[level] / 2
        return nearness

    def _nearest(self, nearness: npt.NDArray[np.float32], residuals: Vectors, level: int) -> npt.NDArray[np.intp]:
        """The lowest of the nearest codes (N,)."""
        tie = _TIE * np.sqrt(_squared_norms(residuals)) * np.sqrt(self._squared_code_norms[level].max())
        lowest: npt.NDArray[np.intp] = (nearness >= (nearness.max(axis=1) - tie)[:, None]).argmax(axis=1)
        return lowest

    @cached_property
    def _squared_code_norms(self) -> npt.NDArray[np.float32]:
        return _squared_norms(self.codebooks)  # (L, K)


def squared_distances(vectors: Vectors, codebook: Vectors) -> npt.NDArray[np.float32]:
    """‖v - e‖² for every pair, (N, D), (K, D) → (N, K)."""
    distances: npt.NDArray[np.float32] = vectors @ codebook.T
    distances *= -2.0
    distances += _squared_norms(vectors)[:, None]
    distances += _squared_norms(codebook)
    return distances


def _squared_norms(vectors: Vectors) -> npt.NDArray[np.float32]:
    norms: npt.NDArray[np.float32] = np.einsum("...d,...d->...", vectors, vectors)
    return norms


def _last_codes(trie: SidTrie, prefix: _Prefix) -> set[int]:
    """The last codes of the SIDs under a prefix of L-1 codes."""
    try:
        node = trie.walk(prefix)
    except UnknownPrefixError:
        return set()
    return set(trie.children(np.array([node])).code.tolist())


def _map(folder: Path, name: str) -> npt.NDArray[np.float32]:
    try:
        return map_array(folder, name)
    except (OSError, ValueError, EOFError) as error:
        raise SidError(f"the quantiser in {folder} cannot be read: {name}: {error}") from error


def _checked(name: str, array: npt.NDArray[np.float32], expected: tuple[int | None, ...]) -> tuple[int, ...]:
    """The array's shape, in which None may be any length."""
    shape = array.shape
    if len(shape) != len(expected) or any(want not in (None, have) for want, have in zip(expected, shape, strict=True)):
        wanted = ", ".join("any" if length is None else str(length) for length in expected)
        raise SidError(f"the quantiser's {name} has shape {shape}, not ({wanted})")
    if array.dtype != np.float32:
        raise SidError(f"the quantiser's {name} is {array.dtype}, not float32")
    if not np.isfinite(array).all():
        raise SidError(f"the quantiser's {name} holds a value that is not finite")
    return shape


def _require(is_good: npt.NDArray[np.bool_], start: int, otherwise: str) -> None:
    """`SidError` naming the first row, counted from `start`, that is not all good."""
    if not is_good.all():
        row = start + int(is_good.reshape(len(is_good), -1).all(axis=1).argmin())
        raise SidError(f"vector {row} {otherwise}, so no code is nearest to it")
