# SPDX-License-Identifier: Apache-2.0
"""Between attention and linear layouts: which tokens change rank (Zeppelin's remapping, arXiv:2509.21841).

Attention is balanced by pairs, linear modules by tokens. Around attention, ranks with more tokens than their share hand
the surplus to ranks with fewer, and nothing else moves.

A rank that hands over x tokens inside its node and y to other nodes is busy for ``x * near + y * far`` seconds, a
network card for ``far`` times what its ranks send, or receive, over it. The largest of all these is made minimal.
That falls apart into nodes: one with a surplus of S tokens has to send S and need not receive any, whatever others do.
What is left to choose is which of its ranks send them, and there the largest time is least at a common level: every
rank sends as many as it can until then.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gapless.schedule.cluster import Cluster
from gapless.schedule.cost import CostModel

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def link_seconds(cost: CostModel) -> tuple[float, float]:
    """(near, far): seconds in which one token's hidden state passes a link of a node, or a network card."""
    return cost.hidden_bytes / cost.node_bandwidth, cost.hidden_bytes / cost.network_bandwidth


def nic_of(ranks: ArrayLike, cluster: Cluster) -> Ints:
    """The network card of each rank: neighbours share one, numbers count through all nodes."""
    rank = np.asarray(ranks, np.int64)
    cards = min(cluster.nics_per_node, cluster.ranks_per_node)
    local = rank % cluster.ranks_per_node
    return cluster.node_of(rank) * cards + local * cards // cluster.ranks_per_node


def targets(tokens: ArrayLike, cluster: Cluster) -> Ints:
    """Tokens of each rank in linear modules, int64 [steps, ranks]: shares by speed that differ by rounding alone.

    Ranks, and nodes, that have the most keep what is left over by rounding, so that least moves.
    """
    held = np.atleast_2d(np.asarray(tokens, np.int64))
    steps, ranks = held.shape
    total = held.sum(1)
    base = np.floor(total[:, None] * (cluster.speeds / cluster.speeds.sum())).astype(np.int64)
    left = total - base.sum(1)
    node = cluster.node_of(np.arange(ranks))
    size = np.bincount(node)
    # A node keeps as many of the extra tokens as it has itself, and has ranks for.
    surplus = np.add.reduceat(held - base, np.cumsum(size) - size, axis=1)
    extra = np.clip(surplus, 0, size)
    over = np.maximum(extra.sum(1) - left, 0)
    extra -= np.diff(np.minimum(np.cumsum(extra, 1), over[:, None]), axis=1, prepend=0)
    missing = left - extra.sum(1)
    room = size - extra
    extra += np.diff(np.minimum(np.cumsum(room, 1), missing[:, None]), axis=1, prepend=0)
    # Inside a node the ranks that have the most.
    row = np.repeat(np.arange(steps), ranks)
    order = np.lexsort((np.tile(np.arange(ranks), steps), -(held - base).ravel(), np.tile(node, steps), row))
    place = np.tile(np.arange(ranks) - np.repeat(np.cumsum(size) - size, size), steps)
    out = base.ravel()
    out[order] += place < np.repeat(extra.ravel(), np.tile(size, steps))
    return out.reshape(steps, ranks)


def balance_tokens(tokens: ArrayLike, cluster: Cluster, cost: CostModel) -> Ints:
    """Moves that give every rank its share: int64 [m, 4], rows (step, source, destination, tokens), in that order.

    The largest time of a rank or card is minimal to within one token's. If the network is no slower than the links of
    a node, the largest number of tokens that a rank or card sends to other nodes takes its place.

    Args:
        tokens: int64 [ranks], or [steps, ranks]: what each rank holds under attention.
        cluster, cost: nodes and cards; ``hidden_bytes`` and bandwidths.
    """
    held = np.atleast_2d(np.asarray(tokens, np.int64))
    if held.ndim != 2 or held.shape[1] != cluster.ranks:
        raise ValueError(
            f"tokens has shape {list(np.shape(tokens))}: it has to be [steps, ranks], of {cluster.ranks} ranks"
        )
    if (held < 0).any():
        raise ValueError(f"tokens holds {held.min()}: a rank has 0 tokens or more")
    steps, ranks = held.shape
    surplus = (held - targets(held, cluster)).ravel()
    near, far = link_seconds(cost)
    if far <= near:
        near, far = 0.0, 1.0
    step, rank = np.divmod(np.arange(steps * ranks), ranks)
    node = step * cluster.nodes + cluster.node_of(rank)
    card = nic_of(rank, cluster)
    card = step * (int(card.max()) + 1) + card
    of_node: Floats = np.bincount(node, weights=surplus, minlength=steps * cluster.nodes).astype(np.float64)
    give, take = np.maximum(surplus, 0), np.maximum(-surplus, 0)
    give_far = _crossing(give, node, card, of_node, near, far)
    take_far = _crossing(take, node, card, -of_node, near, far)
    rows = np.concatenate([_pair(give - give_far, take - take_far), _pair(give_far, take_far)])
    moves = np.stack([step[rows[:, 0]], rank[rows[:, 0]], rank[rows[:, 1]], rows[:, 2]], 1)
    return moves[np.lexsort((moves[:, 2], moves[:, 1], moves[:, 0]))]


