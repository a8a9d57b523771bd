# SPDX-License-Identifier: Apache-2.0
"""Hydraulis: for each batch the best of several parallel strategies, whose replicas may differ (arXiv:2412.07894).

Stage 1 dispatches sequences to the replicas of a strategy, stage 2 packs each replica's into micro-batches for the
shortest pipeline (:mod:`gapless.schedule.stages`). Both are greedy with local search here; :func:`exact` solves both at
once on small batches, so that what the greedy way loses is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.bins import loads, multifit
from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import check_count, check_lengths
from gapless.schedule.one_rank import finish_times, one_rank_schedule
from gapless.schedule.schedule import Schedule
from gapless.schedule.solver import Program
from gapless.schedule.stages import micro_batches, pipeline_seconds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_TRIES = 2000  # of packing a replica anew, in the local search
MOST_ITEMS = 15_000  # in all those tries
MOST_KICKS = 100
ENOUGH = 1e-3  # over the lower bound
MOST_CANDIDATES = 64  # of a replica, looked at in one step


@dataclass(frozen=True)
class Replica:
    """Devices that hold one copy of the model.

    Attributes:
        capacity: most tokens of a micro-batch, and so of a sequence.
        tp: tensor-parallel devices of each stage.
        stages: pipeline stages.
        speed: of one stage, relative to the one device of the cost model; None: ``tp`` times as fast.
    """

    capacity: int
    tp: int = 1
    stages: int = 1
    speed: float | None = None

    def __post_init__(self) -> None:
        for name in ("capacity", "tp", "stages"):
            check_count(getattr(self, name), name)
        if self.speed is not None and not 0 < self.speed < np.inf:
            raise ValueError(f"speed is {self.speed}: it has to be above 0 and finite")

    @property
    def devices(self) -> int:
        return self.tp * self.stages


@dataclass(frozen=True)
class Strategy:
    """Replicas that train one batch together: the ranks of its schedule, in this order."""

    replicas: tuple[Replica, ...]
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "replicas", tuple(self.replicas))
        if not self.replicas:
            raise ValueError("replicas is empty: a strategy has at least one")

    @property
    def devices(self) -> int:
        return sum(replica.devices for replica in self.replicas)

    @property
    def capacity(self) -> Ints:
        """int64 [replicas], tokens."""
        return np.array([replica.capacity for replica in self.replicas], np.int64)

    @property
    def cluster(self) -> Cluster:
        return Cluster(
            len(self.replicas),
            stages=tuple(replica.stages for replica in self.replicas),
            speed=tuple(float(replica.speed or replica.tp) for replica in self.replicas),
        )


class Solution(NamedTuple):
    """A packing of one batch for one strategy.

    Attributes:
        bin_of: int64 [n], the micro-batch of each sequence.
        rank_of: int64 [micro-batches], the replica of each.
        seconds: until the last replica is done.
        bound: seconds that no packing goes below, as far as is proven.
    """

    bin_of: Ints
    rank_of: Ints
    seconds: float
    bound: float


def plan(
    lengths: ArrayLike,
    *,
    strategies: Sequence[Strategy],
    cost: CostModel,
    solve: str = "greedy",
    time_limit: float = 10.0,
) -> Schedule:
    """The best strategy's schedule for this batch, as played; its replicas are the ranks of the schedule.

    Args:
        lengths: [n], tokens of each sequence.
        strategies: to choose from; one that cannot hold the longest sequence is left out.
        cost: times of one device.
        solve: "greedy", or "exact" for small batches (needs scipy): the result depends on the machine's speed where
            ``time_limit`` seconds do not suffice.

    Raises:
        ValueError: no strategy can hold the longest sequence.
    """
    sizes = check_lengths(lengths)
    if solve not in ("greedy", "exact"):
        raise ValueError(f"solve is {solve!r}: it has to be 'greedy' or 'exact'")
    if not strategies:
        raise ValueError("strategies is empty: there has to be one")
    most = max(int(strategy.capacity.max()) for strategy in strategies)
    if sizes.max(initial=0) > most:
        i = int(sizes.argmax())
        raise ValueError(
            f"lengths[{i}] is {sizes[i]}: no replica of any strategy holds more than {most} tokens; "
            f"one with a capacity of {sizes[i]} would do"
        )
    schedules = []
    for strategy in strategies:
        if sizes.max(initial=0) > strategy.capacity.max():
            continue
        full = np.flatnonzero(sizes)
        found = greedy(sizes[full], strategy=strategy, cost=cost)
        if solve == "exact":
            found = exact(sizes[full], strategy=strategy, cost=cost, time_limit=time_limit)
        bin_of = np.zeros(len(sizes), np.int64)
        bin_of[full] = found.bin_of
        schedules.append(
            one_rank_schedule(
                sizes,
                bin_of,
                found.rank_of,
                cluster=strategy.cluster,
                capacity=strategy.capacity,
                cost=cost,
                planner=f"hydraulis({strategy.name or strategies.index(strategy)}, {solve})",
            )
        )
    return min(schedules, key=lambda s: s.makespan)


def greedy(lengths: ArrayLike, *, strategy: Strategy, cost: CostModel) -> Solution:
    """Dispatch and packing by greedy rules and local search, without a solver.

    Raises:
        ValueError: a sequence is longer than every replica's capacity.
    """
    given = check_lengths(lengths)
    order = np.lexsort((np.arange(len(given)), -given))
    # From the longest down, so that the search does not depend on the order of the batch.
    sizes = given[order]
    search = _Search(sizes, strategy, cost)
    starts = [_to_first_done(sizes, strategy, cost)]
    if len(sizes):
        cluster = strategy.cluster
        work = _with_overhead(sizes, strategy, cost)
        starts.append(
            multifit(work, cluster.ranks, sizes=sizes, longest=strategy.capacity, speeds=cluster.throughputs)
        )
    best = search.perturbed(min((search.improve(start) for start in starts), key=search.seconds))
    found = search.solution(best)
    bin_of = np.empty(len(given), np.int64)
    bin_of[order] = found.bin_of
    return found._replace(bin_of=bin_of)


def _with_overhead(sizes: Ints, strategy: Strategy, cost: CostModel) -> Floats:
    """Work with the share of a micro-batch's overhead that so many tokens bring with them."""
    return cost.work(sizes) + cost.overhead * sizes / strategy.capacity.min()


