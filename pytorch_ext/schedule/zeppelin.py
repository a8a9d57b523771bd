# SPDX-License-Identifier: Apache-2.0
"""Zeppelin (arXiv:2509.21841): sequences go where links are fast enough for them, and tokens are evened out afterwards.

Three zones by length: *local* sequences stay whole, *intra-node* ones may be shared by ranks of a node, *inter-node*
ones by nodes. Steps are filled longest sequence first, nodes before ranks; on a rank inter-node packs come first, then
intra-node, then local ones, so that slow transfers start early.

There are two ways to even ranks out. *Locked*: attention is balanced step by step, by pairs alone, and tokens are
remapped around it; all ranks take layers together, as in the paper. *Free*: attention and linear modules are balanced
together over all steps; nothing moves, and ranks that a long sequence keeps busy skip steps that others take. The
shorter one is taken. What the paper leaves open is searched for: how many steps, and how finely sequences are shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless import _planner
from gapless.schedule import remap as remapping
from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import MOST_TOKENS, check_capacity, check_fits, check_lengths
from gapless.schedule.schedule import Schedule
from gapless.schedule.shards import even_widths

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_Placed = tuple[Ints, Ints, Ints, Floats]  # step, offsets, ranks, end: of _planner.zone_plan

_PIECES = (1.0, 0.5, 0.25, 0.125)  # largest share of a sequence on a rank, of the average load
_REFINED = 2  # of these, how many are tried again with a limit on when ranks end
_LEVELS = 6  # halvings of what that limit may be
_MORE_STEPS = (1.0, 1.5, 2.0)  # locked steps, over the fewest that hold all tokens
_ENOUGH = 1.005  # times the lower bound: no further search


def zones(cost: CostModel, cluster: Cluster, two_level: bool = True) -> tuple[int, int]:
    """(local_max, intra_max): the longest sequence that stays whole, and the longest that stays inside a node.

    Above them, attention of a ring of two ranks takes as long as its transfers or longer: over a link of a node, and
    over the network, or with ``two_level`` over an average hop of a ring of whole nodes. Whatever is too long for the
    ranks' capacity is shared all the same.
    """
    links = _Links.of(cost, cluster, two_level)
    local = links.zone(cost, links.near)
    return local, max(local, links.zone(cost, links.across))


@dataclass(frozen=True)
class _Links:
    """Seconds for keys and values of a token to pass a link of a node, or the network; and of a hop. All layers.

    ``outer`` is of all ranks of a node at once, ``across`` of an average hop of a ring that leaves its node.
    """

    near: float
    far: float
    outer: float
    across: float
    hop: float
    two_level: bool

    @staticmethod
    def of(cost: CostModel, cluster: Cluster, two_level: bool) -> _Links:
        size = cost.kv_bytes * (1 + cost.backward_kv) * cost.layers
        near, far = size / cost.node_bandwidth, size / cost.network_bandwidth
        outer = far * cluster.sharing
        across = max(near, outer / cluster.ranks_per_node) if two_level else far
        return _Links(near, far, outer, across, 2 * cost.layers * cost.latency, two_level)

    def zone(self, cost: CostModel, transfer: float) -> int:
        """The longest sequence whose attention two ranks cannot hide their transfers behind."""

        def hidden(length: int) -> bool:
            work = float(cost.attention(cost.cells(length)))
            return _planner.hidden_ranks(work, length * transfer, self.hop, 2) == 2

        low, high = 0, MOST_TOKENS  # the pairs grow faster than the tokens, so there is one crossing
        if not hidden(high):
            return high
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (low, middle) if hidden(middle) else (middle, high)
        return low


@dataclass(frozen=True)
class _Step:
    """Sequences of a step and their rings: sequence i is on ``ranks[offsets[i] : offsets[i + 1]]``."""

    sequences: Ints
    offsets: Ints
    ranks: Ints
    moves: Ints  # rows (0, source, destination, tokens)


def plan(
    lengths: ArrayLike,
    *,
    ranks: int | Cluster,
    capacity: ArrayLike,
    cost: CostModel,
    remap: bool = True,
    two_level: bool = True,
) -> Schedule:
    """A schedule in Zeppelin's manner.

    Args:
        lengths: tokens of each sequence.
        ranks: how many, or a cluster; its pipelines have to be of one depth.
        capacity: most tokens of a rank in one step, one number or one for each rank.
        cost: of the model and the machine.
        remap: whether tokens may change rank between attention and linear modules, where that makes a schedule shorter.
        two_level: whether rings over whole nodes use all their network cards, so that more sequences are worth sharing
            (:class:`gapless.schedule.Schedule`): what the paper routes messages for, without copies.

    Raises:
        ValueError: bad lengths or capacity, or a sequence too long for all ranks together, with what would do.
    """
    sizes = check_lengths(lengths)
    cluster = Cluster.of(ranks)
    room = check_capacity(capacity, cluster.ranks)
    if len(set(cluster.stages_of.tolist())) > 1:
        raise ValueError(
            f"stages is {cluster.stages}: ranks that share sequences need pipelines of one depth"
        )
    most = int((np.sort(room)[::-1] * np.arange(1.0, cluster.ranks + 1)).max())
    check_fits(sizes, most, cluster.ranks)
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    steps: list[_Step] = []
    if len(order):
        filler = _Filler(sizes, cluster, room, cost, _Links.of(cost, cluster, two_level))
        seconds, steps = filler.free(order)
        if remap and seconds > _ENOUGH * filler.bound:
            locked_seconds, locked = filler.locked(order)
            if locked_seconds < seconds:
                steps = locked
    return _schedule(
        sizes, steps, cluster, room, cost, two_level, f"zeppelin(remap={remap}, two_level={two_level})"
    )


class _Filler:
    """Fills steps with sequences."""

    def __init__(self, sizes: Ints, cluster: Cluster, room: Ints, cost: CostModel, links: _Links) -> None:
        self.sizes, self.cluster, self.room, self.cost, self.links = sizes, cluster, room, cost, links
        self.speed = cluster.throughputs
        self.attention = cost.attention(cost.cells(sizes))
        self.token = float(cost.linear(1))
        self.bound = float(cost.work(sizes).sum() / self.speed.sum())
        self.fewest = int(np.ceil(sizes.sum() / room.sum(dtype=np.float64)))

    def place(
        self, sequences: Ints, token: float, share: float, level: float, fullness: float, steps: int
    ) -> _Placed:
        """``_planner.zone_plan``, with ``share`` and ``fullness`` as multiples of the average load."""
        work = self.attention[sequences] + self.sizes[sequences] * token
        average = float(work.sum() / self.speed.sum())
        return _planner.zone_plan(
            self.sizes[sequences],
            self.attention[sequences],
            self.room,
            self.speed,
            ranks_per_node=self.cluster.ranks_per_node,
            token=token,
            near=self.links.near,
            far=self.links.far,
            outer=self.links.outer,
            hop=self.links.hop,
            overhead=self.cost.overhead,
            whole_nodes=self.links.two_level,
            piece=share * average or np.inf,
            level=level,
            fullness=fullness * average,
            most_steps=steps,
        )

    def free(self, order: Ints) -> tuple[float, list[_Step]]:
        """(seconds, steps) of the shortest schedule found in which nothing moves."""
        most = 4 * self.fewest + 8  # a level too low for long sequences would take many steps
        tried: list[tuple[float, int, float, float, _Placed]] = []
        for share in _PIECES:
            # Room decides more, the more the tokens fill the steps.
            for fullness in (0.0, 1.0):
                placed = self.place(order, self.token, share, np.inf, fullness, 0)
                tried.append((float(placed[3].max()), len(tried), share, fullness, placed))
        tried.sort(key=lambda t: t[:2])
        seconds, best = tried[0][0], tried[0][4]
        for end, _, share, fullness, _ in tried[:_REFINED]:
            low, high = self.bound, end
            for _ in range(_LEVELS):
                if seconds <= _ENOUGH * self.bound:
                    break
                level = (low + high) / 2
                placed = self.place(order, self.token, share, level, fullness, most)
                end = float(placed[3].max()) if (placed[0] >= 0).all() else np.inf
                if end < seconds:
                    seconds, best = end, placed
                low, high = (low, level) if end <= level else (level, high)
        step, offsets, ranks, _ = best
        size = np.diff(offsets)
        steps = []
        for number in range(int(step.max()) + 1):
            mine = step == number
            rings = ranks[np.repeat(mine, size)]
            steps.append(_Step(order[mine], np.append(0, np.cumsum(size[mine])), rings, _no_moves()))
        return seconds, steps

    def locked(self, order: Ints) -> tuple[float, list[_Step]]:
        """(seconds, steps) of the shortest schedule found that balances attention alone, step by step."""
        best: list[_Step] = []
        seconds = np.inf
        for count in dict.fromkeys(int(np.ceil(self.fewest * more)) for more in _MORE_STEPS):
            left, total = order, 0.0
            steps: list[_Step] = []
            while len(left) and total < seconds:
                tokens = np.cumsum(self.sizes[left])
                share = tokens[-1] / max(count - len(steps), 1)
                taken = max(int(np.searchsorted(tokens, share * (1 + 1e-9), side="right")), 1)
                time, step, over = self._locked_step(left[:taken])
                left = np.concatenate([over, left[taken:]])
                total += time
                steps.append(step)
            if total < seconds:
                best, seconds = steps, total
        return seconds, best

    def _locked_step(self, sequences: Ints) -> tuple[float, _Step, Ints]:
        """(seconds, step, sequences left over)."""
        best, least = None, (len(sequences) + 1, np.inf)
        for fullness in (0.0, 1.0):
            for share in _PIECES:
                placed = self.place(sequences, 0.0, share, np.inf, fullness, 1)
                score = (int((placed[0] < 0).sum()), float(placed[3].max()))
                if score < least:
                    best, least = placed, score
        assert best is not None
        missing, offsets, ranks = best[0] < 0, np.append(0, best[1][1:][best[0] >= 0]), best[2]
        attention, tokens = self._loads(sequences[~missing], offsets, ranks)
        apart = float((attention + tokens * self.token / self.speed).max())
        moves = remapping.balance_tokens(tokens, self.cluster, self.cost)
        even = remapping.targets(tokens, self.cluster)[0] * self.token / self.speed
        ways = 4 * self.cost.layers  # there and back, forward and backward
        together = float(attention.max() + even.max())
        together += ways * remapping.traffic(moves, self.cluster, self.cost)
        if apart <= together:
            moves = _no_moves()
        step = _Step(sequences[~missing], offsets, ranks, moves)
        return min(apart, together) + self.cost.overhead, step, sequences[missing]

    def _loads(self, sequences: Ints, offsets: Ints, ranks: Ints) -> tuple[Floats, Ints]:
        """(seconds of attention, tokens) of each rank in a step."""
        pack_of, offsets, ranks = _merge(offsets, ranks, self.cluster)
        size = np.diff(offsets)
        pack = np.repeat(np.arange(len(size)), size)
        total = np.bincount(pack_of, weights=self.sizes[sequences], minlength=len(size)).astype(np.int64)
        work = np.bincount(pack_of, weights=self.attention[sequences], minlength=len(size))
        nodes = self.cluster.node_of(ranks)
        width = even_widths(offsets, nodes) if self.links.two_level and len(size) else size
        across = nodes[offsets[:-1]] != nodes[offsets[1:] - 1]
        hops = self.cost.ring(total, size, across, width, self.cluster.sharing)
        attention = np.maximum((work / size)[pack] / self.speed[ranks], hops[pack])
        # What chunks i and 2N - 1 - i of a pack hold (gapless.schedule.shards).
        place = np.arange(len(ranks)) - offsets[pack]
        whole, rest = np.divmod(total, 2 * size)
        tokens = 2 * whole[pack] + (place < rest[pack]) + (2 * size[pack] - 1 - place < rest[pack])
        count = self.cluster.ranks
        return (
            np.bincount(ranks, weights=attention, minlength=count).astype(np.float64),
            np.bincount(ranks, weights=tokens, minlength=count).astype(np.int64),
        )


def _no_moves() -> Ints:
    return np.empty((0, 4), np.int64)


def _merge(offsets: Ints, ranks: Ints, cluster: Cluster) -> tuple[Ints, Ints, Ints]:
    """(pack_of, offsets, ranks): sequences of one ring become a pack; rings over nodes first, whole ones last."""
    size = np.diff(offsets)
    names = [ranks[offsets[i] : offsets[i + 1]].tobytes() for i in np.flatnonzero(size > 1)]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    pack_of = np.empty(len(size), np.int64)
    pack_of[size > 1] = [number[name] for name in names]
    rings = [np.frombuffer(name, np.int64) for name in number]
    across = np.array(
        [r[0] // cluster.ranks_per_node != r[-1] // cluster.ranks_per_node for r in rings], bool
    )
    order = np.argsort(~across, kind="stable")
    place = np.argsort(order)
    pack_of[size > 1] = place[pack_of[size > 1]]
    alone, single = np.unique(ranks[offsets[:-1][size == 1]], return_inverse=True)
    pack_of[size == 1] = len(rings) + single
    sizes = np.array([*(len(rings[i]) for i in order), *np.ones(len(alone), np.int64)], np.int64)
    return (
        pack_of,
        np.concatenate([[0], np.cumsum(sizes)]),
        np.concatenate([np.empty(0, np.int64), *(rings[i] for i in order), alone]),
    )


def _schedule(
    sizes: Ints,
    steps: list[_Step],
    cluster: Cluster,
    room: Ints,
    cost: CostModel,
    two_level: bool,
    planner: str,
) -> Schedule:
    pack_of = np.zeros(len(sizes), np.int64)  # sequences without tokens are in the first pack
    ring_sizes, ring_ranks, numbers = (
        [np.empty(0, np.int64)],
        [np.empty(0, np.int64)],
        [np.empty(0, np.int64)],
    )
    moves, packs = [_no_moves()], 0
    for number, step in enumerate(steps):
        of, offsets, ranks = _merge(step.offsets, step.ranks, cluster)
        pack_of[step.sequences] = of + packs
        ring_sizes.append(np.diff(offsets))
        ring_ranks.append(ranks)
        numbers.append(np.full(len(offsets) - 1, number))
        moves.append(step.moves + np.array([number, 0, 0, 0]))
        packs += len(offsets) - 1
    if len(sizes) and not packs:
        ring_sizes, ring_ranks, numbers = (
            [np.ones(1, np.int64)],
            [np.zeros(1, np.int64)],
            [np.zeros(1, np.int64)],
        )
    return Schedule(
        lengths=sizes,
        pack_of=pack_of,
        rank_offsets=np.concatenate([[0], np.cumsum(np.concatenate(ring_sizes))]),
        ring_ranks=np.concatenate(ring_ranks),
        steps=np.concatenate(numbers),
        offload=np.zeros(len(np.concatenate(numbers))),
        capacity=room,
        cluster=cluster,
        cost=cost,
        two_level=two_level,
        moves=np.concatenate(moves),
        planner=planner,
    )
