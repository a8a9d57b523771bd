# SPDX-License-Identifier: Apache-2.0
"""Layouts that are kept: one or two bits for each block, for the masks of many layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gapless.plan import block_layout
from gapless.plan.block_grid import BlockGrid
from gapless.plan.block_lists import to_lists
from gapless.plan.block_patterns import pack_bits, unpack_bits


@dataclass(frozen=True, eq=False)
class CompactLayout:
    """A :class:`BlockLayout` in few bytes; neither way waits for a device.

    Attributes:
        grid: lengths and block sizes, shared with the layout.
        full: int32 [heads, q_blocks, ceil(max_k_blocks / 32)], one bit for each full block.
        partial: the same of partial blocks; None: there are none.
        partial_patterns: int32 [partial capacity], the pattern of each partial block, row by row.
        patterns: int32 [n, block_k, ceil(block_q / 32)].
        capacity: entries that the layout's list of full blocks had room for.
    """

    grid: BlockGrid
    full: Tensor
    partial: Tensor | None
    partial_patterns: Tensor
    patterns: Tensor
    capacity: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        tensors = (self.full, self.partial, self.partial_patterns, self.patterns)
        return sum(t.nbytes for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> CompactLayout:
        """The same with its tensors on ``device``."""
        full = self.full.to(device, non_blocking=True)
        partial, which, patterns = (
            None if t is None else t.to(device, non_blocking=True)
            for t in (self.partial, self.partial_patterns, self.patterns)
        )
        assert which is not None and patterns is not None
        return CompactLayout(self.grid.to(full.device), full, partial, which, patterns, self.capacity)

    def expand(self) -> block_layout.BlockLayout:
        """The layout it was made from."""
        width = self.grid.max_k_blocks
        mask = unpack_bits(self.full, width)
        if self.partial is None:
            return block_layout.BlockLayout.from_packed(self.grid, mask, capacity=self.capacity)
        offsets, ids, _ = to_lists(mask.flatten(0, 1), self.capacity)
        partial = unpack_bits(self.partial, width).flatten(0, 1)
        partial_offsets, partial_ids, _ = to_lists(partial, self.partial_patterns.shape[0])
        return block_layout.BlockLayout(
            self.grid,
            mask.shape[0],
            offsets,
            ids,
            partial_offsets,
            partial_ids,
            self.partial_patterns[: partial_ids.shape[0]],
            self.patterns,
        )


def compact(layout: block_layout.BlockLayout) -> CompactLayout:
    """The layout in few bytes, for keeping."""
    partial = None if layout.partial_ids.shape[0] == 0 else pack_bits(layout.slots() > 0)
    return CompactLayout(
        layout.grid,
        pack_bits(layout.full_mask()),
        partial,
        layout.partial_patterns,
        layout.patterns,
        layout.ids.shape[0],
    )
