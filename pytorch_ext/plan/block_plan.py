# SPDX-License-Identifier: Apache-2.0
"""What a run over a layout needs beside its lists, worked out ahead of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from gapless.plan.block_lists import BlockLists

if TYPE_CHECKING:
    from gapless.plan.block_layout import BlockLayout


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """A layout with the order of its rows and its transposed lists.

    Attributes:
        layout: whose lists these are.
        causal: the mask that the order is for; it decides the cost of a row, not what it sees.
        order: int32 [rows], the costliest row first.
        transposed: the lists by key block, for the backward pass; None where it was not asked for.
    """

    layout: BlockLayout
    causal: bool
    order: Tensor
    transposed: BlockLists | None


def plan(layout: BlockLayout, causal: bool = False, *, backward: bool = True) -> BlockPlan:
    """Work out, or find in the layout, what kernels on a GPU need: for a run whose own time counts.

    Args:
        layout: the lists.
        causal: of the runs to come.
        backward: whether gradients will be asked for.
    """
    return BlockPlan(layout, causal, layout.order(causal), layout.transposed if backward else None)
