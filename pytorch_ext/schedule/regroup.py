# SPDX-License-Identifier: Apache-2.0
"""Small batches: sequences move to other packs and ranks, one after another, while the last rank ends sooner.

A micro-batch costs something whatever is in it, and a ring has room beside its longest sequence, which a planner that
places sequence by sequence does not see. Only for one node, without pipelines and without anything offloaded anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gapless.schedule.schedule import Pack, Schedule, schedule_of

Floats = NDArray[np.float64]

MOST_PLACED = 30_000  # packs, in all tries


@dataclass
class _Group:
    """A pack that is not yet certified."""

    sequences: tuple[int, ...]
    ring: tuple[int, ...]
    offload: float


class _Groups:
    """Packs in the order in which ranks take them, and how long that takes."""

    def __init__(self, s: Schedule) -> None:
        order = np.argsort(s.steps, kind="stable").tolist()
        self.groups = [_Group(tuple(s.sequences(p).tolist()), s.ring(p), float(s.offload[p])) for p in order]
        cost = s.cost
        self.lengths = s.lengths.tolist()
        self.attention = cost.attention(cost.cells(s.lengths)).tolist()
        self.linear = cost.linear(s.lengths).tolist()
        self.overhead = cost.overhead
        self.speeds, self.capacity = s.cluster.speeds.tolist(), s.capacity.tolist()
        self.handed = [float(cost.ring(1, n)) - float(cost.ring(0, n)) for n in range(1, s.ranks + 1)]
        self.hops = [float(cost.ring(0, n)) for n in range(1, s.ranks + 1)]

    def fits(self, group: _Group) -> bool:
        tokens = sum(self.lengths[i] for i in group.sequences)
        return -(-tokens // len(group.ring)) <= min(self.capacity[r] for r in group.ring)

    def seconds(self, group: _Group) -> float:
        n, speed = len(group.ring), min(self.speeds[r] for r in group.ring)
        tokens = sum(self.lengths[i] for i in group.sequences)
        attention = sum(self.attention[i] for i in group.sequences) / n / speed
        linear = sum(self.linear[i] for i in group.sequences) / n
        ring = self.hops[n - 1] + tokens * self.handed[n - 1]
        return max(attention, ring) + (linear + self.overhead) / speed

    def free(self, groups: list[_Group]) -> list[float]:
        """When each rank is done."""
        free = [0.0] * len(self.capacity)
        for group in groups:
            end = max(free[r] for r in group.ring) + self.seconds(group)
            for r in group.ring:
                free[r] = end
        return free

    def moves(self) -> Iterator[list[_Group]]:
        """Each sequence, and each pack as a whole, in each other pack with room, or alone on the first free ranks."""
        for source, group in enumerate(self.groups):
            parts = {group.sequences, *((i,) for i in group.sequences)}
            for moved in sorted(parts):
                rest = tuple(i for i in group.sequences if i not in moved)
                without = list(self.groups)
                without[source] = _Group(rest, group.ring, group.offload)
                for target, other in enumerate(self.groups):
                    joined = _Group(tuple(sorted(other.sequences + moved)), other.ring, 0.0)
                    if target == source or other.offload or not self.fits(joined):
                        continue
                    changed = list(without)
                    changed[target] = joined
                    yield [g for g in changed if g.sequences]
                others = [g for g in without if g.sequences]
                free = self.free(others)
                first = sorted(range(len(free)), key=free.__getitem__)
                for n in range(1, len(first) + 1):
                    alone = _Group(moved, tuple(sorted(first[:n])), 0.0)
                    if self.fits(alone):
                        yield [*others, alone]


def regroup(schedule: Schedule) -> Schedule:
    """The schedule with fewer or fuller packs, or itself, if no such move makes it end sooner."""
    groups = _Groups(schedule)
    free, placed = groups.free(groups.groups), 0
    best = max(free), sum(free)
    while placed < MOST_PLACED:
        found = None
        for changed in groups.moves():
            placed += len(changed)
            free = groups.free(changed)
            last, total = max(free), sum(free)
            # Where the last rank ends no sooner, fewer seconds of all ranks leave more to move next.
            if last < best[0] * (1 - 1e-9) or (last <= best[0] and total < best[1] * (1 - 1e-9)):
                best, found = (last, total), changed
        if found is None:
            break
        groups.groups = found
    taken = [0] * schedule.ranks
    packs = []
    for group in groups.groups:
        step = max(taken[r] for r in group.ring)
        packs.append(Pack(group.sequences, group.ring, step, group.offload))
        for r in group.ring:
            taken[r] = step + 1
    made = schedule_of(
        schedule.lengths,
        packs,
        ranks=schedule.cluster,
        capacity=schedule.capacity,
        cost=schedule.cost,
        two_level=schedule.two_level,
        planner=schedule.planner,
    )
    return min(schedule, made, key=lambda s: s.makespan)
