# SPDX-License-Identifier: Apache-2.0
"""Attention of the packs of micro-batches: rings take turns, or come one after another and wait for their members."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gapless.schedule.links import Rings
    from gapless.schedule.schedule import Schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Played:
    """Attention as it came out, from the begin of each micro-batch; columns are forward and backward.

    Attributes:
        end: float64 [batches, 2], when attention of a micro-batch is done.
        waits: float64 [batches], for each reason.
        parts: gives float64 [entries, 2] three times: when attention of a pack begins on a member, and from when to
            when it waits for keys and values after it.
    """

    end: Floats
    waits: dict[str, Floats]
    parts: Callable[[], tuple[Floats, Floats, Floats]]


def _beyond(transfer: Floats, attention: Floats) -> Floats:
    """By how much transfers take longer than the attention that hides them, forward and backward.

    Together they are longer by as much as forward and backward together, as :meth:`CostModel.seconds` counts.
    """
    each = np.maximum(transfer - attention, 0.0)
    both, total = np.maximum((transfer - attention).sum(1), 0.0), each.sum(1)
    return each * (both / np.where(total > 0, total, 1.0))[:, None]


class RingOrder:
    """The entries (pack, member of its ring) of a schedule, sorted by micro-batch, then pack.

    Attributes:
        pack, batch: int64 [entries].
        time: float64 [entries, 2], seconds of attention of this member, forward and backward.
    """

    def __init__(
        self, s: Schedule, rings: Rings, pack: Ints, batch: Ints, attention: Floats, batches: int
    ) -> None:
        order = np.lexsort((pack, batch))
        self.pack, self.batch, self.batches, self.packs = pack[order], batch[order], batches, s.packs
        forward = np.array([1.0, s.cost.backward_cell]) / (1 + s.cost.backward_cell)
        self.time = attention[order, None] * forward
        self.transfer, self.network = rings.seconds, rings.network
        alone = s.ring_sizes[self.pack] == 1
        first = np.searchsorted(self.batch, np.arange(batches + 1))
        # One-rank packs wait for nobody: lump[e] is all attention of those before entry e.
        self.lump = np.concatenate([np.zeros((1, 2)), np.cumsum(np.where(alone[:, None], self.time, 0.0), 0)])
        self.ring = np.flatnonzero(~alone)
        follows = np.diff(self.batch[self.ring], prepend=-1) == 0
        place = np.arange(len(self.ring))
        self.previous = np.where(follows, place - 1, -1)
        self.following = np.where(np.append(follows[1:], False), place + 1, -1)[: len(place)]
        # Where the lump before each ring begins: after the ring before it, or with the micro-batch.
        self.after = np.where(follows, self.ring[self.previous], first[self.batch[self.ring]])
        last = np.full(batches, -1)
        last[self.batch[self.ring]] = place
        self.last, self.first = last, first
        self.members = np.argsort(self.pack[self.ring], kind="stable")
        self.bounds = np.searchsorted(self.pack[self.ring][self.members], np.arange(s.packs + 1))
        self.slowest = (
            np.maximum.reduceat(attention, s.rank_offsets[:-1])[:, None] * forward
            if s.packs
            else rings.seconds
        )

    def in_order(self, hide: bool) -> Played:
        """A ring's transfers hide behind its own attention, or nothing hides."""
        seconds = self.slowest + (_beyond(self.transfer, self.slowest) if hide else self.transfer)
        before = self.lump[self.ring] - self.lump[self.after]
        begin, end = self._play(seconds, before)
        done = self.lump[self.first[1:]] - self.lump[self.first[:-1]]
        waits = {reason: np.zeros(self.batches) for reason in ("peers", "node", "network")}
        if len(self.ring):
            pack, batch = self.pack[self.ring], self.batch[self.ring]
            came = before + self._end_of(end, self.previous)
            peers = begin[pack] - came + self.slowest[pack] - self.time[self.ring]
            late, across = (seconds - self.slowest)[pack].sum(1), self.network[pack]
            waits["peers"] = self._total(batch, peers.sum(1))
            waits["node"] = self._total(batch, np.where(across, 0.0, late))
            waits["network"] = self._total(batch, np.where(across, late, 0.0))
            some = self.last >= 0
            last = self.ring[self.last[some]]
            done[some] = end[self.pack[last]] + self.lump[self.first[1:][some]] - self.lump[last]
        return Played(done, waits, lambda: self._in_order_parts(begin, end))

    def _in_order_parts(self, begin: Floats, end: Floats) -> tuple[Floats, Floats, Floats]:
        ringed = np.zeros(len(self.pack), bool)
        ringed[self.ring] = True
        place = np.searchsorted(self.ring, np.arange(len(self.pack))) - 1
        mine = np.zeros(len(place), bool)
        if len(self.ring):
            mine = (place >= 0) & (self.batch[self.ring[np.maximum(place, 0)]] == self.batch)
        place = np.where(mine, place, -1)
        since = np.where(mine, self.ring[place] if len(self.ring) else 0, self.first[self.batch])
        begins = self._end_of(end, place) + self.lump[:-1] - self.lump[since]
        begins = np.where(ringed[:, None], begin[self.pack], begins)
        slowest = begins + np.where(ringed[:, None], self.slowest[self.pack], self.time)
        return begins, slowest, np.where(ringed[:, None], end[self.pack], slowest)

    def beside(self) -> Played:
        """Transfers of all rings of a micro-batch, one after another, hide behind the attention of all of them."""
        total = np.concatenate([np.zeros((1, 2)), np.cumsum(self.time, 0)])
        attention = total[self.first[1:]] - total[self.first[:-1]]
        _, end = self._play(self.transfer, np.zeros((len(self.ring), 2)))
        came = self._end_of(end, self.last)
        alone = self.lump[self.first[1:]] - self.lump[self.first[:-1]]
        ended = attention + _beyond(came, attention - alone)
        late = (ended - attention).sum(1)
        some = np.flatnonzero(self.last >= 0)
        across = np.zeros(self.batches, bool)
        across[some] = self.network[self.pack[self.ring[self.last[some]]]]
        waits = {
            "peers": np.zeros(self.batches),
            "node": np.where(across, 0.0, late),
            "network": np.where(across, late, 0.0),
        }

        def parts() -> tuple[Floats, Floats, Floats]:
            begins = total[:-1] - total[self.first[self.batch]]
            late_begin, late_end = begins + self.time, begins + self.time
            last = self.ring[self.last[some]]
            late_begin[last], late_end[last] = attention[some], ended[some]
            return begins, late_begin, late_end

        return Played(ended, waits, parts)

    def _play(self, seconds: Floats, before: Floats) -> tuple[Floats, Floats]:
        """(begin, end) of each pack, when rings that share members take turns; ``before`` each of their entries."""
        pack = self.pack[self.ring]
        waiting = np.bincount(pack[self.previous >= 0], minlength=self.packs)
        begin, end = np.zeros((self.packs, 2)), np.zeros((self.packs, 2))
        size = np.diff(self.bounds)
        ready = np.flatnonzero((waiting == 0) & (size > 0))
        while len(ready):
            n = size[ready]
            heads = np.cumsum(n) - n
            who = self.members[np.arange(n.sum()) + np.repeat(self.bounds[ready] - heads, n)]
            came = before[who] + self._end_of(end, self.previous[who])
            begin[ready] = np.maximum.reduceat(came, heads)
            end[ready] = begin[ready] + seconds[ready]
            after = self.following[who]
            after = pack[after[after >= 0]]
            np.subtract.at(waiting, after, 1)
            after = np.unique(after)
            ready = after[waiting[after] == 0]
        return begin, end

    def _end_of(self, end: Floats, place: Ints) -> Floats:
        """When the ring at each place in ``ring`` ended; 0 for -1."""
        if not len(self.ring):
            return np.zeros((len(place), 2))
        return np.where((place >= 0)[:, None], end[self.pack[self.ring[place]]], 0.0)

    def _total(self, batch: Ints, values: Floats) -> Floats:
        return np.bincount(batch, weights=values, minlength=self.batches).astype(np.float64)
