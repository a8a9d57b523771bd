# SPDX-License-Identifier: Apache-2.0
"""Problems of block-sparse attention as data: one sequence, random tensors, random blocks in exact numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gapless.bench.cases import DTYPES

if TYPE_CHECKING:
    from gapless import BlockLayout, VarlenPlan
    from gapless.plan import BlockGrid

DIRECTIONS = ("fwd", "bwd")


@dataclass(frozen=True)
class BlockCase:
    """One study under one setting.

    Attributes:
        study: a key of :data:`gapless.bench.block_studies.STUDIES`.
        densities: shares of the blocks of each row of blocks that are kept.
        block: tokens of a query block and of a key block.
        direction: ``bwd`` is the backward pass alone.
    """

    study: str
    densities: tuple[float, ...]
    tokens: int = 8192
    heads: int = 8
    dim: int = 64
    dtype: str = "float32"
    block: int = 64
    direction: str = "fwd"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: it has to be one of {', '.join(DTYPES)}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}: it has to be one of {', '.join(DIRECTIONS)}")
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}: it has to be 1 or more")
        if self.heads < 1:
            raise ValueError(f"heads is {self.heads}: it has to be 1 or more")
        if not 1 <= self.dim <= 256:
            raise ValueError(f"dim is {self.dim}: it has to be from 1 to 256")
        for density in self.densities:
            if not 0 < density <= 1:
                raise ValueError(f"density is {density}: it has to be above 0 and at most 1")
        self.grid  # noqa: B018  (says what is wrong with a block)

    @property
    def label(self) -> str:
        dtype = self.dtype.replace("float", "fp").replace("bfp", "bf")
        shape = f"{self.tokens} tokens, h{self.heads} d{self.dim} {dtype}, block {self.block}"
        density = f", density {self.densities[0]:g}" if len(self.densities) == 1 else ""
        return f"{self.study}: {shape}{density}, {self.direction}"

    @property
    def grid(self) -> BlockGrid:
        from gapless.plan import BlockGrid

        return BlockGrid.make(self.tokens, block_q=self.block, block_k=self.block, device=self.device)

    @property
    def flops(self) -> float:
        """Operations of dense attention: two products of 2 * tokens ** 2 * dim forward, five backward."""
        products = 2 if self.direction == "fwd" else 5
        return products * 2 * self.tokens**2 * self.heads * self.dim

    def problem(self, *densities: float, seed: int = 0) -> Problem:
        """Random tensors, the same for the same seed, with :func:`random_blocks` of these densities."""
        make = torch.Generator().manual_seed(seed)
        dtype = DTYPES[self.dtype]
        q, k, v, dout = (
            torch.randn(self.tokens, self.heads, self.dim, generator=make).to(self.device, dtype)
            for _ in range(4)
        )
        mask = random_blocks(
            self.grid.q_blocks, self.heads, densities or self.densities[:1] or (1.0,), seed=seed
        )
        return Problem(self, q, k, v, dout, mask.to(self.device))


@dataclass(frozen=True, eq=False)
class Problem:
    """What is asked: q, k, v, dout [tokens, heads, dim]; mask bool [heads, blocks, blocks]."""

    case: BlockCase
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Tensor

    @cached_property
    def layout(self) -> BlockLayout:
        from gapless import BlockLayout

        return BlockLayout.from_packed(self.case.grid, self.mask)

    @cached_property
    def plan(self) -> VarlenPlan:
        from gapless import VarlenPlan

        return VarlenPlan.make(self.cu_seqlens)

    @property
    def cu_seqlens(self) -> Tensor:
        return self.case.grid.cu_seqlens_q

    @property
    def density(self) -> float:
        return self.mask.float().mean().item()

    def with_blocks(self, *densities: float) -> Problem:
        """The same tensors with other blocks."""
        blocks = random_blocks(self.mask.shape[1], self.case.heads, densities)
        return dataclasses.replace(self, mask=blocks.to(self.mask.device))

    def all_blocks(self) -> Problem:
        """Dense attention on the same tensors."""
        return dataclasses.replace(self, mask=torch.ones_like(self.mask))


def random_blocks(blocks: int, heads: int, densities: Sequence[float], *, seed: int = 0) -> Tensor:
    """bool [heads, blocks, blocks]: every row has ``density * blocks`` of them, rounded, at least one, at random.

    Head ``h`` has density ``densities[h % len(densities)]``.
    """
    draw = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(seed + 1))
    share = torch.tensor([densities[h % len(densities)] for h in range(heads)], dtype=torch.float64)
    count = (share * blocks + 0.5).floor().clamp(min=1).long()
    return draw.argsort(-1).argsort(-1) < count[:, None, None]
