# SPDX-License-Identifier: Apache-2.0
"""Packing: every sequence stays whole on one rank. The algorithms themselves are in :mod:`gapless.schedule.bins`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.bins import balanced, best_fit_decreasing, karmarkar_karp, loads, lpt, multifit, refine
from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import MOST_TOKENS, check_capacity, check_lengths
from gapless.schedule.one_rank import finish_times, one_rank_schedule
from gapless.schedule.schedule import Schedule
from gapless.schedule.stages import micro_batches

__all__ = ["balanced", "best_fit_decreasing", "karmarkar_karp", "loads", "lpt", "multifit", "plan", "refine"]

Ints = NDArray[np.int64]

MOST_ROUNDS = 4  # of settling a plan


def plan(
    lengths: ArrayLike,
    *,
    ranks: int | Cluster,
    capacity: ArrayLike,
    cost: CostModel,
    method: str = "multifit",
    equal_size: bool = False,
) -> Schedule:
    """Every sequence whole on one rank.

    Methods:
        "lpt": sequences to ranks by time, then each rank's into even micro-batches, as few as best-fit decreasing
            needs, or, for a pipeline, as many as are best for it. Ranks may differ in speed and capacity.
        "multifit": the same with multifit and swaps, or what another method gives where that ends sooner when played.
        "balanced": micro-batches of even cost first, as few as best-fit decreasing needs and the same number for each
            rank, then to ranks.
        "best_fit": as few micro-batches as best-fit decreasing needs, dealt out to the ranks in turn.
        "karmarkar_karp": verl's form: differencing over the ranks, then over the same number of micro-batches on each
            rank, the smallest that keeps to the capacity. Takes ranks as equally fast.

    The last three pack for the smallest capacity of any rank.

    Args:
        lengths: [n], tokens of each sequence.
        ranks: how many, or the cluster.
        capacity: tokens of a micro-batch, one number or one for each rank.
        cost: what to balance by.
        method: see above.
        equal_size: for "karmarkar_karp": the same number of sequences on each rank, or one less.

    Raises:
        ValueError: a sequence is longer than the capacity.
    """
    sizes, cluster = check_lengths(lengths), Cluster.of(ranks)
    limit = check_capacity(capacity, cluster.ranks)
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}: it has to be one of {sorted(_METHODS)}")
    if equal_size and method != "karmarkar_karp":
        raise ValueError(f"equal_size is for karmarkar_karp: method is {method!r}")
    most = int(limit.max() if method in ("multifit", "lpt") else limit.min())
    if sizes.max(initial=0) > most:
        i = int(sizes.argmax())
        raise ValueError(
            f"lengths[{i}] is {sizes[i]}: packing keeps a sequence on one rank, which holds {most} tokens; "
            f"a capacity of {sizes[i]} would do, or a planner that splits sequences"
        )
    full = np.flatnonzero(sizes)
    options = {"equal_size": True} if equal_size else {}
    name = f"packing({method}{', equal_size' if equal_size else ''})"

    def schedule(packed: Packed) -> Schedule:
        bin_of = np.zeros(len(sizes), np.int64)
        bin_of[full] = packed[0]
        return one_rank_schedule(
            sizes, bin_of, packed[1], cluster=cluster, capacity=limit, cost=cost, planner=name
        )

    if not len(full):
        return schedule((np.zeros(0, np.int64), np.zeros(0, np.int64)))
    batch = sizes[full], cluster, limit, cost
    packed = _METHODS[method](*batch, **options)
    best = schedule(packed)
    if method != "multifit":
        return best
    others: list[Callable[..., Packed]] = [_ranks_first(lpt)]
    if sizes.max() <= limit.min():
        others += [_balanced, _best_fit, _by_differencing, partial(_by_differencing, equal_size=True)]
    for other in others:
        trial = other(*batch)
        if (ends := schedule(trial)).makespan < best.makespan:
            packed, best = trial, ends
    for _ in range(MOST_ROUNDS):
        packed = _settled(*batch, packed)
        if (ends := schedule(packed)).makespan >= best.makespan:
            break
        best = ends
    return best


Packed = tuple[Ints, Ints]
"""The bin of each sequence and the rank of each bin."""


def _ranks_first(assign: Callable[..., Ints]) -> Callable[..., Packed]:
    def pack(sizes: Ints, cluster: Cluster, capacity: Ints, cost: CostModel) -> Packed:
        # A micro-batch costs something whatever is in it, and tokens decide how many there will be.
        costs = cost.work(sizes) + cost.overhead * sizes / capacity.min()
        rank = assign(costs, cluster.ranks, sizes=sizes, longest=capacity, speeds=cluster.throughputs)
        return _split_into_micro_batches(sizes, rank, cluster, capacity, cost)

    return pack


def _settled(sizes: Ints, cluster: Cluster, capacity: Ints, cost: CostModel, packed: Packed) -> Packed:
    """Sequences exchanged between ranks once it is known what else than work each rank's micro-batches cost it."""
    bin_of, rank_of = packed
    work = cost.work(sizes)
    ends = finish_times(sizes, bin_of, rank_of, cluster=cluster, cost=cost) * cluster.throughputs
    fixed = np.maximum(ends - loads(rank_of[bin_of], work, cluster.ranks), 0.0)
    # Each rank's fixed cost is an item too large for any other rank, and so stays.
    rank = refine(
        np.concatenate([rank_of[bin_of], np.arange(cluster.ranks)]),
        np.concatenate([work, fixed]),
        cluster.ranks,
        sizes=np.concatenate([sizes, np.full(cluster.ranks, MOST_TOKENS // cluster.ranks // 2)]),
        longest=capacity,
        speeds=cluster.throughputs,
    )[: len(sizes)]
    return _split_into_micro_batches(sizes, rank, cluster, capacity, cost)


def _split_into_micro_batches(
    sizes: Ints, rank: Ints, cluster: Cluster, capacity: Ints, cost: CostModel
) -> Packed:
    def split(r: int, own: Ints) -> Ints:
        return micro_batches(own, capacity=int(capacity[r]), cost=cost, stages=int(cluster.stages_of[r]))

    return _split_ranks(sizes, rank, cluster.ranks, split)


def _split_ranks(sizes: Ints, rank: Ints, ranks: int, split: Callable[[int, Ints], Ints]) -> Packed:
    """Each rank's sequences cut into bins by ``split(rank, sizes)``."""
    order = np.argsort(rank, kind="stable")
    bounds = np.searchsorted(rank[order], np.arange(ranks + 1))
    bin_of, rank_of, bins = np.empty(len(sizes), np.int64), [np.empty(0, np.int64)], 0
    for r in np.flatnonzero(np.diff(bounds)):
        own = order[bounds[r] : bounds[r + 1]]
        inside = split(int(r), sizes[own])
        count = int(inside.max()) + 1
        bin_of[own] = inside + bins
        rank_of.append(np.full(count, r))
        bins += count
    return bin_of, np.concatenate(rank_of)


def _balanced(sizes: Ints, cluster: Cluster, capacity: Ints, cost: CostModel) -> Packed:
    limit, ranks = int(capacity.min()), cluster.ranks
    costs = cost.work(sizes)
    needed = int(best_fit_decreasing(sizes, limit).max()) + 1
    bins = -(-needed // ranks) * ranks
    bin_of = balanced(costs, sizes, limit, bins=bins)
    each = loads(bin_of, costs, bins) + cost.overhead
    return bin_of, lpt(each, ranks, most_items=bins // ranks, speeds=cluster.throughputs)


def _best_fit(sizes: Ints, cluster: Cluster, capacity: Ints, cost: CostModel) -> Packed:
    bin_of = best_fit_decreasing(sizes, int(capacity.min()))
    return bin_of, np.arange(int(bin_of.max()) + 1) % cluster.ranks


def _by_differencing(
    sizes: Ints, cluster: Cluster, capacity: Ints, cost: CostModel, equal_size: bool = False
) -> Packed:
    limit, ranks = int(capacity.min()), cluster.ranks
    rank = karmarkar_karp(cost.work(sizes), ranks, equal_size=equal_size)

    def cut(count: int) -> Packed:
        return _split_ranks(
            sizes, rank, ranks, lambda _, own: karmarkar_karp(cost.work(own), min(count, len(own)))
        )

    count = -(-int(np.bincount(rank, sizes, ranks).max()) // limit)
    while np.bincount((packed := cut(count))[0], sizes).max() > limit:
        count += 1
    return packed


_METHODS: dict[str, Callable[..., Packed]] = {
    "balanced": _balanced,
    "best_fit": _best_fit,
    "karmarkar_karp": _by_differencing,
    "lpt": _ranks_first(lpt),
    "multifit": _ranks_first(multifit),
}
