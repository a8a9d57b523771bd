# SPDX-License-Identifier: Apache-2.0
"""Micro-batches one after another, through the stages of pipelines that rings tie together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gapless.schedule.micro_batches import MicroBatches, connected

if TYPE_CHECKING:
    from gapless.schedule.schedule import Schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FORWARD, BACKWARD = 0, 1


@dataclass(frozen=True, eq=False)
class PlayedPipelines:
    """When micro-batches ran.

    Attributes:
        finish: float64 [ranks], when a rank is done.
        peers: float64 [ranks], seconds of waiting for others to begin, on average over its stages.
        begin: pairs (micro-batches, when they begin: float64 [them, stages, 2], forward and backward), one for
            all ranks with as many stages.
    """

    finish: Floats
    peers: Floats
    begin: list[tuple[Ints, Floats]]


@cache
def one_forward_one_backward(stages: int, batches: int) -> list[tuple[int, int, int]]:
    """(stage, FORWARD or BACKWARD, micro-batch), in an order in which each comes after all that it needs.

    Each stage runs ``stages - 1 - stage`` forward passes ahead (PipeDream-flush, arXiv:2104.04473, section 2.2).
    """
    orders = []
    for stage in range(stages):
        ahead = min(stages - 1 - stage, batches)
        order = [(FORWARD, i) for i in range(ahead)]
        for i in range(batches - ahead):
            order += [(FORWARD, ahead + i), (BACKWARD, i)]
        orders.append(order + [(BACKWARD, i) for i in range(batches - ahead, batches)])
    done = [[0] * stages, [0] * stages]
    at = [0] * stages
    out: list[tuple[int, int, int]] = []
    while len(out) < 2 * stages * batches:
        for stage in range(stages):
            while at[stage] < len(orders[stage]):
                way, i = orders[stage][at[stage]]
                if way == FORWARD:
                    ready = stage == 0 or done[FORWARD][stage - 1] > i
                else:
                    ready = done[BACKWARD][stage + 1] > i if stage + 1 < stages else done[FORWARD][stage] > i
                if not ready:
                    break
                out.append((stage, way, i))
                done[way][stage] += 1
                at[stage] += 1
    return out


def play_pipelines(schedule: Schedule, batches: MicroBatches) -> PlayedPipelines:
    """Run every rank's micro-batches in the order of its steps.

    Raises:
        ValueError: a ring joins pipelines of different numbers of stages.
    """
    stages = schedule.cluster.stages_of
    _check_rings(schedule, stages)
    out = PlayedPipelines(np.zeros(schedule.ranks), np.zeros(schedule.ranks), [])
    for count in np.unique(stages).tolist():
        mine = np.flatnonzero(stages[batches.rank] == count)
        if len(mine):
            out.begin.append((mine, _play(schedule, batches, mine, count, out)))
    return out


def _check_rings(s: Schedule, stages: Ints) -> None:
    if not s.packs:
        return
    mine = stages[s.ring_ranks]
    least, most = (f.reduceat(mine, s.rank_offsets[:-1]) for f in (np.minimum, np.maximum))
    if (least != most).any():
        p = int(np.argmax(least != most))
        raise ValueError(
            f"pack {p}: its ring joins pipelines of {least[p]} and {most[p]} stages: they cannot be tied by stage"
        )


def _turns(s: Schedule, batches: MicroBatches, mine: Ints, stages: int) -> Ints:
    """The turn of each micro-batch in its pipeline.

    Pipelines that are tied, in whatever step, keep common turns, since otherwise one might wait for a forward pass
    that another runs after a backward pass that waits for the first. Steps in which none of them has anything do not
    count.
    """
    if stages == 1:
        return batches.step[mine]
    group = connected(s.ranks, batches.tied, batches.rank)
    steps = max(s.micro_steps, 1)
    turns, place = np.unique(group[batches.rank[mine]] * steps + batches.step[mine], return_inverse=True)
    begin = np.searchsorted(turns // steps, turns // steps)
    return (np.arange(len(turns)) - begin)[place]


def _play(s: Schedule, batches: MicroBatches, mine: Ints, stages: int, out: PlayedPipelines) -> Floats:
    turn = _turns(s, batches, mine, stages)
    order = np.lexsort((batches.tied[mine], turn))
    bounds = np.searchsorted(turn[order], np.arange(int(turn.max()) + 2))
    rank, tied = batches.rank[mine][order], batches.tied[mine][order]
    seconds = batches.seconds[mine][order] / stages
    heads = np.flatnonzero(np.diff(tied, prepend=-1) != 0)
    begin, end = np.zeros((len(mine), stages, 2)), np.zeros((len(mine), stages, 2))
    free = np.zeros((stages, s.ranks))
    for stage, way, i in one_forward_one_backward(stages, len(bounds) - 1):
        rows = slice(bounds[i], bounds[i + 1])
        r = rank[rows]
        own = free[stage, r]
        if way == FORWARD and stage:
            own = np.maximum(own, end[rows, stage - 1, FORWARD])
        elif way == BACKWARD and stage + 1 < stages:
            own = np.maximum(own, end[rows, stage + 1, BACKWARD])
        starts = own
        tie = heads[np.searchsorted(heads, rows.start) : np.searchsorted(heads, rows.stop)] - rows.start
        if len(tie) < len(own):
            starts = np.repeat(np.maximum.reduceat(own, tie), np.diff(tie, append=len(own)))
            out.peers[r] += (starts - own) / stages
        begin[rows, stage, way] = starts
        end[rows, stage, way] = free[stage, r] = starts + seconds[rows, way]
    np.maximum(out.finish, free.max(0), out=out.finish)
    in_order = np.empty_like(begin)
    in_order[order] = begin
    return in_order
