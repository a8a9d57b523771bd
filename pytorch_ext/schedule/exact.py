# SPDX-License-Identifier: Apache-2.0
"""The shortest schedule there is, by search over packs, rings and orders: a measure for planners on small batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless import _planner
from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import check_capacity, check_lengths
from gapless.schedule.schedule import Pack, Schedule, schedule_of

MOST_STATES = 200_000


def search(
    lengths: ArrayLike,
    *,
    ranks: int | Cluster,
    capacity: ArrayLike,
    cost: CostModel,
    rings: bool = True,
    most_states: int = MOST_STATES,
) -> tuple[Schedule, bool]:
    """The shortest schedule with one pack in a micro-batch and nothing offloaded, and whether that is proven.

    Args:
        lengths: [n], tokens; at most 16 sequences that are not empty.
        ranks: at most 4, equal ones on one node, without pipeline stages.
        capacity: tokens a rank, the same for all.
        rings: whether sequences may be shared by ranks; if not, each is computed by one.
        most_states: where the search gives up; the schedule is then the best one that it met.

    Raises:
        ValueError: more sequences or ranks, other clusters, or a sequence that fits nowhere.
    """
    sizes = check_lengths(lengths)
    cluster = Cluster.of(ranks)
    limits = check_capacity(capacity, cluster.ranks)
    if cluster.nodes > 1 or (cluster.throughputs != 1).any() or (limits != limits[0]).any():
        raise ValueError("the exact search takes equal ranks of one node, without pipeline stages")
    some = np.flatnonzero(sizes)
    if not len(some):
        packs = [Pack(range(len(sizes)), [0], 0)] if len(sizes) else []
        return schedule_of(sizes, packs, ranks=cluster, capacity=limits, cost=cost), True
    seconds = _seconds(sizes[some], cluster.ranks if rings else 1, cluster.ranks, int(limits[0]), cost)
    makespan, proven, sets, members = _planner.exact_schedule(seconds, len(some), cluster.ranks, most_states)
    if not np.isfinite(makespan):
        i = int(sizes.argmax())
        raise ValueError(
            f"lengths[{i}] is {sizes[i]}: it does not fit on {cluster.ranks} ranks of {limits[0]} tokens"
        )
    packs, next_step = [], np.zeros(cluster.ranks, np.int64)
    for chosen, ring in zip(sets.tolist(), members.tolist(), strict=True):
        ranks_of = [r for r in range(cluster.ranks) if ring >> r & 1]
        step = int(next_step[ranks_of].max())
        next_step[ranks_of] = step + 1
        packs.append(Pack([int(s) for i, s in enumerate(some) if chosen >> i & 1], ranks_of, step))
    packs[0] = Pack(
        [*packs[0].sequences, *np.flatnonzero(sizes == 0).tolist()], packs[0].ranks, packs[0].step
    )
    name = "exact" if proven else "search"
    return schedule_of(sizes, packs, ranks=cluster, capacity=limits, cost=cost, planner=name), proven


def plan(
    lengths: ArrayLike,
    *,
    ranks: int | Cluster,
    capacity: ArrayLike,
    cost: CostModel,
    most_states: int = MOST_STATES,
) -> Schedule:
    """The schedule of :func:`search`. Raises ValueError, as it does, and where the search gave up."""
    schedule, proven = search(lengths, ranks=ranks, capacity=capacity, cost=cost, most_states=most_states)
    if not proven:
        raise ValueError(
            f"lengths has {len(schedule.lengths)} entries: too many for the exact search on these ranks"
        )
    return schedule


def _seconds(
    sizes: NDArray[np.int64], widest: int, ranks: int, limit: int, cost: CostModel
) -> NDArray[np.float64]:
    """float64 [ranks << n], of each ring size and set of sequences; infinite where it does not fit or is too wide."""
    sets = np.arange(1 << len(sizes))
    tokens, cells = np.zeros(len(sets)), np.zeros(len(sets))
    for i, size in enumerate(sizes):
        inside = (sets >> i & 1).astype(bool)
        tokens[inside] += size
        cells[inside] += cost.cells(size)
    out = np.full((ranks, len(sets)), np.inf)
    for ring in range(1, widest + 1):
        fits = np.ceil(tokens / ring) <= limit
        out[ring - 1, fits] = cost.seconds(tokens, cells, ring)[fits]
    return np.ascontiguousarray(out.reshape(-1))