def _crossing(amount: Ints, node: Ints, card: Ints, of_node: Floats, near: float, far: float) -> Ints:
    """How many of ``amount`` tokens each rank sends out of its node: ``of_node`` in all, or none if that is below 0.

    At a level of ``t`` seconds a rank may send ``(t - amount * near) / (far - near)``, a card ``t / far`` tokens.
    """
    out = np.zeros_like(amount)
    pick = np.flatnonzero((amount > 0) & (of_node[node] > 0))
    if not len(pick):
        return out
    amount = amount[pick]
    # Ranks come node by node, and card by card inside one.
    nodes, node_at, node = np.unique(node[pick], return_index=True, return_inverse=True)
    _, card_at, card = np.unique(card[pick], return_index=True, return_inverse=True)
    card_node = node[card_at]
    first_card = np.searchsorted(card_node, np.arange(len(nodes)))
    need = of_node[nodes].astype(np.int64)

    def at(level: Floats) -> tuple[Ints, Ints]:
        most = np.floor((level[node] - amount * near) / (far - near))
        by_rank = np.clip(most, 0, amount).astype(np.int64)
        by_card = np.minimum(np.add.reduceat(by_rank, card_at), np.floor(level[card_node] / far)).astype(
            np.int64
        )
        return by_rank, by_card

    low = np.zeros(len(nodes))
    high = (np.add.reduceat(amount, node_at) + 1.0) * (near + far)
    for _ in range(int(np.ceil(np.log2(high.max() / (far - near)))) + 2):
        level = (low + high) / 2
        enough = np.add.reduceat(at(level)[1], first_card) >= need
        low, high = np.where(enough, low, level), np.where(enough, level, high)
    by_rank, by_card = at(high)
    # The level allows a few more than needed: the last ranks send less.
    by_card = _first(by_card, need, first_card)
    out[pick] = _first(by_rank, by_card, card_at)
    return out


def _first(parts: Ints, need: Ints, starts: Ints) -> Ints:
    """The first of ``parts`` of each group, so that they add up to ``need`` of it."""
    ends = np.cumsum(parts)
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(parts))))
    before = ends - parts - (ends - parts)[starts][group]
    return np.clip(need[group] - before, 0, parts)


def _pair(give: Ints, take: Ints) -> Ints:
    """int64 [m, 3], rows (giver, taker, tokens): both in their order, so that there are few rows."""
    giver, taker = np.flatnonzero(give), np.flatnonzero(take)
    given, taken = np.cumsum(give[giver]), np.cumsum(take[taker])
    ends = np.union1d(given, taken)
    size = np.diff(ends, prepend=0)
    return np.stack([giver[np.searchsorted(given, ends)], taker[np.searchsorted(taken, ends)], size], 1)


def traffic(moves: ArrayLike, cluster: Cluster, cost: CostModel) -> float:
    """Seconds of the moves of one step at the busiest rank or card, one way; rows as in ``balance_tokens``.

    Each message of a rank has its latency.
    """
    table = np.asarray(moves, np.int64).reshape(-1, 4)
    near, far = link_seconds(cost)
    across = cluster.node_of(table[:, 1]) != cluster.node_of(table[:, 2])
    seconds = table[:, 3] * np.where(across, far, near)
    most = 0.0
    for end in (table[:, 1], table[:, 2]):
        ranks = np.bincount(end, weights=seconds + cost.latency, minlength=1)
        cards = np.bincount(nic_of(end, cluster)[across], weights=seconds[across], minlength=1)
        most = max(most, ranks.max(), cards.max())
    return float(most)
