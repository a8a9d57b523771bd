# SPDX-License-Identifier: Apache-2.0
"""Layouts for tests, what the reference says about them, and strategies that draw them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gapless.plan.block_grid import BLOCK_SIZES, BlockGrid
from gapless.plan.block_layout import BlockLayout
from gapless.reference import block_sparse as reference
from gapless.testing.varlen import Batch, Results, attend, make_batch

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def random_mask(
    grid: BlockGrid,
    heads: int,
    density: float | Sequence[float],
    *,
    seed: int = 0,
    empty_rows: float = 0.0,
    empty_columns: float = 0.0,
) -> Tensor:
    """bool [heads, q_blocks, max_k_blocks], False beyond a sequence's key blocks; on the CPU.

    Args:
        grid: lengths and block sizes.
        heads: pattern heads.
        density: chance that a block is kept; one, or one for each head.
        seed: of everything drawn.
        empty_rows, empty_columns: chance that a row of a head, or a column of a head, keeps nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    chance = torch.as_tensor(density, dtype=torch.float32).expand(heads)[:, None, None]

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    mask = draw(heads, grid.q_blocks, grid.max_k_blocks) < chance
    mask &= draw(heads, grid.q_blocks, 1) >= empty_rows
    mask &= draw(heads, 1, grid.max_k_blocks) >= empty_columns
    return mask if grid.inside is None else mask & grid.inside.cpu()


def make_layout(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int] | None = None,
    *,
    heads: int = 1,
    block_q: int = 64,
    block_k: int = 64,
    density: float | Sequence[float] = 0.5,
    partial: float = 0.0,
    seed: int = 0,
    empty_rows: float = 0.0,
    empty_columns: float = 0.0,
) -> BlockLayout:
    """A random layout on the CPU.

    Args:
        lengths_q, lengths_k: tokens of each sequence; None: keys are as many as queries.
        heads, density, seed, empty_rows, empty_columns: see :func:`random_mask`.
        block_q, block_k: tokens in a block.
        partial: chance that a kept block is partial. Its cells are random; some of its rows and columns are empty.
    """
    grid = BlockGrid.make(list(lengths_q), lengths_k, block_q=block_q, block_k=block_k)
    mask = random_mask(grid, heads, density, seed=seed, empty_rows=empty_rows, empty_columns=empty_columns)
    if not partial or not grid.batch:
        return BlockLayout.from_packed(grid, mask)
    generator = torch.Generator().manual_seed(seed + 1)
    cut = torch.rand(mask.shape, generator=generator) < partial
    tokens = []
    for part, is_cut, len_q, len_k in zip(
        grid.split(mask), grid.split(cut), grid.lengths_q, grid.lengths_k, strict=True
    ):
        kept, cells_cut = (
            x.repeat_interleave(block_q, 1).repeat_interleave(block_k, 2)[:, :len_q, :len_k]
            for x in (part, is_cut)
        )
        cells = torch.rand(kept.shape, generator=generator) < 0.6
        cells &= torch.rand(heads, len_q, 1, generator=generator) < 0.8
        cells &= torch.rand(heads, 1, len_k, generator=generator) < 0.8
        tokens.append(kept & (cells | ~cells_cut))
    return BlockLayout.from_token_mask(tokens, block_q=block_q, block_k=block_k)


def layout_batch(layout: BlockLayout, **how: Any) -> Batch:
    """A packed batch of the layout's lengths; arguments of :func:`gapless.testing.make_batch`."""
    return make_batch(layout.grid.lengths_q, layout.grid.lengths_k, **how)


def attend_layout(
    function: Callable[..., Any], batch: Batch, layout: BlockLayout, *, grad: bool = True, **options: Any
) -> Results:
    """Call ``function``, which has the signature of :func:`gapless.block_sparse_attention`, and differentiate it."""

    def call(q, k, v, cu_seqlens_q, cu_seqlens_k, *, sinks, return_lse, **rest):
        return function(q, k, v, layout, return_lse=return_lse, **rest)

    return attend(call, batch, grad=grad, **options)


def layout_oracle_and_witness(
    batch: Batch, layout: BlockLayout, *, grad: bool = True, **options: Any
) -> tuple[Results, Results]:
    """The reference in float64, and in the dtype of the batch; arguments as in :func:`attend_layout`."""

    def specification(*args: Any, return_lse: bool, **rest: Any) -> tuple[Tensor, Tensor]:
        return reference.block_sparse_attention(*args, **rest)

    wide = Batch(
        **{
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in vars(batch).items()
        }
    )
    return (
        attend_layout(specification, wide, layout, grad=grad, **options),
        attend_layout(specification, batch, layout, grad=grad, **options),
    )


class Drawn(NamedTuple):
    """A layout, and heads that may use it."""

    layout: BlockLayout
    heads: int
    kv_heads: int
    seed: int


def layouts(
    *,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    max_length: int = 200,
    max_batch: int = 4,
    partial: bool = True,
) -> SearchStrategy[Drawn]:
    """Strategy of layouts: several sequences, empty ones too, lengths off the block size, every ratio of heads.

    Args:
        block_sizes: to draw both blocks from.
        max_length: most tokens of a sequence.
        max_batch: most sequences.
        partial: draw partial blocks too.
    """
    from hypothesis import strategies as st

    @st.composite
    def draw_layout(draw: Callable[..., Any]) -> Drawn:
        blocks = st.sampled_from(list(block_sizes))
        block_q, block_k = draw(blocks), draw(blocks)
        length = st.one_of(
            st.integers(0, max_length),
            st.sampled_from([n for n in (0, 1, block_q - 1, block_q, block_k + 1) if n <= max_length]),
        )
        lengths_q = draw(st.lists(length, max_size=max_batch))
        same = draw(st.booleans())
        lengths_k = lengths_q if same else [draw(length) for _ in lengths_q]
        kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        pattern_heads = draw(st.sampled_from(sorted({1, kv_heads, kv_heads * group})))
        seed = draw(st.integers(0, 2**16))
        chance = st.sampled_from([0.0, 0.3])
        share = draw(st.sampled_from([0.0, 0.5, 1.0])) if partial else 0.0
        layout = make_layout(
            lengths_q,
            lengths_k,
            heads=pattern_heads,
            block_q=block_q,
            block_k=block_k,
            density=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
            partial=share,
            seed=seed,
            empty_rows=draw(chance),
            empty_columns=draw(chance),
        )
        return Drawn(layout, kv_heads * group, kv_heads, seed)

    return draw_layout()
