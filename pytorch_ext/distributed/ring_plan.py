# SPDX-License-Identifier: Apache-2.0
"""What a rank does in the rings of one micro-batch: made once, run by every layer in both directions.

The N places of a ring are groups of ``width`` neighbours: all of them, or the ranks of one node. A round is a pair
(turn, hop). In each turn every rank has the keys that the rank at its own place ``turn`` groups before had in the first
one; from hop to hop they go around its group, while they are already on their way to the next group for the next turn.
So the rank at place p of group a then has the keys of place ``(p - hop) mod width`` of group
``(a - turn) mod groups``. Each of the two chunks there travels on only while a rank to come sees it, and the gradient
that a group finds for it is summed around that group and goes home from the last rank there that sees it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapless.plan.varlen import BLOCKS, VarlenPlan, mask_window
from gapless.schedule.shards import MicroBatch, Shard

Ints = NDArray[np.int64]
NOTHING = slice(0, 0)


class Pair(NamedTuple):
    """One local call: this rank's chunk of every sequence of a pack, and a chunk of the keys at hand."""

    queries: slice  # rows of the micro-batch
    keys: slice  # rows of the keys at hand
    plan: VarlenPlan
    window: tuple[int, int]


class Round(NamedTuple):
    """What happens with the keys of one member of the ring; slices are rows of its keys that are at hand."""

    turn: int
    hop: int
    member: int  # whose keys they are
    rows: int  # tokens at hand
    pairs: tuple[Pair, ...]
    onward: slice  # what the next rank of the group needs, too
    outward: slice  # what later groups need; on the first hop of a turn
    homeward: slice  # what nobody in the group needs any more: the group's gradients for it are complete
    finder: int  # who sends gradients home to this rank in this round
    arriving: slice  # rows of this rank's own shard that they are of


@dataclass(frozen=True, eq=False)
class Ring:
    """A pack that this rank shares with others."""

    shard: Shard
    rows: slice  # of the micro-batch
    sequences: slice  # of the micro-batch
    rounds: tuple[Round, ...]

    def rank(self, place: int, turns: int = 0, hops: int = 0) -> int:
        """The rank so many groups on, and so many places on around the group there."""
        return self.shard.ranks[moved(place, turns, hops, self.shard.width, len(self.shard.ranks))]

    def round(self, turn: int, hop: int) -> Round:
        return self.rounds[turn * self.shard.width + hop]


@dataclass(frozen=True, eq=False)
class RingPlan:
    """All rings of a micro-batch under one mask.

    Attributes:
        micro_batch: of this rank.
        window: (left, right), with causal folded in.
        own: every chunk on its own keys: whole sequences of packs of one rank, and the diagonals of rings.
        own_sequences: int64 [chunks], which sequence of the micro-batch each of ``own`` is part of.
        rings: those of most ranks first, whose way is the longest, so that the others' work hides it (Zeppelin,
            arXiv:2509.21841, section 4); the order is the same for all members.
        sequences: of the micro-batch, with those that have no tokens here.
    """

    micro_batch: MicroBatch
    window: tuple[int, int]
    own: VarlenPlan
    own_sequences: Tensor
    rings: tuple[Ring, ...]
    sequences: int

    @staticmethod
    def make(
        micro_batch: MicroBatch,
        *,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        alibi: bool = False,
        device: torch.device | str = "cpu",
    ) -> RingPlan:
        """Lay out every call and every message; the same mask has to be given on all ranks.

        Args:
            micro_batch: from :meth:`gapless.schedule.Schedule.micro_batches`.
            causal, window: as for :func:`gapless.varlen_attention`.
            alibi: scores will depend on positions, so each call has to know where its chunks lie.
            device: where the tensors of plans will be.
        """
        sides, device = mask_window(causal, window), torch.device(device)
        sizes, parts_of, rings, row, sequence = [], [], [], 0, 0
        for shard in micro_batch.shards:
            members = slice(sequence, sequence + len(shard.sequences))
            for begin, end in shard.held_by(shard.index):
                sizes.append(end - begin)
                parts_of.append(np.arange(members.start, members.stop))
            rows = slice(row, row + shard.tokens)
            if len(shard.ranks) > 1:
                rounds = _rounds(shard, row, sides, alibi, device)
                rings.append(Ring(shard, rows, members, rounds))
            row, sequence = rows.stop, members.stop
        lengths = np.concatenate([np.empty(0, np.int64), *sizes])
        return RingPlan(
            micro_batch,
            sides,
            _plan(lengths, lengths, sides, device),
            torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts_of])).to(device),
            tuple(sorted(rings, key=lambda ring: (-len(ring.shard.ranks), ring.shard.pack))),
            sequence,
        )

    @staticmethod
    def of(
        micro_batch: MicroBatch,
        *,
        causal: bool,
        window: tuple[int, int],
        alibi: bool,
        device: torch.device,
    ) -> RingPlan:
        """The plan made before for the same arguments, or a new one."""
        made = _plans.setdefault(micro_batch, {})
        key = mask_window(causal, window), alibi, device
        if key not in made:
            made[key] = RingPlan.make(micro_batch, causal=causal, window=window, alibi=alibi, device=device)
        return made[key]


