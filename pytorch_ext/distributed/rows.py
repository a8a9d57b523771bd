# SPDX-License-Identifier: Apache-2.0
"""The tokens that a rank's model is fed with in one micro-step: those of linear modules, where attention differs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gapless.schedule.schedule import Schedule
from gapless.schedule.shards import MicroBatch, positions_of

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokens by name, in their order.

    Attributes:
        rank, step: whose, and when.
        pieces: int64 [p, 3], rows (sequence, begin, end).
    """

    rank: int
    step: int
    pieces: Ints

    @cached_property
    def tokens(self) -> int:
        return int((self.pieces[:, 2] - self.pieces[:, 1]).sum())

    @cached_property
    def positions(self) -> Ints:
        """int64 [tokens], the place of each token in its sequence: ``position_ids``."""
        return positions_of(self.pieces)

    def part(self, begin: int, end: int) -> Ints:
        """Pieces of the tokens ``begin`` to ``end``, counted in these rows."""
        size = self.pieces[:, 2] - self.pieces[:, 1]
        start = np.cumsum(size) - size
        cut = self.pieces.copy()
        cut[:, 1] = self.pieces[:, 1] + np.clip(begin - start, 0, size)
        cut[:, 2] = self.pieces[:, 1] + np.clip(end - start, 0, size)
        return cut[cut[:, 2] > cut[:, 1]]


def rows_of(schedule: Schedule, micro_batch: MicroBatch) -> Rows:
    """The tokens of a micro-batch after the schedule's moves: what it keeps, then what it takes, move by move."""
    rank, step = micro_batch.rank, micro_batch.step
    kept = Rows(rank, step, micro_batch.pieces)
    moves = schedule.moves[schedule.moves[:, 0] == step, 1:].tolist()
    if not any(rank in row[:2] for row in moves):
        return kept
    parts: list[Ints] = []
    given: defaultdict[int, int] = defaultdict(int)
    for source, target, count in moves:
        if rank == target:
            theirs = schedule.micro_batch(source, step)
            end = theirs.tokens - given[source]
            parts.append(Rows(source, step, theirs.pieces).part(end - count, end))
        given[source] += count
    own = kept.part(0, kept.tokens - given[rank])
    return Rows(rank, step, np.concatenate([own, *parts]))
