# SPDX-License-Identifier: Apache-2.0
"""Ring attention over the rings of one micro-batch, forward and backward.

Of one level (arXiv:2310.01889, arXiv:2502.21231) or two (arXiv:2406.18485): see :mod:`gapless.distributed.ring_plan`.

Keys and values travel as one tensor [tokens, kv_heads, dim + dim_v]. While a round is computed, the keys of the next
are under way, and those of all other rings of the micro-batch, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gapless.distributed.peers import GRADIENTS, HOME, KEYS, OUTER, Exchange, Message, tag_of
from gapless.distributed.ring_plan import NOTHING, Ring, RingPlan, Round


@dataclass(frozen=True)
class Attention:
    """The raw operators, and what is the same in all their calls."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    score: list[float]  # scale, softcap
    slopes: Tensor | None  # float32 [heads] or [sequences of the micro-batch, heads]
    group: dist.ProcessGroup | None

    def own_slopes(self, plan: RingPlan) -> Tensor | None:
        """Of each chunk of this rank."""
        if self.slopes is None or self.slopes.dim() == 1:
            return self.slopes
        return self.slopes.index_select(0, plan.own_sequences)

    def ring_slopes(self, ring: Ring) -> Tensor | None:
        """Of each sequence of a ring."""
        if self.slopes is None or self.slopes.dim() == 1:
            return self.slopes
        return self.slopes[ring.sequences]


