# SPDX-License-Identifier: Apache-2.0
"""The mask of block-sparse attention: which key blocks each query block of each head sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# These make layouts, so they import this module too; they look into it when they are called.
from gapless.plan import block_convert, block_flex, block_masks, block_plan, block_ranges, compact_layout
from gapless.plan.block_grid import BlockGrid, once
from gapless.plan.block_lists import BlockLists, count_below, to_dense, to_lists
from gapless.plan.block_patterns import distinct, words


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Key blocks of each (pattern head, query block), full and partial ones apart.

    A full block has no mask of its own: only the sequence's lengths and the causal mask of the call cut it. A partial
    block has a pattern that says which of its cells count, and those cut it too. A row is ``head * q_blocks + block``
    with the query blocks of all sequences counted through.

    Attributes:
        grid: lengths and block sizes.
        heads: pattern heads P. Of H query heads, head h reads pattern ``h // (H // P)``.
        offsets: int32 [heads * q_blocks + 1], where each row's list of full blocks begins.
        ids: int32 [capacity], key blocks counted from the sequence's first, ascending in each row. Entries at and
            after ``offsets[-1]`` are unused.
        partial_offsets, partial_ids: the same of partial blocks; a row lists a block once, full or partial.
        partial_patterns: int32 [partial capacity], the pattern of each partial block.
        patterns: int32 [n, block_k, ceil(block_q / 32)]: bit ``i % 32`` of ``patterns[p, j, i // 32]`` says that query
            ``i`` of the block sees its key ``j``.
        made: what has been worked out so far.
    """

    grid: BlockGrid
    heads: int
    offsets: Tensor
    ids: Tensor
    partial_offsets: Tensor
    partial_ids: Tensor
    partial_patterns: Tensor
    patterns: Tensor
    made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    # Boolean masks.
    from_mask = staticmethod(block_masks.from_mask)
    from_token_mask = staticmethod(block_masks.from_token_mask)
    from_heads = staticmethod(block_masks.from_heads)
    to_token_mask = block_masks.to_token_mask
    # Lists of blocks, and what other libraries make of them.
    from_lists = staticmethod(block_convert.from_lists)
    from_csr = staticmethod(block_convert.from_csr)
    from_bsr = staticmethod(block_convert.from_bsr)
    to_lists = block_convert.to_padded_lists
    to_bsr = block_convert.to_bsr
    from_block_mask = staticmethod(block_flex.from_block_mask)
    to_block_mask = block_flex.to_block_mask
    # Ranges of tokens.
    from_ranges = staticmethod(block_ranges.from_ranges)
    to_ranges = block_ranges.to_ranges
    # What a run needs beside the lists.
    plan = block_plan.plan
    # A few bits for each block.
    compact = compact_layout.compact

    @property
    def block_q(self) -> int:
        return self.grid.block_q

    @property
    def block_k(self) -> int:
        return self.grid.block_k

    @property
    def batch(self) -> int:
        return self.grid.batch

    @property
    def cu_seqlens_q(self) -> Tensor:
        return self.grid.cu_seqlens_q

    @property
    def cu_seqlens_k(self) -> Tensor:
        return self.grid.cu_seqlens_k

    @property
    def cu_blocks_q(self) -> Tensor:
        return self.grid.cu_blocks_q

    @property
    def cu_blocks_k(self) -> Tensor:
        return self.grid.cu_blocks_k

    @property
    def q_blocks(self) -> int:
        return self.grid.q_blocks

    @property
    def k_blocks(self) -> int:
        return self.grid.k_blocks

    @property
    def max_q_blocks(self) -> int:
        return self.grid.max_q_blocks

    @property
    def max_k_blocks(self) -> int:
        return self.grid.max_k_blocks

    @property
    def rows(self) -> int:
        return self.heads * self.grid.q_blocks

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    @property
    def lists(self) -> BlockLists:
        """The lists by query block."""
        return BlockLists(
            self.offsets, self.ids, self.partial_offsets, self.partial_ids, self.partial_patterns
        )

    @property
    def tensors(self) -> list[Tensor]:
        """What the raw operators take."""
        return [self.cu_seqlens_q, self.cu_seqlens_k, *self.lists, self.patterns]

    @once
    def transposed(self) -> BlockLists:
        """The lists by key block: row ``head * k_blocks + block`` lists query blocks, ascending."""
        full = self.grid.transpose(self.full_mask()).flatten(0, 1)
        offsets, ids, _ = to_lists(full, self.ids.shape[0])
        slots = self.grid.transpose(self.slots()).flatten(0, 1)
        partial_offsets, partial_ids, place = to_lists(slots > 0, self.partial_ids.shape[0])
        return BlockLists(offsets, ids, partial_offsets, partial_ids, _patterns_at(slots, place))

    def order(self, causal: bool = False) -> Tensor:
        """int32 [rows], the costliest row first: the one that sees most keys. Ties keep their order."""
        return self._causal_order if causal else self._full_order

    @once
    def _full_order(self) -> Tensor:
        return self.visible_keys().argsort(descending=True, stable=True).int()

    @once
    def _causal_order(self) -> Tensor:
        return self.visible_keys(causal=True).argsort(descending=True, stable=True).int()

    def visible_keys(self, causal: bool = False) -> Tensor:
        """int64 [rows]: keys in the listed blocks that the last query of the row's block may see."""
        end = self.grid.key_end(causal).long().repeat(self.heads)
        limit = (end + self.block_k - 1) // self.block_k
        total = torch.zeros_like(end)
        for offsets, ids in ((self.offsets, self.ids), (self.partial_offsets, self.partial_ids)):
            if ids.shape[0] == 0:
                continue
            # Without the causal mask no listed block is beyond the keys.
            count = count_below(offsets, ids, limit, self.max_k_blocks) if causal else offsets.diff().long()
            last = ids[(offsets[:-1] + count - 1).clamp(0, ids.shape[0] - 1)].long()
            in_last = (end - last * self.block_k).clamp(max=self.block_k)
            total += torch.where(count > 0, (count - 1) * self.block_k + in_last, 0)
        return total

    @property
    def nnz(self) -> Tensor:
        """int32 []: blocks kept, full and partial."""
        return self.offsets[-1] + self.partial_offsets[-1]

    @property
    def density(self) -> Tensor:
        """float32 []: blocks kept of all blocks of the sequences; 0 if there are none."""
        return self.nnz / max(self.heads * self.grid.blocks, 1)

    @property
    def density_per_head(self) -> Tensor:
        """float32 [heads]: blocks kept of all blocks of a head."""
        first = torch.arange(self.heads + 1, device=self.device) * self.q_blocks
        kept = self.offsets[first].diff() + self.partial_offsets[first].diff()
        return kept / max(self.grid.blocks, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the lists and the patterns."""
        return sum(t.nbytes for t in (*self.lists, self.patterns))

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout with its tensors on ``device``."""
        moved = [t.to(device, non_blocking=True) for t in (*self.lists, self.patterns)]
        return BlockLayout(self.grid.to(moved[0].device), self.heads, *moved)

    def __repr__(self) -> str:
        density = f"{self.density.item():.4g}" if self.device.type == "cpu" else "?"  # to look is to wait
        return (
            f"BlockLayout({self.heads} heads, {self.batch} sequences, {self.q_blocks} x {self.k_blocks} blocks of "
            f"{self.block_q} x {self.block_k}, density {density}, {self.patterns.shape[0]} patterns, {self.device})"
        )

    def full_mask(self) -> Tensor:
        """bool [heads, q_blocks, max_k_blocks]: the full blocks."""
        dense = to_dense(self.offsets, self.ids, self.max_k_blocks)
        return dense.view(self.heads, self.q_blocks, self.max_k_blocks)

    def slots(self) -> Tensor:
        """int32 [heads, q_blocks, max_k_blocks]: pattern + 1 of partial blocks, 0 elsewhere."""
        dense = to_dense(self.partial_offsets, self.partial_ids, self.max_k_blocks, self.partial_patterns + 1)
        return dense.view(self.heads, self.q_blocks, self.max_k_blocks)

    def to_mask(self) -> Tensor:
        """bool [heads, q_blocks, max_k_blocks]: blocks kept, full or partial; False beyond a sequence's key blocks."""
        return self.full_mask() if self.partial_ids.shape[0] == 0 else self.full_mask() | (self.slots() > 0)

    def cover(self) -> BlockLayout:
        """The same blocks, the partial ones in full: every pair of tokens that counted still does."""
        if self.partial_ids.shape[0] == 0:
            return self
        capacity = self.ids.shape[0] + self.partial_ids.shape[0]
        return BlockLayout.from_packed(self.grid, self.to_mask(), capacity=capacity)

    @staticmethod
    def from_packed(grid: BlockGrid, mask: Tensor, *, capacity: int | None = None) -> BlockLayout:
        """Full blocks only, from a packed mask on the device of the grid, trusted: the way of a selection on a device.

        Args:
            grid: lengths and block sizes.
            mask: bool [heads, q_blocks, max_k_blocks], False beyond a sequence's key blocks.
            capacity: see :meth:`from_mask`.
        """
        capacity = mask.shape[0] * grid.blocks if capacity is None else capacity
        offsets, ids, _ = to_lists(mask.flatten(0, 1), capacity)
        none = ids.new_zeros(0)
        patterns = ids.new_zeros(0, grid.block_k, words(grid.block_q))
        return BlockLayout(grid, mask.shape[0], offsets, ids, torch.zeros_like(offsets), none, none, patterns)

    @staticmethod
    def from_slots(
        grid: BlockGrid,
        full: Tensor,
        slots: Tensor,
        patterns: Tensor,
        *,
        capacity: int | None = None,
        capacity_partial: int | None = None,
    ) -> BlockLayout:
        """Full and partial blocks, from packed tensors on the device of the grid, trusted.

        Args:
            grid: lengths and block sizes.
            full: bool [heads, q_blocks, max_k_blocks], the full blocks.
            slots: int32 [heads, q_blocks, max_k_blocks], pattern + 1 of partial blocks, 0 elsewhere.
            patterns: int32 [n, block_k, ceil(block_q / 32)].
            capacity, capacity_partial: see :meth:`from_mask`; of full and of partial blocks.
        """
        bound = full.shape[0] * grid.blocks
        offsets, ids, _ = to_lists(full.flatten(0, 1), bound if capacity is None else capacity)
        slots = slots.flatten(0, 1)
        partial_offsets, partial_ids, place = to_lists(
            slots > 0, bound if capacity_partial is None else capacity_partial
        )
        which = _patterns_at(slots, place)
        patterns, same = distinct(patterns)
        if same is not None:
            which = same[which.long()]
        return BlockLayout(grid, full.shape[0], offsets, ids, partial_offsets, partial_ids, which, patterns)


def _patterns_at(slots: Tensor, place: Tensor) -> Tensor:
    """int32 [entries], the patterns at these places of [rows, width]; unused entries point anywhere."""
    if slots.numel() == 0:
        return slots.new_zeros(place.shape)
    return (slots.reshape(-1)[place] - 1).clamp_(min=0)
