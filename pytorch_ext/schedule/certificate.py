# SPDX-License-Identifier: Apache-2.0
"""An independent checker: it trusts no planner, and looks at the very pieces that ranks will compute.

Every token is computed exactly once, no rank is above its capacity, peers agree. It shares no code with the planners;
it reads chunk boundaries where the run reads them and checks what they have to be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gapless.schedule.shards import chunk_begin

if TYPE_CHECKING:
    from gapless.schedule.schedule import Schedule


def certify(schedule: Schedule) -> None:
    """Raise ValueError, naming what is wrong, unless ``schedule`` may be run."""
    _check_shapes(schedule)
    _check_rings(schedule)
    held = _check_coverage(schedule)
    _check_capacity(schedule, held)
    _check_moves(schedule, held)


def _check_shapes(s: Schedule) -> None:
    packs, n = len(s.steps), len(s.lengths)
    for name, entries in (
        ("pack_of", n),
        ("rank_offsets", packs + 1),
        ("offload", packs),
        ("capacity", s.cluster.ranks),
    ):
        shape = getattr(s, name).shape
        if shape != (entries,):
            raise ValueError(f"{name} has shape {list(shape)}: it has to be [{entries}]")
    if s.moves.ndim != 2 or s.moves.shape[1] != 4:
        raise ValueError(f"moves has shape {list(s.moves.shape)}: it has to be [m, 4]")
    if n and s.lengths.min() < 0:
        i = int(s.lengths.argmin())
        raise ValueError(f"lengths[{i}] is {s.lengths[i]}: a sequence has 0 tokens or more")
    if n and (s.pack_of.min() < 0 or s.pack_of.max() >= packs):
        i = int(np.argmax((s.pack_of < 0) | (s.pack_of >= packs)))
        raise ValueError(
            f"sequence {i} is in pack {s.pack_of[i]}, of {packs}: its tokens would not be computed"
        )
    if packs and s.steps.min() < 0:
        raise ValueError(f"pack {int(s.steps.argmin())} is in step {s.steps.min()}: steps count from 0")
    inside = (s.offload >= 0) & (s.offload <= 1)
    if not inside.all():
        p = int(np.argmin(inside))
        raise ValueError(f"offload[{p}] is {s.offload[p]}: it has to be between 0 and 1")


def _check_rings(s: Schedule) -> None:
    offsets = s.rank_offsets
    if offsets[0] != 0 or offsets[-1] != len(s.ring_ranks) or (np.diff(offsets) < 1).any():
        raise ValueError(
            "rank_offsets has to start at 0, end at the size of ring_ranks, and give each pack a rank"
        )
    ranks = s.cluster.ranks
    if len(s.ring_ranks) and (s.ring_ranks.min() < 0 or s.ring_ranks.max() >= ranks):
        bad = s.ring_ranks[(s.ring_ranks < 0) | (s.ring_ranks >= ranks)][0]
        raise ValueError(f"ring_ranks names rank {bad}: ranks are 0 to {ranks - 1}")
    pack = np.repeat(np.arange(len(s.steps)), np.diff(offsets))
    member = np.sort(pack * ranks + s.ring_ranks)
    if (twice := np.flatnonzero(np.diff(member) == 0)).size:
        p, rank = divmod(int(member[twice[0]]), ranks)
        raise ValueError(f"rank {rank} is twice in the ring of pack {p}")


def _check_coverage(s: Schedule) -> dict[str, np.ndarray]:
    """Tokens of each member of each ring, from boundaries that have to cut every sequence without gap or overlap."""
    order = np.argsort(s.pack_of, kind="stable")
    lengths, pack = s.lengths[order], s.pack_of[order]
    total = np.cumsum(lengths)
    starts = np.searchsorted(pack, np.arange(len(s.steps)))
    ends = np.searchsorted(pack, np.arange(len(s.steps)), side="right")
    sizes = np.diff(s.rank_offsets)
    tokens = np.zeros(len(s.ring_ranks), np.int64)
    alone = sizes[pack] == 1 if len(pack) else np.zeros(0, bool)
    np.add.at(tokens, s.rank_offsets[pack[alone]], lengths[alone])
    for p in np.flatnonzero((sizes > 1) & (ends > starts)):
        rows = slice(starts[p], ends[p])
        length = lengths[rows]
        first = total[rows] - length - (total[starts[p]] - lengths[starts[p]])
        n = int(sizes[p])
        # Long packs of many sequences over many ranks: a few chunks of the table at a time.
        per_rank = np.zeros(2 * n, np.int64)
        for begin in range(0, len(length), max(1, 2**20 // n)):
            some = slice(begin, begin + max(1, 2**20 // n))
            cut = chunk_begin(first[some, None], length[some, None], np.arange(2 * n + 1), 2 * n)
            if (cut[:, 0] != 0).any() or (cut[:, -1] != length[some]).any() or (np.diff(cut) < 0).any():
                raise ValueError(
                    f"pack {p}: the chunks of its {n} ranks do not cover its sequences exactly once"
                )
            per_rank += np.diff(cut).sum(0)
        tokens[s.rank_offsets[p] : s.rank_offsets[p + 1]] = per_rank[:n] + per_rank[: n - 1 : -1]
    if tokens.sum() != s.lengths.sum():
        raise ValueError(f"ranks hold {tokens.sum()} tokens of {s.lengths.sum()}")
    pack = np.repeat(np.arange(len(s.steps)), sizes)
    micro_batch = s.ring_ranks * (int(s.steps.max()) + 1 if len(s.steps) else 1) + s.steps[pack]
    keys, inverse = np.unique(micro_batch, return_inverse=True)
    return {
        "key": keys,
        "tokens": np.bincount(inverse, weights=tokens, minlength=len(keys)),
        "least": _extreme(np.minimum, s.offload[pack], inverse, len(keys), np.inf),
        "most": _extreme(np.maximum, s.offload[pack], inverse, len(keys), -np.inf),
    }


def _extreme(op, values: np.ndarray, index: np.ndarray, size: int, start: float) -> np.ndarray:
    out = np.full(size, start)
    op.at(out, index, values)
    return out


def _check_capacity(s: Schedule, held: dict[str, np.ndarray]) -> None:
    steps = int(s.steps.max()) + 1 if len(s.steps) else 1
    if (mixed := np.flatnonzero(held["least"] != held["most"])).size:
        rank, step = divmod(int(held["key"][mixed[0]]), steps)
        raise ValueError(
            f"rank {rank}, step {step}: its packs have different offload ratios; a micro-batch has one"
        )
    resident = held["tokens"] * s.cost.resident_share(held["most"])
    limit = s.capacity[held["key"] // steps]
    # The ratio is a quotient of tokens, so a rounding error of it is far below one token.
    if (over := np.flatnonzero(resident > limit + 1e-6 * np.maximum(limit, 1))).size:
        rank, step = divmod(int(held["key"][over[0]]), steps)
        raise ValueError(
            f"rank {rank} holds the activations of {resident[over[0]]:.0f} tokens in step {step}: "
            f"its capacity is {limit[over[0]]}"
        )


def _check_moves(s: Schedule, held: dict[str, np.ndarray]) -> None:
    """Every rank gives only tokens that it has; steps and ranks exist."""
    if not len(s.moves):
        return
    steps = int(s.steps.max()) + 1 if len(s.steps) else 1
    step, source, target, count = s.moves.T
    if (count < 1).any() or (source == target).any():
        raise ValueError("moves: each has to move at least one token between two ranks")
    for name, value, limit in (("step", step, steps), ("rank", source, s.ranks), ("rank", target, s.ranks)):
        if value.min() < 0 or value.max() >= limit:
            raise ValueError(
                f"moves names {name} {value.min() if value.min() < 0 else value.max()}, of {limit}"
            )
    keys, inverse = np.unique(source * steps + step, return_inverse=True)
    given = np.bincount(inverse, weights=count)
    place = np.searchsorted(held["key"], keys)
    has = np.zeros(len(keys))
    found = (place < len(held["key"])) & (held["key"][np.minimum(place, len(held["key"]) - 1)] == keys)
    has[found] = held["tokens"][place[found]]
    if (given > has).any():
        i = int(np.argmax(given > has))
        rank, at = divmod(int(keys[i]), steps)
        raise ValueError(f"rank {rank} gives away {given[i]:.0f} tokens in step {at}: it has {has[i]:.0f}")
    received = np.unique(target * steps + step)
    if (both := np.intersect1d(received, keys)).size:
        rank, at = divmod(int(both[0]), steps)
        raise ValueError(f"rank {rank} gives and receives tokens in step {at}: only a surplus moves")
