# SPDX-License-Identifier: Apache-2.0
"""The two algorithms that ByteScale prints (arXiv:2502.21231, sections 4.4 and 5.2), as baselines.

Both know one capacity, give each sequence that is not below it the ranks of equation 3
(:func:`~gapless.schedule.offloading.ring_sizes`), and pack the others by best fit. What the paper leaves open is read
as follows. Naive HDP assigns in order: the long sequences in the order of the batch, then the packs in the order in
which they were opened, to one run of ranks after another, around the end. Balanced HDP has as many buckets as there
are different sizes of rings; when no rank is far enough behind, all ranks are targets; a sequence of several ranks
takes those of the targets that have least to do, neighbours first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

import numpy as np
from numpy.typing import NDArray

from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel

Ints = NDArray[np.int64]
Plan = tuple[Ints, Ints, Ints, Ints]  # pack_of, rank_offsets, ring_ranks, steps


def best_fit(lengths: Ints, order: Ints, capacity: int) -> tuple[Ints, int]:
    """Pack sequences in ``order`` where they leave the least room: (int64 [n] pack, or -1 if not listed; how many)."""
    pack_of = np.full(len(lengths), -1)
    rooms: list[tuple[int, int]] = []  # (room, pack), ascending
    count = 0
    for i in order.tolist():
        length = int(lengths[i])
        at = bisect_left(rooms, (length, -1))
        room, pack = rooms.pop(at) if at < len(rooms) else (capacity, count)
        count = max(count, pack + 1)
        pack_of[i] = pack
        insort(rooms, (room - length, pack))
    return pack_of, count


def _packs(lengths: Ints, rings: Ints, capacity: int, order: Ints) -> tuple[Ints, Ints]:
    """(pack of each sequence, ranks of each pack): long sequences in ``order``, then the rest by best fit in it."""
    long = order[lengths[order] >= capacity]
    pack_of, count = best_fit(lengths, order[lengths[order] < capacity], capacity)
    pack_of = np.where(pack_of < 0, 0, pack_of + len(long))
    pack_of[long] = np.arange(len(long))
    ones = np.ones(count, np.int64)
    return pack_of, np.concatenate([rings[long], ones])


class _Ranks:
    """Rings given out so far; a ring's step comes after every earlier step of its ranks."""

    def __init__(self, packs: int, ranks: int) -> None:
        self.rings: list[Ints] = [np.empty(0, np.int64)] * packs
        self.steps = np.zeros(packs, np.int64)
        self._next = np.zeros(ranks, np.int64)

    def give(self, pack: int, ring: Ints) -> None:
        self.rings[pack] = ring
        self.steps[pack] = self._next[ring].max()
        self._next[ring] = self.steps[pack] + 1

    def plan(self, pack_of: Ints) -> Plan:
        offsets = np.cumsum([0, *map(len, self.rings)])
        return pack_of, offsets, np.concatenate([np.empty(0, np.int64), *self.rings]), self.steps


def in_order(lengths: Ints, rings: Ints, capacity: int, cluster: Cluster) -> Plan:
    """Algorithm 1, naive HDP. ``rings``: ranks of each sequence that is not packed."""
    pack_of, sizes = _packs(lengths, rings, capacity, np.arange(len(lengths)))
    ranks = _Ranks(len(sizes), cluster.ranks)
    begin = 0
    for pack, size in enumerate(sizes.tolist()):
        ranks.give(pack, (begin + np.arange(size)) % cluster.ranks)
        begin = (begin + size) % cluster.ranks
    return ranks.plan(pack_of)


def greedy(
    lengths: Ints,
    rings: Ints,
    capacity: int,
    cluster: Cluster,
    cost: CostModel,
    *,
    from_all: bool,
    delta: float,
) -> Plan:
    """Algorithm 2, balanced HDP: work goes to ranks that are more than ``delta`` seconds behind the last one.

    It is taken from the first bucket of similar lengths, longest first, until that is empty, or, with ``from_all``,
    from all buckets in turn.
    """
    pack_of, sizes = _packs(lengths, rings, capacity, np.argsort(-lengths, kind="stable"))
    ranks = _Ranks(len(sizes), cluster.ranks)
    count = len(sizes)
    tokens = np.bincount(pack_of, weights=lengths, minlength=count)
    work = np.bincount(pack_of, weights=cost.work(lengths), minlength=count)
    cells = np.bincount(pack_of, weights=cost.cells(lengths), minlength=count)
    seconds = cost.seconds(tokens, cells, sizes, sizes > cluster.ranks_per_node)
    number = len(np.unique(sizes))
    bucket = np.minimum((np.cumsum(work) - work) * number / max(work.sum(), 1e-300), number - 1).astype(
        np.int64
    )
    buckets = [deque(np.flatnonzero(bucket == b).tolist()) for b in range(number)]
    time = np.zeros(cluster.ranks)
    pace = cluster.throughputs
    turn = 0
    while buckets := [b for b in buckets if b]:
        order = np.lexsort((np.arange(cluster.ranks), time))
        behind = int((time.max() - time[order] > delta).sum()) or cluster.ranks
        used = 0
        while used < behind and any(buckets):
            waiting = [b for b in buckets if b]
            source = waiting[turn % len(waiting)] if from_all else waiting[0]
            size = int(sizes[source[0]])
            if used and used + size > behind:
                break
            pack = source.popleft()
            ring = np.sort(order[used : used + size])
            ranks.give(pack, ring)
            time[ring] = time[ring].max() + seconds[pack] / pace[ring].min()
            used += size
            turn += 1
    return ranks.plan(pack_of)
