# SPDX-License-Identifier: Apache-2.0
"""Scores of blocks: how much of the attention weights lies in each, exactly or by a cheap estimate.

All give float32 [heads, q_blocks, max_k_blocks] for the :class:`BlockGrid` of a packed batch, 0 where a sequence has no
block, and all estimate one quantity, :func:`gapless.block_mass`: a row that sees keys adds up to the number of its
queries. So selectors, recall and thresholds mean the same with each. None has a gradient or waits for a device.

For patterns that the query heads of a kv head share, add scores up: ``scores.unflatten(0, (kv_heads, -1)).sum(1)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from gapless.ops.block_sparse import block_mass
from gapless.ops.checks import check_shape, check_tensors, number
from gapless.ops.impl import Impl
from gapless.plan.block_grid import BlockGrid

CELLS = 2**25  # most scores in memory at once
MASS_BITS = (
    36  # masses as whole numbers: differences of running sums are exact, on any device, even if those wrap
)


def exact_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    grid: BlockGrid,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """The attention weights of each block, added up (AdaSpa, arXiv:2502.21079, equation 13).

    Args:
        q: [tokens_q, heads, dim].
        k: [tokens_k, kv_heads, dim].
        lse: [heads, tokens_q], from dense attention of these inputs, or of an earlier step's for an estimate.
        grid: lengths and block sizes.
        causal, scale, softcap, impl: as in :func:`gapless.varlen_attention`.
    """
    _check(q, k, grid)
    return block_mass(
        q,
        k,
        lse,
        cu_seqlens_q=grid.cu_seqlens_q,
        cu_seqlens_k=grid.cu_seqlens_k,
        block_q=grid.block_q,
        block_k=grid.block_k,
        causal=causal,
        scale=scale,
        softcap=softcap,
        impl=impl,
    )


def pooled(
    q: Tensor, k: Tensor, grid: BlockGrid, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention between the means of blocks (block estimate of MInference, arXiv:2407.02490).

    The weight of a short block is its share of a full one. Arguments as in :func:`exact_mass`.
    """
    scale = _check(q, k, grid, scale)
    means_q, sizes_q = _means(q, grid.lengths_q, grid.block_q)
    means_k, sizes_k = _means(k, grid.lengths_k, grid.block_k)
    parts = []
    for i, (rows, columns) in enumerate(_spans(grid.counts_q, grid.counts_k)):
        hidden = _above_diagonal(grid, i, grid.block_q, grid.block_k, 0, grid.counts_q[i]) if causal else None
        scores = _products(means_q[rows], means_k[columns]) * scale
        parts.append(_masses(scores, sizes_q[rows], sizes_k[columns], hidden))
    return _pack(parts, q, grid)