def _to_first_done(sizes: Ints, strategy: Strategy, cost: CostModel) -> Ints:
    """The replica of each sequence, sorted from the longest: to the one that would be done first, bubbles included."""
    cluster, capacity = strategy.cluster, strategy.capacity
    if sizes.max(initial=0) > capacity.max():
        i = int(sizes.argmax())
        raise ValueError(f"lengths[{i}] is {sizes[i]}: no replica holds more than {capacity.max()} tokens")
    bubbles = cluster.stages_of - 1
    total, largest = np.zeros(cluster.ranks), np.zeros(cluster.ranks)
    replica = np.empty(len(sizes), np.int64)
    for i, own in enumerate(_with_overhead(sizes, strategy, cost)):
        done = (total + own + bubbles * np.maximum(largest, own)) / cluster.throughputs
        r = int(np.where(sizes[i] <= capacity, done, np.inf).argmin())
        replica[i] = r
        total[r] += own
        largest[r] = max(largest[r], own)
    return replica


class _Search:
    """Moves and swaps of sequences between the replica that is done last and others, each packed anew."""

    def __init__(self, sizes: Ints, strategy: Strategy, cost: CostModel) -> None:
        self.sizes, self.strategy, self.cost = sizes, strategy, cost
        self.work = cost.work(sizes)
        self.replicas = strategy.replicas
        self.cluster, self.capacity = strategy.cluster, strategy.capacity
        self.speeds, self.stages = self.cluster.speeds, self.cluster.stages_of
        self.known: dict[tuple[int, bytes], float] = {}
        self.tries, self.items = MOST_TRIES, MOST_ITEMS

    def pack(self, r: int, members: Ints) -> Ints:
        return micro_batches(
            self.sizes[members], capacity=int(self.capacity[r]), cost=self.cost, stages=int(self.stages[r])
        )

    def replica_seconds(self, r: int, members: Ints) -> float:
        """When replica r is done with these sequences, ascending."""
        if not len(members):
            return 0.0
        key = (self.replicas.index(self.replicas[r]), self.sizes[members].tobytes())
        if key not in self.known:
            self.tries -= 1
            self.items -= len(members)
            each = loads(bins := self.pack(r, members), self.work[members], int(bins.max()) + 1)
            each = each[np.bincount(bins) > 0] + self.cost.overhead
            self.known[key] = pipeline_seconds(each, int(self.stages[r])) / float(self.speeds[r])
        return self.known[key]

    def seconds(self, replica: Ints) -> float:
        return max(self.replica_seconds(r, np.flatnonzero(replica == r)) for r in range(self.cluster.ranks))

    def improve(self, replica: Ints) -> Ints:
        """A better dispatch, by steps that each lower the time of the last replica."""
        self.tries, self.items = MOST_TRIES, MOST_ITEMS
        return self._descend(replica)

    def perturbed(self, replica: Ints) -> Ints:
        """The best of many dispatches, each improved from the best so far with a few sequences moved at random."""
        self.tries, self.items = MOST_TRIES, MOST_ITEMS
        rng = np.random.default_rng(0)
        best, seconds = replica, self.seconds(replica)
        enough = float(self.work.sum() / self.cluster.throughputs.sum()) * (1 + ENOUGH)
        fits = self.sizes[:, None] <= self.capacity
        loose = np.flatnonzero(fits.sum(1) > 1)
        for kick in range(MOST_KICKS if len(loose) else 0):
            if seconds <= enough or self.tries <= 0 or self.items <= 0:
                break
            trial = best.copy()
            for i in rng.choice(loose, 2 + kick % 3):
                trial[i] = rng.choice(np.flatnonzero(fits[i]))
            trial = self._descend(trial)
            if (end := self.seconds(trial)) < seconds:
                best, seconds = trial, end
        return best

    def _descend(self, replica: Ints) -> Ints:
        replica = replica.copy()
        while self._step(replica):
            pass
        return replica

    def _step(self, replica: Ints) -> bool:
        members = [np.flatnonzero(replica == r) for r in range(self.cluster.ranks)]
        times = np.array([self.replica_seconds(r, own) for r, own in enumerate(members)])
        last = int(times.argmax())
        others = [r for r in np.argsort(times, kind="stable").tolist() if r != last]
        for r in others:
            give, take = self._candidates(members[last], members[r], last, r, times)
            for i, j in zip(give.tolist(), take.tolist(), strict=True):
                if self.tries <= 0 or self.items <= 0:
                    return False
                mine = np.sort(np.append(members[last][members[last] != i], [j] if j >= 0 else []))
                theirs = np.sort(np.append(members[r][members[r] != j], i))
                if self._accept(replica, last, r, mine.astype(np.int64), theirs, times[last]):
                    return True
        # Replicas of different kinds may be better off with all that the other has.
        return any(self._accept(replica, last, r, members[r], members[last], times[last]) for r in others)

    def _accept(self, replica: Ints, last: int, r: int, mine: Ints, theirs: Ints, limit: float) -> bool:
        """Give the two replicas these sequences, if they fit and both are then done before ``limit``."""
        if any(self.sizes[own].max(initial=0) > self.capacity[q] for q, own in ((last, mine), (r, theirs))):
            return False
        if max(self.replica_seconds(last, mine), self.replica_seconds(r, theirs)) >= limit:
            return False
        replica[mine], replica[theirs] = last, r
        return True

    def _candidates(self, mine: Ints, others: Ints, last: int, r: int, times: Floats) -> tuple[Ints, Ints]:
        """Pairs (given, taken or -1) that may end before the last replica now does, the most even first."""
        totals = [float(self.work[own].sum()) for own in (mine, others)]
        mine, others = (
            own[np.lexsort((own, -self.sizes[own]))][:: max(1, len(own) // MOST_CANDIDATES)]
            for own in (mine[self.sizes[mine] <= self.capacity[r]], others)
        )
        others = others[self.sizes[others] <= self.capacity[last]]
        give, take = (grid.ravel() for grid in np.meshgrid(mine, np.append(others, -1), indexing="ij"))
        moved = self.work[give] - np.append(self.work, 0.0)[take]
        throughputs = self.cluster.throughputs
        # No pipeline is faster than without bubbles and overhead; most keep about those that they have.
        least = np.maximum((totals[0] - moved) / throughputs[last], (totals[1] + moved) / throughputs[r])
        ends = np.maximum(times[last] - moved / throughputs[last], times[r] + moved / throughputs[r])
        order = np.argsort(ends, kind="stable")
        order = order[(least[order] < times[last]) & (moved[order] > 0)]
        return give[order], take[order]

    def solution(self, replica: Ints) -> Solution:
        """Each replica's sequences packed."""
        bin_of, rank_of = np.zeros(len(replica), np.int64), [np.zeros(0, np.int64)]
        for r in range(self.cluster.ranks):
            members = np.flatnonzero(replica == r)
            if len(members):
                used, bins = np.unique(self.pack(r, members), return_inverse=True)
                bin_of[members] = bins + sum(map(len, rank_of))
                rank_of.append(np.full(len(used), r))
        return self.packed(bin_of, np.concatenate(rank_of))

    def packed(self, bin_of: Ints, rank_of: Ints, bound: float = 0.0) -> Solution:
        """The solution of such micro-batches."""
        ends = finish_times(self.sizes, bin_of, rank_of, cluster=self.cluster, cost=self.cost)
        least = float(self.work.sum() / self.cluster.throughputs.sum())
        return Solution(bin_of, rank_of, float(ends.max()), max(bound, least))


def exact(lengths: ArrayLike, *, strategy: Strategy, cost: CostModel, time_limit: float = 10.0) -> Solution:
    """Dispatch and packing at once, by a mixed-integer program (HiGHS); what :func:`greedy` found if that is better.

    Minimises the time of the last replica, ``(sum_j T_j + (stages - 1) max_j T_j) / throughput``, where T are the
    seconds of its micro-batches. One is named after its largest sequence, so that no two solutions differ in names
    alone.

    Raises:
        ImportError: scipy is not installed.
        ValueError: a sequence is longer than every replica's capacity.
    """
    sizes = check_lengths(lengths)
    search = _Search(sizes, strategy, cost)
    start = greedy(sizes, strategy=strategy, cost=cost)
    if not len(sizes) or not start.seconds:
        return start._replace(bound=start.seconds)
    ranks, unit = len(strategy.replicas), start.seconds
    order = np.lexsort((np.arange(len(sizes)), -sizes))
    # In units of the time to beat, so that the solver's tolerances are relative ones.
    work, overhead = search.work[order] / unit, cost.overhead / unit
    # The i-th largest sequence may go to replica r into the micro-batch of the j-th, j <= i.
    choices = [
        (i, r, j)
        for i in range(len(order))
        for r in range(ranks)
        for j in range(i + 1)
        if sizes[order[j]] <= strategy.capacity[r]
        and (i == j or sizes[order[[i, j]]].sum() <= strategy.capacity[r])
    ]
    at = {choice: column for column, choice in enumerate(choices)}
    most, last = (
        len(choices),
        len(choices) + ranks,
    )  # columns of the largest micro-batches, and of the makespan
    program = Program(
        objective=np.concatenate([np.zeros(last), [1.0]]),
        integer=np.arange(last + 1) < most,
        lower=np.zeros(last + 1),
        upper=np.concatenate([np.ones(most), np.full(ranks, np.inf), [1.0 + 1e-9]]),
    )
    program.lower[last] = start.bound / unit * (1 - 1e-9)
    for i in range(len(order)):
        columns = [at[c] for c in choices if c[0] == i]
        program.add(columns, [1.0] * len(columns), 1.0, 1.0)
    for r, replica in enumerate(strategy.replicas):
        mine = [c for c in choices if c[1] == r]
        own = [float(work[i]) + overhead * (i == j) for i, _, j in mine]
        program.add(
            [*map(at.__getitem__, mine), most + r, last],
            [*own, replica.stages - 1.0, -float(search.cluster.throughputs[r])],
            most=0.0,
        )
        for j in range(len(order)):
            batch = [(at[c], value, c[0]) for c, value in zip(mine, own, strict=True) if c[2] == j]
            if not batch:
                continue
            head = at[j, r, j]
            program.add([*(c for c, _, _ in batch), most + r], [*(v for _, v, _ in batch), -1.0], most=0.0)
            tokens = [float(sizes[order[i]]) / replica.capacity for _, _, i in batch]
            rest = [(c, t) for (c, _, i), t in zip(batch, tokens, strict=True) if i != j]
            room = 1 - float(sizes[order[j]]) / replica.capacity
            if rest:
                program.add([*(c for c, _ in rest), head], [*(t for _, t in rest), -room], most=0.0)
            for c, _ in rest:
                program.add([c, head], [1.0, -1.0], most=0.0)
    x, bound, proven = program.solve(time_limit)
    found = start
    if x is not None:
        chosen = [c for c in choices if x[at[c]] > 0.5]
        heads = {(r, j): b for b, (r, j) in enumerate(sorted({(r, j) for _, r, j in chosen}))}
        bin_of = np.empty(len(sizes), np.int64)
        for i, r, j in chosen:
            bin_of[order[i]] = heads[r, j]
        trial = search.packed(bin_of, np.array([r for r, _ in heads], np.int64))
        found = min(found, trial, key=lambda solution: solution.seconds)
    return found._replace(bound=found.seconds if proven else max(start.bound, bound * unit))
