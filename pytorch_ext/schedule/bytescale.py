# SPDX-License-Identifier: Apache-2.0
"""ByteScale's hybrid data parallelism (HDP; arXiv:2502.21231, sections 4 and 5): a ring of any size per sequence.

A rank has a capacity in tokens instead of a place in a mesh: short sequences stay whole on one rank, a long one spans
as many ranks as it needs. Three planners:

* ``balance=None``, naive HDP: the paper's algorithm 1.
* ``method="greedy"``: the paper's algorithm 2, with ``balance="dp"`` or ``"pp"``.
* ``method="search"`` (the default): the same freedom, but sizes of rings are chosen by time. A target for the last
  rank is raised from a lower bound until a plan meets it: longest first, each sequence gets the ring that wastes
  fewest rank-seconds of what the target allows, and the short ones fill up the rest (csrc/plan/hdp.cpp). Where every
  sequence fits a rank, multifit with swaps may end sooner, and is taken then (gapless.schedule.packing).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless import _planner
from gapless.schedule import packing
from gapless.schedule.bytescale_paper import Plan, greedy, in_order
from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import check_capacity, check_lengths
from gapless.schedule.offloading import check_holds, needed, offload_limit, ring_sizes
from gapless.schedule.regroup import regroup
from gapless.schedule.schedule import Schedule

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ENOUGH = 0.005  # over the lower bound: what is left is not worth looking for
MOST_SHARED = 3  # sequences a rank that are tried as shared ones
FEW = 32  # sequences a rank: of more of them, whole ones come out even
MOST_REGROUPED = 32  # packs
STARTS = 8  # plans from which packs are regrouped
MOST_SWAPPED = (
    2**14
)  # sequences among which whole ones are swapped until ranks are even: a second of planning

# How far above its bound the target is tried; a plan that meets one ends the search.
_GAPS = (0.0, 0.003, 0.01, 0.02, 0.03, 0.045, 0.07, 0.12, 0.25, 0.6)


def plan(
    lengths: ArrayLike,
    *,
    ranks: int | Cluster,
    capacity: ArrayLike,
    cost: CostModel,
    balance: str | None = "dp",
    offload: bool = True,
    method: str = "search",
    delta: float = 0.0,
    two_level: bool = True,
) -> Schedule:
    """A schedule of one global batch by hybrid data parallelism.

    Args:
        lengths: tokens of each sequence.
        ranks: how many, or a cluster.
        capacity: tokens whose activations a rank holds, one number or one a rank. Naive and greedy HDP know only one
            capacity, and take the smallest.
        cost: of the model and the machine.
        balance: "dp", the ranks end together; "pp", each rank is a pipeline (``cluster.stages``) and its micro-batches
            are of similar size, so that few bubbles are left; None, naive HDP.
        offload: whether long sequences hand activations to the host where that hides behind computing, and
            thereby need fewer ranks (:func:`~gapless.schedule.offloading.least_ranks`).
        method: of balancing, "search" or "greedy".
        delta: greedy only, seconds by which a rank has to be behind the last one to get more work; if none is, all do.
        two_level: whether rings over whole nodes use all their network cards (:class:`gapless.schedule.Schedule`); not
            in the paper, whose rings are of one level.

    Raises:
        ValueError: a sequence that all ranks together do not hold, and what :mod:`gapless.schedule.inputs` refuses.
    """
    if balance not in (None, "dp", "pp"):
        raise ValueError(f"balance is {balance!r}: it has to be 'dp', 'pp' or None")
    if method not in ("search", "greedy"):
        raise ValueError(f"method is {method!r}: it has to be 'search' or 'greedy'")
    if not 0 <= delta < float("inf"):
        raise ValueError(f"delta is {delta}: it has to be finite and at least 0 seconds")
    sizes, cluster = check_lengths(lengths), Cluster.of(ranks)
    limits = check_capacity(capacity, cluster.ranks)
    share = cost.resident_share(offload_limit(sizes, cost) if offload else np.zeros(len(sizes)))
    options = {"balance": balance, "method": method, "offload": offload, "two_level": two_level}
    if balance is None or method == "greedy":
        smallest = int(limits.min())
        check_holds(sizes, share, np.full(cluster.ranks, smallest))
        bound = float(cost.work(sizes).sum() / cluster.throughputs.sum())
        rings = ring_sizes(
            sizes, capacity=smallest, cost=cost, ranks=cluster.ranks, seconds=bound, offload=offload
        )
        if balance is None:
            found = in_order(sizes, rings, smallest, cluster)
            del options["method"]
        else:
            found = greedy(sizes, rings, smallest, cluster, cost, from_all=balance == "pp", delta=delta)
    else:
        check_holds(sizes, share, limits)
        found = _search(sizes, share, limits, cluster, cost, pipelines=balance == "pp", two_level=two_level)

    def schedule(found: Plan) -> Schedule:
        pack_of, rank_offsets, ring_ranks, steps = found
        return Schedule(
            lengths=sizes,
            pack_of=pack_of,
            rank_offsets=rank_offsets,
            ring_ranks=ring_ranks,
            steps=steps,
            offload=_ratios(sizes, pack_of, rank_offsets, ring_ranks, limits, cost),
            capacity=limits,
            cluster=cluster,
            cost=cost,
            two_level=two_level,
            planner=f"bytescale({', '.join(f'{name}={value!r}' for name, value in options.items())})",
        )

    best = schedule(found)
    if balance != "dp" or method != "search":
        return best
    plans = [best]
    for shared in _remainders(sizes, cluster) if best.gap > ENOUGH else ():
        rest = np.setdiff1d(np.arange(len(sizes)), shared)
        others = _search(
            sizes[rest], share[rest], limits, cluster, cost, pipelines=False, two_level=two_level
        )
        joined = _shared_first(sizes, shared, rest, others, int(limits.min()), cluster.ranks)
        if joined is not None:
            plans.append(schedule(joined))
    if sizes.max(initial=0) <= limits.min() and len(sizes) <= MOST_SWAPPED:
        whole = packing.plan(sizes, ranks=cluster, capacity=limits, cost=cost)
        plans.append(replace(whole, two_level=two_level, planner=best.planner))
    best = min(plans, key=lambda s: s.makespan)
    if cluster.nodes == 1 and cluster.stages_of.max() == 1 and best.gap > ENOUGH:
        plans = sorted((s for s in plans if s.packs <= MOST_REGROUPED), key=lambda s: s.makespan)[:STARTS]
        best = min([best, *map(regroup, plans)], key=lambda s: s.makespan)
    return best


def _remainders(lengths: Ints, cluster: Cluster) -> Iterator[Ints]:
    """Sequences that all ranks of the one node could share, so that the others come out even: longest, or shortest.

    Where there are few sequences a rank, whole ones leave ranks idle: five equal ones take two ranks as long as six.
    """
    if cluster.nodes > 1 or cluster.ranks == 1:
        return
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    if len(order) > FEW * cluster.ranks:
        return
    for count in range(1, min(len(order), MOST_SHARED * cluster.ranks) + 1):
        yield order[:count]
        yield order[len(order) - count :]


def _shared_first(
    lengths: Ints, shared: Ints, rest: Ints, others: Plan, capacity: int, ranks: int
) -> Plan | None:
    """The plan ``others`` of the ``rest``, after packs of the ``shared`` on all ranks; None if one does not fit."""
    pack_of, offsets, ring_ranks, steps = others
    if lengths[shared].max() > capacity * ranks:
        return None
    pack, room = -1, 0
    place = np.empty(len(lengths), np.int64)
    for i in shared.tolist():
        if lengths[i] > room:
            pack, room = pack + 1, capacity * ranks
        place[i], room = pack, room - int(lengths[i])
    count = pack + 1
    place[rest] = pack_of + count
    return (
        place,
        np.concatenate([np.arange(count) * ranks, offsets + count * ranks]),
        np.concatenate([np.tile(np.arange(ranks), count), ring_ranks]),
        np.concatenate([np.arange(count), steps + count]),
    )


def _ratios(
    lengths: Ints, pack_of: Ints, offsets: Ints, ring_ranks: Ints, limits: Ints, cost: CostModel
) -> Floats:
    """float64 [packs], the least that has to be offloaded for each pack to fit its ranks."""
    if len(offsets) == 1:
        return np.empty(0)
    tokens = np.bincount(pack_of, weights=lengths, minlength=len(offsets) - 1).astype(np.int64)
    smallest = np.minimum.reduceat(limits[ring_ranks], offsets[:-1])
    return needed(-(-tokens // np.diff(offsets)), smallest, cost)


def _search(
    lengths: Ints,
    share: Floats,
    limits: Ints,
    cluster: Cluster,
    cost: CostModel,
    *,
    pipelines: bool,
    two_level: bool,
) -> Plan:
    """The first plan that meets a target close to its bound, or else the best of all tries.

    A pipeline of S stages takes ``sum(t) + (S - 1) max(t)`` for micro-batches of t seconds a stage, so that a limit on
    the longest one is searched as well: a share of the target. Without pipelines a second share makes parts smaller
    and easier to fit.
    """
    stages = np.ascontiguousarray(cluster.stages_of)
    most = int(stages.max()) if pipelines else 1
    attention, linear = cost.attention(cost.cells(lengths)), cost.linear(lengths)
    throughput = np.ascontiguousarray(cluster.throughputs)
    handed = cost.layers * (1 + cost.backward_kv) * cost.kv_bytes
    # Each micro-batch costs its overhead; at least so many are needed.
    packs = max(len(limits), float((lengths * share).sum()) / limits.max()) if lengths.any() else 0
    even = float((attention + linear).sum() + cost.overhead * packs) / throughput.sum()
    alone = _alone(lengths, share, limits, cluster, cost, two_level)
    best: tuple[Any, ...] | None = None

    def attempt(finish: float, longest: float) -> float:
        nonlocal best
        *found, last, makespan = _planner.hdp_plan(
            lengths,
            attention,
            linear,
            share,
            limits,
            throughput,
            stages,
            ranks_per_node=cluster.ranks_per_node,
            overhead=cost.overhead,
            node_token=handed / cost.node_bandwidth,
            network_token=handed / cost.network_bandwidth,
            sharing=cluster.sharing,
            hop=2 * cost.latency * cost.layers,
            two_level=two_level,
            finish=finish,
            longest=longest,
        )
        end = makespan if pipelines else last
        if best is None or end < best[0]:
            best = (end, *found)
        return end

    for part in (1 / most, 0.5 / most, 0.25 / most)[: 3 if most > 1 else 2]:
        bound = max(even / (1 - (most - 1) * part), alone / part)
        for gap in _GAPS:
            target = bound * (1 + gap)
            if best is not None and target >= best[0]:
                break
            if attempt(target * (1 - (most - 1) * part), target * part) <= target * (1 + 1e-9):
                break
            if gap == 0 and lengths.max(initial=0) <= limits.min():
                attempt(np.inf, np.inf)  # whole sequences, longest first: never further off than that rule
    assert best is not None
    return best[1:]


def _alone(
    lengths: Ints, share: Floats, limits: Ints, cluster: Cluster, cost: CostModel, two_level: bool
) -> float:
    """Seconds that the longest sequence takes at least, on the ring that is best for it."""
    if not lengths.any():
        return 0.0
    i = lengths.argmax()
    n = np.arange(1, cluster.ranks + 1)
    fits = -(-lengths[i] // n) * share[i] <= limits.max() * (1 + 1e-9)
    fits &= n <= max(n[fits][0], lengths[i] // 2)  # each holds two chunks
    computing = cost.attention(cost.cells(lengths[i])) / n / cluster.throughputs.max()
    across = n > cluster.ranks_per_node
    width = cluster.widths(n, two_level)
    ring = cost.ring(lengths[i], n, across, width, cluster.sharing) / cluster.stages_of.max()
    rest = (cost.linear(lengths[i]) / n + cost.overhead) / cluster.throughputs.max()
    return float((np.maximum(computing, ring) + rest)[fits].min())
