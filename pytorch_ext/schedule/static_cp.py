# SPDX-License-Identifier: Apache-2.0
"""The baseline of ByteScale's comparison: a fixed grid of data-parallel times context-parallel ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gapless.schedule.bytescale_paper import best_fit
from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.inputs import check_capacity, check_fits, check_lengths
from gapless.schedule.schedule import Schedule


def plan(
    lengths: ArrayLike,
    *,
    ranks: int | Cluster,
    capacity: ArrayLike,
    cost: CostModel,
    cp: int | None = None,
    context: int | None = None,
    two_level: bool = False,
) -> Schedule:
    """Every sequence, long or short, is cut over the ``cp`` ranks of one replica.

    Sequences are packed in the order of the batch by best fit into micro-batches of ``cp * capacity`` tokens, which go
    to the ``ranks / cp`` replicas in turn; replicas are runs of neighbouring ranks.

    Args:
        cp: ranks of a replica; has to divide the ranks. None: the fewest that hold ``context`` tokens.
        context: the longest sequence that training allows; None: the longest of this batch.
        two_level: see :class:`gapless.schedule.Schedule`.

    Raises:
        ValueError: a ``cp`` that does not divide the ranks, or a sequence that does not fit.
    """
    sizes, cluster = check_lengths(lengths), Cluster.of(ranks)
    limits = check_capacity(capacity, cluster.ranks)
    room = int(limits.min())
    if context is not None and (
        isinstance(context, bool) or not isinstance(context, (int, np.integer)) or context < 1
    ):
        raise ValueError(f"context is {context!r}: it has to be a whole number of at least 1 token")
    longest = int(sizes.max(initial=0)) if context is None else int(context)
    if cp is None:
        fitting = [n for n in range(1, cluster.ranks + 1) if cluster.ranks % n == 0 and n * room >= longest]
        if not fitting and longest > int(sizes.max(initial=0)):
            raise ValueError(
                f"context is {context}: {cluster.ranks} ranks hold {cluster.ranks * room} tokens at most"
            )
        cp = fitting[0] if fitting else cluster.ranks
    elif isinstance(cp, bool) or not isinstance(cp, (int, np.integer)) or not 1 <= cp <= cluster.ranks:
        raise ValueError(f"cp is {cp!r}: it has to be between 1 and {cluster.ranks}")
    elif cluster.ranks % cp:
        raise ValueError(f"cp is {cp}: it has to divide the {cluster.ranks} ranks")
    check_fits(sizes, cp * room, cp)
    pack_of, packs = best_fit(sizes, np.arange(len(sizes)), cp * room)
    replica = np.arange(packs) % (cluster.ranks // cp)
    return Schedule(
        lengths=sizes,
        pack_of=pack_of,
        rank_offsets=np.arange(packs + 1) * cp,
        ring_ranks=(replica[:, None] * cp + np.arange(cp)).ravel(),
        steps=np.arange(packs) // (cluster.ranks // cp),
        offload=np.zeros(packs),
        capacity=limits,
        cluster=cluster,
        cost=cost,
        two_level=two_level,
        planner=f"static_cp(cp={cp}{', two_level' if two_level else ''})",
    )
