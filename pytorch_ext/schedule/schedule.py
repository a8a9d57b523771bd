# SPDX-License-Identifier: Apache-2.0
"""The plan of a global batch over many ranks: one value object for all planners."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import check_capacity, check_lengths
from gapless.schedule.shards import MicroBatch, Shard, even_widths

if TYPE_CHECKING:
    from gapless.schedule.simulate import Timeline

Ints = NDArray[np.int64]


def _no_moves() -> Ints:
    return np.empty((0, 4), np.int64)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Which rank computes which tokens of which sequence in which micro-step.

    Sequences are grouped into *packs*. A pack is computed in one micro-step by a ring of one or more ranks, each of
    which holds two symmetric chunks of every sequence of the pack (:mod:`gapless.schedule.shards`). A rank's
    *micro-batch* is the packs that it has in one step; a rank may have none in a step, and ranks may have different
    numbers of micro-batches. Rings of one step may share ranks; since all ranks take steps, and packs inside a step,
    in ascending order, no order of messages can lock.

    Attributes:
        lengths: int64 [n], tokens of each sequence of the global batch; 0 is allowed.
        pack_of: int64 [n], the pack of each sequence.
        rank_offsets: int64 [packs + 1], the ring of pack p is ``ring_ranks[rank_offsets[p] : rank_offsets[p + 1]]``.
        ring_ranks: int64.
        steps: int64 [packs], the micro-step of each pack.
        offload: float64 [packs], share of the inner layers' activations that goes to the host (ByteScale, equation 3);
            packs that share a micro-batch share the ratio.
        capacity: int64 [ranks], most tokens whose activations a rank holds at once.
        cluster, cost: what it was planned for.
        two_level: whether rings that have equally many ranks on each of their nodes are of two levels: keys go around
            each node, while every rank hands its own on to the next node, over its own network card if it has one (see
            ``widths``). Otherwise one ring goes through all ranks, and over one card of each node.
        moves: int64 [m, 4], rows (step, source, destination, tokens): tokens that change rank between attention and
            the linear modules and go back after them (Zeppelin's remapping); no rows: none do.
        planner: name of the planner and its options, for reports.

    Raises:
        ValueError: on construction, if a token is not computed exactly once, a rank is above its capacity, or peers
            do not agree (:mod:`gapless.schedule.certificate`).
    """

    lengths: Ints
    pack_of: Ints
    rank_offsets: Ints
    ring_ranks: Ints
    steps: Ints
    offload: NDArray[np.float64]
    capacity: Ints
    cluster: Cluster
    cost: CostModel
    two_level: bool = False
    moves: Ints = field(default_factory=_no_moves)
    planner: str = ""

    def __post_init__(self) -> None:
        for name in (
            "lengths",
            "pack_of",
            "rank_offsets",
            "ring_ranks",
            "steps",
            "offload",
            "capacity",
            "moves",
        ):
            dtype = np.float64 if name == "offload" else np.int64
            array = np.array(getattr(self, name), dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        self.check()

    def check(self) -> None:
        """Certify the schedule again; raises ValueError with what is wrong."""
        from gapless.schedule.certificate import certify

        certify(self)

    @property
    def ranks(self) -> int:
        return self.cluster.ranks

    @property
    def packs(self) -> int:
        return len(self.steps)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def micro_steps(self) -> int:
        """Micro-steps of the whole schedule, the last one that any rank takes."""
        return int(self.steps.max()) + 1 if self.packs else 0

    @cached_property
    def ring_sizes(self) -> Ints:
        """int64 [packs], ranks of each pack."""
        return np.diff(self.rank_offsets)

    @cached_property
    def widths(self) -> Ints:
        """int64 [packs], ranks of a ring among which keys go around before each hands its own to the next so many.

        The whole ring, or the ranks of one node in a ring of two levels (LoongTrain's, arXiv:2406.18485).
        """
        if not self.two_level or not self.packs:
            return self.ring_sizes
        return even_widths(self.rank_offsets, self.cluster.node_of(self.ring_ranks))

    @cached_property
    def sequence_order(self) -> Ints:
        """int64 [n], sequences pack by pack, ascending inside one."""
        return np.argsort(self.pack_of, kind="stable")

    @cached_property
    def sequence_offsets(self) -> Ints:
        """int64 [packs + 1], where the sequences of each pack begin in ``sequence_order``."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.pack_of, minlength=self.packs))])

    @cached_property
    def pack_tokens(self) -> Ints:
        """int64 [packs]."""
        return self._sum(self.lengths).astype(np.int64)

    @cached_property
    def pack_cells(self) -> NDArray[np.float64]:
        """float64 [packs], visible pairs of each pack."""
        return self._sum(self.cost.cells(self.lengths))

    def _sum(self, values: NDArray) -> NDArray[np.float64]:
        return np.bincount(self.pack_of, weights=values, minlength=self.packs).astype(np.float64)

    @cached_property
    def across_nodes(self) -> NDArray[np.bool_]:
        """bool [packs], whether a pack's ring leaves its node."""
        nodes = self.cluster.node_of(self.ring_ranks)
        low, high = (
            (f.reduceat(nodes, self.rank_offsets[:-1]) for f in (np.minimum, np.maximum))
            if self.packs
            else (
                nodes,
                nodes,
            )
        )
        return low != high

    def ring(self, pack: int) -> tuple[int, ...]:
        """The ranks of a pack, in the order of the ring."""
        return tuple(self.ring_ranks[self.rank_offsets[pack] : self.rank_offsets[pack + 1]].tolist())

    def sequences(self, pack: int) -> Ints:
        """The sequences of a pack, ascending."""
        return self.sequence_order[self.sequence_offsets[pack] : self.sequence_offsets[pack + 1]]

    def shard(self, pack: int, rank: int) -> Shard:
        """What ``rank`` holds of ``pack``."""
        ring, sequences = self.ring(pack), self.sequences(pack)
        if rank not in ring:
            raise ValueError(f"rank {rank} has no part in pack {pack}: its ranks are {list(ring)}")
        return Shard(pack, ring, ring.index(rank), sequences, self.lengths[sequences], int(self.widths[pack]))

    @cached_property
    def _packs_of_ranks(self) -> tuple[Ints, Ints]:
        pack = np.repeat(np.arange(self.packs), self.ring_sizes)
        order = np.lexsort((pack, self.steps[pack], self.ring_ranks))
        bounds = np.searchsorted(self.ring_ranks[order], np.arange(self.ranks + 1))
        return pack[order], bounds

    def _packs_of(self, rank: int) -> Ints:
        """The packs that ``rank`` takes part in, step by step."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank is {rank}: it has to be between 0 and {self.ranks - 1}")
        packs, bounds = self._packs_of_ranks
        return packs[bounds[rank] : bounds[rank + 1]]

    def _micro_batch(self, rank: int, step: int, packs: Ints) -> MicroBatch:
        shards = tuple(self.shard(p, rank) for p in packs.tolist())
        return MicroBatch(rank, step, shards, float(self.offload[packs[0]]) if len(packs) else 0.0)

    def micro_batch(self, rank: int, step: int) -> MicroBatch:
        """What ``rank`` computes in ``step``; it has no shards, if nothing."""
        mine = self._packs_of(rank)
        return self._micro_batch(rank, step, mine[self.steps[mine] == step])

    def micro_batches(self, rank: int) -> list[MicroBatch]:
        """What ``rank`` computes, step by step; steps in which it has nothing are left out."""
        mine = self._packs_of(rank)
        steps, first = np.unique(self.steps[mine], return_index=True)
        groups = np.split(mine, first[1:])
        return [
            self._micro_batch(rank, step, packs) for step, packs in zip(steps.tolist(), groups, strict=False)
        ]

    @cached_property
    def timeline(self) -> Timeline:
        """The schedule played on its cluster with the default options of :func:`gapless.schedule.simulate`."""
        from gapless.schedule.simulate import simulate

        return simulate(self)

    @property
    def makespan(self) -> float:
        """Seconds from the first rank's begin to the last one's end, forward and backward, as simulated."""
        return self.timeline.makespan

    @cached_property
    def lower_bound(self) -> float:
        """Seconds that no schedule of this batch can go below: all computing, shared evenly, with nothing between."""
        return float(self.cost.work(self.lengths).sum() / self.cluster.throughputs.sum())

    @property
    def gap(self) -> float:
        """``makespan / lower_bound - 1``; 0 for an empty batch."""
        return self.makespan / self.lower_bound - 1 if self.lower_bound else 0.0

    @cached_property
    def digest(self) -> str:
        """The same for the same schedule on every rank: SHA-256 of what is computed where and when."""
        hashed = hashlib.sha256()
        for array in (
            self.lengths,
            self.pack_of,
            self.rank_offsets,
            self.ring_ranks,
            self.steps,
            self.offload,
            self.widths,
            self.moves,
        ):
            hashed.update(str(array.shape).encode())
            hashed.update(np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()


@dataclass(frozen=True)
class Pack:
    """A pack by name, for :func:`schedule_of`: its sequences, its ring, its step, its share of offloading."""

    sequences: Sequence[int]
    ranks: Sequence[int]
    step: int
    offload: float = 0.0


def schedule_of(
    lengths: ArrayLike,
    packs: Sequence[Pack],
    *,
    ranks: int | Cluster,
    capacity: ArrayLike,
    cost: CostModel,
    two_level: bool = False,
    planner: str = "",
    moves: ArrayLike | None = None,
) -> Schedule:
    """A schedule from a list of packs. Every sequence has to be in exactly one.

    Raises:
        ValueError: a sequence in no pack or in several, or what :class:`Schedule` refuses.
    """
    sizes = check_lengths(lengths)
    cluster = Cluster.of(ranks)
    members = np.concatenate([np.empty(0, np.int64), *(np.asarray(p.sequences, np.int64) for p in packs)])
    if members.size and (members.min() < 0 or members.max() >= len(sizes)):
        bad = members[(members < 0) | (members >= len(sizes))][0]
        raise ValueError(f"packs name sequence {bad}: there are {len(sizes)}")
    times = np.bincount(members, minlength=len(sizes))
    if (times != 1).any():
        i = int(np.argmax(times != 1))
        raise ValueError(f"sequence {i} is in {times[i]} packs: it has to be in one")
    pack_of = np.empty(len(sizes), np.int64)
    pack_of[members] = np.repeat(np.arange(len(packs)), [len(p.sequences) for p in packs])
    rings = [np.asarray(p.ranks, np.int64) for p in packs]
    return Schedule(
        lengths=sizes,
        pack_of=pack_of,
        rank_offsets=np.cumsum([0, *map(len, rings)]),
        ring_ranks=np.concatenate([np.empty(0, np.int64), *rings]),
        steps=np.array([p.step for p in packs], np.int64),
        offload=np.array([p.offload for p in packs], np.float64),
        capacity=check_capacity(capacity, cluster.ranks),
        cluster=cluster,
        cost=cost,
        two_level=two_level,
        moves=_no_moves() if moves is None else np.asarray(moves, np.int64).reshape(-1, 4),
        planner=planner,
    )
