# SPDX-License-Identifier: Apache-2.0
"""What happens inside the micro-batches of a schedule, each step taken alone, before pipelines put them in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.links import Moves, Rings
from gapless.schedule.ring_order import RingOrder

if TYPE_CHECKING:
    from gapless.schedule.schedule import Schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Overlap = bool | Literal["ring"]

ATTENTION, LINEAR, NODE, NETWORK, HOST = range(5)
KINDS = ("attention", "linear", "node", "network", "host")
PART = np.dtype(
    [
        ("batch", np.int64),
        ("pack", np.int64),
        ("kind", np.int64),
        ("begin", np.float64, 2),
        ("end", np.float64, 2),
    ]
)


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """All micro-batches of a schedule; columns of two are forward and backward. Of a whole model, all layers.

    Attributes:
        rank, step: int64 [m], ascending by rank, then step.
        tied: int64 [m], the same for micro-batches that begin and end together.
        seconds: float64 [m, 2], from begin to end.
        busy: float64 [m], seconds of computing.
        waits: float64 [m] for "peers", "node", "network", "host": the rest of ``seconds``.
        host_bytes: copied to the host and back, all ranks.
        parts: structured array :data:`PART`, when what is done, from the begin of the micro-batch; pack -1 is all of
            it. None unless asked for.
    """

    rank: Ints
    step: Ints
    tied: Ints
    seconds: Floats
    busy: Floats
    waits: dict[str, Floats]
    host_bytes: float
    parts: NDArray[np.void] | None = None


def connected(nodes: int, group: Ints, member: Ints) -> Ints:
    """int64 [nodes], the smallest node that each is connected to: nodes ``member`` of one ``group`` are."""
    label = np.arange(nodes)
    if not len(group):
        return label
    order = np.argsort(group, kind="stable")
    member = member[order]
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.diff(begins, append=len(member))
    while True:
        seen = label[member]
        least = np.repeat(np.minimum.reduceat(seen, begins), sizes)
        if (seen == least).all():
            return label
        # Whoever a label stands for joins too, so that chains shorten by more than one link a round.
        np.minimum.at(label, seen, least)
        np.minimum.at(label, member, least)
        while (label[label] != label).any():
            label = label[label]


def play_micro_batches(
    schedule: Schedule,
    rings: Rings,
    moves: Moves,
    *,
    overlap: Overlap = True,
    host_overlap: bool = True,
    parts: bool = False,
) -> MicroBatches:
    """Time each micro-batch from the moment at which all that are tied to it are ready."""
    s, cost = schedule, schedule.cost
    steps, speeds = max(s.micro_steps, 1), s.cluster.speeds
    pack = np.repeat(np.arange(s.packs), s.ring_sizes)
    size = s.ring_sizes[pack]
    entry_key = s.ring_ranks * steps + s.steps[pack]
    key, batch = np.unique(np.concatenate([entry_key, moves.key]), return_inverse=True)
    batch = batch[: len(pack)]
    m, rank, step = len(key), key // steps, key % steps
    speed = speeds[rank]

    tokens: Floats = np.bincount(batch, weights=s.pack_tokens[pack] / size, minlength=m).astype(np.float64)
    attention = cost.attention(s.pack_cells[pack]) / size / speed[batch]
    packed = np.bincount(batch, weights=attention, minlength=m)
    order = RingOrder(s, rings, pack, batch, attention, m)
    played = order.beside() if overlap is True else order.in_order(hide=overlap == "ring")
    end, waits = played.end, played.waits

    tied = connected(m, pack[size > 1], batch[size > 1])
    if len(moves.key):
        lock = np.isin(step, s.moves[:, 0])
        tied[lock] = _least(step[lock], np.flatnonzero(lock), steps)[step[lock]]
        end, waits = _lock_step(end, waits, tied, lock, moves, key, step)
    linear_tokens = _after_moves(s, tokens, key, steps)
    computed = (cost.linear(linear_tokens) + cost.overhead) / speed
    linear = computed[:, None] * np.array([1.0, cost.backward_token]) / (1 + cost.backward_token)
    linear_begin = end
    end = end + linear

    offload = np.zeros(m)
    offload[batch] = s.offload[pack]
    # The first and the last layer's activations stay.
    copied = offload * cost.activation(tokens) * (max(cost.layers - 2, 0) / cost.layers)
    copy = np.repeat((copied / cost.host_bandwidth)[:, None], 2, 1)
    host_begin = end
    if not host_overlap:
        waits["host"] = copy.sum(1)
        end = end + copy
    together = _longest(end, tied)
    waits["peers"] = waits["peers"] + (together - end).sum(1)
    if host_overlap:
        late = np.maximum(copy - together, 0.0)
        waits["host"] = late.sum(1)
        last = _longest(together + late, tied)
        waits["peers"] = waits["peers"] + (last - together - late).sum(1)
        host_begin, together = together, last
        copy = late
    table = None
    if parts:
        whole = np.full(m, -1)
        late = np.where(rings.network[order.pack], NETWORK, NODE) if s.packs else order.pack
        begin, late_begin, late_end = played.parts()
        rows = (
            (order.batch, order.pack, ATTENTION, begin, begin + order.time),
            (order.batch, order.pack, late, late_begin, late_end),
            (np.arange(m), whole, LINEAR, linear_begin, linear_begin + linear),
            (np.arange(m), whole, HOST, host_begin, host_begin + copy),
        )
        table = np.concatenate([_parts(*row) for row in rows])
    return MicroBatches(rank, step, tied, together, packed + computed, waits, 2 * float(copied.sum()), table)


def _parts(batch: Ints, pack: Ints, kind: ArrayLike, begin: Floats, end: Floats) -> NDArray[np.void]:
    out = np.empty(len(batch), PART)
    for name, values in zip(PART.names or (), (batch, pack, kind, begin, end), strict=True):
        out[name] = values
    return out[(end > begin).any(1)]


def _least(group: Ints, values: Ints, groups: int) -> Ints:
    out = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(out, group, values)
    return out


def _longest(values: Floats, tied: Ints) -> Floats:
    """The most of each column among those tied together, for each."""
    out = values.copy()
    others = np.flatnonzero(tied != np.arange(len(tied)))
    if len(others):
        np.maximum.at(out[:, 0], tied[others], values[others, 0])
        np.maximum.at(out[:, 1], tied[others], values[others, 1])
    return out[tied]


def _after_moves(s: Schedule, tokens: Floats, key: Ints, steps: int) -> Floats:
    """Tokens of each micro-batch in the linear modules."""
    if not len(s.moves):
        return tokens
    step, source, target, count = s.moves.T
    out = tokens.copy()
    np.subtract.at(out, np.searchsorted(key, source * steps + step), count)
    np.add.at(out, np.searchsorted(key, target * steps + step), count)
    return out


def _lock_step(
    end: Floats,
    waits: dict[str, Floats],
    tied: Ints,
    lock: NDArray[np.bool_],
    moves: Moves,
    key: Ints,
    step: Ints,
) -> tuple[Floats, dict[str, Floats]]:
    """When the slowest rank has its tokens, and what the others wait for."""
    longest = np.where(lock[:, None], _longest(end, tied), end)
    own = np.zeros_like(end)
    place = np.searchsorted(key, moves.key)
    own[place] = moves.own
    after = np.where(lock[:, None], longest + moves.seconds[step], longest)
    waits = dict(waits)
    across = np.zeros(len(key), bool)
    across[place] = moves.across
    waits["network"] = waits["network"] + np.where(across, own.sum(1), 0.0)
    waits["node"] = waits["node"] + np.where(across, 0.0, own.sum(1))
    waits["peers"] = waits["peers"] + (after - own - end).sum(1)
    return after, waits
