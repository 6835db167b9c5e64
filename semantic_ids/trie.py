"""The SID trie: which codes may follow a prefix. The one rule of legality; it knows nothing of models or filters.

Layout (compressed sparse rows). Items are sorted by SID, and an item's place in that order is its *rank*. Every node
but the root is one edge, numbered level by level in rank order, so that

    children of edge e   = edges      [first_child[e], first_child[e + 1])   (contiguous: its id is its edge index)
    items under leaf e   = item ranks [leaf_rank[e - first_leaf], leaf_rank[e - first_leaf + 1])

and every node covers one interval of item ranks, which is what makes exact filtering during decoding a subtraction.
`first_child` is monotone over *all* edges: the end of a level maps to the end of the next, so no level is special.
`ROOT` is -1. Tokens are uint16, pointers uint32: 5.5 bytes an item at 20M items of 4 x 256 codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from semantic_ids.codes import SidError, SidSpace

ROOT = -1

Nodes = npt.NDArray[np.int64]
Ranks = npt.NDArray[np.int64]


class UnknownPrefixError(LookupError):
    """A prefix that no catalogue item has. It never means "no constraint"."""


@dataclass(frozen=True)
class Children:
    """The children of M nodes, flat: child c belongs to `nodes[parent[c]]`."""

    parent: npt.NDArray[np.int64]  # (C,) index into the M nodes asked for
    code: npt.NDArray[np.int64]  # (C,)
    node: Nodes  # (C,)


@dataclass(frozen=True)
class SidTrie:
    """Prefix index over the SIDs of a catalogue; see the module's head for the layout."""

    space: SidSpace
    level_starts: npt.NDArray[np.int64]  # (L + 1,): edges of level l are [level_starts[l], level_starts[l + 1])
    tokens: npt.NDArray[np.uint16]  # (edges,)
    first_child: npt.NDArray[np.uint32]  # (inner edges + 1,)
    leaf_rank: npt.NDArray[np.uint32]  # (leaves + 1,)

    @classmethod
    def build(cls, space: SidSpace, codes: npt.NDArray[np.integer]) -> "SidTrie":
        """Build from SIDs (N, L) in any order; equal SIDs share a leaf. Ranks follow the sorted SIDs."""
        if len(codes) == 0:
            raise SidError("a trie needs at least one SID")
        keys = sid_keys(space, codes)
        keys.sort()
        return cls._from_sorted_keys(space, keys)

    @classmethod
    def from_sorted(cls, space: SidSpace, codes: npt.NDArray[np.integer]) -> "SidTrie":
        """Build from SIDs (N, L) that are already in rank order; `SidError` if they are not."""
        if len(codes) == 0:
            raise SidError("a trie needs at least one SID")
        keys = sid_keys(space, codes)
        if not bool((keys[1:] >= keys[:-1]).all()):
            raise SidError("the SIDs are not sorted")
        return cls._from_sorted_keys(space, keys)

    @classmethod
    def _from_sorted_keys(cls, space: SidSpace, keys: npt.NDArray[np.unsignedinteger]) -> "SidTrie":
        # Bottom up: the distinct prefixes of one level, and where each starts among the level below.
        bits = _bits_per_code(space)
        num_items = len(keys)
        starts = _run_starts(keys)
        leaf_rank = np.append(starts, num_items).astype(np.uint32)
        nodes = keys[starts]
        levels = [(nodes & keys.dtype.type((1 << bits) - 1)).astype(np.uint16)]
        pointers: list[npt.NDArray[np.int64]] = []
        for _ in range(space.num_levels - 1):
            nodes = nodes >> keys.dtype.type(bits)
            starts = _run_starts(nodes)
            nodes = nodes[starts]
            levels.append((nodes & keys.dtype.type((1 << bits) - 1)).astype(np.uint16))
            pointers.append(starts)
        levels.reverse()
        pointers.reverse()
        level_starts = np.concatenate(([0], np.cumsum([len(level) for level in levels]))).astype(np.int64)
        first_child = np.empty(level_starts[-2] + 1, np.uint32)
        for level, starts in enumerate(pointers):
            first_child[level_starts[level] : level_starts[level + 1]] = level_starts[level + 1] + starts
        first_child[-1] = level_starts[-1]
        return cls(space, level_starts, np.concatenate(levels), first_child, leaf_rank)

    @property
    def num_items(self) -> int:
        """Items under the root, N."""
        return int(self.leaf_rank[-1])

    @property
    def num_leaves(self) -> int:
        """Distinct SIDs."""
        return len(self.leaf_rank) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of tokens and pointers (without `leaf_rank`, the map to items)."""
        return self.tokens.nbytes + self.first_child.nbytes

    @cached_property
    def root_children(self) -> Children:
        """Level-0 edges."""
        nodes = np.arange(self.level_starts[1])
        return Children(np.zeros_like(nodes), self.tokens[nodes].astype(np.int64), nodes)

    def children(self, nodes: Nodes) -> Children:
        """Children of M nodes of one level (M,), none of them a leaf; a node appears as often as it was asked for."""
        if len(nodes) and nodes[0] == ROOT:
            return _tiled(self.root_children, len(nodes))
        first = self.first_child[nodes].astype(np.int64)
        counts = self.first_child[nodes + 1].astype(np.int64) - first
        parent = np.repeat(np.arange(len(nodes)), counts)
        within = np.arange(len(parent)) - np.repeat(np.cumsum(counts) - counts, counts)
        node = np.repeat(first, counts) + within
        return Children(parent, self.tokens[node].astype(np.int64), node)

    def has_one_child(self, nodes: Nodes) -> npt.NDArray[np.bool_]:
        """Which of M nodes of one level (M,), none of them a leaf, leave no choice."""
        if len(nodes) and nodes[0] == ROOT:
            return np.full(len(nodes), self.level_starts[1] == 1)
        only: npt.NDArray[np.bool_] = self.first_child[nodes + 1] - self.first_child[nodes] == 1
        return only

    def leaf_range(self, nodes: Nodes, level: int) -> tuple[Nodes, Nodes]:
        """The half-open interval of leaf edges under each node (M,) of `level` (-1 = the root)."""
        if level < 0:
            low = np.full(len(nodes), self.level_starts[-2])
            return low, np.full(len(nodes), self.level_starts[-1])
        low, high = nodes, nodes + 1
        for _ in range(self.space.num_levels - 1 - level):
            low, high = self.first_child[low].astype(np.int64), self.first_child[high].astype(np.int64)
        return low, high

    def rank_range(self, nodes: Nodes, level: int) -> tuple[Ranks, Ranks]:
        """The half-open interval of item ranks under each node (M,) of `level` (-1 = the root)."""
        low, high = self.leaf_range(nodes, level)
        first_leaf = self.level_starts[-2]
        return self.leaf_rank[low - first_leaf].astype(np.int64), self.leaf_rank[high - first_leaf].astype(np.int64)

    def step(self, node: int, code: int) -> int:
        """The child of `node` by `code`; `UnknownPrefixError` if the catalogue has none."""
        low, high = (0, int(self.level_starts[1])) if node == ROOT else self._child_range(node)
        place = low + int(np.searchsorted(self.tokens[low:high], code))
        if place == high or self.tokens[place] != code:
            raise UnknownPrefixError(f"no item continues node {node} with code {code}")
        return place

    def walk(self, prefix: Sequence[int]) -> int:
        """The node of a prefix of at most L codes (the empty one is `ROOT`), or `UnknownPrefixError`."""
        if len(prefix) > self.space.num_levels:
            raise UnknownPrefixError(
                f"prefix {list(prefix)} is longer than the {self.space.num_levels} levels of a SID"
            )
        node = ROOT
        for code in prefix:
            node = self.step(node, int(code))
        return node

    def _child_range(self, node: int) -> tuple[int, int]:
        if not 0 <= node < len(self.first_child) - 1:
            raise UnknownPrefixError(f"node {node} has no children: it is a leaf or not of this trie")
        return int(self.first_child[node]), int(self.first_child[node + 1])

    def path_of_rank(self, ranks: Ranks) -> npt.NDArray[np.int64]:
        """The node of every level on the way to each item, (M,) → (M, L)."""
        path = np.empty((len(ranks), self.space.num_levels), np.int64)
        # uint32 on both sides: another type would make searchsorted copy the whole array.
        path[:, -1] = np.searchsorted(self.leaf_rank, ranks.astype(np.uint32), side="right") - 1 + self.level_starts[-2]
        for level in range(self.space.num_levels - 2, -1, -1):
            # The parent of e is the last inner edge whose first child is not after e.
            path[:, level] = np.searchsorted(self.first_child, path[:, level + 1].astype(np.uint32), side="right") - 1
        return path


def sid_keys(space: SidSpace, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.unsignedinteger]:
    """SIDs (N, L) packed into integers (N,) whose order is the SIDs' lexicographic order."""
    bits = _bits_per_code(space)
    total = bits * space.num_levels
    if total > 64:
        raise SidError(
            f"{space.num_levels} levels of {space.codebook_size} codes need {total} bits; at most 64 are packed"
        )
    dtype = np.uint32 if total <= 32 else np.uint64
    codes = space.check(codes)
    keys: npt.NDArray[np.unsignedinteger] = codes[:, 0].astype(dtype)
    for level in range(1, space.num_levels):
        keys <<= dtype(bits)
        keys |= codes[:, level]
    return keys


def _bits_per_code(space: SidSpace) -> int:
    return (space.codebook_size - 1).bit_length()


def _run_starts(values: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.int64]:
    is_start = np.empty(len(values), np.bool_)
    is_start[0] = True
    np.not_equal(values[1:], values[:-1], out=is_start[1:])
    return np.flatnonzero(is_start)


def _tiled(children: Children, times: int) -> Children:
    count = len(children.node)
    return Children(np.repeat(np.arange(times), count), np.tile(children.code, times), np.tile(children.node, times))
