# SPDX-License-Identifier: Apache-2.0
"""FlexAttention's BlockMask and layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gapless.plan import block_layout
from gapless.plan.block_cells import blocks_of_cells
from gapless.plan.block_grid import BlockGrid
from gapless.plan.block_masks import from_parts

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def from_block_mask(block_mask: BlockMask, *, batch: int | None = None) -> block_layout.BlockLayout:
    """Exactly what a BlockMask lets through: its full blocks, and those where its ``mask_mod`` decides.

    Args:
        block_mask: of ``torch.nn.attention.flex_attention``; its batch entries become sequences of one length.
        batch: sequences, where the BlockMask has one entry for all; None: as many as it has entries.

    Raises:
        ValueError: a block size that is not offered; a batch that it does not have.
    """
    entries = block_mask.kv_num_blocks.shape[0]
    batch = entries if batch is None else batch
    if batch < 1 or (entries != batch and entries != 1):
        raise ValueError(f"batch is {batch}: block_mask has {entries} entries")
    len_q, len_k = block_mask.seq_lengths
    block_q, block_k = block_mask.BLOCK_SIZE
    device = block_mask.kv_num_blocks.device
    grid = BlockGrid.make([len_q] * batch, [len_k] * batch, block_q=block_q, block_k=block_k, device=device)
    shape = (grid.counts_q[0], grid.counts_k[0])
    partial = _dense(block_mask.kv_num_blocks, block_mask.kv_indices, shape)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, shape)
    # As FlexAttention does: the function sees single indices, and may look them up in tensors.
    mask_mod = torch.vmap(block_mask.mask_mod, in_dims=(None, 0, 0, 0))
    parts = []
    for b in range(entries):
        entry = torch.tensor(b, device=device)

        def visible(head: Tensor, query: Tensor, key: Tensor, entry: Tensor = entry) -> Tensor:
            cells = torch.broadcast_tensors(head, query, key)
            return mask_mod(entry, *(c.reshape(-1) for c in cells)).view(cells[0].shape)

        parts.append(blocks_of_cells(full[b], partial[b], (len_q, len_k), (block_q, block_k), visible))
    return from_parts(grid, parts * batch if entries == 1 else parts)


def _dense(counts: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """bool [batch, heads, q_blocks, k_blocks] from padded lists, which may have more rows than there are queries."""
    nq, nk = shape
    counts, indices = counts[:, :, :nq], indices[:, :, :nq]
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    dense = torch.zeros(*counts.shape, nk + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter_(3, torch.where(used, indices.long(), nk), True)[..., :nk]


def to_block_mask(
    layout: block_layout.BlockLayout, causal: bool = False, *, heads: int | None = None
) -> BlockMask:
    """The same mask for FlexAttention; its ``mask_mod`` says the same of every pair of tokens by itself.

    Args:
        layout: of sequences of one length, which become the batch.
        causal: with the causal mask of a call too, aligned at the bottom right corner.
        heads: query heads; FlexAttention wants a mask for each of them, or one for all. None: the pattern heads.

    Raises:
        ValueError: sequences of different lengths, or none; heads that are no multiple of the pattern heads.
    """
    from torch.nn.attention.flex_attention import BlockMask

    grid = layout.grid
    lengths = set(zip(grid.lengths_q, grid.lengths_k, strict=True))
    if len(lengths) != 1:
        raise ValueError(
            f"layout has sequences of {len(lengths)} different lengths: a BlockMask holds one length for all"
        )
    ((len_q, len_k),) = lengths
    heads = layout.heads if heads is None else heads
    if heads < 1 or heads % layout.heads:
        raise ValueError(f"heads is {heads}: it has to be a multiple of {layout.heads}, the pattern heads")
    block_q, block_k = grid.block_q, grid.block_k
    shift = len_k - len_q

    def per_entry(packed: Tensor) -> Tensor:  # [batch, heads, q_blocks, k_blocks]
        return torch.stack(grid.split(packed)).repeat_interleave(heads // layout.heads, dim=1)

    full, slots = per_entry(layout.full_mask()), per_entry(layout.slots())
    partial = slots > 0
    # 0: nothing, 1: everything, above: the pattern.
    codes = torch.where(full, 1, torch.where(partial, slots + 1, 0))
    if causal:
        first = torch.arange(0, len_q, block_q, device=full.device)
        last = (first + block_q).clamp(max=len_q) - 1
        key = torch.arange(0, len_k, block_k, device=full.device)
        seen = key <= last[:, None] + shift
        cut = (key + block_k).clamp(max=len_k) - 1 > first[:, None] + shift
        partial = (partial | (full & cut)) & seen
        full = full & ~cut
    patterns = layout.patterns
    if patterns.shape[0] == 0:
        patterns = torch.zeros(1, block_k, -(-block_q // 32), dtype=torch.int32, device=layout.device)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        code = codes[b, h, query // block_q, key // block_k]
        i = query % block_q
        word = patterns[(code - 2).clamp(min=0), key % block_k, i // 32]
        visible = (code == 1) | ((code > 1) & (((word >> (i % 32)) & 1) == 1))
        return visible & (key <= query + shift) if causal else visible

    def lists(mask: Tensor) -> tuple[Tensor, Tensor]:
        indices = mask.int().argsort(dim=-1, descending=True, stable=True)
        return mask.sum(-1, dtype=torch.int32), indices.int()

    return BlockMask.from_kv_blocks(
        *lists(partial),
        *lists(full),
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=mask_mod,
        seq_lengths=(len_q, len_k),
    )
