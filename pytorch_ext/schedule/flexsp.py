# SPDX-License-Identifier: Apache-2.0
"""FlexSP: rings of different sizes in each micro-batch, by a mixed-integer program (arXiv:2412.01523).

A baseline: rings have 2^k ranks, all ranks of a micro-batch take it at the same time, and sequences are told apart only
by the bucket of their length.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless import _planner
from gapless.schedule.bins import loads
from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import check_capacity, check_fits, check_lengths
from gapless.schedule.schedule import Pack, Schedule, schedule_of
from gapless.schedule.solver import Program

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Groups(NamedTuple):
    """Rings of one micro-batch.

    Attributes:
        of: int64 [n], the ring of each sequence.
        ranks: int64 [rings], how many each has.
        seconds: of the slowest.
    """

    of: Ints
    ranks: Ints
    seconds: float


def plan(
    lengths: ArrayLike,
    *,
    ranks: int | Cluster,
    capacity: ArrayLike,
    cost: CostModel,
    buckets: int = 16,
    time_limit: float = 10.0,
) -> Schedule:
    """Micro-batches of like lengths, each on rings of 2^k ranks.

    Sorted sequences are cut into consecutive micro-batches of even tokens ("blaster"), as few as can be done; in each,
    the program chooses the rings and how many sequences of each bucket go to which. Where it does not finish, or is no
    better, equal rings filled by LPT are used, so that the result depends on the machine's speed: plan on one rank.

    Args:
        capacity: tokens a rank; the smallest counts for all.
        buckets: of lengths, in each micro-batch.
        time_limit: seconds for all programs together; 0 for equal rings only.

    Raises:
        ImportError: scipy is not installed, and ``time_limit`` is above 0.
        ValueError: a sequence is longer than all ranks together hold.
    """
    sizes, cluster = check_lengths(lengths), Cluster.of(ranks)
    limit = check_capacity(capacity, cluster.ranks)
    if isinstance(buckets, bool) or not isinstance(buckets, int) or buckets < 1:
        raise ValueError(f"buckets is {buckets!r}: it has to be a whole number of at least 1")
    if not time_limit >= 0:
        raise ValueError(f"time_limit is {time_limit}: it has to be at least 0 seconds")
    each = int(limit.min())
    largest_ring = 2 ** (cluster.ranks.bit_length() - 1)
    check_fits(sizes, each * largest_ring, largest_ring)
    full = np.flatnonzero(sizes)
    order = full[np.lexsort((full, -sizes[full]))]
    batches = _blaster(sizes[order], cluster, each, cost)
    packs = []
    for step, (begin, end, groups) in enumerate(batches):
        own = sizes[order[begin:end]]
        if time_limit > 0:
            groups = _mixed(own, cluster, each, cost, buckets, time_limit / len(batches), groups)
        # Larger rings first: each then begins at a multiple of its size, inside a node where it fits into one.
        first = 0
        for g in np.argsort(-groups.ranks, kind="stable").tolist():
            size = int(groups.ranks[g])
            members = order[begin:end][groups.of == g]
            if len(members):
                packs.append(Pack(members, range(first, first + size), step))
            first += size
    if empty := np.flatnonzero(sizes == 0).tolist():
        if packs:
            packs[0] = Pack([*packs[0].sequences, *empty], packs[0].ranks, packs[0].step)
        else:
            packs = [Pack(empty, [0], 0)]
    return schedule_of(sizes, packs, ranks=cluster, capacity=limit, cost=cost, planner=f"flexsp({buckets})")


def bucket_lengths(lengths: ArrayLike, buckets: int) -> Ints:
    """int64 [n], the upper end of each length's bucket: the buckets that add the fewest tokens in all."""
    values, counts = np.unique(check_lengths(lengths), return_counts=True)
    if len(values) <= buckets:
        return np.asarray(lengths, np.int64)
    # added[j]: tokens added by buckets of the first j values, the last one of which ends there.
    count, total = (np.concatenate([[0], np.cumsum(c)]).astype(np.float64) for c in (counts, counts * values))
    added = np.concatenate([[0.0], np.full(len(values), np.inf)])
    cuts = []
    for _ in range(buckets):
        best, begin = np.full(len(values) + 1, np.inf), np.zeros(len(values) + 1, np.int64)
        for j in range(1, len(values) + 1):
            trial = added[:j] + values[j - 1] * (count[j] - count[:j]) - (total[j] - total[:j])
            begin[j] = trial.argmin()
            best[j] = trial[begin[j]]
        added = best
        cuts.append(begin)
    upper, end = np.empty(len(values), np.int64), len(values)
    for begin in reversed(cuts):
        upper[begin[end] : end] = values[end - 1]
        end = int(begin[end])
    return upper[np.searchsorted(values, lengths)]


