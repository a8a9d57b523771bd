# SPDX-License-Identifier: Apache-2.0
"""How long transfers between ranks take: one place for hops, rings and moved tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel
from gapless.schedule.remap import link_seconds, nic_of

if TYPE_CHECKING:
    from gapless.schedule.schedule import Schedule

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def hop(cost: CostModel, size: ArrayLike, across_nodes: ArrayLike, *, contention: ArrayLike = 1.0) -> Floats:
    """Seconds in which ``size`` bytes go from one rank to another.

    Args:
        across_nodes: whether over the network, or over the links inside a node.
        contention: transfers at the same time over each network card.
    """
    size = np.asarray(size, np.float64)
    card = np.asarray(contention, np.float64) / cost.network_bandwidth
    return size * np.where(across_nodes, card, 1 / cost.node_bandwidth) + cost.latency


def _together(steps: NDArray, ranks: NDArray, place: NDArray) -> Floats:
    """How many of the ranks listed for a step are in the same place (node, network card) as each.

    A rank takes its packs one after another, so that it counts once, however many of its rings leave the node.
    """
    size = int(place.max()) + 1
    _, first = np.unique(steps * (int(ranks.max()) + 1) + ranks, return_index=True)
    keys, count = np.unique((steps * size + place)[first], return_counts=True)
    return count[np.searchsorted(keys, steps * size + place)].astype(np.float64)


@dataclass(frozen=True)
class Rings:
    """Transfers of the rings of a schedule.

    Attributes:
        seconds: float64 [packs, 2], handing keys and values all around, all layers, forward and backward.
        network: bool [packs], whether the network takes longest, and not the links of nodes.
        bytes: sent over the links of nodes and over the network, forward and backward, all layers.
    """

    seconds: Floats
    network: Bools
    bytes: dict[str, float]


def rings(schedule: Schedule) -> Rings:
    """The transfers of each pack alone, but with the network cards shared by the rings of its step."""
    s, cost, cluster = schedule, schedule.cost, schedule.cluster
    if not s.packs:
        return Rings(np.empty((0, 2)), np.empty(0, bool), {"node": 0.0, "network": 0.0})
    n, w = s.ring_sizes, s.widths
    pack = np.repeat(np.arange(s.packs), n)
    place = np.arange(len(pack)) - s.rank_offsets[pack]
    source = s.ring_ranks
    first = place - place % w[pack]  # of the ranks that keys go around
    inner = s.ring_ranks[s.rank_offsets[pack] + first + (place + 1 - first) % w[pack]]
    outer = s.ring_ranks[s.rank_offsets[pack] + (place + w[pack]) % n[pack]]
    inner_far, outer_far = (cluster.node_of(source) != cluster.node_of(target) for target in (inner, outer))
    two = (w < n)[pack]
    contention = np.ones(s.packs)
    c, target = np.flatnonzero(np.where(two, outer_far, inner_far)), np.where(two, outer, inner)
    for ranks in (source[c], target[c]):
        if len(c):
            np.maximum.at(contention, pack[c], _together(s.steps[pack[c]], ranks, nic_of(ranks, cluster)))
    # One hop of a ring is as slow as the slowest of its links; the two levels of a ring go on at the same time.
    share = s.pack_tokens / n * cost.kv_bytes
    hops = n // w * (w - 1), n // w - 1
    flat = s.across_nodes & (w == n)
    levels = [
        [
            cost.layers * count * hop(cost, share * size, far, contention=contention)
            for size in (1.0, cost.backward_kv)
        ]
        for count, far in zip(hops, (flat, True), strict=True)
    ]
    near, far = (np.stack(level, 1) for level in levels)
    sent = [(count * share * (cost.layers * (1 + cost.backward_kv)))[pack] for count in hops]
    network = sum(
        float(part[crosses].sum()) for part, crosses in zip(sent, (inner_far, outer_far), strict=True)
    )
    return Rings(
        np.maximum(near, far),
        flat | (far > near).any(1),
        {"node": float(sent[0].sum() + sent[1].sum()) - network, "network": network},
    )


@dataclass(frozen=True)
class Moves:
    """Tokens that change rank around attention, of a schedule.

    Attributes:
        seconds: float64 [micro_steps, 2], by which a step's layers are longer, forward and backward, all layers.
        key: int64 [k], ``rank * micro_steps + step`` of each rank that sends or receives.
        own: float64 [k, 2], seconds of this rank's own transfers, forward and backward.
        across: bool [k], whether any of them goes over the network.
        bytes: all that is moved, over the links of nodes and over the network.
    """

    seconds: Floats
    key: NDArray[np.int64]
    own: Floats
    across: Bools
    bytes: dict[str, float]


def moves(schedule: Schedule) -> Moves:
    """Each layer moves tokens there and back, forward and backward; a step waits for its slowest rank."""
    s, cost = schedule, schedule.cost
    steps = max(s.micro_steps, 1)
    step, source, target, tokens = s.moves.T
    across = s.cluster.node_of(source) != s.cluster.node_of(target)
    near, far = link_seconds(cost)
    # A rank only sends or only receives; its messages share its links, and the ranks of a card share that.
    time = tokens * np.where(across, far, near) + cost.latency
    ranks, ends = np.concatenate([source, target]), np.tile(step, 2)
    key, place = np.unique(ranks * steps + ends, return_inverse=True)
    own = np.bincount(place, weights=np.tile(time, 2), minlength=len(key)).astype(np.float64)
    longest = np.zeros(steps)
    np.maximum.at(longest, key % steps, own)
    for end in (source, target):
        cards, used = np.unique(nic_of(end, s.cluster) * steps + step, return_inverse=True)
        np.maximum.at(longest, cards % steps, np.bincount(used, weights=time * across, minlength=len(cards)))
    leaves = np.bincount(place, weights=np.tile(across, 2), minlength=len(key)) > 0
    size = tokens * (cost.hidden_bytes * 4 * cost.layers)
    return Moves(
        np.repeat(longest[:, None], 2, 1) * (2 * cost.layers),
        key,
        np.repeat(own[:, None], 2, 1) * (2 * cost.layers),
        leaves,
        {"node": float(size[~across].sum()), "network": float(size[across].sum())},
    )


def reduction(cluster: Cluster, cost: CostModel, size: float) -> tuple[float, dict[str, float]]:
    """Seconds and bytes of adding up ``size`` bytes of each rank by a ring over all ranks, and handing out the sum."""
    n = cluster.ranks
    if n == 1 or not size:
        return 0.0, {"node": 0.0, "network": 0.0}
    hops, crossing = 2 * (n - 1), cluster.nodes if cluster.nodes > 1 else 0
    seconds = hops * max(float(hop(cost, size / n, across)) for across in {False, crossing > 0})
    return seconds, {"node": hops * size / n * (n - crossing), "network": hops * size / n * crossing}
