# SPDX-License-Identifier: Apache-2.0
"""Boolean masks, of blocks and of tokens, and layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gapless.plan import block_layout
from gapless.plan.block_grid import BlockGrid, Lengths, lengths_of
from gapless.plan.block_lists import on_host, to_lists
from gapless.plan.block_patterns import to_cells, to_patterns, words


def from_mask(
    mask: Tensor | Sequence[Tensor],
    *,
    block_q: int,
    block_k: int,
    lengths_q: Lengths | None = None,
    lengths_k: Lengths | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    capacity: int | None = None,
) -> block_layout.BlockLayout:
    """Every True block is kept, in full.

    Args:
        mask: bool [heads, q_blocks, k_blocks] of one sequence, or one for each sequence, or one for all: [heads, query
            blocks of all sequences, most key blocks of a sequence], False beyond a sequence's.
        block_q, block_k: tokens in a block, 16, 32, 64, 128 or 256.
        lengths_q, lengths_k: tokens of the sequence, or of each; the last block of a sequence may be short. None: as
            many as the blocks hold; of keys, the queries' lengths if they make as many blocks.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [batch + 1], in place of lengths. Those of a device are waited for
            the first time that they are seen.
        capacity: most blocks that all heads keep together, for masks of a device: room is made for as many. None makes
            room for all blocks. More than that is an error, on a device when it gets there.

    Raises:
        TypeError: a mask that is no boolean tensor.
        ValueError: shapes, lengths or blocks that do not fit together; more blocks than ``capacity``.
    """
    masks = check_masks("mask", mask)
    if capacity is not None and (not isinstance(capacity, int) or capacity < 0):
        raise ValueError(f"capacity is {capacity!r:.80}: it has to be a whole number, 0 or more, or None")
    lengths_q, lengths_k = resolve_lengths((lengths_q, lengths_k), (cu_seqlens_q, cu_seqlens_k))
    counts = [(m.shape[1], m.shape[2]) for m in masks]
    grid = fitting_grid(counts, block_q, block_k, lengths_q, lengths_k, masks[0].device)
    if isinstance(mask, Tensor):
        _check_packed("mask", mask, grid)
        return block_layout.BlockLayout.from_packed(grid, mask, capacity=capacity)
    if len(masks) != grid.batch:
        raise ValueError(f"mask has {len(masks)} entries, the lengths say {grid.batch} sequences")
    for i, (m, shape) in enumerate(zip(masks, zip(grid.counts_q, grid.counts_k, strict=True), strict=True)):
        _check_blocks(f"mask[{i}]", m, grid, shape)
    return block_layout.BlockLayout.from_packed(grid, grid.pack(masks), capacity=capacity)


def from_token_mask(
    mask: Tensor | Sequence[Tensor], *, block_q: int, block_k: int
) -> block_layout.BlockLayout:
    """Exactly the True cells: a block is full where all its cells are True, partial where some are.

    Args:
        mask: bool [heads, len_q, len_k] of one sequence, or one for each sequence.
        block_q, block_k: tokens in a block, 16, 32, 64, 128 or 256.

    Raises:
        TypeError: a mask that is no boolean tensor.
        ValueError: shapes that do not fit together.
    """
    masks = check_masks("mask", mask)
    lengths_q, lengths_k = [m.shape[1] for m in masks], [m.shape[2] for m in masks]
    device = masks[0].device
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k, device=device)
    return from_parts(grid, [token_blocks(m, block_q, block_k) for m in masks])


def from_heads(
    kinds: Sequence[str],
    *,
    lengths_q: Lengths,
    lengths_k: Lengths | None = None,
    block_q: int,
    block_k: int,
    mask: Tensor | None = None,
    sink: int | Sequence[int] = 1,
    local: int | Sequence[int] = 4,
    device: torch.device | str | None = None,
) -> block_layout.BlockLayout:
    """Heads of different kinds in one layout.

    Args:
        kinds: for each head ``dense`` (all blocks), ``sparse`` (the blocks of the mask) or ``streaming`` (the first
            blocks of the sequence and those near the query, as in StreamingLLM, arXiv:2309.17453).
        lengths_q, lengths_k: tokens of the sequence, or of each; None: keys are as many as queries.
        block_q, block_k: tokens in a block, 16, 32, 64, 128 or 256.
        mask: bool [number of sparse heads, query blocks of all sequences, most key blocks of a sequence].
        sink: first key blocks that a streaming head keeps; one number, or one for each head (others' are not read).
        local: key blocks that it keeps to each side of the diagonal, the blocks of the query block's own positions
            (aligned at the bottom right corner) counted as the first; one number, or one for each head.
        device: of the layout; None: the mask's, or the CPU.

    Raises:
        ValueError: another kind; a mask that does not fit; numbers below 0.
    """
    for h, kind in enumerate(kinds):
        if kind not in ("dense", "sparse", "streaming"):
            raise ValueError(f"kinds[{h}] is {kind!r:.80}: it has to be 'dense', 'sparse' or 'streaming'")
    if len(kinds) == 0:
        raise ValueError("kinds is empty: it has to name at least one head")
    if device is None:
        device = "cpu" if mask is None else mask.device
    grid = BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k, device=device)
    sparse = [h for h, kind in enumerate(kinds) if kind == "sparse"]
    packed = torch.zeros(len(kinds), grid.q_blocks, grid.max_k_blocks, dtype=torch.bool, device=device)
    if sparse:
        if mask is None:
            raise ValueError(f"mask is None: kinds names {len(sparse)} sparse heads, it has to hold theirs")
        check_masks("mask", mask)
        if mask.shape[0] != len(sparse):
            raise ValueError(f"mask has {mask.shape[0]} heads, kinds names {len(sparse)} sparse ones")
        _check_packed("mask", mask, grid)
        packed[sparse] = mask
    elif mask is not None:
        raise ValueError("mask is given, kinds names no sparse head: leave it out")
    sinks, locals_ = (_per_head(n, x, len(kinds)) for n, x in (("sink", sink), ("local", local)))
    first, last = grid.diagonal
    block = torch.arange(grid.max_k_blocks, device=device)
    inside = block < grid.k_blocks_of_row[:, None]
    for h, kind in enumerate(kinds):
        if kind == "dense":
            packed[h] = inside
        elif kind == "streaming":
            near = (block > first[:, None] - locals_[h]) & (block < last[:, None] + locals_[h])
            packed[h] = inside & (near | (block < sinks[h]))
    return block_layout.BlockLayout.from_packed(grid, packed)


def _per_head(name: str, value: int | Sequence[int], heads: int) -> Sequence[int]:
    values = [value] * heads if isinstance(value, int) else list(value)
    if len(values) != heads or any(not isinstance(v, int) or v < 0 for v in values):
        raise ValueError(
            f"{name} is {value!r:.80}: it has to be a whole number, 0 or more, or one for each of {heads} heads"
        )
    return values


def to_token_mask(layout: block_layout.BlockLayout, causal: bool = False) -> list[Tensor]:
    """bool [heads, len_q, len_k] for each sequence: the pairs of tokens that count.

    Args:
        layout: what to expand.
        causal: with the causal mask of a call too, aligned at the bottom right corner.
    """
    grid = layout.grid
    cells = to_cells(layout.patterns, grid.block_q)
    parts = zip(grid.split(layout.full_mask()), grid.split(layout.slots()), strict=True)
    masks = []
    for (full, slots), len_q, len_k in zip(parts, grid.lengths_q, grid.lengths_k, strict=True):
        heads, nq, nk = full.shape
        tokens = full[:, :, None, :, None].repeat(1, 1, grid.block_q, 1, grid.block_k)
        h, a, b = slots.nonzero(as_tuple=True)
        tokens[h, a, :, b, :] = cells[slots[h, a, b].long() - 1]
        tokens = tokens.view(heads, nq * grid.block_q, nk * grid.block_k)[:, :len_q, :len_k]
        masks.append(tokens.tril(len_k - len_q) if causal else tokens)
    return masks


class Blocks(NamedTuple):
    """The blocks of one sequence."""

    full: Tensor  # bool [heads, q_blocks, k_blocks]
    slots: Tensor  # int32 [heads, q_blocks, k_blocks], pattern + 1 of partial blocks, 0 elsewhere
    patterns: Tensor  # int32 [n, block_k, ceil(block_q / 32)]


def from_parts(grid: BlockGrid, parts: Sequence[Blocks]) -> block_layout.BlockLayout:
    """One layout of the blocks of each sequence."""
    slots, first = [], 0
    for part in parts:
        slots.append(torch.where(part.slots > 0, part.slots + first, 0))
        first += part.patterns.shape[0]
    patterns = torch.cat([part.patterns for part in parts])
    return block_layout.BlockLayout.from_slots(
        grid, grid.pack([part.full for part in parts]), grid.pack(slots), patterns
    )


def token_blocks(mask: Tensor, block_q: int, block_k: int) -> Blocks:
    """The blocks of bool [heads, len_q, len_k], one pattern for each partial one. Does not wait for a device."""
    heads, len_q, len_k = mask.shape
    nq, nk = -(-len_q // block_q), -(-len_k // block_k)

    padding = (0, nk * block_k - len_k, 0, nq * block_q - len_q)

    def cut(fill: bool) -> Tensor:
        padded = torch.nn.functional.pad(mask, padding, value=fill) if any(padding) else mask
        return padded.reshape(heads, nq, block_q, nk, block_k)

    # Least and greatest of bytes are found many times faster than all() and any().
    full = cut(True).view(torch.uint8).amin(2).amin(3).bool()
    cells = cut(False)
    partial = cells.view(torch.uint8).amax(2).amax(3).bool() & ~full
    slots = torch.where(partial, partial.reshape(-1).cumsum(0, dtype=torch.int32).view_as(partial), 0)
    _, _, place = to_lists(partial.view(heads * nq, nk), partial.numel())
    if place.shape[0] == 0:
        return Blocks(full, slots, slots.new_zeros(0, block_k, words(block_q)))
    row, block = place // nk, place % nk
    return Blocks(full, slots, to_patterns(cells[row // nq, row % nq, :, block]))


def check_masks(name: str, mask: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Boolean tensors of three dimensions, of the same heads, on one device."""
    masks = [mask] if isinstance(mask, Tensor) else list(mask)
    if not masks:
        raise ValueError(f"{name} is empty: it has to hold one tensor for each sequence")
    for i, m in enumerate(masks):
        label = name if isinstance(mask, Tensor) else f"{name}[{i}]"
        if not isinstance(m, Tensor) or m.dtype != torch.bool:
            kind = m.dtype if isinstance(m, Tensor) else type(m).__name__
            raise TypeError(f"{label} is {kind}: it has to be a tensor of torch.bool")
        if m.dim() != 3:
            raise ValueError(f"{label} has shape {list(m.shape)}: it has to be [heads, queries, keys]")
        if m.shape[0] == 0:
            raise ValueError(f"{label} has no heads: it has to have at least one")
        if m.shape[0] != masks[0].shape[0]:
            raise ValueError(f"{label} has {m.shape[0]} heads, the first has {masks[0].shape[0]}")
        if m.device != masks[0].device:
            raise ValueError(f"{label} is on {m.device}, the first is on {masks[0].device}")
    return masks


def resolve_lengths(
    lengths: tuple[Lengths | None, Lengths | None], cu_seqlens: tuple[Tensor | None, Tensor | None]
) -> tuple[Lengths | None, Lengths | None]:
    """Lengths of queries and of keys, each given in one of two ways or not at all."""
    found: list[Lengths | None] = []
    for side, given, cu in zip("qk", lengths, cu_seqlens, strict=True):
        if given is not None and cu is not None:
            raise ValueError(f"lengths_{side} and cu_seqlens_{side} are both given: give one of them")
        found.append(given if cu is None else lengths_of(cu, f"cu_seqlens_{side}"))
    return found[0], found[1]


def fitting_grid(
    counts: Sequence[tuple[int, int]],
    block_q: int,
    block_k: int,
    lengths_q: Lengths | None,
    lengths_k: Lengths | None,
    device: torch.device,
) -> BlockGrid:
    """The grid of these lengths; where none are given, of ``counts`` (query blocks, key blocks) that are not short."""
    if lengths_q is None:
        lengths_q = [q * block_q for q, _ in counts]
    if lengths_k is None:
        grid = BlockGrid.make(lengths_q, block_q=block_q, block_k=block_k, device=device)
        if grid.counts_k == tuple(k for _, k in counts) or len(counts) != grid.batch:
            return grid
        lengths_k = [k * block_k for _, k in counts]
    return BlockGrid.make(lengths_q, lengths_k, block_q=block_q, block_k=block_k, device=device)


def _check_blocks(name: str, mask: Tensor, grid: BlockGrid, shape: tuple[int, int]) -> None:
    if tuple(mask.shape[1:]) != shape:
        raise ValueError(
            f"{name} has shape {list(mask.shape)}: the lengths, in blocks of {grid.block_q} x {grid.block_k}, make it "
            f"[{mask.shape[0]}, {shape[0]}, {shape[1]}]"
        )


def _check_packed(name: str, mask: Tensor, grid: BlockGrid) -> None:
    _check_blocks(name, mask, grid, (grid.q_blocks, grid.max_k_blocks))
    if mask.device != grid.device:
        raise ValueError(f"{name} is on {mask.device}: it has to be on {grid.device}")
    if grid.inside is None:
        return
    outside = mask & ~grid.inside
    if not on_host(mask):
        torch._assert_async(~outside.any(), f"{name} is True beyond a sequence's key blocks")
    elif outside.any():
        at = np.argwhere(outside.numpy())[0].tolist()
        raise ValueError(
            f"{name}[{', '.join(map(str, at))}] is True: the sequence of query block {at[1]} has "
            f"{int(grid.k_blocks_of_row[at[1]])} key blocks"
        )
