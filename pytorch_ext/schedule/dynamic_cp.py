# SPDX-License-Identifier: Apache-2.0
"""Megatron's two schedulers of context parallelism with rings of 2^k ranks, as baselines.

* ``variant="hybrid"``: ``hybrid_cp_schedule`` (megatron/core/pipeline_parallel; pull requests 2054 and 2282). Each
  sequence is a micro-batch of its own on the ranks that it needs; groups of ranks fill up until they are balanced.
* ``variant="dynamic"``: ``default_dynamic_cp`` (branch dev, megatron/core/datasets/data_schedule_utils). Each
  group of ranks gets one packed micro-batch a round, none longer than the tallest one.

Both work in rounds. Megatron puts a barrier between rounds; a Schedule needs none, so a rank goes on as soon as its
peers are free, which is no worse. Work is ``length^2 / ranks``, as it is there, not the cost model's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import check_capacity, check_fits, check_lengths
from gapless.schedule.schedule import Pack, Schedule, schedule_of

Ints = NDArray[np.int64]


def plan(
    lengths: ArrayLike,
    *,
    ranks: int | Cluster,
    capacity: ArrayLike,
    cost: CostModel,
    variant: str = "dynamic",
    delta: float = 0.05,
) -> Schedule:
    """A schedule of rounds of rings of 2^k ranks; one of all ranks where a sequence needs them.

    Args:
        variant: "dynamic" or "hybrid".
        delta: "dynamic", the part by which a group may take longer than the tallest; "hybrid", the part of the longest
            group's work by which the groups of a round may differ.

    Raises:
        ValueError: a sequence that all ranks together do not hold.
    """
    if variant not in ("dynamic", "hybrid"):
        raise ValueError(f"variant is {variant!r}: it has to be 'dynamic' or 'hybrid'")
    if not 0 <= delta < float("inf"):
        raise ValueError(f"delta is {delta}: it has to be finite and at least 0")
    sizes, cluster = check_lengths(lengths), Cluster.of(ranks)
    limits = check_capacity(capacity, cluster.ranks)
    room = int(limits.min())
    check_fits(sizes, cluster.ranks * room, cluster.ranks)
    order = np.argsort(-sizes, kind="stable")
    rounds = (_dynamic if variant == "dynamic" else _hybrid)(
        sizes, order.tolist(), cluster.ranks, room, delta
    )
    return schedule_of(
        sizes,
        _packs(rounds, packed=variant == "dynamic"),
        ranks=cluster,
        capacity=limits,
        cost=cost,
        planner=f"dynamic_cp(variant={variant!r})",
    )


@dataclass
class _Group:
    """Ranks that work together for one round."""

    size: int
    members: list[int] = field(default_factory=list)
    tokens: int = 0
    squares: float = 0.0

    @property
    def work(self) -> float:
        return self.squares / self.size

    def add(self, sequence: int, length: int) -> None:
        self.members.append(sequence)
        self.tokens += length
        self.squares += float(length) ** 2

    def pop(self, lengths: Ints) -> int:
        sequence = self.members.pop()
        self.tokens -= int(lengths[sequence])
        self.squares -= float(lengths[sequence]) ** 2
        return sequence


def _packs(rounds: list[list[_Group]], *, packed: bool) -> list[Pack]:
    out, step = [], 0
    for groups in rounds:
        begin, last = 0, step
        for group in groups:
            ring = range(begin, begin + group.size)
            begin += group.size
            batches = [group.members] if packed else [[m] for m in group.members]
            out += [Pack(batch, ring, step + k) for k, batch in enumerate(batches)]
            last = max(last, step + len(batches))
        step = last
    return out


def _needed(length: int, ranks: int, room: int) -> int:
    """The next 2^k of the ranks that hold it, or all."""
    size = 1
    while size * room < length:
        size *= 2
    return min(size, ranks)


def _widen(groups: list[_Group], ranks: int) -> None:
    """Double the smallest group while there are as many idle ranks."""
    idle = ranks - sum(g.size for g in groups)
    while groups:
        smallest = min(range(len(groups)), key=lambda g: (groups[g].size, -groups[g].work, g))
        if (size := groups[smallest].size) > idle:
            return
        groups[smallest].size, idle = 2 * size, idle - size


def _dynamic(lengths: Ints, order: list[int], ranks: int, room: int, delta: float) -> list[list[_Group]]:
    rounds = []
    while order:
        groups, order = _dynamic_round(lengths, order, ranks, room, delta)
        _widen(groups, ranks)
        rounds.append(groups)
    return rounds


def _dynamic_round(
    lengths: Ints, order: list[int], ranks: int, room: int, delta: float
) -> tuple[list[_Group], list[int]]:
    """Groups of one round, and the sequences that are left."""
    by_size: dict[int, list[_Group]] = {}
    work: dict[int, NDArray[np.float64]] = {}
    tokens: dict[int, Ints] = {}
    free, tallest, left = ranks, 0.0, []
    limit = 0.0
    for i in order:
        length = int(lengths[i])
        size = _needed(length, ranks, room)
        if free == ranks:
            tallest = float(length) ** 2 / size
            limit = tallest * (1 + delta)
        best: tuple[float, int, int] | None = None  # projected time, ranks, group or -1 for new ones
        while size <= ranks:
            own = float(length) ** 2 / size
            groups = by_size.get(size, [])
            if groups:
                count = len(groups)
                fits = tokens[size][:count] + length <= size * room
                after = np.where(fits, work[size][:count] + own, np.inf)
                g = int(after.argmin())
                time = max(tallest, float(after[g]))
                if time <= limit and (best is None or time < best[0]):
                    best = (time, size, g)
            if size <= free and max(tallest, own) <= limit and (best is None or max(tallest, own) < best[0]):
                best = (max(tallest, own), size, -1)
            if best is not None and best[0] <= tallest:
                break
            size *= 2
        if best is None:
            left.append(i)
            continue
        tallest, size, g = best
        groups = by_size.setdefault(size, [])
        if g < 0:
            g = len(groups)
            groups.append(_Group(size))
            free -= size
            for table in (work, tokens):
                table.setdefault(size, np.zeros(ranks // size, np.float64 if table is work else np.int64))
        groups[g].add(i, length)
        work[size][g], tokens[size][g] = groups[g].work, groups[g].tokens
    return [g for size in sorted(by_size, reverse=True) for g in by_size[size]], left


def _hybrid(lengths: Ints, order: list[int], ranks: int, room: int, delta: float) -> list[list[_Group]]:
    rounds = []
    while order:
        groups, order = _hybrid_round(lengths, order, ranks, room, delta)
        _widen(groups, ranks)
        rounds.append(groups)
    return rounds


def _buckets(lengths: Ints, order: list[int], need: dict[int, int]) -> list[deque[int]]:
    """Runs of similar work, as many as there are sizes of rings; one is closed when it is a tenth over its part."""
    work = {i: float(lengths[i]) ** 2 / need[i] for i in order}
    part = sum(work.values()) / len(set(need.values()))
    buckets: list[deque[int]] = [deque()]
    filled = 0.0
    for i in order:
        if filled > 1.1 * part:
            buckets.append(deque())
            filled = 0.0
        buckets[-1].append(i)
        filled += work[i]
    return buckets


def _hybrid_round(
    lengths: Ints, order: list[int], ranks: int, room: int, delta: float
) -> tuple[list[_Group], list[int]]:
    """Groups of one round, and the sequences that are left."""
    need = {i: _needed(int(lengths[i]), ranks, room) for i in order}
    buckets = _buckets(lengths, order, need)
    groups: list[_Group] = []
    by_size: dict[int, list[tuple[float, int]]] = {}  # heaps of (work, group)
    work = np.zeros(ranks)
    free, last = ranks, 0

    def slack() -> float:
        return work[: len(groups)].max() - (0.0 if free else work[: len(groups)].min())

    while True:
        source = next((b for b in buckets if b and (need[b[0]] <= free or need[b[0]] in by_size)), None)
        if source is None:
            break
        size = need[source[0]]
        if size < last and slack() <= delta * work[: len(groups)].max():
            break
        last = size
        same = by_size.setdefault(size, [])
        if size <= free and not (same and same[0][0] == 0):
            lightest = len(groups)
            groups.append(_Group(size))
            free -= size
        else:
            lightest = heappop(same)[1]
        groups[lightest].add(i := source.popleft(), int(lengths[i]))
        work[lightest] = groups[lightest].work
        heappush(same, (groups[lightest].work, lightest))
    left = [i for b in buckets for i in b]
    while True:  # hand back the last sequence of the heaviest group while that evens the round out
        heaviest = int(work[: len(groups)].argmax())
        if len(groups[heaviest].members) < 2:
            break
        before = slack()
        i = groups[heaviest].pop(lengths)
        work[heaviest] = groups[heaviest].work
        if slack() >= before:
            groups[heaviest].add(i, int(lengths[i]))
            work[heaviest] = groups[heaviest].work
            break
        left.append(i)
    return groups, sorted(left, key=lambda i: (-lengths[i], i))