def antidiagonal(
    q: Tensor,
    k: Tensor,
    grid: BlockGrid,
    *,
    stride: int = 8,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scores along antidiagonals only: one of each ``stride`` (XAttention, arXiv:2503.16428).

    A tile of ``stride`` queries and as many keys is scored by the mean over its antidiagonal, which costs
    ``1 / stride`` of the scores; the softmax is over tiles, and blocks add their tiles up. A tile with fewer tokens
    repeats its last one, and weighs its share of a full tile. Products are of the dtype of q.

    Args:
        q, k, grid, causal, scale: as in :func:`exact_mass`.
        stride: tokens of a tile, a divisor of both blocks; the paper takes 8 and 16.
    """
    scale = _check(q, k, grid, scale)
    if stride not in (1, 2, 4, 8, 16, 32, 64) or grid.block_q % stride or grid.block_k % stride:
        raise ValueError(
            f"stride is {stride!r:.80}: it has to be a power of two that divides the blocks, "
            f"{grid.block_q} and {grid.block_k}"
        )
    tiles_q, sizes_q = _tiles(q, grid.lengths_q, stride)
    tiles_k, sizes_k = _tiles(k, grid.lengths_k, stride)
    tiles_q = tiles_q.flip(1)  # an antidiagonal pairs the last query with the first key
    per_row, per_column = grid.block_q // stride, grid.block_k // stride
    spans = _spans(*([-(-n // stride) for n in lengths] for lengths in (grid.lengths_q, grid.lengths_k)))
    parts = []
    for i, (rows, columns) in enumerate(spans):
        keys, sizes = tiles_k[columns], sizes_k[columns]
        done = []
        step = max(1, CELLS // max(q.shape[1] * keys.shape[0] * per_row, 1)) * per_row
        for first in range(rows.start, rows.stop, step):
            some = slice(first, min(first + step, rows.stop))
            hidden = None
            if causal:
                begin, end = first - rows.start, some.stop - rows.start
                hidden = _above_diagonal(grid, i, stride, stride, begin, end)
            scores = _products(tiles_q[some], keys).float() * (scale / stride)
            masses = _masses(scores, sizes_q[some], sizes, hidden)
            done.append(_add_up(masses, per_row, per_column))
        parts.append(torch.cat(done, 1) if done else _nothing(q, grid, i))
    return _pack(parts, q, grid)


def vertical_slash(
    q: Tensor,
    k: Tensor,
    grid: BlockGrid,
    *,
    sample: int = 64,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Columns and diagonals, found from few queries (MInference, arXiv:2407.02490; FlexPrefill, arXiv:2502.20766).

    The weights of sampled queries are averaged over queries for each key (a vertical line) and over the queries that
    have a key at each distance (a slash); a cell's estimate is the sum of the two, a block's of its cells, and a row is
    brought to its number of queries. Sampled are the last queries, and, without the causal mask, the first ones too,
    as the last see no key far to their right.

    Args:
        q, k, grid, causal, scale: as in :func:`exact_mass`.
        sample: queries to sample at each end of a sequence.
    """
    scale = _check(q, k, grid, scale)
    if isinstance(sample, bool) or not isinstance(sample, int) or sample < 1:
        raise ValueError(f"sample is {sample!r:.80}: it has to be a number of queries, 1 or more")
    parts = []
    for i, (rows, columns) in enumerate(_spans(grid.lengths_q, grid.lengths_k)):
        len_q, len_k = rows.stop - rows.start, columns.stop - columns.start
        if len_q == 0 or len_k == 0:
            parts.append(_nothing(q, grid, i))
            continue
        ends = [(max(len_q - sample, 0), len_q)]
        if not causal and ends[0][0] > 0:
            ends.append((0, min(sample, ends[0][0])))
        vertical = q.new_zeros(q.shape[1], len_k, dtype=torch.float32)
        slash = q.new_zeros(q.shape[1], len_q + len_k - 1, dtype=torch.float32)
        seen = np.zeros(len_q + len_k - 1, dtype=np.int64)
        for begin, end in ends:
            weights = _weights(q[rows][begin:end], k[columns], scale, begin, len_q, causal)
            vertical += weights.sum(1)
            # Distance of key j from query i: j - i + len_q - 1, so that it starts at 0.
            slash[:, len_q - end : len_q - begin + len_k - 1] += _diagonals(weights)
            seen += _overlaps(len_q + len_k - 1, len_q - end, len_q - begin, len_k)
        vertical /= sum(end - begin for begin, end in ends)
        slash /= torch.from_numpy(np.maximum(seen, 1)).to(slash.device, non_blocking=True)
        scores = _line_masses(vertical, slash, len_q, grid)
        if causal:
            hidden = _above_diagonal(grid, i, grid.block_q, grid.block_k, 0, grid.counts_q[i])
            scores = scores.masked_fill(hidden, 0.0)
        total = scores.sum(-1, keepdim=True)
        queries = _sizes((len_q,), grid.block_q, q.device)[:, None]
        parts.append(scores / torch.where(total > 0, total, 1) * queries)
    return _pack(parts, q, grid)


def _masses(scores: Tensor, sizes_q: Tensor, sizes_k: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax over the last axis, each key weighing ``sizes_k``, each row adding up to ``sizes_q``; 0 where hidden."""
    scores = scores.float() + sizes_k.log()
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if scores.shape[-1] == 0:
        return scores
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest.masked_fill(highest == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights * (sizes_q[:, None] / torch.where(total == 0, 1.0, total))


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """[heads, nq, nk] of queries [nq, .., heads, dim] and keys [nk, .., kv_heads, dim], summed over all but heads."""
    (nq, heads), (nk, kv_heads) = ((x.shape[0], x.shape[-2]) for x in (queries, keys))
    inner = math.prod(keys.shape[1:]) // kv_heads
    left = queries.movedim(-2, 0).reshape(kv_heads, heads // kv_heads * nq, inner)
    right = keys.movedim(-2, 0).reshape(kv_heads, nk, inner)
    return (left @ right.transpose(1, 2)).view(heads, nq, nk)


def _means(x: Tensor, lengths: Sequence[int], block: int) -> tuple[Tensor, Tensor]:
    """float32 [blocks, heads, dim], and float32 [blocks] tokens of each."""
    tiles, sizes = _tiles(x, lengths, block)
    if all(n % block == 0 for n in lengths):
        return tiles.mean(1, dtype=torch.float32), sizes
    real = torch.arange(block, device=x.device) < sizes[:, None]
    total = torch.where(real[..., None, None], tiles, 0).sum(1, dtype=torch.float32)
    return total / sizes[:, None, None], sizes


def _tiles(x: Tensor, lengths: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """[tiles, size, heads, dim] of each sequence, its last token repeated, and float32 [tiles], tokens of each."""
    sizes = _sizes(tuple(lengths), size, x.device)
    if all(n % size == 0 for n in lengths):
        return x.unflatten(0, (sizes.shape[0], size)), sizes
    return x[_places(tuple(lengths), size, x.device)], sizes


@lru_cache(maxsize=64)
def _sizes(lengths: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    sizes = [min(size, n - first) for n in lengths for first in range(0, n, size)]
    return torch.tensor(sizes, dtype=torch.float32).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _places(lengths: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    rows = [
        np.minimum(np.arange(-(-n // size) * size), n - 1) + start
        for n, start in zip(lengths, accumulate(lengths, initial=0), strict=False)
        if n
    ]
    places = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(places.reshape(-1, size)).to(device, non_blocking=True)


def _spans(*counts: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Where each sequence's entries are, on each side."""
    sides = [list(accumulate(c, initial=0)) for c in counts]
    for i in range(len(counts[0])):
        yield tuple(slice(side[i], side[i + 1]) for side in sides)


def _above_diagonal(grid: BlockGrid, sequence: int, size_q: int, size_k: int, begin: int, end: int) -> Tensor:
    """bool [end - begin, tiles of keys]: no query of tile ``begin ..`` of queries sees a key of the tile."""
    len_q, len_k = grid.lengths_q[sequence], grid.lengths_k[sequence]
    last = (
        (torch.arange(begin + 1, end + 1, device=grid.device) * size_q).clamp(max=len_q) - 1 + len_k - len_q
    )
    return torch.arange(0, len_k, size_k, device=grid.device) > last[:, None]


def _add_up(masses: Tensor, per_row: int, per_column: int) -> Tensor:
    """Blocks of [heads, nq, nk], the last ones short."""
    _, nq, nk = masses.shape
    padded = torch.nn.functional.pad(masses, (0, -nk % per_column, 0, -nq % per_row))
    return padded.unflatten(2, (-1, per_column)).unflatten(1, (-1, per_row)).sum((2, 4))


def _weights(q: Tensor, k: Tensor, scale: float, begin: int, len_q: int, causal: bool) -> Tensor:
    """float32 [heads, sampled, len_k]: softmax weights of queries ``begin ..`` of a sequence."""
    scores = _products(q, k).float() * scale
    if causal:
        last = torch.arange(begin, begin + q.shape[0], device=q.device) + k.shape[0] - len_q
        scores = scores.masked_fill(torch.arange(k.shape[0], device=q.device) > last[:, None], -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest.masked_fill(highest == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def _diagonals(weights: Tensor) -> Tensor:
    """[heads, n + len_k - 1]: sums over cells of equal j - i, the lowest first."""
    heads, n, len_k = weights.shape
    # Rows of one entry less than they are stored with move one place to the right each.
    stored = torch.nn.functional.pad(weights.flip(1), (0, n)).flatten(1)[:, :-n]
    return stored.view(heads, n, n + len_k - 1).sum(1)


def _line_masses(vertical: Tensor, slash: Tensor, len_q: int, grid: BlockGrid) -> Tensor:
    """[heads, q_blocks, k_blocks]: sums over each block's cells of ``vertical[j] + slash[j - i + len_q - 1]``."""
    len_k = vertical.shape[1]
    begin_q, end_q = _edges(len_q, grid.block_q, grid.device)
    begin_k, end_k = _edges(len_k, grid.block_k, grid.device)
    columns = _running(_whole(vertical))
    lines = columns[:, end_k] - columns[:, begin_k]
    # Over queries i0 .. i1 - 1 and keys below j: running sums at j - i added up, a difference of their running sum.
    twice = _running(_running(_whole(slash)))

    def below(edge: Tensor) -> Tensor:
        top = edge[None, :] + len_q + 1 - begin_q[:, None]
        return twice[:, top - 1] - twice[:, top - 1 - (end_q - begin_q)[:, None]]

    cells = below(end_k) - below(begin_k)
    total = cells + lines[:, None, :] * (end_q - begin_q)[None, :, None]
    return total.double().mul(2.0**-MASS_BITS).float()


def _whole(x: Tensor) -> Tensor:
    return x.double().mul(2.0**MASS_BITS).round().long()


def _running(x: Tensor) -> Tensor:
    """[heads, n + 1]: sums of the first 0, 1, .. n entries."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _edges(length: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    begin = torch.arange(0, length, block, device=device)
    return begin, (begin + block).clamp(max=length)


def _overlaps(length: int, begin: int, end: int, width: int) -> np.ndarray:
    """int64 [length]: how many of the windows of ``width`` that start at ``begin .. end - 1`` hold each place."""
    place = np.arange(length)
    return np.maximum(np.minimum(place, end - 1) - np.maximum(place - width + 1, begin) + 1, 0)


def _nothing(q: Tensor, grid: BlockGrid, sequence: int) -> Tensor:
    return q.new_zeros(q.shape[1], grid.counts_q[sequence], grid.counts_k[sequence], dtype=torch.float32)


def _pack(parts: list[Tensor], q: Tensor, grid: BlockGrid) -> Tensor:
    return grid.pack(parts) if parts else q.new_zeros(q.shape[1], 0, 0, dtype=torch.float32)


def _check(q: Tensor, k: Tensor, grid: BlockGrid, scale: float | None = None) -> float:
    check_tensors(q=q, k=k)
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(f"q has shape {list(q.shape)}: it has to be [tokens, heads, dim]")
    check_shape("q", q, (sum(grid.lengths_q), *q.shape[1:]))
    check_shape("k", k, (sum(grid.lengths_k), "kv_heads", q.shape[2]))
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, k has {k.shape[1]}: the first has to be a multiple of the second"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise TypeError(f"q is {q.dtype}, k is {k.dtype}: they have to be of one floating-point type")
    device = grid.cu_seqlens_q.device  # with its number, which the grid's own may lack
    if q.device != device or k.device != device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, the grid on {device}: they have to be on one")
    return 1 / math.sqrt(q.shape[2]) if scale is None else number("scale", scale)
