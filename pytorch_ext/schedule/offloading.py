# SPDX-License-Identifier: Apache-2.0
"""Selective offloading: how few ranks a long sequence needs (ByteScale, arXiv:2502.21231, equation 3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import check_fits

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def offload_limit(lengths: ArrayLike, cost: CostModel) -> Floats:
    """Largest share of the inner layers' activations whose copies hide behind computing, float64 like ``lengths``.

    Equation 3 asks for ``T(s) >= r Act(s) / min(B_d2h, B_h2d)``: a layer's copies take no longer than its forward
    pass, the shorter of its two. Over D ranks both sides shrink by D, so the limit holds for every ring. The fixed part
    of T is left out, since it does not grow with what is copied.
    """
    n = np.asarray(lengths, np.float64)
    if cost.layers <= 2:  # the first and the last layer's activations stay
        return np.zeros_like(n)
    size = n * cost.activation_bytes
    if np.isinf(cost.host_bandwidth):
        return np.ones_like(n)
    copied = (cost.cell * cost.cells(n) + cost.token * n) * cost.host_bandwidth
    return np.minimum(1.0, np.divide(copied, size, out=np.ones_like(n), where=size > 0))


def least_ranks(
    lengths: ArrayLike, *, capacity: int, cost: CostModel, offload: bool = True
) -> tuple[Ints, Floats]:
    """Equation 3: the fewest ranks D(s) that hold each sequence, and the smallest share r with which they do.

    ``D(s) = ceil((2 Act(s) + (1 - r)(l - 2) Act(s)) / (l Act(C)))`` falls with r, so that it is least at the largest r
    that hides (:func:`offload_limit`); shards are whole tokens, so D is the fewest ranks of which each holds
    ``ceil(s / D) (1 - r (l - 2) / l) <= C``. Solved for r, that is the lower bound used here:
    ``r >= l / (l - 2) (1 - C / ceil(s / D))``, and 0 where the shards fit as they are. The bound printed in the paper,
    ``min(1, l Act(C) / ((l - 2) Act(s)))``, falls as sequences get longer, whereas the need to offload grows with
    them; it is not used.

    Args:
        lengths: [n] tokens; a sequence without tokens takes one rank.
        capacity: tokens of a rank.

    Returns:
        int64 [n] ranks, float64 [n] shares.
    """
    n = np.asarray(lengths, np.int64)
    most = offload_limit(n, cost) if offload else np.zeros(n.shape)
    ring = fewest(n, cost.resident_share(most), capacity)
    return ring, needed(-(-n // ring), capacity, cost)


def ring_sizes(
    lengths: Ints, *, capacity: int, cost: CostModel, ranks: int, seconds: float, offload: bool = True
) -> Ints:
    """Ranks of each sequence for planners that choose no rings of their own, int64 like ``lengths``.

    Equation 3 counts memory alone: as much of a long sequence hides as one likes, so that 2M tokens would be left to a
    sixteenth of the ranks that hold them otherwise, and compute sixteen times as long while the others wait. A
    sequence therefore gets as many ranks as it needs to be done in ``seconds`` (what the batch takes at best), at least
    those of equation 3 and at most those that hold it without offloading.
    """
    least, _ = least_ranks(lengths, capacity=capacity, cost=cost, offload=offload)
    most = np.maximum(np.minimum(fewest(lengths, 1.0, capacity), ranks), least)
    if seconds <= 0:
        return most
    return np.clip(np.ceil(cost.work(lengths) / seconds), least, most).astype(np.int64)


def fewest(lengths: ArrayLike, share: ArrayLike, capacity: ArrayLike) -> Ints:
    """Ranks whose shards' resident ``share`` fits, int64 like ``lengths``."""
    # One part in 1e9 is for the rounding of the quotient, far below a token.
    shard = np.floor(np.asarray(capacity) / share * (1 + 1e-9)).astype(np.int64)
    return np.maximum(-(-np.asarray(lengths, np.int64) // shard), 1)


def needed(shard: ArrayLike, capacity: ArrayLike, cost: CostModel) -> Floats:
    """The share of the inner layers' activations that has to go so that ``shard`` tokens fit; 0 if they do."""
    if cost.layers <= 2:
        return np.zeros(np.shape(shard))
    over = 1 - np.asarray(capacity) / np.maximum(shard, 1)
    return np.clip(over * (cost.layers / (cost.layers - 2)), 0.0, 1.0)


def check_holds(lengths: Ints, share: Floats, limits: Ints) -> None:
    """Raise ValueError for a sequence that no ring holds: the roomiest is all ranks of some capacity or more.

    ``share``: float64 [n], the least share of each sequence's activations that stays on a device. ``limits``: int64
    [ranks], capacities.
    """
    long = np.flatnonzero(lengths > limits.max())
    held = np.zeros(len(long), np.int64)
    kinds, counts = np.unique(limits, return_counts=True)
    for capacity, count in zip(kinds, counts[::-1].cumsum()[::-1], strict=True):
        shard = np.floor(capacity / share[long] * (1 + 1e-9)).astype(np.int64)
        held = np.maximum(held, shard * count)
    if (over := long[lengths[long] > held]).size:
        i = over[lengths[over].argmax()]
        alone = np.where(np.arange(len(lengths)) == i, lengths, 0)
        check_fits(alone, int(held[long == i][0]), len(limits), float(share[i]))