def forward(
    plan: RingPlan, attention: Attention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out [tokens, heads, dim_v] in q's dtype and LSE [heads, tokens] of this rank's queries over all keys.

    A sink takes part once, with the chunks' own keys: every query has those.
    """
    keys = [_Keys(plan, ring, attention.group, k, v) for ring in plan.rings]
    out, lse = attention.forward(
        q,
        k,
        v,
        plan.own.tensors,
        None,
        None,
        attention.own_slopes(plan),
        sinks,
        attention.score,
        list(plan.window),
    )
    merged, total = (
        out.to(wide_dtype(q)),
        lse.double(),
    )  # each rounding of an LSE is one of all that it scales
    for round_, ring, travelling in _rounds(plan, keys):
        at_hand = travelling.take(round_)
        for pair in round_.pairs:
            part, part_lse = attention.forward(
                q[pair.queries],
                *_split(at_hand[pair.keys], k.shape[-1]),
                pair.plan.tensors,
                None,
                None,
                attention.ring_slopes(ring),
                None,
                attention.score,
                list(pair.window),
            )
            merge_(merged[pair.queries], total[:, pair.queries], part, part_lse)
    for travelling in keys:
        travelling.finish()
    return merged.to(q.dtype), total.to(lse.dtype)


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Join the result over other keys to ``out`` [tokens, heads, dim] and ``lse`` [heads, tokens], in place."""
    joint = torch.logaddexp(lse, part_lse)
    old, new = (
        torch.exp(x - joint).masked_fill_(x == -torch.inf, 0.0).to(out.dtype).T[..., None]
        for x in (lse, part_lse)
    )
    out.mul_(old).addcmul_(part.to(out.dtype), new)
    lse.copy_(joint)


def backward(
    plan: RingPlan,
    attention: Attention,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsinks); that of the sinks is this rank's part.

    With ``out`` and ``lse`` over all keys, the local backward pass over some keys gives exactly their part of the
    gradients. Those of travelling keys are summed in float32 (float64) from rank to rank.
    """
    keys = [_Keys(plan, ring, attention.group, k, v) for ring in plan.rings]
    wide = wide_dtype(q)
    dq, dk, dv, dsinks = attention.backward(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        plan.own.tensors,
        attention.own_slopes(plan),
        sinks,
        attention.score,
        list(plan.window),
    )
    dq, dkv = dq.to(wide), torch.cat([dk.to(wide), dv.to(wide)], -1)
    del dk, dv
    gradients = [_Gradients(plan, ring, attention.group, dkv[ring.rows]) for ring in plan.rings]
    sent = dict(zip(plan.rings, gradients, strict=True))
    for round_, ring, travelling in _rounds(plan, keys):
        at_hand = travelling.take(round_)
        part = sent[ring].begin(round_)
        for pair in round_.pairs:
            rows = pair.queries
            gradient_q, *gradient_kv, _ = attention.backward(
                dout[rows],
                None if dlse is None else dlse[:, rows],
                q[rows],
                *_split(at_hand[pair.keys], k.shape[-1]),
                out[rows],
                lse[:, rows],
                pair.plan.tensors,
                attention.ring_slopes(ring),
                None,
                attention.score,
                list(pair.window),
            )
            dq[rows] += gradient_q
            for total, term in zip(_split(part[pair.keys], k.shape[-1]), gradient_kv, strict=True):
                total += term
        sent[ring].deliver(round_, part)
    for travelling in keys:
        travelling.finish()
    for gradient in gradients:
        gradient.finish()
    dk, dv = (x.to(k.dtype) for x in _split(dkv, k.shape[-1]))
    return dq.to(q.dtype), dk, dv, dsinks


def wide_dtype(q: Tensor) -> torch.dtype:
    """What partial results are summed in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _split(kv: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return kv[..., :dim], kv[..., dim:]


def _rounds(plan: RingPlan, keys: list[_Keys]) -> Iterator[tuple[Round, Ring, _Keys]]:
    """Round by round, ring by ring: the order in which all ranks post and wait."""
    for r in range(max((len(ring.rounds) for ring in plan.rings), default=0)):
        for ring, travelling in zip(plan.rings, keys, strict=True):
            if r < len(ring.rounds):
                yield ring.rounds[r], ring, travelling


class _Traveller:
    """What one ring has under way in one direction."""

    kind: str

    def __init__(self, plan: RingPlan, ring: Ring, group: dist.ProcessGroup | None) -> None:
        self._ring, self._group = ring, group
        self._rank, self._step = plan.micro_batch.rank, plan.micro_batch.step
        self._place = ring.shard.index
        self._width, self._turns = ring.shard.width, len(ring.rounds) // ring.shard.width

    def _next_hop(self, round_: Round) -> int:
        """Rows that come from this rank's neighbour for the next round; none after the last hop."""
        hop = round_.hop + 1
        return self._ring.round(round_.turn, hop).rows if hop < self._width else 0

    def _post(self, round_: Round, sends: list[Message], receives: list[Message]) -> Exchange:
        shard = self._ring.shard
        about = (
            f"rank {self._rank}, step {self._step}, pack {shard.pack} on ranks {list(shard.ranks)}, "
            f"{self.kind} after round {round_.turn * self._width + round_.hop}"
        )
        return Exchange(sends, receives, self._group, about)

    def _message(self, rows: Tensor, rank: int, kind: int) -> Message:
        return Message(rows, rank, tag_of(self._ring.shard.pack, kind))

    def _peer(self, turns: int, hops: int) -> int:
        """The rank so many groups on, and so many places on around the group there."""
        return self._ring.rank(self._place, turns, hops)


class _Keys(_Traveller):
    """Keys and values on their way around groups, and from group to group."""

    kind = "keys"

    def __init__(
        self, plan: RingPlan, ring: Ring, group: dist.ProcessGroup | None, k: Tensor, v: Tensor
    ) -> None:
        super().__init__(plan, ring, group)
        self._at_hand = torch.cat([k[ring.rows], v[ring.rows]], -1)
        self._go_on(ring.rounds[0])

    def _room(self, rows: int) -> Tensor:
        return self._at_hand.new_empty(rows, *self._at_hand.shape[1:])

    def _go_on(self, round_: Round) -> None:
        """Send on what is at hand, and a share of what was at hand on this turn's first hop for the next turn."""
        if round_.hop == 0:
            turn = round_.turn + 1
            self._leaving = self._at_hand[round_.outward]
            self._of_next_turn = self._room(self._ring.round(turn, 0).rows if turn < self._turns else 0)
        self._of_next_hop = self._room(self._next_hop(round_))
        self._exchange = self._post(
            round_,
            [
                self._message(self._at_hand[round_.onward], self._peer(0, 1), KEYS),
                self._message(self._share(self._leaving, round_), self._peer(1, 0), OUTER),
            ],
            [
                self._message(self._of_next_hop, self._peer(0, -1), KEYS),
                self._message(self._share(self._of_next_turn, round_), self._peer(-1, 0), OUTER),
            ],
        )

    def _share(self, rows: Tensor, round_: Round) -> Tensor:
        """One for each hop: so both levels are under way all the time, even where messages go one after another."""
        begin, end = (i * len(rows) // self._width for i in (round_.hop, round_.hop + 1))
        return rows[begin:end]

    def take(self, round_: Round) -> Tensor:
        """The keys of this round; those of the next are under way from now on."""
        if round_.turn or round_.hop:
            before = self._exchange
            before.receive()
            self._at_hand = self._of_next_hop if round_.hop else self._of_next_turn
            self._go_on(round_)
            before.finish()
        return self._at_hand

    def finish(self) -> None:
        self._exchange.finish()


class _Gradients(_Traveller):
    """Gradients of keys and values, which follow them around a group one hop behind and then go home."""

    kind = "gradients"

    def __init__(self, plan: RingPlan, ring: Ring, group: dist.ProcessGroup | None, home: Tensor) -> None:
        super().__init__(plan, ring, group)
        self._home = home  # of this rank's own keys
        self._exchange: Exchange | None = None
        self._coming = home[NOTHING]
        self._homeward: deque[tuple[Exchange, slice, Tensor]] = deque()

    def begin(self, round_: Round) -> Tensor:
        """Where the gradients of the keys at hand are added up."""
        if round_.member == self._place:
            return self._home
        return self._home.new_zeros(round_.rows, *self._home.shape[1:])

    def deliver(self, round_: Round, part: Tensor) -> None:
        """Add what the ranks before found for the same keys, and send the sum on, or home."""
        if round_.member == self._place:
            return
        if self._exchange is not None:
            self._exchange.finish()
            if round_.hop:
                part += self._coming
        self._coming = part.new_empty(self._next_hop(round_), *part.shape[1:])
        self._exchange = self._post(
            round_,
            [self._message(part[round_.onward], self._peer(0, 1), GRADIENTS)],
            [self._message(self._coming, self._peer(0, -1), GRADIENTS)],
        )
        # Home is far for all but the first group, so there is a whole turn for the way; the copy lets go of the rest.
        while len(self._homeward) >= self._width:
            self._take_home()
        ranks, arrived = self._ring.shard.ranks, torch.empty_like(self._home[round_.arriving])
        exchange = self._post(
            round_,
            [self._message(part[round_.homeward].clone(), ranks[round_.member], HOME)],
            [self._message(arrived, ranks[round_.finder], HOME)],
        )
        self._homeward.append((exchange, round_.arriving, arrived))

    def _take_home(self) -> None:
        exchange, rows, arrived = self._homeward.popleft()
        exchange.finish()
        self._home[rows] += arrived

    def finish(self) -> None:
        """Wait for what is under way; what has come home is added."""
        if self._exchange is not None:
            self._exchange.finish()
        while self._homeward:
            self._take_home()
