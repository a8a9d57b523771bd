# SPDX-License-Identifier: Apache-2.0
"""Blocks of a packed batch: where each one lies, and which of a row's listed blocks come before a limit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = tl.constexpr(64)  # entries of a list that are read at a time
LOCATED = 64  # tiles by a program


@triton.jit(do_not_specialize=["batch", "count"])
def locate_kernel(
    cu_seqlens, table, batch, count,
    TILE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See :func:`locate`. Counts, for each of ROWS tiles, the sequences that end before it."""
    tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sequence = tl.zeros([ROWS], tl.int32)
    first_tile = tl.zeros([ROWS], tl.int32)
    first_block = tl.zeros([ROWS], tl.int32)
    tiles = tl.zeros([1], tl.int32)
    blocks = tl.zeros([1], tl.int32)
    for start in range(0, batch, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < batch
        length = tl.load(cu_seqlens + at + 1, mask=inside, other=0) - tl.load(
            cu_seqlens + at, mask=inside, other=0
        )
        tile_end = tiles + tl.cumsum(tl.cdiv(length, TILE), 0)
        block_end = blocks + tl.cumsum(tl.cdiv(length, BLOCK), 0)
        before = (tile_end[None, :] <= tile[:, None]) & inside[None, :]
        sequence += tl.sum(before.to(tl.int32), 1)
        # Ends never decrease: the largest is the last.
        first_tile = tl.maximum(first_tile, tl.max(tl.where(before, tile_end[None, :], 0), 1))
        first_block = tl.maximum(first_block, tl.max(tl.where(before, block_end[None, :], 0), 1))
        tiles = tl.max(tile_end, 0, keep_dims=True)
        blocks = tl.max(block_end, 0, keep_dims=True)
    row = table + tile * 3
    inside = tile < count
    tl.store(row, tl.where(sequence < batch, sequence, -1), mask=inside)
    tl.store(row + 1, (tile - first_tile) * TILE, mask=inside)
    tl.store(row + 2, first_block, mask=inside)


def locate(cu_seqlens: Tensor, tile: int, block: int, count: int) -> Tensor:
    """int32 [count, 3] for the first ``count`` tiles of a batch whose sequences are cut into tiles of ``tile`` tokens.

    Columns: the sequence, -1 for tiles that do not exist; the tile's first token, counted from its sequence's first;
    how many blocks of ``block`` tokens the sequences before it have.
    """
    table = torch.empty(count, 3, dtype=torch.int32, device=cu_seqlens.device)
    if count:
        locate_kernel[(triton.cdiv(count, LOCATED),)](
            cu_seqlens, table, cu_seqlens.shape[0] - 1, count, TILE=tile, BLOCK=block, ROWS=LOCATED
        )
    return table


@triton.jit
def count_below(ids, count, limit):
    """How many of ``count`` ascending ids are below ``limit``."""
    below = count * 0
    for start in range(0, count, CHUNK):
        at = start + tl.arange(0, CHUNK)
        below += tl.sum((tl.load(ids + at, mask=at < count, other=2147483647) < limit).to(tl.int32), 0)
    return below
