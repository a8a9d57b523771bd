# SPDX-License-Identifier: Apache-2.0
"""Symmetric chunks: how a pack of sequences is shared by the ranks of a ring, and what one rank holds of it.

Over N ranks a sequence is cut into 2N chunks; rank i of the ring holds chunks i and 2N - 1 - i: the same number of
tokens and of visible pairs for each rank under a causal mask (ByteScale, arXiv:2502.21231, section 4.1; the "zigzag" of
ring attention). Chunks differ by one token at most, and those extra tokens go round robin from sequence to sequence, so
that a whole pack gives no rank more than ``ceil(tokens / N)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


def _before(x: ArrayLike, j: ArrayLike, parts: ArrayLike) -> Ints:
    """How many of 0 .. x - 1 leave a remainder below j."""
    x, j, parts = (np.asarray(a, np.int64) for a in (x, j, parts))
    return x // parts * j + np.minimum(x % parts, j)


def chunk_begin(first: ArrayLike, length: ArrayLike, j: ArrayLike, parts: ArrayLike) -> Ints:
    """Where chunk j of ``parts`` begins in a sequence that has ``first`` tokens of its pack before it.

    Chunk ``parts`` begins at the end. Arrays broadcast.
    """
    first = np.asarray(first, np.int64)
    return _before(first + np.asarray(length, np.int64), j, parts) - _before(first, j, parts)


def positions_of(pieces: Ints) -> Ints:
    """int64 [tokens], the place in its sequence of each token of int64 [p, 3] rows (sequence, begin, end)."""
    begin, size = pieces[:, 1], pieces[:, 2] - pieces[:, 1]
    start = np.cumsum(size) - size
    return np.arange(size.sum()) + np.repeat(begin - start, size)


def even_widths(offsets: Ints, node: Ints) -> Ints:
    """int64 [rings], ranks that each ring has in a row on one node, if that is the same all along it; else all of them.

    ``node`` is that of each entry of the rings, which begin and end at ``offsets``; there has to be one.
    """
    begins = np.ones(len(node), bool)
    begins[1:] = node[1:] != node[:-1]
    begins[offsets[:-1]] = True
    runs = np.add.reduceat(begins.astype(np.int64), offsets[:-1])
    size = np.diff(np.flatnonzero(begins), append=len(node))
    first = np.cumsum(runs) - runs
    even = np.maximum.reduceat(size, first) == np.minimum.reduceat(size, first)
    rings = np.diff(offsets)
    return np.where(even, rings // runs, rings)


@dataclass(frozen=True, eq=False)
class Shard:
    """What one rank holds of one pack.

    Its tokens lie as first chunks (chunk ``index``) of all sequences, then second chunks (``2N - 1 - index``), both in
    the order of ``sequences``; on a ring of one rank as whole sequences.

    Attributes:
        pack: number of the pack in its schedule.
        ranks: the ring, in order.
        index: this rank's place in it.
        sequences: int64 [m], numbers of the pack's sequences, ascending.
        lengths: int64 [m].
        width: ranks of the ring that keys go around before they go on to the next so many; all, or those of a node.
    """

    pack: int
    ranks: tuple[int, ...]
    index: int
    sequences: Ints
    lengths: Ints
    width: int

    @cached_property
    def first(self) -> Ints:
        """int64 [m], tokens of the pack before each sequence."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def parts(self) -> int:
        return 2 * len(self.ranks)

    def chunk(self, j: int) -> tuple[Ints, Ints]:
        """(begin, end) of chunk j of each sequence, int64 [m]."""
        return (
            chunk_begin(self.first, self.lengths, j, self.parts),
            chunk_begin(self.first, self.lengths, j + 1, self.parts),
        )

    def held_by(self, index: int) -> list[tuple[Ints, Ints]]:
        """The chunks of the ring's rank ``index``: (begin, end) of its first and its second, or of whole sequences."""
        if len(self.ranks) == 1:
            return [(np.zeros_like(self.lengths), self.lengths)]
        return [self.chunk(index), self.chunk(self.parts - 1 - index)]

    @cached_property
    def pieces(self) -> Ints:
        """int64 [p, 3], rows (sequence, begin, end) of this rank's tokens, in their order; empty ones are left out."""
        rows = [np.stack([self.sequences, begin, end], 1) for begin, end in self.held_by(self.index)]
        table = np.concatenate(rows)
        return table[table[:, 2] > table[:, 1]]

    @property
    def tokens(self) -> int:
        return int((self.pieces[:, 2] - self.pieces[:, 1]).sum())


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank computes in one micro-step: shards of packs, one after another.

    Attributes:
        rank, step: whose, and when.
        shards: in the order of their packs.
        offload: share of the activations that goes to the host.
    """

    rank: int
    step: int
    shards: tuple[Shard, ...]
    offload: float = 0.0

    @cached_property
    def pieces(self) -> Ints:
        """int64 [p, 3], rows (sequence, begin, end) of the tokens, in their order."""
        return np.concatenate([np.empty((0, 3), np.int64), *(s.pieces for s in self.shards)])

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.shards)

    @cached_property
    def positions(self) -> Ints:
        """int64 [tokens], the place of each token in its sequence: ``position_ids``."""
        return positions_of(self.pieces)
