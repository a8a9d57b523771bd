# SPDX-License-Identifier: Apache-2.0
"""Blocks that a function of single cells decides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gapless.plan.block_masks import Blocks
from gapless.plan.block_patterns import to_patterns, words

CELLS_AT_ONCE = 1 << 23  # bounds the memory that a call takes

# (head, query, key), int64 tensors that broadcast -> bool: the query sees the key
Visible = Callable[[Tensor, Tensor, Tensor], Tensor]


def blocks_of_cells(
    full: Tensor,
    undecided: Tensor,
    lengths: tuple[int, int],
    block: tuple[int, int],
    visible: Visible,
    alike: Tensor | None = None,
) -> Blocks:
    """The blocks of one sequence, exactly. Waits for a device: it is for layouts that are made once.

    Args:
        full: bool [heads, q_blocks, k_blocks], blocks of which all cells are visible.
        undecided: bool, the same shape: blocks whose cells are to be looked at. What is in neither has no visible cell.
        lengths: queries and keys of the sequence.
        block: queries and keys of a block.
        visible: which cells are; it is asked about tokens of the sequence only.
        alike: int64 [q_blocks, k_blocks]: blocks with equal numbers have equal cells in all heads, so that one of them
            is looked at. None: no two need to have.
    """
    (len_q, len_k), (block_q, block_k) = lengths, block
    h, a, b = places = (undecided & ~full).nonzero(as_tuple=True)
    which = torch.arange(h.shape[0], device=full.device)
    if alike is not None and h.shape[0]:
        _, which = alike[a, b].unique(return_inverse=True)
        first = torch.full((int(which.max()) + 1,), h.shape[0], device=full.device)
        first.scatter_reduce_(0, which, torch.arange(h.shape[0], device=full.device), "amin")
        h, a, b = h[first], a[first], b[first]
    query = a[:, None] * block_q + torch.arange(block_q, device=full.device)
    key = b[:, None] * block_k + torch.arange(block_k, device=full.device)
    every, patterns = [], []
    looked_at = torch.arange(h.shape[0], device=full.device)
    for part in looked_at.split(max(1, CELLS_AT_ONCE // (block_q * block_k))):
        i, j = query[part][:, :, None], key[part][:, None, :]
        inside = (i < len_q) & (j < len_k)
        cells = visible(h[part][:, None, None], i.clamp(max=len_q - 1), j.clamp(max=len_k - 1))
        every.append(cells.flatten(1).all(1))  # beyond the lengths stands the last token's answer again
        patterns.append(to_patterns(cells & inside))
    slots = torch.zeros(full.shape, dtype=torch.int32, device=full.device)
    if h.shape[0] == 0:
        return Blocks(full, slots, slots.new_zeros(0, block_k, words(block_q)))
    all_seen, found = torch.cat(every), torch.cat(patterns)
    partial = ~all_seen & (found != 0).flatten(1).any(1)
    numbers = torch.where(partial, partial.cumsum(0), 0).int()
    full = full.clone()
    full[places] = all_seen[which]
    slots[places] = numbers[which]
    return Blocks(full, slots, found[partial])
