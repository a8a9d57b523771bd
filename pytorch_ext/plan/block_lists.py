# SPDX-License-Identifier: Apache-2.0
"""Rows of blocks as masks and as lists (CSR), one into the other, without waiting for a device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gapless.plan.block_grid import INT32_MAX


class BlockLists(NamedTuple):
    """For each row, the blocks it lists, ascending; full ones and partial ones apart.

    A row is (pattern head, block of one side), head by head; it lists blocks of the other side, counted from the
    sequence's first. Entries at and after the last offset are unused.
    """

    offsets: Tensor  # int32 [rows + 1]
    ids: Tensor  # int32 [capacity]
    partial_offsets: Tensor  # int32 [rows + 1]
    partial_ids: Tensor  # int32 [partial capacity]
    partial_patterns: Tensor  # int32 [partial capacity], which pattern says what the block's cells see


def on_host(t: Tensor) -> bool:
    """Its values may be looked at: nobody has to wait for a device, and no compiler traces."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def to_lists(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is True in each row of a mask.

    Args:
        mask: bool [rows, width].
        capacity: entries to make room for. Tensors of the CPU get as many as there are, tensors of other devices all.

    Returns:
        offsets int32 [rows + 1], ids int32 [entries], and the entries' places in the flattened mask, int64 [entries],
        any valid place for unused entries.

    Raises:
        ValueError: more are True than there is room for. On a device the error comes when it gets there.
    """
    if capacity > INT32_MAX:
        raise ValueError(f"capacity is {capacity}: it has to be at most {INT32_MAX}, give a smaller one")
    return _to_lists_on_host(mask, capacity) if on_host(mask) else _to_lists_on_device(mask, capacity)


def _to_lists_on_host(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = mask.shape
    flat = np.flatnonzero(mask.contiguous().numpy())
    if flat.shape[0] > capacity:
        raise ValueError(f"capacity is {capacity}: the mask keeps {flat.shape[0]} blocks")
    starts = np.arange(rows + 1) * width
    offsets = np.searchsorted(flat, starts)
    ids = flat - np.repeat(starts[:-1], np.diff(offsets))
    return (
        torch.from_numpy(offsets.astype(np.int32)),
        torch.from_numpy(ids.astype(np.int32)),
        torch.from_numpy(flat),
    )


def _to_lists_on_device(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = mask.shape
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=mask.device)
    if mask.numel() == 0:
        nothing = torch.zeros(capacity, dtype=torch.int32, device=mask.device)
        return offsets, nothing, nothing.long()
    seen = mask.reshape(-1).cumsum(0, dtype=torch.int32)
    offsets[1:] = seen[width - 1 :: width]
    torch._assert_async(offsets[-1] <= capacity, f"capacity is {capacity}: the mask keeps more blocks")
    nth = torch.arange(1, capacity + 1, dtype=torch.int32, device=mask.device)
    flat = torch.searchsorted(seen, nth).clamp_(max=mask.numel() - 1)
    return offsets, (flat % width).int(), flat


def places(offsets: Tensor, ids: Tensor, width: int) -> Tensor:
    """int64 [entries]: the places of listed blocks in the flattened [rows, width]; ``rows * width`` if unused.

    Entries of the CPU that are unused are left out.
    """
    rows = offsets.shape[0] - 1
    if on_host(offsets):
        starts = torch.arange(0, rows * width, width) if width else torch.zeros(rows, dtype=torch.int64)
        counts = offsets.long().diff()
        return starts.repeat_interleave(counts) + ids[: int(offsets[-1])]
    entry = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    row = torch.searchsorted(offsets[1:], entry, right=True)
    return torch.where(row < rows, row * width + ids, rows * width)


def to_dense(offsets: Tensor, ids: Tensor, width: int, values: Tensor | None = None) -> Tensor:
    """[rows, width]: True where a row lists the block, or ``values`` [entries] there and 0 elsewhere."""
    rows = offsets.shape[0] - 1
    place = places(offsets, ids, width)
    dtype = torch.bool if values is None else values.dtype
    dense = torch.zeros(rows * width + 1, dtype=dtype, device=ids.device)  # one more for unused entries
    if values is None:
        dense[place] = True
    else:
        dense[place] = values[: place.shape[0]]
    return dense[:-1].view(rows, width)


def count_below(offsets: Tensor, ids: Tensor, limit: Tensor, width: int) -> Tensor:
    """int64 [rows]: how many of the blocks that a row lists lie below ``limit`` [rows]; ``width`` blocks exist."""
    first = offsets[:-1].long()
    low, high = torch.zeros_like(first), offsets.diff().long()
    if ids.shape[0] == 0:
        return low
    for _ in range(width.bit_length()):  # all rows search their list by halving
        middle = (low + high) // 2
        below = ids[(first + middle).clamp(max=ids.shape[0] - 1)] < limit
        open_ = low < high
        low = torch.where(open_ & below, middle + 1, low)
        high = torch.where(open_ & ~below, middle, high)
    return low
