# SPDX-License-Identifier: Apache-2.0
"""From micro-batches of whole sequences to a schedule whose packs have one rank each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.schedule import Schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def finish_times(lengths: Ints, bin_of: Ints, rank_of: Ints, *, cluster: Cluster, cost: CostModel) -> Floats:
    """Seconds until each rank is done with its bins, float64 [ranks] (:mod:`gapless.schedule.stages`)."""
    seconds = np.bincount(bin_of, cost.work(lengths), len(rank_of)) + cost.overhead
    most = np.zeros(cluster.ranks)
    np.maximum.at(most, rank_of, seconds)
    total = np.bincount(rank_of, seconds, cluster.ranks)
    return (total + (cluster.stages_of - 1) * most) / cluster.throughputs


def one_rank_schedule(
    lengths: Ints,
    bin_of: Ints,
    rank_of: Ints,
    *,
    cluster: Cluster,
    capacity: Ints,
    cost: CostModel,
    planner: str = "",
) -> Schedule:
    """The schedule of bins, each a micro-batch of one rank.

    A rank of one stage takes its costliest micro-batch first. A pipeline takes its costliest in the middle, so that the
    first and the last, beside which stages wait, are the cheapest (verl's order).

    Args:
        lengths: int64 [n].
        bin_of: int64 [n], the bin of each sequence; what it is for a sequence of 0 tokens does not matter.
        rank_of: int64 [bins], the rank of each bin. Bins without tokens are left out.
        capacity: int64 [ranks].
    """
    full = lengths > 0
    bins = len(rank_of)
    tokens = np.bincount(bin_of[full], weights=lengths[full], minlength=bins)
    seconds = np.bincount(bin_of[full], weights=cost.work(lengths[full]), minlength=bins)
    used = np.flatnonzero(tokens)
    used = used[np.lexsort((used, -tokens[used], -seconds[used], rank_of[used]))]
    rank = rank_of[used]
    count = np.bincount(rank, minlength=cluster.ranks)
    place = np.arange(len(used)) - (np.cumsum(count) - count)[rank]
    # Places 0, 2, 4, .. go to the middle and before it, 1, 3, .. after it.
    even = (count[rank] + 1) // 2
    middle_out = np.where(place % 2 == 0, even - 1 - place // 2, even + place // 2)
    steps = np.where(cluster.stages_of[rank] > 1, middle_out, place)
    # Sequences without tokens go with the first pack, which is made for them if there is no other.
    if not len(used) and len(lengths):
        rank, steps = np.zeros(1, np.int64), np.zeros(1, np.int64)
    pack = np.zeros(bins, np.int64)
    pack[used] = np.arange(len(used))
    pack_of = np.zeros(len(lengths), np.int64)
    pack_of[full] = pack[bin_of[full]]
    return Schedule(
        lengths=lengths,
        pack_of=pack_of,
        rank_offsets=np.arange(len(rank) + 1),
        ring_ranks=rank,
        steps=steps,
        offload=np.zeros(len(rank)),
        capacity=capacity,
        cluster=cluster,
        cost=cost,
        planner=planner,
    )