def _blaster(sizes: Ints, cluster: Cluster, limit: int, cost: CostModel) -> list[tuple[int, int, Groups]]:
    """(begin, end, equal rings) of as few micro-batches of consecutive sequences as equal rings can do."""
    if not len(sizes):
        return []
    count = -(-int(sizes.sum()) // (limit * cluster.ranks))
    while True:
        cuts = list(pairwise(_even_cuts(sizes, count)))
        groups = [_equal(sizes[b:e], cluster, limit, cost) for b, e in cuts]
        done = [(b, e, g) for (b, e), g in zip(cuts, groups, strict=True) if g is not None]
        if len(done) == len(cuts):
            return done
        count += 1


def _even_cuts(sizes: Ints, count: int) -> list[int]:
    """Bounds of at most ``count`` consecutive parts, the largest of which has as few tokens as can be."""
    ends = np.cumsum(sizes)

    def cut(most: int) -> list[int]:
        bounds = [0]
        while bounds[-1] < len(sizes):
            done = ends[bounds[-1] - 1] if bounds[-1] else 0
            bounds.append(int(np.searchsorted(ends, done + most, side="right")))
        return bounds

    low, high = int(sizes.max()), int(ends[-1])
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) - 1 <= count:
            high = middle
        else:
            low = middle + 1
    return cut(low)


def _shares(sizes: Ints, ranks: int, cluster: Cluster, cost: CostModel) -> tuple[Floats, float]:
    """What each sequence adds to a ring's seconds, and what the ring costs whatever is in it."""
    across = ranks > cluster.ranks_per_node
    swift = cost.replace(latency=0.0, fixed=0.0)
    return swift.seconds(sizes, cost.cells(sizes), ranks, across), cost.overhead + float(
        cost.ring(0, ranks, across)
    )


def _slowest(sizes: Ints, of: Ints, ranks: Ints, cluster: Cluster, cost: CostModel) -> float:
    """Seconds of the slowest of the rings that have a sequence."""
    tokens, cells = loads(of, sizes, len(ranks)), loads(of, cost.cells(sizes), len(ranks))
    return float(cost.seconds(tokens, cells, ranks, ranks > cluster.ranks_per_node)[tokens > 0].max())


def _equal(sizes: Ints, cluster: Cluster, limit: int, cost: CostModel) -> Groups | None:
    """The best rings of one size, sequences to them by LPT; None if they do not fit."""
    best, size = None, 1
    while size <= cluster.ranks:
        rings, (costs, _) = cluster.ranks // size, _shares(sizes, size, cluster, cost)
        room = np.full(rings, limit * size)
        of = _planner.longest_first(costs, sizes, np.ones(rings), room, limit * size, len(sizes))
        if (of >= 0).all():
            seconds = _slowest(sizes, of, np.full(rings, size), cluster, cost)
            if best is None or seconds < best.seconds:
                best = Groups(of, np.full(rings, size), seconds)
        size *= 2
    return best


def _mixed(
    sizes: Ints, cluster: Cluster, limit: int, cost: CostModel, buckets: int, time_limit: float, start: Groups
) -> Groups:
    """Rings and sequences by the program; ``start`` if that is not behind what it proves to be best."""
    upper = bucket_lengths(sizes, buckets)
    lengths, bucket, count = np.unique(upper, return_inverse=True, return_counts=True)
    size = np.concatenate(
        [np.full(cluster.ranks >> k, 1 << k) for k in range(cluster.ranks.bit_length())]
    ).astype(np.int64)
    rings, kinds = len(size), len(lengths)
    shares = {s: _shares(lengths, s, cluster, cost) for s in np.unique(size).tolist()}
    # Columns: sequences of bucket b to ring p, at p * kinds + b; whether ring p is there; the makespan.
    there, last = rings * kinds, rings * (kinds + 1)
    program = Program(
        objective=np.concatenate([np.zeros(last), [1.0]]),
        integer=np.arange(last + 1) < last,
        lower=np.zeros(last + 1),
        upper=np.concatenate([np.tile(count, rings), np.ones(rings), [np.inf]]).astype(np.float64),
    )
    for b in range(kinds):
        program.add([p * kinds + b for p in range(rings)], [1.0] * rings, float(count[b]), float(count[b]))
    program.add([there + p for p in range(rings)], size.astype(float).tolist(), most=float(cluster.ranks))
    for p, s in enumerate(size.tolist()):
        own = list(range(p * kinds, (p + 1) * kinds))
        share = lengths / (limit * s)
        program.add([*own, there + p], [*share.tolist(), -1.0], most=0.0)
        seconds, fixed = shares[s]
        # In units of the time to beat, so that the solver's tolerances are relative ones.
        program.add(
            [*own, there + p, last], [*(seconds / start.seconds), fixed / start.seconds, -1.0], most=0.0
        )
        if p and size[p - 1] == s:
            program.add([there + p - 1, there + p], [1.0, -1.0], least=0.0)
    x, _, proven = program.solve(time_limit)
    if x is None or not proven:
        return start
    sent = np.rint(x[:there]).astype(np.int64).reshape(rings, kinds)
    of = np.empty(len(sizes), np.int64)
    for b in range(kinds):
        of[bucket == b] = np.repeat(np.arange(rings), sent[:, b])
    used, of = np.unique(of, return_inverse=True)
    mixed = Groups(of, size[used], _slowest(sizes, of, size[used], cluster, cost))
    return mixed if mixed.seconds < start.seconds else start
