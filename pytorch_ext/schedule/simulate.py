# SPDX-License-Identifier: Apache-2.0
"""Plays a schedule on its cluster: when each rank computes, and why it waits."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gapless.schedule import links
from gapless.schedule.micro_batches import MicroBatches, Overlap, play_micro_batches
from gapless.schedule.play_pipelines import play_pipelines

if TYPE_CHECKING:
    from gapless.schedule.schedule import Schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WAITS = ("peers", "node", "network", "host", "pipeline", "end")
SPAN = np.dtype(
    [
        ("rank", np.int64),
        ("stage", np.int64),
        ("begin", np.float64),
        ("end", np.float64),
        ("kind", np.int64),
        ("pack", np.int64),
        ("backward", np.bool_),
    ]
)


@dataclass(frozen=True, eq=False)
class Timeline:
    """What became of each rank's time. On every rank, ``busy`` and all ``waits`` add up to ``makespan``.

    Of a rank that is a pipeline, the times are averages over its stages.

    Attributes:
        makespan: seconds from the first begin to the last end.
        busy: float64 [ranks], seconds of computing.
        waits: float64 [ranks] for each reason: ``peers``, for others of a ring or a lock-step; ``node`` and
            ``network``, for keys and values (or moved tokens) that do not hide behind attention; ``host``, for
            offloaded activations that do not hide behind the micro-batch; ``pipeline``, for the stages before and
            after; ``end``, after the rank's last micro-batch.
        bytes: moved over ``node`` links, the ``network`` and to or from the ``host``.
        spans: structured array :data:`SPAN`, ``kind`` an index into :data:`KINDS`, ``pack`` -1 where a whole
            micro-batch is meant; None unless asked for.
    """

    makespan: float
    busy: Floats
    waits: dict[str, Floats]
    bytes: dict[str, float]
    spans: NDArray[np.void] | None = field(default=None, repr=False)

    @cached_property
    def idle(self) -> float:
        """Share of all ranks' time in which they do not compute."""
        total = self.makespan * len(self.busy)
        return 1 - float(self.busy.sum()) / total if total else 0.0

    @cached_property
    def idle_by_reason(self) -> dict[str, float]:
        """Share of all ranks' time that each kind of waiting takes."""
        total = self.makespan * len(self.busy)
        return {k: float(w.sum()) / total if total else 0.0 for k, w in self.waits.items()}


def simulate(
    schedule: Schedule,
    *,
    overlap: Overlap = True,
    host_overlap: bool = True,
    gradient_bytes: float = 0.0,
    spans: bool = False,
) -> Timeline:
    """Play ``schedule`` on its cluster.

    A step goes layer by layer: attention of all packs that a rank has in it, then the rest of the layer for all of
    them. A ring goes as fast as its slowest member, and its transfers share network cards with the other rings of the
    step. Ranks that rings of one step connect, directly or through others, begin that step together and end it
    together: each of its many layers ties them. A step with moved tokens ties all its ranks, twice a layer. Pipelines
    run one-forward-one-backward, and a ring over pipelines ties its members at each stage; steps in which a rank has
    nothing take no time.

    Args:
        overlap: what hides keys and values that are under way. True: attention of all rings of the micro-batch, which
            take their rounds in turn after what a rank has for itself (:mod:`gapless.distributed.ring`). ``"ring"``:
            attention of their own ring, and a rank takes one ring after another, in the order of packs. False: nothing.
        host_overlap: whether offloaded activations go to the host while the micro-batch is computed.
        gradient_bytes: of one rank; reduced once by a ring over all ranks after the last micro-batch. 0: not counted.
        spans: whether to keep what there is to draw.

    Raises:
        ValueError: ``overlap`` is none of these, ``gradient_bytes`` is negative, or a ring joins pipelines of different
            numbers of stages.
    """
    if overlap not in (True, False, "ring"):
        raise ValueError(f"overlap is {overlap!r}: it has to be True, False or 'ring'")
    if not 0 <= gradient_bytes < float("inf"):
        raise ValueError(f"gradient_bytes is {gradient_bytes}: it has to be finite and at least 0")
    rings, moves = links.rings(schedule), links.moves(schedule)
    batches = play_micro_batches(
        schedule, rings, moves, overlap=overlap, host_overlap=host_overlap, parts=spans
    )
    played = play_pipelines(schedule, batches)
    stages, ranks = schedule.cluster.stages_of, schedule.ranks
    reduction, reduced = links.reduction(schedule.cluster, schedule.cost, gradient_bytes)

    def of_ranks(values: Floats) -> Floats:
        return np.bincount(batches.rank, weights=values, minlength=ranks) / stages

    busy = of_ranks(batches.busy)
    waits = {reason: of_ranks(values) for reason, values in batches.waits.items()}
    waits["peers"] = waits["peers"] + played.peers
    # What is left of the time up to a rank's last end: stages that wait for other stages.
    spent = busy + sum(waits.values())
    waits["pipeline"] = np.where(stages > 1, np.maximum(played.finish - spent, 0.0), 0.0)
    last = float(played.finish.max(initial=0.0))
    waits["end"] = last - played.finish
    kind = "network" if schedule.cluster.nodes > 1 else "node"
    waits[kind] = waits[kind] + reduction
    moved = {k: moves.bytes[k] + reduced[k] + rings.bytes[k] for k in ("node", "network")}
    moved["host"] = batches.host_bytes
    drawn = _spans(batches, played.begin) if spans else None
    return Timeline(last + reduction, busy, {reason: waits[reason] for reason in WAITS}, moved, drawn)


def _spans(batches: MicroBatches, begins: list[tuple[Ints, Floats]]) -> NDArray[np.void]:
    """Every part of every micro-batch on every stage, in place."""
    parts = batches.parts
    if parts is None:
        raise ValueError("batches have no parts: play them with parts=True")
    tables = [np.empty(0, SPAN)]
    for mine, begin in begins:
        place = np.full(len(batches.rank), -1)
        place[mine] = np.arange(len(mine))
        some = parts[place[parts["batch"]] >= 0]
        batch = some["batch"]
        for stage in range(begin.shape[1]):
            for way in range(2):
                at = begin[place[batch], stage, way]
                table = np.empty(len(some), SPAN)
                table["rank"], table["stage"], table["backward"] = batches.rank[batch], stage, way
                table["kind"], table["pack"] = some["kind"], some["pack"]
                table["begin"] = at + some["begin"][:, way] / begin.shape[1]
                table["end"] = at + some["end"][:, way] / begin.shape[1]
                tables.append(table[table["end"] > table["begin"]])
    return np.concatenate(tables)