_plans: weakref.WeakKeyDictionary[MicroBatch, dict[tuple, RingPlan]] = weakref.WeakKeyDictionary()


def moved(place: int, turns: int, hops: int, width: int, size: int) -> int:
    """The place so many groups of ``width`` on in a ring of ``size``, and so many places on around the group."""
    group, inside = divmod(place, width)
    return (group + turns) % (size // width) * width + (inside + hops) % width


def _rounds(
    shard: Shard, row: int, window: tuple[int, int], alibi: bool, device: torch.device
) -> tuple[Round, ...]:
    """All rounds of one ring, for the rank whose shard it is; its first token is ``row`` of the micro-batch."""
    size, mine, width = len(shard.ranks), shard.index, shard.width
    cuts = np.stack([shard.chunk(j)[0] for j in range(2 * size)] + [shard.lengths])
    tokens = np.diff(cuts, axis=0).sum(1)
    sees = seen_chunks(cuts, window)
    last_hop, last_turn = last_seen(sees, width)
    starts = {mine: row, 2 * size - 1 - mine: row + int(tokens[mine])}
    rounds = []
    for turn, hop in product(range(size // width), range(width)):
        member, finder = (moved(mine, sign * turn, sign * hop, width, size) for sign in (-1, 1))
        last = last_hop[:, mine // width]
        wanted = last >= hop
        if hop == 0:
            wanted |= (last_turn >= turn) | (turn == 0)
        held = [c for c in (member, 2 * size - 1 - member) if wanted[c]]
        pairs, begin = [], 0
        for c in held:
            keys = slice(begin, begin + int(tokens[c]))
            begin = keys.stop
            pairs += [
                Pair(slice(start, start + int(tokens[a])), keys, *_call(cuts, a, c, window, alibi, device))
                for a, start in starts.items()
                if a != c and sees[a, c]
            ]
        at_home = turn == hop == 0
        rounds.append(
            Round(
                turn,
                hop,
                member,
                begin,
                tuple(pairs),
                onward=_rows(held, tokens, last > hop),
                outward=_rows(held, tokens, last_turn > turn) if hop == 0 else NOTHING,
                homeward=NOTHING if at_home else _rows(held, tokens, last == hop),
                finder=finder,
                arriving=NOTHING
                if at_home
                else _rows(list(starts), tokens, last_hop[:, finder // width] == hop),
            )
        )
    return tuple(rounds)


def seen_chunks(cuts: Ints, window: tuple[int, int]) -> NDArray[np.bool_]:
    """bool [chunks, chunks]: whether a query of the first chunk sees a key of the second, in any sequence.

    ``cuts`` is int64 [chunks + 1, sequences]: where chunks begin, then the lengths.
    """
    left, right = window
    chunks = len(cuts) - 1
    if left < 0 and right <= 0 and (np.diff(cuts, axis=0).min(0, initial=1) > 0).any():
        # Some sequence has a token in every chunk, so the numbers of chunks tell.
        return np.tri(chunks, dtype=bool) if right == 0 else np.ones((chunks, chunks), bool)
    begin, end = cuts[:-1], cuts[1:]
    sees = np.zeros((chunks, chunks), bool)
    for c in range(chunks):
        both = (end > begin) & (end[c] > begin[c])
        if left >= 0:
            both &= end[c] - 1 >= begin - left
        if right >= 0:
            both &= begin[c] <= end - 1 + right
        sees[:, c] = both.any(1)
    return sees


def last_seen(sees: NDArray[np.bool_], width: int) -> tuple[Ints, Ints]:
    """(last_hop, last_turn): int64 [chunks, groups], the last hop in which a rank of each group sees each chunk, and
    int64 [chunks], the last turn in which any does; -1: none does. What its own rank sees does not count.
    """
    chunks = len(sees)
    size = chunks // 2
    groups = size // width
    by_rank = sees[:size] | sees[: size - 1 : -1]  # [ranks, chunks], either of a rank's two chunks
    owner = np.minimum(np.arange(chunks), chunks - 1 - np.arange(chunks))
    rank = np.arange(size)[:, None]
    by_rank = by_rank & (rank != owner)
    hops = np.where(by_rank, (rank - owner) % width, -1).reshape(groups, width, chunks).max(1)
    turns = (np.arange(groups)[:, None] - owner // width) % groups
    return hops.T, np.where(hops >= 0, turns, -1).max(0)


def _rows(held: list[int], tokens: Ints, wanted: NDArray[np.bool_]) -> slice:
    """Where the wanted ones of the chunks at hand lie: both, the first, the second, or nothing."""
    begin, found = 0, NOTHING
    for c in held:
        end = begin + int(tokens[c])
        if wanted[c]:
            found = slice(begin if found == NOTHING else found.start, end)
        begin = end
    return found


def _call(
    cuts: Ints, a: int, c: int, window: tuple[int, int], alibi: bool, device: torch.device
) -> tuple[VarlenPlan, tuple[int, int]]:
    """The plan of one pair of chunks and the window that it needs: none, if everything is seen anyway."""
    (begin_q, end_q), (begin_k, end_k) = cuts[a : a + 2], cuts[c : c + 2]
    left, right = window
    hidden = np.zeros(len(begin_q), bool)
    if left >= 0:
        hidden |= begin_k < end_q - 1 - left
    if right >= 0:
        hidden |= end_k - 1 > begin_q + right
    hidden &= (end_q > begin_q) & (end_k > begin_k)
    if not hidden.any():
        window = (-1, -1)
    offset = begin_q - begin_k if alibi or hidden.any() else None
    return _plan(end_q - begin_q, end_k - begin_k, window, device, offset), window


def _plan(
    lengths_q: Ints,
    lengths_k: Ints,
    window: tuple[int, int],
    device: torch.device,
    offset: Ints | None = None,
) -> VarlenPlan:
    cu_q, cu_k = (torch.from_numpy(np.concatenate([[0], np.cumsum(x)])) for x in (lengths_q, lengths_k))
    if offset is not None and np.abs(offset).max(initial=0) > np.iinfo(np.int32).max:
        raise ValueError("micro_batch has a sequence of more than 2^31 - 1 tokens: positions are int32")
    block_q, block_k = BLOCKS["cuda" if device.type == "cuda" else "cpu"]
    plan = VarlenPlan.make(
        cu_q,
        cu_k,
        window=window,
        block_q=block_q,
        block_k=block_k,
        q_offset=None if offset is None else torch.from_numpy(offset.astype(np.int32)),
    )
    return plan if device.type == "cpu" else plan.to(device)
